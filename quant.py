"""Rounding onto grids, and the stores that keep a weight: fake-quantised floats, packed codes, fp8 codes, floats.

Stochastic rounding is QuZO's eq. 5: E[SR(x)] = x inside the grid's range.  Integer quantisation is defined by
FakeQuantised, which keeps every weight as the fp32 number that its code stands for; Integers keeps the codes alone,
packed, and agrees with it bit for bit after any number of steps.  `encode` says which tensor gets which store.

Shape key: R rows (output features), C columns (input features, all axes after the first), r some of the rows,
G scale groups a row.  Imports nothing of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- rounding; without random bits to nearest


def stochastic_round(x: Tensor, random_bits: Tensor | None) -> Tensor:
    """QuZO eq. 5: floor(x) + Bernoulli(x - floor(x)), so that E[SR(x)] = x.

    x float32, random_bits int32 (the upper 31 bits are used), same shape -> integers in float32.  Sign and size are
    treated apart, because a size's fraction is exact in float32 and a negative number's floor is not: x = -1e-9 would
    give a fraction of exactly 1.  P(up) is the fraction rounded down to a multiple of 2^-31.
    random_bits None rounds to nearest, ties to even.
    """
    if random_bits is None:
        return x.round()
    size = x.abs()
    whole = size.floor()
    threshold = (size - whole).mul_(2.0**31).to(torch.int32)  # exact: a power of two, then truncation
    up = (random_bits >> 1 & 0x7FFFFFFF) < threshold
    return whole.add_(up).copysign_(x)


def round_to_bfloat16(x: Tensor, random_bits: Tensor | None) -> Tensor:
    """Stochastic rounding of float32 to bfloat16, its upper half: add 16 random bits, then cut the lower half.

    P(up) is the dropped fraction, exactly.  Numbers that are bfloat16 already stay as they are.
    """
    return x.to(torch.bfloat16) if random_bits is None else _cut(x, random_bits, 16).to(torch.bfloat16)


def _cut(x: Tensor, random_bits: Tensor, dropped_bits: int) -> Tensor:
    """Stochastic rounding of float32 to its upper bits; the exponent absorbs a carry, as it should.

    It takes the upper random bits, as stochastic_round does: those are an element's own (random_bits.bits32).
    """
    pattern = x.view(torch.int32) + (random_bits >> 32 - dropped_bits & (1 << dropped_bits) - 1)
    return (pattern & -(1 << dropped_bits)).view(torch.float32)


class Fp8Format(NamedTuple):
    """An 8-bit floating-point grid: 2^e * (1 + m / 2^mantissa_bits) for e >= min_exponent, evenly spaced below."""

    dtype: torch.dtype
    mantissa_bits: int
    min_exponent: int  # of the smallest normal number
    max_value: float

    def round(self, x: Tensor, random_bits: Tensor | None) -> Tensor:
        """float32 -> this grid, in its dtype; sizes beyond the largest become the largest.  P(up) is exact to 2^-20.

        A number that rounds stochastically to zero becomes +0.  Needs subnormal numbers (no set_flush_denormal).
        """
        x = x.clamp(-self.max_value, self.max_value)
        if random_bits is None:
            return x.to(self.dtype)
        down = 2.0 ** (-126 - self.min_exponent)  # takes the even part to float32's own, where a cut is as even
        return _cut(x * down, random_bits, 23 - self.mantissa_bits).mul_(1 / down).add_(0.0).to(self.dtype)


def outward(away_from_zero: Tensor) -> Tensor:
    """Random bits [..] int32 that are none: a cut by them goes away from zero where it is told to, else towards it."""
    return -away_from_zero.to(torch.int32)


E4M3 = Fp8Format(torch.float8_e4m3fn, 3, -6, 448.0)
CODES = (E4M3.dtype, torch.int8)  # that a forward can multiply


# ---------------------------------------------------------------- the definition: fake quantisation

Places = tuple[Tensor, Tensor]  # single elements of a matrix: row and column of each, [K] int64


class Store:
    """How one tensor is kept, read and stepped.  `rows` picks rows of it as a matrix [R, C], by a slice or by their
    numbers; or, as a pair (row, column) [K] int64 each, single elements, and [r, C] is then [K].

    dequantise(rows)                                the weights that a forward sees, [r, C] float32 (floats: as stored)
    add_rounded(rows, delta, random_bits)           the grid point that w + delta becomes, [r, C] float32; no write
    bracket(places, t)                              of elements: the grid points nearest to w that are at least t
                                                    below and above it, [K] float32 each, in units [K] of their own
    add_rounded_(rows, delta, random_bits)          moves there, the only method that writes -> landing_counts
    tensors()                                       what is saved and hashed, by suffix of the tensor's name
    """

    shape: torch.Size
    matrix_shape: tuple[int, int]  # (R, C)
    device: torch.device
    rounds = True  # whether the two additions need random bits

    def describe(self, tensor: Tensor, shape: torch.Size) -> None:
        self.shape, self.matrix_shape, self.device = shape, matrix_shape(shape), tensor.device

    def bracket(self, places: Places, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of integer codes: code - m, code + m and the scale, m the least whole number of spacings that reaches t.

        It may lie outside of the range: a probe reads numbers, and only a step is held inside.
        """
        code, step = self.code(places).float(), self.spacing(places)
        m = (torch.full_like(step, t) / step).ceil_()
        return code - m, code + m, step


COUNTED, FARTHEST = 5, 2.0**16


def landing_counts(old: Tensor, new: Tensor, lost: Tensor | None = None, spacing: float = 1.0) -> Tensor:
    """How a step landed, [COUNTED] int64: elements that changed, elements that were to move, and of these how many the
    edge of the grid held back; then, added up, how far they were to move and what the edge took of that, in spacings.

    old, new: numbers on the grid, float32.  lost: how far beyond the edge each was to go (counted up to FARTHEST), 0
    elsewhere; None for floats, which have no edge.
    """
    changed = new != old
    if lost is None:
        zero = torch.zeros_like(changed.sum())
        return torch.stack((changed.sum(), changed.sum(), zero, zero, zero))
    held, lost = lost > 0, lost.clamp(max=FARTHEST)
    way, lost = (((new - old).abs() + lost) / spacing).long(), (lost / spacing).long()
    return torch.stack((changed.sum(), (changed | held).sum(), held.sum(), way.sum(), lost.sum()))


@dataclass
class FakeQuantised(Store):
    """Integer quantisation by definition (`--oracle`): w = code * scale kept as fp32, with nothing packed.

    The code is round(w / scale) in [-max_code, max_code]; a step is w <- (code + SR(delta / scale)) * scale.
    With b residual bits steps land on a grid finer by 2^b whose points lie at halves of a fine step, so that none is
    halfway between two codes: w = (fine + 1/2) * scale / 2^b is kept, and a forward reads the nearest code.
    """

    value: Tensor  # [R, C] fp32
    scale: Tensor  # [R, C] fp32: each element's own
    bits: int
    residual_bits: int
    group_scale: Tensor  # [R, G]: the scales once each, to save

    def __post_init__(self):
        self.describe(self.value, self.value.shape)

    @classmethod
    def encode(cls, tensor: Tensor, bits: int, residual_bits: int = 0) -> FakeQuantised:
        matrix = tensor.flatten(1)
        group = group_size(bits, matrix.shape[1])
        largest = torch.stack([columns.abs().amax(1) for columns in matrix.float().split(group, 1)], 1)
        scales = integer_scales(largest, bits)
        scale = scales.float().repeat_interleave(group, 1)[:, : matrix.shape[1]]
        store = cls(matrix, scale, bits, residual_bits, scales)
        store.value = store.weight(nearest_fine(matrix.float() / store.fine_step(), store.max_fine, residual_bits))
        store.describe(store.value, tensor.shape)
        return store

    @classmethod
    def of(cls, stored: Integers) -> FakeQuantised:
        every = slice(None)
        scale = stored.spacing(every).expand(stored.matrix_shape)
        store = cls(scale, scale, stored.bits, stored.residual_bits, stored.scale)
        store.value = store.weight(stored.fine(every))
        store.describe(store.value, stored.shape)
        return store

    @property
    def max_fine(self) -> float:
        return (2 ** (self.bits - 1) - 1) * 2**self.residual_bits + (2**self.residual_bits - 1) // 2

    @property
    def half(self) -> float:
        """How far a fine point is from the multiples of the fine step."""
        return 0.5 if self.residual_bits else 0.0

    def weight(self, fine: Tensor, rows: slice | Tensor | Places = slice(None)) -> Tensor:
        return (fine + self.half) * self.fine_step(rows)

    def fine_step(self, rows: slice | Tensor | Places = slice(None)) -> Tensor:
        return self.scale[rows] / 2**self.residual_bits

    def fine(self, rows: slice | Tensor | Places = slice(None)) -> Tensor:
        return (self.value[rows] / self.fine_step(rows) - self.half).round()

    def tensors(self) -> dict[str, Tensor]:
        """Packed codes and scales, the tensors that Integers saves."""
        packed = Integers.empty(self.shape, self.bits, self.residual_bits, self.group_scale)
        packed.write(slice(None), self.fine())
        return packed.tensors()

    def spacing(self, rows: slice | Tensor | Places) -> Tensor:
        return self.scale[rows]

    def code(self, rows: slice | Tensor | Places) -> Tensor:
        return (self.value[rows] / self.scale[rows]).round()

    def dequantise(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return self.code(rows) * self.scale[rows]

    def add_rounded(self, rows: slice | Tensor, delta: Tensor, random_bits: Tensor | None) -> Tensor:
        max_code = 2 ** (self.bits - 1) - 1
        code = self.code(rows) + stochastic_round(delta / self.scale[rows], random_bits)
        return code.clamp(-max_code, max_code) * self.scale[rows]

    def add_rounded_(self, rows: slice | Places, delta: Tensor, random_bits: Tensor | None) -> Tensor:
        old = self.fine(rows)
        wanted = old + stochastic_round(delta / self.fine_step(rows), random_bits)
        new = wanted.clamp(-self.max_fine - 2 * self.half, self.max_fine)
        self.value[rows] = self.weight(new, rows)
        return landing_counts(old, new, (wanted - new).abs())


# ---------------------------------------------------------------- packed integer codes

GROUP_SIZE = 32  # input columns that share one int4 scale, of 16 bits: 4.5 bits a weight in all


def group_size(bits: int, columns: int) -> int:
    """How many of a row's columns share a scale."""
    return max(columns, 1) if bits == 8 else GROUP_SIZE


def integer_scales(largest: Tensor, bits: int) -> Tensor:
    """Scales [R, G] that take each group's largest size to the largest code; int4's as bfloat16."""
    scale = positive_scales(largest, 2 ** (bits - 1) - 1)
    return scale if bits == 8 else scale.to(torch.bfloat16)


MIN_SCALE = 2.0**-100  # 1e-30: far from where float32 loses bits, also for the fine steps and fp8's spacing


@dataclass
class Integers(Store):
    """A matrix kept as int8 codes [R, C] or packed int4 codes, uint8 [R, ceil(C / 2)]: w = code * scale.

    int8 has one float32 scale per output channel, scale [R, 1]; int4 one bfloat16 scale per group of 32 columns,
    [R, ceil(C / 32)].  Codes reach from -max_code to max_code, 127 or 7: the lowest two's complement number is unused,
    so that +w and -w quantise alike.  Scales never change after encoding, so a group's grid stays the same.

    With b residual bits the store is finer by 2^b: fine = code * 2^b + residual, with the residual in
    [-2^(b-1), 2^(b-1)) packed beside the code, and stands for fine + 1/2 fine steps (FakeQuantised says why).
    """

    codes: Tensor
    scale: Tensor
    shape: torch.Size
    bits: int
    residual: Tensor | None = None  # uint8 [R, ceil(C * residual_bits / 8)]
    residual_bits: int = 0

    def __post_init__(self):
        self.describe(self.codes, self.shape)
        self.max_code = 2 ** (self.bits - 1) - 1
        # the largest fine number whose code is max_code, and the smallest whose code is -max_code
        self.max_fine = self.max_code * 2**self.residual_bits + (2**self.residual_bits - 1) // 2
        self.min_fine = -self.max_fine - (self.residual_bits > 0)

    @classmethod
    def encode(cls, tensor: Tensor, bits: int, residual_bits: int = 0, scale: Tensor | None = None) -> Integers:
        """Round a float tensor to nearest on the fine grid.  Without scales a group's largest size is max_code."""
        matrix = tensor.flatten(1)
        chunks = row_chunks(tuple(matrix.shape), matrix.device)  # no second copy of a large matrix in float32
        if scale is None:
            largest = torch.cat([_group_max(matrix[rows].float(), bits) for rows in chunks])
            scale = integer_scales(largest, bits)
        stored = cls.empty(tensor.shape, bits, residual_bits, scale)
        for rows in chunks:
            fine_steps = matrix[rows].float() / (stored.spacing(rows) * 2.0**-residual_bits)
            stored.write(rows, nearest_fine(fine_steps, stored.max_fine, residual_bits))
        return stored

    @classmethod
    def empty(cls, shape: torch.Size, bits: int, residual_bits: int, scale: Tensor) -> Integers:
        """Unwritten codes and residuals for a tensor of this shape, on the scales' device."""
        R, C = matrix_shape(shape)
        codes = torch.empty(R, -(-C * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8, device=scale.device)
        residual = None
        if residual_bits:
            residual = torch.empty(R, -(-C * residual_bits // 8), dtype=torch.uint8, device=scale.device)
        return cls(codes, scale, shape, bits, residual, residual_bits)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"": self.codes, ".scale": self.scale}
        return tensors if self.residual is None else tensors | {".residual": self.residual}

    def code(self, rows: slice | Tensor | Places) -> Tensor:
        """[r, C], int8 or int32."""
        return self.codes[rows] if self.bits == 8 else read_packed(self.codes, rows, self.bits, self.matrix_shape[1])

    def fine(self, rows: slice | Tensor | Places) -> Tensor:
        """The whole stored number, code * 2^b + residual, [r, C] float32 (below 2^16: exact)."""
        code = self.code(rows).float()
        if self.residual is None:
            return code
        residual = read_packed(self.residual, rows, self.residual_bits, self.matrix_shape[1])
        return code.mul_(2**self.residual_bits).add_(residual)

    def write(self, rows: slice | Places, fine: Tensor) -> None:
        """Store whole numbers [r, C] float32."""
        code = fine
        if self.residual is not None:
            unit = 2**self.residual_bits
            code = ((fine + unit // 2) / unit).floor_()  # the nearest code; exact, a power of two
            write_packed(self.residual, rows, self.residual_bits, fine - code * unit)
        if self.bits == 8:
            self.codes[rows] = code.to(torch.int8)
        else:
            write_packed(self.codes, rows, self.bits, code)

    def spacing(self, rows: slice | Tensor | Places) -> Tensor:
        """The scale of each element, [r, 1] or [r, C]."""
        if isinstance(rows, tuple):
            return self.scale[rows[0], rows[1] // group_size(self.bits, self.matrix_shape[1])].float()
        scale = self.scale[rows].float()
        return scale if scale.shape[1] == 1 else scale.repeat_interleave(GROUP_SIZE, 1)[:, : self.matrix_shape[1]]

    def dequantise(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Rows [r, C] as float32."""
        return self.code(rows) * self.spacing(rows)

    def rounded_code(self, rows: slice | Tensor, delta: Tensor, random_bits: Tensor | None) -> tuple[Tensor, Tensor]:
        """code + SR(delta / scale), held inside the range, and how far beyond it was to go, float32 [r, C] each."""
        wanted = stochastic_round(delta / self.spacing(rows), random_bits).add_(self.code(rows))
        code = wanted.clamp(-self.max_code, self.max_code)
        return code, wanted.sub_(code).abs_()

    def add_rounded(self, rows: slice | Tensor, delta: Tensor, random_bits: Tensor | None) -> Tensor:
        """(code + SR(delta / scale)) * scale, held inside the range.  delta [r, C] float32."""
        return self.rounded_code(rows, delta, random_bits)[0].mul_(self.spacing(rows))

    def add_rounded_(self, rows: slice | Places, delta: Tensor, random_bits: Tensor | None) -> Tensor:
        """fine += SR(delta / fine step), held inside the range (QuZO's Algorithm 1).  delta [r, C] float32."""
        old = self.code(rows).float() if self.residual is None else self.fine(rows)
        fine_step = self.spacing(rows) * 2.0**-self.residual_bits
        wanted = stochastic_round(delta / fine_step, random_bits).add_(old)
        new = wanted.clamp(self.min_fine, self.max_fine)
        self.write(rows, new)
        return landing_counts(old, new, (wanted - new).abs())


def nearest_fine(x: Tensor, max_fine: int, residual_bits: int) -> Tensor:
    """x in fine steps, float32 -> the number of the nearest fine point."""
    if not residual_bits:
        return x.round().clamp_(-max_fine, max_fine)
    size = x.abs().floor_().clamp_(max=max_fine)
    return torch.where(x < 0, -1 - size, size)  # points are at 1/2, 3/2, ... and -1/2, -3/2, ...


def _group_max(rows: Tensor, bits: int) -> Tensor:
    """The largest size in each scale group, [r, C] -> [r, G]; the last group may be short."""
    if bits == 8:
        return rows.abs().amax(1, keepdim=True)
    return F.pad(rows.abs(), (0, -rows.shape[1] % GROUP_SIZE)).unflatten(1, (-1, GROUP_SIZE)).amax(2)


def positive_scales(largest: Tensor, max_code: float) -> Tensor:
    """Scales that take the largest sizes to max_code.

    A group of zeros is exact under any scale.  It gets the largest scale of the matrix rather than 0, because a step
    divides by it.  So does a group whose scale would be under MIN_SCALE.
    """
    scale = largest / torch.full_like(largest, max_code)  # by a number, CUDA would multiply by a rounded reciprocal
    scale = torch.where(scale >= MIN_SCALE, scale, scale.amax())
    return torch.where(scale >= MIN_SCALE, scale, 1.0)


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Signed numbers [r, C] of 1, 2, 4 or 8 bits, two's complement -> uint8 [r, ceil(C * bits / 8)].

    The first column is in the lowest bits of a byte; a last byte that is not full ends in zeros.
    """
    per_byte = 8 // bits
    padded = F.pad(numbers.to(torch.int8).view(torch.uint8), (0, -numbers.shape[1] % per_byte))
    fields = padded & (1 << bits) - 1
    return sum(fields[:, i::per_byte] << bits * i for i in range(per_byte))


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack_bits: uint8 [r, B] -> int32 [r, columns]."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.int32)
    fields = packed.to(torch.int32)[..., None] >> shifts & (1 << bits) - 1
    half = 1 << bits - 1
    return ((fields ^ half) - half).flatten(1)[:, :columns]


def read_packed(packed: Tensor, rows: slice | Tensor | Places, bits: int, columns: int) -> Tensor:
    """Packed numbers of chosen rows, int32 [r, columns], or of single elements [K]."""
    if not isinstance(rows, tuple):
        return unpack_bits(packed[rows], bits, columns)
    row, column = rows
    field, half = packed[row, column * bits // 8].to(torch.int32) >> column * bits % 8 & (1 << bits) - 1, 1 << bits - 1
    return (field ^ half) - half


def write_packed(packed: Tensor, rows: slice | Places, bits: int, numbers: Tensor) -> None:
    """The inverse of read_packed, in place.  No two of the elements may share a byte: one would undo the other."""
    if not isinstance(rows, tuple):
        packed[rows] = pack_bits(numbers, bits)
        return
    row, column = rows
    shift, mask = column * bits % 8, (1 << bits) - 1
    others = packed[row, column * bits // 8].to(torch.int64) & ~(mask << shift)
    packed[row, column * bits // 8] = (others | (numbers.to(torch.int64) & mask) << shift).to(torch.uint8)


# ---------------------------------------------------------------- fp8 codes, and plain floats


FP8_SPACING = 2.0**-9  # of the smallest codes


@dataclass
class Fp8(Store):
    """A matrix kept as e4m3 codes [R, C] and one float32 scale per output channel [R, 1]: w = code * scale.

    The grid is uneven: its spacing is a 16th to an 8th of the weight.
    """

    codes: Tensor
    scale: Tensor
    shape: torch.Size
    max_code = E4M3.max_value

    def __post_init__(self):
        self.describe(self.codes, self.shape)

    @classmethod
    def encode(cls, tensor: Tensor, scale: Tensor | None = None) -> Fp8:
        """Round a float tensor to nearest.  Without given scales a row's largest size is the grid's largest."""
        matrix = tensor.flatten(1)
        chunks = row_chunks(tuple(matrix.shape), matrix.device)
        if scale is None:
            largest = torch.cat([matrix[rows].float().abs().amax(1, keepdim=True) for rows in chunks])
            scale = positive_scales(largest, E4M3.max_value)
        codes = torch.empty(matrix.shape, dtype=E4M3.dtype, device=matrix.device)
        for rows in chunks:
            codes[rows] = E4M3.round(matrix[rows].float() / scale[rows], None)
        return cls(codes, scale, tensor.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.codes, ".scale": self.scale}

    def code(self, rows: slice | Tensor | Places) -> Tensor:
        """[r, C] float32.  Through bytes, because torch does not index fp8 by a tensor on every device."""
        return self.codes.view(torch.uint8)[rows].view(self.codes.dtype).float()

    def unit(self, rows: slice | Tensor | Places) -> Tensor:
        """The scales, [r, 1] or [K]."""
        return self.scale[rows[0], 0] if isinstance(rows, tuple) else self.scale[rows]

    def dequantise(self, rows: slice | Tensor | Places = slice(None)) -> Tensor:
        """Rows [r, C] as float32."""
        return self.code(rows).mul_(self.unit(rows))

    def bracket(self, places: Places, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of an uneven grid: what lies around code - t / scale and code + t / scale, away from the code."""
        code, unit = self.code(places), self.unit(places)
        far = torch.full_like(unit, t) / unit
        below, above = code - far, code + far
        return E4M3.round(below, outward(below < 0)).float(), E4M3.round(above, outward(above > 0)).float(), unit

    def rounded_code(self, rows: slice | Places, delta: Tensor, random_bits: Tensor | None) -> tuple[Tensor, Tensor]:
        """The code that w + delta becomes, [r, C] fp8, and how far beyond the edge of the grid it was to go, float32.

        delta [r, C] float32.
        """
        wanted = (delta / self.unit(rows)).add_(self.code(rows))
        return E4M3.round(wanted, random_bits), (wanted.abs() - E4M3.max_value).clamp_(min=0)

    def add_rounded(self, rows: slice | Tensor, delta: Tensor, random_bits: Tensor | None) -> Tensor:
        return self.rounded_code(rows, delta, random_bits)[0].float().mul_(self.unit(rows))

    def add_rounded_(self, rows: slice | Places, delta: Tensor, random_bits: Tensor | None) -> Tensor:
        """w += delta, rounded onto the uneven grid.  delta [r, C] float32.  Ways are counted in its least spacings."""
        old = self.code(rows)
        new, lost = self.rounded_code(rows, delta, random_bits)
        self.codes.view(torch.uint8)[rows] = new.view(torch.uint8)
        return landing_counts(old, new.float(), lost, FP8_SPACING)


@dataclass
class Float(Store):
    """A tensor of any shape kept as floating point, fp32 or bf16 (-0 counts as 0 where changes are counted)."""

    value: Tensor

    def __post_init__(self):
        self.describe(self.value, self.value.shape)
        self.rounds = self.value.dtype == torch.bfloat16

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.value.detach()}

    def dequantise(self, rows: slice | Tensor | Places = slice(None)) -> Tensor:
        """Rows [r, C] in the stored dtype, sharing memory where rows is a slice."""
        return self.value.view(self.matrix_shape)[rows]

    def bracket(self, places: Places, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """In fp32 w - t and w + t; in bf16 what lies around them, away from w."""
        w = self.dequantise(places).float()
        below, above = w - t, w + t
        if self.rounds:
            below = round_to_bfloat16(below, outward(below < 0)).float()
            above = round_to_bfloat16(above, outward(above > 0)).float()
        return below, above, torch.ones_like(w)

    def add_rounded(self, rows: slice | Tensor, delta: Tensor, random_bits: Tensor | None) -> Tensor:
        """bf16 rounds stochastically: to nearest would lose most updates."""
        new = self.dequantise(rows) + delta  # in float32
        return round_to_bfloat16(new, random_bits).float() if self.rounds else new

    def add_rounded_(self, rows: slice | Places, delta: Tensor, random_bits: Tensor | None) -> Tensor:
        """w += delta [r, C] float32."""
        old = self.dequantise(rows)
        new = round_to_bfloat16(old + delta, random_bits) if self.rounds else old + delta
        counts = landing_counts(old, new)  # before old, which may be the same memory, is written
        self.value.view(self.matrix_shape)[rows] = new
        return counts


# ---------------------------------------------------------------- which tensor gets which store

FLOATS = ("fp32", "bf16")
INTEGERS = {"int8": 8, "int4": 4}
FORMATS = (*FLOATS, *INTEGERS, "fp8")
RESIDUALS = (0, 1, 2, 4, 8)  # bits that fill bytes


def encode(
    tensor: Tensor, weights: str, residual_bits: int = 0, oracle: bool = False, scale: Tensor | None = None
) -> Store:
    """The one place that says which tensors are quantised: those of two or more axes, as matrices [R, C], embedding
    and head included; one-dimensional tensors stay float32.

    Norm weights near 1.0 would not even feel a perturbation in bf16, and they are a millionth of the model.  A
    store owns its memory: a tensor from a safetensors file is mapped from it, and the file may change.
    scale: the scales of codes, where they are known already.
    """
    check_format(weights, residual_bits, oracle)
    tensor = tensor.detach()  # a parameter's graph is not the store's
    if tensor.ndim < 2 or weights == "fp32":
        return Float(tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format))
    if weights == "bf16":
        return Float(tensor.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format))
    if weights == "fp8":
        return Fp8.encode(tensor, scale)
    if oracle:
        return FakeQuantised.encode(tensor, INTEGERS[weights], residual_bits)
    return Integers.encode(tensor, INTEGERS[weights], residual_bits, scale)


def check_format(weights: str, residual_bits: int = 0, oracle: bool = False) -> None:
    """Raises ValueError for an unknown format, or one that residual bits or the oracle do not go with."""
    if weights not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, got {weights!r}")
    if residual_bits not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(map(str, RESIDUALS))} bits, got {residual_bits}")
    if weights not in INTEGERS and (residual_bits or oracle):
        raise ValueError(f"{'a residual' if residual_bits else 'the oracle'} needs weights int8 or int4, got {weights}")


def tensor_specs(shape: torch.Size, weights: str, residual_bits: int = 0) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """The dtype and shape of each of encode(...).tensors() for a tensor of this shape, by suffix."""
    if len(shape) < 2 or weights in FLOATS:
        return {"": (torch.bfloat16 if weights == "bf16" and len(shape) >= 2 else torch.float32, shape)}
    R, C = matrix_shape(shape)
    if weights == "fp8":
        return {"": (E4M3.dtype, torch.Size((R, C))), ".scale": (torch.float32, torch.Size((R, 1)))}
    bits = INTEGERS[weights]
    groups = torch.Size((R, math.ceil(C / group_size(bits, C))))
    specs = {
        "": (torch.int8 if bits == 8 else torch.uint8, torch.Size((R, math.ceil(C * bits / 8)))),
        ".scale": (torch.float32 if bits == 8 else torch.bfloat16, groups),
    }
    if residual_bits:
        specs[".residual"] = (torch.uint8, torch.Size((R, math.ceil(C * residual_bits / 8))))
    return specs


def from_tensors(
    tensors: dict[str, Tensor], shape: torch.Size, weights: str, residual_bits: int = 0, oracle: bool = False
) -> Store:
    """The inverse of tensors(), of shapes as tensor_specs gives them.  Raises ValueError with what is wrong."""
    for suffix, (dtype, _) in tensor_specs(shape, weights, residual_bits).items():
        if tensors[suffix].dtype != dtype:
            raise ValueError(f"{suffix} is {tensors[suffix].dtype}, expected {dtype}")
    if len(shape) < 2 or weights in FLOATS:
        return Float(tensors[""])
    codes, scale = tensors[""], tensors[".scale"]
    if not (scale.isfinite() & (scale >= MIN_SCALE)).all():
        raise ValueError(f".scale must hold finite numbers of at least {MIN_SCALE:.1g}")
    if weights == "fp8":
        stored, largest = Fp8(codes, scale, shape), E4M3.max_value
    else:
        stored = Integers(codes, scale, shape, INTEGERS[weights], tensors.get(".residual"), residual_bits)
        largest = stored.max_code
    for rows in row_chunks(stored.matrix_shape, codes.device):
        if not (stored.code(rows).float().abs() <= largest).all():  # NaN fails too
            raise ValueError(f" holds codes outside [-{largest}, {largest}]")
    return FakeQuantised.of(stored) if oracle else stored


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """A tensor as a matrix [R, C]: rows by its first axis, a vector or a number as one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (1, math.prod(shape))


CHUNK = {"cpu": 2**17, "cuda": 2**23}  # elements: in a CPU's second-level cache; some 0.1 GB of a GPU's memory


@cache
def row_chunks(shape: tuple[int, int], device: torch.device) -> list[slice]:
    """Row slices of a matrix [R, C] that bound the scratch of a pass over it."""
    rows, columns = shape
    per_chunk = max(1, CHUNK.get(device.type, 2**17) // max(1, columns))
    return [slice(start, min(start + per_chunk, rows)) for start in range(0, rows, per_chunk)]


class StoredWeights:
    """The weights as they are stored, read by a forward: P = 1.  (zo_optim.PerturbedWeights is the other way to read.)

    weights: stores by name; dtype: what matrices are multiplied in.
    """

    probes = 1

    def __init__(self, weights: dict[str, Store], dtype: torch.dtype):
        self.weights, self.dtype = weights, dtype

    def read(self, name: str, rows: Tensor | None = None, as_codes: bool = False) -> Tensor:
        """[1, *shape]: matrices in the compute dtype, vectors in float32; as_codes, an fp8 or int8 matrix's codes.

        rows [n] int64: those rows of a matrix, [1, n, C] float32.
        """
        stored = self.weights[name]
        if rows is not None:
            return stored.dequantise(rows).float()[None]
        if as_codes:
            return stored.codes[None]
        if len(stored.shape) < 2:
            return stored.dequantise().view(1, *stored.shape)
        if not isinstance(stored, FakeQuantised | Integers | Fp8):
            return stored.dequantise().view(1, *stored.shape).to(self.dtype)
        weight = torch.empty(1, *stored.matrix_shape, dtype=self.dtype, device=stored.device)
        for chunk in row_chunks(stored.matrix_shape, stored.device):  # codes are unpacked through numbers of 32 bits
            weight[0, chunk] = stored.dequantise(chunk)
        return weight.view(1, *stored.shape)


# ---------------------------------------------------------------- activations

ACTIVATIONS = ("none", "int8", "fp8")


def quantise_tokens(x: Tensor, kind: str) -> Tensor:
    """Fake quantisation of a linear layer's input: one dynamic scale per token, which takes its largest size to the
    grid's largest.

    x [..., C], any float dtype -> the same shape and dtype, each token on its own int8 or e4m3 grid.  To nearest:
    activations are read once, so there is nothing that a bias could add up to.  Gradients go straight through.
    """
    if kind == "none":
        return x
    codes, scale = token_codes(x.detach(), kind)
    return straight_through(x, (codes.float() * scale).to(x.dtype))


def token_codes(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x [..., C] -> codes, float32 integers or e4m3 [..., C], and scales [..., 1] float32."""
    max_code = 127.0 if kind == "int8" else E4M3.max_value
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = (largest / torch.full_like(largest, max_code)).clamp(min=MIN_SCALE)  # a token of zeros has one too
    codes = x.float() / scale
    return codes.round() if kind == "int8" else E4M3.round(codes, None), scale


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers, with x's gradient."""
    return _StraightThrough.apply(x, rounded) if x.requires_grad else rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
