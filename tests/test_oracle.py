"""Packed codes are fake quantisation in fp32: the same weights, bit for bit, after the same steps (contract 3).

Integers packs codes and adds to them as whole numbers; FakeQuantised, the definition, keeps an fp32 weight and divides
it by its step.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product

import pytest
import torch
from helpers import tiny_llama, tiny_roberta
from oracles import ALL, KEY, gaussian, same_tensors, words_like
from torch import Tensor

import train
from data.scoring import BatchLoss, Encoded, collate
from model import LanguageModel, create, load
from quant import COUNTED, RESIDUALS, FakeQuantised, Integers, Store, encode, from_tensors
from random_bits import Key
from runtime.checkpoints import save_stored, weights_sha256
from zo_optim import ZO, PerturbedWeights, SparseZO, update, zo_step

full = pytest.mark.full
KINDS = [*product(("int8", "int4"), RESIDUALS)]
every_kind = pytest.mark.parametrize("weights, residual", KINDS)


def twins(x: Tensor, weights: str, residual: int) -> tuple[Integers, FakeQuantised]:
    stored, oracle = (encode(x, weights, residual, oracle) for oracle in (False, True))
    assert type(stored) is Integers and type(oracle) is FakeQuantised
    return stored, oracle


def check_same(stored: Store, oracle: Store) -> None:
    """Everything that a store can be asked, and what it would save."""
    assert stored.shape == oracle.shape and stored.rounds == oracle.rounds and same_tensors(stored, oracle)
    for rows in (ALL, slice(1, 3), torch.tensor([2, 0, 2]), (torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0]))):
        assert torch.equal(stored.dequantise(rows), oracle.dequantise(rows))
        assert torch.equal(*torch.broadcast_tensors(stored.spacing(rows), oracle.spacing(rows)))


# ---------------------------------------------------------------- one store


CONVOLUTIONS = [("int8", 0, (5, 3, 4, 25)), ("int4", 4, (5, 3, 4, 25))]


@pytest.mark.parametrize("weights, residual, shape", [*((*kind, (5, 300)) for kind in KINDS), *CONVOLUTIONS])
def test_the_twins_stay_the_same(weights, residual, shape):
    """40 steps of a hundredth of a code to a hundred codes, of some rows only, stochastic and to nearest.

    Three groups a row, the last one short.  Some codes start at the ends, and some steps are held back.
    """
    scale = torch.logspace(-3, 1, 5).view(5, *[1] * (len(shape) - 1))
    stored, oracle = twins(gaussian(*shape) * scale, weights, residual)
    check_same(stored, oracle)
    total = torch.zeros(COUNTED, dtype=torch.int64)
    for step in range(40):
        rows = slice(step % 3, 5 - step % 2)
        delta = (gaussian(5, 300, seed=step) * stored.spacing(ALL) * 10.0 ** (step % 5 - 2))[rows]
        bits = None if step % 7 == 6 else words_like(delta, KEY._replace(step=step))
        assert torch.equal(stored.add_rounded(rows, delta, bits), oracle.add_rounded(rows, delta, bits))
        counts = stored.add_rounded_(rows, delta, bits)
        assert torch.equal(counts, oracle.add_rounded_(rows, delta, bits))
        total += counts
    check_same(stored, oracle)
    assert (total[2:] > 500).all() and total[4] < total[3] and total[2] < total[1]
    for made, kind in product((stored, oracle), (Integers, FakeQuantised)):  # saved codes become either twin
        tensors = {suffix: tensor.clone() for suffix, tensor in made.tensors().items()}
        again = from_tensors(tensors, stored.shape, weights, residual, oracle=kind is FakeQuantised)
        assert type(again) is kind
        check_same(again, stored)


DIRECTIONS = {"full": ZO, "4 bits": partial(ZO, bits=4), "sparse": partial(SparseZO, cell=8)}


@pytest.mark.parametrize("weights, residual", [
    pytest.param(*kind, marks=[] if kind[1] in (0, 4) else full) for kind in KINDS
])  # fmt: skip
def test_every_way_of_stepping(weights, residual):
    """Each direction, probe, estimator and number of queries: the same probes, counts and codes, five steps.  Sparse
    directions have one probe and one estimator."""
    x = gaussian(3, 140) * 0.1
    for direction, probe, estimator, queries in product(DIRECTIONS, ("float", "codes"), ("q-rge1", "q-rge2"), (1, 3)):
        if direction == "sparse" and (probe, estimator) != ("float", "q-rge2"):
            continue
        zo = DIRECTIONS[direction](eps=4e-3, queries=queries, estimator=estimator, probe=probe)
        stores, moved = [{"w": store} for store in twins(x, weights, residual)], 0
        for step in range(5):
            key, copies = Key(1, step), [(0, 1), (0, -1)]
            assert torch.equal(*(PerturbedWeights(store, key, zo, copies, 2).read("w") for store in stores))
            counts = [update(store, gaussian(queries, seed=step).double(), key, zo, lr=3e-3) for store in stores]
            assert torch.equal(*counts)
            moved += int(counts[0][0])
        check_same(*(store["w"] for store in stores))
        assert moved > 5, (direction, probe, estimator, queries)


@every_kind
def test_an_oracle_is_fake_quantisation(weights, residual):
    """Its weight is fp32 and within half a fine step of the matrix, give or take float32's 2^-24 of 2^15 such steps; so
    a forward sees it within half a code."""
    x = gaussian(4, 200)
    oracle = encode(x, weights, residual, oracle=True)
    assert oracle.value.dtype == torch.float32 and oracle.value.shape == x.shape
    assert ((oracle.value - x).abs() <= oracle.spacing(ALL) / 2**residual / 2 * (1 + 2**-8)).all()
    assert ((oracle.dequantise() - x).abs() <= oracle.spacing(ALL) / 2 * (1 + 2**-8)).all()
    if residual == 0:
        assert torch.equal(oracle.value, oracle.dequantise())


@pytest.mark.parametrize("weights, residual, size", [("int8", 4, 2e-43), ("int8", 1, 2e-43), ("int4", 8, 2e-43),
                                                     ("int8", 8, 1e-40)])  # fmt: skip
def test_tiny_groups(weights, residual, size):
    check_same(*twins(torch.tensor([[size, -size, 0.0, size / 2], [0.7, 1, 0.2, 0], [0] * 4]), weights, residual))


# ---------------------------------------------------------------- models

LLAMA = tiny_llama(num_hidden_layers=1, hidden_size=24, intermediate_size=136, tie_word_embeddings=True)
ROBERTA = tiny_roberta(num_hidden_layers=1, hidden_size=20, intermediate_size=136)


def tiny(raw: dict, weights: str, residual: int, oracle: bool) -> LanguageModel:
    """Matrices of 20 times the usual size, so that losses differ from step to step."""
    lm = create(raw, seed=0)
    for name, stored in lm.weights.items():
        if len(stored.shape) == 2:
            lm.weights[name] = encode(stored.value * 20, weights, residual, oracle)
    lm.format, lm.residual = weights, residual
    return lm


def loss_of(lm: LanguageModel, step: int) -> BatchLoss:
    """Three prompts of 4 tokens with two options of one token."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, 97, (3, 4), generator=generator).tolist()
    return BatchLoss(lm, [collate([Encoded([t], [[17], [42]], 3, t[0] % 2) for t in tokens], 0, lm.device)])


# both models, formats, probes and estimators, all directions; see test_every_way_of_stepping for the others
@pytest.mark.parametrize("steps, raw, weights, residual, direction, probe, estimator, queries", [
    (20, LLAMA, "int8", 0, "4 bits", "float", "q-rge2", 1),
    (5, ROBERTA, "int4", 4, "4 bits", "codes", "q-rge1", 2),
    (20, LLAMA, "int8", 0, "sparse", "float", "q-rge2", 1),
    (5, ROBERTA, "int4", 4, "sparse", "float", "q-rge2", 2),
    pytest.param(100, LLAMA, "int8", 0, "4 bits", "float", "q-rge2", 1, marks=full),
    pytest.param(50, LLAMA, "int8", 4, "full", "codes", "q-rge2", 1, marks=full),
    pytest.param(50, LLAMA, "int4", 0, "sparse", "float", "q-rge2", 3, marks=full),
    pytest.param(50, ROBERTA, "int4", 0, "4 bits", "codes", "q-rge2", 1, marks=full),
    pytest.param(100, ROBERTA, "int8", 4, "sparse", "float", "q-rge2", 1, marks=full),
])  # fmt: skip
def test_steps_of_a_model(steps, raw, weights, residual, direction, probe, estimator, queries):
    """The same losses, counts and hash of every stored bit.  Codes move, and some are held back.

    Down projections are 136 wide, one group of 128 and a short one.
    """
    zo = DIRECTIONS[direction](eps=1e-2, queries=queries, estimator=estimator, probe=probe)
    models = [tiny(raw, weights, residual, oracle) for oracle in (False, True)]
    start, total = weights_sha256(models[0].weights), torch.zeros(COUNTED, dtype=torch.int64)
    for step in range(steps):
        a, b = (zo_step(lm.weights, loss_of(lm, step), Key(0, step), zo, lr=3e-3) for lm in models)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and a.projected_grads.all()
        total += a.counts
    assert weights_sha256(models[0].weights) == weights_sha256(models[1].weights) != start
    for name, stored in models[0].weights.items():
        assert torch.equal(stored.dequantise(), models[1].weights[name].dequantise())
    assert total[0] > 100 * steps and total[2] > steps


@pytest.mark.parametrize("raw, weights, residual", [(LLAMA, "int8", 0), (ROBERTA, "int4", 4)], ids=["llama", "roberta"])
def test_a_saved_model_loads_as_either(raw, weights, residual, tmp_path):
    """From floats and from codes."""
    create(raw, seed=1).save(tmp_path / "floats")
    lm, oracle = (load(tmp_path / "floats", weights=weights, residual=residual, oracle=o) for o in (False, True))
    assert weights_sha256(lm.weights) == weights_sha256(oracle.weights)
    assert FakeQuantised in {type(stored) for stored in oracle.weights.values()}
    save_stored(tmp_path / "codes", oracle.raw_config, oracle.format, oracle.residual, oracle.weights, [])
    for kind in (False, True):
        again = load(tmp_path / "codes", weights=weights, residual=residual, oracle=kind)
        assert weights_sha256(again.weights) == weights_sha256(lm.weights)
        assert (FakeQuantised in {type(stored) for stored in again.weights.values()}) is kind


@full
def test_the_command_line(tmp_path, capsys):
    """Two runs, one with --oracle: the same dev losses and the same hash of the best weights."""
    flags, results, logs = "--weights int4 --residual 4 --direction-bits sparse --cell 64 --queries 2", [], []
    for name in ("codes", "oracle"):
        flags += f" --lr 1e-3 --steps 4 --eval-every 2 --batch-size 4 --num-eval 20 --out {tmp_path / name}"
        assert train.main(flags.split()) == 0
        results.append(json.loads(capsys.readouterr().out))
        lines = (tmp_path / name / "trajectory").read_text().splitlines()
        logs.append([line.rpartition(" ")[0] for line in lines])  # without digests: the flag is in them
        flags += " --oracle"
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"] and logs[0] == logs[1]
    assert results[0]["dev_loss"] == results[1]["dev_loss"]
