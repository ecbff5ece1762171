"""Several tasks at once, --task a,b: equal shares of every batch, means of losses and metrics, a record of all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from helpers import assert_equal_folders, shortened

import train
from data.scoring import Encoded
from data.tasks import TINY
from runtime.config import each_task, parse, tasks_of
from runtime.problem import MultiTask, prepare
from runtime.record import read_run
from runtime.run_folder import hashed

SHORT = "--steps 6 --eval-every 3 --batch-size 8 --num-eval 16 --device cpu --lr 1e-3"
REVERSED = {  # the embedded task with its words exchanged; dev is drawn from train, which makes another loss of it
    "prompt": "{sentence:strip} it was", "options": {"0": " great", "1": " terrible"}, "num_dev": 40,
    "files": {"train": "train.tsv", "test": "test.tsv", "test_again": "dev.tsv"}, "also": ["f1_macro"],
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with shortened():
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """The embedded task and another one, as --task names them; the other has fewer examples."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("train", "dev", "test"):
        (folder / f"{name}.tsv").write_text("\n".join((TINY / f"{name}.tsv").read_text().splitlines()[:131]) + "\n")
    (folder / "reversed.json").write_text(json.dumps(REVERSED))
    return f"tiny,{folder / 'reversed.json'}"


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, tasks) -> Callable[[str], tuple[Path, dict]]:
    """Runs of both tasks, each once: flags -> folder and result."""
    done = {}

    def whole(flags: str = "") -> tuple[Path, dict]:
        if flags not in done:
            folder = tmp_path_factory.mktemp("runs") / "run"
            result = train.run(parse([*SHORT.split(), "--task", tasks, *flags.split(), "--out", str(folder)]))
            done[flags] = folder, result
        return done[flags]

    return whole


def both(tasks: str, flags: str = "") -> MultiTask:
    return prepare(parse([*SHORT.split(), "--task", tasks, *flags.split()]))[0]


def said(capsys, *flags: str) -> tuple[int, list[dict], str]:
    capsys.readouterr()
    code = train.main([*map(str, flags)])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


# ---------------------------------------------------------------- batches


def batch(problem: MultiTask, seed: int, step: int, size: int) -> list[Encoded]:
    sizes = [len(part.train) for part in problem.parts]
    return [problem.train[i] for i in train.batch_indices(seed, step, size, *sizes)]


def test_a_batch_has_as_many_examples_of_each_task_each_in_an_order_of_its_own(tasks):
    """Of 256 and 90 examples: the first one's order is what it is alone, and in two epochs each is met twice."""
    problem = both(tasks)
    assert [len(part.train) for part in problem.parts] == [256, 90] and len(problem.train) == 346
    batches = [batch(problem, 5, step, 8) for step in range(128)]
    for at, part in enumerate(problem.parts):
        where, n = {id(example): i for i, example in enumerate(part.train)}, len(part.train)
        stream = [where[id(example)] for examples in batches for example in examples[4 * at : 4 * at + 4]]
        for epoch in range(2):
            assert sorted(stream[epoch * n : epoch * n + n]) == list(range(n))
        alone = [i for step in range(128) for i in train.batch_indices(5, step, 4, n)]
        assert (stream == alone) == (at == 0)
    three = train.batch_indices(5, 0, 90, 30, 30, 30)
    orders = [[i - 30 * at for i in three[30 * at : 30 * at + 30]] for at in range(3)]
    assert all(sorted(order) == list(range(30)) for order in orders) and len(set(map(tuple, orders))) == 3


def test_the_order_of_one_task_is_what_it_was():
    """Pinned at commit aa8128d, before there were several."""
    assert train.batch_indices(5, 0, 7, 30) == [13, 3, 2, 19, 11, 21, 10]
    assert train.batch_indices(5, 4, 7, 30) == [12, 16, 19, 8, 9, 24, 4]  # of two epochs
    assert train.batch_indices(0, 0, 4, 1024) == [841, 442, 473, 2]


def test_the_loss_is_the_mean_of_the_tasks_losses(tasks):
    """To the bit, each by itself; in parts for back-propagation, and with tensors given anew as graphs do."""
    problem = both(tasks)
    examples, view = batch(problem, 0, 0, 8), problem.lm.stored_view()
    loss = problem.loss_fn(2)(examples)
    alone = [part.loss_fn(2)(examples[4 * at : 4 * at + 4]) for at, part in enumerate(problem.parts)]
    with torch.no_grad():
        first, second = (of_one(view) for of_one in alone)
        assert torch.equal(loss(view), (first + second) / 2) and not torch.allclose(first, second)
        assert len(list(loss.parts(view))) == 4
        assert torch.allclose(sum(loss.parts(view)), loss(view), rtol=1e-6)
        other = problem.loss_fn(2)(batch(problem, 0, 1, 8))
        assert not torch.equal(other(view), loss(view))
        assert torch.equal(other.with_tensors(loss.tensors())(view), loss(view))


# ---------------------------------------------------------------- a run


def test_a_run_reports_means_and_each_tasks_own(tasks, wholes):
    folder, result = wholes()
    problem, rows = both(tasks), read_run(folder).rows
    qualities = [part.dev_quality() for part in problem.parts]
    start = rows[0]
    assert start["dev"] == fmean(q.metric for q in qualities) and start["dev_loss"] == fmean(q.loss for q in qualities)
    assert qualities[0].loss != qualities[1].loss
    metrics = {split: list(of_split) for split, of_split in result["tests"].items()}
    with_f1 = ["accuracy", "f1_macro"]
    assert metrics == {"tiny": ["accuracy"], "reversed": with_f1, "reversed/test_again": with_f1}
    assert result["test"] == fmean(result["tests"][name]["accuracy"] for name in ("tiny", "reversed"))
    start = fmean(part.measured(part.answered("test"))["test"]["accuracy"] for part in problem.parts)
    assert result["zero_shot"] == start and result["metric"] == "accuracy" and result["task"] == tasks
    answers = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for split, metrics in result["tests"].items():
        right = [a["prediction"] in a["golds"] for a in answers if a["split"] == split]
        assert len(right) == 16 and fmean(right) == metrics["accuracy"]
    hashes = json.loads((folder / "config.json").read_text())["data_sha256"]
    assert len(hashes) == 7 and "reversed.json" in str(hashes)
    assert f"{tasks}: quzo" in (folder / "curve.svg").read_text()


def test_a_step_is_that_of_the_mean(tasks, wholes):
    """The first step's losses, from each task's own batch at the perturbed weights."""
    folder, _ = wholes("--method mezo --weights fp32")
    row, problem = read_run(folder).rows[1], both(tasks, "--method mezo --weights fp32")
    c = parse([*SHORT.split(), "--task", tasks, "--method", "mezo", "--weights", "fp32"])
    zo, losses = train.estimator(c, problem.lm), []
    for at, part in enumerate(problem.parts):
        examples = batch(problem, 0, 0, 8)[4 * at : 4 * at + 4]
        loss_fn = part.loss_fn(8)(examples)
        losses.append(torch.stack(train.probe_losses(problem.lm.weights, loss_fn, train.Key(0, 0), zo)))
    assert torch.allclose((losses[0] + losses[1]) / 2, torch.tensor([row["plus"], row["minus"]]).double(), rtol=1e-6)
    assert row["tokens"] == sum(e.width for e in batch(problem, 0, 0, 8))


@pytest.mark.parametrize("flags", [
    "", "--method lora", pytest.param("--objective accuracy --probes-per-forward 1", marks=pytest.mark.full),
])
def test_a_run_is_replayed_verified_and_asked(capsys, wholes, flags):
    folder, result = wholes(flags)
    if "lora" not in flags:
        code, (replayed,), _ = said(capsys, "--replay", folder, "--verify", 3)
        assert code == 0 and replayed["equal"] and replayed["largest_difference"] == 0.0
        assert replayed["tests"] == result["tests"]
    code, (found,), _ = said(capsys, "--evaluate", folder)
    assert code == 0 and found["tests"] == result["tests"] and found["dev_loss"] == result["dev_loss"]
    code, (alone,), _ = said(capsys, "--evaluate", folder, "--task", "tiny")
    assert code == 0 and alone["tests"] == {"test": result["tests"]["tiny"]}


@pytest.mark.parametrize("flags", ["", "--method lora"])
def test_an_interrupted_run_is_finished_to_the_same_bits(capsys, tmp_path, tasks, wholes, monkeypatch, flags):
    class Stop:
        asked = iter([0, 0, 0, 0])
        signal = property(lambda self: next(self.asked, 2))

    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Stop", Stop)
        assert said(capsys, *SHORT.split(), "--task", tasks, *flags.split(), "--out", cut)[0] == 130
    assert said(capsys, "--resume", cut)[0] == 0
    assert_equal_folders(cut, wholes(flags)[0])


def test_each_task_has_its_own_data(capsys, tasks, tmp_path):
    """Their files are told apart by as much of their paths as it takes; an edited one is named."""
    folders = [tmp_path / a / "512-42" for a in ("SST-2", "RTE")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "train.tsv").write_text(str(folder))
    files = [folder / "train.tsv" for folder in folders]
    assert list(hashed(files)) == ["SST-2/512-42/train.tsv", "RTE/512-42/train.tsv"]
    assert list(hashed(files[:1])) == ["train.tsv"]


def test_files_of_one_name_may_be_moved(capsys, tmp_path):
    """Of two tasks whose folders alone tell their files apart: they are found in other ones, and an edit is named."""
    for old in ("a", "b"):
        (tmp_path / old).mkdir()
        for name in ("train", "dev", "test"):
            (tmp_path / old / f"{name}.tsv").write_text((TINY / f"{name}.tsv").read_text())
        (tmp_path / old / f"{old}.json").write_text(json.dumps(REVERSED))
    tasks, out = ",".join(str(tmp_path / name / f"{name}.json") for name in ("a", "b")), tmp_path / "run"
    assert said(capsys, *SHORT.split(), "--steps", 1, "--task", tasks, "--out", out)[0] == 0
    (tmp_path / "a").rename(tmp_path / "c")
    moved = tasks.replace(f"{tmp_path}/a/", f"{tmp_path}/c/")
    code, (replayed,), _ = said(capsys, "--replay", out, "--verify", 1, "--task", moved)
    assert code == 0 and replayed["equal"]
    with open(tmp_path / "c" / "test.tsv", "a") as file:
        file.write("so dull\t0\n")
    code, _, err = said(capsys, "--replay", out, "--verify", 1, "--task", moved)
    assert code == 2 and "began with other contents of a/test.tsv (its data_sha256)" in err


def test_what_is_asked_of_several_tasks(capsys, tasks):
    code, lines, _ = said(capsys, "--task", tasks, "--show", 2)
    assert code == 0 and [line["options"][0] for line in lines] == [" terrible"] * 2 + [" great"] * 2
    code, (row,), _ = said(capsys, "--task", tasks, "--batch-size", 6, "--dry-run")
    assert code == 0 and row["sequences_a_forward"] == 3
    c = parse(["--task", f"{tasks},tiny"])
    assert [one.task for one in each_task(c)] == c.task.split(",") and [t.name for t in tasks_of(c)][1] == "reversed"
    assert "tiny-reversed-tiny-tiny-quzo" in c.out
    assert parse(["--model", "roberta-base", "--task", "sst2,rte"]).num_dev is None


REFUSED = {
    "--task tiny,tiny": "--task tiny,tiny names a task twice", "--task tiny,sst9": "unknown task 'sst9'",
    "--task tiny,": "unknown task ''",
    "--task BOTH --batch-size 9": "--batch-size 9 cannot be shared equally by 2 tasks: take 10",
    "--task BOTH --method mezo-svrg": "--method mezo-svrg is for one task: give one of --task tiny,",
    "--task BOTH --predict x.tsv": "--predict is for one task: give one of --task tiny,",
}  # fmt: skip


def test_what_several_tasks_cannot_do_is_one_line(capsys, tasks, monkeypatch, wholes):
    for flags, message in REFUSED.items():
        code, out, err = said(capsys, *flags.replace("BOTH", tasks).split())
        assert code == 2 and not out and message in err and err.count("\n") == 1, (flags, err)
    code, _, err = said(capsys, "--evaluate", wholes()[0], "--predict", TINY / "test.tsv")
    assert code == 2 and "--predict is for one task" in err
    code, lines, _ = said(capsys, "--evaluate", wholes()[0], "--task", "tiny", "--predict", TINY / "test.tsv")
    assert code == 0 and len(lines) == 1000
    code, _, err = said(capsys, "--evaluate", wholes()[0], "--task", "sst2")
    assert code == 2 and "a run has its own flags" in err
    monkeypatch.setattr(train, "joined", lambda device: train.ExitStack())
    monkeypatch.setattr(train.ExitStack, "world", 2, raising=False)
    monkeypatch.setattr(train.ExitStack, "__enter__", lambda self: self)
    code, _, err = said(capsys, "--task", tasks, "--device", "cpu")
    assert code == 2 and "several tasks and mezo-svrg, mazo, elasticzo, zo2 are not shared" in err


@pytest.mark.full
@pytest.mark.parametrize("model, tasks", [("zollama-28m", "sst2,rte,boolq,copa,squad"), ("zoroberta-26m", "sst2,rte")])
def test_tasks_of_other_kinds_learn_together(capsys, tmp_path, real_model, real_data, model, tasks):
    """Words that differ from task to task, losses of whole answers, and a text to write, of which dev has no metric."""
    flags = f"--model {real_model(model)} --task {tasks} --data-dir {real_data('SST-2').parent} --method mezo"
    flags += " --weights fp32 --lr 1e-6 --steps 2 --eval-every 1 --num-eval 2 --batch-size 10 --max-length 256"
    with shortened(8, 4):
        code, (result,), _ = said(capsys, *flags.split(), "--device", "cpu", "--out", tmp_path / "run")
        assert code == 0 and list(result["tests"]) == tasks.split(",")
        assert result["metric"] == ("accuracy and f1" if "squad" in tasks else "accuracy")
        assert (result["dev"] is None) == ("squad" in tasks) and result["best_step"] in (0, 1, 2)
        assert said(capsys, "--replay", tmp_path / "run", "--verify", 2)[0] == 0
