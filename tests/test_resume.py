"""Interrupted runs that are finished, and finished runs that are redone: to the bit, whatever was being written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_equal_folders, shortened

import train
from data.tasks import TINY
from runtime.checkpoints import weights_sha256
from runtime.config import Config, parse, recorded
from runtime.record import canonical, read_run, whole_lines

FLAGS = "--steps 8 --eval-every 3 --num-eval 16 --batch-size 8 --seed 1 --device cpu".split()
RUNS = {
    "int8": "",
    "int4, sparse, clipped": "--weights int4 --queries 4 --clip 0.1 --seed 0",  # from the fifth step on
    "residual, two queries": "--weights int8 --residual 4 --queries 2 --lr-schedule constant",
    "fp32, warmup": "--method mezo --warmup 6 --lr-schedule linear",
    "adazeta": "--method adazeta --alpha 2 --beta 1 --max-queries 2 --batch-size 43",  # two epochs
    "subzero": "--lr 3e-4 --method subzero --subspace-rank 4 --subspace-steps 3",
    "lezo": "--method lezo --weights int4 --share 0.5",
    "adalezo": "--lr 3e-4 --method lezo --bandit --share 0.5 --no-rest",
    "svrg": "--method mezo-svrg --weights int8 --direction-bits 4 --anchor-steps 3",
    "mazo": "--lr 3e-3 --method mazo --weights int8 --direction-bits 4",
    "adapters on int4": "--method lora --optimizer zo --weights int4",
    "adamw": "--method fo",
    "adapters by adamw": "--method loretta-adp",
}
RUNS = {name: f"--lr 1e-3 {flags}" for name, flags in RUNS.items()} | {
    "measured rate": f"--model {TINY / 'model'} --task tiny --method mezo --weights fp32 --queries 2",
}
PLACES = {  # lines written before the kill, steps that are then whole.  A step has a line in trajectory, then one in
    "start": (0, 0), "step 1": (1, 0), "trajectory": (10, 4), "metrics": (11, 4),  # metrics.jsonl, where dev has one
    "dev": (14, 6), "last dev": (19, 8),  # too, also before step 1
}  # fmt: skip
full = pytest.mark.full


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with shortened():
        yield


def run(capsys, *flags: str) -> tuple[int, dict]:
    code = train.main([*flags])
    out = capsys.readouterr().out.splitlines()
    return code, json.loads(out[-1]) if out else {}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> Callable[..., tuple[Path, dict]]:
    """Runs that nothing interrupts, each once: flags -> folder and result."""
    done = {}

    def whole(capsys, flags: str) -> tuple[Path, dict]:
        if flags not in done:
            folder = tmp_path_factory.mktemp("whole") / "run"
            done[flags] = folder, run(capsys, *FLAGS, *flags.split(), "--out", str(folder))[1]
        return done[flags]

    return whole


def kill_after(patch: pytest.MonkeyPatch, lines: int) -> None:
    """So many whole lines of the record are written, then half of one, and then nothing more by anybody."""
    left, half = iter(range(lines)), iter("1")

    def opened(*args, **options):
        file = open(*args, **options)  # noqa: SIM115
        write = file.write

        def dying(text: str) -> None:
            if next(left, None) is not None:
                return write(text)
            if next(half, None):
                write(text[: len(text) // 2])
                file.flush()
            raise KeyboardInterrupt

        file.write = dying
        return file

    patch.setattr("runtime.run_folder.open", opened, raising=False)


def assert_finished_alike(capsys, cut: Path, whole: Path, expected: dict) -> None:
    code, result = run(capsys, "--resume", str(cut))
    assert code == (1 if expected["diverged"] else 0) and canonical(result) == canonical(expected)
    assert_equal_folders(cut, whole)
    if json.loads((cut / "config.json").read_text())["flags"]["optimizer"] == "zo":
        code, replayed = run(capsys, "--replay", str(cut))
        assert code == 0 and replayed["equal"] and replayed["weights_sha256"] == expected["weights_sha256"]


@pytest.mark.parametrize("name, place", [
    ("int8", "metrics"), *(pytest.param("int8", place, marks=full) for place in PLACES if place != "metrics"),
    *(pytest.param(name, "metrics", marks=full) for name in list(RUNS)[1:]),
    pytest.param("adapters on int4", "dev", marks=full),
])  # fmt: skip
def test_a_killed_run_is_finished_to_the_same_bits(capsys, tmp_path, wholes, name, place):
    """The second evaluation, of step 6, may have kept its weights and not have been recorded."""
    flags, (lines, steps), cut = RUNS[name], PLACES[place], tmp_path / "cut"
    whole, expected = wholes(capsys, flags)
    assert expected["best_step"] >= 6  # the weights that are compared have steps of both processes
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, lines)
        assert run(capsys, *FLAGS, *flags.split(), "--out", str(cut))[0] == 130
    assert len(read_run(cut).projected_grads) == steps and not (cut / "result.json").exists()
    assert len(whole_lines(cut / "trajectory")) == steps + (place == "metrics")  # a step's line is there first
    assert_finished_alike(capsys, cut, whole, expected)


@pytest.mark.full
def test_a_diverged_run_has_no_next_step(capsys, tmp_path, wholes):
    """A kill while its steps are counted changes nothing, nor one after the last of them.  It can be redone, not taken
    up: its result stays."""
    flags, cut = "--lr 10 --steps 40", tmp_path / "cut"
    whole, expected = wholes(capsys, flags)
    assert expected["diverged"] and 16 < expected["steps"] < 30 and expected["best_step"] == 0
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 1 + 2 * 12 + 4)
        assert run(capsys, *FLAGS, *flags.split(), "--out", str(cut))[0] == 130
    assert len(read_run(cut).projected_grads) == 12
    assert_finished_alike(capsys, cut, whole, expected)
    (cut / "result.json").unlink()
    assert_finished_alike(capsys, cut, whole, expected)
    before = (cut / "result.json").read_bytes()
    assert train.main(["--resume", str(cut)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and (cut / "result.json").read_bytes() == before
    message = f"train.py: {cut} diverged at step {expected['steps']}: {expected['diverged']}\n"
    assert said.err == message and "start another run with a smaller --lr" in message


@full
def test_a_run_that_was_asked_to_stop_is_finished_to_the_same_bits(capsys, tmp_path, wholes):
    """Its own result is that of its best step, which can be redone."""
    whole, expected = wholes(capsys, "")

    class Stop:
        asked = iter([0, 0, 0, 0])
        signal = property(lambda self: next(self.asked, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Stop", Stop)
        code, result = run(capsys, *FLAGS, "--out", str(tmp_path / "cut"))
    assert code == 130 and result["interrupted"] and (result["steps"], result["best_step"]) == (4, 3)
    assert run(capsys, "--replay", str(tmp_path / "cut"))[1]["equal"]
    assert_finished_alike(capsys, tmp_path / "cut", whole, expected)


def test_a_replay_makes_no_forward(capsys, monkeypatch, wholes):
    whole, _ = wholes(capsys, "")
    for name in ("LanguageModel.hidden", "LanguageModel.score", "Llama.hidden"):
        monkeypatch.delattr(f"model.{name}")
    assert run(capsys, "--replay", str(whole))[1]["equal"]


def test_a_run_of_a_gpu_is_taken_up_on_a_cpu_by_plain_definitions():
    flags = vars(parse("--model roberta-base --device cuda --weights fp8 --activations fp8".split()))
    here = recorded(parse(["--resume", "run"]), flags)
    assert here.graphs and here.compile and here.compute == "fp8"
    there = recorded(Config(resume="run", device="cpu"), flags)
    assert not there.graphs and not there.compile and there.compute == "fp32"


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_updates_do_not_depend_on_what_products_are_computed_in(capsys, tmp_path, weights):
    """So a run in bf16, as on a GPU, is replayed to the bit in fp32."""
    out = tmp_path / "run"
    _, result = run(capsys, *FLAGS, "--weights", weights, "--lr", "1e-3", "--compute", "bf16", "--out", str(out))
    past = read_run(out)
    c = replace(Config(**past.config["flags"]), compute="fp32")
    lm = train.load_base(c, TINY / "model", [])
    train.catch_up(c, lm, train.estimator(c, lm), past, result["best_step"], {})
    assert result["best_step"] and weights_sha256(lm.weights) == result["weights_sha256"]


def test_what_cannot_be_taken_up_is_one_line(capsys, tmp_path, wholes):
    def refused(message: str, *flags: str) -> None:
        assert train.main([*flags]) == 2
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.splitlines()) == 1 and message in said.err, said.err

    whole, other = wholes(capsys, "")[0], tmp_path / "other"
    refused("is complete: all 8 steps", "--resume", str(whole))
    refused("own flags", "--resume", str(whole), "--lr", "1")
    refused("own flags", "--resume", str(whole), "--replay", str(whole))
    shutil.copytree(whole, other)
    (other / "result.json").unlink()
    refused("was not finished", "--replay", str(other))
    config = json.loads((other / "config.json").read_text())
    older = {key: value for key, value in config.items() if key != "format"}
    for way in ("--resume", "--replay"):
        refused("got dry_run", way, str(whole), "--dry-run")
        refused("cannot be read as a run folder", way, str(tmp_path / "none"))
        for changed, message in (
            (older, "its format is 1, this version reads 4"), (config | {"format": 2}, "its format is 2"),
            (config | {"format": 5}, f"its format is 5, this version reads 4; use the commit {config['git_commit']}"),
            ({"model_type": "llama"}, "config.json is not that of a run"),
            (config | {"flags": config["flags"] | {"new": 1}}, "config.json is not what the run began with"),
        ):  # fmt: skip
            (other / "config.json").write_text(json.dumps(changed))
            (other / "result.json").write_text((whole / "result.json").read_text())
            refused(message, way, str(other))
