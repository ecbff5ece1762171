"""Codes against fake quantisation in fp32: the same weights, bit for bit, after the same steps.

Integers packs codes and adds to them as whole numbers; Oracle keeps an fp32 weight and divides by its step.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product

import pytest
import torch
from helpers import tiny_llama, tiny_roberta
from test_random_bits import KEY, words_like
from torch import Tensor

import train
import zo_optim
from data.scoring import Encoded, collate, losses
from model import LanguageModel, create, load
from quant import RESIDUALS, Integers, Oracle, Stored, encode, from_parts, stored_parts
from random_bits import bits16, bits32
from zo_optim import ZO, Pair, estimate, update

ALL = slice(None)
INTS = [*product(("int8", "int4"), RESIDUALS)]
every_kind = pytest.mark.parametrize("weights, residual", INTS)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twins(x: Tensor, weights: str, residual: int) -> tuple[Integers, Oracle]:
    stored, oracle = (encode(x, weights, residual, oracle) for oracle in (False, True))
    assert type(stored) is Integers and type(oracle) is Oracle
    return stored, oracle


def check_same(stored: Stored, oracle: Stored) -> None:
    """Everything that a store can be asked, and what it would save."""
    assert stored.shape == oracle.shape and stored.rounds == oracle.rounds
    for a, b in zip(stored.parts().items(), oracle.parts().items(), strict=True):
        assert a[0] == b[0] and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1])
    for rows in (ALL, slice(1, 3), torch.tensor([2, 0, 2])):
        assert torch.equal(stored.read(rows), oracle.read(rows))
        assert torch.equal(stored.spacing(rows).expand(oracle.spacing(rows).shape), oracle.spacing(rows))


# ---------------------------------------------------------------- one store


@every_kind
def test_the_twins_stay_the_same(weights, residual):
    """40 steps of a hundredth of a code to a hundred codes, of some rows only, stochastic and to nearest.

    Three groups a row, the last one short.  Some codes start at the ends, and some steps are held back.
    """
    stored, oracle = twins(gaussian(5, 300) * torch.logspace(-3, 1, 5)[:, None], weights, residual)
    check_same(stored, oracle)
    total = torch.zeros(2, dtype=torch.int64)
    for step in range(40):
        rows = slice(step % 3, 5 - step % 2)
        delta = (gaussian(5, 300, seed=step) * stored.spacing(ALL) * 10.0 ** (step % 5 - 2))[rows]
        words = None if step % 7 == 6 else words_like(delta, KEY._replace(step=step))
        assert torch.equal(stored.land(rows, delta, words), oracle.land(rows, delta, words))
        counts = stored.add_(rows, delta, words)
        assert torch.equal(counts, oracle.add_(rows, delta, words))
        total += counts
    check_same(stored, oracle)
    assert torch.equal(stored.fine(ALL), oracle.fine()) and (total > 500).all()


@every_kind
def test_saved_codes_become_either_twin(weights, residual):
    stored, oracle = twins(gaussian(5, 300), weights, residual)
    delta = gaussian(5, 300, seed=1) * 0.1
    for store in (stored, oracle):
        store.add_(ALL, delta, words_like(delta))
    for made in (stored, oracle):
        parts = {suffix: part.clone() for suffix, part in made.parts().items()}
        for kept, kind in ((stored, Integers), (oracle, Oracle)):
            again = from_parts(parts, stored.shape, weights, residual, oracle=kind is Oracle)
            assert type(again) is kind
            check_same(kept, again)
            assert torch.equal(again.fine(ALL), stored.fine(ALL))
    assert {s: (p.dtype, p.shape) for s, p in oracle.parts().items()} == stored_parts(stored.shape, weights, residual)


DIRECTIONS = {"full": dict(bits=None), "4 bits": dict(bits=4), "grid": dict(grid=True)}
WAYS = [*product(DIRECTIONS, ("float", "codes"), ("q-rge1", "q-rge2"), (1, 3))]


@every_kind
def test_every_way_of_stepping(weights, residual):
    """Each direction, probe, estimator and number of queries: the same probes, counts and codes, five steps."""
    x = gaussian(3, 140) * 0.1
    for direction, probe, estimator, queries in WAYS:
        if residual in (1, 2, 8) and queries == 1:
            continue  # the least of them, for the time it takes
        zo = ZO(eps=4e-3, queries=queries, estimator=estimator, probe=probe, **DIRECTIONS[direction])
        stores, moved = [{"w": store} for store in twins(x, weights, residual)], 0
        for step in range(5):
            pairs = [Pair(store, 1, step, 0, zo, torch.float32).read("w") for store in stores]
            assert torch.equal(*pairs)
            slopes = gaussian(queries, seed=step).tolist()
            counts = [update(store, slopes, 1, step, zo, lr=3e-3) for store in stores]
            assert torch.equal(*counts)
            moved += int(counts[0][0])
        check_same(*(store["w"] for store in stores))
        assert moved > 5, (direction, probe, estimator, queries)


@every_kind
def test_an_oracle_is_fake_quantisation(weights, residual):
    """Its weight is fp32 and within half a fine step of the matrix, give or take float32's 2^-24 of 2^15 such steps."""
    x = gaussian(4, 200)
    oracle = encode(x, weights, residual, oracle=True)
    assert oracle.value.dtype == torch.float32 and oracle.value.shape == x.shape
    half = oracle.spacing(ALL) / 2**residual / 2
    assert ((oracle.value - x).abs() <= half * (1 + 2**-8)).all()
    if residual == 0:
        assert torch.equal(oracle.value, oracle.read())


# ---------------------------------------------------------------- models

LLAMA = tiny_llama(num_hidden_layers=1, hidden_size=24, intermediate_size=136, tie_word_embeddings=True)
ROBERTA = tiny_roberta(num_hidden_layers=1, hidden_size=20, intermediate_size=136)


def tiny(raw: dict, weights: str, residual: int, oracle: bool) -> LanguageModel:
    """Matrices of 20 times the usual size, so that losses differ from step to step."""
    lm = create(raw, seed=0)
    lm.store = {
        name: encode(stored.value * (20 if stored.value.ndim == 2 else 1), weights, residual, oracle)
        if stored.value.ndim == 2
        else stored
        for name, stored in lm.store.items()
    }
    lm.weights, lm.residual = weights, residual
    return lm


def loss_of(lm: LanguageModel, step: int):
    """Three prompts of 4 tokens with two options of one token."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, 97, (3, 4), generator=generator).tolist()
    return partial(losses, lm, collate([Encoded([t], [[17], [42]], 3, t[0] % 2) for t in tokens], 0, lm.device))


@pytest.fixture
def draws(monkeypatch) -> dict[tuple, Tensor]:
    """Random bits, kept from the first twin for the second: they are a function of their arguments alone, and take most
    of the time.  To be cleared after each step."""
    kept = {}

    def keeping(draw, key, use, rows, columns) -> Tensor:
        place = (draw, key, use, tuple(rows.tolist()), columns)
        if place not in kept:
            kept[place] = draw(key, use, rows, columns)
        return kept[place].clone()

    for draw in (bits16, bits32):
        monkeypatch.setattr(zo_optim, draw.__name__, partial(keeping, draw))
    return kept


RUNS = [  # both models, formats, probes and estimators, all directions; see test_every_way_of_stepping for the others
    (LLAMA, "int8", 0, "4 bits", "float", "q-rge2", 1),
    (LLAMA, "int8", 4, "full", "codes", "q-rge2", 1),
    (LLAMA, "int4", 4, "grid", "codes", "q-rge1", 3),
    (ROBERTA, "int4", 0, "4 bits", "codes", "q-rge2", 1),
    (ROBERTA, "int8", 4, "grid", "float", "q-rge1", 1),
]


@pytest.mark.parametrize("raw, weights, residual, direction, probe, estimator, queries", RUNS)
def test_a_hundred_steps_of_a_model(raw, weights, residual, direction, probe, estimator, queries, draws):
    """Equal losses are seen as equal slopes; the hash is of every stored bit.  Codes move, and some are held back.

    Down projections are 136 wide, one group of 128 and a short one.
    """
    zo = ZO(eps=1e-2, queries=queries, estimator=estimator, probe=probe, **DIRECTIONS[direction])
    models = [tiny(raw, weights, residual, oracle) for oracle in (False, True)]
    start = models[0].sha256()
    total = torch.zeros(2, dtype=torch.int64)
    for step in range(100):
        slopes = [
            [query.slope for query in estimate(lm.store, loss_of(lm, step), 0, step, zo, lm.dtype)] for lm in models
        ]
        counts = [update(lm.store, slopes[0], 0, step, zo, lr=3e-3) for lm in models]
        assert slopes[0] == slopes[1] and torch.equal(*counts) and all(slopes[0])
        total += counts[0]
        draws.clear()
    assert models[0].sha256() == models[1].sha256() != start
    for name, stored in models[0].store.items():
        assert torch.equal(stored.read(), models[1].store[name].read())
    assert total[0] > 10_000 and total[1] > 500


@pytest.mark.parametrize("raw", [LLAMA, ROBERTA], ids=["llama", "roberta"])
@pytest.mark.parametrize("weights, residual", [("int8", 0), ("int4", 4)])
def test_a_saved_model_loads_as_either(raw, weights, residual, tmp_path):
    """From floats and from codes."""
    create(raw, seed=1).save(tmp_path / "floats")
    lm, oracle = (load(tmp_path / "floats", weights=weights, residual=residual, oracle=o) for o in (False, True))
    assert lm.sha256() == oracle.sha256() and {Oracle} < {type(s) for s in oracle.store.values()}
    oracle.save_stored(tmp_path / "codes")
    for kind in (False, True):
        again = load(tmp_path / "codes", weights=weights, residual=residual, oracle=kind)
        assert again.sha256() == lm.sha256() and (Oracle in {type(s) for s in again.store.values()}) is kind


@pytest.mark.parametrize("flags", [
    ["--weights", "int8"],
    ["--weights", "int4", "--residual", "4", "--direction-bits", "grid", "--probe", "codes", "--queries", "2"],
])  # fmt: skip
def test_the_command_line(flags, tmp_path, capsys):
    """Two runs, one with --oracle: the same dev losses and the same hash of the best weights."""
    results, logs = [], []
    for name in ("codes", "oracle"):
        out = tmp_path / name
        short = ["--steps", "4", "--eval-every", "2", "--batch-size", "4", "--num-eval", "20", "--lr", "1e-3"]
        assert train.main([*short, *flags, "--out", str(out), *(["--oracle"] if name == "oracle" else [])]) == 0
        results.append(json.loads(capsys.readouterr().out))
        logs.append((out / "trajectory").read_text())
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"] and logs[0] == logs[1]
    assert results[0]["dev_loss"] == results[1]["dev_loss"]
