"""Runs from flags to result: the folder and its record, every method, flags and bad input, interrupts."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist, median
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from helpers import shortened

import tensor_train
import train
from data.scoring import BatchLoss
from data.tasks import TINY
from family.lezo import adalezo, lezo
from family.mazo import mazo, unpacked
from family.subzero import SubZero
from model import LanguageModel, load
from quant import encode
from random_bits import Key
from runtime import problem as setup
from runtime.checkpoints import weights_sha256
from runtime.config import RANGES, Config, check_products, parse, spec_of
from runtime.dry_run import predict
from runtime.flags import ADAPTERS, FAMILY, GRAPHABLE, METHODS
from runtime.record import whole_lines
from tensor_train import TRAINED_VECTOR, attach
from zo_optim import ZO, SparseZO, measured_rate, update

ROOT = Path(train.__file__).parent
SHORT = "--steps 4 --eval-every 2 --batch-size 8 --num-eval 16".split()
NOTHING_BETTER = "no evaluation had a lower dev loss than the start"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that share a core with others wait for one another
full = pytest.mark.full


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with shortened():
        yield


class Run(NamedTuple):
    result: dict
    folder: Path
    log: str  # what was on standard error
    lm: LanguageModel  # as the run left it

    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def rows(self, key: str) -> list[dict]:
        """The lines of metrics.jsonl that have such a key: "loss" is in those of steps, "dev" in the others."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if key in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run("--weights int4") -> that Run of a few steps on the embedded task; each once, unless `again`."""
    done, prepare = {}, train.prepare

    def start(flags: str = "", again: bool = False) -> Run:
        if again or flags not in done:
            log, seen, folder = io.StringIO(), [], tmp_path_factory.mktemp("runs") / "run"
            with redirect_stderr(log), pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "prepare", lambda c: seen.append(prepare(c)) or seen[0])
                result = train.run(parse([*SHORT, *flags.split(), "--out", str(folder)]))
            done[flags] = Run(result, folder, log.getvalue(), seen[0][0].lm)
        return done[flags]

    return start


def base_of(flags: dict) -> LanguageModel:
    """The model that a run starts from, put together by hand."""
    lm = load(TINY / "model", weights=flags["master"] or flags["weights"], residual=flags["residual"])
    if flags["master"]:
        floats = {name: stored.value for name, stored in lm.weights.items()}
        lm.weights = {name: encode(value, flags["weights"]) for name, value in floats.items()}
    if flags["method"] in ADAPTERS:
        attach(lm, spec_of(Config(**flags), "llama"), flags["seed"])
    return lm


def kept(folder: Path, flags: dict) -> LanguageModel:
    """What a run's model/ holds, adapters around the embedded model."""
    if flags["method"] not in ADAPTERS:
        return load(folder / "model", weights=flags["weights"], residual=flags["residual"])
    lm = load(TINY / "model", weights=flags["weights"])
    tensor_train.load(lm, folder / "model")
    return lm


def tensors_of(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {f"{name}{suffix}": t for name, stored in lm.weights.items() for suffix, t in stored.tensors().items()}


# ---------------------------------------------------------------- a run and its folder


def test_the_run_folder_holds_what_it_promises(run):
    done = run("--queries 3")
    result, folder, config = done.result, done.folder, done.config()
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "curve.svg", "metrics.csv", "metrics.jsonl", "model", "predictions.jsonl", "result.json",
        "trajectory",
    ]  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == result and result["directions"] == "4"
    assert config["format"] == 4 and set(config["flags"]) == {f.name for f in fields(Config)}
    assert {"python", "torch", "numpy", "safetensors"} <= set(config["versions"])
    assert set(config["data_sha256"]) == {"train.tsv", "dev.tsv", "test.tsv"}
    steps, devs = done.rows("loss"), done.rows("dev")
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and [row["step"] for row in devs] == [0, 2, 4]
    for row in steps:
        both = list(zip(row["plus"], row["minus"], strict=True))
        assert row["projected_grad"] == [(plus - minus) / (2 * config["flags"]["eps"]) for plus, minus in both]
        assert row["loss"] == pytest.approx(sum(map(sum, both)) / 6)
        assert all(0 <= row[share] <= 1 for share in ("changed", "held_back", "lost"))
        assert row["queries"] == 3 and row["tokens"] > 8
    assert "slope" not in (folder / "metrics.jsonl").read_text()
    best = min(devs, key=lambda row: row["dev_loss"])
    assert (result["dev"], result["dev_loss"], result["best_step"]) == (best["dev"], best["dev_loss"], best["step"])
    assert [row["forwards"] for row in devs] == [0, 12, 24] and result["best_forwards"] == 6 * best["step"]
    assert "24 forwards" in (folder / "curve.svg").read_text()
    answers = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    right = [a["prediction"] in a["golds"] and len(a["scores"]) == 2 for a in answers]
    assert sum(right) / len(right) == result["test"] == result["tests"]["test"]["accuracy"] and len(right) > 8


def test_the_weights_of_the_lowest_dev_loss_are_kept(run, monkeypatch):
    """Loss and not accuracy, and the first of equal ones; the start is one of them."""
    qualities = iter([(0.4, 1.0), (0.6, 0.9), (0.5, 0.7), (0.9, 0.8), (0.8, 0.7)])
    evaluate = train.Problem.quality

    def stated(problem, split):
        return train.Quality(*next(qualities)) if len(split) == 32 else evaluate(problem, split)

    monkeypatch.setattr(train.Problem, "quality", stated)
    done = run("--eval-every 1 --lr 1e-3")
    assert (done.result["best_step"], done.result["dev"], done.result["dev_loss"]) == (2, 0.5, 0.7)
    assert redone(done, 2) == done.result["weights_sha256"] and NOTHING_BETTER not in done.log


def test_the_start_is_kept_where_nothing_was_better(run):
    """A loss as low as the start's is not lower."""
    done = run("--lr 0 --eval-every 1")
    devs, result = done.rows("dev"), done.result
    assert [(row["step"], row["forwards"]) for row in devs] == [(step, 2 * step) for step in range(5)]
    assert len({row["dev_loss"] for row in devs}) == 1
    assert (result["best_step"], result["best_forwards"], result["steps"], result["diverged"]) == (0, 0, 4, None)
    assert result["dev_loss"] == devs[0]["dev_loss"] and result["test"] == result["zero_shot"]
    assert done.log.splitlines()[-1] == f"{NOTHING_BETTER}: model/ is what the run began with; try another --lr"
    assert weights_sha256(kept(done.folder, done.config()["flags"]).weights) == done.config()["base_weights_sha256"]
    assert "best step 0: " in (done.folder / "curve.svg").read_text()


def rate(flags: dict, step: int) -> float:
    if step < flags["warmup"]:
        return flags["lr"] * (step + 1) / (flags["warmup"] + 1)
    left = (flags["steps"] - step) / (flags["steps"] - flags["warmup"])
    return flags["lr"] * (1 if flags["lr_schedule"] == "constant" else left)


def read_trajectory(path: Path) -> list[list[float]]:
    """The projected gradients of each step, whose digest stands behind them."""
    return [list(map(float, line.split()[:-1])) for line in whole_lines(path)]


def redone(done: Run, steps: int) -> str:
    """The hash after so many updates, from the base weights, config.json and trajectory, without a forward."""
    flags, recorded = done.config()["flags"], read_trajectory(done.folder / "trajectory")
    lm, bits, estimator = base_of(flags), flags["direction_bits"], flags["estimator"] or "q-rge2"
    if flags["method"] == "subzero":
        zo = SubZero(flags["eps"], rank=flags["subspace_rank"], every=flags["subspace_steps"])
    elif bits == "sparse":
        zo = SparseZO(flags["eps"], cell=flags["cell"], estimator=estimator)
    else:
        zo = ZO(flags["eps"], bits=int(bits) if bits.isdigit() else None, estimator=estimator)
    if flags["method"] == "lezo":
        zo = (adalezo if flags["bandit"] else lezo)(zo, lm, flags["share"], flags["rest"])
    if flags["method"] == "mazo":
        zo = mazo(zo, unpacked((done.folder / "masks.safetensors").read_bytes(), lm.weights))
    for step in range(steps):
        grads = torch.tensor(recorded[step], dtype=torch.float64)
        update(tensor_train.trained(lm), grads, Key(flags["seed"], step), zo, rate(flags, step))
    return weights_sha256(lm.weights)


DIRECTIONS = {"sparse": ", sparse directions (ours)", "full": ", Gaussian directions", None: "",
              "4": ", 4-bit directions (the paper's)"}  # fmt: skip
EVERY = [  # method, format and flags of which the update or what is kept knows; the first are enough for a quick look
    "--queries 3", "--weights int4", "--method mezo --weights bf16 --warmup 2 --lr-schedule linear",
    "--method lora --weights int8 --warmup 2", "--method adazeta --queries 2 --weights int4",
    "--method fo-ste --weights int4 --activations int8",
    *(pytest.param(flags, marks=full) for flags in (
        "--method mezo", "--method subzero --weights int4 --subspace-steps 2", "--weights int4 --residual 4 --oracle",
        "--method lezo --weights int4", "--method lezo --bandit --direction-bits 4 --weights int8",
        "--method mazo --lr 3e-3 --weights bf16", "--method mazo --direction-bits 4 --weights int4 --lr 3e-3",
        "--method zo2 --weights int4 --queries 2", "--weights fp8", "--direction-bits sparse",
        "--weights int4 --cell 64 --queries 3 --estimator random", "--estimator q-rge1 --probe codes --queries 2",
        "--method loretta-adp --weights int8",
        "--estimator random --activations int8 --seed 1", "--method loretta-rep --weights int4",
        "--method adazeta --weights fp8", "--method loretta-adp --optimizer zo --direction-bits 4",
        "--method loretta-rep --optimizer zo --weights bf16", "--method lora --init released --weights fp8",
        "--method lora --optimizer zo --weights int8", "--method fo", "--method fo --weights bf16 --weight-decay 0.1",
        "--method fo-ste", "--method fo-ste --weights fp8 --master bf16",
    )),
]  # fmt: skip


@pytest.mark.parametrize("flags", EVERY)
def test_a_run_is_what_its_record_says(run, flags):
    """Base weights + config.json + trajectory are the best weights, to the bit, and model/ holds them.  Beside adapters
    every other bit stands as it stood."""
    done = run(flags)
    result, config = done.result, done.config()
    flags, base = config["flags"], base_of(config["flags"])
    assert config["base_weights_sha256"] == weights_sha256(base.weights) != result["weights_sha256"]
    directions = DIRECTIONS[flags["direction_bits"]]
    directions = ", directions in random subspaces" if flags["method"] == "subzero" else directions
    directions += ", 50 % of each row" if flags["method"] == "mazo" else ""
    directions += ", blocks by a bandit" if flags["bandit"] else ""
    assert f"{flags['method']} on {flags['weights']} weights{directions}, cpu" in done.log
    assert [row["lr"] for row in done.rows("loss")] == pytest.approx([rate(flags, step) for step in range(4)])
    recorded = read_trajectory(done.folder / "trajectory")
    assert recorded == [row["projected_grad"] for row in done.rows("loss")] and result["steps"] == len(recorded) == 4
    if flags["optimizer"] == "zo":
        assert all(len(of_step) == (flags["queries"] or 1) for of_step in recorded)
        assert result["forwards"] == 2 * sum(map(len, recorded))
        assert redone(done, result["best_step"]) == result["weights_sha256"]
    else:
        assert result["forwards"] == 4 and not any(recorded)
    saved = kept(done.folder, flags)
    assert weights_sha256(saved.weights) == weights_sha256(done.lm.weights) == result["weights_sha256"]
    before, after, trained = tensors_of(base), tensors_of(saved), set(tensor_train.trained(saved))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and {name.removesuffix(".residual") for name in moved} <= trained
    assert result["trainable_parameters"] == sum(saved.weights[name].shape.numel() for name in trained)
    assert predict(Config(**flags), saved.raw_config, 16)["trainable_parameters"] == result["trainable_parameters"]


def test_a_rate_that_was_not_given_is_measured(run):
    """The embedded model as one of any directory.  Of 16 steps the first 2 only measure: lr g^2 is 0.03, but the
    rate is 3e-5 at most, of adapters 1e-3; of dense steps on codes a quarter.  Then comes its schedule."""
    for flags, queries, share in (
        ("--weights int4 --eval-every 4", 1, 1), ("--direction-bits 4 --queries 2", 2, 0.25),
        ("--direction-bits 4 --residual 4", 1, 1), ("--method mezo --weights fp32 --lr-schedule linear", 1, 1),
        ("--method adazeta --queries 1 --lr-schedule linear", 1, 1),
    ):  # fmt: skip
        done = run(f"--model {TINY / 'model'} --task tiny --batch-size 4 --steps 16 --calibrate 0 {flags}")
        rows, first = done.rows("loss"), -(-2 // queries)
        square = (median(abs(g) for row in rows[:first] for g in row["projected_grad"]) / 0.67449) ** 2
        wanted = share * min(0.03 / square, 1e-3 if "adazeta" in flags else 3e-5)
        constant = done.config()["flags"]["lr_schedule"] == "constant"
        lrs = [0.0 if row["step"] <= first else wanted * (1 if constant else (17 - row["step"]) / 16) for row in rows]
        assert [row["lr"] for row in rows] == pytest.approx(lrs, rel=1e-5) and done.config()["flags"]["lr"] is None
        assert all((row["changed"] > 0) == (row["step"] > first) for row in rows)
    of_weights = partial(measured_rate, kind="weights")
    assert of_weights([0.0], 7) == of_weights([1e-5], 10**6) == 3e-5 and of_weights([1.0], 7 * 10**9) == 1e-6
    assert measured_rate([0.0], 7, "adp") == measured_rate([0.0], 10**7, "lora") == 1e-3
    assert measured_rate([0.0], 200_000, "adp") == 3e-4
    normal = [60 * NormalDist().inv_cdf((i + 0.5) / 31) for i in range(31)]
    assert of_weights(normal, 10**6) == pytest.approx(0.03 / 60**2, rel=0.1)
    assert of_weights([*normal[:-2], 1000.0, -1000.0], 10**6) == pytest.approx(of_weights(normal, 10**6), rel=0.1)


def test_flags_and_estimators_agree_on_what_is_graphable():
    lm, masks = load(TINY / "model"), {"mazo": {}}
    for method in FAMILY:
        c = parse(f"--model {TINY / 'model'} --task tiny --device cpu --method {method}".split())
        zo = train.estimator(c, lm, masks.get(method))
        own = zo.graphable if type(zo) not in (ZO, SparseZO) else zo.moves is None and method != "zo2"
        assert own == (method in GRAPHABLE), method


@pytest.mark.parametrize("flags", [
    "mezo", "elasticzo --tail-blocks 0", "elasticzo --tail-blocks 2", "elasticzo --tail-blocks 3",
    f"lezo --share {1 / 3}", f"lezo --share {2 / 3} --no-rest", "mazo --mask-share 0.25",
])  # fmt: skip
def test_a_measured_rate_goes_by_the_elements_that_directions_move(flags):
    """Counted where a step asks for each tensor whether it is to be moved."""
    c = parse(f"--model {TINY / 'model'} --task tiny --device cpu --weights fp32 --method {flags}".split())
    lm = load(TINY / "model")
    moves = train.estimator(c, lm).moves or (lambda name, key: True)
    moved = sum(stored.value.numel() for name, stored in lm.weights.items() if moves(name, Key(0, 5)))
    if c.mask_share:  # a matrix's width times a quarter is whole here
        moved -= 0.75 * sum(stored.value.numel() for stored in lm.weights.values() if len(stored.shape) == 2)
    progress = train.progress_of(None, c, lm)
    assert progress.rate_by.keywords["d"] == pytest.approx(moved, rel=1e-9)
    assert progress.rate_by([0.0] * 32) == pytest.approx(min(3e-5, 7000 / moved))


NORMS = {"model.norm.weight", *(f"model.layers.{i}.{n}_layernorm.weight" for i in range(3)
                                for n in ("input", "post_attention"))}  # fmt: skip


@pytest.mark.parametrize("flags, drop", [
    ("lora --lr-schedule constant --steps 12", 0.3),
    *(pytest.param(*case, marks=full) for case in (
        ("adazeta --steps 16", 0.004), ("loretta-adp --steps 8", 0.5), ("loretta-rep --steps 8", 0.5),
        ("loretta-adp --optimizer zo --direction-bits 4 --steps 10", 0.01), ("fo --steps 8", 0.5),
        ("fo-ste --weights int4 --steps 8", 0.5),
    )),
])  # fmt: skip
def test_methods_learn(run, flags, drop):
    """By default settings from a loss of 1.5 on 64 examples; each drop is about half of what was seen.  A forward-only
    step is worth a thousandth, which shows because the examples are the same ones after it."""
    flags = f"--method {flags} --batch-size 32 --eval-every 1000"
    start = train.prepare(parse([*SHORT, *flags.split()]))[0]
    before, old = start.quality(start.train[:64]).loss, {n: t.clone() for n, t in tensors_of(start.lm).items()}
    start.lm = run(flags).lm
    assert before - start.quality(start.train[:64]).loss > drop
    if start.lm.adapters is None:
        return
    places, vector, first = start.lm.adapters.places, tensors_of(start.lm)[TRAINED_VECTOR], old[TRAINED_VECTOR]
    for name, place in places.items():
        at = slice(place.start, place.start + place.shape.numel())
        assert place.vector != TRAINED_VECTOR or not torch.equal(vector[at], first[at]), f"{name} has not moved"
    assert {name for name in places if ".adapter." not in name} == (NORMS if "loretta" in flags else set())


def test_a_run_takes_the_queries_of_its_schedule(run, monkeypatch):
    """Ten examples by four: three steps an epoch, of max(floor(2 epoch), 1) queries, at most 3."""
    cut = setup.load_splits
    monkeypatch.setattr(setup, "load_splits", lambda *args: cut(*args)._replace(train=cut(*args).train[:10]))
    done = run("--method adazeta --alpha 2 --beta 1 --max-queries 3 --batch-size 4 --steps 8 --eval-every 8")
    steps, want = done.rows("loss"), [1, 1, 1, 2, 2, 2, 3, 3]
    assert [row["queries"] for row in steps] == want == [len(row["projected_grad"]) for row in steps]
    assert all(len(row["plus"]) == len(row["minus"]) == row["queries"] for row in steps)
    assert done.result["forwards"] == 2 * sum(want) and redone(done, 8) == done.result["weights_sha256"]


def test_the_same_seed_gives_the_same_run_and_another_does_not(run):
    first, again, other = run("--weights int4"), run("--weights int4", again=True), run("--weights int4 --seed 1")
    assert first.result["weights_sha256"] == again.result["weights_sha256"] != other.result["weights_sha256"]


@pytest.mark.parametrize("method", ["quzo --weights int8", *(pytest.param(flags, marks=full) for flags in (
    "mezo", "elasticzo", "zo2 --weights int8", "loretta-rep", "adazeta", "fo", "fo-ste --weights int4",
))])  # fmt: skip
def test_lr_zero_leaves_every_bit(run, method):
    done = run(f"--method {method} --lr 0 --steps 2")
    assert done.result["weights_sha256"] == done.config()["base_weights_sha256"]


def test_micro_batches_change_losses_by_rounding_only(run, monkeypatch):
    """lr 0 stays at the same weights; float32 sums of 8 losses near 1 differ by some 1e-7."""
    sizes, of = [], BatchLoss.of
    monkeypatch.setattr(BatchLoss, "of", lambda *args, **named: sizes.append(made := of(*args, **named)) or made)
    whole, parts = (run(f"--lr 0 --steps 2 --micro-batch-size {n}").rows("loss") for n in (8, 3))
    assert [[len(batch.labels) for batch in made.batches] for made in sizes] == [[8]] * 2 + [[3, 3, 2]] * 2
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], abs=1e-6)


def test_what_has_no_gradient_is_made_larger(run):
    """Accuracy, with probes large enough to change an answer: each loss is a number of wrong answers of 32, and the
    best weights are those of the highest dev accuracy.  Steps in which no answer changes are no sign of a dead one."""
    flags = "--objective accuracy --eps 2e-2 --lr 2e-3 --batch-size 32 --steps 20 --eval-every 5"
    done = run(f"{flags} --lr-schedule constant")
    losses = [row["loss"] for row in done.rows("loss")]
    assert all((64 * loss).is_integer() for loss in losses) and done.result["diverged"] is None
    devs = done.rows("dev")
    assert all(row["dev_loss"] == pytest.approx(1 - row["dev"]) for row in devs)
    assert done.result["dev"] == max(row["dev"] for row in devs) > devs[0]["dev"]
    with pytest.raises(ValueError, match="--objective accuracy has no gradient"):
        run("--method fo --objective accuracy")


def test_every_epoch_uses_every_example_once_whatever_the_batch_size():
    stream = [i for step in range(30) for i in train.batch_indices(5, step, batch_size=7, n=30)]
    assert [sorted(stream[e * 30 : (e + 1) * 30]) for e in range(7)] == [list(range(30))] * 7
    assert stream[:30] != stream[30:60]
    assert stream == [i for step in range(42) for i in train.batch_indices(5, step, batch_size=5, n=30)]
    assert stream[:7] != train.batch_indices(6, 0, batch_size=7, n=30)  # another seed


def test_batches_of_a_step_have_one_length_where_lengths_are_rounded_up():
    c = parse([*SHORT, "--device", "cpu"])
    problem = train.prepare(c)[0]
    examples = sorted(problem.train, key=lambda e: e.width)[:1] + problem.train[:11]
    made = [BatchLoss.of(problem.lm, examples, problem.pad, 4, multiple) for multiple in (problem.multiple, 8)]
    ragged, rounded = ([batch.tokens.shape[1] for batch in loss_fn.batches] for loss_fn in made)
    assert len(set(ragged)) > 1 and rounded == [-(-max(ragged) // 8) * 8] * 3
    cuda = parse(["--device", "cuda", "--no-graphs"])
    assert [setup.multiple_of(*case) for case in ((cuda, 512), (cuda, 510), (c, 512))] == [8, 1, 1]


@full
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_and_cpu_take_the_same_first_steps(run):
    """Directions are equal integers; losses differ by float32 rounding of a small model's forward."""
    cpu, cuda = (run(f"--device {device} --compute fp32 --lr 0").rows("loss") for device in ("cpu", "cuda"))
    for a, b in zip(cpu, cuda, strict=True):
        assert a["projected_grad"] == pytest.approx(b["projected_grad"], abs=5e-3)


# ---------------------------------------------------------------- runs that end badly


@pytest.mark.parametrize("method, said", [
    ("adazeta --eval-every 50", "the loss was not finite in 4 steps"),
    ("lora --eval-every 50", "the loss was not finite in 4 steps"),
    ("fo --eval-every 2", "the dev loss was not finite at step 2"),
])  # fmt: skip
def test_losses_that_are_not_finite_end_a_run_with_its_record(capsys, tmp_path, method, said):
    """By a rate far too large: of probes, of steps, at an evaluation.  The start is kept, and the record is whole."""
    flags = f"--method {method} --weights fp32 --lr 1e6 --steps 12".split()
    assert train.main([*SHORT, *flags, "--out", str(tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["diverged"] == f"{said}: start another run with a smaller --lr" and said in err
    assert result["steps"] < 12 and result["best_step"] == 0 and "Traceback" not in err
    assert len(read_trajectory(tmp_path / "run" / "trajectory")) == result["steps"]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and "null" in text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert weights_sha256(kept(tmp_path / "run", config["flags"]).weights) == config["base_weights_sha256"]
    if config["flags"]["optimizer"] == "zo":
        assert train.main(["--replay", str(tmp_path / "run"), "--verify", "3"]) == 0


def test_a_step_whose_loss_is_not_finite_is_skipped(run, monkeypatch):
    """And the run goes on."""
    real, calls = train.zo_step, []

    def sometimes(weights, loss_fn, *rest):
        calls.append(0)
        bad = len(calls) == 2
        return real(weights, (lambda view: loss_fn(view) * float("nan")) if bad else loss_fn, *rest)

    monkeypatch.setattr(train, "zo_step", sometimes)
    done = run("--method mezo", again=True)
    losses = [row["loss"] for row in done.rows("plus")]
    assert [loss is None for loss in losses] == [False, True, False, False] and done.result["diverged"] is None
    assert read_trajectory(done.folder / "trajectory")[1] == [0.0]


def test_a_model_that_is_not_finite_before_any_step_is_not_blamed_on_the_rate(run, monkeypatch):
    monkeypatch.setattr(train.Problem, "quality", lambda *args: train.Quality(0.5, float("nan")))
    with pytest.raises(ValueError, match="not finite at step 0: the model gives none before any step"):
        run("--steps 1", again=True)


DIVERGING = {  # flags: the advice, and whether the model dies, which its dev loss then does not tell from a better one
    "--lr 10": ("a smaller --lr", True), "--method adazeta --lr 10": ("a smaller --lr", True),
    "--lr 0.05": ("a smaller --lr", False), "--eps 1e3": ("a larger --eps, or a smaller one if", False),
}  # fmt: skip


@pytest.mark.parametrize("flags", DIVERGING)
def test_a_diverging_run_stops_and_says_what_to_try(capsys, tmp_path, flags):
    """After 16 steps in a row of which no probe changed the loss, or whose loss was above 2 first + 1.  The guess of a
    dead model, ln 2, is lower than the start's loss, and is not kept, nor drawn as the best."""
    advice, dies = DIVERGING[flags]
    folder = tmp_path / "run"
    assert train.main([*SHORT, *f"--steps 60 --eval-every 1 {flags} --out {folder}".split()]) == 1
    out, err = capsys.readouterr()
    result, config = json.loads(out), json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "result.json").read_text()) == result and not result["interrupted"]
    assert f"start another run with {advice}" in result["diverged"]
    assert f"the run diverged at step {result['steps']}: {result['diverged']}" in err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, devs = [row for row in rows if "loss" in row], [row for row in rows if "dev" in row]
    still = "".join("x" if not any(row["projected_grad"]) else "." for row in steps)
    astray = "".join("x" if row["loss"] > 2 * steps[0]["loss"] + 1 else "." for row in steps)
    assert min((way + 16 * "x").index(16 * "x") for way in (still, astray)) + 16 == len(steps) == result["steps"] < 60
    assert [row["step"] for row in devs] == list(range(len(steps) + 1))
    alive = [row for row in devs if not row["step"] or abs(row["dev_loss"] - math.log(2)) > 1e-6]
    best = min(alive, key=lambda row: row["dev_loss"])
    assert dies == (min(row["dev_loss"] for row in devs) < best["dev_loss"])
    assert (result["best_step"], result["dev_loss"]) == (best["step"], best["dev_loss"])
    assert f"best step {best['step']}: " in (folder / "curve.svg").read_text()
    assert (NOTHING_BETTER in err) == (best["step"] == 0) and result["test"] is not None
    sha256 = weights_sha256(kept(folder, config["flags"]).weights)
    assert (sha256 == config["base_weights_sha256"]) == (best["step"] == 0) and sha256 == result["weights_sha256"]


def test_what_counts_as_diverged():
    """16 in a row and no fewer; a loss of 0 has nothing to change, and first-order steps have no probes."""
    zeros, one, none = (torch.tensor(g, dtype=torch.float64) for g in ([0.0, -0.0], [0.0, 1e-300], []))

    def ended(*steps: tuple[torch.Tensor, float]) -> str | None:
        progress = train.Progress(guess=math.log(2))
        for projected_grads, loss in steps:
            progress.count_step(projected_grads, 4, loss)
        return progress.diverged

    assert "larger --eps" in ended(*16 * [(zeros, 0.7)])
    assert "smaller --lr" in ended((one, 0.7), *16 * [(zeros, 0.7)])
    assert "above 2.4" in ended((none, 0.7), *16 * [(none, 2.41)])
    for steps in (
        15 * [(zeros, 0.7)], 100 * [(zeros, 0.0)], 100 * [(none, 0.7)], 9 * [*15 * [(zeros, 0.7)], (one, 0.7)],
        [(one, 0.7), *15 * [(one, 2.41)]], [(one, 0.7), *100 * [(one, 2.39)]],
        [(one, 0.7), *9 * [*15 * [(one, 2.41)], (one, 2.39)]], [(one, 0.7), *9 * [*8 * [(zeros, 0.7)], (one, 2.41)]],
    ):  # fmt: skip
        assert ended(*steps) is None


def test_a_dead_model_is_not_kept():
    """Its loss is ln 2; or another, but no probe changes it.  One with little left to learn is alive."""
    zeros, one = (torch.tensor([g], dtype=torch.float64) for g in (0.0, 1.0))
    for g, loss, dev_loss, keeps in (
        (one, 0.8, 0.6, True), (one, 0.8, math.log(2), False), (zeros, 0.8, 0.6, False), (zeros, 0.0, 0.6, True),
    ):  # fmt: skip
        progress = train.Progress(guess=math.log(2))
        assert progress.note_if_best(train.Quality(0.5, 1.0))
        progress.count_step(g, 2, loss)
        assert progress.note_if_best(train.Quality(0.5, dev_loss)) == keeps
        assert (progress.best.loss, progress.best_step) == ((dev_loss, 1) if keeps else (1.0, 0))


def test_a_machine_that_gives_out_gets_one_line_and_exit_code_1(capsys, monkeypatch):
    def fail_with(error):
        monkeypatch.setattr(train, "run", lambda c: (_ for _ in ()).throw(error))
        return train.main(SHORT)

    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:121]\nDefaultCPUAllocator: can't allocate memory: you tried")
    for error in OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA out of memory"), cpu:
        assert fail_with(error) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(RuntimeError, match="a bug"):
        fail_with(RuntimeError("a bug"))


# ---------------------------------------------------------------- the command


@pytest.mark.full
def test_the_last_line_is_json_and_progress_is_elsewhere(tmp_path):
    flags = f"--device cpu --steps 2 --batch-size 4 --num-eval 16 --out {tmp_path / 'run'}".split()
    command = [sys.executable, "train.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    promised = (
        "model task method weights directions steps forwards trainable_parameters zero_shot dev test diverged seconds "
        "peak_memory_bytes weights_sha256 out"
    )
    assert set(promised.split()) <= set(json.loads(done.stdout))
    assert "2/2" in done.stderr and "loss=" in done.stderr and "4-bit directions (the paper's)" in done.stderr


@full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_leaves_a_complete_run_folder_and_a_kill_a_readable_one(tmp_path, number):
    folder = tmp_path / "run"
    flags = f"--device cpu --steps 100000 --eval-every 4 --batch-size 4 --num-eval 100 --out {folder}".split()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, env=ONE_THREAD, **pipes)
    deadline = time.monotonic() + 60
    while not (folder / "trajectory").is_file() or len(read_trajectory(folder / "trajectory")) < 6:
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError(f"no six steps in a minute: {process.communicate()[1][-500:]}")
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    steps, saved = len(read_trajectory(folder / "trajectory")), load(folder / "model", weights="int8")
    if number == signal.SIGKILL:
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        assert steps >= 6 and json.loads(rows[steps // 2])
        assert json.loads((folder / "config.json").read_text())["flags"]["weights"] == "int8"
        return
    assert process.returncode == 130 and "Traceback" not in err, err
    result = json.loads(out)
    assert result["interrupted"] and result["test"] is None and result["dev"] is not None and result["steps"] == steps
    assert json.loads((folder / "result.json").read_text()) == result
    assert weights_sha256(saved.weights) == result["weights_sha256"]


def test_help_comes_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert not stop.value.code
    sections = {}
    for line in capsys.readouterr().out.splitlines():
        if re.fullmatch(r"[a-z].*:", line):
            sections[line[:-1]] = flags = []
        elif found := re.match(r"  (--[a-z-]+)", line):
            flags.append(found[1])
    assert list(sections) == ["options", "model and data", "method", "zeroth-order estimate", "family", "steps",
                              "adapters", "ablations", "machine", "run", "instead of a run"]  # fmt: skip
    assert sections["ablations"] == ["--estimator", "--probe", "--rounding", "--oracle"]
    assert sorted(sum(sections.values(), [])) == sorted("--" + f.name.replace("_", "-") for f in fields(Config))


# ---------------------------------------------------------------- defaults by method, weights and device

GIVEN = {  # flags, beside --model roberta-base: what they come to
    "--weights int8": dict(direction_bits="sparse", eps=1e-3, cell=1024, estimator=None, calibrate=0),
    "--weights int4": dict(direction_bits="sparse", eps=2.5e-4, cell=256, clip=3.0, calibrate=1024),
    "--weights fp8": dict(direction_bits="sparse", eps=1e-3, cell=1024),
    "--weights fp32": dict(direction_bits="sparse", eps=1e-3, cell=1024),
    "--weights int8 --direction-bits 4": dict(direction_bits="4", eps=1e-3, cell=None, clip=None, estimator="q-rge2"),
    "--weights int4 --direction-bits 3": dict(direction_bits="3", eps=1e-3, cell=None),
    "--weights int4 --eps 0.5": dict(direction_bits="sparse", eps=0.5, cell=256),
    "--weights int4 --activations int8": dict(direction_bits="sparse", eps=2e-3, cell=256),
    "--weights int4 --activations int8 --cell 64": dict(direction_bits="sparse", eps=2e-3, cell=64),
    "--model tiny --weights int8": dict(direction_bits="4", eps=1e-3, cell=None, estimator="q-rge2"),
    "--model tiny --weights int8 --direction-bits sparse": dict(direction_bits="sparse", eps=1e-3, cell=64),
    "--model tiny --weights int4": dict(direction_bits="sparse", eps=1e-3, cell=64, calibrate=0, estimator=None),
    "--model tiny --weights fp8": dict(direction_bits="sparse", eps=1e-3, cell=64),
    "--method mezo": dict(direction_bits="full", eps=1e-3, cell=None, steps=20000, lr=None, batch_size=16,
                          weights="bf16"),
    "--method adazeta --weights int4": dict(direction_bits="full", cell=None),
    "--method fo": dict(direction_bits=None, eps=None, cell=None),
    "": dict(compute="fp32", compile=False, graphs=False, method="quzo", weights="int8", queries=1, optimizer="zo"),
    "--num-eval 5": dict(task="sst2", num_train=1000, num_dev=500, data_seed=0, data_dir=None, k=None),
    "--k 16": dict(task="sst2", num_train=None, num_dev=None, data_seed=42, data_dir=None, k=16),
    "--model tiny": dict(task="tiny", num_train=None, num_dev=None, data_seed=None, data_dir=None, k=None),
    "--weights fp8 --activations fp8": dict(compute="fp32", compile=False),
    "--device cuda": dict(compute="bf16", compile=True, graphs=True),
    "--device cuda --no-graphs": dict(graphs=False),
    "--device cuda --weights fp32": dict(compute="fp32", compile=True),
    "--device cuda --weights fp8 --activations fp8": dict(compute="fp8", compile=True),
    "--device cuda --method fo": dict(compute="fp32", compile=False, graphs=False),
    "--device cuda --weights fp8 --activations fp8 --compute bf16 --no-compile": dict(compute="bf16", compile=False),
    "--device cuda --method lora --weights fp8 --activations fp8": dict(compute="bf16", compile=False),
    "--device cuda --weights fp8 --activations fp8 --direction-bits 4": dict(compute="bf16", compile=True),
    "--device cuda --weights fp8 --activations fp8 --direction-bits 4 --probe codes": dict(compute="fp8", compile=True),
    "--device cuda --weights int8 --activations int8": dict(compute="int8", compile=True),
    "--device cuda --weights int8 --activations int8 --direction-bits 4": dict(compute="bf16", compile=True),
    "--device cuda --method subzero --weights int8 --activations int8": dict(compute="bf16", graphs=True),
    "--device cuda --method lezo --weights int8 --activations int8": dict(compute="int8", graphs=False),
    "--device cuda --method mezo-svrg --weights fp8 --activations fp8": dict(compute="bf16", graphs=False),
    "--device cuda --method mazo --weights int8": dict(direction_bits="full", mask_share=0.5, graphs=True),
    "--device cuda --method elasticzo --weights int8 --activations int8": dict(compute="bf16", graphs=False, cell=256),
    "--device cuda --method zo2 --weights int8 --activations int8": dict(compute="int8", graphs=False, cell=256),
    "--method zo2": dict(weights="bf16", direction_bits="full", calibrate=0, queries=1, lr_schedule="constant"),
    "--method elasticzo --weights int4": dict(direction_bits="sparse", calibrate=1024, tail_blocks=1, tail_rate=3.0),
    "--device cuda --method adazeta": dict(compute="bf16", compile=False, graphs=True),
    "--device cuda --method adazeta --queries 4": dict(compute="bf16", compile=True, graphs=True),
}  # fmt: skip


def test_defaults_go_by_method_weights_and_device():
    for flags, want in GIVEN.items():
        c = parse(["--model", "roberta-base", "--device", "cpu", *flags.split()])
        assert {name: getattr(c, name) for name in want} == want, flags


def test_probes_of_adapters_share_a_forward_on_a_gpu():
    """Otherwise two at a time."""
    on_gpu, lm = "--method adazeta --device cuda", SimpleNamespace(dtype=torch.float32)
    want = {on_gpu: None, "--method adazeta --device cpu": 2, "--device cuda": 2, f"{on_gpu} --probes-per-forward 4": 4}
    assert {flags: train.estimator(parse(flags.split()), lm).probes_per_forward for flags in want} == want


def test_a_gpu_without_triton_gets_no_graphs(monkeypatch):
    """And graphs of what cannot be recorded are refused, without asking whether there is a GPU."""
    cuda = ["--model", "roberta-base", "--device", "cuda"]
    with pytest.raises(ValueError, match="--graphs are for zo on cuda"):
        check_products(parse([*cuda, "--graphs", "--method", "fo"]))
    monkeypatch.setattr("runtime.config.expects_triton", lambda: False)
    c = parse(cuda)
    assert (c.graphs, c.compile, c.compute) == (False, False, "bf16")
    check_products(c)
    for flag in ("--graphs", "--compile"):
        with pytest.raises(ValueError, match="need Triton"):
            check_products(parse([*cuda, flag]))


def test_projected_gradients_are_held_within_so_many_root_mean_squares(run):
    """Of all before, from the 17th on, as they were stepped along: the record has those, and is replayed as it is."""
    done = run("--weights int4 --eval-every 5 --steps 20 --lr 3e-3 --clip 0.1")
    rows, clipped, before = done.rows("projected_grad"), 0, []
    for row in rows:
        rms = 0.1 * (sum(g * g for g in before) / len(before)) ** 0.5 if len(before) >= 16 else float("inf")
        plain = (row["plus"][0] - row["minus"][0]) / (2 * done.config()["flags"]["eps"])
        (g,) = row["projected_grad"]
        assert g == pytest.approx(max(-rms, min(rms, plain)), rel=1e-12)
        clipped += g != plain
        before.append(g)
    assert clipped == 4 and len(rows) == 20
    assert train.main(["--replay", str(done.folder)]) == 0


# ---------------------------------------------------------------- what is refused


def bad_files(tmp: Path) -> dict[str, str]:
    """Flags that name what cannot be used -> what the line must say."""
    empty, pickled, nan, held = tmp / "empty", tmp / "pickled", tmp / "nan", tmp / "held"
    empty.mkdir()
    for folder in (pickled, nan):
        shutil.copytree(TINY / "model", folder)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    lm = load(nan)
    lm.weights["model.norm.weight"].value[3] = float("nan")
    lm.save(nan)
    held.mkdir()
    (held / "result.json").write_text("{}")
    wrong = tmp / "data" / "k-shot" / "SST-2" / "16-42"
    wrong.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (wrong / f"{split}.tsv").write_text("sentence\tlabel\ngood\tpositive\n")
    sst2 = f"--task sst2 --data-dir {tmp / 'data'}"
    return {
        f"--model {empty} --task tiny": "no config.json",
        f"--model {pickled} --task tiny": "pickles can run code and are never loaded",
        f"--model {nan} --task tiny": "model.norm.weight holds NaN",
        f"{sst2} --k 16": "train.tsv:2: the label must be one of '0', '1', got 'positive'",
        f"{sst2} --k 512": "512-42 is missing; there are 16-42",
        f"{sst2} --k 16 --num-dev 5": "--num-dev means nothing beside --k",
        f"--out {held}": "not empty",
        f"--out {held / 'result.json' / 'run'}": "not a folder",
    }


REFUSED = {
    "--learning-rate 1": "--learning-rate", "--step 1": "--step", "--profile 3": "--profile", "--steps many": "'many'",
    "--model gpt-5": "unknown model 'gpt-5'", "--task sst9": "'sst9'", "--method sgd": "'sgd'",
    "--method loretta": "'loretta'", "--direction-bits 9": "'9'", "--weights fp8-e5m2": "'fp8-e5m2'",
    "--activations fp8-e5m2": "'fp8-e5m2'", "--activations int4": "'int4'", "--estimator q-rge3": "'q-rge3'",
    "--residual 3": "3", "--method loretta-adp --placement qv": "'qv'", "--method loretta-adp --init zero": "'zero'",
    "--method adazeta --tt-rank 2.5": "'2.5'", "--device tpu": "--device must be cpu, cuda or cuda:N, got 'tpu'",
    "--batch-size 0": "--batch-size must be in [1, 1048576], got 0", "--lr nan": "got nan", "--eps 0": "--eps must",
    "--method adazeta --bottleneck 0": "--bottleneck must be in [1, 65536], got 0", "--seed -1": "--seed must be in",
    "--method lora --warmup -1": "--warmup must be in [0, 2147483647], got -1",
    "--warmup 1 --steps 1": "--warmup 1 leaves none of --steps 1 at the full rate",
    "--k 16": "--k means nothing beside task tiny",
    # formats and methods
    "--method mezo --weights int8": "use quzo for int8", "--method fo --weights int4": "use fo-ste for int4",
    "--method mezo --direction-bits sparse": "use quzo for --direction-bits sparse",
    "--method fo-ste --weights bf16": "use fo for bf16",
    "--weights fp8 --residual 4": "a residual needs weights int8 or int4, got fp8",
    "--weights fp8 --oracle": "the oracle needs weights int8 or int4, got fp8",
    "--method adazeta --optimizer adamw": "--method adazeta means --optimizer zo, got adamw",
    "--method mezo --optimizer adamw": "--method mezo means --optimizer zo",
    "--method fo --optimizer zo": "--method fo means --optimizer adamw",
    # flags that would be ignored; others are in MEANT
    "--method adazeta --queries 3 --alpha 0.5": "--alpha means nothing beside",
    "--method adazeta --queries 3 --max-queries 5": "--max-queries means nothing beside",
    "--method loretta-adp --optimizer zo --beta 0.5": "--beta means nothing beside --method loretta-adp --optimizer zo",
    "--method adazeta --weights int4 --probe codes": "--probe means nothing beside --method adazeta",
    "--method lora --optimizer zo --weights int8 --rounding nearest": "--rounding means nothing beside --method lora",
    "--method lora --weights int8 --residual 4": "--residual means nothing beside --method lora",
    "--method adazeta --weights int8 --residual 4": "--residual means nothing beside --method adazeta",
    "--method adazeta --weights int8 --oracle": "--oracle means nothing beside --method adazeta",
    "--method adazeta --direction-bits sparse": "adapters are floats",
    "--method lora --optimizer zo --direction-bits sparse": "adapters are floats",
    "--method fo --cell 64": "--cell means nothing beside --method fo",
    "--weights int8 --cell 64": "--cell needs --direction-bits sparse, got 4",
    "--method adazeta --cell 64": "--cell needs --direction-bits sparse, got full",
    "--weights int4 --cell 100": "--cell must be a power of two, got 100",
    "--weights int4 --cell 4": "--cell must be in [8, 1073741824], got 4",
    "--weights int4 --estimator q-rge1": "--estimator q-rge1 is about rounding directions",
    "--method mezo --estimator q-rge2": "--direction-bits full does not: use 2 to 8",
    "--weights fp32 --rounding nearest": "mean nothing beside --weights fp32",
    "--method mezo --weights fp32 --probe codes": "mean nothing beside --weights fp32",
    "--weights int4 --probe codes": "are not for --direction-bits sparse",
    "--weights fp8 --rounding nearest": "are not for --direction-bits sparse",
    "--dry-run --model llama2-7b --probe codes": "are not for --direction-bits sparse",
    "--dry-run --model llama2-7b --direction-bits 4 --cell 64": "--cell needs --direction-bits sparse",
    "--compute fp8": "--compute fp8 multiplies codes by codes",
    "--weights fp8 --activations fp8 --compute int8": "--compute int8 multiplies codes by codes",
    "--weights int8 --activations int8 --compute int8 --oracle": "--compute int8 multiplies codes by codes",
    "--weights fp8 --activations int8 --compute fp8": "--compute fp8 multiplies codes by codes",
    "--weights fp8 --activations fp8 --compute fp8 --direction-bits 4": "all weights with --direction-bits sparse",
    "--graphs --device cpu": "--graphs are for zo on cuda",
    "--method subzero --direction-bits 4": "subzero has directions of its own",
    "--method mezo-svrg --queries 2": "dense directions, unclipped: leave out --queries 2",
    "--method mezo-svrg --clip 2": "dense directions, unclipped: leave out --clip",
    "--method subzero --probe codes --weights int8": "subzero has directions of its own: leave out --probe codes",
    "--method lezo --graphs --device cpu": "and of the methods of family/ for subzero and mazo alone",
    "--method lezo --share 0": "--share must be in [0.001, 1], got 0.0",
    "--method adazeta --compile": "--compile makes code for each number of probes, which grows here",
}  # fmt: skip


def test_every_number_has_a_range():
    """Whatever else it means: below, above, infinity and NaN."""
    numbers = {f.name for f in fields(Config) if f.type.removesuffix(" | None") in ("int", "float")}
    assert numbers - {"residual"} == set(RANGES)
    for name, (low, high) in RANGES.items():
        for value in (low - 1, high + 1 + high / 1e6, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be in "):
                train.validate(replace(parse([]), **{name: value}))


def test_bad_input_gets_one_line_and_exit_code_2_and_writes_nothing(tmp_path, capsys):
    new = tmp_path / "new"
    for flags, message in (bad_files(tmp_path) | REFUSED).items():
        out = [] if "--out" in flags else ["--out", str(new)]
        assert train.main([*SHORT, *out, *flags.split()]) == 2, flags
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if "zero-shot" not in line and "run folder" not in line]
        assert said.out == "" and len(lines) == 1, (flags, said.err)
        assert lines[0].startswith("train.py: ") and message in lines[0], (flags, lines)
        assert not new.exists(), flags
    assert [p.name for p in (tmp_path / "held").iterdir()] == ["result.json"]


TENSOR_TRAINS = {"loretta-adp", "loretta-rep", "adazeta"}
ZO_ONLY = {"quzo", "mezo", *FAMILY, "adazeta"}  # of those that have a default optimizer of their own
MEANT = {  # a flag: the methods, with their default optimizer, beside which it means something
    "--placement mlp": {"loretta-adp", "adazeta"}, "--bottleneck 8": TENSOR_TRAINS, "--tt-rank 2": TENSOR_TRAINS,
    "--lora-rank 2": {"lora"}, "--lora-alpha 8": {"lora", "loretta-rep"}, "--init identity": set(ADAPTERS),
    "--init released": set(ADAPTERS), "--alpha 0.5": {"adazeta"}, "--beta 0.5": {"adazeta"},
    "--max-queries 3": {"adazeta"}, "--queries 1": ZO_ONLY, "--eps 0.01": ZO_ONLY,
    "--probes-per-forward 1": ZO_ONLY,
    "--direction-bits full": ZO_ONLY, "--estimator random": ZO_ONLY,
    "--weight-decay 0.1": {"fo", "fo-ste"}, "--master bf16": {"fo-ste"},
    "--subspace-rank 4": {"subzero"}, "--subspace-steps 9": {"subzero"},
    "--share 0.5": {"lezo"}, "--no-rest": {"lezo"}, "--bandit": {"lezo"},
    "--tail-blocks 2": {"elasticzo"}, "--tail-rate 2": {"elasticzo"},
    "--anchor-steps 3": {"mezo-svrg"}, "--anchor-rate 2": {"mezo-svrg"}, "--mask-share 0.5": {"mazo"},
}  # fmt: skip


def test_a_flag_is_refused_where_it_means_nothing():
    for flag, methods in MEANT.items():
        for method in METHODS:
            c = parse(["--method", method, *flag.split()])
            if method in methods:
                train.validate(c)
                continue
            name = flag.split()[0].replace("no-", "")
            with pytest.raises(ValueError, match=f"{name} means nothing beside --method {method}"):
                train.validate(c)
