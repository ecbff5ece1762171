"""Presets through huggingface_hub, against a local server that imitates the hub.

huggingface_hub reads HF_ENDPOINT when it is imported, so each resolve() runs in a process of its own.
"""

import errno
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from runtime.hub import PRESETS, resolve

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {
    "config.json": b'{"model_type": "roberta"}', "tokenizer.json": b'{"model": {}}', "model.safetensors": bytes(100_000)
}  # fmt: skip
REPO = WANTED | {
    "pytorch_model.bin": b"a pickle", "README.md": b"# RoBERTa", "merges.txt": b"a b", "runs/events.json": b"{}",
    "original/consolidated.00.pth": b"a pickle", "original/tokenizer.model": b"pieces",
    "onnx/model.safetensors": bytes(10),
}  # fmt: skip
SHARDED = {"model-00001-of-00002.safetensors": bytes(500), "model-00002-of-00002.safetensors": bytes(600),
           "model.safetensors.index.json": b'{"weight_map": {}}', "config.json": b"{}",
           "tokenizer.model": b"pieces"}  # fmt: skip
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}
NOT_FOUND = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}


class Answers(BaseHTTPRequestHandler):
    """The three requests that a download makes: the branch's commit, the commit's files, and each file."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path))
        for part, failure in self.server.failures.items():
            if part in path:
                return self.fail(failure)
        if path == f"/api/models/{self.server.repo}/revision/main":
            return self.send(json.dumps({"id": self.server.repo, "sha": COMMIT, "siblings": []}).encode())
        if path == f"/api/models/{self.server.repo}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            return self.send(json.dumps(entries).encode())
        name = path.removeprefix(f"/{self.server.repo}/resolve/{COMMIT}/")
        return self.send(self.server.files[name]) if name in self.server.files else self.fail((404, NOT_FOUND))

    do_HEAD = do_GET

    def fail(self, failure):
        if failure == "hang up":
            self.close_connection = True
        else:
            self.send(b'{"error": "no"}', *failure)

    def send(self, body: bytes, status: int = 200, headers: dict | None = None):
        self.send_response(status)
        etag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        for name, value in (etag | (headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.repo, server.files, server.failures, server.requests = "FacebookAI/roberta-base", REPO, {}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def resolving(port: int, home: Path, preset: str = "roberta-base", limit: int | None = None, **variables: str):
    """resolve(preset) in a new process that knows no hub but 127.0.0.1:port -> (its path or None, its error)."""
    program = f"""from runtime.hub import resolve
try:
    print(resolve({preset!r}))
except ValueError as error:
    print("error:", error)
"""
    foreign = ("hf_", "huggingface", "http_proxy", "https_proxy", "all_proxy")
    env = {name: value for name, value in os.environ.items() if not name.lower().startswith(foreign)}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    bound = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env | variables, timeout=60,
                          preexec_fn=bound)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, lines  # one line, be it a path or an error
    return (None, lines[0]) if lines[0].startswith("error: ") else (Path(lines[0]), "")


def downloaded(server) -> set[str]:
    """The names of the files that were asked for whole."""
    paths = [path for method, path in server.requests if method == "GET" and "/resolve/" in path]
    return {path.partition(f"{COMMIT}/")[2] for path in paths}


def failing(server, home: Path, **options) -> str:
    path, error = resolving(server.server_port, home, **options)
    assert path is None, f"resolved to {path}"
    assert server.repo in error and "--model DIRECTORY" in error
    return error


def test_a_preset_downloads_config_tokenizer_and_safetensors_once_and_nothing_else(hub, tmp_path):
    """A second call downloads nothing, and works offline."""
    path, _ = resolving(hub.server_port, tmp_path)
    assert {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()} == WANTED
    assert downloaded(hub) == set(WANTED)
    asked = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert asked == set(WANTED)  # not even a HEAD of any other
    hub.requests.clear()
    assert resolving(hub.server_port, tmp_path)[0] == path and not downloaded(hub)
    hub.requests.clear()
    assert resolving(hub.server_port, tmp_path, HF_HUB_OFFLINE="1")[0] == path and not hub.requests


@pytest.mark.full
def test_a_sharded_repository_downloads_its_index_and_all_shards(hub, tmp_path):
    hub.repo, hub.files = PRESETS["llama2-7b"], SHARDED | {"pytorch_model-00001-of-00002.bin": b"a pickle"}
    path, _ = resolving(hub.server_port, tmp_path, "llama2-7b")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == SHARDED


@pytest.mark.full
def test_an_interrupted_download_goes_on_with_the_files_that_are_missing(hub, tmp_path):
    hub.failures = {"model.safetensors": (403, {})}
    assert "cannot download" in failing(hub, tmp_path)
    hub.failures = {}
    hub.requests.clear()
    path, _ = resolving(hub.server_port, tmp_path)
    assert downloaded(hub) == {"model.safetensors"}
    assert {p.name: p.read_bytes() for p in path.iterdir()} == WANTED


LOGIN = "is gated: accept its licence at https://huggingface.co/FacebookAI/roberta-base, then `hf auth login`"
ANSWERS = [  # what fails of the hub, and what the line says
    ({"/resolve/": (401, GATED)}, LOGIN),  # the hub describes a gated repository to anyone, and refuses its files
    ({"/api/": (403, GATED)}, LOGIN),
    # it answers 401 to those who are not logged in, lest they learn which private names exist
    *(({"/api/": (status, NOT_FOUND)}, "was not found on the hub, or needs `hf auth login`") for status in (401, 404)),
    *((failures, "cannot download") for failures in (
        {"/api/": (503, {})}, {"/tree/": (400, {})}, {"/api/": "hang up"}, {"/tree/": "hang up"},
        {"config.json": (403, {})})),
]  # fmt: skip


@pytest.mark.parametrize("case", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, len(ANSWERS)))],
                         ids=lambda i: str(ANSWERS[i][0]))  # fmt: skip
def test_a_hub_that_refuses_or_answers_badly(hub, tmp_path, case):
    hub.failures, message = ANSWERS[case]
    assert message in failing(hub, tmp_path)


@pytest.mark.full
def test_a_hub_that_cannot_be_reached(hub, tmp_path):
    """Nobody listens; nobody may ask; and a limit on file size stands for a full disk: write() fails in the middle of
    model.safetensors."""
    with socket.socket() as bound:  # bound and not listening: connections to it are refused
        bound.bind(("127.0.0.1", 0))
        path, error = resolving(bound.getsockname()[1], tmp_path)
    assert path is None
    assert "cannot download FacebookAI/roberta-base" in error and "--model DIRECTORY" in error
    assert "Connect" in error  # the reason
    assert "cannot download" in failing(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert not hub.requests
    assert os.strerror(errno.EFBIG) in failing(hub, tmp_path, limit=50_000)


FAILURES = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/cache"),
    httpx.ConnectError("[Errno -2] Name or service not known"),
    httpx.ProxyError("502 Bad Gateway"),
    httpx.ReadTimeout("The read operation timed out"),
    httpx.RemoteProtocolError("peer closed connection without sending complete message body"),
    httpx.ReadError(""),
    errors.LocalEntryNotFoundError("Got: ConnectError\nAn error happened\nand more lines"),
    errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."),
    RuntimeError("Data processing error: I/O error: No space left on device"),  # hf_xet's, see xet-core issue 394
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_every_way_to_fail_becomes_one_line(failure, monkeypatch):
    def snapshot_download(*args, **options):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError) as caught:
        resolve("roberta-large")
    message = str(caught.value)
    assert "\n" not in message and "FacebookAI/roberta-large" in message and "--model DIRECTORY" in message
    assert (str(failure) or type(failure).__name__).splitlines()[0] in message
    assert "free space" in message


def test_names_and_directories_that_need_no_download(tmp_path, monkeypatch):
    """An unknown name is refused with all presets; a directory is itself; the embedded model is here."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match="unknown model 'roberta-huge'") as caught:
        resolve("roberta-huge")
    assert all(name in str(caught.value) for name in PRESETS)
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("tiny") == ROOT / "data" / "tiny" / "model"
