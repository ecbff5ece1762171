"""One Triton kernel a tensor for what zo_optim.ZO and quant.StoredWeights define in plain torch.

The plain definitions draw, round and add in some fifty small kernels a tensor, so a small model waits for
launches and a large one for memory.  These do the same arithmetic on the same Philox bits in one pass;
tests/test_gpu.py demands equal codes and equal floats (hence no fused multiply-add and division to nearest).

Each program takes BLOCK groups of 8 neighbouring elements, which share a Philox block a draw.
A group is in one row and under one scale, so what belongs to those is computed once for the 8, and a thread keeps all
of them: tensors are [BLOCK], [BLOCK, 1] or [BLOCK, 8], and nothing moves between threads.  Where all of a program is in
one row (ONE_ROW), what belongs to it is computed once, [1, 1].
Imports zo_optim, quant, random_bits and gpu's graphs.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.graphs import CudaGraphed
from quant import COUNTED, E4M3, FARTHEST, FP8_SPACING, GROUP_SIZE, Float, Fp8, Integers, Store, StoredWeights
from random_bits import LOW, M0, M1, W0, W1, Key, Purpose, tensor_id
from zo_optim import ZO, LossFn, as_kind, quantile_knots

PAIR_BLOCK, UPDATE_BLOCK = 256, 512  # groups a program, two and four to a thread: as measured (NOTES.md)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NO_DIRECTION = tl.constexpr(-2)  # beside the levels of directions (_levels)
SHARDS = 256  # of the counts, since programs that add to one number wait for one another
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where the definition rounds twice
GROUP_, SHARDS_, COUNTED_ = tl.constexpr(GROUP_SIZE), tl.constexpr(SHARDS), tl.constexpr(COUNTED)
FP8_SPACING_, FARTHEST_ = tl.constexpr(FP8_SPACING), tl.constexpr(FARTHEST)
DIRECTION, PROBE_ROUNDING = tl.constexpr(int(Purpose.DIRECTION)), tl.constexpr(int(Purpose.PROBE_ROUNDING))
WEIGHT_ROUNDING, PROBE_LANDING = tl.constexpr(int(Purpose.WEIGHT_ROUNDING)), tl.constexpr(int(Purpose.PROBE_LANDING))
M0_, M1_, W0_, W1_ = tl.constexpr(M0), tl.constexpr(M1), tl.constexpr(W0), tl.constexpr(W1)


@triton.jit
def _number(x):
    """A number, given by value or by its address."""
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """random_bits.philox for counters c0 [...] uint32 and five numbers of 32 bits -> four uint32 words each.

    Triton's own takes the halves of a product apart, with a multiplication each.
    """
    zero = c0 * 0
    c1, c2, c3 = (zero + c1).to(tl.uint32), (zero + c2).to(tl.uint32), (zero + c3).to(tl.uint32)
    k0, k1 = (zero + k0).to(tl.uint32), (zero + k1).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * M0_, c2.to(tl.uint64) * M1_
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 = tl.add(k0, W0_, sanitize_overflow=False)
        k1 = tl.add(k1, W1_, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["c1", "c2", "c3", "k0", "k1"])  # a compile for each step otherwise
def _philox_kernel(blocks, words, n, c1, c2, c3, k0, k1, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    c0 = tl.load(blocks + at, mask=live, other=0).to(tl.uint32)
    w0, w1, w2, w3 = _philox(c0, _number(c1), c2, c3, k0, k1)
    tl.store(words + at * 4 + 0, w0.to(tl.int32, bitcast=True), mask=live)
    tl.store(words + at * 4 + 1, w1.to(tl.int32, bitcast=True), mask=live)
    tl.store(words + at * 4 + 2, w2.to(tl.int32, bitcast=True), mask=live)
    tl.store(words + at * 4 + 3, w3.to(tl.int32, bitcast=True), mask=live)


@triton.jit
def _words(block, step, tensor, query, USE: tl.constexpr, k0, k1):
    """random_bits.philox_blocks for counter blocks [BLOCK] -> four uint32 words each."""
    return _philox(block.to(tl.uint32), step, tensor, query * 16 + USE, k0, k1)


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
    """zo_optim.normal_table's entries, from normal_knots."""
    knot = tl.load(knots + ((bits >> 4) & 2047)).to(tl.uint32, bitcast=True)
    size = ((knot & 0xFFFFF) + (knot >> 20) * ((bits << 1) & 30).to(tl.uint32) >> 3).to(tl.int32)
    return tl.where(bits < 32768, size, -size)


@triton.jit
def _direction(knots, group, step, tensor, query, k0, k1, ROUNDING: tl.constexpr, LEVELS: tl.constexpr):
    """ZO.direction, [BLOCK, 8]; LEVELS 0 is the full direction, NO_DIRECTION zeros."""
    if LEVELS == NO_DIRECTION:
        d = tl.zeros([group.shape[0], 8], tl.float32)
    elif LEVELS == 0:
        u = _normal(knots, _bits16(group, step, tensor, query, DIRECTION, k0, k1))
        d = u.to(tl.float32) * 0.00006103515625  # 2^-14
    else:
        u = _normal(knots, _bits16(group, step, tensor, query, DIRECTION, k0, k1))
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
def _round8(x, words, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr):
    """quant.Fp8Format.round, stochastic."""
    down: tl.constexpr = 2.0 ** (-126 - MIN_EXPONENT)
    up: tl.constexpr = 2.0 ** (126 + MIN_EXPONENT)
    cut = _cut(tl.minimum(tl.maximum(x, -MAX), MAX) * down, words, 23 - MANTISSA_BITS)
    return tl.fma(cut, tl.full(cut.shape, up, tl.float32), 0.0)  # not a product: of -0 it makes +0


@triton.jit
def _nearest8(x, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX: tl.constexpr):
    """quant.Fp8Format.round to nearest, ties to even."""
    x = tl.minimum(tl.maximum(x, -MAX), MAX)
    cut: tl.constexpr = 23 - MANTISSA_BITS
    pattern = x.to(tl.int32, bitcast=True)
    pattern = (pattern + ((pattern >> cut) & 1) + ((1 << (cut - 1)) - 1)) & -(1 << cut)
    # there a float32's last place is the even part's step
    shift: tl.constexpr = 1.5 * 2.0 ** (23 + MIN_EXPONENT - MANTISSA_BITS)
    even = ((x + shift) - shift).to(tl.int32, bitcast=True) | x.to(tl.int32, bitcast=True) & -(2**31)  # also of -0
    return tl.where(tl.abs(x) < 2.0**MIN_EXPONENT, even, pattern).to(tl.float32, bitcast=True)


@triton.jit
def _fields(packed, group, live, BITS: tl.constexpr):
    """quant.unpack_bits: the 8 signed numbers of BITS bits of each group, which fill BITS bytes, [BLOCK, 8] int32."""
    word = tl.load(packed + group, mask=live, other=0)
    fields = _in_order(
        word, word >> BITS, word >> (2 * BITS), word >> (3 * BITS), word >> (4 * BITS), word >> (5 * BITS),
        word >> (6 * BITS), word >> (7 * BITS),
    ).to(tl.int32) & ((1 << BITS) - 1)  # fmt: skip
    half: tl.constexpr = 1 << (BITS - 1)
    return (fields ^ half) - half


@triton.jit
def _store_fields(packed, numbers, group, live, BITS: tl.constexpr):
    """quant.pack_bits."""
    fields = (numbers & ((1 << BITS) - 1)).to(packed.dtype.element_ty)
    even, odd = tl.split(tl.reshape(fields, [group.shape[0], 2, 2, 2]))
    pairs = even | (odd << BITS)  # [BLOCK, 2, 2]
    even, odd = tl.split(pairs)
    fours = even | (odd << (2 * BITS))
    even, odd = tl.split(fours)
    tl.store(packed + group, even | (odd << (4 * BITS)), mask=live)


@triton.jit
def _from_byte(byte, BY_HAND: tl.constexpr):
    """e4m3 codes, uint8 -> float32.  By hand, where there is no fp8: through float16, whose exponent is 8 higher."""
    if not BY_HAND:
        x = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        byte = byte.to(tl.int32)
        half = (byte & 0x7F) << 7 | (byte & 0x80) << 8
        x = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return x


@triton.jit
def _to_byte(x, BY_HAND: tl.constexpr):
    """float32 -> e4m3 codes, uint8: to nearest, ties to even, sizes beyond the largest to the largest."""
    if not BY_HAND:
        byte = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        half = (_nearest8(x, 3, -6, 448.0) * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        byte = ((half >> 7) & 0x7F | (half >> 8) & 0x80).to(tl.uint8)
    return byte


@triton.jit
def _place(N, TAIL: tl.constexpr, BLOCK: tl.constexpr, FIRST=0):
    """This program's groups [BLOCK], its elements [BLOCK, 8], and masks of both.  FIRST: the first program's first.

    TAIL: what the last program may have too many of: "" nothing, "groups", or "elements" (of floats alone).
    """
    # what is not known to be contiguous comes to threads one by one, as [BLOCK, 8] does; int4's words would come in
    # twos otherwise, and move through shared memory to where they are needed
    group = tl.max_contiguous(FIRST + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1)
    at = group.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
    whole = tl.full([BLOCK], True, tl.int1) if TAIL == "" else group < N // 8
    return group, at, whole, at < N if TAIL == "elements" else whole[:, None]


@triton.jit
def _code(value, group, at, whole, live, KIND: tl.constexpr, BY_HAND: tl.constexpr):
    """The stored numbers as float32, before their scale."""
    if KIND == "int4":
        code = _fields(value, group, whole, 4).to(tl.float32)
    elif KIND == "fp8":
        code = _from_byte(tl.load(value + at, mask=live, other=0), BY_HAND)
    else:
        code = tl.load(value + at, mask=live, other=0).to(tl.float32)
    return code


@triton.jit
def _store(value, new, group, at, whole, live, KIND: tl.constexpr, BY_HAND: tl.constexpr):
    """The inverse of _code."""
    if KIND == "int4":
        _store_fields(value, new.to(tl.int32), group, whole, 4)
    elif KIND == "fp8":
        tl.store(value + at, _to_byte(new, BY_HAND), mask=live)
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
        unit = tl.load(scale + _row(first, MAGIC, SHIFT)).to(tl.float32)[:, None]
    else:
        row = _row(group, MAGIC, SHIFT)
        if KIND == "int4":
            column = (group - row * PER_ROW).to(tl.uint32)
            row = row * tl.cdiv(PER_ROW * 8, GROUP_) + (column // (GROUP_ // 8)).to(tl.int32)
        unit = tl.load(scale + row, mask=whole, other=1).to(tl.float32)[:, None]
    return unit


@triton.jit
def _add_rounded(code, d, words, KIND: tl.constexpr, MAX: tl.constexpr):
    """Each store's add_rounded, before its scale.  d: over the scale too."""
    if KIND == "fp32":
        new = code + d
    elif KIND == "bf16":
        new = _cut(code + d, words, 16)
    elif KIND == "fp8":
        new = _round8(d + code, words, 3, -6, 448.0)
    else:
        new = _stochastic_round(d, words) + code
        new = tl.minimum(tl.maximum(new, -MAX), MAX)
    return new


# Arguments that are never compile-time constants
VARYING = ["MAGIC", "SHIFT", "factor", "t", "step", "tensor", "query", "k0", "k1"]


@triton.jit(do_not_specialize=VARYING)
def _pair_kernel(
    pair, value, scale, knots, rows, ROWS, PER_ROW, MAGIC, SHIFT, LENGTH, factor, step, tensor, query, k0, k1,
    KIND: tl.constexpr, MAX: tl.constexpr, LEVELS: tl.constexpr, CODES: tl.constexpr, PLUS: tl.constexpr,
    MINUS: tl.constexpr, CHOSEN: tl.constexpr, BYTES: tl.constexpr, OVER_UNIT: tl.constexpr, BY_HAND: tl.constexpr,
    TAIL: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OVER_UNIT: a direction is added to codes, not to weights."""
    group, at, whole, live = _place(LENGTH, TAIL, BLOCK)
    to, step = at, _number(step)
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
    d = _direction(knots, group, step, tensor, query, k0, k1, PROBE_ROUNDING, LEVELS) * factor
    if OVER_UNIT:
        d = _divide(d, unit)
    if CODES:
        words = _bits32(group, step, tensor, query, PROBE_LANDING, k0, k1)
        away = d * -1.0  # Triton's -d is 0 - d: no -0
        plus, minus = _add_rounded(code, d, words, KIND, MAX), _add_rounded(code, away, words, KIND, MAX)
        if not BYTES:
            plus, minus = plus * unit, minus * unit
    elif BYTES:
        plus, minus = code + d, code - d
    else:
        plus, minus = code * unit + d, code * unit - d
    if BYTES:
        plus, minus = _to_byte(plus, BY_HAND), _to_byte(minus, BY_HAND)
    if PLUS:
        tl.store(pair + to, plus.to(pair.dtype.element_ty), mask=live)
        pair += LENGTH
    if MINUS:
        tl.store(pair + to, minus.to(pair.dtype.element_ty), mask=live)


@triton.jit
def _count(counts, old, new, lost, live, KIND: tl.constexpr):
    """quant.landing_counts, added to this program's row of counts.

    Up to 65,535 elements, so that two counts share a sum; "relaxed", or all of the program's stores are waited for.
    """
    counts += tl.program_id(0) % SHARDS_ * COUNTED_
    changed, held = live & (new != old), live & (lost > 0)
    both = tl.sum(tl.where(changed, 1, 0) + tl.where(changed | held, 65536, 0))
    tl.atomic_add(counts, (both & 0xFFFF).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, (both >> 16).to(tl.int64), sem="relaxed")
    if KIND == "int8" or KIND == "int4" or KIND == "fp8":
        lost = tl.where(held, tl.minimum(lost, FARTHEST_), 0.0)
        way = tl.where(live, tl.abs(new - old), 0.0) + lost
        if KIND == "fp8":
            way, lost = (way * (1.0 / FP8_SPACING_)).to(tl.int64), (lost * (1.0 / FP8_SPACING_)).to(tl.int64)
        elif len(way.shape) == 2:
            way, lost = tl.sum(way, 1), tl.sum(lost, 1)  # a thread's own, whole numbers, and so few that it is exact
        tl.atomic_add(counts + 3, tl.sum(way.to(tl.int64)), sem="relaxed")
        if tl.max(tl.where(held, 1, 0)) > 0:
            tl.atomic_add(counts + 2, tl.sum(tl.where(held, 1, 0)).to(tl.int64), sem="relaxed")
            tl.atomic_add(counts + 4, tl.sum(lost.to(tl.int64)), sem="relaxed")


@triton.jit
def _held(
    value, scale, residual, group, at, whole, live, PER_ROW, MAGIC, SHIFT, step, tensor, query, k0, k1,
    KIND: tl.constexpr, RESIDUAL: tl.constexpr, BY_HAND: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """What a step lands on and by: fine codes, or floats; their scale; random bits."""
    old = _code(value, group, at, whole, live, KIND, BY_HAND)
    unit = _unit(scale, group, whole, PER_ROW, MAGIC, SHIFT, KIND, ONE_ROW)
    landing = _bits32(group, step, tensor, query, WEIGHT_ROUNDING, k0, k1)
    if RESIDUAL:
        old = old * (1 << RESIDUAL) + _fields(residual, group, whole, RESIDUAL).to(tl.float32)
    return old, unit, landing


@triton.jit
def _land(
    value, residual, counts, old, unit, d, landing, group, at, whole, live, KIND: tl.constexpr, MAX: tl.constexpr,
    RESIDUAL: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Store.add_rounded_ of d on what _held returned, whose results are counted."""
    if KIND != "fp32" and KIND != "bf16":
        d = _divide(d, unit * (1.0 / (1 << RESIDUAL)))
    if KIND == "int8" or KIND == "int4":
        wanted = _stochastic_round(d, landing) + old
        bottom = -MAX - 1 if RESIDUAL else -MAX  # Integers.min_fine
        new = tl.minimum(tl.maximum(wanted, bottom), MAX)
        lost = tl.abs(wanted - new)
    else:
        new = _add_rounded(old, d, landing, KIND, MAX)
        lost = tl.maximum(tl.abs(d + old) - MAX, 0.0)
    _count(counts, old, new, lost, live, KIND)
    if RESIDUAL:
        code = tl.floor((new + (1 << (RESIDUAL - 1))) * (1.0 / (1 << RESIDUAL)))
        _store_fields(residual, (new - code * (1 << RESIDUAL)).to(tl.int32), group, whole, RESIDUAL)
        new = code
    _store(value, new, group, at, whole, live, KIND, BY_HAND)


@triton.jit(do_not_specialize=VARYING)
def _update_kernel(
    value, scale, residual, counts, knots, factors, N, PER_ROW, MAGIC, SHIFT, step, tensor, query, k0, k1,
    QUERIES: tl.constexpr, KIND: tl.constexpr, MAX: tl.constexpr, RESIDUAL: tl.constexpr, LEVELS: tl.constexpr,
    ROUNDING: tl.constexpr, BY_HAND: tl.constexpr, TAIL: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, at, whole, live = _place(N, TAIL, BLOCK)
    step = _number(step)
    old, unit, landing = _held(
        value, scale, residual, group, at, whole, live, PER_ROW, MAGIC, SHIFT, step, tensor, query, k0, k1, KIND,
        RESIDUAL, BY_HAND, ONE_ROW,
    )  # fmt: skip
    d = _direction(knots, group, step, tensor, query, k0, k1, ROUNDING, LEVELS) * tl.load(factors)
    for q in range(1, QUERIES):
        d += _direction(knots, group, step, tensor, query + q, k0, k1, ROUNDING, LEVELS) * tl.load(factors + q)
    _land(value, residual, counts, old, unit, d, landing, group, at, whole, live, KIND, MAX, RESIDUAL, BY_HAND)


@triton.jit(do_not_specialize=[*VARYING, "FIRST", "N"])
def _land_kernel(
    value, scale, residual, counts, delta, FIRST, N, PER_ROW, MAGIC, SHIFT, step, tensor, query, k0, k1,
    KIND: tl.constexpr, MAX: tl.constexpr, RESIDUAL: tl.constexpr, BY_HAND: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From group FIRST on, up to element N; delta begins there."""
    group, at, whole, live = _place(N, TAIL, BLOCK, FIRST)
    old, unit, landing = _held(
        value, scale, residual, group, at, whole, live, PER_ROW, MAGIC, SHIFT, _number(step), tensor, query, k0, k1,
        KIND, RESIDUAL, BY_HAND, False,
    )  # fmt: skip
    d = tl.load(delta + (at - FIRST.to(tl.int64) * 8), mask=live, other=0)
    _land(value, residual, counts, old, unit, d, landing, group, at, whole, live, KIND, MAX, RESIDUAL, BY_HAND)


@triton.jit(do_not_specialize=VARYING)
def _land_product_kernel(
    value, scale, residual, counts, left, right, factors, R, C, PER_ROW, MAGIC, SHIFT, step, tensor, query, k0, k1,
    LENGTH: tl.constexpr, QUERIES: tl.constexpr, RANK: tl.constexpr, ROOM: tl.constexpr, KIND: tl.constexpr,
    MAX: tl.constexpr, RESIDUAL: tl.constexpr, BY_HAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the matrix.  left [QUERIES, R, RANK] float64, right [C, RANK] float32; ROOM: for RANK."""
    row, column, r = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS, tl.arange(0, ROOM)
    rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    at_right = right + columns * RANK + r[:, None]
    b = tl.load(at_right, mask=(columns < C) & (r < RANK)[:, None], other=0).to(tl.float64)
    d = tl.zeros([ROWS, COLUMNS], tl.float32)
    for q in range(QUERIES):
        at_left = left + (q * R + rows).to(tl.int64) * RANK + r[None, :]
        a = tl.load(at_left, mask=(rows < R) & (r < RANK)[None, :], other=0)
        u = (tl.dot(a, b, out_dtype=tl.float64) * LENGTH).to(tl.float32)
        d += u * tl.load(factors + q)
    inner = column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    group = tl.reshape(rows * PER_ROW + inner, [ROWS * COLUMNS // 8])
    whole = tl.reshape((rows < R) & (inner < PER_ROW), [ROWS * COLUMNS // 8])
    at, live = group.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :], whole[:, None]
    old, unit, landing = _held(
        value, scale, residual, group, at, whole, live, PER_ROW, MAGIC, SHIFT, _number(step), tensor, query, k0, k1,
        KIND, RESIDUAL, BY_HAND, False,
    )  # fmt: skip
    d = tl.reshape(d, [ROWS * COLUMNS // 8, 8])
    _land(value, residual, counts, old, unit, d, landing, group, at, whole, live, KIND, MAX, RESIDUAL, BY_HAND)


def fits(stored: Store) -> bool:
    """Whether a kernel can stand in for the definitions: not for the oracle, which is there to check them, and where
    the rows of a matrix are whole groups of 8."""
    return type(stored) in (Float, Integers, Fp8) and (len(stored.shape) < 2 or stored.matrix_shape[1] % 8 == 0)


def _kind(stored: Store) -> tuple[str, float]:
    """A store's name in the kernels, and the largest number that its codes reach."""
    if isinstance(stored, Integers):
        return f"int{stored.bits}", float(stored.max_code)
    if isinstance(stored, Fp8):
        return "fp8", E4M3.max_value
    return ("bf16" if stored.rounds else "fp32"), float("inf")


def _levels(zo: ZO) -> int:
    """Codes on each side of 0 of a direction: 7 for 4 bits; 0 stands for the full direction."""
    return 0 if zo.bits is None else 2 ** (zo.bits - 1) - 1


@cache
def normal_knots(device: torch.device) -> Tensor:
    """zo_optim.normal_table in 8 kB, [2048] int32: the f-th of a piece's 16 midpoints is
    (lower 20 bits + 2 f * upper 12) >> 3.

    They stay in a GPU's first-level cache, where the table's 256 kB do not.
    """
    knots = quantile_knots()
    packed = [32 * low + (high - low) + 4 | high - low << 20 for low, high in zip(knots, knots[1:], strict=False)]
    return torch.tensor(as_int32(*packed), dtype=torch.int32, device=device)


def as_int32(*words: int | Tensor) -> list[int | Tensor]:
    """32-bit words as signed numbers of the same bits: one kernel argument type, whatever their top bit.  Numbers in
    memory (a recorded step's, graphs.py) stay there."""
    return [w if isinstance(w, Tensor) else w - (1 << 32) if w >> 31 else w for w in words]


WORD_OF_8 = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bits a field


def _arguments(stored: Store, key: Key) -> tuple[Tensor, Tensor, int, int, list[int | Tensor]]:
    """Both kernels' arguments: numbers, scales (unused for floats), their count, groups a row, the key in words."""
    R, C = stored.matrix_shape
    words = as_int32(key.step, key.tensor, key.query, key.seed & LOW, key.seed >> 32 & LOW)
    if isinstance(stored, Float):
        return stored.value, stored.value, R * C, -(-C // 8), words
    value = stored.codes.view(torch.uint8) if isinstance(stored, Fp8) else stored.codes
    value = value.view(WORD_OF_8[4]) if value.shape[1] < C else value
    return value, stored.scale, R * C, C // 8, words


@cache
def _magic(divisor: int) -> tuple[int, int]:
    """The two numbers of _row: n // divisor = n * magic >> shift for all n in [0, 2^31), magic in 32 bits.

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
    """_place's TAIL for n elements."""
    return "elements" if n % 8 else "groups" if n % (8 * block) else ""


def _one_row(stored: Store, per_row: int, block: int) -> bool:
    """Whether a program's groups all have one scale, so that what belongs to it is computed once for all of them."""
    return not isinstance(stored, Float) and stored.scale.shape[1] == 1 and per_row % block == 0


def _programs(n: int, block: int) -> tuple[int]:
    return (triton.cdiv(n, 8 * block),)


def dequantised(stored: Store, dtype: torch.dtype, rows: Tensor | None = None, P: int = 1) -> Tensor:
    """The weights as they are, once or twice: [P, R, C] in dtype, or [P, n, C].  Defined by quant.StoredWeights."""
    return _materialise(stored, Key(0, 0), dtype, rows, P, None, 0.0,
                        LEVELS=NO_DIRECTION.value, CODES=False, PLUS=True, MINUS=P == 2)  # fmt: skip


def _materialise(
    stored: Store, key: Key, dtype: torch.dtype, rows: Tensor | None, P: int, knots: Tensor | None, factor: float,
    **options,
) -> Tensor:  # fmt: skip
    """[P, R, C] in dtype, or of rows [n] int64 alone [P, n, C]: P perturbed copies, or the weights as they are."""
    value, scale, _, per_row, words = _arguments(stored, key)
    kind, largest = _kind(stored)
    R, C = stored.matrix_shape
    pair = torch.empty(P, R if rows is None else len(rows), C, dtype=dtype, device=value.device)
    length, is_codes = pair[0].numel(), dtype.itemsize == 1  # which Triton is given as bytes
    out, unused = pair.view(torch.uint8) if is_codes else pair, value  # kernels take no None
    knots, index = unused if knots is None else knots, unused if rows is None else rows
    with _on(value.device):
        _pair_kernel[_programs(length, PAIR_BLOCK)](
            out, value, scale, knots, index, R, per_row, *_magic(per_row), length, factor, *words,
            KIND=kind, MAX=largest, CHOSEN=rows is not None, BYTES=is_codes,
            OVER_UNIT=is_codes or (options["CODES"] and not isinstance(stored, Float)), BY_HAND=_by_hand(value.device),
            TAIL=_tail(length, PAIR_BLOCK), ONE_ROW=rows is None and _one_row(stored, per_row, PAIR_BLOCK),
            BLOCK=PAIR_BLOCK, **options, **EXACT,
        )  # fmt: skip
    return pair


def _landing(stored: Store, key: Key) -> tuple[tuple, tuple, dict]:
    """What every kernel that lands is given: (numbers, scales, residual), (groups a row, _magic, key), and options."""
    value, scale, _, per_row, words = _arguments(stored, key)
    kind, largest = _kind(stored)
    bits = stored.residual_bits if isinstance(stored, Integers) else 0
    options = dict(KIND=kind, RESIDUAL=bits, MAX=float(stored.max_fine) if bits else largest,
                   BY_HAND=_by_hand(value.device), **EXACT)  # fmt: skip
    residual = stored.residual.view(WORD_OF_8[bits]) if bits else value
    return (value, scale, residual), (per_row, *_magic(per_row), *words), options


def step_(stored: Store, key: Key, factors: Tensor, zo: ZO, counts: Tensor) -> None:
    """ZO.add_directions_ of one tensor in one kernel; adds to counts [SHARDS, COUNTED] int64."""
    held, keyed, options = _landing(stored, key)
    n, device = math.prod(stored.matrix_shape), held[0].device
    rounding = Purpose.PROBE_ROUNDING if zo.estimator == "q-rge1" else Purpose.UPDATE_ROUNDING
    with _on(device):
        _update_kernel[_programs(n, UPDATE_BLOCK)](
            *held, counts, normal_knots(device), factors, n, *keyed, **options, QUERIES=len(factors),
            LEVELS=_levels(zo), ROUNDING=int(rounding), TAIL=_tail(n, UPDATE_BLOCK),
            ONE_ROW=_one_row(stored, keyed[0], UPDATE_BLOCK), BLOCK=UPDATE_BLOCK,
        )  # fmt: skip


def land_(stored: Store, rows: slice, delta: Tensor, key: Key) -> Tensor | None:
    """Store.add_rounded_ of delta [r, C] float32 in some rows, by the key's random bits, in one kernel: -> counts.

    None where no kernel fits.
    """
    if not fits(stored):
        return None
    held, keyed, options = _landing(stored, key)
    (R, C), device = stored.matrix_shape, held[0].device
    first, end = rows.start * keyed[0], min(rows.stop, R) * C
    counts = torch.zeros(SHARDS, COUNTED, dtype=torch.int64, device=device)
    with _on(device):
        _land_kernel[_programs(end - 8 * first, UPDATE_BLOCK)](
            *held, counts, delta.contiguous(), first, end, *keyed, **options,
            TAIL=_tail(end - 8 * first, UPDATE_BLOCK), BLOCK=UPDATE_BLOCK,
        )  # fmt: skip
    return counts.sum(0)


TILE, MOST_RANK = 64, 64  # rows and columns of a program, and the rank that it has room for


def land_product_(
    stored: Store, left: Tensor, right: Tensor, length: float, factors: Tensor, key: Key
) -> Tensor | None:  # fmt: skip
    """The same of sum of factors[q] * length * left[q] right^T, which is never in memory.

    left [Q, R, r] float64, right [C, r] float32, whose products' sums are to be exact in float64.
    """
    R, C = stored.matrix_shape
    rank = right.shape[1]
    if not fits(stored) or rank > MOST_RANK or C % 8:
        return None
    held, keyed, options = _landing(stored, key)
    counts = torch.zeros(SHARDS, COUNTED, dtype=torch.int64, device=left.device)
    with _on(left.device):
        _land_product_kernel[triton.cdiv(R, TILE), triton.cdiv(C, TILE)](
            *held, counts, left, right.contiguous(), factors, R, C, *keyed, **options, LENGTH=length,
            QUERIES=len(factors), RANK=rank, ROOM=max(16, triton.next_power_of_2(rank)), ROWS=TILE, COLUMNS=TILE,
        )  # fmt: skip
    return counts.sum(0)


# ---------------------------------------------------------------- the twins, as they are put in from outside


class FusedStoredWeights(StoredWeights):
    """Reads codes by one kernel a tensor; floats are there already, and may want a gradient."""

    def read(self, name: str, rows: Tensor | None = None, as_codes: bool = False) -> Tensor:
        stored = self.weights[name]
        if as_codes or isinstance(stored, Float) or not fits(stored):
            return super().read(name, rows, as_codes)
        if rows is not None:
            return dequantised(stored, torch.float32, rows)
        return dequantised(stored, self.dtype).view(1, *stored.shape)


@dataclass(frozen=True)
class FusedZO(ZO):
    """Gives the bits of ZO with one kernel a tensor, where one fits."""

    stored_view = FusedStoredWeights

    def perturbed(
        self, store: Store, key: Key, signs: list[int], dtype: torch.dtype, rows: Tensor | None = None
    ) -> Tensor:
        if not fits(store) or dtype == torch.int8:
            return super().perturbed(store, key, signs, dtype, rows)
        return _materialise(
            store, key, dtype, rows, len(signs), normal_knots(store.device),
            float(self.eps), LEVELS=_levels(self),
            CODES=self.probe == "codes", PLUS=1 in signs, MINUS=-1 in signs,
        )  # fmt: skip

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        counts = torch.zeros(SHARDS, COUNTED, dtype=torch.int64, device=factors.device)
        for name, store in weights.items():
            if self.nearest or not fits(store):
                counts[0] += ZO.add_directions_(self, {name: store}, factors, key)
            else:
                step_(store, key._replace(tensor=tensor_id(name)), factors, self, counts)
        return counts.sum(0)


@dataclass(frozen=True)
class Graphed(ZO):
    """Put before an estimator, it gives the same bits by replaying the recorded launches of its forwards and
    of its update.

    Its loss_fn has tensors() and with_tensors(...) (data.scoring.BatchLoss): the batch goes into static buffers.
    """

    graphed: CudaGraphed = field(kw_only=True, compare=False)

    def losses(self, weights: dict[str, Store], loss_fn: LossFn, key: Key, queries: range) -> Tensor:
        launched = super().losses
        self.fill_buffers(weights, key)

        def run(step: Tensor, inputs: list[Tensor | None]) -> Tensor:
            return launched(weights, loss_fn.with_tensors(inputs), key._replace(step=step), queries)

        return self.graphed(("losses", self, key.seed, queries), run, key.step, loss_fn.tensors())

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        launched = super().add_directions_
        self.fill_buffers(weights, key)  # update may be called alone

        def run(step: Tensor, inputs: list[Tensor | None]) -> Tensor:
            return launched(weights, inputs[0], key._replace(step=step))

        return self.graphed(("update", self, key.seed), run, key.step, [factors])


@dataclass(frozen=True)
class GraphedZO(Graphed, FusedZO):
    """ZO by kernels, recorded."""


def philox_blocks(key: Key, purpose: Purpose, rows: Tensor, columns: int) -> Tensor:
    """random_bits.philox_blocks in one kernel instead of a hundred."""
    per_row = -(-columns // 8)
    blocks = (rows[:, None] * per_row + torch.arange(per_row, device=rows.device)).flatten()
    words = torch.empty(len(blocks), 4, dtype=torch.int32, device=blocks.device)
    counter = (key.step, key.tensor, key.query << 4 | purpose, key.seed & LOW, key.seed >> 32 & LOW)
    if len(blocks):
        with _on(blocks.device):
            _philox_kernel[(triton.cdiv(len(blocks), 512),)](blocks, words, len(blocks), *as_int32(*counter), BLOCK=512)
    return words.view(len(rows), per_row, 4)


@cache
def graphed_kind(kind: type[ZO]) -> type[ZO]:
    """A subclass of both."""
    return dataclass(frozen=True)(type(f"Graphed{kind.__name__}", (Graphed, kind), {}))


def graphed(zo: ZO, device: str | torch.device) -> ZO:
    """The same estimator by recorded launches, whose kernels are torch's but for draws and landing."""
    return as_kind(graphed_kind(type(zo)), zo, graphed=CudaGraphed(device))
