"""Sparse directions by one Triton kernel a tensor and query: zo_optim.SparseZO to the same bits.

A thread takes a cell.  Imports zo_optim, quant, random_bits and of gpu kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.kernels import (  # fmt: skip
    DIRECTION,
    EXACT,
    SHARDS,
    VARYING,
    FusedStoredWeights,
    Graphed,
    _by_hand,
    _count,
    _cut,
    _from_byte,
    _kind,
    _number,
    _on,
    _philox,
    _round8,
    _stochastic_round,
    _to_byte,
    as_int32,
    dequantised,
    fits,
)
from quant import CODES, COUNTED, E4M3, FakeQuantised, Float, Fp8, Integers, Store, group_size
from random_bits import LOW, Key, tensor_id
from zo_optim import SparseZO

BLOCK = 128  # cells a program


@triton.jit
def _field(packed, row, stride, column, live, BITS: tl.constexpr):
    """quant.read_packed: the byte [BLOCK] int32, how far its field is from the lowest bit, and the signed number."""
    byte = tl.load(packed + row * stride + column * BITS // 8, mask=live, other=0).to(tl.int32)
    shift = (column * BITS % 8).to(tl.int32)
    half: tl.constexpr = 1 << (BITS - 1)
    return byte, shift, ((byte >> shift & ((1 << BITS) - 1)) ^ half) - half


@triton.jit
def _outward(x, AWAY: tl.constexpr):
    """quant.outward, of numbers that are to go up (AWAY 1) or down (-1)."""
    return tl.where(x * AWAY > 0, 0xFFFFFFFF, 0).to(tl.uint32)


@triton.jit
def _hit(
    cell, live, value, scale, R, C, WIDTH, groups, group_size, t, step, tensor, query, k0, k1, CELL: tl.constexpr,
    KIND: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """zo_optim.SparseZO.hits of cells [BLOCK] int64: where, whether, the stored number, what is around it, eps u."""
    use = _number(query) * 16 + DIRECTION
    where, whether, way, landing = _philox(
        cell.to(tl.uint32), _number(step), _number(tensor), use, _number(k0), _number(k1)
    )
    at = cell * CELL + (where & (CELL - 1)).to(tl.int64)
    row, column = at // WIDTH, at % WIDTH
    live = live & (row < R) & (column < C)
    if KIND == "int4":
        _, _, code = _field(value, row, (C + 1) // 2, column, live, 4)
        code = code.to(tl.float32)
    elif KIND == "fp8":
        code = _from_byte(tl.load(value + row * C + column, mask=live, other=0), BY_HAND)
    else:
        code = tl.load(value + row * C + column, mask=live, other=0).to(tl.float32)
    target = tl.full(code.shape, t, tl.float32)
    if KIND == "fp32" or KIND == "bf16":
        unit = target * 0 + 1.0
        below, above = code - target, code + target
        if KIND == "bf16":
            below, above = _cut(below, _outward(below, -1), 16), _cut(above, _outward(above, 1), 16)
    else:
        unit = tl.load(scale + row * groups + column // group_size, mask=live, other=1.0).to(tl.float32)
        far = tl.div_rn(target, unit)
        if KIND == "fp8":
            below, above = code - far, code + far
            below = _round8(below, _outward(below, -1), 3, -6, 448.0)
            above = _round8(above, _outward(above, 1), 3, -6, 448.0)
        else:
            below, above = code - tl.ceil(far), code + tl.ceil(far)
    half = (above - below) * 0.5 * unit
    chance = tl.minimum(tl.div_rn(target, half), 1.0)
    chance = chance * chance
    moves = (chance >= 1.0) | (whether < (tl.minimum(chance, 0.99999994) * 4294967296.0).to(tl.uint32))
    up = (way >> 31) == 1
    return row, column, live & moves, code, below, above, unit, up, landing, tl.where(up, half, half * -1.0)


@triton.jit
def _coded(x, KIND: tl.constexpr, BY_HAND: tl.constexpr):
    """Numbers on a grid as codes that can be multiplied: e4m3 as bytes, int8 held inside its range."""
    return _to_byte(x, BY_HAND) if KIND == "fp8" else tl.minimum(tl.maximum(x, -127.0), 127.0)


@triton.jit(do_not_specialize=VARYING)
def _probe_kernel(
    out, value, scale, index, N, R, C, WIDTH, PER_ROW, groups, group_size, length, t, step, tensor, query, k0, k1,
    CELL: tl.constexpr, KIND: tl.constexpr, CHOSEN: tl.constexpr, BYTES: tl.constexpr, PLUS: tl.constexpr,
    MINUS: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live, cell = n < N, n
    if CHOSEN:
        owner = n // PER_ROW
        own_row = tl.load(index + owner, mask=live, other=0)
        live = live & (own_row >= 0)  # a row that is not there has no hits
        cell = own_row * WIDTH // CELL + n % PER_ROW
    row, column, live, code, below, above, unit, up, landing, move = _hit(
        cell, live, value, scale, R, C, WIDTH, groups, group_size, t, step, tensor, query, k0, k1, CELL, KIND, BY_HAND,
    )  # fmt: skip
    if CHOSEN:
        live, row = live & (row == own_row), owner
    plus, minus = tl.where(up, above, below), tl.where(up, below, above)
    if BYTES:
        plus, minus = _coded(plus, KIND, BY_HAND), _coded(minus, KIND, BY_HAND)
    else:
        plus, minus = plus * unit, minus * unit
    if PLUS:
        tl.store(out + row * C + column, plus.to(out.dtype.element_ty), mask=live)
        out += length
    if MINUS:
        tl.store(out + row * C + column, minus.to(out.dtype.element_ty), mask=live)


FIELDS = tl.constexpr(11)  # of a row of _tables


@triton.jit
def _pointer(address, KIND: tl.constexpr):
    """The address of a store's numbers, as a pointer to their type."""
    if KIND == "int8":
        return address.to(tl.pointer_type(tl.int8))
    elif KIND == "fp32":
        return address.to(tl.pointer_type(tl.float32))
    elif KIND == "bf16":
        return address.to(tl.pointer_type(tl.bfloat16))
    else:
        return address.to(tl.pointer_type(tl.uint8))


@triton.jit(do_not_specialize=VARYING)
def _step_kernel(
    table, tensor_of, counts, factors, t, step, query, k0, k1, CELL: tl.constexpr, KIND: tl.constexpr,
    SCALES: tl.constexpr, MAX: tl.constexpr, RESIDUAL: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of all tensors of a kind at once, a program for each BLOCK cells: launches would take longer than their work."""
    table += tl.load(tensor_of + tl.program_id(0)) * FIELDS
    value, scale = _pointer(tl.load(table), KIND), _pointer(tl.load(table + 1), SCALES)
    residual, N, first = _pointer(tl.load(table + 2), "bytes"), tl.load(table + 3), tl.load(table + 4)
    R, C, WIDTH = tl.load(table + 5), tl.load(table + 6), tl.load(table + 7)
    groups, group_size, tensor = tl.load(table + 8), tl.load(table + 9), tl.load(table + 10)
    cell = (tl.program_id(0) - first) * BLOCK + tl.arange(0, BLOCK)
    row, column, live, old, below, above, unit, up, landing, move = _hit(
        cell, cell < N, value, scale, R, C, WIDTH, groups, group_size, t, step, tensor, query, k0, k1, CELL, KIND,
        BY_HAND,
    )  # fmt: skip
    delta = move * tl.load(factors + query)
    at = row * C + column
    if KIND == "int8" or KIND == "int4":
        if RESIDUAL:
            byte, shift, rest = _field(residual, row, (C * RESIDUAL + 7) // 8, column, live, RESIDUAL)
            old = old * (1 << RESIDUAL) + rest.to(tl.float32)
        wanted = _stochastic_round(tl.div_rn(delta, unit * (1.0 / (1 << RESIDUAL))), landing) + old
        bottom = -MAX - 1 if RESIDUAL else -MAX  # Integers.min_fine
        new = tl.minimum(tl.maximum(wanted, bottom), MAX)
        lost, code = tl.abs(wanted - new), new
        if RESIDUAL:
            code = tl.floor((new + (1 << (RESIDUAL - 1))) * (1.0 / (1 << RESIDUAL)))
            mask: tl.constexpr = (1 << RESIDUAL) - 1
            byte = byte & ~(mask << shift) | ((new - code * (1 << RESIDUAL)).to(tl.int32) & mask) << shift
            tl.store(residual + row * ((C * RESIDUAL + 7) // 8) + column * RESIDUAL // 8, byte.to(tl.uint8), mask=live)
        if KIND == "int8":
            tl.store(value + at, code.to(tl.int8), mask=live)
        else:
            byte, shift, _ = _field(value, row, (C + 1) // 2, column, live, 4)
            byte = byte & ~(15 << shift) | (code.to(tl.int32) & 15) << shift
            tl.store(value + row * ((C + 1) // 2) + column // 2, byte.to(tl.uint8), mask=live)
    elif KIND == "fp8":
        wanted = tl.div_rn(delta, unit) + old
        new = _round8(wanted, landing, 3, -6, 448.0)
        lost = tl.maximum(tl.abs(wanted) - 448.0, 0.0)
        tl.store(value + at, _to_byte(new, BY_HAND), mask=live)
    else:
        new = old + delta
        if KIND == "bf16":
            new = _cut(new, landing, 16)
        lost = new * 0.0
        tl.store(value + at, new.to(value.dtype.element_ty), mask=live)
    _count(counts, old, new, lost, live, KIND)


@lru_cache(maxsize=512)  # ZO2 steps block by block
def _tables(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What _step_kernel knows of its tensors, [n, FIELDS] int64, and each program's tensor, int32.

    rows: addresses of numbers, scales and residual; cells; R, C, C padded to eights; groups a row, columns a group; the
    tensor's id.  A recorded step reads them where they are: one that was forgotten would be other memory by then.
    """
    programs = [triton.cdiv(row[3], BLOCK) for row in rows]
    firsts = accumulate(programs, initial=0)
    table = torch.tensor([(*row[:4], first, *row[4:]) for row, first in zip(rows, firsts, strict=False)])
    tensor_of = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(programs))
    return table.to(device), tensor_of.to(device)


def _arguments(store: Store, key: Key, zo: SparseZO) -> tuple:
    """_sizes; t; the key in words."""
    words = as_int32(key.step, key.tensor, key.query, key.seed & LOW, key.seed >> 32 & LOW)
    return *_sizes(store), zo.eps * math.sqrt(zo.cell), words


def _sizes(store: Store) -> tuple:
    """For all kernels: value, scale; R, C, C padded to eights; groups a row, columns a group."""
    R, C = store.matrix_shape
    if isinstance(store, Float):
        value = scale = store.value
        groups, size = 1, C
    else:
        value, scale = store.codes.view(torch.uint8) if isinstance(store, Fp8) else store.codes, store.scale
        groups = scale.shape[1]
        size = group_size(store.bits, C) if isinstance(store, Integers) else C
    return (value, scale), (R, C, -(-C // 8) * 8), (groups, size)


@dataclass(frozen=True)
class FusedSparseZO(SparseZO):
    """Gives the bits of SparseZO with a pass over the tensor and a kernel over its cells."""

    stored_view = FusedStoredWeights

    def perturbed(
        self, store: Store, key: Key, signs: list[int], dtype: torch.dtype, rows: Tensor | None = None
    ) -> Tensor:
        if isinstance(store, FakeQuantised):
            return super().perturbed(store, key, signs, dtype, rows)
        (value, scale), (R, C, width), groups, t, words = _arguments(store, key, self)
        as_codes = dtype in CODES
        if not as_codes and fits(store):
            copies = dequantised(store, dtype, rows, len(signs))
        else:
            w = store.codes if as_codes else store.dequantise(slice(None) if rows is None else rows)
            copies = w.to(dtype).expand(len(signs), -1, -1).clone(memory_format=torch.contiguous_format)
        per_row = (width - 1) // self.cell + 2
        n = -(-R * width // self.cell) if rows is None else len(rows) * per_row
        out = copies.view(torch.uint8) if dtype == E4M3.dtype else copies
        with _on(value.device):
            _probe_kernel[(triton.cdiv(n, BLOCK),)](
                out, value, scale, value if rows is None else rows, n, R, C, width, per_row, *groups, copies[0].numel(),
                t, *words, CELL=self.cell, KIND=_kind(store)[0], CHOSEN=rows is not None, BYTES=as_codes,
                PLUS=1 in signs, MINUS=-1 in signs, BY_HAND=_by_hand(value.device), BLOCK=BLOCK, **EXACT,
            )  # fmt: skip
        return copies

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        counts = torch.zeros(SHARDS, COUNTED, dtype=torch.int64, device=factors.device)
        alike = {}  # rows of _tables, by what the kernel is compiled for
        for name, store in weights.items():
            if isinstance(store, FakeQuantised):
                counts[0] += SparseZO.add_directions_(self, {name: store}, factors, key)
                continue
            (value, scale), (R, C, width), groups = _sizes(store)
            bits = store.residual_bits if isinstance(store, Integers) else 0
            kind, largest = _kind(store)
            of_scales = {torch.float32: "fp32", torch.bfloat16: "bf16"}[scale.dtype]
            residual = store.residual.data_ptr() if bits else 0
            rows = alike.setdefault((kind, of_scales, float(store.max_fine) if bits else largest, bits), [])
            rows.append((value.data_ptr(), scale.data_ptr(), residual, -(-R * width // self.cell), R, C, width, *groups,
                         tensor_id(name)))  # fmt: skip
        step, *seed = as_int32(key.step, key.seed & LOW, key.seed >> 32 & LOW)
        with _on(factors.device):
            for (kind, of_scales, largest, bits), rows in alike.items():
                table, tensor_of = _tables(tuple(rows), factors.device)
                for query in range(len(factors)):
                    _step_kernel[(len(tensor_of),)](
                        table, tensor_of, counts, factors, self.eps * math.sqrt(self.cell), step, query, *seed,
                        CELL=self.cell, KIND=kind, SCALES=of_scales, MAX=largest, RESIDUAL=bits,
                        BY_HAND=_by_hand(factors.device), BLOCK=BLOCK, **EXACT,
                    )  # fmt: skip
        return counts.sum(0)


@dataclass(frozen=True)
class GraphedSparseZO(Graphed, FusedSparseZO):
    """SparseZO by kernels, recorded."""
