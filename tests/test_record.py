"""A run's record binds itself: what is edited is named, what is made up is found out, no folder is stranded."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import shortened

import train
from runtime import record, run_folder
from runtime.record import read_run, sealed

FLAGS = "--steps 8 --eval-every 3 --num-eval 16 --batch-size 8 --seed 1 --lr 1e-3 --device cpu".split()


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with shortened():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*FLAGS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def said(capsys, *flags: str) -> tuple[int, dict, str]:
    capsys.readouterr()
    code = train.main([*map(str, flags)])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else {}, err


def refused(capsys, folder: Path) -> str:
    code, result, err = said(capsys, "--replay", folder)
    assert code == 2 and not result and len(err.strip().splitlines()) == 1, err
    return err


# ---------------------------------------------------------------- 60 and more edits, each of which is named


def edited(value):
    """Another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [edited(each) for each in value] or [1]
    return {name: edited(each) for name, each in value.items()} or {"x": 1}


def edit_json(path: Path, name: str) -> None:
    contents = json.loads(path.read_text())
    path.write_text(json.dumps(contents | {name: edited(contents[name])}))


def edit_line(path: Path, at: int, name: str) -> None:
    lines = path.read_text().splitlines()
    row = json.loads(lines[at])
    lines[at] = json.dumps(row | {name: edited(row[name])})
    path.write_text("\n".join(lines) + "\n")


RESULT = ("model", "task", "method", "weights", "directions", "steps", "forwards", "trainable_parameters", "zero_shot",
          "dev", "dev_loss", "best_step", "best_forwards", "lr", "metric", "test", "tests", "diverged",
          "weights_sha256", "files_sha256", "digest")  # fmt: skip
STEP = ("step", "projected_grad", "loss", "plus", "minus", "queries", "changed", "held_back", "lost", "lr", "tokens")
CONFIG = ("flags", "versions", "git_commit", "code_sha256", "data_sha256", "other_sha256", "base_weights_sha256",
          "sha256")  # fmt: skip
FLAG = ("model", "task", "method", "weights", "lr", "eps", "steps", "batch_size", "eval_every", "seed",
        "direction_bits", "estimator", "lr_schedule", "num_eval", "queries", "compute", "warmup")  # fmt: skip


def replaced(pattern: str, by: str, name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert re.search(pattern, text)
        path.write_text(re.sub(pattern, by, text, count=1))

    return edit


def edit_flag(folder: Path, name: str, seal: bool = False) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["flags"][name] = edited(config["flags"][name])
    config = sealed({key: value for key, value in config.items() if key != "sha256"}) if seal else config
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def without_line(name: str, at: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines(keepends=True)
        del lines[at]
        (folder / name).write_text("".join(lines))

    return edit


def swapped(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        first, second, *others = (folder / name).read_text().splitlines(keepends=True)[1:]
        head = (folder / name).read_text().splitlines(keepends=True)[0]
        (folder / name).write_text("".join([head, second, first, *others]))

    return edit


def other_weights(folder: Path) -> None:
    path = folder / "model/codes.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


EDITS: dict[str, tuple[Callable[[Path], None], str]] = {  # what is edited: how, and what names it
    **{f"result {n}": (lambda f, n=n: edit_json(f / "result.json", n), "result.json") for n in RESULT},
    **{f"step {n}": (lambda f, n=n: edit_line(f / "metrics.jsonl", 3, n), "metrics.jsonl:4") for n in STEP},
    **{f"dev {n}": (lambda f, n=n: edit_line(f / "metrics.jsonl", 4, n), "metrics.jsonl:5")
       for n in ("step", "forwards", "dev", "dev_loss", "digest")},
    **{f"config {n}": (lambda f, n=n: edit_json(f / "config.json", n), "config.json") for n in CONFIG},
    **{f"flag {n}": (lambda f, n=n: edit_flag(f, n), "config.json is not what the run began with") for n in FLAG},
    "a flag and the seal": (lambda f: edit_flag(f, "num_eval", seal=True), "metrics.jsonl:1 is not what the run wrote"),
    "a sign of the trajectory": (replaced("-", "", "trajectory"), "trajectory:1 has other projected gradients"),
    "a digit of the trajectory": (replaced(r"\.(\d)", r".0\1", "trajectory"), "trajectory:1 has other"),
    "a digest of the trajectory": (replaced(r" (\w)", r" 0\1", "trajectory"), "metrics.jsonl:2 is not"),
    "a line of the trajectory less": (without_line("trajectory", 2), "trajectory:3 has other projected gradients"),
    "a line of the metrics less": (without_line("metrics.jsonl", 3), "metrics.jsonl:4 is not"),
    "an evaluation less": (without_line("metrics.jsonl", 4), "metrics.jsonl:5 is not"),
    "the last line of the metrics less": (without_line("metrics.jsonl", -1), "result.json"),
    "two steps of the metrics swapped": (swapped("metrics.jsonl"), "trajectory:1 has other projected gradients"),
    "two lines of the trajectory swapped": (swapped("trajectory"), "trajectory:2 has other projected gradients"),
    "a prediction": (replaced(r'"prediction": "\w+', '"prediction": "other', "predictions.jsonl"), "predictions.jsonl"),
    "a score": (replaced(r'"scores": \[', '"scores": [1', "predictions.jsonl"), "predictions.jsonl"),
    "a gold": (replaced(r'"golds": \["', '"golds": ["x', "predictions.jsonl"), "predictions.jsonl"),
    "no predictions": (lambda f: (f / "predictions.jsonl").unlink(), "predictions.jsonl is missing"),
    "the table": (replaced(r"1,", "2,", "metrics.csv"), "metrics.csv is not what the record says"),
    "the picture": (replaced("dev loss", "my loss", "curve.svg"), "curve.svg is not what the record says"),
    "the model's config": (replaced("64", "65", "model/config.json"), "model/config.json is not what"),
    "the model's tokenizer": (replaced("great", "grand", "model/tokenizer.json"), "model/tokenizer.json is not what"),
    "no tokenizer": (lambda f: (f / "model/tokenizer.json").unlink(), "model/tokenizer.json is missing"),
    "the model's weights": (other_weights, "model does not hold the weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if at % 9 == 0 else pytest.mark.full) for at, name in enumerate(EDITS)
])  # fmt: skip
def test_what_is_edited_is_named(copy, capsys, name):
    assert len(EDITS) >= 80
    edit, message = EDITS[name]
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    edit(copy)
    assert before != {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert message in refused(capsys, copy)


@pytest.mark.parametrize("name, value", {
    "num_eval": {}, "lr": "fast", "compute": -1e38, "method": "magic", "graphs": 1, "seed": True, "queries": [1],
    "weights": None, "out": 7, "steps": 0.5, "eps": float("nan"), "batch_size": 2**40, "k": -1,
}.items())  # fmt: skip
def test_flags_of_another_type_are_refused_where_the_seal_is_made_anew(copy, capsys, name, value):
    config = json.loads((copy / "config.json").read_text())
    config["flags"][name] = value
    config = sealed({key: held for key, held in config.items() if key != "sha256"})
    (copy / "config.json").write_text(json.dumps(config))
    for line in ("trajectory", "metrics.jsonl"):
        (copy / line).write_text("")
    (copy / "result.json").unlink()
    code, _, err = said(capsys, "--resume", copy)
    assert code == 2 and err.count("\n") == 1 and name.replace("_", "-") in err.replace("_", "-")


def test_what_is_no_file_of_lines_is_refused(copy, capsys):
    (copy / "trajectory").unlink()
    os.mkfifo(copy / "trajectory")
    assert "trajectory is missing or no file" in refused(capsys, copy)


def test_what_a_run_began_with_is_compared(copy, capsys, monkeypatch, tmp_path):
    """Other code; and of another base its config.json and tokenizer, though the weights are the same."""
    base = tmp_path / "base"
    shutil.copytree(train.resolve("tiny"), base)
    assert said(capsys, "--replay", copy, "--model", base)[1]["equal"]
    for name, old, new in (("config.json", "1e-05", "1e-06"), ("tokenizer.json", "grand", "great")):
        text = (base / name).read_text()
        (base / name).write_text(text.replace(old, new) + "\n")
        code, _, err = said(capsys, "--replay", copy, "--model", base)
        assert code == 2 and f"began with other contents of {name} (its other_sha256)" in err
        (base / name).write_text(text)
    monkeypatch.setattr(train, "code_sha256", lambda: "0" * 64)
    assert "the run's code_sha256 is" in refused(capsys, copy) and read_run(copy).config["git_commit"] is not None


def test_a_published_run_needs_no_weights(copy, capsys):
    shutil.rmtree(copy / "model")
    code, result, _ = said(capsys, "--replay", copy)
    assert code == 0 and result["equal"]


# ---------------------------------------------------------------- a record that was made up as a whole


def made_up(folder: Path, change: Callable[[dict], dict]) -> None:
    """Every step's line is changed, and all digests are made anew, by whoever has read the code."""
    run = read_run(folder)
    chain, trajectory, metrics = hashlib.sha256(run.config["sha256"].encode()), [], []
    for row in run.rows:
        row = change(row) if "projected_grad" in row else row
        of_step = "projected_grad" in row
        line = json.dumps(row)
        chain.update((line if of_step else record.canonical(row)).encode())
        digest = chain.copy().hexdigest()[: record.DIGITS]
        metrics.append(line if of_step else json.dumps(row | {"digest": digest}))
        trajectory += [" ".join([*map(repr, row["projected_grad"]), digest])] if of_step else []
    (folder / "trajectory").write_text("\n".join(trajectory) + "\n")
    (folder / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    (folder / "metrics.csv").unlink()
    (folder / "curve.svg").unlink()
    shutil.rmtree(folder / "model")
    result = json.loads((folder / "result.json").read_text())
    result["digest"] = record.digest_of_result(chain, result)
    (folder / "result.json").write_text(json.dumps(result))


def invented(row: dict) -> dict:
    plus, minus = row["plus"][0] + 0.01 * row["step"], row["minus"][0] + 0.01
    return row | {"plus": [plus], "minus": [minus], "projected_grad": [(plus - minus) / 2e-3]}


def test_an_invented_record_is_refused_by_verify(copy, capsys):
    made_up(copy, lambda row: row)
    assert said(capsys, "--replay", copy, "--verify", "3")[1]["equal"]
    made_up_again = copy.parent / "again"
    shutil.copytree(copy, made_up_again)
    (made_up_again / "metrics.csv").touch(), (made_up_again / "curve.svg").touch(), (made_up_again / "model").mkdir()
    made_up(made_up_again, invented)
    code, result, _ = said(capsys, "--replay", made_up_again, "--verify", "3")
    assert code == 1 and not result["equal"] and result["largest_difference"] > 10 * result["allowed"]


def test_a_gradient_that_its_own_losses_do_not_give_is_refused(copy, capsys):
    made_up(copy, lambda row: row | {"projected_grad": [-row["projected_grad"][0] * 2]})
    code, _, err = said(capsys, "--replay", copy, "--verify", "8")
    assert code == 2 and "has other projected gradients than its losses give" in err


def test_verify_repeats_losses_and_metrics(whole, capsys):
    code, result, _ = said(capsys, "--replay", whole, "--verify", "5")
    assert code == 0 and result["equal"] and result["largest_difference"] == result["loss_difference"] == 0
    assert len(result["verified_steps"]) == 5 and set(result["verified_steps"]) <= set(range(1, 9))
    assert result["tests"] == result["recorded_tests"] and result["dev"] == result["recorded_dev"]
    assert said(capsys, "--replay", whole, "--verify", "99")[1]["verified_steps"] == list(range(1, 9))
    assert "--verify goes with --replay" in said(capsys, "--verify", "5")[2]


# ---------------------------------------------------------------- no dead ends, and one writer


def test_a_folder_appears_with_its_config(tmp_path, monkeypatch, capsys):
    """A kill or a full disk before that leaves nothing that --out would call taken."""
    out = tmp_path / "run"

    def full(partial, path):
        assert not out.exists() and (partial / "config.json").is_file()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", full)
        code, _, err = said(capsys, *FLAGS, "--out", out)
    assert code == 1 and err.strip().endswith("No space left on device") and not list(tmp_path.iterdir())
    assert said(capsys, *FLAGS, "--out", out)[0] == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json.partial").write_text("{")  # of a process that was killed there
    assert said(capsys, *FLAGS, "--out", empty)[0] == 0


def test_lost_weights_are_made_again(copy, capsys, whole):
    """By replay, when a run is finished whose result is not there yet."""
    shutil.rmtree(copy / "model")
    (copy / "result.json").unlink()
    assert said(capsys, "--resume", copy)[0] == 0
    assert (copy / "model/codes.safetensors").read_bytes() == (whole / "model/codes.safetensors").read_bytes()


def test_a_folder_has_one_writer(copy, capsys):
    (copy / "result.json").unlink()
    with run_folder.locked(copy) as told:
        assert told is None
        code, _, err = said(capsys, "--resume", copy)
        assert code == 2 and err == f"train.py: {copy} is in use: another process trains or finishes that run\n"
    assert said(capsys, "--resume", copy)[0] == 0


def test_a_folder_that_cannot_be_locked_says_so(copy, capsys, monkeypatch):
    (copy / "result.json").unlink()

    def none(handle, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    code, _, err = said(capsys, "--resume", copy)
    assert code == 0 and "cannot be locked ([Errno 37] No locks available): start no second process on it" in err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "fcntl", None)
        with run_folder.locked(copy) as told:
            assert "this system has no flock" in told


def test_a_link_in_the_way_is_not_followed(copy, capsys, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (copy / "result.json").unlink()
    for name in ("trajectory", "metrics.jsonl", "result.json", "curve.svg", "predictions.jsonl"):
        (copy / f"{name}.partial").symlink_to(tmp_path / "precious")
    assert said(capsys, "--resume", copy)[0] == 0 and (tmp_path / "precious").read_text() == "mine"


def test_a_state_of_adamw_that_is_not_the_runs_is_refused(tmp_path, capsys, monkeypatch):
    out, flags = tmp_path / "run", [*FLAGS, "--method", "lora"]

    class Stop:
        asked = iter([0] * 5)
        signal = property(lambda self: next(self.asked, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Stop", Stop)
        assert said(capsys, *flags, "--out", out)[0] == 130
    (state,) = out.glob("state-*")
    assert state.name == "state-3.safetensors"
    good = state.read_bytes()
    state.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, _, err = said(capsys, "--resume", out)
    assert code == 2 and f"{state} is not what the run wrote" in err
    state.unlink()  # then everything is done again
    (out / "state.partial").mkdir()
    (out / "state.partial/.tmpAbC").write_text("of safetensors, in a process that was killed")
    assert said(capsys, "--resume", out)[0] == 0 and not list(out.glob("state*"))
