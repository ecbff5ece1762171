"""How the tables choose: benchmarks/tuned.py with made-up results in place of training runs."""

from __future__ import annotations

import argparse
import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import Mock

import pytest

import train
from benchmarks import sst2, tuned
from benchmarks.tuned import Runs, outward, rates, whole
from runtime.config import parse, validate


def made_up(loss_of, log: list):
    """A stand-in for `run`, which takes one row and fills it in; test accuracy is the better the worse the loss."""

    def run(args, env, row):
        _, lr, *others = row["choice"].split()
        log.append((row["choice"], row["seed"]))
        loss = loss_of(float(lr), " ".join(others), row["seed"])
        return row | {"dev_loss": loss, "dev": 0.5, "test": loss, "trainable_parameters": 1}

    return run


def table(tmp_path, monkeypatch, loss_of, choices: list[str], minutes: float = 1e6, flags: str = "--a"):
    """-> the runs, the choice, and what was run in order."""
    log = []
    monkeypatch.setattr(tuned, "run", made_up(loss_of, log))
    seeds = {"tune_seeds": [0, 10, 11], "seeds": [1, 2]}
    args = argparse.Namespace(out=str(tmp_path), model="m", jobs=1, minutes=minutes, **seeds)
    runs = Runs({"arm": (flags, choices)}, args)
    return runs, whole(runs, "arm", args), log


def bowl(best: float):
    return lambda lr, others, seed: math.log(lr / best) ** 2


def test_every_arm_has_flags_that_train_takes():
    for flags, choices in sst2.ARMS.values():
        for choice in choices:
            validate(parse(["--model", "llama2-7b", *f"{flags} {choice} --seed 1 --no-compile".split()]))


def test_the_lowest_dev_loss_is_reported_with_seeds_that_tuning_never_saw(tmp_path, monkeypatch):
    _, choice, log = table(tmp_path, monkeypatch, bowl(1e-3), rates("1e-4", "1e-3", "1e-2"))
    assert choice == "--lr 1e-3"
    assert sorted(log) == sorted([(f"--lr {lr}", 0) for lr in ("1e-4", "1e-3", "1e-2")] + [(choice, 1), (choice, 2)])


@pytest.mark.parametrize("best, found", [(1e-6, "--lr 1e-6"), (3e-2, "--lr 0.027"), (1.0, "--lr 0.081")])
def test_a_best_rate_at_the_edge_is_looked_beyond(tmp_path, monkeypatch, best, found):
    """Down to 1e-6 by tens, up by threes; four times at the most."""
    choices = rates("1e-4", "1e-3") if best < 1e-3 else rates("3.3333e-4", "1e-3")
    runs, choice, log = table(tmp_path, monkeypatch, bowl(best), choices)
    assert choice == found and len({c for c, _ in log}) <= 2 + tuned.FURTHER


def test_other_flags_are_kept_apart():
    losses = {"--lr 1e-4 --eps 1": 3.0, "--lr 2e-4 --eps 1": 2.0, "--lr 3e-4 --eps 2": 1.0, "--lr 1e-2 --eps 3": 4.0}
    assert outward(losses) == "--lr 0.0006 --eps 2"
    assert outward(losses | {"--lr 6e-4 --eps 2": 5.0}) == "--lr 0.00015 --eps 2"
    assert outward(losses | {"--lr 3e-4 --eps 2": 2.5}) == "--lr 0.0004 --eps 1"
    assert outward({"--lr 1e-4": 1.0}) is None


def test_ties_are_decided_by_the_mean_of_all_tuning_seeds(tmp_path, monkeypatch):
    def loss_of(lr: float, others: str, seed: int) -> float:
        return {1e-4: 9.0, 1e-3: 1.0 if seed == 0 else 1.2, 2e-3: 1.009 if seed == 0 else 1.1, 1e-2: 9.0}[lr]

    _, choice, log = table(tmp_path, monkeypatch, loss_of, rates("1e-4", "1e-3", "2e-3", "1e-2"))
    assert choice == "--lr 2e-3" and ("--lr 1e-3", 11) in log and ("--lr 1e-4", 10) not in log


def test_what_was_run_is_not_run_again_unless_its_flags_change(tmp_path, monkeypatch):
    choices = rates("1e-5", "1e-4")  # of which it goes up to 1e-3 and 1e-2
    table(tmp_path, monkeypatch, bowl(1e-3), choices)
    _, choice, log = table(tmp_path, monkeypatch, bowl(1e-3), choices)
    assert choice == "--lr 0.001" and not log
    _, _, log = table(tmp_path, monkeypatch, bowl(1e-3), choices, flags="--b")
    assert len(log) == 4 + 2
    assert {json.loads(line)["flags"].split()[0] for line in (tmp_path / "results.jsonl").open()} == {"--a", "--b"}


def test_time_that_ends_midway_leaves_no_choice(tmp_path, monkeypatch):
    """After three of four runs of the first seed, although the best may be among them."""
    clock = iter([0.0, 1.0, 2.0, 3.0, 1e9, 1e9, 1e9])
    monkeypatch.setattr(tuned.time, "monotonic", lambda: next(clock))
    runs, choice, log = table(tmp_path, monkeypatch, bowl(1e-3), rates("1e-4", "1e-3", "1e-2", "1e-1"), minutes=1)
    assert choice is None and len(log) == len(runs.done) == 3


def test_no_time_no_choice(tmp_path, monkeypatch):
    _, choice, log = table(tmp_path, monkeypatch, bowl(1e-3), rates("1e-4", "1e-3", "1e-2"), minutes=-1)
    assert choice is None and not log


def test_a_row_has_means_and_spread_of_the_reported_seeds():
    choice = "--lr 1 --eps 2 --cell 8"
    runs = Mock(done={
        ("arm", choice, seed): {"test": test, "dev": 0.5, "dev_loss": loss, "trainable_parameters": 1234}
        for seed, test, loss in ((1, 0.70, 0.4), (2, 0.80, 0.5), (3, 0.75, 0.6), (0, 0.1, 9.0))
    })  # fmt: skip
    row = tuned.line(runs, "arm", choice, [1, 2, 3])
    assert row == "| arm | 1,234 | 1 eps 2 cell 8 | 0.5000, 50.0 | 75.0 (5.0) | 70.0, 80.0, 75.0 |"


def test_a_row_says_which_seeds_it_lacks():
    done = {("arm", "--lr 1", 1): {"test": 0.7, "dev": 0.5, "dev_loss": 0.4, "trainable_parameters": 1234}}
    assert tuned.line(Mock(done=done), "arm", "--lr 1", [1, 2, 3]) == "| arm | | 1 | | runs of 1 of 3 seeds | |"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`run` on the embedded model, which has its own data, by train.py itself in this process."""

    def in_this_process(command, **options):
        if command[0] == "git":
            return Mock(stdout="")
        flags, out, error = command[2:], io.StringIO(), io.StringIO()
        at = flags.index("--data-dir")
        with redirect_stdout(out), redirect_stderr(error):
            code = train.main(flags[:at] + flags[at + 2 :])
        return Mock(returncode=code, stdout=out.getvalue(), stderr=error.getvalue())

    monkeypatch.setattr(tuned.subprocess, "run", in_this_process)
    args = argparse.Namespace(model="tiny", data_dir="x", jobs=1, compile=False, out=str(tmp_path))

    def run(flags: str) -> dict:
        flags = f"--steps 2 --eval-every 1 --num-eval 8 --batch-size 4 --device cpu {flags}"
        return tuned.run(args, {}, {"arm": "a", "choice": "c", "seed": 0, "flags": flags})

    return run


def test_a_row_is_what_the_run_came_to(command, tmp_path):
    row = command("--method lora --lr 1e-3")
    result = json.loads(next(tmp_path.glob("*/result.json")).read_text())
    assert row["flags"] and {row[name] == result[name] for name in ("dev", "dev_loss", "test", "forwards")} == {True}


def test_a_run_that_diverges_counts_by_its_best_weights(command):
    """Here those of its start, which a tuned choice beats."""
    row, start = command("--method fo --lr 1e6"), command("--method fo --lr 0")
    assert row["best_step"] == 0 and row["dev_loss"] == start["dev_loss"] and row["test"] == start["test"]


def test_any_other_failure_passes_for_no_measurement(command):
    with pytest.raises(RuntimeError, match="--lr must be in"):
        command("--method fo --lr -1")
