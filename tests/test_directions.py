"""Directions: the table of normal numbers, its rounding to a few bits, and directions on the weights' own grid, against
exact sums and derived bounds.

Statistical bounds are 5 standard deviations, computed from the table itself.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CLIP, levels, moments, normal_numbers
from torch import Tensor

import zo_optim
from quant import encode
from random_bits import Key, Purpose
from zo_optim import check_grid, direction, grid_direction, normal_table

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


@pytest.mark.parametrize("bits", BITS)
def test_the_two_roundings_share_u_and_nothing_else(bits):
    """Both are within a step of u; their errors are uncorrelated, and they differ as often as they should.

    An error's variance given u is step^2 f (1 - f); two roundings differ with probability 2 f (1 - f).
    """
    u, a, b = draws(None, U1), draws(bits, U1), draws(bits, U2)
    step, f = CLIP / levels(bits), fractions(bits)
    assert max((a - u).abs().max(), (b - u).abs().max()) < step * (1 + 1e-6)
    std = (step**2 * f * (1 - f)).square().mean().div(u.numel()).sqrt()
    assert abs(((a - u) * (b - u)).mean()) < 5 * std
    share = (2 * f * (1 - f)).mean()
    assert abs((a != b).double().mean() - share) < 5 * (share * (1 - share) / u.numel()).sqrt()


# ---------------------------------------------------------------- directions on the weights' own grid

EPS = 1e-3
every_spacing = pytest.mark.parametrize("spacing", [0.0, 1e-9, 9e-4, EPS, 1.1e-3, 4e-3, 0.05])


def size_and_chance(spacing: float) -> tuple[Fraction, Fraction]:
    """t = max(s, eps) as float32 has it, and the exact chance (eps / t)^2 of a step."""
    s, eps = (Fraction(torch.tensor(x).item()) for x in (spacing, EPS))
    return max(s, eps), (eps / max(s, eps)) ** 2


@every_spacing
def test_which_weights_a_grid_direction_moves(spacing, monkeypatch):
    """Which words hit, and which way: the 31 lower bits below chance * 2^31, and the top one.

    The chance has three roundings in float32, 2^-22 of itself at most, and a step of 1 in 2^31; it is never 1.  The
    variance of a step, t^2 * chance, is then eps^2 to as much.
    """
    t, chance = size_and_chance(spacing)
    edge = chance * 2**31
    slack = edge / 2**22 + 1
    words = torch.tensor([0, int(edge - slack), min(int(edge + slack) + 1, 2**31 - 1), 2**31 - 1])
    both = torch.stack((words, words - 2**31)).to(torch.int32)
    monkeypatch.setattr(zo_optim, "bits32", lambda key, purpose, rows, columns: both)
    up = grid_direction(KEY, torch.arange(2), torch.tensor([[spacing]]), 4, EPS)
    assert up.tolist() == [[float(t), float(t), 0.0, 0.0], [-float(t), -float(t), 0.0, 0.0]]
    assert torch.equal(grid_direction(KEY, torch.arange(2), torch.tensor([[spacing]]), 4, EPS, -0.5), -0.5 * up)


def steps(spacing: Tensor) -> Tensor:
    """[N, COLUMNS]: N draws of eps * u for 8 elements, over eps."""
    return grid_direction(KEY, torch.arange(N), spacing, COLUMNS, EPS).double() / EPS


@every_spacing
def test_grid_directions_are_fair_and_uncorrelated(spacing):
    """P(+) = P(-) = chance / 2, and E[u u^T] = I, where E[u^4] = 1 / chance; and an estimate's size, as
    docs/directions.md has it: E|(g . u) u|^2 = (d - 1 + E[u^4]) |g|^2, of the sample's own deviation.

    A mean of N numbers that are mostly 0 gets 3 / N times their size more, the standard deviation being that of rare
    events.  EPS, t and u are rounded to float32.  A spacing of up to eps gives a coin: every element moves.
    """
    t, chance = map(float, size_and_chance(spacing))
    u = steps(torch.tensor([[spacing]]))
    assert set(u.unique().tolist()) <= {-t / EPS, *([0.0] if spacing > EPS else []), t / EPS}
    for sign in (1, -1):
        share, n = (u * sign > 0).double().mean(), u.numel()
        assert abs(share - chance / 2) < 5 * (chance / 2 * (1 - chance / 2) / n) ** 0.5 + 3 / n
    product, one = u.T @ u / N, torch.eye(COLUMNS)
    std = torch.where(one.bool(), 1 / chance - 1, 1.0).div(N).sqrt()
    assert ((product - one).abs() < 5 * std + 3 / chance / N + 2**-21).all()
    assert abs(product.diagonal().mean() - 1) < 5 * ((1 / chance - 1) / N / COLUMNS) ** 0.5 + 3 / chance / N + 2**-21
    g = torch.linspace(-1, 2, COLUMNS).double()
    size, want = (u @ g).square() * u.square().sum(1), (COLUMNS - 1 + 1 / chance) * g.square().sum()
    assert abs(size.mean() - want) < 5 * size.std() / N**0.5


def test_each_weight_has_its_own_size_and_chance():
    """A spacing for each element, as fp8 and int4 have it, or one for each row."""
    spacing = torch.tensor([0.0, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 8e-3, 0.01])
    u = steps(spacing.expand(N, COLUMNS))
    t = spacing.clamp(min=EPS).double() / EPS
    assert (u.abs().amax(0) - t).abs().max() < 1e-6
    assert ((u.square().mean(0) - 1).abs() < 5 * ((t**2 - 1) / N).sqrt() + 3 * t**2 / N + 2**-21).all()
    by_row = torch.linspace(0, 0.01, N)[:, None]
    assert torch.equal(steps(by_row), steps(by_row.expand(N, 8)))


def test_a_grid_too_coarse_for_its_bits_is_refused():
    """The widest spacing of all tensors counts; the message names it and its tensor."""
    store = {"a": encode(torch.full((1, 8), 127.0), "int8"), "b": encode(torch.eye(8), "int8")}
    check_grid(store, 1 / 4096)
    with pytest.raises(ValueError, match="0.000244, is under a 4096th of the grid's widest spacing, 1 in a"):
        check_grid(store, 0.999 / 4096)


# ---------------------------------------------------------------- keys


@settings(max_examples=40)
@given(bits=st.sampled_from([None, 2, 4, 8]), columns=st.integers(1, 20),
       rows=st.lists(st.integers(0, 29), min_size=1, max_size=30))  # fmt: skip
def test_any_rows_in_any_order_are_the_same_rows(bits, columns, rows):
    spacing, index = torch.linspace(0, 3e-3, 30)[:, None], torch.tensor(rows)
    whole = direction(KEY, torch.arange(30), columns, bits, U1)
    assert torch.equal(direction(KEY, index, columns, bits, U1), whole[rows])
    whole = grid_direction(KEY, torch.arange(30), spacing, columns, EPS)
    assert torch.equal(grid_direction(KEY, index, spacing[rows], columns, EPS), whole[rows])


def test_another_key_is_another_direction():
    """Uncorrelated with this one: a product of independent standard normals, or coins, has variance 1."""
    changes = [{}, dict(seed=12), dict(step=6), dict(query=3), dict(tensor=1)]
    rows, keys = torch.arange(1000), [KEY._replace(**change) for change in changes]
    kinds = [[direction(key, rows, 64, None, U1).double() for key in keys],
             [grid_direction(key, rows, torch.zeros(1, 1), 64, 1.0).double() for key in keys]]  # fmt: skip
    for first, *others in kinds:
        for other in others:
            assert abs((first * other).mean()) < 5 / first.numel() ** 0.5
