"""Random bits as a pure function of a key, with no generator and no state.

Philox4x32-10 (Salmon et al., SC 2011) turns (seed, step, query, tensor, purpose, element) into bits, so a draw does
not depend on call order, chunking, device or dtype, and any element can be drawn on its own.

Shape key: C columns, r some of a matrix's rows, N counter blocks.  Imports nothing of ours.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57  # Philox's multipliers and Weyl key increments, from the Random123 paper
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
BLOCKS_IN_CACHE = 2**14  # counter blocks at a time: Philox's dozen temporaries then stay in the second-level cache


class Purpose(enum.IntEnum):
    """Each purpose of drawing is a stream of its own, so no two of them share bits."""

    DIRECTION = 0  # u; of sparse directions all, the rounding of a step too
    PROBE_ROUNDING = 1  # Q1(u): the direction that is probed
    UPDATE_ROUNDING = 2  # Q2(u): the direction that is stepped along
    WEIGHT_ROUNDING = 3  # rounding the updated weight onto its grid
    DATA_ORDER = 4
    PROBE_LANDING = 5  # rounding a perturbed weight onto its grid (ablation --probe codes)
    COIN = 6  # signs of the control (ablation --estimator random)


class Key(NamedTuple):
    """Names one tensor's draws in one query of one step."""

    seed: int  # 64 bits
    step: int  # 32 bits
    query: int = 0  # 28 bits
    tensor: int = 0  # 32 bits, see tensor_id


@cache
def tensor_id(name: str) -> int:
    """A tensor's place in the counter is a hash of its name, so that no other tensor can shift its draws."""
    return zlib.crc32(name.encode())


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four uint64 arrays of one shape, and two ints, all below 2^32 -> four such arrays.

    It is numpy, because torch has no unsigned products, and takes twice the time for arrays of this size.
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


# Twins of philox_blocks by device type, which give the same integers; gpu.install puts one here for cuda
DEVICE_TWINS: dict[str, Callable[..., Tensor]] = {}


def philox_blocks(key: Key, purpose: Purpose, rows: Tensor, columns: int) -> Tensor:
    """128 bits for every 8 columns of chosen rows: rows [r] int64 -> [r, ceil(C / 8), 4] int32 bit patterns.

    Each row starts a fresh block, so any row can be drawn on its own.
    """
    if twin := DEVICE_TWINS.get(rows.device.type):
        return twin(key, purpose, rows, columns)
    per_row = -(-columns // 8)
    c0 = (rows.cpu().numpy()[:, None] * per_row + np.arange(per_row)).astype(np.uint64).ravel()
    counter, seed = (key.step, key.tensor, key.query << 4 | purpose), (key.seed & LOW, key.seed >> 32 & LOW)
    words = np.empty((len(c0), 4), dtype=np.uint32)
    for start in range(0, len(c0), BLOCKS_IN_CACHE):
        chunk = c0[start : start + BLOCKS_IN_CACHE]
        rest = (np.full_like(chunk, c) for c in counter)
        words[start : start + BLOCKS_IN_CACHE] = np.stack(philox((chunk, *rest), seed), -1)
    return torch.from_numpy(words.view(np.int32)).to(rows.device).view(len(rows), per_row, 4)


def bits16(key: Key, purpose: Purpose, rows: Tensor, columns: int) -> Tensor:
    """16 random bits an element: rows [r] int64 -> [r, C] int64 in [0, 2^16)."""
    words = philox_blocks(key, purpose, rows, columns).flatten(1)
    halves = words.view(torch.int16)[:, :columns]  # low half first (little-endian)
    return halves.to(torch.int64).bitwise_and_(0xFFFF)


def bits32(key: Key, purpose: Purpose, rows: Tensor, columns: int) -> Tensor:
    """32 random bits an element: rows [r] int64 -> [r, C] int32 bit patterns.

    With h_0 ... h_7 a block's halves, element j has h_j+1 above h_j (and the last one h_0 above h_7).  So each element
    is uniform on all 2^32 and has upper bits of its own; only its lower ones are a neighbour's upper ones.  A decision
    by 31 of these bits falls by the upper 15 but for one time in 2^15, and half the blocks are enough.
    """
    words = philox_blocks(key, purpose, rows, columns)
    between = (words.roll(-1, -1) << 16) | (words >> 16 & 0xFFFF)
    return torch.stack((words, between), -1).flatten(1)[:, :columns]


def permutation(seed: int, epoch: int, n: int, task: int = 0) -> Tensor:
    """A uniformly random order of n examples, keyed by epoch, and by which of several tasks they are of -> [n] int64
    (on the CPU)."""
    words = philox_blocks(Key(seed, epoch, task), Purpose.DATA_ORDER, torch.arange(n), 8)[:, 0]
    first, second = words[:, 0].to(torch.int64), words[:, 1].to(torch.int64)
    return torch.argsort((first << 31) ^ second, stable=True)  # 62 bits or so: ties do not happen
