"""Every grid of codes against a list of all its points: encoding, rounding, stepping, spacing, packing, saving.

What a store holds is read from its saved parts, bit by bit, so that nothing is decoded by the code under test, and
compared in float64 in units of its scale.  Statistical bounds are 5 standard deviations, as in test_quant.py.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_random_bits import KEY, words_like
from torch import Tensor

import quant
from quant import (
    ACTIVATIONS,
    FORMATS,
    FP8,
    INTEGERS,
    RESIDUALS,
    Float,
    Grid8,
    Stored,
    check_format,
    encode,
    from_parts,
    multiply_fp8,
    pack,
    quantise_tokens,
    row_chunks,
    stored_parts,
    unpack,
)

TOPS = {"int8": 127, "int4": 7}
BYTES = {"fp8": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}
QUANTISED = (*TOPS, *BYTES)
CODES = [*product(TOPS, (0, 1, 2, 4, 8)), *product(BYTES, [0])]
every_grid = pytest.mark.parametrize("weights, residual", CODES)
every_format = pytest.mark.parametrize("weights", QUANTISED)
ALL = slice(None)


def test_the_lists_here_are_complete():
    assert {**INTEGERS, **FP8}.keys() == set(QUANTISED) and {w for w, _ in CODES} | {"fp32", "bf16"} == set(FORMATS)
    assert {r for _, r in CODES} == set(RESIDUALS)


# ---------------------------------------------------------------- what a store holds, by brute force


@cache
def points(weights: str, residual: int = 0) -> Tensor:
    """All numbers that a code can be, ascending, [n] float64; with a residual all that the two together can be."""
    if weights == "bf16":
        number = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).double()
    elif weights in BYTES:
        number = torch.arange(256).to(torch.uint8).view(BYTES[weights]).double()
    else:
        top, unit = TOPS[weights], 2**residual
        rests = range(-unit // 2, unit // 2) if residual else [0]
        half = 0.5 if residual else 0
        fine = {code * unit + rest + half for code in range(-top, top + 1) for rest in rests}
        assert fine == {-x for x in fine}
        number = torch.tensor([x / unit for x in fine], dtype=torch.float64)
    return number[number.isfinite()].unique()


def fields(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Two's complement numbers from packed bytes, one bit after the other, the lowest first: [R, columns] int64."""
    bit = np.unpackbits(packed.numpy().view(np.uint8), axis=1, bitorder="little")[:, : bits * columns]
    place = 2 ** np.arange(bits)
    place[-1] *= -1
    return torch.from_numpy(bit.reshape(len(packed), columns, bits).astype(np.int64) @ place)


def packed(number: Tensor, bits: int) -> Tensor:
    """The inverse: what does not fill the last byte is 0."""
    bit = number[..., None] >> torch.arange(bits) & 1
    return torch.from_numpy(np.packbits(bit.flatten(1).numpy().astype(np.uint8), axis=1, bitorder="little"))


def codes_of(stored: Stored, weights: str) -> Tensor:
    """[R, C] float64."""
    code, (_, C) = stored.parts()[""], stored.shape
    return (fields(code, 8 if weights == "int8" else 4, C) if weights in TOPS else code).double()


def numbers(stored: Stored, weights: str, residual: int = 0) -> Tensor:
    """Codes with their residuals, in units of the scale: [R, C] float64."""
    if weights == "bf16":
        return stored.parts()[""].double()
    rest = fields(stored.parts()[".residual"], residual, stored.shape[1]).double() + 0.5 if residual else 0
    return codes_of(stored, weights) + rest / 2**residual


def scales_of(stored: Stored, weights: str) -> Tensor:
    """Each element's own, [R, C] float32."""
    if weights == "bf16":
        return torch.ones(stored.shape)
    scale, C = stored.parts()[".scale"], stored.shape[1]
    return torch.stack([scale[:, c // 128 if weights == "int4" else 0] for c in range(C)], 1)


def store_of(number: Tensor, weights: str, residual: int = 0, unit: float = 0.37) -> Stored:
    """The store that holds these numbers (float64, of the grid); scales differ by row and by group."""
    R, C = number.shape
    if weights == "bf16":
        return Float(number.to(torch.bfloat16))
    scale = unit * 2.0 ** torch.arange(R * -(-C // 128)).remainder(5).view(R, -1)
    parts = {".scale": scale if weights == "int4" else scale[:, :1].contiguous()}
    if weights in BYTES:
        parts[""] = number.float().to(BYTES[weights])
    else:
        fine = (number * 2**residual).floor().long()
        code = (number + 0.5 * (residual > 0)).floor().long()
        parts[""] = packed(code, INTEGERS[weights]).view(torch.int8 if weights == "int8" else torch.uint8)
        if residual:
            parts[".residual"] = packed(fine - code * 2**residual, residual)
    return from_parts(parts, torch.Size((R, C)), weights, residual)


def everywhere(weights: str, residual: int = 0) -> Tensor:
    """Up to 255 points of a grid, ends and zero included.  bf16 rounds up to infinity, so its last are left out."""
    grid = points(weights, residual)
    grid = grid[512:-512] if weights == "bf16" else grid
    return grid[torch.linspace(0, len(grid) - 1, min(len(grid), 255)).round().long()]


def neighbours(x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The last point up to x and the first one from x on; beyond the ends the end."""
    below = torch.searchsorted(grid, x, right=True) - 1
    return grid[below.clamp(min=0)], grid[torch.searchsorted(grid, x).clamp(max=len(grid) - 1)]


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """Ties to even.  Counted from zero, in the middle, every other point is even: an integer, or an fp8 mantissa,
    since codes of fp8 count through the binades without a gap.  With a residual there is no zero: ties go outwards."""
    low, high = neighbours(x, grid)
    if not (grid == 0).any():
        return torch.where((high - x < x - low) | (high - x == x - low) & (x >= 0), high, low)
    even = (torch.searchsorted(grid, low) - len(grid) // 2) % 2 == 0
    return torch.where((high - x < x - low) | (high - x == x - low) & ~even, high, low)


def outwards(number: Tensor, grid: Tensor) -> Tensor:
    """The distance to the next point away from zero; beyond the last two it is taken to be as between them."""
    size = torch.cat((grid[grid >= 0], 2 * grid[-1:] - grid[-2:-1]))
    at = torch.searchsorted(size, number.abs())
    return size[at + 1] - size[at]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", range(1, 41))
def test_packing_is_the_layout(bits, columns):
    """The first column in the lowest bits, zeros in what a last byte has left, and back."""
    generator = torch.Generator().manual_seed(columns)
    number = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), generator=generator)
    got = pack(number, bits)
    assert got.dtype == torch.uint8 and torch.equal(got, packed(number, bits))
    assert torch.equal(fields(got, bits, columns), number) and torch.equal(unpack(got, bits, columns).long(), number)


def test_packing_by_hand():
    assert pack(torch.tensor([[1, -8, 7]]), 4).tolist() == [[0x81, 0x07]]
    assert pack(torch.tensor([[1, -2, 0, -1, 1]]), 2).tolist() == [[0b11_00_10_01, 0b01]]
    assert pack(torch.tensor([[-1, 0, 0, 0, 0, 0, 0, -1, -1]]), 1).tolist() == [[0b10000001, 1]]
    assert unpack(torch.tensor([[0x81, 0xF7]], dtype=torch.uint8), 4, 3).tolist() == [[1, -8, 7]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_value_survives_packing_in_every_place(bits):
    """As whole floats too, which is how a store hands them over."""
    value = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    number = torch.stack([value.roll(shift) for shift in range(8)])
    for kind in (torch.int8, torch.int32, torch.float32):
        assert torch.equal(unpack(pack(number.to(kind), bits), bits, len(value)).long(), number)


@given(data=st.data(), bits=st.sampled_from([1, 2, 4, 8]), rows=st.integers(1, 4), columns=st.integers(1, 40))
def test_packing_and_back(data, bits, rows, columns):
    value = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    number = data.draw(st.lists(st.lists(value, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    assert unpack(pack(torch.tensor(number), bits), bits, columns).tolist() == number


@given(data=st.data(), bits=st.sampled_from([1, 2, 4, 8]), size=st.integers(1, 9))
def test_unpacking_and_back(data, bits, size):
    """Every byte means something, so full bytes come back whatever they are."""
    byte = torch.tensor([data.draw(st.lists(st.integers(0, 255), min_size=size, max_size=size))], dtype=torch.uint8)
    assert torch.equal(pack(unpack(byte, bits, size * 8 // bits), bits), byte)


# ---------------------------------------------------------------- encoding


def awkward(weights: str, residual: int) -> Tensor:
    """[rows, 128] float32: all points, the middles between them, and the floats beside each middle.

    Every row begins with the top, which makes its scale 1; a row is one of int4's groups.
    """
    grid, top = points(weights, residual), points(weights)[-1]
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(end)) for end in (np.inf, -np.inf)]
    x = torch.cat((grid.float(), middle, *beside))
    x = x[(x.abs() <= top) & ((x == 0) | (x.abs() > 1e-30))]  # the floats beside 0 would not survive a scale
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    return torch.nn.functional.pad(x, (1, 0), value=float(top))


@every_grid
def test_encode_finds_the_nearest_of_all_points(weights, residual):
    """Exactly, ties to even.  Rows are scaled by powers of two from 2^-20 to 2^20, so no division rounds."""
    x = awkward(weights, residual)
    scale = 2.0 ** (torch.arange(len(x)) % 41 - 20)[:, None]
    stored = encode(x * scale, weights, residual)
    assert torch.equal(stored.parts()[".scale"], scale)
    assert torch.equal(numbers(stored, weights, residual), nearest(x.double(), points(weights, residual)))


@every_grid
def test_encode_is_symmetric(weights, residual):
    """On the grid that steps land on, and as forwards read it.  0 itself lies between two points of a residual's."""
    x = torch.cat((awkward(weights, residual)[:20], gaussian(20, 128)))
    plus, minus = encode(x, weights, residual), encode(-x, weights, residual)
    assert torch.equal(plus.parts()[".scale"], minus.parts()[".scale"]) and torch.equal(plus.read(), -minus.read())
    ups, downs = (numbers(stored, weights, residual)[x != 0] for stored in (plus, minus))
    assert torch.equal(ups, -downs)


def scales_by_hand(matrix: Tensor, weights: str) -> Tensor:
    """Each element's own, [R, C] float32: the largest size of its group, over the top."""
    top, C = points(weights)[-1].float(), matrix.shape[1]
    width = 128 if weights == "int4" else C
    largest = [[max(map(abs, row[c : c + width])) for c in range(0, C, width)] for row in matrix.tolist()]
    return torch.tensor([[row[c // width] for c in range(C)] for row in largest]) / top


@every_grid
@pytest.mark.parametrize("columns", [1, 2, 7, 127, 128, 129, 300])
def test_encode_in_groups_of_all_widths(weights, residual, columns):
    """Rows and groups differ by powers of 30, so a wrong one's scale would show.

    A quotient in float32 is off by 2^-24 of itself, so the nearest point may be missed by twice that.
    """
    x = gaussian(5, columns) * 30.0 ** (torch.arange(5)[:, None] - 2 - torch.arange(columns) // 128)
    stored, scale = encode(x, weights, residual), scales_by_hand(x, weights)
    assert torch.equal(scales_of(stored, weights), scale)
    got, want = numbers(stored, weights, residual), x.double() / scale.double()
    best = (want - nearest(want, points(weights, residual))).abs()
    assert ((got - want).abs() <= best + 2**-23 * want.abs()).all()
    top = points(weights)[-1]
    is_largest = (x.abs() / scale - float(top)).abs() < 1e-4 * float(top)
    code = (numbers if weights in BYTES else lambda stored, weights, _: codes_of(stored, weights))(stored, weights, 0)
    assert is_largest.sum() >= 5 and torch.equal(code[is_largest], x[is_largest].double().sign() * top)
    kinds = {suffix: (part.dtype, part.shape) for suffix, part in stored.parts().items()}
    assert kinds == stored_parts(x.shape, weights, residual) and stored.shape == x.shape


@every_format
def test_a_zero_group_is_exact_and_learns(weights):
    """A row, an int4 group inside, and a short one at the end.  They get the matrix's largest scale; a step of one
    spacing then takes each code to the grid's first point."""
    x = gaussian(4, 300)
    x[2], x[1, 128:256], x[3, 256:] = 0, 0, 0
    stored, zero = encode(x, weights), x == 0
    scale = scales_of(stored, weights)
    assert (scale[zero if weights == "int4" else [2]] == scale.max()).all() and len(scale.unique()) > 2
    assert not numbers(stored, weights)[zero].any() and not stored.read()[zero].any()
    delta = torch.where(zero, stored.spacing(ALL), 0.0)
    assert stored.add_(ALL, delta, words_like(x)).tolist() == [int(zero.sum()), 0]
    grid = points(weights)
    assert (numbers(stored, weights)[zero] == grid[grid > 0].min()).all()


@every_grid
def test_a_zero_matrix_is_exact(weights, residual):
    stored = encode(torch.zeros(3, 130), weights, residual)
    assert not stored.read().any() and (stored.parts()[".scale"] == 1).all()


TINY = [1e-38, 1.2e-38, 3e-39, 1e-40, 1e-41, 3e-43, 1e-43, 4e-45, 1e-45]


@every_format
def test_tiny_groups_are_finite_and_in_range(weights):
    """Scales that are subnormal, or would be 0.  Nearest on the grid of the scale that was stored, ends included."""
    x = torch.tensor(TINY)[:, None] * torch.tensor([1.0, -1.0, 0.0, 0.5, -0.3]) + torch.zeros(1, 5)
    stored = encode(torch.cat((x, torch.ones(1, 5))), weights)
    scale = scales_of(stored, weights)[:-1]
    assert (scale > 0).all() and scale.isfinite().all() and stored.read().isfinite().all()
    got, want = numbers(stored, weights)[:-1], x.double() / scale.double()
    best = (want - nearest(want, points(weights))).abs()
    assert ((got - want).abs() <= best + 2**-23 * want.abs()).all()


@pytest.mark.parametrize("weights, residual, size", [("int8", 4, 2e-43), ("int8", 1, 2e-43), ("int4", 8, 2e-43),
                                                     ("int8", 8, 1e-40)])  # fmt: skip
def test_tiny_groups_with_a_residual(weights, residual, size):
    """Codes to within a step of what they are without a residual, or 0 where such a group is taken for zeros."""
    x = torch.tensor([[1.0, -1.0, 0.0, 0.5], [0.7, 1.0, 0.2, 0.0]]) * torch.tensor([[size], [1.0]])
    stored, plain, oracle = encode(x, weights, residual), encode(x, weights), encode(x, weights, residual, oracle=True)
    code = codes_of(stored, weights)
    assert not code[0].any() or ((code - codes_of(plain, weights)).abs() <= 1).all()
    assert all(torch.equal(a, b) for a, b in zip(stored.parts().values(), oracle.parts().values(), strict=True))


@every_grid
def test_encode_does_not_depend_on_chunks(weights, residual, monkeypatch):
    """A zero row's scale is the largest of the matrix, not of a chunk."""
    x = gaussian(9, 150) * torch.arange(9)[:, None]
    whole = encode(x, weights, residual)
    monkeypatch.setattr(quant, "row_chunks", lambda shape, device: [slice(i, i + 1) for i in range(shape[0])])
    for a, b in zip(whole.parts().values(), encode(x, weights, residual).parts().values(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@every_grid
def test_encode_with_given_scales_is_nearest_on_that_grid(weights, residual):
    """Whatever is beyond the ends becomes the end, and the scales stay."""
    x = gaussian(4, 150)
    scale = scales_of(encode(x, weights, residual), weights)
    given_scale = encode(x, weights, residual).parts()[".scale"] * 0.5
    stored = encode(x, weights, residual, scale=given_scale)
    assert torch.equal(stored.parts()[".scale"], given_scale)
    want, grid = x.double() / (0.5 * scale.double()), points(weights, residual)
    best = (want - nearest(want, grid)).abs()
    assert ((numbers(stored, weights, residual) - want).abs() <= best + 2**-23 * want.abs()).all()
    assert (want.abs() > grid[-1]).sum() > 5


# ---------------------------------------------------------------- stochastic rounding, wherever a number may be


@pytest.mark.parametrize("weights", FP8)
def test_rounding_to_fp8_is_exactly_unbiased_between_all_neighbours(weights):
    """j / 256 of the way from a point to the next, in all binades and the even part, of both signs.

    256 words, whose 8 leading bits take each value once.  So j of them go up, in the even part too, and the mean is x
    itself.
    """
    kind, grid, k = FP8[weights], points(weights), torch.arange(256)
    words = (k << 24 | 0x5A).to(torch.int32)
    low, high = grid[:-1, None], grid[1:, None]
    for j in (0, 1, 77, 128, 254, 255):
        x = (low + (high - low) * j / 256).expand(-1, 256)
        got = kind.round(x.float(), words.expand(len(x), 256))
        assert got.dtype == BYTES[weights]
        got = got.double()
        assert ((got == low) | (got == high)).all()
        assert torch.equal(got.sum(1), x.sum(1))


def every_cut(kind: Grid8) -> Tensor:
    """Words with all patterns of the bits that decide where a number is cut, once each: the upper ones."""
    bits = 23 - kind.mantissa
    return (torch.arange(2**bits) << 32 - bits).to(torch.int32)


@pytest.mark.parametrize("x", [1.0371, -3.3, 447.98, -0.015673, 0.9999, 1.9999999, -31.0001, 17.0])
@pytest.mark.parametrize("weights", FP8)
def test_rounding_to_fp8_uses_every_bit(weights, x):
    """All patterns of the bits that are cut, once each: the mean is x itself, although x has 24 bits."""
    kind, x = FP8[weights], torch.tensor(x)
    words = every_cut(kind) | 0x2B  # the lower bits must not count
    assert kind.round(x.expand(len(words)), words).double().sum() == x.double() * len(words)


@pytest.mark.parametrize("x", [1e-3, -1e-3, 1.55e-2, -1e-9, 6e-5, -5.9e-5, 1e-5])
@pytest.mark.parametrize("weights", FP8)
def test_fp8s_even_part_goes_up_for_the_right_share_of_words(weights, x):
    """Below the smallest normal number: of all patterns of the bits that are cut, the fraction's share, to a half of
    one pattern."""
    kind, grid = FP8[weights], points(weights)
    step = grid[grid > 0].min().item()
    if abs(x) >= 2.0**kind.lowest:
        return  # in e5m2 only the smallest of these are
    n = 2 ** (23 - kind.mantissa)
    size = Fraction(torch.tensor(abs(x)).item()) / Fraction(step)
    got = kind.round(torch.tensor(x).expand(n), every_cut(kind)).double() / step
    low = float(size // 1)
    assert set(got.abs().unique().tolist()) <= {low, low + 1} and (got * np.sign(x) >= 0).all()
    assert (got.abs() > low).sum() == round(size % 1 * n)


@pytest.mark.parametrize("weights", FP8)
def test_what_rounds_to_zero_is_plus_zero(weights):
    """By its byte: numbers far below the smallest one, and -0."""
    kind, x = FP8[weights], torch.tensor([-1e-12, -0.0, 0.0, 1e-12])
    assert kind.round(x, torch.zeros(4, dtype=torch.int32)).view(torch.uint8).tolist() == [0] * 4


@pytest.mark.parametrize("weights", FP8)
def test_sizes_beyond_the_top_become_the_top(weights):
    top = points(weights)[-1].item()
    x = torch.tensor([top, np.nextafter(np.float32(top), np.float32(np.inf)), top * 1.03, 1e9, np.inf])
    x = torch.cat((x, -x))
    for words in (None, torch.zeros(10, dtype=torch.int32), torch.full((10,), -1, dtype=torch.int32)):
        assert FP8[weights].round(x, words).double().tolist() == [top] * 5 + [-top] * 5


@pytest.mark.parametrize("weights, residual", [("bf16", 0), *CODES])
def test_a_step_is_unbiased_everywhere(weights, residual):
    """From points of the whole grid, up to three spacings either way, across binades and up to the ends, 2,000 times.

    A number between two points at f of the way lands on either, with a standard deviation of gap sqrt(f (1 - f)).
    Adding in float32 may move it by 2^-24 of itself, the scale by as much.
    """
    n, start, grid = 2000, everywhere(weights, residual), points(weights, residual)
    for seed in range(3):
        stored = store_of(start.expand(n, -1), weights, residual)
        scale = scales_of(stored, weights)
        reach = 6 * torch.rand(len(start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 3
        delta = (outwards(start, grid) * reach * scale).float()
        stored.add_(ALL, delta, words_like(delta, KEY._replace(step=seed)))
        x = start + delta.double() / scale.double()
        low, high = neighbours(x, grid)
        got = numbers(stored, weights, residual)
        assert ((got == low) | (got == high)).all()
        x = x.clamp(grid[0], grid[-1])
        variance = ((high - x) * (x - low)).mean(0)
        bound = 5 * (variance / n).sqrt() + 3 * (high - low).amax(0) / n + 2**-22 * x.abs().amax(0)
        assert ((got - x).mean(0).abs() <= bound).all()
        assert torch.equal(scales_of(stored, weights), scale)


@every_grid
@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_hold_back_and_count(weights, residual, sign):
    """From the last three points, 0 to 4 whole spacings outwards, so that nothing is left to chance."""
    grid = points(weights, residual)
    gap, (start, steps) = grid[-1] - grid[-2], torch.cartesian_prod(grid[-3:], torch.arange(5).double()).T
    stored = store_of(sign * start[None], weights, residual, unit=0.5)
    delta = (sign * steps * gap * 0.5).float()[None]
    counts = stored.add_(ALL, delta, words_like(delta))
    wanted = start + steps * gap
    new = wanted.clamp(max=grid[-1])
    assert torch.equal(numbers(stored, weights, residual)[0], sign * new)
    assert counts.tolist() == [int((new != start).sum()), int((wanted > grid[-1]).sum())] == [8, 9]


@every_grid
def test_steps_of_any_size_stay_in_range(weights, residual):
    """Far beyond the ends, infinite after division by the scale too; nothing wraps round."""
    start, end = everywhere(weights, residual), points(weights, residual)[-1]
    for size in (1e6, 1e30, 3e38):
        for sign in (1, -1):
            stored = store_of(start[None], weights, residual, unit=1e-3)
            delta = torch.full((1, len(start)), sign * size)
            _, held = stored.add_(ALL, delta, words_like(delta)).tolist()
            assert (numbers(stored, weights, residual) == sign * end).all() and held == len(start)


# ---------------------------------------------------------------- residuals


@pytest.mark.parametrize("weights, residual", [case for case in CODES if case[1]])
def test_a_residual_is_the_rest_of_a_finer_number(weights, residual):
    """All pairs: fine = code * 2^b + residual, and every fine number is one pair, found by `write`."""
    grid, top, unit = points(weights, residual), TOPS[weights], 2**residual
    stored = store_of(grid[None], weights, residual)
    assert len(grid) == (2 * top + 1) * unit == stored.limit - stored.lowest + 1
    fine = grid * unit - 0.5
    assert torch.equal(stored.fine(ALL)[0].double(), fine)
    code, rest = codes_of(stored, weights), fields(stored.parts()[".residual"], residual, len(grid))
    assert torch.equal((code * unit + rest)[0], fine) and rest.min() == -unit // 2 and rest.max() == unit // 2 - 1
    assert code.min() == -top and code.max() == top
    assert torch.equal(stored.code(ALL).double(), code)
    assert torch.equal(stored.read(), code.float() * scales_of(stored, weights))
    written = store_of(torch.zeros(1, len(grid)), weights, residual)
    written.write(ALL, fine.float()[None])
    for a, b in zip(written.parts().values(), stored.parts().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weights, residual", [case for case in CODES if case[1]])
def test_a_forward_reads_the_code_alone(weights, residual):
    """Whatever the residual: the weights, their spacing, and where a probe lands.  The code is the nearest one."""
    x = gaussian(6, 150)
    stored = encode(x, weights, residual)
    nearby = (numbers(stored, weights, residual) - codes_of(stored, weights)).abs()
    assert nearby.max() == 0.5 - 0.5 / 2**residual
    delta, words, index = gaussian(6, 150, seed=1), words_like(x), torch.tensor([5, 0, 0])
    before = [stored.read(), stored.spacing(ALL), stored.land(ALL, delta, words), stored.read(index)]
    stored.residual.random_(generator=torch.Generator().manual_seed(2))
    after = [stored.read(), stored.spacing(ALL), stored.land(ALL, delta, words), stored.read(index)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("weights, residual", [(w, r) for w in TOPS for r in (1, 2, 4)])
def test_reads_with_a_residual_are_not_biased(weights, residual):
    """Rounding to nearest is off by 0.29 of a code, in no direction: a mean over 2^17 weights by 8e-4 of a code."""
    x = gaussian(128, 1024)
    stored = encode(x, weights, residual)
    assert ((stored.read() - x) / stored.spacing(ALL)).double().mean().abs() < 5 * 0.29 / x.numel() ** 0.5


@pytest.mark.parametrize("weights, residual", [case for case in CODES if case[1]])
def test_small_steps_add_up_in_the_residual(weights, residual):
    """2^b steps of a 2^b-th of the scale are one code, with no rounding at all, and a read changes on the way once."""
    unit = 2**residual
    stored = encode(torch.tensor([[1.0, -1.0, 0.0] * 5]), weights, residual)
    code, delta = [codes_of(stored, weights)], torch.full((1, 15), -1.0) * stored.spacing(ALL) / unit
    for _ in range(unit):
        stored.add_(ALL, delta, words_like(delta))
        code.append(codes_of(stored, weights))
    assert torch.equal(code[-1] - code[0], torch.tensor([[-1.0, 0.0, -1.0] * 5]).double())
    changes = torch.stack(code).diff(dim=0).sum(0)
    assert torch.equal(torch.stack(code).diff(dim=0).abs().sum(0), changes.abs())  # one way only


# ---------------------------------------------------------------- spacing, reading, landing


@pytest.mark.parametrize("unit", [0.25, 0.37])
@pytest.mark.parametrize("weights, residual", [("bf16", 0), *CODES])
def test_spacing_is_the_distance_to_the_next_point_away_from_zero(weights, residual, unit):
    """For every code.  A residual changes nothing; fp8's is a power of two times the scale, so float32 is exact.

    bf16's subnormal numbers and zero, 2^-133 apart, count as closer than any probe.
    """
    grid = points(weights)
    stored = store_of(grid[None], weights, residual, unit)
    got, scale = stored.spacing(ALL).expand(1, len(grid)), scales_of(stored, weights)
    want = outwards(grid, grid)[None]
    if weights == "bf16":
        want = torch.where(grid.abs() >= 2.0**-126, want, 0.0)
    assert got.dtype == torch.float32 and torch.equal(got, (want * scale.double()).float())


@every_grid
def test_rows_by_slice_and_by_index(weights, residual):
    """read, spacing and land of chosen rows are those rows of the whole."""
    x = gaussian(7, 140)
    stored, delta, words = encode(x, weights, residual), gaussian(7, 140, seed=1), words_like(x)
    whole = [stored.read(), stored.spacing(ALL).expand(x.shape), stored.land(ALL, delta, words)]
    for rows in (slice(2, 5), torch.tensor([6, 0, 3, 3])):
        some = [stored.read(rows), stored.spacing(rows), stored.land(rows, delta[rows], words[rows])]
        for a, b in zip(some, whole, strict=True):
            assert torch.equal(a.expand(-1, 140), b[rows])
    assert torch.equal(whole[0], codes_of(stored, weights).float() * scales_of(stored, weights))


@pytest.mark.parametrize("chance", [True, False])
@pytest.mark.parametrize("weights", [*FORMATS])
def test_land_is_add_without_writing(weights, chance):
    """On the grid that a forward reads.  Steps from a hundredth of a spacing to far beyond the ends."""
    x = gaussian(6, 140)
    stored = encode(x, weights)
    before = {suffix: part.clone() for suffix, part in stored.parts().items()}
    for seed, size in enumerate((0.001, 0.1, 10.0)):
        delta = gaussian(6, 140, seed=seed + 1) * size
        words = words_like(delta, KEY._replace(step=seed)) if chance else None
        landed = stored.land(slice(1, 4), delta[1:4], None if words is None else words[1:4])
        assert all(torch.equal(part, before[suffix]) for suffix, part in stored.parts().items())
        moved = encode(x, weights)
        moved.add_(slice(1, 4), delta[1:4], None if words is None else words[1:4])
        assert torch.equal(moved.read(slice(1, 4)).float(), landed) and landed.dtype == torch.float32
        assert torch.equal(moved.read()[[0, 4, 5]], stored.read()[[0, 4, 5]])


@pytest.mark.parametrize("weights, residual", [("bf16", 0), *CODES])
def test_nearest_lands_on_the_nearest_point(weights, residual):
    """words None: brute force over all points, to float32's 2^-23.  Integers round the step, and that is the same."""
    start, grid = everywhere(weights, residual)[None], points(weights, residual)
    for seed in range(5):
        stored = store_of(start, weights, residual)
        scale = scales_of(stored, weights)
        delta = (outwards(start, grid) * gaussian(1, start.shape[1], seed=seed) * 2 * scale).float()
        stored.add_(ALL, delta, None)
        want = start + delta.double() / scale.double()
        gap = (numbers(stored, weights, residual) - want).abs()
        assert (gap <= (nearest(want, grid) - want).abs() + 2**-22 * want.abs()).all()


# ---------------------------------------------------------------- activations

TOKENS = gaussian(3, 4, 9) * torch.logspace(-6, 6, 12).view(3, 4, 1)
TOKEN_GRIDS = {"int8": "int8", "fp8": "fp8"}
quantised = pytest.mark.parametrize("kind", TOKEN_GRIDS)


@quantised
def test_every_token_is_rounded_to_the_nearest_point_of_its_own_grid(kind):
    """Brute force; 2^-23 for a quotient and a product in float32, and the largest size comes back to as much."""
    got, grid = quantise_tokens(TOKENS, kind), points(TOKEN_GRIDS[kind])
    largest = TOKENS.abs().amax(-1, keepdim=True)
    scale = largest.double() / grid[-1]
    x, code = TOKENS.double() / scale, got.double() / scale
    assert ((code - nearest(code, grid)).abs() <= 2**-22 * code.abs()).all()
    assert ((code - x).abs() <= (x - nearest(x, grid)).abs() + 2**-21 * x.abs()).all()
    assert ((got - TOKENS).abs()[TOKENS.abs() == largest] <= 2**-22 * largest.flatten()).all()
    assert (got - TOKENS).abs().max() > 0


@quantised
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_on_the_grid_stays(kind, dtype):
    """In any float type, in which these powers of two times int8 or fp8 codes are exact."""
    grid = points(TOKEN_GRIDS[kind]).to(torch.float32)
    x = torch.stack((grid, grid * 2.0**-6, torch.zeros_like(grid))).to(dtype)
    assert torch.equal(quantise_tokens(x, kind), x)


@quantised
def test_ties_between_points_go_to_even(kind):
    grid = points(TOKEN_GRIDS[kind])
    x = torch.cat(((grid[1:] + grid[:-1]) / 2, grid[-1:]))
    assert torch.equal(quantise_tokens(x.float(), kind).double(), nearest(x, grid))


@quantised
def test_a_zero_token_is_exact(kind):
    x = TOKENS.clone()
    x[1, 2] = 0
    got = quantise_tokens(x, kind)
    assert not got[1, 2].any() and got.isfinite().all()
    assert not quantise_tokens(torch.zeros(2, 5), kind).any()


@quantised
def test_a_tiny_token_is_finite(kind):
    assert quantise_tokens(torch.tensor([[1e-44, 0.0, -1e-45]]), kind).isfinite().all()


@quantised
def test_a_token_depends_on_itself_alone(kind):
    """So results do not depend on the batch's other examples, or on its padding."""
    whole, x = quantise_tokens(TOKENS, kind), TOKENS.clone()
    x[1, 2] *= 1000
    assert torch.equal(quantise_tokens(TOKENS[:1, 2:], kind), whole[:1, 2:])
    changed = (quantise_tokens(x, kind) != whole).any(-1)
    assert changed[1, 2] and changed.sum() == 1


@quantised
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(kind, dtype):
    """Scales and codes in float32, then the input's type."""
    x = gaussian(5, 9).to(dtype)
    assert torch.equal(quantise_tokens(x, kind), quantise_tokens(x.float(), kind).to(dtype))


@quantised
def test_gradients_go_straight_through(kind):
    x, weight = TOKENS.clone().requires_grad_(), gaussian(3, 4, 9, seed=1)
    rounded = quantise_tokens(x, kind)
    assert torch.equal(rounded, quantise_tokens(TOKENS, kind))
    (gradient,) = torch.autograd.grad((rounded * weight).sum(), x)
    assert torch.equal(gradient, weight)


def test_activations_as_they_are():
    assert quantise_tokens(TOKENS, "none") is TOKENS and set(ACTIVATIONS) == {"none", *TOKEN_GRIDS}


# ---------------------------------------------------------------- saving


@every_grid
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 128), (2, 129), (5, 257), (6,)])
def test_parts_come_back_and_have_the_promised_shapes(weights, residual, shape):
    stored = encode(gaussian(*shape), weights, residual)
    parts = stored.parts()
    assert {s: (p.dtype, p.shape) for s, p in parts.items()} == stored_parts(torch.Size(shape), weights, residual)
    again = from_parts({s: p.clone() for s, p in parts.items()}, torch.Size(shape), weights, residual)
    assert type(again) is type(stored) and again.shape == stored.shape == torch.Size(shape)
    assert torch.equal(again.read(), stored.read())
    for a, b in zip(parts.values(), again.parts().values(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 7), (6,)])
def test_floats_come_back(weights, shape):
    stored = encode(gaussian(*shape), weights)
    assert {s: (p.dtype, p.shape) for s, p in stored.parts().items()} == stored_parts(torch.Size(shape), weights)
    assert torch.equal(from_parts(stored.parts(), torch.Size(shape), weights).value, stored.value)


def refused(parts: dict, weights: str, residual: int, told: str, shape=(3, 5)) -> None:
    with pytest.raises(ValueError) as error:
        from_parts(parts, torch.Size(shape), weights, residual)
    assert told in str(error.value)


@every_grid
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, 7e-31, np.inf, -np.inf, np.nan])
def test_scales_must_be_finite_and_far_from_0(weights, residual, value):
    parts = encode(gaussian(3, 5), weights, residual).parts()
    parts[".scale"][1] = value
    refused(parts, weights, residual, ".scale must hold finite numbers of at least 8e-31")


@every_grid
def test_parts_must_have_the_right_types(weights, residual):
    for suffix, (dtype, _) in stored_parts(torch.Size((3, 5)), weights, residual).items():
        for other in {torch.int8, torch.uint8, torch.float8_e5m2, torch.float16} - {dtype}:
            parts = encode(gaussian(3, 5), weights, residual).parts()
            parts[suffix] = parts[suffix].to(other)
            refused(parts, weights, residual, f"{suffix} is {other}, expected {dtype}")


@pytest.mark.parametrize("weights", BYTES)
def test_bytes_that_are_no_numbers_are_refused(weights):
    """All 256: e4m3 has one NaN of each sign, e5m2 three and infinities."""
    number, top = torch.arange(256).to(torch.uint8).view(BYTES[weights]), points(weights)[-1].item()
    for byte in range(256):
        parts = {"": number[byte].expand(1, 1).clone(), ".scale": torch.ones(1, 1)}
        if number[byte].double().isfinite():
            assert from_parts(parts, torch.Size((1, 1)), weights).read().item() == number[byte].double()
        else:
            refused(parts, weights, 0, f" holds codes outside [-{top}, {top}]", (1, 1))
    assert (~number.double().isfinite()).sum() == {"fp8": 2, "fp8-e5m2": 8}[weights]


@pytest.mark.parametrize("weights, residual", [case for case in CODES if case[0] in TOPS])
def test_integers_without_a_mirror_image_are_refused(weights, residual):
    """-128 and -8, with any residual."""
    top, unit = TOPS[weights], 2**residual
    cases = {(-top - 1, -unit // 2), (-top - 1, unit // 2 - 1)} if residual else {(-top - 1, 0)}
    for code, rest in cases:
        parts = encode(torch.zeros(3, 5), weights, residual).parts()
        codes, rests = torch.zeros(2, 3, 5, dtype=torch.int64)
        codes[2, 4], rests[2, 4] = code, rest
        parts[""] = packed(codes, INTEGERS[weights]).view(parts[""].dtype)
        if residual:
            parts[".residual"] = packed(rests, residual)
        refused(parts, weights, residual, f" holds codes outside [-{top}, {top}]")


def test_every_chunk_of_codes_is_checked():
    rows = 2 * next(row_chunks(torch.Size((10**6, 64)), torch.device("cpu"))).stop + 1
    parts = {"": torch.zeros(rows, 64, dtype=torch.int8), ".scale": torch.ones(rows, 1)}
    parts[""][-1, -1] = -128
    refused(parts, "int8", 0, "[-127, 127]", (rows, 64))


@pytest.mark.parametrize("weights, residual, oracle, told", [
    ("int3", 0, False, "weights must be one of fp32, bf16, int8, int4, fp8, fp8-e5m2, got 'int3'"),
    ("int8", 3, False, "residual must be one of 0, 1, 2, 4, 8 bits, got 3"),
    ("int4", -1, False, "got -1"),
    ("fp8", 4, False, "a residual needs weights int8 or int4, got fp8"),
    ("bf16", 1, False, "a residual needs weights int8 or int4, got bf16"),
    ("fp8-e5m2", 0, True, "the oracle needs weights int8 or int4, got fp8-e5m2"),
])  # fmt: skip
def test_formats_that_do_not_go_together(weights, residual, oracle, told):
    for call in (check_format, lambda *form: encode(torch.zeros(2, 2), *form)):
        with pytest.raises(ValueError) as error:
            call(weights, residual, oracle)
        assert told in str(error.value)


@pytest.mark.parametrize("shared", [False, True])
def test_products_of_fp8_codes_are_those_of_fake_quantised_numbers(shared):
    """Each probe's own weights, or one for all.  The sum is in float32, then rounded to bfloat16."""
    x, w = gaussian(2, 5, 64), gaussian(2, 48, 64)[: 1 if shared else 2]
    stores = [encode(matrix, "fp8") for matrix in w]
    scale = stores[0].scale
    codes = torch.stack([stored.codes for stored in stores])
    got = multiply_fp8(x.bfloat16(), codes, scale)
    want = quantise_tokens(x.bfloat16().float(), "fp8") @ (codes.float() * scale).mT
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert ((got - want).abs() <= 2**-8 * want.abs() + 1e-5).all()
