"""One Triton kernel a tensor for what zo_optim defines in plain torch: read a pair of probes, apply an update.

The plain definitions draw, round and add in some fifty small kernels a tensor, so a small model waits for
launches and a large one for memory.  These do the same arithmetic on the same Philox words in one pass;
tests/test_gpu.py demands equal codes and equal floats (hence no fused multiply-add and division to nearest).

Each program takes BLOCK groups of 8 neighbouring elements of a row: one Philox block of 16-bit draws, or two of
32-bit draws.  Rows are padded to whole groups, as in random_bits._words_of_rows.  Imports quant and random_bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import GROUP, Float, Fp8, Integers, Stored, matrix_shape
from random_bits import LOW, Key, Use, as_int32

if TYPE_CHECKING:  # which imports this file
    from zo_optim import ZO

BLOCK = 128  # groups a program: 1,024 elements
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where the definition rounds twice
GROUP_ = tl.constexpr(GROUP)
DIRECTION, PROBE_ROUNDING = tl.constexpr(int(Use.DIRECTION)), tl.constexpr(int(Use.PROBE_ROUNDING))
WEIGHT_ROUNDING, PROBE_LANDING = tl.constexpr(int(Use.WEIGHT_ROUNDING)), tl.constexpr(int(Use.PROBE_LANDING))


@triton.jit
def _words(block, step, tensor, query, USE: tl.constexpr, k0, k1):
    """random_bits.random_words for counter blocks [BLOCK] -> four uint32 words each."""
    c0 = block.to(tl.uint32)
    zero = c0 * 0
    c1, c2, c3 = (zero + step).to(tl.uint32), (zero + tensor).to(tl.uint32), (zero + (query * 16 + USE)).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, (zero + k0).to(tl.uint32), (zero + k1).to(tl.uint32), 10)


@triton.jit
def _in_order(a, b, c, d, e, f, g, h):
    """Eight [BLOCK] lanes -> [8 * BLOCK], lane by lane within each group."""
    even = tl.interleave(tl.interleave(a, e), tl.interleave(c, g))
    odd = tl.interleave(tl.interleave(b, f), tl.interleave(d, h))
    return tl.interleave(even, odd)


@triton.jit
def _bits16(block, step, tensor, query, USE: tl.constexpr, k0, k1):
    a, b, c, d = _words(block, step, tensor, query, USE, k0, k1)
    low = 0xFFFF
    bits = _in_order(a & low, a >> 16, b & low, b >> 16, c & low, c >> 16, d & low, d >> 16)
    return bits.to(tl.int32)


@triton.jit
def _bits32(group, per_row8, per_row4, step, tensor, query, USE: tl.constexpr, k0, k1):
    """Blocks of 4 draws, two to a group of 8, except that a row's last group may own only one."""
    block = group // per_row8 * per_row4 + group % per_row8 * 2
    a, b, c, d = _words(block, step, tensor, query, USE, k0, k1)
    e, f, g, h = _words(block + 1, step, tensor, query, USE, k0, k1)
    return _in_order(a, b, c, d, e, f, g, h)


@triton.jit
def _direction(table, group, step, tensor, query, k0, k1, ROUNDING: tl.constexpr, LEVELS: tl.constexpr):
    """zo_optim.direction for groups of 8 elements; LEVELS 0 is the full direction."""
    u = tl.load(table + _bits16(group, step, tensor, query, DIRECTION, k0, k1))
    if LEVELS == 0:
        d = u.to(tl.float32) * 0.00006103515625  # 2^-14
    else:
        dither = _bits16(group, step, tensor, query, ROUNDING, k0, k1)
        d = ((u * LEVELS + dither) >> 16).to(tl.float32) * (4.0 / LEVELS)
    return d


@triton.jit
def _grid_step(words, spacing, grain):
    """zo_optim.grid_step."""
    t = tl.maximum(spacing, grain)
    ratio = tl.div_rn(grain + t * 0, t)
    threshold = (ratio * ratio * 2147483648.0 + 0.5).to(tl.int64)
    hit = (words & 0x7FFFFFFF).to(tl.int64) < threshold
    return tl.where(hit, tl.where((words >> 31) == 1, -t, t), 0.0)


@triton.jit
def _along(
    factor, grain, spacing, table, group, per_row8, per_row4, step, tensor, query, k0, k1,
    ROUNDING: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """zo_optim.ZO.along; for a grid direction (LEVELS -1) factor comes divided by grain."""
    if LEVELS == -1:
        words = _bits32(group, per_row8, per_row4, step, tensor, query, DIRECTION, k0, k1)
        d = _grid_step(words, spacing, grain)
    else:
        d = _direction(table, group, step, tensor, query, k0, k1, ROUNDING, LEVELS)
    return d * factor


@triton.jit
def _stochastic_round(x, words):
    """quant.stochastic_round."""
    size = tl.abs(x)
    whole = tl.floor(size)
    threshold = ((size - whole) * 2147483648.0).to(tl.int32)
    size = whole + ((words & 0x7FFFFFFF).to(tl.int32) < threshold).to(tl.float32)
    return (size.to(tl.int32, bitcast=True) | x.to(tl.int32, bitcast=True) & -(2**31)).to(tl.float32, bitcast=True)


@triton.jit
def _cut(x, words, BITS: tl.constexpr):
    """quant._cut."""
    pattern = x.to(tl.int32, bitcast=True) + (words & ((1 << BITS) - 1)).to(tl.int32)
    return (pattern & -(1 << BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _power_below(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _round8(x, words, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr):
    """quant.Grid8.round, stochastic."""
    x = tl.minimum(tl.maximum(x, -TOP), TOP)
    step: tl.constexpr = 2.0 ** (LOWEST - MANTISSA)
    even = _stochastic_round(x * (1.0 / step), words) * step
    return tl.where(tl.abs(x) < 2.0**LOWEST, even, _cut(x, words, 23 - MANTISSA))


@triton.jit
def _place(R, C, BLOCK: tl.constexpr, PER: tl.constexpr):
    """This program's places, one for each PER elements of a row (1, or those of a byte): row, column and mask."""
    at = tl.program_id(0).to(tl.int64) * (8 * BLOCK) + tl.arange(0, 8 * BLOCK // PER) * PER
    width = tl.cdiv(C, 8) * 8
    row = at // width
    column = at - row * width
    return row, column, (row < R) & (column < C)


@triton.jit
def _fields(packed, R, C, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """quant.unpack: one signed number of BITS bits for each element, int32."""
    row, column, live = _place(R, C, BLOCK, 1)
    per_byte: tl.constexpr = 8 // BITS
    byte = tl.load(packed + row * tl.cdiv(C, per_byte) + column // per_byte, mask=live, other=0).to(tl.int32)
    field = (byte >> ((column % per_byte).to(tl.int32) * BITS)) & ((1 << BITS) - 1)
    half: tl.constexpr = 1 << (BITS - 1)
    return (field ^ half) - half


@triton.jit
def _store_fields(packed, numbers, R, C, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """quant.pack."""
    per_byte: tl.constexpr = 8 // BITS
    live = _place(R, C, BLOCK, 1)[2]
    fields = tl.where(live, numbers & ((1 << BITS) - 1), 0)
    shifts = tl.arange(0, per_byte) * BITS
    byte = tl.sum(tl.reshape(fields, (8 * BLOCK // per_byte, per_byte)) << shifts[None, :], 1)
    row, column, live = _place(R, C, BLOCK, per_byte)
    tl.store(packed + row * tl.cdiv(C, per_byte) + column // per_byte, byte.to(tl.uint8), mask=live)


@triton.jit
def _from_byte(byte, MANTISSA: tl.constexpr):
    """An fp8 number's bits, int32 -> float32.  By hand: Triton's interpreter has no fp8."""
    lowest: tl.constexpr = -6 if MANTISSA == 3 else -14
    size = byte & 0x7F
    normal = ((size << (23 - MANTISSA)) + ((126 + lowest) << 23)).to(tl.float32, bitcast=True)
    size = tl.where(size < (1 << MANTISSA), size.to(tl.float32) * 2.0 ** (lowest - MANTISSA), normal)
    return (size.to(tl.int32, bitcast=True) | ((byte >> 7) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _to_byte(x, MANTISSA: tl.constexpr):
    """The inverse, for numbers on the grid."""
    lowest: tl.constexpr = -6 if MANTISSA == 3 else -14
    pattern = x.to(tl.int32, bitcast=True)
    normal = ((pattern & 0x7FFFFFFF) - ((126 + lowest) << 23)) >> (23 - MANTISSA)
    tiny = (tl.abs(x) * 2.0 ** (MANTISSA - lowest)).to(tl.int32)
    return tl.where(tl.abs(x) < 2.0**lowest, tiny, normal) | ((pattern >> 24) & 0x80)


@triton.jit
def _code(value, R, C, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The stored numbers as float32, before their scale."""
    row, column, live = _place(R, C, BLOCK, 1)
    if KIND == "int4":
        code = _fields(value, R, C, 4, BLOCK).to(tl.float32)
    elif KIND == "fp8":
        code = _from_byte(tl.load(value + row * C + column, mask=live, other=0).to(tl.int32), 3)
    elif KIND == "fp8-e5m2":
        code = _from_byte(tl.load(value + row * C + column, mask=live, other=0).to(tl.int32), 2)
    else:
        code = tl.load(value + row * C + column, mask=live, other=0).to(tl.float32)
    return code


@triton.jit
def _store(value, new, R, C, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of _code."""
    row, column, live = _place(R, C, BLOCK, 1)
    if KIND == "int4":
        _store_fields(value, new.to(tl.int32), R, C, 4, BLOCK)
    elif KIND == "fp8":
        tl.store(value + row * C + column, _to_byte(new, 3).to(tl.uint8), mask=live)
    elif KIND == "fp8-e5m2":
        tl.store(value + row * C + column, _to_byte(new, 2).to(tl.uint8), mask=live)
    else:
        tl.store(value + row * C + column, new.to(value.dtype.element_ty), mask=live)


@triton.jit
def _scale(scale, R, C, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, column, live = _place(R, C, BLOCK, 1)
    if KIND == "int4":
        row = row * tl.cdiv(C, GROUP_) + column // GROUP_
    return tl.load(scale + row, mask=live, other=1)


@triton.jit
def _spacing(code, scale, KIND: tl.constexpr):
    """Each store's spacing."""
    if KIND == "fp32":
        spacing = code * 0
    elif KIND == "bf16":
        spacing = _power_below(code) * 0.0078125  # 2^-7
    elif KIND == "fp8":
        spacing = tl.maximum(_power_below(code) * 0.125, 0.001953125) * scale  # 2^-3, 2^-9
    elif KIND == "fp8-e5m2":
        spacing = tl.maximum(_power_below(code) * 0.25, 0.0000152587890625) * scale  # 2^-2, 2^-16
    else:
        spacing = scale
    return spacing


@triton.jit
def _land(code, scale, delta, words, KIND: tl.constexpr, TOP: tl.constexpr):
    """Each store's land, before its scale."""
    if KIND == "fp32":
        new = code + delta
    elif KIND == "bf16":
        new = _cut(code + delta, words, 16)
    elif KIND == "fp8":
        new = _round8(tl.div_rn(delta, scale) + code, words, 3, -6, 448.0)
    elif KIND == "fp8-e5m2":
        new = _round8(tl.div_rn(delta, scale) + code, words, 2, -14, 57344.0)
    else:
        new = _stochastic_round(tl.div_rn(delta, scale), words) + code
        new = tl.minimum(tl.maximum(new, -TOP), TOP)
    return new


VARYING = ["R", "C", "factor", "grain", "step", "tensor", "query", "k0", "k1"]  # never compile-time constants


@triton.jit(do_not_specialize=VARYING)
def _pair_kernel(
    pair, value, scale, table, R, C, factor, grain, step, tensor, query, k0, k1,
    KIND: tl.constexpr, TOP: tl.constexpr, LEVELS: tl.constexpr, CODES: tl.constexpr, PLUS: tl.constexpr,
    MINUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, live = _place(R, C, BLOCK, 1)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    per_row8, per_row4 = tl.cdiv(C, 8), tl.cdiv(C, 4)
    code = _code(value, R, C, KIND, BLOCK)
    unit = code * 0 + 1.0 if KIND == "fp32" or KIND == "bf16" else _scale(scale, R, C, KIND, BLOCK)
    d = _along(
        factor, grain, _spacing(code, unit, KIND), table, group, per_row8, per_row4, step, tensor, query, k0, k1,
        PROBE_ROUNDING, LEVELS,
    )  # fmt: skip
    if CODES:
        words = _bits32(group, per_row8, per_row4, step, tensor, query, PROBE_LANDING, k0, k1)
        plus = _land(code, unit, d, words, KIND, TOP) * unit
        minus = _land(code, unit, d * -1.0, words, KIND, TOP) * unit  # Triton's -d is 0 - d: no -0
    else:
        plus, minus = code * unit + d, code * unit - d
    at = row * C + column
    if PLUS:
        tl.store(pair + at, plus.to(pair.dtype.element_ty), mask=live)
        at += R.to(tl.int64) * C
    if MINUS:
        tl.store(pair + at, minus.to(pair.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=VARYING)
def _update_kernel(
    value, scale, residual, counts, table, factors, R, C, grain, step, tensor, query, k0, k1, N: tl.constexpr,
    KIND: tl.constexpr, TOP: tl.constexpr, RESIDUAL: tl.constexpr, LEVELS: tl.constexpr, ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, live = _place(R, C, BLOCK, 1)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    per_row8, per_row4 = tl.cdiv(C, 8), tl.cdiv(C, 4)
    old = _code(value, R, C, KIND, BLOCK)
    unit = old * 0 + 1.0 if KIND == "fp32" or KIND == "bf16" else _scale(scale, R, C, KIND, BLOCK)
    spacing = _spacing(old, unit, KIND)
    delta = _along(
        tl.load(factors), grain, spacing, table, group, per_row8, per_row4, step, tensor, query, k0, k1, ROUNDING,
        LEVELS,
    )  # fmt: skip
    for q in range(1, N):
        delta += _along(
            tl.load(factors + q), grain, spacing, table, group, per_row8, per_row4, step, tensor, query + q, k0, k1,
            ROUNDING, LEVELS,
        )  # fmt: skip
    words = _bits32(group, per_row8, per_row4, step, tensor, query, WEIGHT_ROUNDING, k0, k1)
    if RESIDUAL:
        old = old * (1 << RESIDUAL) + _fields(residual, R, C, RESIDUAL, BLOCK).to(tl.float32)
        unit = unit * (1.0 / (1 << RESIDUAL))
    if KIND == "int8" or KIND == "int4":
        wanted = _stochastic_round(tl.div_rn(delta, unit), words) + old
        bottom = -TOP - 1 if RESIDUAL else -TOP  # Integers.lowest
        new = tl.minimum(tl.maximum(wanted, bottom), TOP)
        held = new != wanted
    else:
        new = _land(old, unit, delta, words, KIND, TOP)
        held = tl.abs(tl.div_rn(delta, unit) + old) > TOP
    tl.atomic_add(counts, tl.sum((live & (new != old)).to(tl.int64)))
    tl.atomic_add(counts + 1, tl.sum((live & held).to(tl.int64)))
    if RESIDUAL:
        code = tl.floor((new + (1 << (RESIDUAL - 1))) * (1.0 / (1 << RESIDUAL)))
        _store_fields(residual, (new - code * (1 << RESIDUAL)).to(tl.int32), R, C, RESIDUAL, BLOCK)
        new = code
    _store(value, new, R, C, KIND, BLOCK)


def _kind(stored: Stored) -> tuple[str, float]:
    """A store's name in the kernels, and the largest number that its codes reach."""
    if isinstance(stored, Integers):
        return f"int{stored.bits}", float(stored.top)
    if isinstance(stored, Fp8):
        return ("fp8" if stored.grid.mantissa == 3 else "fp8-e5m2"), stored.grid.top
    assert isinstance(stored, Float)
    return ("bf16" if stored.rounds else "fp32"), float("inf")


def _arguments(stored: Stored, key: Key) -> tuple[Tensor, Tensor, int, int, list[int]]:
    """What both kernels need: numbers, scales (unused for floats), R, C, the key in 32-bit words."""
    value = stored.matrix() if isinstance(stored, Float) else stored.codes
    value = value.view(torch.uint8) if isinstance(stored, Fp8) else value
    words = as_int32(key.step, key.tensor, key.query, key.seed & LOW, key.seed >> 32 & LOW)
    R, C = matrix_shape(stored.shape)
    return value, value if isinstance(stored, Float) else stored.scale, R, C, words


def _programs(R: int, C: int) -> tuple[int]:
    return (triton.cdiv(R * triton.cdiv(C, 8), BLOCK),)


def read_pair(
    stored: Stored, key: Key, zo: ZO, table: Tensor, dtype: torch.dtype, signs: tuple[int, ...] = (1, -1)
) -> Tensor:
    """[P, R, C] in dtype: w + eps u1 and w - eps u1, or one of them.  The definition is zo_optim.Pair.read."""
    value, scale, R, C, words = _arguments(stored, key)
    kind, top = _kind(stored)
    pair = torch.empty(len(signs), R, C, dtype=dtype, device=value.device)
    _pair_kernel[_programs(R, C)](
        pair, value, scale, table, R, C, float(zo.stride) if zo.grid else zo.eps, zo.grain, *words,
        KIND=kind, TOP=top, LEVELS=zo.levels, CODES=zo.probe == "codes", PLUS=1 in signs, MINUS=-1 in signs,
        BLOCK=BLOCK, **EXACT,
    )  # fmt: skip
    return pair


def update_(stored: Stored, key: Key, factors: Tensor, zo: ZO, table: Tensor, counts: Tensor) -> None:
    """w += the sum of coefficient_i * u2_i, landing stochastically on the grid; adds to counts [2] int64.

    factors [n] float32: the coefficients, divided by grain for a grid direction.  The definition is
    zo_optim._update_tensor.
    """
    value, scale, R, C, words = _arguments(stored, key)
    kind, top = _kind(stored)
    residual_bits = stored.residual_bits if isinstance(stored, Integers) else 0
    residual = stored.residual if residual_bits else value
    _update_kernel[_programs(R, C)](
        value, scale, residual, counts, table, factors, R, C, zo.grain, *words, N=len(factors),
        KIND=kind, TOP=float(stored.limit) if residual_bits else top, RESIDUAL=residual_bits, LEVELS=zo.levels,
        ROUNDING=int(zo.step_rounding), BLOCK=BLOCK, **EXACT,
    )  # fmt: skip
