"""Random bits as a pure function of a key, with no generator and no state.

Philox4x32-10 (Salmon et al., SC 2011) turns (seed, step, query, tensor, use, element) into bits, so a draw does
not depend on call order, chunking, device or dtype, and any element can be drawn on its own.

Shape key: C columns, r some of the rows, N counter blocks.  Imports nothing of ours.
"""

from __future__ import annotations

import enum
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

try:  # comes with CUDA builds of torch; the CPU never needs it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

M0, M1 = 0xD2511F53, 0xCD9E8D57  # Philox's multipliers and Weyl key increments, from the Random123 paper
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
IN_CACHE = 2**14  # counter blocks at a time: Philox's dozen temporaries then stay in the second-level cache


class Use(enum.IntEnum):
    """What a draw is for.  Each use is a stream of its own, so no two uses share bits."""

    DIRECTION = 0  # u
    PROBE_ROUNDING = 1  # Q1(u): the direction that is probed
    UPDATE_ROUNDING = 2  # Q2(u): the direction that is stepped along
    WEIGHT_ROUNDING = 3  # landing the update on the weight's grid, but steps along grid directions: reuse
    DATA_ORDER = 4
    PROBE_LANDING = 5  # landing a probe on the weight's grid
    COIN = 6  # signs of the random control arm


class Key(NamedTuple):
    """Names one tensor's draws in one query of one step."""

    seed: int  # 64 bits
    step: int | Tensor  # 32 bits; on a GPU also [1] int32, which graphs.py fills in
    query: int = 0  # 28 bits
    tensor: int = 0  # 32 bits, see tensor_id


def tensor_id(name: str) -> int:
    """A tensor's place in the counter: a hash of its name, so that no other tensor can shift its draws."""
    return zlib.crc32(name.encode())


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four uint64 arrays of one shape, and two ints, all below 2^32 -> four such arrays.

    numpy, because torch has no unsigned products, and takes twice the time for arrays of this size.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1  # 64-bit products: the high half goes one way, the low half another
        c0 = p1 >> 32
        c0 ^= c1
        c0 ^= k0
        c2 = p0 >> 32
        c2 ^= c3
        c2 ^= k1
        p0 &= LOW
        p1 &= LOW
        c1, c3 = p1, p0
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3


def random_words(key: Key, use: Use, blocks: Tensor) -> Tensor:
    """128 bits for each counter block: blocks [N] int64 in [0, 2^32) -> [N, 4] int32 bit patterns."""
    counter = (key.step, key.tensor, key.query << 4 | use)
    seed = (key.seed & LOW, key.seed >> 32 & LOW)
    if blocks.is_cuda and triton is not None:
        return _random_words_triton(counter, seed, blocks)
    c0 = blocks.cpu().numpy().astype(np.uint64)
    words = np.empty((len(c0), 4), dtype=np.uint32)
    for start in range(0, len(c0), IN_CACHE):
        chunk = c0[start : start + IN_CACHE]
        rest = (np.full_like(chunk, c) for c in counter)
        words[start : start + IN_CACHE] = np.stack(philox((chunk, *rest), seed), -1)
    return torch.from_numpy(words.view(np.int32)).to(blocks.device)


def _random_words_triton(counter: tuple[int | Tensor, ...], seed: tuple[int, int], blocks: Tensor) -> Tensor:
    """The same words in one kernel instead of a hundred; tests/test_gpu.py demands equal integers."""
    words = torch.empty(len(blocks), 4, dtype=torch.int32, device=blocks.device)
    if len(blocks):
        grid = (triton.cdiv(len(blocks), 512),)
        _philox_kernel[grid](blocks, words, len(blocks), *as_int32(*counter, *seed), BLOCK=512)
    return words


def as_int32(*words: int | Tensor) -> list[int | Tensor]:
    """32-bit words as signed numbers of the same bits: one kernel argument type, whatever their top bit.  Numbers in
    memory stay there."""
    return [w if isinstance(w, Tensor) else w - (1 << 32) if w >> 31 else w for w in words]


if triton is not None:

    M0_, M1_, W0_, W1_ = tl.constexpr(M0), tl.constexpr(M1), tl.constexpr(W0), tl.constexpr(W1)

    @triton.jit
    def number_(x):
        """A number, whether it is given or where it is."""
        if x.dtype.is_ptr():
            x = tl.load(x)
        return x

    @triton.jit
    def philox_(c0, c1, c2, c3, k0, k1):
        """philox for counters c0 [...] uint32 and five numbers of 32 bits -> four uint32 words each.

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
        w0, w1, w2, w3 = philox_(c0, number_(c1), c2, c3, k0, k1)
        tl.store(words + at * 4 + 0, w0.to(tl.int32, bitcast=True), mask=live)
        tl.store(words + at * 4 + 1, w1.to(tl.int32, bitcast=True), mask=live)
        tl.store(words + at * 4 + 2, w2.to(tl.int32, bitcast=True), mask=live)
        tl.store(words + at * 4 + 3, w3.to(tl.int32, bitcast=True), mask=live)


def _words_of_rows(key: Key, use: Use, rows: Tensor, columns: int) -> Tensor:
    """Words for chosen rows, a block for 8 columns: [r, ceil(C / 8), 4].  Each row starts a fresh block, so any row
    can be drawn on its own."""
    per_row = -(-columns // 8)
    blocks = rows[:, None] * per_row + torch.arange(per_row, device=rows.device)
    return random_words(key, use, blocks.flatten()).view(len(rows), per_row, 4)


def bits16(key: Key, use: Use, rows: Tensor, columns: int) -> Tensor:
    """16 random bits an element: rows [r] int64 -> [r, C] int64 in [0, 2^16)."""
    words = _words_of_rows(key, use, rows, columns).flatten(1)
    halves = words.view(torch.int16)[:, :columns]  # low half first (little-endian)
    return halves.to(torch.int64).bitwise_and_(0xFFFF)


def bits32(key: Key, use: Use, rows: Tensor, columns: int) -> Tensor:
    """32 random bits an element: rows [r] int64 -> [r, C] int32 bit patterns.

    With h_0 ... h_7 a block's halves, element j has h_j+1 above h_j (and the last one h_0 above h_7).  So each element
    is uniform on all 2^32 and has upper bits of its own; only its lower ones are a neighbour's upper ones.  What is
    decided here by 31 bits is decided by the upper 15 but for one time in 2^15, and half the blocks are enough.
    """
    words = _words_of_rows(key, use, rows, columns)
    between = (words.roll(-1, -1) << 16) | (words >> 16 & 0xFFFF)
    return torch.stack((words, between), -1).flatten(1)[:, :columns]


GOLDEN = 0x9E3778FE  # near 2^32 over the golden ratio; even, and its continued fraction has nothing above 3


def reuse(words: Tensor) -> Tensor:
    """Words for a second decision from those of a first: int32 bit patterns -> int32 bit patterns.

    A word whose lower 31 bits were found below a threshold T is uniform there still, whatever its top bit.  Multiples
    of GOLDEN modulo 2^32 lie about as evenly as any can: of those of T neighbouring numbers, a share f to within
    (2 + ln T) / (2 T) lies below 2^32 f (tests/test_random_bits.py); and as GOLDEN is even, the top bit drops out.
    Neighbours share 16 bits (bits32), so where both are found below a threshold of few values, f is less exact.
    """
    return ((words.to(torch.int64) & 0x7FFFFFFF) * GOLDEN).to(torch.int32)  # the lower half of the product


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """A uniformly random order of n examples, keyed by epoch -> [n] int64 (on the CPU)."""
    words = random_words(Key(seed, epoch), Use.DATA_ORDER, torch.arange(n))
    first, second = words[:, 0].to(torch.int64), words[:, 1].to(torch.int64)
    return torch.argsort((first << 31) ^ second, stable=True)  # 62 bits or so: ties do not happen
