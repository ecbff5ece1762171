"""Official archives: fetched from a server of the test's own, good ones and bad ones."""

import hashlib
import http.server
import io
import stat
import threading
import zipfile

import pytest

from data import archives
from data.archives import Archive, data_folder, local_folder
from data.tasks import TASKS
from train import main

TRAIN, DEV = "sentence\tlabel\nfine \t1\ndull \t0\n", "sentence\tlabel\ngood \t1\n"
FILES = {"SST-2/train.tsv": TRAIN, "SST-2/dev.tsv": DEV, "SST-2/original/train.tsv": "other", "README": "nor this"}


def zipped(files: dict[str, str], links: tuple[str, ...] = ()) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK if name in links else stat.S_IFREG) << 16
            archive.writestr(info, text)
    return held.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a dict of bytes by path; the cache and the working directory are new."""
    served = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = served.get(self.path)
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    served["address"] = f"http://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    server.server_close()


def offer(served: dict, content: bytes, monkeypatch, name: str = "/SST-2.zip", task: str = "sst2", **other) -> None:
    served[name] = content
    archive = Archive(served["address"] + name, hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setitem(archives.ARCHIVES, task, (archive._replace(**other),))


def test_an_archive_is_fetched_once_and_only_its_wanted_files_are_unpacked(server, tmp_path, monkeypatch):
    offer(server, zipped(FILES), monkeypatch)
    assert local_folder(TASKS["sst2"]) is None
    folder = data_folder(TASKS["sst2"])
    assert folder == tmp_path / "cache/quzo/datasets"
    there = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert there == {"SST-2/train.tsv": TRAIN, "SST-2/dev.tsv": DEV}
    server.clear()
    assert data_folder(TASKS["sst2"]) == folder == local_folder(TASKS["sst2"])  # without the server
    (tmp_path / "datasets/SST-2").mkdir(parents=True)
    assert data_folder(TASKS["sst2"]) == archives.LOCAL  # what lies at hand comes first


def test_plain_files_are_put_in_their_places(server, monkeypatch):
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        server[f"/{name}"] = name.encode()
    both = [
        Archive(f"{server['address']}/{name}", hashlib.sha256(name.encode()).hexdigest(), len(name))
        for name in ("train-v1.1.json", "dev-v1.1.json")
    ]
    monkeypatch.setitem(archives.ARCHIVES, "squad", tuple(both))
    folder = data_folder(TASKS["squad"])
    assert (folder / "squad/dev-v1.1.json").read_text() == "dev-v1.1.json"


GOOD = zipped(FILES)
BAD = {
    "leads out of its folder": zipped(FILES | {"../evil": "x"}),
    "'/etc/evil', which leads": zipped(FILES | {"/etc/evil": "x"}),
    r"evil', which leads": zipped(FILES | {"SST-2\\..\\evil": "x"}),
    "'C:/evil', which leads": zipped(FILES | {"C:/evil": "x"}),
    "holds a link": zipped(FILES | {"SST-2/link": "/etc/passwd"}, links=("SST-2/link",)),
    "is no .zip file": b"<html>sign in</html>",
    "no .zip file that can be read": GOOD[:200] + bytes([GOOD[200] ^ 255]) + GOOD[201:-80],
    "holds no dev.tsv|hold no dev.tsv": zipped({"SST-2/train.tsv": TRAIN}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_bad_archive_is_refused(server, tmp_path, monkeypatch, message):
    offer(server, BAD[message], monkeypatch)
    with pytest.raises(ValueError, match=message):
        data_folder(TASKS["sst2"])
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "train.tsv"]
    assert not left and not list(tmp_path.parent.glob("evil"))


def test_a_damaged_member_leaves_nothing(server, tmp_path, monkeypatch):
    content = bytearray(zipped({"SST-2/train.tsv": "a" * 5000 + TRAIN * 50}))
    content[60] ^= 255  # within the compressed text
    offer(server, bytes(content), monkeypatch)
    with pytest.raises((ValueError, OSError)):
        data_folder(TASKS["sst2"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_other_contents_than_the_published_are_refused(server, tmp_path, monkeypatch):
    offer(server, GOOD, monkeypatch, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"SHA-256 {'0' * 64}: got {len(GOOD):,} bytes, SHA-256 "):
        data_folder(TASKS["sst2"])
    offer(server, GOOD, monkeypatch, size=len(GOOD) + 1)  # the connection broke
    with pytest.raises(ValueError, match="is not the published file"):
        data_folder(TASKS["sst2"])
    offer(server, GOOD + bytes(2**22), monkeypatch, size=len(GOOD))
    with pytest.raises(ValueError, match="got more than"):
        data_folder(TASKS["sst2"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_without_a_network_one_line_says_where_from(server, monkeypatch, capsys):
    offer(server, GOOD, monkeypatch, name="/gone.zip")
    del server["/gone.zip"]
    with pytest.raises(ValueError, match=r"cannot fetch http.*gone.zip: HTTP Error 404.*--data-dir"):
        data_folder(TASKS["sst2"])
    offer(server, GOOD, monkeypatch, url="http://127.0.0.1:9/SST-2.zip")  # nobody listens
    assert main("--task sst2 --steps 1".split()) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "cannot fetch http://127.0.0.1:9/SST-2.zip: " in line
    with pytest.raises(ValueError, match=r"snli: its files are in https://.*datasets.tar, .*SNLI/train.tsv"):
        data_folder(TASKS["snli"])


def test_every_task_knows_where_its_files_come_from():
    for name, task in TASKS.items():
        if task.folder is None and name not in ("sst5", "snli", "trec"):
            assert archives.ARCHIVES[name], name
    for held in archives.ARCHIVES.values():
        for archive in held:
            assert archive.url.startswith("https://") and len(archive.sha256) == 64 and archive.size > 30_000
