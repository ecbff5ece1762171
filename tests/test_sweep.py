"""`--sweep`: combinations, the choice, the table, what is refused, and a sweep that is taken up again."""

import csv
import dataclasses
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import train
from runtime import run_folder
from runtime.config import parse, spelled
from runtime.flags import Config, command_line
from runtime.record import RecordedRun, whole_lines
from runtime.run_folder import table_of
from runtime.sweep import chosen, combinations, command_of, table
from zo_optim import Step

SHORT = "--steps 2 --eval-every 2 --num-eval 8 --batch-size 4 --device cpu"


def call(capsys, flags: str) -> tuple[int, list[str], str]:
    code = train.main(flags.split())
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_combinations_are_in_order_and_names_are_flags():
    assert combinations(["lr=1e-5,2e-5", "--batch_size=4,8"]) == [
        {"lr": "1e-5", "batch-size": "4"}, {"lr": "1e-5", "batch-size": "8"},
        {"lr": "2e-5", "batch-size": "4"}, {"lr": "2e-5", "batch-size": "8"},
    ]  # fmt: skip
    for bad in (["lr"], ["lr=1,"], ["=1"], ["lr=1,1"], ["lr=1", "lr=2"]):
        with pytest.raises(ValueError, match="--sweep"):
            combinations(bad)


def test_a_command_is_spelled_as_it_was_given():
    words = "--method lora --optimizer zo --norms --no-graphs --lr 1e-05 --seed 3 --max-length 77".split()
    given = dataclasses.replace(parse([*words, "--sweep", "seed=0"]), sweep=None)
    assert sorted(spelled(given)) == sorted(words)


def test_every_on_off_flag_can_be_swept():
    """Parsed by the command line's own parser, which takes no value for such a flag."""
    names = [f.name for f in dataclasses.fields(Config) if f.type in ("bool", "bool | None")]
    assert {"bandit", "rest", "norms", "oracle", "compile", "graphs"} <= set(names)
    for name in names:
        for flags in combinations([f"{name}=true,false", "lr=1e-5"]):
            words = command_of(flags)
            wanted = {name: flags[name.replace("_", "-")] == "true", "lr": 1e-5}
            assert vars(command_line().parse_args(words)) == wanted


def made_up(**losses: list[float]) -> list[dict]:
    """Two seeds of each setting; the test is the better the worse the loss, and must not count."""
    found = [(lr, seed, loss) for lr, of_seeds in losses.items() for seed, loss in enumerate(of_seeds)]
    results = [{"dev_loss": loss, "dev": 0.5, "test": loss} if loss else None for _, _, loss in found]
    flags = [{"lr": lr, "seed": str(seed)} for lr, seed, _ in found]
    return [{"flags": one, "result": result} for one, result in zip(flags, results, strict=True)]


def test_the_lowest_mean_dev_loss_over_seeds_is_chosen_and_bold():
    ran = made_up(a=[0.1, 0.9], b=[0.4, 0.5], c=[0.6, 0.6])
    assert chosen(ran) == {"lr": "b"}
    lines = table({"runs": ran, "chosen": chosen(ran)}).splitlines()
    assert lines[0] == "| lr | dev loss | dev | test (std) | each seed's test |" and len(lines) == 5
    assert lines[2] == "| a | 0.5000 | 0.5000 | 0.5000 (0.5657) | 0.1000, 0.9000 |"
    assert lines[3] == "| **b** | **0.4500** | **0.5000** | **0.4500 (0.0707)** | **0.4000, 0.5000** |"


def test_settings_of_which_a_run_failed_are_not_chosen():
    ran = made_up(a=[0.1, None], b=[0.4, 0.5])
    assert chosen(ran) == {"lr": "b"} and chosen(made_up(a=[None, None])) is None
    assert "(1 of 2 failed)" in table({"runs": ran, "chosen": {"lr": "b"}})


@pytest.mark.full
def test_a_sweep_runs_chooses_and_is_taken_up_again(tmp_path, capsys):
    out = tmp_path / "sweep"
    command = f"{SHORT} --sweep lr=1e-4,3e-4 --seed 1 --jobs 2 --out {out}"
    code, lines, err = call(capsys, command)
    swept = json.loads(lines[-1])
    losses = {row["flags"]["lr"]: row["result"]["dev_loss"] for row in swept["runs"]}
    assert code == 0 and swept["failed"] == 0 and swept["chosen"] == {"lr": min(losses, key=losses.get)}
    assert lines[:-1] == table(swept).splitlines() and err.count("dev loss") == 2
    alone = tmp_path / "alone"
    train.main([*SHORT.split(), "--lr", "3e-4", "--seed", "1", "--out", str(alone)])
    of_sweep = json.loads((out / "lr3e-4/result.json").read_text())
    assert of_sweep["weights_sha256"] == json.loads((alone / "result.json").read_text())["weights_sha256"]

    first = (out / "lr1e-4/result.json").stat().st_mtime_ns
    (out / "lr3e-4/result.json").unlink()  # as if it had been killed before its end
    assert call(capsys, command)[0] == 0
    assert (out / "lr1e-4/result.json").stat().st_mtime_ns == first
    again = json.loads((out / "lr3e-4/result.json").read_text())
    assert again["weights_sha256"] == of_sweep["weights_sha256"]
    assert "holds another sweep" in call(capsys, command.replace("--seed 1", "--seed 2"))[2]


@pytest.mark.full
def test_an_on_off_flag_is_swept(tmp_path, capsys):
    out = tmp_path / "sweep"
    code, lines, _ = call(capsys, f"{SHORT} --method lezo --sweep bandit=true,false --out {out}")
    rows = json.loads(lines[-1])["runs"]
    assert code == 0 and [row["flags"]["bandit"] for row in rows] == ["true", "false"]
    for row in rows:
        flags = json.loads((Path(row["out"]) / "config.json").read_text())["flags"]
        assert flags["bandit"] is (row["flags"]["bandit"] == "true") and flags["method"] == "lezo"


@pytest.mark.full
def test_a_run_that_fails_does_not_end_the_others(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("text,mood\n" + "fine,good\ndull,bad\n" * 8)
    task = {"prompt": "{text} it was", "options": {"bad": " terrible", "good": " great"}, "label": "mood",
            "files": {"train": "rows.csv", "dev": "rows.csv", "test": "rows.csv"}}  # fmt: skip
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(task))
    bad.write_text(json.dumps(task | {"label": "nothing"}))  # which only reading the rows can tell
    code, lines, err = call(capsys, f"{SHORT} --sweep task={good},{bad} --out {tmp_path / 'out'}")
    swept = json.loads(lines[-1])
    assert code == 1 and swept["failed"] == 1 and swept["chosen"] == {"task": str(good)}
    assert "rows.csv:2: " in err and "'nothing'" in err


@pytest.mark.parametrize("flags, message", {
    "--sweep lr=1e-3,x": "argument --lr: invalid float value: 'x'",
    "--sweep lr=1e-3,-1": "--lr must be in",
    "--sweep wights=int4": "unrecognized arguments: --wights int4",
    "--sweep lr=1e-3 --lr 1": "--lr is given beside --sweep lr=",
    "--sweep bandit=true,yes --method lezo": "--sweep bandit= is over an on/off flag: write true or false, got 'yes'",
    "--sweep rest=true,1 --method lezo": "write true or false, got '1'",
    "--sweep bandit=true,false": "--bandit means nothing",
    "--sweep rest=true,false --method lezo --no-rest": "--no-rest is given beside --sweep rest=",
    "--sweep out=a,b": "--sweep is over flags of a new run",
    "--sweep show=1,2": "--sweep is over flags of a new run",
    "--sweep lr=1e-3 --evaluate x": "--sweep is over flags of a new run",
    "--sweep lr=1e-3 --jobs 0": "--jobs must be in",
    "--sweep lr=1e-3 --resume runs/x": "a run has its own flags",
}.items())  # fmt: skip
def test_what_cannot_be_swept_is_said_before_any_run(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    code, lines, err = call(capsys, flags)
    assert code == 2 and not lines and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_four_runs_that_begin_at_once_have_four_folders(tmp_path):
    command = [sys.executable, Path(train.__file__), *SHORT.split()]
    where = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    runs = [subprocess.Popen(command, **where) for _ in range(4)]
    outs = {json.loads(run.communicate()[0].splitlines()[-1])["out"] for run in runs}
    assert len(outs) == 4 == len(list((tmp_path / "runs").iterdir()))


# ---------------------------------------------------------------- the metrics of a run as a table, and as events


def test_the_table_holds_what_metrics_jsonl_holds(tmp_path, capsys):
    assert call(capsys, f"{SHORT} --out {tmp_path / 'run'}")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(rows) == 4  # two steps, two evaluations
    for of_table, row in zip(found, rows, strict=True):
        given = {name: value for name, value in row.items() if not isinstance(value, list) and name != "digest"}
        assert {name: float(value) for name, value in of_table.items() if value} == given


def test_each_line_enters_the_table_once_and_a_killed_runs_half_row_does_not_stay(tmp_path, monkeypatch):
    """A table that is made anew at every evaluation takes a time that grows with the square of their number."""
    entered = []
    monkeypatch.setattr(run_folder, "table_of", lambda lines, **more: entered.extend(lines) or table_of(lines, **more))
    zero = torch.zeros(1, dtype=torch.float64)

    def go_on(folder: run_folder.RunFolder, steps: range) -> None:
        with run_folder.StepRecorder(folder, size=1) as recorder:
            for step in steps:
                done = Step(zero + step, zero, zero, torch.zeros(5, dtype=torch.int64))
                recorder.write((step, 0.5 * step, done, {"lr": 0.1, "tokens": 3}))
                if step % 2 == 0:
                    recorder.write()
                    folder.dev(run_folder.DevRow(step, 2 * step, 0.5, math.nan), 0, 10**9, {})
                    assert csv_file.read_text() == table_of(whole_lines(metrics))

    metrics, csv_file, begun = tmp_path / "metrics.jsonl", tmp_path / "metrics.csv", {"flags": {}, "sha256": ""}
    go_on(run_folder.RunFolder(tmp_path, "a run", RecordedRun(begun, [], [])), range(1, 8))
    lines = whole_lines(metrics)
    assert len(lines) == 7 + 3 and entered == lines[:9]  # the last step waits for an evaluation
    with csv_file.open("a") as file:
        file.write("7,0.")
    again = run_folder.RunFolder(tmp_path, "a run", RecordedRun(begun, whole_lines(tmp_path / "trajectory"), lines))
    assert csv_file.read_text() == table_of(lines) and entered[9:] == lines
    go_on(again, range(8, 11))
    assert entered[9:] == whole_lines(metrics) and len(entered) == 9 + 15


def test_the_curve_of_many_evaluations_is_drawn_at_fewer(tmp_path, monkeypatch):
    """At each of the first hundred, then at one more in a hundred, and at the end, or a long run's time would grow with
    the square of their number."""
    drawn = []
    monkeypatch.setattr(run_folder, "curve_svg", lambda losses, devs, *rest: drawn.append(len(devs)) or "")
    folder = run_folder.RunFolder(tmp_path, "a run", RecordedRun({"flags": {}, "sha256": ""}, [], []))
    for step in range(1, 1011):
        folder.dev(run_folder.DevRow(step, 2 * step, 0.5, 0.5), 1, 10**9, {})
    assert drawn[:100] == list(range(1, 101)) and len(drawn) < 400
    assert all(1 <= then - before <= 0.01 * before + 1 for before, then in zip(drawn, drawn[1:], strict=False))
    assert drawn[-1] < 1010
    folder.result({"best_step": 1})
    assert drawn[-1] == 1010


def test_events_are_written_where_they_are_asked_for(tmp_path, monkeypatch, capsys):
    """With a stand-in for the package, which is no requirement."""
    events = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            events.append((path, purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def close(self):
            events.append("closed")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install tensorboard" in call(capsys, f"{SHORT} --log tensorboard --out {tmp_path / 'no'}")[2]
    assert not (tmp_path / "no").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorboard" or None)
    stand_in = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    assert call(capsys, f"{SHORT} --log tensorboard --out {tmp_path / 'run'}")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert events[0] == (str(tmp_path / "run/tensorboard"), None) and events[-1] == "closed"
    assert {("loss", row["loss"], row["step"]) for row in rows if "loss" in row} <= set(events[1:-1])
    assert {("dev_loss", row["dev_loss"], row["step"]) for row in rows if "dev" in row} <= set(events[1:-1])
