"""family/zo2.py: offloaded blocks have the bits of resident ones, whatever comes between steps, in three blocks' room.

On a CPU copies are made at once; slots, pending steps and homes are the same as on a GPU, whose streams
tests/test_gpu.py has.  Oracle: the same model without offloading, by the same seed.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_equal_folders,
    assert_refused,
    last_line,
    one_of_two,
    shortened,
    tiny_llama,
    tiny_roberta,
)
from oracles import same_tensors
from torch import Tensor

import tensor_train
import train
from data.scoring import BatchLoss, Encoded
from family.zo2 import Deferred, Offloaded, moved, offload, tensors
from model import LanguageModel, create, load
from quant import FORMATS, Float, Store, encode
from random_bits import Key
from runtime.checkpoints import weights_sha256
from zo_optim import ZO, SparseZO, update, zo_step

CPU = torch.device("cpu")
KINDS = {"full": ZO, "4 bits": partial(ZO, bits=4), "sparse": partial(SparseZO, cell=16)}
LLAMA = tiny_llama(num_hidden_layers=3, hidden_size=16, intermediate_size=24)
ROBERTA = tiny_roberta(num_hidden_layers=3, hidden_size=16, intermediate_size=24)
RAW = {"llama": LLAMA, "roberta": ROBERTA}


def tiny(raw: dict = LLAMA, weights: str = "fp32", residual: int = 0, oracle: bool = False) -> LanguageModel:
    """A random model with matrices five times the usual size, so that attention is not uniform."""
    lm = create(raw)
    dense = {name: stored.value * (5 if stored.value.ndim == 2 else 1) for name, stored in lm.weights.items()}
    lm.weights = {name: encode(tensor, weights, residual, oracle and tensor.ndim == 2)
                  for name, tensor in dense.items()}  # fmt: skip
    lm.format, lm.residual = weights, residual
    return lm


def offloaded(*args, **options) -> LanguageModel:
    lm = tiny(*args, **options)
    offload(lm, CPU)
    return lm


def batch_loss(lm: LanguageModel, micro_batch_size: int = 8) -> BatchLoss:
    """Of three random prompts of 4 to 7 tokens, padded, with two options of one token."""
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 97, (length,), generator=g).tolist() for length in (4, 7, 5)]
    examples = [Encoded([p], [[17], [42]], len(p) - 1, i % 2) for i, p in enumerate(prompts)]
    return BatchLoss.of(lm, examples, 0, micro_batch_size)


def take_step(lm: LanguageModel, zo: ZO, step: int, lr: float = 1e-3, micro_batch_size: int = 8):
    zo = zo if lm.offloaded is None else Deferred(zo, lm.offloaded)
    return zo_step(lm.weights, batch_loss(lm, micro_batch_size), Key(3, step), zo, lr)


def same(a: dict[str, Store], b: dict[str, Store]) -> bool:
    """Every stored bit, in the same order of names; -0 is not 0."""
    return list(a) == list(b) and all(same_tensors(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- the same bits

CASES = [  # model, blocks, directions, format, residual bits, queries, examples a forward
    ("llama", 3, "full", "fp32", 0, 1, 8), ("roberta", 5, "full", "bf16", 0, 1, 2),
    ("llama", 1, "4 bits", "int8", 0, 3, 8), ("roberta", 2, "4 bits", "int4", 4, 1, 8),
    ("llama", 5, "sparse", "int4", 0, 1, 8), ("llama", 2, "sparse", "fp8", 0, 1, 1),
    ("roberta", 1, "sparse", "int4", 0, 3, 2), ("llama", 4, "full", "int8", 4, 1, 8),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("roberta", 3, "sparse", "int8", 0, 1, 8), ("llama", 3, "sparse", "bf16", 0, 3, 8),
        ("roberta", 5, "4 bits", "fp8", 0, 1, 8), ("llama", 2, "full", "bf16", 0, 3, 1),
    )),
]  # fmt: skip


@pytest.mark.parametrize("model, blocks, kind, weights, residual, queries, micro", CASES)
def test_offloaded_steps_are_the_resident_ones(model, blocks, kind, weights, residual, queries, micro):
    """All losses of each step, and of an evaluation after the second; all stored bits at the end; and all that was
    written was counted, of blocks one step later."""
    raw, zo = RAW[model] | {"num_hidden_layers": blocks}, KINDS[kind](0.01, queries)
    resident, away = tiny(raw, weights, residual), offloaded(raw, weights, residual)
    counts = [torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)]
    for step in range(3):
        done = [take_step(lm, zo, step, micro_batch_size=micro) for lm in (resident, away)]
        for name in ("plus", "minus", "projected_grads"):
            assert torch.equal(getattr(done[0], name), getattr(done[1], name)), (step, name)
        counts = [total + of.counts for total, of in zip(counts, done, strict=True)]
        if step == 1:
            with torch.no_grad():
                evaluated = [batch_loss(lm)(lm.stored_view()) for lm in (resident, away)]
            assert torch.equal(*evaluated)
    assert done[0].projected_grads.all() and not torch.equal(*counts)  # the blocks' last step is pending
    away.offloaded.settle()
    assert same(resident.weights, away.weights) and not same(resident.weights, tiny(raw, weights, residual).weights)
    assert torch.equal(counts[0], counts[1] + away.offloaded.counts)


@pytest.mark.parametrize("weights, residual", [("int8", 0), pytest.param("int4", 4, marks=pytest.mark.full)])
def test_the_oracle_is_offloaded_too(weights, residual):
    resident, away = (make(LLAMA, weights, residual, oracle=True) for make in (tiny, offloaded))
    for step in range(2):
        done = [take_step(lm, SparseZO(0.01, cell=16), step) for lm in (resident, away)]
        assert torch.equal(done[0].plus, done[1].plus)
    away.offloaded.settle()
    assert same(resident.weights, away.weights)


@pytest.mark.parametrize("kind, weights", [("full", "fp32"), ("4 bits", "int8"), ("sparse", "int4")])
def test_updates_without_forwards_are_redone(kind, weights):
    """As --replay and --resume have them, with and without a settling in between, which may come twice."""
    grads = torch.tensor([[3.0, -7.5], [0.5, 2.0], [0.0, 0.0], [-4.0, 1.0]], dtype=torch.float64)
    zo, resident = KINDS[kind](0.01, 2), tiny(weights=weights)
    want = []
    for step, g in enumerate(grads):
        update(resident.weights, g, Key(1, step), zo, 1e-3)
        want.append(weights_sha256(resident.weights))
    for settles in ((3,), (0, 1, 1, 2, 3)):
        away = offloaded(weights=weights)
        for step, g in enumerate(grads):
            update(away.weights, g, Key(1, step), Deferred(zo, away.offloaded), 1e-3)
            for _ in range(settles.count(step)):
                away.offloaded.settle()
                assert weights_sha256(away.weights) == want[step] and not away.offloaded.pending
        assert same(resident.weights, away.weights)


@torch.no_grad()
def test_a_text_is_written_by_offloaded_blocks():
    resident, away = tiny(), offloaded()
    for lm in (resident, away):
        take_step(lm, ZO(0.01), 0)
    tokens = torch.tensor([[5, 17, 42], [9, 8, 7]])
    assert torch.equal(resident.generate(tokens, 6), away.generate(tokens, 6))


@pytest.mark.parametrize("kind, weights, residual", [*(("sparse", weights, 0) for weights in FORMATS),
                                                     ("4 bits", "int8", 4), ("full", "fp32", 0)])  # fmt: skip
def test_lr_0_leaves_every_bit(kind, weights, residual):
    def make() -> LanguageModel:
        lm = tiny(weights=weights, residual=residual)
        for block in range(3):
            lm.weights[f"model.layers.{block}.zeros"] = Float(torch.full((4, 8), -0.0))
        return lm

    lm = make()
    offload(lm, CPU)
    for step in range(2):
        done = take_step(lm, KINDS[kind](0.01), step, lr=0.0)
        assert done.projected_grads.all() and not done.counts.any() and not lm.offloaded.pending
    lm.offloaded.settle()
    assert same(lm.weights, make().weights)


# ---------------------------------------------------------------- homes and slots


def in_blocks(lm: LanguageModel) -> dict[str, Store]:
    return {name: store for name, store in lm.weights.items() if name.startswith(lm.layers)}


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_homes_are_true_once_all_has_settled(tmp_path, weights):
    """Until then a block is what it was before the last step; what is in no block has moved.  A save settles."""
    resident, away, start = tiny(weights=weights), offloaded(weights=weights), tiny(weights=weights)
    for lm in (resident, away):
        take_step(lm, SparseZO(0.01, cell=16), 0)
    assert same(in_blocks(away), in_blocks(start)) and not same(in_blocks(resident), in_blocks(start))
    rest = away.weights.keys() - in_blocks(away).keys()
    assert all(same_tensors(away.weights[name], resident.weights[name]) for name in rest)
    assert weights_sha256(away.weights) != weights_sha256(resident.weights)
    train.save(away, tmp_path / "model")
    saved = load(tmp_path / "model", weights=weights)
    assert weights_sha256(away.weights) == weights_sha256(saved.weights) == weights_sha256(resident.weights)


@pytest.mark.parametrize("raw", [LLAMA | {"num_hidden_layers": 5}, ROBERTA], ids=["llama", "roberta"])
@pytest.mark.parametrize("weights, residual", [("bf16", 0), ("int4", 4), ("fp8", 0)])
def test_three_blocks_are_on_the_device_and_the_rest_at_home(raw, weights, residual):
    """Their tensors share no memory with a home, nor with one another; a forward reads one block from its slot, and all
    others from nowhere else than home.  The slots hold three blocks' bytes and no more."""
    lm, seen = offloaded(raw, weights, residual), []
    held, layers = lm.offloaded, lm.config.num_hidden_layers
    room = [tensor for slot in held.slots for store in slot.stores for tensor in tensors(store)]
    homes = [tensor for stores in held.home for store in stores.values() for tensor in tensors(store)]
    assert sum(t.nbytes for t in room) == 3 * sum(t.nbytes for t in homes) // layers
    assert len({t.untyped_storage().data_ptr() for t in room + homes}) == len(room) + len(homes)

    def look(block, args) -> None:
        away = {name for name, store in in_blocks(lm).items() if store is not held.home[held.block_of[name]][name]}
        seen.append({held.block_of[name] for name in away})
        assert len(away) == len(held.home[0])
        assert all(any(lm.weights[name] is store for slot in held.slots for store in slot.stores) for name in away)

    hook = lm.block.register_forward_pre_hook(look)
    for step in range(2):
        take_step(lm, SparseZO(0.01, cell=16), step)
    hook.remove()
    assert seen == [{block} for block in range(layers)] * 2
    assert all(store is held.home[held.block_of[name]][name] for name, store in in_blocks(lm).items())


def test_a_block_crosses_once_each_way_a_step(monkeypatch):
    """Up in each forward; down only where a step was taken, in the first of them."""
    lm, crossed = offloaded(LLAMA | {"num_hidden_layers": 5}), []
    for name in ("up", "down"):
        lane = getattr(lm.offloaded, name)
        monkeypatch.setattr(lane, "copy", lambda *args, name=name, copy=lane.copy: crossed.append(name) or copy(*args))
    for step in range(3):
        take_step(lm, ZO(0.01), step)
        assert (crossed.count("up"), crossed.count("down")) == (6 if step == 0 else 5, 0 if step == 0 else 5), step
        crossed.clear()
    with torch.no_grad():
        for taken in (5, 0):
            batch_loss(lm)(lm.stored_view())
            assert (crossed.count("up"), crossed.count("down")) == (5, taken)
            crossed.clear()


@pytest.mark.parametrize("fails_in", [0, 1, 2])
def test_a_forward_that_fails_leaves_homes_in_place(fails_in):
    """And a step that is taken again afterwards has the resident one's bits."""
    resident, away, calls = tiny(), offloaded(), []
    for lm in (resident, away):
        take_step(lm, ZO(0.01), 0)

    def fail(block, args) -> None:
        calls.append(0)
        if len(calls) == fails_in + 1:
            raise torch.OutOfMemoryError("out of memory")

    hook = away.block.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        take_step(away, ZO(0.01), 1)
    hook.remove()
    held = away.offloaded
    assert all(store is held.home[held.block_of[name]][name] for name, store in in_blocks(away).items())
    done = [take_step(lm, ZO(0.01), 1) for lm in (resident, away)]
    away.offloaded.settle()
    assert torch.equal(done[0].plus, done[1].plus) and same(resident.weights, away.weights)


def test_a_moved_store_is_the_same_one_of_other_tensors():
    for weights, residual, oracle in (("fp32", 0, False), ("int4", 4, False), ("fp8", 0, False), ("int8", 2, True)):
        store = encode(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), weights, residual, oracle)
        copy = moved(store, Tensor.clone)
        assert same_tensors(copy, store) and type(copy) is type(store) and vars(copy).keys() == vars(store).keys()
        assert {t.data_ptr() for t in tensors(copy)}.isdisjoint(t.data_ptr() for t in tensors(store))
        stored = store.tensors().values() if not oracle else (store.value, store.scale, store.group_scale)
        assert {t.data_ptr() for t in tensors(store)} == {t.data_ptr() for t in stored}


def test_what_cannot_be_offloaded_is_refused():
    lm = tiny()
    tensor_train.attach(lm, tensor_train.Spec("rep", "qv", 8, 2), seed=0)
    with pytest.raises(ValueError, match="only a model's own blocks can be offloaded"):
        offload(lm, CPU)
    lm = tiny()
    del lm.weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="all of the same tensors"):
        offload(lm, CPU)


# ---------------------------------------------------------------- whole runs

SHORT = "--device cpu --steps 5 --eval-every 2 --batch-size 8 --num-eval 8 --lr 1e-3 --lr-schedule constant".split()
ALIKE = [  # of ZO2, and of the method that it is with offloading
    ("--method zo2 --weights fp32", "--method mezo --weights fp32"),
    ("--method zo2 --weights int8", "--method quzo --weights int8 --direction-bits sparse"),
    *(pytest.param(f"--method zo2 {flags}", f"--method quzo --direction-bits sparse {flags}", marks=pytest.mark.full)
      for flags in ("--weights int4 --residual 4 --queries 2", "--weights int8 --oracle")),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with shortened(dev=8):
        yield


def losses(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row.get("plus"), row.get("minus"), row.get("dev_loss")) for row in rows]


@pytest.mark.parametrize("flags, resident", ALIKE)
def test_a_run_is_the_resident_one(capsys, tmp_path, flags, resident):
    """The same weights, gradients and losses; replayed, by the forwards of some steps too, but not where a settling is
    left out; and a folder that can be evaluated."""
    found = {way: last_line(capsys, *SHORT, *way.split(), "--out", str(tmp_path / str(i)))
             for i, way in enumerate((flags, resident))}  # fmt: skip
    (code, result), (_, other) = found.values()
    for name in ("weights_sha256", "best_step", "dev", "dev_loss", "tests", "trainable_parameters", "forwards"):
        assert result[name] == other[name], name
    assert code == 0 and result["best_step"] >= 4
    assert losses(tmp_path / "0") == losses(tmp_path / "1")
    grads = [[line.split()[:-1] for line in (tmp_path / str(i) / "trajectory").open()] for i in range(2)]
    assert grads[0] == grads[1]
    code, replayed = last_line(capsys, "--replay", str(tmp_path / "0"), "--verify", "3")
    assert code == 0 and replayed["equal"] and replayed["largest_difference"] == 0
    with pytest.MonkeyPatch.context() as patch:  # blocks would be a step behind what is in none
        patch.setattr(Offloaded, "settle", lambda held: None)
        code, replayed = last_line(capsys, "--replay", str(tmp_path / "0"))
    assert code == 1 and not replayed["equal"]
    code, asked = last_line(capsys, "--evaluate", str(tmp_path / "0"), "--num-eval", "8", "--device", "cpu")
    assert code == 0 and asked["weights_sha256"] == result["weights_sha256"] and asked["tests"] == result["tests"]


@pytest.mark.parametrize("stops_after", [2, pytest.param(3, marks=pytest.mark.full)])
def test_an_interrupted_run_is_finished_to_the_same_bits(capsys, tmp_path, stops_after):
    """Counts of what was written are among them, although its steps are taken without forwards before it goes on; at an
    evaluation and between two."""

    class Stop:
        asked = iter([0] * stops_after)
        signal = property(lambda self: next(self.asked, 2))

    flags, whole, cut = [*SHORT, *"--method zo2 --weights int4".split()], tmp_path / "whole", tmp_path / "cut"
    assert last_line(capsys, *flags, "--out", str(whole))[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Stop", Stop)
        code, result = last_line(capsys, *flags, "--out", str(cut))
    assert code == 130 and result["steps"] == stops_after
    assert last_line(capsys, "--resume", str(cut))[0] == 0
    assert_equal_folders(cut, whole)


REFUSED = {
    "--adapters somewhere": "--adapters means nothing beside --method zo2", "--share 0.5": "--share means nothing",
    "--tail-blocks 1": "--tail-blocks means nothing beside --method zo2", "--optimizer adamw": "means --optimizer zo",
    "--placement mlp": "--placement means nothing beside --method zo2",
    "--graphs": "of the methods of family/ for subzero and mazo alone",
}  # fmt: skip


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path, flags):
    assert_refused(capsys, tmp_path / "run", REFUSED[flags], *SHORT, "--method", "zo2", *flags.split())


def test_processes_do_not_share_its_steps(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "joined", one_of_two)
    assert_refused(capsys, tmp_path / "run", "start one process", *SHORT, "--method", "zo2")
