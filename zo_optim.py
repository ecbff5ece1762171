"""Zeroth-order fine-tuning: directions, probes that never write a weight, estimators, and updates.

MeZO (Malladi et al., NeurIPS 2023, section 2): z ~ N(0, I), slope = (L(w + eps z) - L(w - eps z)) / (2 eps),
w <- w - lr / n * sum of slope * z.  QuZO (EMNLP 2025, eq. 5 to 10 and algorithm 1): the direction is rounded
stochastically to a few bits, twice and independently: u1 = Q1(u) is probed, u2 = Q2(u) is stepped along, and
the step lands on the weight's own grid by stochastic rounding.

Nothing here keeps a direction: it is drawn again, element by element, wherever it is needed.

Shape key: P probes, R rows, C columns, r some of the rows, n queries.  Imports quant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from quant import Key, Stored, Use, bits16, bits32, matrix_shape, row_chunks, tensor_id

try:  # Triton comes with CUDA builds of torch
    import fused
except ImportError:
    fused = None

# ---------------------------------------------------------------- directions

CLIP = 4  # sigma: the normal table ends there, so no direction is ever clipped and SR(u) is unbiased everywhere
UNIT = 2.0**-14  # of the table's integers, in sigma


@cache
def normal_table(device: torch.device) -> Tensor:
    """65,536 equally likely integers in units of 2^-14 sigma that make up a normal distribution: [2^16] int32.

    The half-normal quantile function in 2,048 linear pieces (knots in units of 2^-12, the infinite one put at
    4 sigma), 16 midpoints a piece, then the mirror image.  Integers, so every machine draws the same ones.
    Mean exactly 0, variance 1 + 7.8e-5, fourth moment 3 + 2.3e-4 (tests/test_directions.py).
    """
    quantile = NormalDist().inv_cdf
    knots = [round(quantile(0.5 + j / 4096) * 4096) for j in range(2048)] + [CLIP * 4096]
    half = [
        (low * (31 - 2 * f) + high * (2 * f + 1) + 4) >> 3
        for low, high in zip(knots, knots[1:], strict=False)
        for f in range(16)
    ]
    return torch.tensor(half + [-u for u in half], dtype=torch.int32, device=device)


def normal(key: Key, rows: Tensor, columns: int) -> Tensor:
    """u ~ N(0, 1) in units of 2^-14: rows [r] int64 -> [r, C] int32."""
    bits = bits16(key, Use.DIRECTION, rows, columns)
    return normal_table(rows.device).index_select(0, bits.flatten()).view(bits.shape)


def direction(key: Key, rows: Tensor, columns: int, bits: int | None, rounding: Use) -> Tensor:
    """Chosen rows of one tensor's direction, in units of sigma: rows [r] int64 -> [r, C] float32.

    bits None: u itself (MeZO).  Otherwise Q(u): stochastic rounding onto 2^bits - 1 levels, step apart, where
    step = 4 / (2^(bits - 1) - 1) sigma.  It is integer arithmetic throughout, and E[Q(u) | u] = u exactly.
    The variance is 1 + step^2 E[f (1 - f)], about 1 + step^2 / 6 for small steps (f: u's distance to the level
    below, in steps).  `rounding` names the draw: PROBE_ROUNDING gives u1, UPDATE_ROUNDING gives u2.
    """
    u = normal(key, rows, columns)
    if bits is None:
        return u * UNIT
    levels = ZO(bits=bits).levels
    dither = bits16(key, rounding, rows, columns).to(torch.int32)
    code = (u * levels + dither) >> 16  # 4 sigma * levels = levels << 16, so 16 bits of dither are exact
    return code * (CLIP / levels)


@dataclass(frozen=True)
class ZO:
    """What an estimator needs to know.  MeZO: bits None.  QuZO: bits 2 to 8, the width of a direction's codes."""

    eps: float = 1e-3
    queries: int = 1
    bits: int | None = None

    @property
    def levels(self) -> int:
        """Codes on each side of 0: 7 for 4 bits; 0 stands for the full direction."""
        return 0 if self.bits is None else 2 ** (self.bits - 1) - 1


Store = dict[str, Stored]


def has_kernels(stored: Stored) -> bool:
    """Whether a fused kernel can stand in for the definitions below."""
    return fused is not None and stored.device.type == "cuda"


# ---------------------------------------------------------------- probes: ways of reading the weights


class Pair:
    """The view of the two probes W + eps d and W - eps d, made from one draw.  Writes nothing."""

    def __init__(
        self, store: Store, seed: int, step: int, query: int, zo: ZO, dtype: torch.dtype, plain: bool = False
    ):
        """plain: the definition in torch, also where a fused kernel could stand in for it."""
        self.store, self.zo, self.dtype, self.plain = store, zo, dtype, plain
        self.place = (seed, step, query)

    def read(self, name: str) -> Tensor:
        """[2, *shape]; matrices in the compute dtype, vectors in float32."""
        stored = self.store[name]
        dtype = self.dtype if len(stored.shape) == 2 else torch.float32
        if has_kernels(stored) and not self.plain:
            key = Key(*self.place, tensor_id(name))
            pair = fused.read_pair(stored, key, self.zo.eps, self.zo.levels, normal_table(stored.device), dtype)
            return pair.view(2, *stored.shape)
        pair = torch.empty(2, *matrix_shape(stored.shape), dtype=dtype, device=stored.device)
        for rows in row_chunks(stored.shape, stored.device):
            index = torch.arange(rows.start, rows.stop, device=stored.device)
            pair[:, rows] = self._both(name, stored.read(rows), index)
        return pair.view(2, *stored.shape)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """index [n] int64 -> [2, n, C] in the compute dtype.  Draws those rows only."""
        return self._both(name, self.store[name].read(index), index).to(self.dtype)

    def _both(self, name: str, weight: Tensor, index: Tensor) -> Tensor:
        d = direction(Key(*self.place, tensor_id(name)), index, weight.shape[1], self.zo.bits, Use.PROBE_ROUNDING)
        d = d.mul_(self.zo.eps)
        return torch.stack((weight + d, weight - d))


# ---------------------------------------------------------------- estimators and updates


@dataclass(frozen=True)
class Query:
    """One estimate: both losses and slope = (plus - minus) / (2 eps), the projected gradient."""

    plus: float
    minus: float
    slope: float


LossFn = Callable[[Pair], Tensor]  # a view of P = 2 probes -> [2] losses


@torch.no_grad()
def estimate(store: Store, loss_fn: LossFn, seed: int, step: int, zo: ZO, dtype: torch.dtype) -> list[Query]:
    """The n queries of one step, all at the same weights.  Reads the store and never writes it."""
    queries = []
    for q in range(zo.queries):
        plus, minus = loss_fn(Pair(store, seed, step, q, zo, dtype)).tolist()
        queries.append(Query(plus, minus, (plus - minus) / (2 * zo.eps)))
    return queries


@torch.no_grad()
def update(
    store: Store, slopes: list[float], seed: int, step: int, zo: ZO, lr: float, plain: bool = False
) -> Tensor:
    """w <- w - lr / n * slope_i * u2_i for each query i in turn, each landing on the weight's grid (algorithm 1).

    This is all that ever writes a weight, and it needs no forward pass: (seed, step, slopes, lr) redo it.
    Returns [2] int64: elements changed, elements held back by the edge of the grid, summed over the queries.
    plain: the definition in torch, also where a fused kernel could stand in for it.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=next(iter(store.values())).device)
    for name, stored in store.items():
        for q, slope in enumerate(slopes):
            key, coefficient = Key(seed, step, q, tensor_id(name)), -lr * slope / len(slopes)
            if coefficient == 0:  # adding +0.0 would turn a stored -0.0 into +0.0
                continue
            if has_kernels(stored) and not plain:
                fused.update_(stored, key, coefficient, zo.levels, normal_table(stored.device), counts)
            else:
                counts += _update_tensor(stored, key, coefficient, zo)
    return counts.cpu()


def _update_tensor(stored: Stored, key: Key, coefficient: float, zo: ZO) -> Tensor:
    """stored += coefficient * u2 -> [2] int64 counts."""
    counts = torch.zeros(2, dtype=torch.int64, device=stored.device)
    columns = stored.shape[-1]
    for rows in row_chunks(stored.shape, stored.device):
        index = torch.arange(rows.start, rows.stop, device=stored.device)
        delta = direction(key, index, columns, zo.bits, Use.UPDATE_ROUNDING).mul_(coefficient)
        words = bits32(key, Use.WEIGHT_ROUNDING, index, columns) if stored.rounds else None
        counts += stored.add_(rows, delta, words)
    return counts


def learning_rate(lr: float, schedule: str, step: int, steps: int) -> float:
    """constant: lr.  linear: from lr down to 0 over the run (the released QuZO scripts' schedule)."""
    return lr if schedule == "constant" else lr * (1 - step / steps)
