"""Random bits, rounding onto grids, and the codes that weights are stored in.

Everything random in this project is a pure function of a key: Philox4x32-10 (Salmon et al., SC 2011) turns
(seed, step, query, tensor, use, element) into bits, with no generator and no state, so a draw does not depend
on call order, chunking, device or dtype.  Rounding is QuZO's eq. 5; int8 codes have one scale per output row.

Shape key: R rows (output features), C columns (input features), r some of the rows, N counter blocks.
Imports nothing of ours.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

try:  # comes with CUDA builds of torch; the CPU never needs it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ---------------------------------------------------------------- random bits

M0, M1 = 0xD2511F53, 0xCD9E8D57  # Philox's multipliers and Weyl key increments, from the Random123 paper
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
IN_CACHE = 2**14  # counter blocks at a time: Philox's dozen temporaries then stay in the second-level cache


class Use(enum.IntEnum):
    """What a draw is for.  Each use is a stream of its own, so no two uses share bits."""

    DIRECTION = 0  # u
    PROBE_ROUNDING = 1  # Q1(u): the direction that is probed
    UPDATE_ROUNDING = 2  # Q2(u): the direction that is stepped along
    WEIGHT_ROUNDING = 3  # landing the update on the weight's grid
    DATA_ORDER = 4


class Key(NamedTuple):
    """Names one tensor's draws in one query of one step."""

    seed: int  # 64 bits
    step: int  # 32 bits
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


def _random_words_triton(counter: tuple[int, ...], seed: tuple[int, int], blocks: Tensor) -> Tensor:
    """The same words in one kernel instead of a hundred; tests/test_gpu.py demands equal integers."""
    words = torch.empty(len(blocks), 4, dtype=torch.int32, device=blocks.device)
    if len(blocks):
        grid = (triton.cdiv(len(blocks), 512),)
        _philox_kernel[grid](blocks, words, len(blocks), *as_int32(*counter, *seed), BLOCK=512)
    return words


def as_int32(*words: int) -> list[int]:
    """32-bit words as signed numbers of the same bits: one kernel argument type, whatever their top bit."""
    return [w - (1 << 32) if w >> 31 else w for w in words]


if triton is not None:

    @triton.jit(do_not_specialize=["c1", "c2", "c3", "k0", "k1"])  # a compile for each step otherwise
    def _philox_kernel(blocks, words, n, c1, c2, c3, k0, k1, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = at < n
        c0 = tl.load(blocks + at, mask=live, other=0).to(tl.uint32)
        zero = c0 * 0
        k0 = (zero + k0).to(tl.uint32)
        k1 = (zero + k1).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox_impl(
            c0, (zero + c1).to(tl.uint32), (zero + c2).to(tl.uint32), (zero + c3).to(tl.uint32), k0, k1, 10
        )
        tl.store(words + at * 4 + 0, w0.to(tl.int32, bitcast=True), mask=live)
        tl.store(words + at * 4 + 1, w1.to(tl.int32, bitcast=True), mask=live)
        tl.store(words + at * 4 + 2, w2.to(tl.int32, bitcast=True), mask=live)
        tl.store(words + at * 4 + 3, w3.to(tl.int32, bitcast=True), mask=live)


def _words_of_rows(key: Key, use: Use, rows: Tensor, columns: int, lanes: int) -> Tensor:
    """Words for chosen rows.  Each row starts a fresh block, so any row can be drawn on its own."""
    per_row = -(-columns // lanes)
    blocks = rows[:, None] * per_row + torch.arange(per_row, device=rows.device)
    return random_words(key, use, blocks.flatten()).view(len(rows), per_row * 4)


def bits16(key: Key, use: Use, rows: Tensor, columns: int) -> Tensor:
    """16 random bits an element: rows [r] int64 -> [r, C] int64 in [0, 2^16)."""
    words = _words_of_rows(key, use, rows, columns, lanes=8)
    halves = words.view(torch.int16)[:, :columns]  # low half first (little-endian)
    return halves.to(torch.int64).bitwise_and_(0xFFFF)


def bits32(key: Key, use: Use, rows: Tensor, columns: int) -> Tensor:
    """32 random bits an element: rows [r] int64 -> [r, C] int32 bit patterns."""
    return _words_of_rows(key, use, rows, columns, lanes=4)[:, :columns]


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """A uniformly random order of n examples, keyed by epoch -> [n] int64 (on the CPU)."""
    words = random_words(Key(seed, epoch), Use.DATA_ORDER, torch.arange(n))
    first, second = words[:, 0].to(torch.int64), words[:, 1].to(torch.int64)
    return torch.argsort((first << 31) ^ second, stable=True)  # 62 bits or so: ties do not happen


# ---------------------------------------------------------------- rounding


def stochastic_round(x: Tensor, words: Tensor) -> Tensor:
    """QuZO eq. 5: floor(x) + Bernoulli(x - floor(x)), so that E[SR(x)] = x.

    x float32, words int32 bit patterns (31 bits are used), same shape -> integers in float32.  Sign and size
    are treated apart, because a size's fraction is exact in float32 and a negative number's floor is not:
    x = -1e-9 would give a fraction of exactly 1.  P(up) is the fraction rounded down to a multiple of 2^-31.
    """
    size = x.abs()
    whole = size.floor()
    threshold = (size - whole).mul_(2.0**31).to(torch.int32)  # exact: a power of two, then truncation
    up = (words & 0x7FFFFFFF) < threshold
    return whole.add_(up).copysign_(x)


def round_to_bfloat16(x: Tensor, words: Tensor) -> Tensor:
    """Stochastic rounding of float32 to bfloat16, its upper half: add 16 random bits, then cut the lower half.

    P(up) is the dropped fraction, exactly.  Numbers that are bfloat16 already stay as they are.
    """
    pattern = x.view(torch.int32) + (words & 0xFFFF)  # the exponent absorbs a carry: next size up, as it should
    return (pattern & -0x10000).view(torch.float32).to(torch.bfloat16)


# ---------------------------------------------------------------- stores: how one tensor is kept, read and stepped


@dataclass
class Float:
    """A tensor kept as floating point, fp32 or bf16.

    Every store has shape, parts, read and add_; add_ returns [2] int64, the numbers of elements whose stored
    bits changed and of elements that the edge of the grid held back.  A tensor, so that a GPU need not wait.
    """

    value: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def rounds(self) -> bool:
        """Whether add_ needs random words."""
        return self.value.dtype == torch.bfloat16

    def parts(self) -> dict[str, Tensor]:
        """The tensors to save and hash, by suffix of the tensor's name."""
        return {"": self.value}

    def matrix(self) -> Tensor:
        """[R, C], sharing memory; a vector is one row."""
        return self.value.view(matrix_shape(self.value.shape))

    def read(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Rows [r, C] in the stored dtype."""
        return self.matrix()[rows]

    def add_(self, rows: slice, delta: Tensor, words: Tensor | None) -> Tensor:
        """Add delta [r, C] float32.  bf16 rounds stochastically: to nearest would lose most updates."""
        old = self.matrix()[rows]
        new = old.float() + delta
        if old.dtype == torch.bfloat16:
            new = round_to_bfloat16(new, words)
        changed = (new != old).sum()
        self.matrix()[rows] = new
        return torch.stack((changed, torch.zeros_like(changed)))


INT8_TOP = 127  # -128 is unused, so that +w and -w quantise alike


@dataclass
class Int8:
    """A matrix kept as int8 codes [R, C] and one float32 scale per output row [R, 1]: w = codes * scale.

    Scales never change after encoding, so a row's grid is the same throughout training.
    """

    codes: Tensor
    scale: Tensor

    @classmethod
    def encode(cls, matrix: Tensor) -> Int8:
        """Round a float matrix to nearest; a row's largest size becomes +-127.

        An all-zero row is exact under any scale.  It gets the largest scale of the matrix rather than 0,
        because an update divides by it.
        """
        chunks = list(row_chunks(matrix.shape, matrix.device))  # no second copy of a large matrix in float32
        largest = torch.cat([matrix[rows].float().abs().amax(1, keepdim=True) for rows in chunks])
        scale = largest / torch.full_like(largest, INT8_TOP)  # by a number, CUDA would multiply by a rounded 1/127
        scale = torch.where(scale > 0, scale, scale.amax())  # sizes under 1e-43 also count as zero here
        scale = torch.where(scale > 0, scale, 1.0)
        codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
        for rows in chunks:
            codes[rows] = (matrix[rows].float() / scale[rows]).round_().clamp_(-INT8_TOP, INT8_TOP).to(torch.int8)
        return cls(codes, scale)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def rounds(self) -> bool:
        return True

    def parts(self) -> dict[str, Tensor]:
        return {"": self.codes, ".scale": self.scale}

    def read(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Rows [r, C] as float32."""
        return self.codes[rows] * self.scale[rows]

    def add_(self, rows: slice, delta: Tensor, words: Tensor) -> Tensor:
        """codes += SR(delta / scale), held inside [-127, 127] (QuZO's Algorithm 1).  delta [r, C] float32."""
        old = self.codes[rows]
        wanted = stochastic_round(delta / self.scale[rows], words).add_(old)
        new = wanted.clamp(-INT8_TOP, INT8_TOP)
        counts = torch.stack(((new != old).sum(), (new != wanted).sum()))
        self.codes[rows] = new.to(torch.int8)
        return counts


Stored = Float | Int8
FORMATS = ("fp32", "bf16", "int8")


def encode(tensor: Tensor, weights: str) -> Stored:
    """The one place that says which tensors are quantised: matrices are, one-dimensional tensors stay float32.

    Norm weights near 1.0 would not even feel a perturbation in bf16, and they are a millionth of the model.  A
    store owns its memory: a tensor from a safetensors file is mapped from it, and the file may change.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, got {weights!r}")
    if tensor.ndim != 2 or weights == "fp32":
        return Float(tensor.to(torch.float32, copy=True))
    return Float(tensor.to(torch.bfloat16, copy=True)) if weights == "bf16" else Int8.encode(tensor)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """(R, C) of a matrix; a vector is one row."""
    return (1, shape[0]) if len(shape) == 1 else tuple(shape)


def row_chunks(shape: torch.Size, device: torch.device) -> Iterator[slice]:
    """Row slices of a matrix that bound the scratch of a pass over it (a vector counts as one row).

    On a CPU 2^17 elements keep the temporaries in the second-level cache.
    """
    rows, columns = matrix_shape(shape)
    per_chunk = max(1, (2**25 if device.type == "cuda" else 2**17) // columns)
    for start in range(0, rows, per_chunk):
        yield slice(start, min(start + per_chunk, rows))
