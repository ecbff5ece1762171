"""One Triton kernel a tensor for what zo_optim defines in plain torch: read a pair of probes, apply an update.

The plain definitions draw, round and add in some fifty small kernels a tensor, so a small model waits for
launches and a large one for memory.  These do the same arithmetic on the same Philox words in one pass;
tests/test_gpu.py demands equal codes and equal floats (hence no fused multiply-add and division to nearest).

Each program takes BLOCK groups of 8 neighbouring elements of a row: one Philox block of 16-bit draws, or two of
32-bit draws.  Rows are padded to whole groups, as in quant._words_of_rows.  Imports quant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import INT8_TOP, LOW, Float, Int8, Key, Stored, Use, as_int32

BLOCK = 128  # groups a program: 1,024 elements
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where the definition rounds twice
TOP = tl.constexpr(INT8_TOP)
DIRECTION, PROBE_ROUNDING = tl.constexpr(int(Use.DIRECTION)), tl.constexpr(int(Use.PROBE_ROUNDING))
UPDATE_ROUNDING, WEIGHT_ROUNDING = tl.constexpr(int(Use.UPDATE_ROUNDING)), tl.constexpr(int(Use.WEIGHT_ROUNDING))


@triton.jit
def _words(block, step, tensor, query, USE: tl.constexpr, k0, k1):
    """quant.random_words for counter blocks [BLOCK] -> four uint32 words each."""
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
def _place(R, C, BLOCK: tl.constexpr):
    """This program's groups, and its elements' flat offsets, rows and mask."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    per_row = tl.cdiv(C, 8)
    group = start + tl.arange(0, BLOCK)
    element = start * 8 + tl.arange(0, 8 * BLOCK)
    row = element // (per_row * 8)
    column = element - row * (per_row * 8)
    return group, row * C + column, row, (row < R) & (column < C)


VARYING = ["R", "C", "eps", "coefficient", "step", "tensor", "query", "k0", "k1"]  # never compile-time constants


@triton.jit(do_not_specialize=[v for v in VARYING if v != "coefficient"])
def _pair_kernel(
    pair, value, scale, table, R, C, eps, step, tensor, query, k0, k1,
    CODES: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, at, row, live = _place(R, C, BLOCK)
    w = tl.load(value + at, mask=live, other=0).to(tl.float32)
    if CODES:
        w = w * tl.load(scale + row, mask=live, other=0)
    d = _direction(table, group, step, tensor, query, k0, k1, PROBE_ROUNDING, LEVELS) * eps
    tl.store(pair + at, (w + d).to(pair.dtype.element_ty), mask=live)
    tl.store(pair + R.to(tl.int64) * C + at, (w - d).to(pair.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=[v for v in VARYING if v != "eps"])
def _update_kernel(
    value, scale, counts, table, R, C, coefficient, step, tensor, query, k0, k1,
    CODES: tl.constexpr, ROUNDS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, at, row, live = _place(R, C, BLOCK)
    delta = _direction(table, group, step, tensor, query, k0, k1, UPDATE_ROUNDING, LEVELS) * coefficient
    stored = tl.load(value + at, mask=live, other=0)
    old = stored.to(tl.float32)
    if ROUNDS:  # 32-bit draws: blocks of 4, two to a group, except that a row's last group may own only one
        per_row8, per_row4 = tl.cdiv(C, 8), tl.cdiv(C, 4)
        block = group // per_row8 * per_row4 + group % per_row8 * 2
        a, b, c, d = _words(block, step, tensor, query, WEIGHT_ROUNDING, k0, k1)
        e, f, g, h = _words(block + 1, step, tensor, query, WEIGHT_ROUNDING, k0, k1)
        words = _in_order(a, b, c, d, e, f, g, h)
    if CODES:
        x = tl.div_rn(delta, tl.load(scale + row, mask=live, other=1))
        size = tl.abs(x)
        whole = tl.floor(size)
        threshold = ((size - whole) * 2147483648.0).to(tl.int32)
        up = (words & 0x7FFFFFFF).to(tl.int32) < threshold
        size = whole + up.to(tl.float32)
        wanted = old + tl.where(x < 0, -size, size)
        new = tl.minimum(tl.maximum(wanted, -TOP), TOP)
        tl.atomic_add(counts + 1, tl.sum((live & (new != wanted)).to(tl.int64)))
    else:
        new = old + delta
        if ROUNDS:
            pattern = new.to(tl.int32, bitcast=True) + (words & 0xFFFF).to(tl.int32)
            new = (pattern & -65536).to(tl.float32, bitcast=True)
    tl.atomic_add(counts, tl.sum((live & (new != old)).to(tl.int64)))
    tl.store(value + at, new.to(stored.dtype), mask=live)


def _arguments(stored: Stored, key: Key) -> tuple[bool, Tensor, Tensor, int, int, list[int]]:
    """What both kernels need: is it codes, values, scales (unused for floats), R, C, the key in 32-bit words."""
    assert isinstance(stored, Float | Int8)
    codes = isinstance(stored, Int8)
    value = stored.codes if codes else stored.matrix()
    words = as_int32(key.step, key.tensor, key.query, key.seed & LOW, key.seed >> 32 & LOW)
    return codes, value, stored.scale if codes else value, *value.shape, words


def read_pair(stored: Stored, key: Key, eps: float, levels: int, table: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, R, C] in dtype: w + eps u1 and w - eps u1.  The definition is zo_optim.Pair.read."""
    codes, value, scale, R, C, words = _arguments(stored, key)
    pair = torch.empty(2, R, C, dtype=dtype, device=value.device)
    grid = (triton.cdiv(R * triton.cdiv(C, 8), BLOCK),)
    _pair_kernel[grid](
        pair, value, scale, table, R, C, eps, *words, CODES=codes, LEVELS=levels, BLOCK=BLOCK, **EXACT
    )  # fmt: skip
    return pair


def update_(stored: Stored, key: Key, coefficient: float, levels: int, table: Tensor, counts: Tensor) -> None:
    """w += coefficient * u2, landing on the grid; adds to counts [2] int64.  The definition is zo_optim.update."""
    codes, value, scale, R, C, words = _arguments(stored, key)
    grid = (triton.cdiv(R * triton.cdiv(C, 8), BLOCK),)
    _update_kernel[grid](
        value, scale, counts, table, R, C, coefficient, *words,
        CODES=codes, ROUNDS=stored.rounds, LEVELS=levels, BLOCK=BLOCK, **EXACT,
    )  # fmt: skip
