"""Directions: the table of normal numbers, its rounding to a few bits, and sparse directions on the weights' own
grid, against exact sums, brute force, and derived bounds.

Statistical bounds are 5 standard deviations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from statistics import NormalDist

import pytest
import torch
from helpers import direction
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CLIP, bracket, codes_of, everywhere, levels, moments, normal_numbers, scales_of, store_of
from torch import Tensor

import zo_optim
from quant import FLOATS, FORMATS, Float, encode
from random_bits import Key, Purpose
from zo_optim import SparseZO, normal_table

TABLE = normal_table(torch.device("cpu")).to(torch.int64)
KEY = Key(seed=11, step=5, query=2, tensor=0x12345678)
BITS = range(2, 9)
U1, U2 = Purpose.PROBE_ROUNDING, Purpose.UPDATE_ROUNDING


def codes(value: Tensor, bits: int) -> Tensor:
    """A quantised direction's integers; fails where it is off the grid."""
    exact = value.double() * levels(bits) / CLIP
    code = exact.round()
    assert (exact - code).abs().max() < 1e-5, "a float32 is right to 127 * 2^-24"
    return code.to(torch.int64)


# ---------------------------------------------------------------- the table


def test_the_table_is_its_definition():
    """Entry by entry, which are the bits; antisymmetric, so that every odd moment is 0; and it ends below 4 sigma."""
    assert torch.equal(TABLE, normal_numbers())
    assert torch.equal(TABLE.sort().values, (-TABLE).sort().values) and TABLE.max() < CLIP << 14


def test_the_tables_moments_are_the_docstrings():
    """Exact sums.  The excess comes from straight lines under a convex quantile function, in the tail most of all.

    A variance off by 8e-5 scales the learning rate by as much.
    """
    entries = TABLE.tolist()
    variance = Fraction(sum(u**2 for u in entries), 2**16 * 2**28)
    fourth = Fraction(sum(u**4 for u in entries), 2**16 * 2**56)
    assert f"{float(variance - 1):.1e} {float(fourth - 3):.1e}" == "7.8e-05 2.3e-04"


def test_the_table_is_normal():
    """Kolmogorov's distance.  Table and normal agree at the knots, which are 2^-12 of probability apart.

    On top: knots are rounded to 2^-12 sigma and entries to 2^-14, half of each times the highest density.
    """
    entries = TABLE.sort().values
    exact = torch.tensor([NormalDist().cdf(u / 2**14) for u in entries.tolist()], dtype=torch.float64)
    below, up_to = (torch.searchsorted(entries, entries, right=right) / 2**16 for right in (False, True))
    bound = 2**-12 + (2**-13 + 2**-15) * NormalDist().pdf(0)
    assert max((below - exact).abs().max(), (up_to - exact).abs().max()) < bound


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.to(torch.int32).numpy().tobytes()).hexdigest()


def test_pinned_numbers():
    """What recorded runs are redone from; another version or machine that draws otherwise cannot redo them."""
    assert sha256(TABLE) == "5c8abbfa5dfbced4247df895c8160ae7616c5848da9e5b4eeaa2f4bb843bf8b2"
    rows = torch.arange(100)
    drawn = [direction(KEY, rows, 37, None, U1) * 2**14]
    drawn += [codes(direction(KEY, rows, 37, 4, rounding), 4) for rounding in (U1, U2)]
    assert [sha256(d)[:16] for d in drawn] == ["bce1e07a0c3d5356", "87e3357a054d0898", "a348a95192f4f3ba"]
    stored = encode(normal_numbers()[:3700].view(100, 37), "int8")
    drawn = SparseZO(100.0, cell=16).perturbed(stored, KEY, [1], torch.float32).view(torch.int32)
    assert (drawn != stored.dequantise().view(torch.int32)).sum() > 50 and sha256(drawn)[:16] == "37588ad2f603d6ec"


# ---------------------------------------------------------------- rounding to a few bits


def choose_bits(monkeypatch, dithers: Tensor) -> None:
    """From here on `direction` sees table entry number `row` in each row, and these dithers in the columns."""

    def bits16(key: Key, purpose: Purpose, rows: Tensor, columns: int) -> Tensor:
        return (rows[:, None] if purpose == Purpose.DIRECTION else dithers).expand(len(rows), columns)

    monkeypatch.setattr(zo_optim, "bits16", bits16)


@pytest.mark.parametrize("bits", [4, *(pytest.param(b, marks=pytest.mark.full) for b in BITS if b != 4)])
def test_rounding_is_exactly_unbiased(bits, monkeypatch):
    """Over all 65,536 dithers the codes of u sum to u * levels, an integer, for every 251st u and both extremes."""
    choose_bits(monkeypatch, torch.arange(2**16))
    at = torch.cat((torch.arange(0, 2**16, 251), TABLE.argmax()[None], TABLE.argmin()[None]))
    for rows in at.split(32):
        code = codes(direction(KEY, rows, 2**16, bits, U1), bits)
        assert torch.equal(code.sum(1), TABLE[rows] * levels(bits))
        low = code.amin(1, keepdim=True)
        assert ((code == low) | (code == low + 1)).all(), "only u's two neighbours"


@pytest.mark.parametrize("bits", BITS)
def test_every_entry_keeps_to_its_grid(bits, monkeypatch):
    """All 65,536 entries under the two extreme dithers: floor and ceiling, inside the grid without a clamp."""
    choose_bits(monkeypatch, torch.tensor([0, 2**16 - 1]))
    low, high = codes(direction(KEY, torch.arange(2**16), 2, bits, U1), bits).T
    assert torch.equal(low, TABLE * levels(bits) // 2**16)
    assert torch.equal(high, -(-TABLE * levels(bits) // 2**16))
    assert low.min() >= -levels(bits) and high.max() <= levels(bits)


def fractions(bits: int) -> Tensor:
    """f of each of the table's u: how far it is from the level below to the one above."""
    return (TABLE * levels(bits) % 2**16).double() / 2**16


def test_the_variance_is_the_docstrings():
    """1 + step^2 E[f (1 - f)]; with f uniform 1 + step^2 / 6, right to the table's own 7.8e-5 from 3 bits on."""
    for bits in BITS:
        step, f, variance = CLIP / levels(bits), fractions(bits), moments(bits)[0].mean()
        assert abs(variance - (1 + step**2 * (f * (1 - f)).mean())) < 8e-5
        assert bits == 2 or abs(variance - (1 + step**2 / 6)) < 1e-4


N, COLUMNS = 2**15, 8


def draws(bits: int | None, rounding: Purpose) -> Tensor:
    """[N, COLUMNS]: N draws of a direction of 8 elements."""
    return direction(KEY, torch.arange(N), COLUMNS, bits, rounding).double()


def check_product(a: Tensor, b: Tensor, on_diagonal: Tensor, variance_on: Tensor, variance_off: Tensor) -> None:
    """E[a b^T] = on_diagonal * I, entry by entry, and its trace, whose bound is sqrt(8) times narrower."""
    got, one = a.T @ b / N, torch.eye(COLUMNS)
    std = torch.where(one.bool(), variance_on, variance_off).div(N).sqrt()
    assert ((got - one * on_diagonal).abs() < 5 * std).all()
    assert abs(got.diagonal().mean() - on_diagonal) < 5 * (variance_on / N / COLUMNS).sqrt()


@pytest.mark.parametrize("bits", [None, *BITS])
def test_two_roundings_are_unbiased(bits):
    """QuZO eq. 8: E[u1 u2^T] = I, the reason for rounding twice.

    u1 and u2 are independent given u, so E[u1^2 u2^2] = E[E[Q^2 | u]^2]; different elements are independent.
    """
    second, _ = moments(bits)
    one = (TABLE.double() / 2**14).square().mean()
    check_product(draws(bits, U1), draws(bits, U2), one, second.square().mean() - one**2, second.mean() ** 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_rounding_is_not(bits):
    """E[u1 u1^T] is I times 1 + the rounding's variance: 3.19 at 2 bits, 1.30 at 3, 1.05 at 4."""
    second, fourth = moments(bits)
    variance = second.mean()
    check_product(draws(bits, U1), draws(bits, U1), variance, fourth.mean() - variance**2, variance**2)
    assert abs((draws(bits, U1) ** 2).mean() - 1) > 5 * ((fourth.mean() - variance**2) / N / COLUMNS).sqrt()


# ---------------------------------------------------------------- sparse directions on the weights' own grid


def choose_words(monkeypatch, words: Callable[[Tensor], list[Tensor]]) -> None:
    """From here on a sparse direction sees these four words in each block: [blocks] -> four [blocks]."""

    def philox_blocks(key: Key, purpose: Purpose, blocks: Tensor, columns: int) -> Tensor:
        assert purpose == Purpose.DIRECTION and columns == 8
        return torch.stack([word.expand_as(blocks) for word in words(blocks)], -1).to(torch.int32)[:, None]

    monkeypatch.setattr(zo_optim, "philox_blocks", philox_blocks)


@pytest.mark.parametrize("weights", FORMATS)
def test_how_often_a_sparse_direction_moves_a_weight_and_how_far(weights, monkeypatch):
    """Of 2^32 words (t / M)^2 2^32, for points all over the grid, where spacings are from far below t to over 100 t; by
    M up or down, M half a bracket by brute force.  So E[(eps u)^2] = 1 / cell (t / M)^2 M^2 = eps^2 everywhere, but
    next to fp8's ends, where the bracket is cut off and M < t.

    A chance has three roundings in float32, 2^-21 of itself at most, and a step of one word.
    """
    start, seen = everywhere(weights), []
    start = start[(start.abs() < 50) & (start.abs() > 2**-7)] if weights in FLOATS else start
    stored = store_of(start[:, None].expand(-1, 8), weights)  # a row is a cell
    x, scale = codes_of(stored, weights)[:, 0], scales_of(stored, weights)[:, 0].double()
    for eps in (0.02, 0.13, 1.0):
        zo = SparseZO(eps, cell=8)
        t = torch.tensor(eps * 8**0.5).double()
        low, high = bracket(x, t / scale, weights)
        M = (high - low) / 2 * scale
        edge = (t / M).clamp(max=1) ** 2 * 2**32
        for side, place in product((1, -1), range(8)):
            word = edge + side * (edge * 2**-21 + 1)
            word = word.clamp(0, 2**32 - 1).long()
            word = torch.where(word >= 2**31, word - 2**32, word)
            way = torch.where(torch.arange(len(x)) % 2 == 0, 2**31 - 1, -(2**31))
            choose_words(
                monkeypatch, lambda blocks, p=place, word=word, way=way: [torch.tensor(p - 8), word, way, blocks]
            )
            hits = zo.hits(stored, KEY)
            moved = torch.zeros(len(x)).index_put((hits.places[0],), hits.move())
            beyond = (side > 0) & (edge * (1 + 2**-21) + 1 < 2**32)
            want = M * torch.where(way < 0, 1, -1)
            assert not moved[beyond].any() and (side > 0 or moved.all()) and (hits.places[1] == place).all()
            assert ((moved == 0) | ((moved - want).abs() <= 2**-21 * M + 2**-22 * (x * scale).abs())).all()
            assert torch.equal(hits.random_bits.long(), hits.places[0])
        uncut = (low > -448) & (high < 448) if weights == "fp8" else M > 0
        assert (((edge / 2**32 * M**2 / t**2) - 1).abs() < 2**-20 * (1 + x.abs() / t))[uncut].all() and uncut.sum() > 10
        seen.append((M / t)[uncut])
    seen = torch.cat(seen)
    assert seen.min() > 1 - 1e-4 and (weights == "fp32" or seen.max() > (1.2 if weights == "bf16" else 100))


N_SPARSE = 2**15


@pytest.mark.parametrize("cell", [8, 16, 32])
@pytest.mark.parametrize("weights", FORMATS)
def test_sparse_directions_are_fair_and_uncorrelated(weights, cell):
    """E[u u^T] = I over 32 neighbours of many spacings, P(+) = P(-) = (t / M)^2 / (2 cell), and an estimate's size:
    u_i^2 u_k^2 is 1 on average, E[u_i^4] = K_i = (M_i / eps)^2 if i = k, and 0 if i and k are in one cell.  So
    E|(g . u) u|^2 is the sum of g_i^2 (K_i + d - the number of elements in i's cell), to the sample's own deviation.

    A mean of n numbers that are mostly 0 gets 3 / n times their size more: rare events are not normal.
    """
    start, n, eps = everywhere(weights), N_SPARSE, 0.043
    if weights in FLOATS:
        start = start[(start.abs() < 50) & (start.abs() > 2**-7)]
    start = start[torch.linspace(len(start) // 10, len(start) * 9 // 10, 16).long()]
    stored = store_of(start.repeat(2 * n, 1), weights)
    if weights not in FLOATS:
        stored.scale.fill_(0.02)
    x, scale, t = (
        f[:2].flatten() for f in (codes_of(stored, weights), scales_of(stored, weights), torch.full((2, 16), eps))
    )
    t = t.double() * cell**0.5
    low, high = bracket(x, t / scale, weights)
    K = ((high - low) / 2 * scale / eps) ** 2
    assert K.min() > cell * (1 - 1e-4) and (weights == "fp32" or K.max() > 1.02 * cell)
    hits = SparseZO(eps, cell=cell).hits(stored, KEY)
    u = torch.zeros(2 * n, 16).double().index_put(hits.places, hits.move().double() / eps).view(n, 32)
    apart = (torch.arange(32)[:, None] // cell != torch.arange(32) // cell).double()
    for sign in (1, -1):
        share, want = (u * sign > 0).double().mean(0), 0.5 / K
        assert ((share - want).abs() < 5 * (want / n).sqrt() + 3 / n).all()
    product, std = u.T @ u / n, torch.where(torch.eye(32).bool(), K - 1, apart).div(n).sqrt()
    rare = 3 * (K[:, None] * K).sqrt() / n * (apart + torch.eye(32)) + 1e-4 * torch.eye(32)
    assert ((product - torch.eye(32)).abs() <= 5 * std + rare).all()
    assert abs(product.diagonal().mean() - 1) < 5 * (K.mean() / n / 32).sqrt() + 3 * K.max() / n / 32
    g = torch.linspace(-1, 2, 32).double()
    size, want = (u @ g).square() * u.square().sum(1), (g**2 * (K + apart.sum(1))).sum()
    assert abs(size.mean() - want) < 5 * size.std() / n**0.5 and abs(want / (g**2 * (K + 31)).sum() - 1) > 0.01


def test_every_element_is_in_one_cell_and_no_byte_in_two(monkeypatch):
    """Exhaustively: all places of all cells of small matrices, in rows of all widths, smaller than a cell too.  Fields
    of 1, 2 and 4 bits in one byte belong to one cell, so that no two hits write to one byte."""
    for cell, R, C in product((8, 16, 64), (1, 3), (*range(1, 19), 33)):
        owner = torch.full((R, C), -1)
        for place in range(cell):
            choose_words(
                monkeypatch, lambda blocks, p=place, cell=cell: [torch.tensor(p - cell), blocks * 0, blocks * 0, blocks]
            )
            hits = SparseZO(1.0, cell=cell).hits(Float(torch.zeros(R, C)), KEY)
            assert (owner[hits.places] == -1).all()
            owner[hits.places] = hits.random_bits.long()
        assert owner.min() == 0 and (owner.flatten().diff() >= 0).all()
        for bits in (1, 2, 4):
            assert torch.equal(owner, owner[:, torch.arange(C) * bits // 8 * 8 // bits])


@pytest.mark.parametrize("options", [dict(cell=4), dict(cell=12), dict(cell=0), dict(cell=-8), dict(bits=4),
                                     dict(nearest=True), dict(probe="codes"), dict(eps=0.0),
                                     dict(queries=0)])  # fmt: skip
def test_what_no_sparse_estimator_is(options):
    with pytest.raises(ValueError, match="no usable (sparse )?estimator: SparseZO.*" + str(*options.values())):
        SparseZO(**options)


# ---------------------------------------------------------------- keys


@settings(max_examples=40)
@given(bits=st.sampled_from([None, 2, 4, 8]), columns=st.integers(1, 40),
       rows=st.lists(st.integers(0, 29), min_size=1, max_size=30))  # fmt: skip
def test_any_rows_in_any_order_are_the_same_rows(bits, columns, rows):
    """Of sparse directions, cells begin in one row and end in another."""
    rows, stored = [*rows, *range(30)], encode(torch.full((30, columns), 0.01), "int4")
    whole = direction(KEY, torch.arange(30), columns, bits, U1)
    assert torch.equal(direction(KEY, torch.tensor(rows), columns, bits, U1), whole[rows])
    for cell in (8, 32, 64):
        zo = SparseZO(cell=cell)
        whole = zo.perturbed(stored, KEY, [1, -1], torch.float32)
        assert torch.equal(zo.perturbed(stored, KEY, [1, -1], torch.float32, torch.tensor(rows)), whole[:, rows])


def test_another_key_is_another_direction():
    """Uncorrelated with this one: a product of independent numbers of variance 1 has variance 1."""
    changes = [{}, dict(seed=12), dict(step=6), dict(query=3), dict(tensor=1)]
    rows, keys, zeros = torch.arange(1000), [KEY._replace(**change) for change in changes], Float(torch.zeros(1000, 64))
    kinds = [[direction(key, rows, 64, None, U1).double() for key in keys],
             [SparseZO(1.0, cell=8).perturbed(zeros, key, [1], torch.float64)[0] for key in keys]]  # fmt: skip
    for first, *others in kinds:
        for other in others:
            assert abs((first * other).mean()) < 5 / first.numel() ** 0.5
