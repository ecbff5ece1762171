"""One Triton kernel a tensor for what zo_optim defines in plain torch: read a pair of probes, apply an update.

The plain definitions draw, round and add in some fifty small kernels a tensor, so a small model waits for
launches and a large one for memory.  These do the same arithmetic on the same Philox words in one pass;
tests/test_gpu.py demands equal codes and equal floats (hence no fused multiply-add and division to nearest).

Each program takes BLOCK groups of 8 neighbouring elements, which share a Philox block a draw.
A group is in one row and under one scale, so what belongs to those is computed once for the 8, and a thread keeps all
of them: tensors are [BLOCK], [BLOCK, 1] or [BLOCK, 8], and nothing moves between threads.  Where all of a program is in
one row (ONE_ROW), what belongs to it is computed once, [1, 1].  (The first version had [8 * BLOCK] elements with a row,
a column and a scale each: twice the instructions, half of them integer divisions and copies through shared memory.)
Imports quant and random_bits.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import GROUP, Float, Fp8, Integers, Oracle, Stored, matrix_shape
from random_bits import GOLDEN, LOW, Key, Use, as_int32, number_, philox_

if TYPE_CHECKING:  # which imports this file
    from zo_optim import ZO

PAIR_BLOCK, UPDATE_BLOCK = 256, 512  # groups a program, two and four to a thread: as measured (NOTES.md)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NO_DIRECTION = tl.constexpr(-2)  # beside ZO.levels
SHARDS = 256  # of the counts, since programs that add to one number wait for one another
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where the definition rounds twice
GROUP_, SHARDS_, GOLDEN_ = tl.constexpr(GROUP), tl.constexpr(SHARDS), tl.constexpr(GOLDEN)
DIRECTION, PROBE_ROUNDING = tl.constexpr(int(Use.DIRECTION)), tl.constexpr(int(Use.PROBE_ROUNDING))
WEIGHT_ROUNDING, PROBE_LANDING = tl.constexpr(int(Use.WEIGHT_ROUNDING)), tl.constexpr(int(Use.PROBE_LANDING))


@triton.jit
def _words(block, step, tensor, query, USE: tl.constexpr, k0, k1):
    """random_bits.random_words for counter blocks [BLOCK] -> four uint32 words each."""
    return philox_(block.to(tl.uint32), step, tensor, query * 16 + USE, k0, k1)


@triton.jit
def _in_order(a, b, c, d, e, f, g, h):
    """Eight lanes [BLOCK] -> [BLOCK, 8]."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), [a.shape[0], 8])


@triton.jit
def _bits16(group, step, tensor, query, USE: tl.constexpr, k0, k1):
    """[BLOCK] -> [BLOCK, 8] int32."""
    a, b, c, d = _words(group, step, tensor, query, USE, k0, k1)
    low = 0xFFFF
    bits = _in_order(a & low, a >> 16, b & low, b >> 16, c & low, c >> 16, d & low, d >> 16)
    return bits.to(tl.int32)


@triton.jit
def _bits32(group, step, tensor, query, USE: tl.constexpr, k0, k1):
    """[BLOCK] -> [BLOCK, 8] uint32."""
    a, b, c, d = _words(group, step, tensor, query, USE, k0, k1)
    return _in_order(a, b << 16 | a >> 16, b, c << 16 | b >> 16, c, d << 16 | c >> 16, d, a << 16 | d >> 16)


@triton.jit
def _normal(knots, bits):
    """zo_optim.normal, from zo_optim.normal_knots."""
    knot = tl.load(knots + ((bits >> 4) & 2047)).to(tl.uint32, bitcast=True)
    size = ((knot & 0xFFFFF) + (knot >> 20) * ((bits << 1) & 30).to(tl.uint32) >> 3).to(tl.int32)
    return tl.where(bits < 32768, size, -size)


@triton.jit
def _direction(knots, group, step, tensor, query, k0, k1, ROUNDING: tl.constexpr, LEVELS: tl.constexpr):
    """zo_optim.direction, [BLOCK, 8]; LEVELS 0 is the full direction."""
    u = _normal(knots, _bits16(group, step, tensor, query, DIRECTION, k0, k1))
    if LEVELS == 0:
        d = u.to(tl.float32) * 0.00006103515625  # 2^-14
    else:
        dither = _bits16(group, step, tensor, query, ROUNDING, k0, k1)
        d = ((u * LEVELS + dither) >> 16).to(tl.float32) * (4.0 / LEVELS)
    return d


@triton.jit
def _divide(x, unit):
    """x / unit, rounded to nearest, but +0 for -0.  unit [BLOCK, 1] or [1, 1], x like it or [BLOCK, 8].

    Markstein (1990): from the rounded reciprocal, one division a group, two fused steps give the rounded quotient.
    Triton's interpreter does not fuse them.
    """
    if INTERPRETED:
        quotient = tl.div_rn(x, tl.broadcast_to(unit, x.shape)) + 0.0
    else:
        inverse = tl.div_rn(unit * 0 + 1.0, unit)
        rough, away = x * inverse, unit * -1.0
        quotient = tl.fma(tl.fma(rough, tl.broadcast_to(away, x.shape), x), tl.broadcast_to(inverse, x.shape), rough)
    return quotient


@triton.jit
def _grid_step(times, words, unit, power, grain, KIND: tl.constexpr, OVER_UNIT: tl.constexpr):
    """zo_optim.grid_step in parts: its size for times > 0, or that over unit, and which of the words hit (their top
    bits say which way).  unit [BLOCK, 1] or [1, 1]; power is _power's, and like the size as unit is or [BLOCK, 8].

    Products and quotients of floats commute with powers of two, and with taking the larger one: what is rounded is
    computed once for a group, or for a row.  A step's threshold is doubled: (words << 1) is below it as often as words'
    31 bits are below its rounded half.
    """
    finest = tl.full(unit.shape, grain, tl.float32)
    below: tl.constexpr = 0.125 if KIND == "fp8" else 0.25 if KIND == "fp8-e5m2" else 1.0  # 2^-MANTISSA
    own, least = unit * times * below, finest * times
    if OVER_UNIT:
        own, least = _divide(own, unit), _divide(least, unit)
    size = tl.maximum(own * power, least)
    ratio, exponent = _divide(finest, unit), power.to(tl.int32, bitcast=True)
    if KIND == "fp8" or KIND == "fp8-e5m2":  # power^-2 is a float, of exponent field 381 - 2 * power's mod 512
        inverse = ((381 - 512) * 8388608 - 2 * exponent).to(tl.float32, bitcast=True)
        threshold = tl.minimum(ratio * ratio * (4294967296.0 / below / below) * inverse, 4294966784.0)  # 1 - 2^-23
    else:
        ratio = tl.minimum(ratio * (0x7F000000 - exponent).to(tl.float32, bitcast=True), 0.99999994)  # 1 - 2^-24
        threshold = ratio * ratio * 4294967296.0
    return size, (words << 1) < threshold.to(tl.uint32)


@triton.jit
def _like(size, factor):
    """A size, with a number's sign."""
    return size * tl.where(factor < 0, -1.0, 1.0)


@triton.jit
def _signed(size, words, hit):
    """size where it hits, turned over by the words' top bits; 0 elsewhere."""
    step = (size.to(tl.uint32, bitcast=True) ^ (words & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(hit, step, 0.0)


@triton.jit
def _along(
    factor, grain, unit, power, knots, group, step, tensor, query, k0, k1, ROUNDING: tl.constexpr, LEVELS: tl.constexpr,
    KIND: tl.constexpr, OVER_UNIT: tl.constexpr, PROBE: tl.constexpr,
):  # fmt: skip
    """zo_optim.ZO.along, or that over unit, [BLOCK, 8].  LEVELS -1 is a grid direction; where that is 0, it is +0.

    PROBE: factor is positive.
    """
    if LEVELS == -1:
        words = _bits32(group, step, tensor, query, DIRECTION, k0, k1)
        size, hit = _grid_step(factor if PROBE else tl.abs(factor), words, unit, power, grain, KIND, OVER_UNIT)
        if not PROBE:
            size = _like(size, factor)
        d = _signed(size, words, hit)
    else:
        d = _direction(knots, group, step, tensor, query, k0, k1, ROUNDING, LEVELS) * factor
        if OVER_UNIT:
            d = _divide(d, unit)
    return d


@triton.jit
def _stochastic_round(x, words):
    """quant.stochastic_round."""
    size = tl.abs(x)
    whole = tl.floor(size)
    threshold = ((size - whole) * 2147483648.0).to(tl.uint32)
    size = whole + (words < (threshold << 1)).to(tl.float32)
    return (size.to(tl.int32, bitcast=True) | x.to(tl.int32, bitcast=True) & -(2**31)).to(tl.float32, bitcast=True)


@triton.jit
def _cut(x, words, BITS: tl.constexpr):
    """quant._cut."""
    pattern = x.to(tl.int32, bitcast=True) + (words >> (32 - BITS)).to(tl.int32)
    return (pattern & -(1 << BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _power_below(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _round8(x, words, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr):
    """quant.Grid8.round, stochastic."""
    down: tl.constexpr = 2.0 ** (-126 - LOWEST)
    up: tl.constexpr = 2.0 ** (126 + LOWEST)
    cut = _cut(tl.minimum(tl.maximum(x, -TOP), TOP) * down, words, 23 - MANTISSA)
    return tl.fma(cut, tl.full(cut.shape, up, tl.float32), 0.0)  # not a product: of -0 it makes +0


@triton.jit
def _nearest8(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr):
    """quant.Grid8.round to nearest, ties to even."""
    x = tl.minimum(tl.maximum(x, -TOP), TOP)
    cut: tl.constexpr = 23 - MANTISSA
    pattern = x.to(tl.int32, bitcast=True)
    pattern = (pattern + ((pattern >> cut) & 1) + ((1 << (cut - 1)) - 1)) & -(1 << cut)
    shift: tl.constexpr = 1.5 * 2.0 ** (23 + LOWEST - MANTISSA)  # where a float32's last place is the even part's step
    even = ((x + shift) - shift).to(tl.int32, bitcast=True) | x.to(tl.int32, bitcast=True) & -(2**31)  # also of -0
    return tl.where(tl.abs(x) < 2.0**LOWEST, even, pattern).to(tl.float32, bitcast=True)


@triton.jit
def _fields(packed, group, live, BITS: tl.constexpr):
    """quant.unpack: the 8 signed numbers of BITS bits of each group, which fill BITS bytes, [BLOCK, 8] int32."""
    word = tl.load(packed + group, mask=live, other=0)
    fields = _in_order(
        word, word >> BITS, word >> (2 * BITS), word >> (3 * BITS), word >> (4 * BITS), word >> (5 * BITS),
        word >> (6 * BITS), word >> (7 * BITS),
    ).to(tl.int32) & ((1 << BITS) - 1)  # fmt: skip
    half: tl.constexpr = 1 << (BITS - 1)
    return (fields ^ half) - half


@triton.jit
def _store_fields(packed, numbers, group, live, BITS: tl.constexpr):
    """quant.pack."""
    fields = (numbers & ((1 << BITS) - 1)).to(packed.dtype.element_ty)
    even, odd = tl.split(tl.reshape(fields, [group.shape[0], 2, 2, 2]))
    pairs = even | (odd << BITS)  # [BLOCK, 2, 2]
    even, odd = tl.split(pairs)
    fours = even | (odd << (2 * BITS))
    even, odd = tl.split(fours)
    tl.store(packed + group, even | (odd << (4 * BITS)), mask=live)


@triton.jit
def _from_byte(byte, KIND: tl.constexpr, BY_HAND: tl.constexpr):
    """fp8 codes, uint8 -> float32.  By hand, where there is no fp8: through float16, which has the same layout, but for
    e4m3 an exponent 8 lower."""
    if not BY_HAND:
        x = byte.to(tl.float8e4nv if KIND == "fp8" else tl.float8e5, bitcast=True).to(tl.float32)
    else:
        byte = byte.to(tl.int32)
        half = ((byte & 0x7F) << 7 | (byte & 0x80) << 8) if KIND == "fp8" else byte << 8
        x = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (256.0 if KIND == "fp8" else 1.0)
    return x


@triton.jit
def _to_byte(x, KIND: tl.constexpr, BY_HAND: tl.constexpr):
    """float32 -> fp8 codes, uint8: to nearest, ties to even, sizes beyond the top to the top.

    By hand, what lies between two points has to be e4m3.
    """
    if not BY_HAND:
        byte = x.to(tl.float8e4nv if KIND == "fp8" else tl.float8e5).to(tl.uint8, bitcast=True)
    elif KIND == "fp8":
        half = (_nearest8(x, 3, -6, 448.0) * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        byte = ((half >> 7) & 0x7F | (half >> 8) & 0x80).to(tl.uint8)
    else:
        byte = (x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) >> 8).to(tl.uint8)
    return byte


@triton.jit
def _place(N, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """This program's groups [BLOCK], its elements [BLOCK, 8], and masks of both.

    TAIL: what the last program may have too many of: "" nothing, "groups", or "elements" (of floats alone).
    """
    # what is not known to be contiguous comes to threads one by one, as [BLOCK, 8] does; int4's words would come in
    # twos otherwise, and move through shared memory to where they are needed
    group = tl.max_contiguous(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1)
    at = group.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
    whole = tl.full([BLOCK], True, tl.int1) if TAIL == "" else group < N // 8
    return group, at, whole, at < N if TAIL == "elements" else whole[:, None]


@triton.jit
def _code(value, group, at, whole, live, KIND: tl.constexpr, BY_HAND: tl.constexpr):
    """The stored numbers as float32, before their scale."""
    if KIND == "int4":
        code = _fields(value, group, whole, 4).to(tl.float32)
    elif KIND == "fp8" or KIND == "fp8-e5m2":
        code = _from_byte(tl.load(value + at, mask=live, other=0), KIND, BY_HAND)
    else:
        code = tl.load(value + at, mask=live, other=0).to(tl.float32)
    return code


@triton.jit
def _store(value, new, group, at, whole, live, KIND: tl.constexpr, BY_HAND: tl.constexpr):
    """The inverse of _code."""
    if KIND == "int4":
        _store_fields(value, new.to(tl.int32), group, whole, 4)
    elif KIND == "fp8" or KIND == "fp8-e5m2":
        tl.store(value + at, _to_byte(new, KIND, BY_HAND), mask=live)
    else:
        tl.store(value + at, new.to(value.dtype.element_ty), mask=live)


@triton.jit
def _row(group, MAGIC, SHIFT):
    """group // PER_ROW by a product: of integers with a divisor that is not known, a division takes 25 instructions."""
    return (group.to(tl.uint64) * MAGIC.to(tl.uint32) >> SHIFT).to(tl.int32)


@triton.jit
def _unit(scale, group, whole, PER_ROW, MAGIC, SHIFT, KIND: tl.constexpr, ONE_ROW: tl.constexpr):
    """The scale of each group of 8, [BLOCK, 1], or where a program's are all in one row [1, 1]; floats have none."""
    if KIND == "fp32" or KIND == "bf16":
        unit = tl.full([group.shape[0], 1], 1.0, tl.float32)
    elif ONE_ROW:
        first = tl.program_id(0) * group.shape[0] + tl.arange(0, 1)
        unit = tl.load(scale + _row(first, MAGIC, SHIFT))[:, None]
    else:
        row = _row(group, MAGIC, SHIFT)
        if KIND == "int4":
            column = (group - row * PER_ROW).to(tl.uint32)
            row = row * tl.cdiv(PER_ROW * 8, GROUP_) + (column // (GROUP_ // 8)).to(tl.int32)
        unit = tl.load(scale + row, mask=whole, other=1)[:, None]
    return unit


@triton.jit
def _power(code, unit, KIND: tl.constexpr):
    """Each store's spacing over its scale, a power of two; of fp8 2^MANTISSA times that."""
    if KIND == "fp32":
        power = unit * 0
    elif KIND == "bf16":
        power = _power_below(code) * 0.0078125  # 2^-7
    elif KIND == "fp8":
        power = tl.maximum(_power_below(code), 0.015625)  # 2^-6
    elif KIND == "fp8-e5m2":
        power = tl.maximum(_power_below(code), 0.00006103515625)  # 2^-14
    else:
        power = unit * 0 + 1.0
    return power


@triton.jit
def _land(code, d, words, KIND: tl.constexpr, TOP: tl.constexpr):
    """Each store's land, before its scale.  d: over the scale too."""
    if KIND == "fp32":
        new = code + d
    elif KIND == "bf16":
        new = _cut(code + d, words, 16)
    elif KIND == "fp8":
        new = _round8(d + code, words, 3, -6, 448.0)
    elif KIND == "fp8-e5m2":
        new = _round8(d + code, words, 2, -14, 57344.0)
    else:
        new = _stochastic_round(d, words) + code
        new = tl.minimum(tl.maximum(new, -TOP), TOP)
    return new


VARYING = ["MAGIC", "SHIFT", "factor", "grain", "step", "tensor", "query", "k0", "k1"]  # never compile-time constants


@triton.jit(do_not_specialize=VARYING)
def _pair_kernel(
    pair, value, scale, knots, rows, ROWS, PER_ROW, MAGIC, SHIFT, LENGTH, factor, grain, step, tensor, query, k0, k1,
    KIND: tl.constexpr, TOP: tl.constexpr, LEVELS: tl.constexpr, CODES: tl.constexpr, PLUS: tl.constexpr,
    MINUS: tl.constexpr, CHOSEN: tl.constexpr, BYTES: tl.constexpr, BY_HAND: tl.constexpr, TAIL: tl.constexpr,
    ONE_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, at, whole, live = _place(LENGTH, TAIL, BLOCK)
    to, step = at, number_(step)
    if CHOSEN:  # groups of the rows' rows
        row = _row(group, MAGIC, SHIFT)
        row, column = tl.load(rows + row, mask=whole, other=0), group - row * PER_ROW
        known = (row >= 0) & (row < ROWS)
        row = tl.where(known, row, 0)
        group = (row * PER_ROW + column).to(tl.int32)
        at = group.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
    code = _code(value, group, at, whole, live, KIND, BY_HAND)
    unit = _unit(scale, group, whole, PER_ROW, MAGIC, SHIFT, KIND, ONE_ROW)
    if CHOSEN:  # a row that is not there is not a number: no wrong memory is read, and no loss looks right
        unit = tl.where(known[:, None], unit, float("nan"))
    over_unit: tl.constexpr = BYTES or (CODES and KIND != "fp32" and KIND != "bf16")
    if LEVELS == NO_DIRECTION:
        d = unit * 0
    else:
        power = _power(code, unit, KIND)
        d = _along(
            factor, grain, unit, power, knots, group, step, tensor, query, k0, k1, PROBE_ROUNDING, LEVELS, KIND,
            over_unit, True,
        )  # fmt: skip
    if CODES:
        words = _bits32(group, step, tensor, query, PROBE_LANDING, k0, k1)
        away = d * -1.0  # Triton's -d is 0 - d: no -0
        plus, minus = _land(code, d, words, KIND, TOP), _land(code, away, words, KIND, TOP)
        if not BYTES:
            plus, minus = plus * unit, minus * unit
    elif BYTES:
        plus, minus = code + d, code - d
    else:
        plus, minus = code * unit + d, code * unit - d
    if BYTES:
        plus, minus = _to_byte(plus, KIND, BY_HAND), _to_byte(minus, KIND, BY_HAND)
    if PLUS:
        tl.store(pair + to, plus.to(pair.dtype.element_ty), mask=live)
        pair += LENGTH
    if MINUS:
        tl.store(pair + to, minus.to(pair.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=VARYING)
def _update_kernel(
    value, scale, residual, counts, knots, factors, N, PER_ROW, MAGIC, SHIFT, grain, step, tensor, query, k0, k1,
    QUERIES: tl.constexpr, KIND: tl.constexpr, TOP: tl.constexpr, RESIDUAL: tl.constexpr, LEVELS: tl.constexpr,
    ROUNDING: tl.constexpr, BY_HAND: tl.constexpr, TAIL: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, at, whole, live = _place(N, TAIL, BLOCK)
    step = number_(step)
    old = _code(value, group, at, whole, live, KIND, BY_HAND)
    unit = _unit(scale, group, whole, PER_ROW, MAGIC, SHIFT, KIND, ONE_ROW)
    power = _power(old, unit, KIND)
    integers: tl.constexpr = KIND == "int8" or KIND == "int4"
    coded: tl.constexpr = KIND != "fp32" and KIND != "bf16"
    if LEVELS == -1:  # random_bits.reuse
        words = _bits32(group, step, tensor, query, DIRECTION, k0, k1)
        landing = tl.mul(words, GOLDEN_, sanitize_overflow=False)
    else:
        landing = _bits32(group, step, tensor, query, WEIGHT_ROUNDING, k0, k1)
    if RESIDUAL:
        old = old * (1 << RESIDUAL) + _fields(residual, group, whole, RESIDUAL).to(tl.float32)
    fine_unit = unit * (1.0 / (1 << RESIDUAL))
    if LEVELS == -1 and coded and QUERIES == 1:
        factor = tl.load(factors)
        d, hit = _grid_step(tl.abs(factor), words, unit, power, grain, KIND, True)
        d = _like(d * (1 << RESIDUAL), factor)
        if integers:  # one size for all of a group: rounded once, and by each element's own word
            moved = _signed(_stochastic_round(d, landing), words, hit)
        else:
            d = _signed(d, words, hit)
    else:
        d = _along(
            tl.load(factors), grain, unit, power, knots, group, step, tensor, query, k0, k1, ROUNDING, LEVELS, KIND,
            False, False,
        )  # fmt: skip
        for q in range(1, QUERIES):
            d += _along(
                tl.load(factors + q), grain, unit, power, knots, group, step, tensor, query + q, k0, k1, ROUNDING,
                LEVELS, KIND, False, False,
            )  # fmt: skip
        if coded:
            d = _divide(d, fine_unit)
        if integers:
            moved = _stochastic_round(d, landing)
    if integers:
        wanted = moved + old
        bottom = -TOP - 1 if RESIDUAL else -TOP  # Integers.lowest
        new = tl.minimum(tl.maximum(wanted, bottom), TOP)
        held = new != wanted
    else:
        new = _land(old, d, landing, KIND, TOP)
        held = tl.abs(d + old) > TOP
    counts += tl.program_id(0) % SHARDS_ * 2
    both = tl.sum(tl.where(live & (new != old), 1, 0) + tl.where(live & held, 65536, 0))
    tl.atomic_add(counts, (both & 0xFFFF).to(tl.int64), sem="relaxed")  # or all of the program's stores are waited for
    tl.atomic_add(counts + 1, (both >> 16).to(tl.int64), sem="relaxed")
    if RESIDUAL:
        code = tl.floor((new + (1 << (RESIDUAL - 1))) * (1.0 / (1 << RESIDUAL)))
        _store_fields(residual, (new - code * (1 << RESIDUAL)).to(tl.int32), group, whole, RESIDUAL)
        new = code
    _store(value, new, group, at, whole, live, KIND, BY_HAND)


def serves(stored: Stored) -> bool:
    """Whether the kernels can stand in for the definitions.  The oracle is there to check them."""
    return stored.device.type == "cuda" and not isinstance(stored, Oracle) and fits(stored)


def fits(stored: Stored) -> bool:
    """Whether a store's rows are whole groups of 8, or there is only one."""
    return len(stored.shape) == 1 or stored.shape[1] % 8 == 0


def _kind(stored: Stored) -> tuple[str, float]:
    """A store's name in the kernels, and the largest number that its codes reach."""
    if isinstance(stored, Integers):
        return f"int{stored.bits}", float(stored.top)
    if isinstance(stored, Fp8):
        return ("fp8" if stored.grid.mantissa == 3 else "fp8-e5m2"), stored.grid.top
    assert isinstance(stored, Float)
    return ("bf16" if stored.rounds else "fp32"), float("inf")


WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bits a field: 8 of them


def _arguments(stored: Stored, key: Key) -> tuple[Tensor, Tensor, int, int, list[int | Tensor]]:
    """What both kernels need: numbers, scales (unused for floats), how many, groups a row, the key in 32-bit words."""
    R, C = matrix_shape(stored.shape)
    words = as_int32(key.step, key.tensor, key.query, key.seed & LOW, key.seed >> 32 & LOW)
    if isinstance(stored, Float):
        return stored.value, stored.value, R * C, -(-C // 8), words
    value = stored.codes.view(torch.uint8) if isinstance(stored, Fp8) else stored.codes
    value = value.view(WORDS[4]) if value.shape[1] < C else value
    return value, stored.scale, R * C, C // 8, words


@cache
def _magic(divisor: int) -> tuple[int, int]:
    """What _row needs: n // divisor = n * magic >> shift for all n in [0, 2^31), magic in 32 bits.

    magic is 2^shift / divisor rounded up, by less than 1: n of that are less than 2^31, which is 2^shift / divisor at
    most, so the quotient grows by less than the 1 / divisor that it may lack to the next whole number.
    """
    shift = 31 + (divisor - 1).bit_length()
    return *as_int32(-(-(1 << shift) // divisor)), shift


def _on(device: torch.device):
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _by_hand(device: torch.device) -> bool:
    """Whether fp8 has to be converted by hand: Triton's interpreter has none, nor have GPUs before 2022."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)


def _tail(n: int, block: int) -> str:
    """_place's."""
    return "elements" if n % 8 else "groups" if n % (8 * block) else ""


def _one_row(stored: Stored, per_row: int, block: int) -> bool:
    """Whether a program's groups all have one scale, so that what belongs to it is computed once for all of them."""
    return not isinstance(stored, Float) and stored.scale.shape[1] == 1 and per_row % block == 0


def _programs(n: int, block: int) -> tuple[int]:
    return (triton.cdiv(n, 8 * block),)


def read_pair(
    stored: Stored, key: Key, zo: ZO, knots: Tensor, dtype: torch.dtype, signs: tuple[int, ...] = (1, -1),
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[P, R, C] in dtype: w + eps u1 and w - eps u1, or one of them; of chosen rows [n] int64, [P, n, C].

    The definitions are zo_optim.Pair.read and rows.
    """
    return _materialise(stored, key, dtype, rows, len(signs), knots, zo.times(zo.eps), zo.grain,
                        LEVELS=zo.levels, CODES=zo.probe == "codes", PLUS=1 in signs, MINUS=-1 in signs)  # fmt: skip


def read(stored: Stored, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The weights as they are: [1, R, C] in dtype, or [1, n, C].  The definition is model.StoredView."""
    return _materialise(stored, Key(0, 0), dtype, rows, 1, None, 0.0, 0.0,
                        LEVELS=NO_DIRECTION.value, CODES=False, PLUS=True, MINUS=False)  # fmt: skip


def _materialise(
    stored: Stored, key: Key, dtype: torch.dtype, rows: Tensor | None, P: int, knots: Tensor | None, factor: float,
    grain: float, **options,
) -> Tensor:  # fmt: skip
    value, scale, n, per_row, words = _arguments(stored, key)
    kind, top = _kind(stored)
    R, C = matrix_shape(stored.shape)
    pair = torch.empty(P, R if rows is None else len(rows), C, dtype=dtype, device=value.device)
    length, is_codes = pair[0].numel(), dtype.itemsize == 1  # which Triton is given as bytes
    out, unused = pair.view(torch.uint8) if is_codes else pair, value  # kernels take no None
    knots, chosen = unused if knots is None else knots, unused if rows is None else rows
    with _on(value.device):
        _pair_kernel[_programs(length, PAIR_BLOCK)](
            out, value, scale, knots, chosen, R, per_row, *_magic(per_row), length, factor, grain, *words,
            KIND=kind, TOP=top, CHOSEN=rows is not None, BYTES=is_codes, BY_HAND=_by_hand(value.device),
            TAIL=_tail(length, PAIR_BLOCK), ONE_ROW=rows is None and _one_row(stored, per_row, PAIR_BLOCK),
            BLOCK=PAIR_BLOCK, **options, **EXACT,
        )  # fmt: skip
    return pair


def update_(stored: Stored, key: Key, factors: Tensor, zo: ZO, knots: Tensor, counts: Tensor) -> None:
    """w += the sum of coefficient_i * u2_i, landing stochastically on the grid; adds to counts [SHARDS, 2] int64.

    factors [n] float32: zo.times of the coefficients.  The definition is zo_optim.land_steps, plain.
    """
    value, scale, n, per_row, words = _arguments(stored, key)
    kind, top = _kind(stored)
    bits = stored.residual_bits if isinstance(stored, Integers) else 0
    with _on(value.device):
        _update_kernel[_programs(n, UPDATE_BLOCK)](
            value, scale, stored.residual.view(WORDS[bits]) if bits else value, counts, knots, factors, n, per_row,
            *_magic(per_row), zo.grain, *words, QUERIES=len(factors), KIND=kind, RESIDUAL=bits,
            TOP=float(stored.limit) if bits else top, LEVELS=zo.levels, ROUNDING=int(zo.step_rounding),
            BY_HAND=_by_hand(value.device), TAIL=_tail(n, UPDATE_BLOCK),
            ONE_ROW=_one_row(stored, per_row, UPDATE_BLOCK), BLOCK=UPDATE_BLOCK, **EXACT,
        )  # fmt: skip
