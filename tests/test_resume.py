"""Interrupted runs that are finished, and finished runs that are redone: to the bit, whatever was being written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import train
from run_folder import RunFolder, read_past

FLAGS = "--steps 8 --eval-every 3 --num-eval 16 --batch-size 8 --lr 1e-3 --device cpu".split()
RUNS = {
    "int8": "",
    "int4 grid": "--weights int4",
    "residual, two queries": "--weights int8 --residual 4 --queries 2 --lr-schedule constant",
    "fp32, warmup": "--method mezo --warmup 6 --lr-schedule linear",
    "adazeta": "--method adazeta --alpha 2 --beta 1 --max-queries 2 --batch-size 128 --steps 10",  # two epochs
    "adapters on int4": "--method lora --optimizer zo --weights int4",
}
PLACES = ("in step 5", "while step 5 is written", "before dev is recorded")
CASES = [(flags, PLACES[0]) for flags in RUNS.values()]
CASES += [(RUNS[name], place) for name in ("int8", "adapters on int4") for place in PLACES[1:]]


def run(capsys, *flags: str) -> tuple[int, dict]:
    code = train.main([*flags])
    out = capsys.readouterr().out.splitlines()
    return code, json.loads(out[-1]) if out else {}


def without_times(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", "peak_memory_bytes", "out")}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Runs that nothing interrupts, each once: flags -> folder and result."""
    done = {}

    def whole(capsys, flags: str) -> tuple[Path, dict]:
        if flags not in done:
            folder = tmp_path_factory.mktemp("whole") / "run"
            done[flags] = folder, run(capsys, *FLAGS, *flags.split(), "--out", str(folder))[1]
        return done[flags]

    return whole


def die(monkeypatch, owner: object, name: str, calls: int) -> None:
    """The call after so many ends the process, as far as the run folder can see."""
    real, count = getattr(owner, name), iter(range(10**6))

    def dying(*args, **kwargs):
        if next(count) == calls:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("flags, where", CASES)
def test_a_killed_run_is_finished_to_the_same_bits(capsys, monkeypatch, tmp_path, wholes, flags, where):
    """The second evaluation, of step 6, may have kept its weights and not have been recorded."""
    cut = tmp_path / "cut"
    whole, expected = wholes(capsys, flags)
    owner, name, calls = (RunFolder, "dev", 1) if "dev" in where else (train, "update", 4)
    with monkeypatch.context() as patch:
        die(patch, owner, name, calls)
        assert run(capsys, *FLAGS, *flags.split(), "--out", str(cut))[0] == 130
    steps = 6 if "dev" in where else 4
    assert len(read_past(cut).slopes) == steps and not (cut / "result.json").exists()
    if "written" in where:
        with (cut / "trajectory").open("a") as file:
            file.write("0.25\n" if flags else "0.25")  # whole there, and missing in metrics.jsonl; or half a line
        with (cut / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "slo')
    code, result = run(capsys, "--resume", str(cut))
    assert code == 0 and without_times(result) == without_times(expected)
    for name in ("trajectory", "metrics.jsonl"):
        lines = [(folder / name).read_text().splitlines() for folder in (whole, cut)]
        assert len(lines[0]) == len(lines[1]) and (name == "metrics.jsonl" or lines[0] == lines[1])
    code, told = run(capsys, "--replay", str(cut))
    assert code == 0 and told["equal"] and told["weights_sha256"] == expected["weights_sha256"]


def test_a_replay_tells_another_trajectory(capsys, tmp_path):
    _, result = run(capsys, *FLAGS, "--out", str(tmp_path / "run"))
    path = tmp_path / "run" / "trajectory"
    path.write_text("".join(f"{-float(line)}\n" for line in path.read_text().splitlines()))
    code, told = run(capsys, "--replay", str(tmp_path / "run"))
    assert code == 1 and not told["equal"] and told["recorded_sha256"] == result["weights_sha256"]


def test_a_replay_makes_no_forward(capsys, monkeypatch, tmp_path):
    run(capsys, *FLAGS, "--out", str(tmp_path / "run"))
    for name in ("hidden", "score"):
        monkeypatch.delattr(f"model.LanguageModel.{name}")
    monkeypatch.delattr("model.Llama.hidden")
    assert run(capsys, "--replay", str(tmp_path / "run"))[1]["equal"]


def refused(capsys, told: str, *flags: str) -> None:
    assert train.main([*flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert told in lines[-1], lines


def test_what_cannot_be_taken_up_is_one_line(capsys, monkeypatch, tmp_path):
    whole, other = tmp_path / "run", tmp_path / "other"
    run(capsys, *FLAGS, "--out", str(whole))
    refused(capsys, "is complete: all 8 steps", "--resume", str(whole))
    refused(capsys, "own flags", "--resume", str(whole), "--lr", "1")
    refused(capsys, "own flags", "--resume", str(whole), "--replay", str(whole))
    for way in "--resume", "--replay":
        refused(capsys, "got dry_run", way, str(whole), "--dry-run")
    refused(capsys, "is not a run folder", "--replay", str(tmp_path))
    refused(capsys, "is not a run folder", "--resume", str(tmp_path / "none"))
    shutil.copytree(whole, other)
    (other / "result.json").unlink()
    refused(capsys, "was not finished", "--replay", str(other))
    config = json.loads((other / "config.json").read_text())
    for name, value, told in [
        ("base_weights_sha256", "00", "base_weights_sha256"), ("data_sha256", {}, "data_sha256"),
        ("flags", config["flags"] | {"new": 1}, "flags differ in new"),
        ("flags", config["flags"] | {"optimizer": "adamw"}, "AdamW's moments are not kept"),
    ]:  # fmt: skip
        (other / "config.json").write_text(json.dumps(config | {name: value}))
        (other / "trajectory").write_text("0.5\n")
        refused(capsys, told, "--resume", str(other))
