"""Rounding onto grids, of numbers and of activations, against exact fractions and lists of all points.

Random bits are words: all patterns of those that decide are tried, or the two on each side of the edge, so nothing here
is statistical.  test_formats.py rounds whole stores with drawn bits.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import gaussian, nearest, neighbours, patterns, points, same_bits
from torch import Tensor

from quant import ACTIVATIONS, E4M3, quantise_tokens, round_to_bfloat16, stochastic_round

# ---------------------------------------------------------------- QuZO's eq. 5, bfloat16, fp8

X32 = st.one_of(st.floats(-(2.0**20), 2.0**20, width=32), st.integers(-(2**24), 2**24).map(float))
X_BF16 = st.one_of(st.floats(-(2.0**126), 2.0**126, width=32), st.sampled_from([3e-39, -1e-45, 65537.0]))
X_FP8 = st.one_of(*(st.floats(-size, size, width=32) for size in (448, 2.0**-6, 2.0**-10)))


def share_of_the_way(x: float, weights: str) -> tuple[float, float, Fraction]:
    """The neighbours of a size, and how far it is on the way from one to the other."""
    low, high = (float(point) for point in neighbours(torch.tensor(abs(x), dtype=torch.float64), points(weights)))
    return low, high, (Fraction(abs(x)) - Fraction(low)) / Fraction(high - low) if high > low else Fraction(0)


def rounded(round, x: float, words: list[int]) -> list[float]:
    return round(torch.full((len(words),), x, dtype=torch.float32), patterns(words)).double().tolist()


@given(X32)
def test_stochastic_round_goes_up_for_exactly_the_right_words(x):
    """Of 2^31 words, floor(fraction * 2^31) take a size up: P(up) is right to 2^-31 for every x, however small, and
    whole numbers never move.  The words that do are the smallest, so two words on each side of the edge say it all."""
    size, sign = abs(Fraction(x)), 1 if x >= 0 else -1
    ups = int(size % 1 * 2**31)  # exact, in rationals
    for word, up in ((0, ups > 0), (ups - 1, True), (ups, False), (2**31 - 1, False)):
        if 0 <= word < 2**31:
            want = [sign * (size // 1 + up)] * 2
            assert rounded(stochastic_round, x, [2 * word, 2 * word + 1]) == want, "the lowest bit is not used"
    assert stochastic_round(torch.tensor([x]), None).item() == round(Fraction(x)), "without bits to nearest"


@given(X_BF16, st.integers(0, 2**16 - 1))
def test_bfloat16_goes_up_for_exactly_the_right_words(x, below):
    """P(up) is the share of the way from the neighbour below to the one above, exactly; the words that do are the
    largest, by their upper half alone."""
    low, high, share = share_of_the_way(torch.tensor(x).item(), "bf16")
    ups = share * 2**16
    assert ups == int(ups)
    for word, up in ((0, False), (2**16 - ups - 1, False), (2**16 - ups, True), (2**16 - 1, ups > 0)):
        if 0 <= word < 2**16:
            want = float(np.copysign(high if up else low, x))
            assert rounded(round_to_bfloat16, x, [int(word) << 16 | below]) == [want]


def test_bfloat16_numbers_stay():
    """All 65,280 finite ones, signed zeros and subnormals too, compared as bits."""
    number = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    number = number[number.isfinite()]
    for word in (None, 0, 2**32 - 1, 0x5A5A5A5A):
        bits = None if word is None else patterns([word]).expand(len(number))
        assert same_bits(round_to_bfloat16(number.float(), bits), number)


@given(X_FP8, st.integers(0, 2**12 - 1))
def test_fp8_goes_up_for_exactly_the_right_words(x, below):
    """As bfloat16, by 20 bits; below the smallest normal number the share is rounded to so many.  -0 becomes +0."""
    low, high, share = share_of_the_way(x, "fp8")
    ups = round(share * 2**20)
    assert ups == share * 2**20 or abs(x) < 2**-6
    for word, up in ((0, False), (2**20 - ups - 1, False), (2**20 - ups, True), (2**20 - 1, ups > 0)):
        if 0 <= word < 2**20:
            size = high if up else low
            want = torch.tensor([np.copysign(size, x) if size else 0.0]).to(torch.float8_e4m3fn)
            assert same_bits(E4M3.round(torch.tensor([x]), patterns([word << 12 | below])), want)


def test_fp8_is_exactly_unbiased_between_all_neighbours():
    """j / 256 of the way from a point to the next, in all binades and the even part, of both signs: of 256 words, whose
    8 leading bits take each value once, j go up, and the mean is x itself."""
    grid, words = points("fp8"), (torch.arange(256) << 24 | 0x5A).to(torch.int32)
    low, high = grid[:-1, None], grid[1:, None]
    for j in (0, 1, 77, 128, 254, 255):
        x = (low + (high - low) * j / 256).expand(-1, 256)
        got = E4M3.round(x.float(), words.expand(len(x), 256)).double()
        assert ((got == low) | (got == high)).all() and torch.equal(got.sum(1), x.sum(1))


def around(grid: Tensor) -> Tensor:
    """All points, the middles between them, and the floats beside each middle: float32."""
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    return torch.cat((grid.float(), middle, *(torch.nextafter(middle, torch.tensor(end)) for end in (np.inf, -np.inf))))


def test_nearest_is_the_nearest_of_all_points():
    """Ties to even; beyond the ends the ends, whatever the random bits."""
    grid = points("fp8")
    x = around(grid)
    assert torch.equal(E4M3.round(x, None).double(), nearest(x.double(), grid))
    x = around(points("bf16")[2**14 : -(2**14)])
    assert torch.equal(round_to_bfloat16(x, None).double(), nearest(x.double(), points("bf16")))
    x = torch.tensor([448.0, np.nextafter(np.float32(448), np.float32(np.inf)), 460.0, 1e9, np.inf])
    for bits in (None, torch.zeros(5, dtype=torch.int32), torch.full((5,), -1, dtype=torch.int32)):
        for sign in (1, -1):
            assert E4M3.round(sign * x, bits).double().tolist() == [sign * 448.0] * 5


# ---------------------------------------------------------------- activations

TOKENS = gaussian(3, 4, 9) * torch.logspace(-6, 6, 12).view(3, 4, 1)
quantised = pytest.mark.parametrize("kind", ["int8", "fp8"])


def test_activations_as_they_are():
    assert quantise_tokens(TOKENS, "none") is TOKENS and set(ACTIVATIONS) == {"none", "int8", "fp8"}


@quantised
def test_every_token_is_rounded_to_the_nearest_point_of_its_own_grid(kind):
    """Brute force; 2^-23 for a quotient and a product in float32, and the largest size comes back to as much."""
    got, grid = quantise_tokens(TOKENS, kind), points(kind)
    largest = TOKENS.abs().amax(-1, keepdim=True)
    scale = largest.double() / grid[-1]
    x, code = TOKENS.double() / scale, got.double() / scale
    assert ((code - nearest(code, grid)).abs() <= 2**-22 * code.abs()).all()
    assert ((code - x).abs() <= (x - nearest(x, grid)).abs() + 2**-21 * x.abs()).all()
    assert ((got - TOKENS).abs()[TOKENS.abs() == largest] <= 2**-22 * largest.flatten()).all()
    assert (got - TOKENS).abs().max() > 0
    x = torch.cat(((grid[1:] + grid[:-1]) / 2, grid[-1:]))  # a scale of 1, and ties
    assert torch.equal(quantise_tokens(x.float(), kind).double(), nearest(x, grid))


@quantised
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_any_float_type(kind, dtype):
    """On the grid they stay (powers of two times codes are exact in each), zeros too; elsewhere scales and codes are in
    float32."""
    grid = points(kind).to(torch.float32)
    x = torch.stack((grid, grid * 2.0**-6, torch.zeros_like(grid))).to(dtype)
    assert torch.equal(quantise_tokens(x, kind), x)
    x = gaussian(5, 9).to(dtype)
    assert torch.equal(quantise_tokens(x, kind), quantise_tokens(x.float(), kind).to(dtype))
    assert quantise_tokens(torch.tensor([[1e-44, 0.0, -1e-45]]).to(dtype), kind).isfinite().all()


@quantised
def test_a_token_depends_on_itself_alone(kind):
    """So results do not depend on the batch's other examples, or on its padding."""
    whole, x = quantise_tokens(TOKENS, kind), TOKENS.clone()
    x[1, 2] = 0
    assert torch.equal(quantise_tokens(TOKENS[:1, 2:], kind), whole[:1, 2:])
    changed = (quantise_tokens(x, kind) != whole).any(-1)
    assert changed[1, 2] and changed.sum() == 1 and not quantise_tokens(x, kind)[1, 2].any()


@quantised
def test_gradients_go_straight_through(kind):
    x, weight = TOKENS.clone().requires_grad_(), gaussian(3, 4, 9, seed=1)
    y = quantise_tokens(x, kind)
    assert torch.equal(y, quantise_tokens(TOKENS, kind))
    assert torch.equal(torch.autograd.grad((y * weight).sum(), x)[0], weight)
