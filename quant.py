"""Rounding onto grids, and the stores that keep a weight: floats, integer codes, fp8 codes, and the oracle.

Rounding is QuZO's eq. 5: E[SR(x)] = x inside the grid's range.  A store is asked four things: `read` (the weights
that a forward sees), `spacing` (how far apart the grid's points are around each weight), `land` (what w + d would be
on the grid) and `add_` (move there, the only method that writes).  `encode` says which tensors get which store.

Shape key: R rows (output features), C columns (input features), r some of the rows, G scale groups a row.
Imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

# ---------------------------------------------------------------- rounding: words are random bits, None is nearest


def stochastic_round(x: Tensor, words: Tensor | None) -> Tensor:
    """QuZO eq. 5: floor(x) + Bernoulli(x - floor(x)), so that E[SR(x)] = x.

    x float32, words int32 bit patterns (the upper 31 bits are used), same shape -> integers in float32.  Sign and
    size are treated apart, because a size's fraction is exact in float32 and a negative number's floor is not:
    x = -1e-9 would give a fraction of exactly 1.  P(up) is the fraction rounded down to a multiple of 2^-31.
    words None rounds to nearest, ties to even.
    """
    if words is None:
        return x.round()
    size = x.abs()
    whole = size.floor()
    threshold = (size - whole).mul_(2.0**31).to(torch.int32)  # exact: a power of two, then truncation
    up = (words >> 1 & 0x7FFFFFFF) < threshold
    return whole.add_(up).copysign_(x)


def round_to_bfloat16(x: Tensor, words: Tensor | None) -> Tensor:
    """Stochastic rounding of float32 to bfloat16, its upper half: add 16 random bits, then cut the lower half.

    P(up) is the dropped fraction, exactly.  Numbers that are bfloat16 already stay as they are.
    """
    return x.to(torch.bfloat16) if words is None else _cut(x, words, 16).to(torch.bfloat16)


def _cut(x: Tensor, words: Tensor, bits: int) -> Tensor:
    """Stochastic rounding of float32 to its upper 32 - bits bits; the exponent absorbs a carry, as it should.

    Of the words it takes the upper bits, as stochastic_round does: those are an element's own (random_bits.bits32).
    """
    pattern = x.view(torch.int32) + (words >> 32 - bits & (1 << bits) - 1)
    return (pattern & -(1 << bits)).view(torch.float32)


class Grid8(NamedTuple):
    """An 8-bit floating-point grid: 2^e * (1 + m / 2^mantissa) for e >= lowest, and evenly spaced below."""

    dtype: torch.dtype
    mantissa: int  # bits
    lowest: int  # exponent of the smallest normal number
    top: float  # the largest size

    def round(self, x: Tensor, words: Tensor | None) -> Tensor:
        """float32 -> this grid, in its dtype; sizes beyond the top become the top.  P(up) is exact to 2^-20.

        What rounds stochastically to zero, -0 too, becomes +0.  Needs subnormal numbers (no set_flush_denormal).
        """
        x = x.clamp(-self.top, self.top)
        if words is None:
            return x.to(self.dtype)
        down = 2.0 ** (-126 - self.lowest)  # takes the even part to float32's own, where a cut is as even
        return _cut(x * down, words, 23 - self.mantissa).mul_(1 / down).add_(0.0).to(self.dtype)

    def spacing(self, x: Tensor) -> Tensor:
        """The distance from each x (float32, on the grid) to the next grid point away from zero."""
        return _power_below(x).mul_(2.0**-self.mantissa).clamp_(min=2.0 ** (self.lowest - self.mantissa))


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two that is at most |x|, float32: the exponent bits alone (0 for subnormal numbers)."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


E4M3 = Grid8(torch.float8_e4m3fn, 3, -6, 448.0)
E5M2 = Grid8(torch.float8_e5m2, 2, -14, 57344.0)


# ---------------------------------------------------------------- packed bits


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Signed numbers [r, C] of 1, 2, 4 or 8 bits, two's complement -> uint8 [r, ceil(C * bits / 8)].

    The first column is in the lowest bits of a byte; a last byte that is not full ends in zeros.
    """
    per_byte = 8 // bits
    padded = F.pad(numbers.to(torch.int8).view(torch.uint8), (0, -numbers.shape[1] % per_byte))
    fields = padded & (1 << bits) - 1
    return sum(fields[:, i::per_byte] << bits * i for i in range(per_byte))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack: uint8 [r, B] -> int32 [r, columns]."""
    fields = packed.to(torch.int32)[..., None] >> _shifts(bits, packed.device) & (1 << bits) - 1
    half = 1 << bits - 1
    return ((fields ^ half) - half).flatten(1)[:, :columns]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, device=device, dtype=torch.int32)


# ---------------------------------------------------------------- stores: how one tensor is kept, read and stepped


class Valued:
    """What every store has that keeps its numbers as one floating-point tensor."""

    value: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def device(self) -> torch.device:
        return self.value.device


@dataclass
class Float(Valued):
    """A tensor kept as floating point, fp32 or bf16.

    Every store has shape, device, rounds, parts, read, spacing, land and add_.  add_ returns [2] int64: how many
    elements changed (-0 is 0) and how many the edge of the grid held back.  A tensor, so that a GPU need not wait.
    """

    value: Tensor

    @property
    def rounds(self) -> bool:
        """Whether land and add_ need random words."""
        return self.value.dtype == torch.bfloat16

    def parts(self) -> dict[str, Tensor]:
        """The tensors to save and hash, by suffix of the tensor's name."""
        return {"": self.value.detach()}

    def matrix(self) -> Tensor:
        """[R, C], sharing memory; a vector is one row."""
        return self.value.view(matrix_shape(self.value.shape))

    def read(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Rows [r, C] in the stored dtype."""
        return self.matrix()[rows]

    def spacing(self, rows: slice | Tensor) -> Tensor:
        """[r, C] float32: the distance between neighbouring numbers.  fp32's counts as 0: it is below any step."""
        value = self.read(rows).float()
        return _power_below(value).mul_(2.0**-7) if self.rounds else torch.zeros_like(value)

    def land(self, rows: slice | Tensor, delta: Tensor, words: Tensor | None) -> Tensor:
        """What w + delta is on the grid, [r, C] float32.  bf16 rounds stochastically: to nearest would lose most
        updates."""
        new = self.read(rows).float() + delta
        return round_to_bfloat16(new, words).float() if self.rounds else new

    def add_(self, rows: slice, delta: Tensor, words: Tensor | None) -> Tensor:
        """w += delta [r, C] float32."""
        new = self.land(rows, delta, words)
        changed = (new != self.read(rows)).sum()
        self.matrix()[rows] = new
        return torch.stack((changed, torch.zeros_like(changed)))


GROUP = 128  # input columns that share one int4 scale


@dataclass
class Integers:
    """A matrix kept as int8 codes [R, C] or packed int4 codes, uint8 [R, ceil(C / 2)]: w = code * scale.

    int8 has one float32 scale per output row, scale [R, 1]; int4 one per group of 128 columns, [R, ceil(C / 128)].
    Codes reach from -top to top, 127 or 7: the lowest two's complement number is unused, so that +w and -w quantise
    alike.  Scales never change after encoding, so a group's grid is the same throughout training.

    With a residual of b bits the store is finer by 2^b: fine = code * 2^b + residual, with the residual in
    [-2^(b-1), 2^(b-1)) packed beside the code.  Steps land on the fine grid, a forward reads the code alone.  The
    fine number stands for fine + 1/2 fine steps, so that none is halfway between two codes: sending halves to one
    side would shift every read by 2^-(b+1) of a code.  The variance of landing a step d is d (s / 2^b - d) a weight.
    """

    rounds: ClassVar[bool] = True
    codes: Tensor
    scale: Tensor
    columns: int
    bits: int
    residual: Tensor | None = None  # uint8 [R, ceil(C * residual_bits / 8)]
    residual_bits: int = 0

    @classmethod
    def encode(cls, matrix: Tensor, bits: int, residual_bits: int = 0, scale: Tensor | None = None) -> Integers:
        """Round a float matrix to nearest on the fine grid.  Without given scales a group's largest size is +-top."""
        R, C = matrix.shape
        chunks = list(row_chunks(matrix.shape, matrix.device))  # no second copy of a large matrix in float32
        if scale is None:
            largest = torch.cat([_largest(matrix[rows].float(), bits) for rows in chunks])
            scale = _positive(largest, 2 ** (bits - 1) - 1)
        stored = cls.empty(R, C, bits, residual_bits, scale)
        for rows in chunks:
            stored.write(rows, _fine(matrix[rows].float() / stored.fine_step(rows), stored.limit, residual_bits))
        return stored

    @classmethod
    def empty(cls, R: int, C: int, bits: int, residual_bits: int, scale: Tensor) -> Integers:
        codes = torch.empty(R, -(-C * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8, device=scale.device)
        residual = None
        if residual_bits:
            residual = torch.empty(R, -(-C * residual_bits // 8), dtype=torch.uint8, device=scale.device)
        return cls(codes, scale, C, bits, residual, residual_bits)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.codes), self.columns))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def limit(self) -> int:
        """The largest fine number whose code is top."""
        return self.top * 2**self.residual_bits + (2**self.residual_bits - 1) // 2

    @property
    def lowest(self) -> int:
        """The smallest fine number whose code is -top."""
        return -self.limit - (self.residual_bits > 0)

    def parts(self) -> dict[str, Tensor]:
        parts = {"": self.codes, ".scale": self.scale}
        return parts if self.residual is None else parts | {".residual": self.residual}

    def code(self, rows: slice | Tensor) -> Tensor:
        """[r, C], int8 or int32."""
        return self.codes[rows] if self.bits == 8 else unpack(self.codes[rows], self.bits, self.columns)

    def fine(self, rows: slice | Tensor) -> Tensor:
        """The whole stored number, code * 2^b + residual, [r, C] float32 (below 2^16: exact)."""
        code = self.code(rows).float()
        if self.residual is None:
            return code
        return code.mul_(2**self.residual_bits).add_(unpack(self.residual[rows], self.residual_bits, self.columns))

    def write(self, rows: slice, fine: Tensor) -> None:
        """Store whole numbers [r, C] float32."""
        code = fine
        if self.residual is not None:
            unit = 2**self.residual_bits
            code = ((fine + unit // 2) / unit).floor_()  # the nearest code; exact, a power of two
            self.residual[rows] = pack(fine - code * unit, self.residual_bits)
        self.codes[rows] = code.to(torch.int8) if self.bits == 8 else pack(code, self.bits)

    def spacing(self, rows: slice | Tensor) -> Tensor:
        """The scale of each element, [r, 1] or [r, C]."""
        scale = self.scale[rows]
        return scale if scale.shape[1] == 1 else scale.repeat_interleave(GROUP, 1)[:, : self.columns]

    def fine_step(self, rows: slice | Tensor) -> Tensor:
        return self.spacing(rows) * 2.0**-self.residual_bits

    def read(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Rows [r, C] as float32."""
        return self.code(rows) * self.spacing(rows)

    def land(self, rows: slice | Tensor, delta: Tensor, words: Tensor | None) -> Tensor:
        """(code + SR(delta / scale)) * scale, held inside the range.  delta [r, C] float32."""
        step = self.spacing(rows)
        return stochastic_round(delta / step, words).add_(self.code(rows)).clamp_(-self.top, self.top).mul_(step)

    def add_(self, rows: slice, delta: Tensor, words: Tensor | None) -> Tensor:
        """fine += SR(delta / fine step), held inside the range (QuZO's Algorithm 1).  delta [r, C] float32."""
        old = self.fine(rows)
        wanted = stochastic_round(delta / self.fine_step(rows), words).add_(old)
        new = wanted.clamp(self.lowest, self.limit)
        counts = torch.stack(((new != old).sum(), (new != wanted).sum()))
        self.write(rows, new)
        return counts


def _fine(x: Tensor, limit: int, residual_bits: int) -> Tensor:
    """Fine steps, float32 -> the number of the nearest fine point, as Integers counts them."""
    if not residual_bits:
        return x.round().clamp_(-limit, limit)
    size = x.abs().floor_().clamp_(max=limit)
    return torch.where(x < 0, -1 - size, size)  # points are at 1/2, 3/2, ... and -1/2, -3/2, ...


def _largest(rows: Tensor, bits: int) -> Tensor:
    """The largest size in each scale group, [r, C] -> [r, G]; the last group may be short."""
    if bits == 8:
        return rows.abs().amax(1, keepdim=True)
    return F.pad(rows.abs(), (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).amax(2)


SMALLEST = 2.0**-100  # of scales: 1e-30, far from where float32 loses bits, also for the fine steps and fp8's spacing


def _positive(largest: Tensor, top: float) -> Tensor:
    """Scales that take the largest sizes to top.

    A group of zeros is exact under any scale.  It gets the largest scale of the matrix rather than 0, because a step
    divides by it.  So does a group whose scale would be under SMALLEST.
    """
    scale = largest / torch.full_like(largest, top)  # by a number, CUDA would multiply by a rounded reciprocal
    scale = torch.where(scale >= SMALLEST, scale, scale.amax())
    return torch.where(scale >= SMALLEST, scale, 1.0)


@dataclass
class Fp8:
    """A matrix kept as fp8 codes [R, C] and one float32 scale per output row [R, 1]: w = code * scale.

    The grid is uneven: its spacing is a 16th to an 8th of the weight for e4m3, a 8th to a 4th for e5m2.
    """

    rounds: ClassVar[bool] = True
    codes: Tensor
    scale: Tensor
    grid: Grid8

    @classmethod
    def encode(cls, matrix: Tensor, grid: Grid8, scale: Tensor | None = None) -> Fp8:
        """Round a float matrix to nearest.  Without given scales a row's largest size is the grid's top."""
        chunks = list(row_chunks(matrix.shape, matrix.device))
        if scale is None:
            largest = torch.cat([matrix[rows].float().abs().amax(1, keepdim=True) for rows in chunks])
            scale = _positive(largest, grid.top)
        codes = torch.empty(matrix.shape, dtype=grid.dtype, device=matrix.device)
        for rows in chunks:
            codes[rows] = grid.round(matrix[rows].float() / scale[rows], None)
        return cls(codes, scale, grid)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def parts(self) -> dict[str, Tensor]:
        return {"": self.codes, ".scale": self.scale}

    def code(self, rows: slice | Tensor) -> Tensor:
        """[r, C] float32.  Through bytes, because torch does not index fp8 by a tensor on every device."""
        return self.codes.view(torch.uint8)[rows].view(self.codes.dtype).float()

    def read(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Rows [r, C] as float32."""
        return self.code(rows).mul_(self.scale[rows])

    def spacing(self, rows: slice | Tensor) -> Tensor:
        """[r, C]: the distance to the next weight away from zero; towards zero it is this or half of it."""
        return self.grid.spacing(self.code(rows)).mul_(self.scale[rows])

    def land(self, rows: slice | Tensor, delta: Tensor, words: Tensor | None) -> Tensor:
        return self.landed(rows, delta, words).float().mul_(self.scale[rows])

    def _landed(self, rows: slice | Tensor, delta: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
        """The code that w + delta becomes, and whether the edge of the grid held it back."""
        wanted = (delta / self.scale[rows]).add_(self.code(rows))
        return self.grid.round(wanted, words), wanted.abs() > self.grid.top

    def landed(self, rows: slice, delta: Tensor, words: Tensor | None) -> Tensor:
        """The code that w + delta would be, [r, C] fp8.  delta [r, C] float32."""
        return self._landed(rows, delta, words)[0]

    def add_(self, rows: slice, delta: Tensor, words: Tensor | None) -> Tensor:
        """w += delta, rounded onto the uneven grid.  delta [r, C] float32."""
        old = self.code(rows)
        new, held = self._landed(rows, delta, words)
        self.codes[rows] = new
        return torch.stack(((new.float() != old).sum(), held.sum()))


# ---------------------------------------------------------------- the oracle


@dataclass
class Oracle(Valued):
    """What Integers does, as fake quantisation in fp32: the reference to audit, with nothing packed.

    The weight is an fp32 number: code * scale, or with a residual (fine + 1/2) * scale / 2^residual_bits.  Same codes
    as Integers, bit for bit, after any number of steps (tests/test_oracle.py; `--oracle`).
    """

    rounds: ClassVar[bool] = True
    value: Tensor  # [R, C] fp32
    scale: Tensor  # [R, C] fp32: each element's own
    bits: int
    residual_bits: int
    groups: Tensor  # [R, G]: the scales once each, to save

    @classmethod
    def encode(cls, matrix: Tensor, bits: int, residual_bits: int = 0) -> Oracle:
        matrix = matrix.float()
        group = matrix.shape[1] if bits == 8 else GROUP
        largest = torch.stack([columns.abs().amax(1) for columns in matrix.split(group, 1)], 1)
        groups = _positive(largest, 2 ** (bits - 1) - 1)
        oracle = cls(matrix, groups.repeat_interleave(group, 1)[:, : matrix.shape[1]], bits, residual_bits, groups)
        oracle.value = oracle.weight(_fine(matrix / oracle.fine_step(), oracle.limit, residual_bits))
        return oracle

    @classmethod
    def of(cls, stored: Integers) -> Oracle:
        every = slice(None)
        scale = stored.spacing(every).expand(stored.shape)
        oracle = cls(scale, scale, stored.bits, stored.residual_bits, stored.scale)
        oracle.value = oracle.weight(stored.fine(every))
        return oracle

    @property
    def limit(self) -> float:
        return (2 ** (self.bits - 1) - 1) * 2**self.residual_bits + (2**self.residual_bits - 1) // 2

    @property
    def half(self) -> float:
        """How far a fine point is from the multiples of the fine step."""
        return 0.5 if self.residual_bits else 0.0

    def weight(self, fine: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        return (fine + self.half) * self.fine_step(rows)

    def fine_step(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return self.scale[rows] / 2**self.residual_bits

    def fine(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return (self.value[rows] / self.fine_step(rows) - self.half).round()

    def code(self, rows: slice | Tensor) -> Tensor:
        return (self.value[rows] / self.scale[rows]).round()

    def parts(self) -> dict[str, Tensor]:
        """As Integers would save them."""
        packed = Integers.empty(*self.shape, self.bits, self.residual_bits, self.groups)
        packed.write(slice(None), self.fine())
        return packed.parts()

    def spacing(self, rows: slice | Tensor) -> Tensor:
        return self.scale[rows]

    def read(self, rows: slice | Tensor = slice(None)) -> Tensor:
        return self.code(rows) * self.scale[rows]

    def land(self, rows: slice | Tensor, delta: Tensor, words: Tensor | None) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        code = self.code(rows) + stochastic_round(delta / self.scale[rows], words)
        return code.clamp(-top, top) * self.scale[rows]

    def add_(self, rows: slice, delta: Tensor, words: Tensor | None) -> Tensor:
        old, step = self.fine(rows), self.fine_step(rows)
        wanted = old + stochastic_round(delta / step, words)
        new = wanted.clamp(-self.limit - 2 * self.half, self.limit)
        self.value[rows] = self.weight(new, rows)
        return torch.stack(((new != old).sum(), (new != wanted).sum()))


# ---------------------------------------------------------------- activations

ACTIVATIONS = ("none", "int8", "fp8")


def quantise_tokens(x: Tensor, kind: str) -> Tensor:
    """Fake quantisation of a linear layer's input: one dynamic scale a token, which takes its largest size to the top.

    x [..., C], any float dtype -> the same shape and dtype, each token on its own int8 or e4m3 grid.  To nearest:
    activations are read once, so there is nothing that a bias could add up to.  Gradients go straight through.
    """
    if kind == "none":
        return x
    codes, scale = token_codes(x.detach(), kind)
    return straight_through(x, (codes.float() * scale).to(x.dtype))


def token_codes(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x [..., C] -> codes, float32 integers or e4m3 [..., C], and scales [..., 1] float32."""
    top = 127.0 if kind == "int8" else E4M3.top
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = (largest / torch.full_like(largest, top)).clamp(min=SMALLEST)  # of a token of zeros
    codes = x.float() / scale
    return codes.round() if kind == "int8" else E4M3.round(codes, None), scale


def multiply_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [P, N, C], rounded to e4m3 a token, times e4m3 weights [P or 1, O, C] with row scales [O, 1] -> [P, N, O] bf16.

    On a GPU's tensor cores; both scales are applied to the sum.
    """
    if len(weight) < len(x):
        return multiply_fp8(x.flatten(0, 1)[None], weight, scale).view(*x.shape[:2], -1)
    return multiply_codes(*token_codes(x, "fp8"), weight, scale)


# an operator of its own, because torch.compile would join the probes' products by a copy
@library.custom_op(f"{__name__}::multiply_codes", mutates_args=())
def multiply_codes(codes: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 codes [P, N, C] with token scales [P, N, 1], times e4m3 weights [P, O, C] with row scales [O, 1]."""
    if codes.device.type == "cpu":  # where torch's product takes one scale a tensor, or none, by version
        return ((codes.float() @ weight.float().mT) * tokens * scale.T).to(torch.bfloat16)
    P, N, _ = codes.shape
    y = torch.empty(P, N, weight.shape[1], dtype=torch.bfloat16, device=codes.device)
    for p in range(P):
        scale_a = tokens[p] if N % 4 == 0 else tokens[p].clone()  # cuBLAS wants it to begin at a multiple of 16 bytes
        torch._scaled_mm(
            codes[p], weight[p].T, scale_a=scale_a, scale_b=scale.T, out_dtype=torch.bfloat16, out=y[p],
            use_fast_accum=True,  # sums of some 14 bits, an eighth faster (README, Deviations)
        )  # fmt: skip
    return y


@multiply_codes.register_fake
def _(codes: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty(*codes.shape[:2], weight.shape[1], dtype=torch.bfloat16)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """rounded, with x's gradient."""
    return _StraightThrough.apply(x, rounded) if x.requires_grad else rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


# ---------------------------------------------------------------- which tensor gets which store

Stored = Float | Integers | Fp8 | Oracle
FLOATS = ("fp32", "bf16")
INTEGERS = {"int8": 8, "int4": 4}
FP8 = {"fp8": E4M3, "fp8-e5m2": E5M2}
FORMATS = (*FLOATS, *INTEGERS, *FP8)
RESIDUALS = (0, 1, 2, 4, 8)  # bits that fill bytes


def encode(
    tensor: Tensor, weights: str, residual_bits: int = 0, oracle: bool = False, scale: Tensor | None = None
) -> Stored:
    """The one place that says which tensors are quantised: matrices are, embedding and head included;
    one-dimensional tensors stay float32.

    Norm weights near 1.0 would not even feel a perturbation in bf16, and they are a millionth of the model.  A
    store owns its memory: a tensor from a safetensors file is mapped from it, and the file may change.
    scale: the scales of codes, where they are known already.
    """
    check_format(weights, residual_bits, oracle)
    if tensor.ndim != 2 or weights == "fp32":
        return Float(tensor.to(torch.float32, copy=True))
    if weights == "bf16":
        return Float(tensor.to(torch.bfloat16, copy=True))
    if weights in FP8:
        return Fp8.encode(tensor, FP8[weights], scale)
    if oracle:
        return Oracle.encode(tensor, INTEGERS[weights], residual_bits)
    return Integers.encode(tensor, INTEGERS[weights], residual_bits, scale)


def check_format(weights: str, residual_bits: int = 0, oracle: bool = False) -> None:
    """Raises ValueError for an unknown format, or one that residual bits or the oracle do not go with."""
    if weights not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, got {weights!r}")
    if residual_bits not in RESIDUALS:
        raise ValueError(f"residual must be one of {', '.join(map(str, RESIDUALS))} bits, got {residual_bits}")
    if weights not in INTEGERS and (residual_bits or oracle):
        raise ValueError(f"{'a residual' if residual_bits else 'the oracle'} needs weights int8 or int4, got {weights}")


def stored_parts(shape: torch.Size, weights: str, residual_bits: int = 0) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """What encode(...).parts() will hold for a tensor of this shape: dtype and shape of each part."""
    if len(shape) != 2 or weights in FLOATS:
        return {"": (torch.bfloat16 if weights == "bf16" and len(shape) == 2 else torch.float32, shape)}
    R, C = shape
    if weights in FP8:
        return {"": (FP8[weights].dtype, shape), ".scale": (torch.float32, torch.Size((R, 1)))}
    bits = INTEGERS[weights]
    parts = {
        "": (torch.int8 if bits == 8 else torch.uint8, torch.Size((R, math.ceil(C * bits / 8)))),
        ".scale": (torch.float32, torch.Size((R, 1 if bits == 8 else math.ceil(C / GROUP)))),
    }
    if residual_bits:
        parts[".residual"] = (torch.uint8, torch.Size((R, math.ceil(C * residual_bits / 8))))
    return parts


def from_parts(
    parts: dict[str, Tensor], shape: torch.Size, weights: str, residual_bits: int = 0, oracle: bool = False
) -> Stored:
    """The inverse of parts(), of shapes as stored_parts gives them.  Raises ValueError with what is wrong."""
    for suffix, (dtype, _) in stored_parts(shape, weights, residual_bits).items():
        if parts[suffix].dtype != dtype:
            raise ValueError(f"{suffix} is {parts[suffix].dtype}, expected {dtype}")
    if len(shape) != 2 or weights in FLOATS:
        return Float(parts[""])
    codes, scale = parts[""], parts[".scale"]
    if not (scale.isfinite() & (scale >= SMALLEST)).all():
        raise ValueError(f".scale must hold finite numbers of at least {SMALLEST:.1g}")
    stored = Fp8(codes, scale, FP8[weights]) if weights in FP8 else Integers(
        codes, scale, shape[1], INTEGERS[weights], parts.get(".residual"), residual_bits
    )  # fmt: skip
    for rows in row_chunks(shape, codes.device):
        code, top = stored.code(rows).float(), stored.grid.top if weights in FP8 else stored.top
        if not (code.abs() <= top).all():  # NaN fails too
            raise ValueError(f" holds codes outside [-{top}, {top}]")
    return Oracle.of(stored) if oracle else stored


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """(R, C) of a matrix; a vector is one row."""
    return tuple(shape) if len(shape) == 2 else (1, math.prod(shape))


def row_chunks(shape: torch.Size, device: torch.device) -> Iterator[slice]:
    """Row slices of a matrix that bound the scratch of a pass over it (a vector counts as one row).

    On a CPU 2^17 elements keep the temporaries in the second-level cache; on a GPU 2^23 keep them to some 0.1 GB.
    """
    rows, columns = matrix_shape(shape)
    per_chunk = max(1, (2**23 if device.type == "cuda" else 2**17) // columns)
    for start in range(0, rows, per_chunk):
        yield slice(start, min(start + per_chunk, rows))
