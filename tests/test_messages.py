"""What train.py says when something is wrong: one line that any terminal can show, and the right exit code."""

import builtins
import io
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

import train
from runtime import config, run_folder

ROOT = Path(train.__file__).parent
SHORT = "--steps 2 --eval-every 2 --num-eval 4 --batch-size 2 --device cpu".split()


def said(capsys, *flags: str) -> tuple[int, str, str]:
    capsys.readouterr()
    return train.main([*map(str, flags)]), *capsys.readouterr()


@pytest.mark.parametrize("model", ["\x1b[31mred", "a\nb\tc", "x" * 10**6, "\u202e\u2028", "\udcff"])
def test_a_message_is_one_short_line_without_control_characters(capsys, model):
    code, out, err = said(capsys, "--model", model)
    assert code in (1, 2) and out == "" and err.count("\n") == 1 and len(err) < 500
    assert err.startswith("train.py: ") and err.strip().isprintable()
    assert len(model) > 100 or "unknown model" in err and err.rstrip().endswith("roberta-large")


@pytest.mark.parametrize("flags, message", {
    "--resume": "--resume needs a name", "--replay": "--replay needs a name", "--evaluate": "--evaluate needs a name",
    "--out": "--out needs a name", "--model": "--model needs a name",
}.items())  # fmt: skip
def test_an_empty_name_is_refused(capsys, flags, message):
    assert said(capsys, flags, "") == (2, "", f"train.py: {message}, got ''\n")


def test_what_is_given_beside_a_run_is_refused_where_it_equals_a_default_too(capsys):
    for way in ("--resume", "--replay"):
        code, _, err = said(capsys, way, "runs/x", "--seed", "0", "--residual", "0")
        assert code == 2 and "a run has its own flags" in err and "residual, " in err and "seed" in err


@pytest.mark.parametrize("redirected", [">&-", "2>&-", "2>/dev/full"])
@pytest.mark.full
def test_a_broken_standard_error_does_not_end_a_run(tmp_path, redirected):
    """Nor a closed standard output: the result is in the folder."""
    command = f"{sys.executable} {ROOT / 'train.py'} {' '.join(SHORT)} --out {tmp_path / 'run'} {redirected}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (tmp_path / "run" / "result.json").is_file() and "Traceback" not in done.stderr
    assert redirected == ">&-" or done.returncode == 0


def test_a_full_disk_is_one_line(capsys, tmp_path, monkeypatch):
    """While weights are saved, which safetensors says in its own way; what was kept before it stays."""

    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("runtime.checkpoints.save_file", full)
    code, out, err = said(capsys, *SHORT, "--out", tmp_path / "run")
    assert code == 1 and out == "" and "No space left on device" in err.splitlines()[-1] and "Traceback" not in err
    monkeypatch.undo()
    assert said(capsys, "--resume", tmp_path / "run")[0] == 0  # once there is room


def test_a_missing_compiler_is_one_line(capsys, monkeypatch):
    class NoCompiler(RuntimeError):
        pass

    NoCompiler.__module__ = "torch._inductor.exc"

    def none(*args):
        raise NoCompiler("No working C++ compiler found in torch._inductor.config.cpp.cxx:\n(None, 'g++')")

    monkeypatch.setattr(train, "prepare", none)
    code, _, err = said(capsys, "--compile")
    assert code == 1 and "cannot be compiled here" in err and "try --no-compile" in err and err.count("\n") == 1
    NoCompiler.__module__ = "torch"
    with pytest.raises(NoCompiler):  # any other is a bug, and shows where
        train.main(["--compile"])


def test_a_deleted_working_directory_is_one_line(tmp_path):
    command = f"mkdir {tmp_path / 'gone'} && cd {tmp_path / 'gone'} && rmdir {tmp_path / 'gone'} && "
    command += f"{sys.executable} {ROOT / 'train.py'} {' '.join(SHORT)}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("train.py: "), done.stderr


# ---------------------------------------------------------------- other platforms


def test_without_unix_modules_a_run_trains_on_a_cpu(capsys, tmp_path, monkeypatch):
    """As on Windows, which has neither `resource` nor `fcntl`."""
    real = builtins.__import__

    def hidden(name, *rest):
        if name in ("resource", "fcntl"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", hidden)
    monkeypatch.setattr(run_folder, "fcntl", None)
    code, out, err = said(capsys, *SHORT, "--out", tmp_path / "run")
    assert code == 0 and '"peak_memory_bytes": 0' in out and "this system has no flock" in err


def test_other_accelerators_are_refused_by_name(capsys):
    for device in ("mps", "xpu", "meta", "cuda:x"):
        code, _, err = said(capsys, "--device", device)
        assert code == 2 and f"--device must be cpu, cuda or cuda:N, got '{device}'" in err


def test_an_older_python_is_told():
    """The check stands before any import that it could not read, and its file parses there."""
    text = (ROOT / "train.py").read_text()
    head = text[: text.index("import dataclasses")]
    code = head.replace("sys.version_info", "(3, 8)")
    with pytest.raises(SystemExit, match="Python 3.11 or newer is needed, this is"):
        exec(compile(code, "train.py", "exec"), {})
    compile(text, "train.py", "exec", dont_inherit=True)
    import ast

    ast.parse(text, feature_version=(3, 8))


def test_help_needs_no_gpu_and_no_data(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with pytest.raises(SystemExit) as stop:
        config.parse(["--help"])
    assert not stop.value.code
