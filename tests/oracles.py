"""Brute-force definitions that several test files share: slow, plain, and written without the code that they judge.

A grid is the list of all its points in float64.  What a store holds is read bit by bit from the tensors that it saves,
and what a store is to hold is written there bit by bit.  Draws are keyed, so a test that passes once passes always.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from statistics import NormalDist

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from quant import FLOATS, Float, Store, from_tensors
from random_bits import Key, Purpose, bits32, philox_blocks

settings.register_profile("keyed", deadline=None, derandomize=True)  # a busy machine is not a failure
settings.load_profile("keyed")

MAX_CODES = {"int8": 127, "int4": 7}
BITS = {"int8": 8, "int4": 4}
QUANTISED = (*MAX_CODES, "fp8")
GRIDS = [*product(MAX_CODES, (0, 1, 2, 4, 8)), ("fp8", 0)]  # every quantised format with its residual bits
ALL = slice(None)  # rows


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of shape, dtype and every bit: -0 is not 0, and fp8 compares on any device."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_tensors(a: Store, b: Store) -> bool:
    """Whether two stores would save the same bits under the same names."""
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(same_bits(a[suffix], b[suffix]) for suffix in a)


# ---------------------------------------------------------------- random bits

KEY = Key(seed=0x0123456789ABCDEF, step=7, query=3, tensor=0xDEADBEEF)
WORD = st.integers(0, 2**32 - 1)


def signed(word: int) -> int:
    """The int32 with the bits of a word of 32."""
    return word - 2**32 if word >> 31 else word


def patterns(words: list[int]) -> Tensor:
    """Words of 32 bits as random bits come: int32 bit patterns."""
    return torch.tensor([signed(word) for word in words], dtype=torch.int32)


def words_like(x: Tensor, key: Key = KEY) -> Tensor:
    """32 random bits for each element of a matrix, as a step's rounding draws them."""
    return bits32(key, Purpose.WEIGHT_ROUNDING, torch.arange(x.shape[0]), x.shape[1])


# ---------------------------------------------------------------- grids: all points, and the nearest of them


@cache
def points(weights: str, residual: int = 0) -> Tensor:
    """All numbers that a code can stand for before its scale, ascending, [n] float64.

    With b residual bits: all that code and residual can stand for together, which lie halfway between whole fine steps.
    """
    if weights == "bf16":
        number = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).double()
    elif weights == "fp8":
        number = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    else:
        end, unit = MAX_CODES[weights], 2**residual
        rests = range(-unit // 2, unit // 2) if residual else [0]
        half = 0.5 if residual else 0
        fine = {code * unit + rest + half for code in range(-end, end + 1) for rest in rests}
        assert fine == {-x for x in fine}
        number = torch.tensor([x / unit for x in fine], dtype=torch.float64)
    return number[number.isfinite()].unique()


def everywhere(weights: str, residual: int = 0) -> Tensor:
    """Up to 255 points of a grid, ends and zero included.  bf16 rounds up to infinity, so its last are left out; fp32,
    which has too many to list, has bf16's."""
    grid = points("bf16", 0)[512:-512] if weights in FLOATS else points(weights, residual)
    return grid[torch.linspace(0, len(grid) - 1, min(len(grid), 255)).round().long()]


def neighbours(x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The last point up to x and the first one from x on; beyond the ends the end."""
    below = torch.searchsorted(grid, x, right=True) - 1
    return grid[below.clamp(min=0)], grid[torch.searchsorted(grid, x).clamp(max=len(grid) - 1)]


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """The nearest point, ties to even.  Counted from zero, in the middle, every other point is even: an integer, or an
    fp8 mantissa, since codes of fp8 count through the binades without a gap.  With a residual there is no zero: ties go
    outwards."""
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


# ---------------------------------------------------------------- stores, read and written by hand


def fields(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Two's complement numbers in packed bytes, one bit after the other, the lowest first: [R, columns] int64."""
    bit = np.unpackbits(packed.numpy().view(np.uint8), axis=1, bitorder="little")[:, : bits * columns]
    place = 2 ** np.arange(bits)
    place[-1] *= -1
    return torch.from_numpy(bit.reshape(len(packed), columns, bits).astype(np.int64) @ place)


def packed(number: Tensor, bits: int) -> Tensor:
    """The inverse of fields, uint8: what does not fill the last byte is 0."""
    bit = number[..., None] >> torch.arange(bits) & 1
    return torch.from_numpy(np.packbits(bit.flatten(1).numpy().astype(np.uint8), axis=1, bitorder="little"))


def columns_of(stored: Store) -> int:
    """A tensor is a matrix by its first axis."""
    return math.prod(stored.shape[1:])


def codes_of(stored: Store, weights: str) -> Tensor:
    """The codes in a store's tensors, [R, C] float64."""
    code = stored.tensors()[""]
    return (fields(code, BITS[weights], columns_of(stored)) if weights in BITS else code).double()


def numbers(stored: Store, weights: str, residual: int = 0) -> Tensor:
    """What a store's tensors stand for in units of the scale, residuals included: [R, C] float64."""
    if weights == "bf16":
        return stored.tensors()[""].double()
    rest = 0
    if residual:
        rest = fields(stored.tensors()[".residual"], residual, columns_of(stored)).double() + 0.5
    return codes_of(stored, weights) + rest / 2**residual


GROUP = 32  # columns that share one int4 scale


def scales_of(stored: Store, weights: str) -> Tensor:
    """Each element's own scale, [R, C] float32: its row's, or of int4 its group of 32 columns'."""
    if weights in FLOATS:
        return torch.ones(stored.shape)
    scale = stored.tensors()[".scale"]
    return torch.stack([scale[:, c // GROUP if weights == "int4" else 0] for c in range(columns_of(stored))], 1).float()


def store_of(number: Tensor, weights: str, residual: int = 0, unit: float = 0.37) -> Store:
    """The store that holds these numbers, [R, C] float64 of the grid; scales differ by row and by group."""
    R, C = number.shape
    if weights in FLOATS:
        return Float(number.to(torch.bfloat16 if weights == "bf16" else torch.float32))
    scale = unit * 2.0 ** torch.arange(R * -(-C // GROUP)).remainder(5).view(R, -1)
    tensors = {".scale": scale.bfloat16() if weights == "int4" else scale[:, :1].contiguous()}
    if weights == "fp8":
        tensors[""] = number.float().to(torch.float8_e4m3fn)
    else:
        fine = (number * 2**residual).floor().long()
        code = (number + 0.5 * (residual > 0)).floor().long()
        tensors[""] = packed(code, BITS[weights]).view(torch.int8 if weights == "int8" else torch.uint8)
        if residual:
            tensors[".residual"] = packed(fine - code * 2**residual, residual)
    return from_tensors(tensors, torch.Size((R, C)), weights, residual)


# ---------------------------------------------------------------- directions

CLIP = 4  # sigma: the ends of the table and of every quantised direction


@cache
def normal_numbers() -> Tensor:
    """The 65,536 equally likely numbers of a direction in units of 2^-14 sigma, [2^16] int64.

    The half-normal quantile function at 2,049 knots, rounded to 2^-12 sigma, its infinite end put at CLIP; 16 midpoints
    on the straight line between two knots, rounded half up; then their mirror image.
    """
    knots = [round(NormalDist().inv_cdf(0.5 + j / 4096) * 2**12) for j in range(2048)] + [CLIP * 2**12]
    low, high = (torch.tensor(ends, dtype=torch.float64)[:, None] * 4 for ends in (knots[:-1], knots[1:]))
    half = (low + (high - low) * (torch.arange(16) + 0.5) / 16 + 0.5).floor().flatten().long()
    return torch.cat((half, -half))


def levels(bits: int) -> int:
    """Codes of a quantised direction on each side of 0, which reach to CLIP."""
    return 2 ** (bits - 1) - 1


def moments(bits: int | None) -> tuple[Tensor, Tensor]:
    """E[Q(u)^2 | u] and E[Q(u)^4 | u] for each of the table's u in sigma, [2^16] float64 each: Q(u) is one of u's two
    neighbours, the upper one with probability f, how far u is on the way there.  bits None: u itself."""
    table = normal_numbers()
    if bits is None:
        u = table.double() / 2**14
        return u**2, u**4
    low, f = table * levels(bits) // 2**16, (table * levels(bits) % 2**16).double() / 2**16
    step = CLIP / levels(bits)
    return tuple(step**k * ((1 - f) * low.double() ** k + f * (low + 1).double() ** k) for k in (2, 4))


def bracket(x: Tensor, far: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """The points nearest to x that are at least `far` below and above it, [..] float64.  Integers go on beyond their
    ends, other grids do not; fp32 is its own grid."""
    if weights == "fp32":
        return (x - far).float().double(), (x + far).float().double()
    grid = torch.arange(-(2**14), 2**14).double() if weights in MAX_CODES else points(weights)
    return neighbours(x - far, grid)[0], neighbours(x + far, grid)[1]


def sparse_direction(stored: Store, weights: str, key: Key, eps: float, cell: int) -> tuple[Tensor, ...]:
    """Element by element: the weights at w + eps u and at w - eps u, and eps u, [R, C] float32; the bits by which a
    step lands, int32.

    Elements are numbered row by row, rows filled up to whole eights.  Of Philox block j, words 0 to 3: the element of
    cell j that they are about; whether it moves, with a chance of (t / M)^2; up or down; the landing.
    """
    (R, C), t = stored.matrix_shape, torch.tensor(eps * cell**0.5)
    if weights == "fp32" or len(stored.shape) < 2:
        weights, x, scale = "fp32", stored.dequantise(), torch.ones(R, C)
    else:
        x, scale = codes_of(stored, weights).view(R, C), scales_of(stored, weights).view(R, C)
    place = torch.arange(R)[:, None] * 8 * math.ceil(C / 8) + torch.arange(C)
    words = philox_blocks(key, Purpose.DIRECTION, torch.arange(int(place.max()) // cell + 1), 8)[:, 0]
    where, whether, way, landing = (words[place // cell].long() & 0xFFFFFFFF).unbind(-1)
    low, high = bracket(x.double(), t.double() / scale.double(), weights)
    chance = (t / ((high - low) / 2 * scale)).clamp(max=1) ** 2
    hit, up = (where % cell == place % cell) & (whether < chance * 2**32), way >= 2**31
    low, high, w = low.float(), high.float(), stored.dequantise().float()
    half = (high - low) * 0.5 * scale
    plus, minus = (torch.where(hit, torch.where(up == side, high, low) * scale, w) for side in (True, False))
    return plus, minus, torch.where(up, half, -half) * hit, words[place // cell][..., 3]
