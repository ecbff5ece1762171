"""Rounding, int8 and float stores, against brute force, direct computations, and derived bounds.

Where a bound is statistical it is 5 standard deviations, which one draw in 2 million would exceed by chance; and as
every draw has a key, what passes once passes always.  Rare events are not normal: a mean of n draws gets 3 / n more.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_random_bits import KEY, WORD, patterns, words_like

from quant import (
    Float,
    Integers,
    encode,
    round_to_bfloat16,
    row_chunks,
    stochastic_round,
)
from random_bits import Use, bits32

# ---------------------------------------------------------------- stochastic rounding

X32 = st.floats(-(2.0**20), 2.0**20, width=32)


def rounded(x: float, words: list[int]) -> list[float]:
    return stochastic_round(torch.full((len(words),), x), patterns(words)).tolist()


@given(X32)
def test_stochastic_round_goes_up_for_exactly_the_right_words(x):
    """Of 2^31 words, floor(fraction * 2^31) take a size up: P(up) is right to 2^-31 for every x, however small.

    The words that do are the smallest, so two words on each side of the edge say it all.
    """
    size = abs(Fraction(x))
    ups = int((size % 1) * 2**31)  # exact, in rationals
    sign = 1 if x >= 0 else -1
    for word, up in ((0, ups > 0), (ups - 1, True), (ups, False), (2**31 - 1, False)):
        if 0 <= word < 2**31:
            assert rounded(x, [2 * word, 2 * word + 1]) == [sign * (size // 1 + up)] * 2, "the lowest bit is not used"


@given(X32, WORD)
def test_stochastic_round_lands_on_a_neighbour_and_is_odd(x, word):
    (got,), (mirrored,) = rounded(x, [word]), rounded(-x, [word])
    assert Fraction(got) in (Fraction(x) // 1, -(-Fraction(x) // 1))
    assert mirrored == -got


@given(st.integers(-(2**24), 2**24), WORD)
def test_integers_never_move(x, word):
    assert rounded(float(x), [word]) == [x]


@pytest.mark.parametrize("x", [0.5, -0.5, 0.1, -0.25, 2.75, -2.75, 0.999, -0.999, 1e-6, -1e-6, -1e-3, 1000.3])
def test_stochastic_round_is_unbiased(x):
    """The mean of n draws is binomial: std sqrt(f (1 - f) / n), and P(up) is cut to a multiple of 2^-31."""
    words = bits32(KEY, Use.WEIGHT_ROUNDING, torch.arange(2**9), 2**11)
    x32 = torch.tensor(x)
    mean = stochastic_round(x32.expand(words.shape), words).double().mean()
    f, n = float(x32.double() % 1), words.numel()
    assert abs(mean - x32.double()) < 5 * (f * (1 - f) / n) ** 0.5 + 3 / n + 2**-31


BF16 = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
BF16 = BF16[BF16.isfinite()]
BF16_GRID = BF16.double().unique().tolist()


def test_bfloat16_numbers_stay():
    """All 65,280 finite ones, signed zeros and subnormals too, compared as bits."""
    words = bits32(KEY, Use.WEIGHT_ROUNDING, torch.arange(1), len(BF16))[0]
    assert torch.equal(round_to_bfloat16(BF16.float(), words).view(torch.int16), BF16.view(torch.int16))


@pytest.mark.parametrize("x", [0.3, -0.3, 1e-6, -0.02, 1.9999, -1.9999, 3e-39, 65537.0, 1e30])
def test_round_to_bfloat16_is_exactly_unbiased(x):
    """Every one of the 2^16 dithers once: the mean is x itself.  float64 holds the sum without rounding."""
    x32 = torch.full((2**16,), x)
    dithers = torch.arange(2**16, dtype=torch.int32) << 16 | 0x5A5A  # lower half: must be ignored
    assert round_to_bfloat16(x32, dithers).double().sum() == x32.double().sum()


@given(st.floats(-(2.0**126), 2.0**126, width=32), WORD)
def test_round_to_bfloat16_lands_on_a_neighbour(x, word):
    """The neighbours by brute force over all bfloat16 numbers."""
    got = round_to_bfloat16(torch.tensor([x]), patterns([word])).item()
    assert got in (max(g for g in BF16_GRID if g <= x), min(g for g in BF16_GRID if g >= x))


# ---------------------------------------------------------------- int8 codes

MATRICES = [
    torch.randn(6, 40, generator=torch.Generator().manual_seed(s)) * torch.logspace(-6, 3, 6)[:, None] for s in range(3)
]


@pytest.mark.parametrize("matrix", MATRICES)
def test_encode_finds_the_nearest_of_all_codes(matrix):
    """No code of the 255 is nearer, save where float32 division, off by 127 * 2^-23 of a step, confuses two."""
    stored = Integers.encode(matrix, 8)
    grid = torch.arange(-127, 128).double() * stored.scale.double()  # [R, 255]
    best = (matrix.double()[..., None] - grid[:, None]).abs().amin(-1)
    got = (matrix.double() - stored.codes.double() * stored.scale.double()).abs()
    assert (got - best <= 2 * 127 * 2**-23 * stored.scale).all()
    assert (got <= 0.5001 * stored.scale).all()


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_rows_largest_size_becomes_127(matrix):
    stored = Integers.encode(matrix, 8)
    assert stored.codes.dtype == torch.int8 and stored.scale.dtype == torch.float32
    assert torch.equal(stored.codes.int().abs().amax(1), torch.full((6,), 127, dtype=torch.int32))
    assert torch.equal(stored.codes.gather(1, matrix.abs().argmax(1, keepdim=True)).sign(),
                       matrix.gather(1, matrix.abs().argmax(1, keepdim=True)).sign().to(torch.int8))  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES)
def test_encode_is_symmetric(matrix):
    plus, minus = Integers.encode(matrix, 8), Integers.encode(-matrix, 8)
    assert torch.equal(plus.codes, -minus.codes) and torch.equal(plus.scale, minus.scale)


def test_minus_128_is_never_used():
    """Given scales may be too small for the matrix.  Without them a subnormal row counts as zero."""
    stored = Integers.encode(torch.tensor([[-2e-43, 2e-43, 0.0], [-1.0, 1.0, 0.5]]), 8)
    assert stored.codes.tolist() == [[0, 0, 0], [-127, 127, 64]]
    stored = Integers.encode(torch.tensor([[-200.0, 200.0, 0.0]]), 8, scale=torch.ones(1, 1))
    assert stored.codes.tolist() == [[-127, 127, 0]]


def test_encode_keeps_what_is_on_the_grid():
    """Scales are powers of two here, so that codes * scale is exact and encodes to the same codes."""
    codes = torch.arange(-127, 128).repeat(3, 1).to(torch.int8)
    scale = torch.tensor([[1.0], [2.0**-9], [2.0**5]])
    stored = Integers.encode(codes * scale, 8)
    assert torch.equal(stored.codes, codes) and torch.equal(stored.scale, scale)


def test_a_zero_row_is_exact_and_learns():
    """Its scale is the largest of the matrix, so a step of that size moves each code by 1."""
    matrix = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    matrix[2] = 0
    stored = Integers.encode(matrix, 8)
    assert not stored.read()[2].any() and stored.scale[2] == stored.scale.max()
    delta = torch.zeros(4, 5)
    delta[2] = stored.scale[2]
    assert stored.add_(slice(None), delta, words_like(delta)).tolist() == [5, 0]
    assert torch.equal(stored.codes[2], torch.ones(5, dtype=torch.int8))


def test_a_zero_matrix_is_exact_and_learns():
    stored = Integers.encode(torch.zeros(3, 4), 8)
    assert not stored.codes.any() and (stored.scale == 1).all()
    stored.add_(slice(1, 3), torch.full((2, 4), -1.0), words_like(torch.empty(2, 4)))
    assert stored.read().tolist() == [[0] * 4, [-1] * 4, [-1] * 4]


def random_store(rows: int = 8, columns: int = 50) -> Integers:
    """Codes all over the grid, both edges included."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator)
    codes[:, 0], codes[:, 1] = 127, -127
    return Integers(codes.to(torch.int8), torch.rand(rows, 1, generator=generator) + 0.01, columns, 8)


def test_add_of_nothing_changes_nothing():
    stored = random_store()
    codes, scale = stored.codes.clone(), stored.scale.clone()
    for zero in (0.0, -0.0):
        delta = torch.full(codes.shape, zero)
        assert stored.add_(slice(None), delta, words_like(delta)).tolist() == [0, 0]
    assert torch.equal(stored.codes, codes) and torch.equal(stored.scale, scale)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_edge_clips_and_counts(sign):
    """A code at the edge stays, one below it moves by 1 of the 3 wanted; -128 is never reached."""
    stored = Integers(torch.tensor([[127, 126, 0]], dtype=torch.int8) * sign, torch.tensor([[0.5]]), 3, 8)
    delta = torch.full((1, 3), 1.5 * sign)
    assert stored.add_(slice(None), delta, words_like(delta)).tolist() == [2, 2]
    assert stored.codes.tolist() == [[127 * sign, 127 * sign, 3 * sign]]


def test_add_against_a_direct_computation():
    """Some rows only: codes, both counts, and the rows and scales that must stay."""
    stored = random_store()
    old, scale = stored.codes.clone(), stored.scale.clone()
    delta = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 20 * scale[2:5]
    words = words_like(delta)
    wanted = old[2:5] + stochastic_round(delta / scale[2:5], words).to(torch.int32)
    counts = stored.add_(slice(2, 5), delta, words)
    new = wanted.clamp(-127, 127)
    assert torch.equal(stored.codes[2:5], new.to(torch.int8)) and torch.equal(stored.scale, scale)
    assert torch.equal(stored.codes[[0, 1, 5, 6, 7]], old[[0, 1, 5, 6, 7]])
    assert counts.tolist() == [int((new != old[2:5]).sum()), int((wanted.abs() > 127).sum())]
    assert counts.min() > 0


@pytest.mark.parametrize("steps", [0.01, 0.3, 1.7])
def test_the_mean_of_many_adds_is_the_delta(steps):
    """Each of n adds to the same code moves it by SR(delta / scale): std sqrt(f (1 - f)), f the fraction."""
    n = 1000
    delta = torch.randn(4, 10, generator=torch.Generator().manual_seed(2)) * steps
    codes, scale = torch.zeros(4, 10, dtype=torch.int8), torch.tensor([[0.1], [1.0], [3.0], [1e-5]])
    total = torch.zeros(4, 10)
    for step in range(n):
        stored = Integers(codes.clone(), scale, codes.shape[1], 8)
        stored.add_(slice(None), delta * scale, words_like(delta, KEY._replace(step=step)))
        total += stored.codes
    std = ((delta % 1) * (1 - delta % 1) / n).sqrt()
    assert ((total / n - delta).abs() < 5 * std + 3 / n).all()


# ---------------------------------------------------------------- float stores


def test_fp32_adds_plainly_and_counts():
    stored = Float(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    counts = stored.add_(slice(1, 2), torch.tensor([[0.5, 0.0, 1e-9]]), None)
    assert stored.value.tolist() == [[1, 2, 3], [4.5, 5, 6]], "6 + 1e-9 is 6 in float32"
    assert counts.tolist() == [1, 0] and not stored.rounds


def test_a_vector_is_one_row():
    stored = Float(torch.tensor([1.0, 2.0]))
    assert stored.read(slice(0, 1)).shape == (1, 2) and stored.shape == (2,)
    assert stored.add_(slice(0, 1), torch.tensor([[1.0, 0.0]]), None).tolist() == [1, 0]
    assert stored.value.tolist() == [2, 2]


def test_bf16_keeps_small_steps_in_expectation():
    """A step of a tenth of the spacing, 2^-7 above 1.0, which rounding to nearest would lose every time."""
    n, spacing = 4000, 2.0**-7
    stored = Float(torch.ones(1, n, dtype=torch.bfloat16))
    delta = torch.full((1, n), 0.1 * spacing)
    counts = stored.add_(slice(None), delta, words_like(delta))
    moved = stored.value.float() - 1
    assert set(moved.unique().tolist()) == {0.0, spacing}
    # binomial; 2^-16 because 1 + delta keeps 16 bits below the spacing
    assert abs(moved.mean() / spacing - 0.1) < 5 * (0.1 * 0.9 / n) ** 0.5 + 2**-16
    assert stored.rounds and counts.tolist() == [int((moved != 0).sum()), 0]


# ---------------------------------------------------------------- what is stored how


@pytest.mark.parametrize("weights, kind, dtype", [("fp32", Float, torch.float32), ("bf16", Float, torch.bfloat16),
                                                  ("int8", Integers, torch.int8)])  # fmt: skip
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_are_quantised_and_vectors_are_not(weights, kind, dtype, source):
    matrix, vector = torch.randn(4, 6).to(source), torch.randn(6).to(source)
    stored = encode(matrix, weights)
    assert type(stored) is kind and stored.parts()[""].dtype == dtype and stored.shape == (4, 6)
    kept = encode(vector, weights)
    assert type(kept) is Float and torch.equal(kept.value, vector.float())


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="int7"):
        encode(torch.zeros(2, 2), "int7")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@given(st.one_of(st.tuples(st.integers(1, 5000), st.integers(1, 2**27)), st.tuples(st.integers(1, 2**27))))
def test_row_chunks_cover_all_rows_once(device, shape):
    chunks = list(row_chunks(torch.Size(shape), torch.device(device)))
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    bound = 2**25 if device == "cuda" else 2**17
    assert all(c.stop - c.start == 1 or (c.stop - c.start) * columns <= bound for c in chunks)
