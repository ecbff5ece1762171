"""Zeroth-order fine-tuning: directions, probes that never write a weight, estimators, and updates.

MeZO (Malladi et al., NeurIPS 2023, section 2): z ~ N(0, I), slope = (L(w + eps z) - L(w - eps z)) / (2 eps),
w <- w - lr / n * sum of slope * z.  QuZO (EMNLP 2025, eq. 5 to 10 and algorithm 1): the direction is rounded
stochastically to a few bits, twice and independently: u1 = Q1(u) is probed, u2 = Q2(u) is stepped along, and
the step lands on the weight's own grid by stochastic rounding.  Grid directions (ours) are drawn on that grid in the
first place, so that a step needs next to no rounding.

Nothing here keeps a direction: it is drawn again, element by element, wherever it is needed.

Shape key: P probes, R rows, C columns, r some of the rows, n queries.  Imports profiler, quant, random_bits, fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from profiler import bytes_coded, bytes_probed, bytes_stepped, phase
from quant import Stored, matrix_shape, row_chunks
from random_bits import Key, Use, as_int32, bits16, bits32, random_words, reuse, tensor_id

if TYPE_CHECKING:
    from model import StoredView

try:
    import fused
except ImportError:  # of Triton, which comes with CUDA builds of torch
    fused = None

# ---------------------------------------------------------------- directions

CLIP = 4  # sigma: the normal table ends there, so no direction is ever clipped and SR(u) is unbiased everywhere
UNIT = 2.0**-14  # of the table's integers, in sigma


def quantile_knots() -> list[int]:
    """2,049 points of the half-normal quantile function, in units of 2^-12 sigma; the infinite one is put at CLIP."""
    quantile = NormalDist().inv_cdf
    return [round(quantile(0.5 + j / 4096) * 4096) for j in range(2048)] + [CLIP * 4096]


@cache
def normal_table(device: torch.device) -> Tensor:
    """65,536 equally likely integers in units of 2^-14 sigma that make up a normal distribution: [2^16] int32.

    The half-normal quantile function in 2,048 linear pieces, 16 midpoints a piece, then the mirror image.  Integers,
    so every machine draws the same ones.  Mean exactly 0, variance 1 + 7.8e-5, fourth moment 3 + 2.3e-4
    (tests/test_directions.py).
    """
    knots = quantile_knots()
    half = [
        (low * (31 - 2 * f) + high * (2 * f + 1) + 4) >> 3
        for low, high in zip(knots, knots[1:], strict=False)
        for f in range(16)
    ]
    return torch.tensor(half + [-u for u in half], dtype=torch.int32, device=device)


@cache
def normal_knots(device: torch.device) -> Tensor:
    """The same for fused.py, [2048] int32: the f-th of a piece's 16 midpoints is (lower 20 bits + 2 f * upper 12) >> 3.

    8 kB stay in a GPU's first-level cache, where the table's 256 kB do not.
    """
    knots = quantile_knots()
    packed = [32 * low + (high - low) + 4 | high - low << 20 for low, high in zip(knots, knots[1:], strict=False)]
    return torch.tensor(as_int32(*packed), dtype=torch.int32, device=device)


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
    levels = 2 ** (bits - 1) - 1
    dither = bits16(key, rounding, rows, columns).to(torch.int32)
    code = (u * levels + dither) >> 16  # 4 sigma * levels = levels << 16, so 16 bits of dither are exact
    return code * (CLIP / levels)


def grid_step(
    key: Key, rows: Tensor, spacing: Tensor, columns: int, grain: float, times: float | Tensor = 1.0
) -> Tensor:
    """times * grain * u for a direction u drawn on the weight's own grid: [r, C] float32, in weight units.

    With s the grid's spacing at a weight (`spacing`, which broadcasts to [r, C]) and t = max(s, grain):

        grain * u = +t or -t, with probability (grain / t)^2 / 2 each, else 0

    so E[u] = 0 and E[u u^T] = I, as for a Gaussian (the probability to 2^-22 of itself and 2^-32).  Most elements are
    0; the others are one code up or down.  The estimate slope * u has E|g_hat|^2 = (d - 1 + E u^4) |g|^2, where E u^4 =
    (t / grain)^2 is nothing beside the d of a language model, so it is as good as a Gaussian's.  But a step
    lr * slope * u is now p = lr * |slope| / grain spacings at the few weights that it touches.  Landing it has the
    variance (grain / s)^2 s^2 {p} (1 - {p}) a weight, {p} = p - floor(p): at most grain * lr * |slope|, where a step in
    every weight has up to s * lr * |slope| * |u|.  The grid acts as if its spacing were grain, however coarse it is,
    and at whole p nothing is rounded at all.  The word that chose a weight lands it too: random_bits.reuse.
    How small grain may be: (s / grain)^2 has to stay well below d, and p well below the number of codes, or the range
    (+-7 in int4) holds the largest steps back.  A probe is eps = stride * grain long, `stride` spacings at those
    weights, so that the losses' difference can be kept above its own noise without making the grid coarser.
    """
    t = spacing.clamp(min=grain)
    ratio = torch.full_like(t, grain) / t  # a number over a tensor would be a product with a rounded reciprocal
    threshold = (ratio.clamp_(max=1 - 2.0**-24).square_() * 2.0**32).to(torch.int64)  # below 2^32
    words = bits32(key, Use.DIRECTION, rows, columns)
    hit = (words & 0x7FFFFFFF).to(torch.int64) * 2 < threshold  # 31 bits say whether, the top one says which way
    t = t * times
    return torch.where(hit, torch.where(words < 0, -t, t), 0.0)


def check_grid(store: Store, grain: float) -> None:
    """Raises ValueError where grain is so far below a grid's spacing that 31 bits cannot hold (grain / s)^2 to 1 %,
    nor land a step to 3 % of a spacing (random_bits.reuse)."""
    for name, stored in store.items():
        widest = max(float(stored.spacing(rows).amax()) for rows in row_chunks(stored.shape, stored.device))
        if grain < widest / 4096:
            told = f"is under a 4096th of the grid's widest spacing, {widest:.3g} in {name}"
            raise ValueError(f"--eps over --stride, {grain:.3g}, {told}")


@dataclass(frozen=True)
class ZO:
    """What an estimator needs to know.

    bits None, grid False: u ~ N(0, I), MeZO's.  bits 2 to 8: QuZO's, u rounded to codes of that width.  grid: u drawn
    on the weights' own grid, which leaves nothing to round.
    """

    eps: float = 1e-3
    queries: int = 1
    bits: int | None = None
    grid: bool = False
    estimator: str = "q-rge2"  # "q-rge1" steps along u1 itself; "random" turns slopes over by coin, a control
    probe: str = "float"  # "codes" lands w + eps u1 on the weight's grid
    nearest: bool = False  # land steps by rounding to nearest: loses nearly all of them, which it is there to show
    stride: int = 1  # of the grid: how many of its spacings a probe moves a weight by

    @property
    def grain(self) -> float:
        """How fine the grid acts (grid_step)."""
        return self.eps / self.stride

    @property
    def levels(self) -> int:
        """Codes on each side of 0: 7 for 4 bits; 0 stands for the full direction, -1 for the grid's."""
        return -1 if self.grid else 0 if self.bits is None else 2 ** (self.bits - 1) - 1

    @property
    def step_rounding(self) -> Use:
        """Which rounding of u is stepped along."""
        return Use.PROBE_ROUNDING if self.estimator == "q-rge1" else Use.UPDATE_ROUNDING

    def times(self, length: float) -> float:
        """What `along` takes to go so far: grid directions come as grain * u."""
        return length / self.grain if self.grid else length

    def along(self, times: float | Tensor, stored: Stored, key: Key, rows: slice | Tensor, rounding: Use) -> Tensor:
        """length * u for rows of one tensor: [r, C] float32.  times: times(length), or that in memory, [] float32."""
        columns, index = stored.shape[-1], row_index(stored, rows)
        if self.grid:
            return grid_step(key, index, stored.spacing(rows), columns, self.grain, times)
        return direction(key, index, columns, self.bits, rounding).mul_(times)


Store = dict[str, Stored]


def row_index(stored: Stored, rows: slice | Tensor) -> Tensor:
    """Numbers of rows, as draws are keyed by them: [r] int64."""
    return torch.arange(rows.start, rows.stop, device=stored.device) if isinstance(rows, slice) else rows


def has_kernels(stored: Stored) -> bool:
    """Whether a fused kernel can stand in for the definitions below."""
    return fused is not None and fused.serves(stored)


# ---------------------------------------------------------------- probes: ways of reading the weights


class Pair:
    """The view of one query's probes W + eps d and W - eps d, made from one draw.  Writes nothing."""

    def __init__(
        self, store: Store, seed: int, step: int | Tensor, query: int, zo: ZO, dtype: torch.dtype, plain: bool = False,
        signs: tuple[int, ...] = (1, -1),
    ):  # fmt: skip
        """step: its number, or that in memory (random_bits.Key).
        plain: the definition in torch, also where a fused kernel could stand in for it.
        signs: which of the two, to hold no more than is asked for."""
        self.store, self.zo, self.dtype, self.plain, self.signs = store, zo, dtype, plain, signs
        self.place, self.probes = (seed, step, query), len(signs)

    @phase("materialise", bytes_probed)
    def read(self, name: str) -> Tensor:
        """[P, *shape]; matrices in the compute dtype, all else in float32."""
        stored = self.store[name]
        dtype = self.dtype if len(stored.shape) == 2 else torch.float32
        if self._has_kernel(name):
            return self._by_kernel(name, dtype).view(-1, *stored.shape)
        pair = torch.empty(self.probes, *matrix_shape(stored.shape), dtype=dtype, device=stored.device)
        for rows in row_chunks(stored.shape, stored.device):
            pair[:, rows] = self._signed(name, rows)
        return pair.view(-1, *stored.shape)

    @phase("materialise", bytes_coded)
    def codes(self, name: str) -> Tensor:
        """Of an fp8 matrix, rounded to nearest (probe float) or landed (codes): [P, R, C] e4m3."""
        stored = self.store[name]
        if self._has_kernel(name):
            return self._by_kernel(name, stored.grid.dtype)
        pair = torch.empty(self.probes, *stored.shape, dtype=stored.grid.dtype, device=stored.device)
        for rows in row_chunks(stored.shape, stored.device):
            d, words = self._drawn(name, rows)
            for probe, sign in enumerate(self.signs):
                pair[probe, rows] = stored.landed(rows, d if sign > 0 else -d, words)
        return pair

    @phase("materialise", bytes_probed)
    def rows(self, name: str, index: Tensor) -> Tensor:
        """index [n] int64 -> [P, n, C] float32.  Draws those rows only."""
        return self._by_kernel(name, torch.float32, index) if self._has_kernel(name) else self._signed(name, index)

    def _has_kernel(self, name: str) -> bool:
        return has_kernels(self.store[name]) and not self.plain

    def _by_kernel(self, name: str, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
        stored, key = self.store[name], Key(*self.place, tensor_id(name))
        return fused.read_pair(stored, key, self.zo, normal_knots(stored.device), dtype, self.signs, index)

    def _drawn(self, name: str, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """eps u1, and for probes of codes the words that land it: the same for both signs, so that integers move
        symmetrically."""
        stored, key, zo = self.store[name], Key(*self.place, tensor_id(name)), self.zo
        d = zo.along(zo.times(zo.eps), stored, key, rows, Use.PROBE_ROUNDING)
        return d, words_for(stored, key, Use.PROBE_LANDING, rows) if zo.probe == "codes" else None

    def _signed(self, name: str, rows: slice | Tensor) -> Tensor:
        stored, (d, words) = self.store[name], self._drawn(name, rows)
        if self.zo.probe == "float":
            weight = stored.read(rows)
            return torch.stack([weight + d if sign > 0 else weight - d for sign in self.signs])
        return torch.stack([stored.land(rows, d if sign > 0 else -d, words) for sign in self.signs])


class Probes:
    """The view of several queries' probes at once; tensors that are not trained are read once for all, [1, *shape]."""

    def __init__(self, pairs: list[Pair], frozen: StoredView):
        self.pairs, self.frozen = pairs, frozen
        self.probes = sum(pair.probes for pair in pairs)

    def read(self, name: str) -> Tensor:
        if name not in self.pairs[0].store:
            return self.frozen.read(name)
        return _joined([pair.read(name) for pair in self.pairs])

    def rows(self, name: str, index: Tensor) -> Tensor:
        if name not in self.pairs[0].store:
            return self.frozen.rows(name, index)
        return _joined([pair.rows(name, index) for pair in self.pairs])

    def codes(self, name: str) -> Tensor:
        if name not in self.pairs[0].store:
            return self.frozen.codes(name)
        return _joined([pair.codes(name) for pair in self.pairs])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def words_for(stored: Stored, key: Key, use: Use, rows: slice | Tensor) -> Tensor | None:
    """Random words to land on a store's grid: [r, C] int32, or None where nothing is rounded."""
    if not stored.rounds:
        return None
    return bits32(key, use, row_index(stored, rows), stored.shape[-1])


# ---------------------------------------------------------------- estimators and updates


@dataclass(frozen=True)
class Query:
    """One estimate: both losses and slope = (plus - minus) / (2 eps), the projected gradient, or that turned over by a
    coin (estimator random)."""

    plus: float
    minus: float
    slope: float


LossFn = Callable[[Probes], Tensor]  # a view of P probes -> [P] losses


def estimate(store: Store, loss_fn: LossFn, seed: int, step: int, *rest) -> list[Query]:
    """The n queries of one step, all at the same weights.  Reads the store and never writes it."""
    return queries_from(probe_losses(store, loss_fn, seed, step, *rest).tolist(), seed, step, rest[0])


@torch.no_grad()
def probe_losses(
    store: Store, loss_fn: LossFn, seed: int, step: int | Tensor, zo: ZO, dtype: torch.dtype,
    frozen: StoredView | None = None, at_once: int = 2,
) -> Tensor:  # fmt: skip
    """The losses of each query's two probes in turn, [2n].  Nothing here waits for a GPU.

    store: what is trained; frozen: a view of everything else.  at_once: how many of the 2n probes a forward takes, to
    bound its memory; the losses change by rounding only.
    """
    losses = []
    for probes in chunks([(q, sign) for q in range(zo.queries) for sign in (1, -1)], at_once):
        signs = {q: tuple(sign for p, sign in probes if p == q) for q, _ in probes}
        pairs = [Pair(store, seed, step, q, zo, dtype, signs=both) for q, both in signs.items()]
        losses.append(loss_fn(Probes(pairs, frozen)))
    return torch.cat(losses)


def queries_from(losses: list[float], seed: int, step: int, zo: ZO) -> list[Query]:
    queries = []
    for q, (plus, minus) in enumerate(chunks(losses, 2)):
        slope = (plus - minus) / (2 * zo.eps)
        queries.append(Query(plus, minus, slope * coin(seed, step, q) if zo.estimator == "random" else slope))
    return queries


def chunks(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def coin(seed: int, step: int, query: int) -> int:
    """+1 or -1."""
    return 1 if random_words(Key(seed, step, query), Use.COIN, torch.zeros(1, dtype=torch.int64))[0, 0] < 0 else -1


def update(
    store: Store, slopes: list[float], seed: int, step: int, zo: ZO, lr: float, land: Callable | None = None
) -> Tensor:
    """w <- land(w - lr / n * sum of slope_i * u2_i), the mean of the n queries landing on the weight's grid at once.

    (Algorithm 1 lands each query's step by itself: the same mean with more rounding.)  land_steps is all that ever
    writes a weight, and needs no forward pass: (seed, step, slopes, lr) redo it.  Returns [2] int64, on the weights'
    device because reading it waits for the update: elements changed, elements held back by the edge of the grid.
    land: what to call in place of land_steps, with a step's number and its factors.
    """
    coefficients = [-lr * slope / len(slopes) for slope in slopes]
    device = next(iter(store.values())).device
    if not any(coefficients):  # adding +0.0 would turn a stored -0.0 into +0.0
        return torch.zeros(2, dtype=torch.int64, device=device)
    factors = torch.tensor([zo.times(c) for c in coefficients], dtype=torch.float32, pin_memory=device.type == "cuda")
    factors = factors.to(device, non_blocking=True)
    return land(step, factors) if land else land_steps(store, factors, seed, step, zo)


@phase("update", bytes_stepped)
@torch.no_grad()
def land_steps(store: Store, factors: Tensor, seed: int, step: int | Tensor, zo: ZO, plain: bool = False) -> Tensor:
    """w <- land(w + the sum of coefficient_i * u2_i), factors [n] being zo.times of the coefficients: -> [2] int64.

    plain: the definition in torch, also where a fused kernel could stand in for it.
    """
    counts = torch.zeros(fused.SHARDS if fused is not None else 1, 2, dtype=torch.int64, device=factors.device)
    for name, stored in store.items():
        key = Key(seed, step, 0, tensor_id(name))
        if has_kernels(stored) and not (plain or zo.nearest):
            fused.update_(stored, key, factors, zo, normal_knots(factors.device), counts)
        else:
            counts[0] += _update_tensor(stored, key, factors, zo)
    return counts.sum(0)


def _update_tensor(stored: Stored, key: Key, factors: Tensor, zo: ZO) -> Tensor:
    """One tensor's, by definition."""
    counts = torch.zeros(2, dtype=torch.int64, device=stored.device)
    for rows in row_chunks(stored.shape, stored.device):
        steps = (
            zo.along(factor, stored, key._replace(query=q), rows, zo.step_rounding) for q, factor in enumerate(factors)
        )
        delta = reduce(Tensor.add_, steps)
        counts += stored.add_(rows, delta, None if zo.nearest else _landing_words(stored, key, zo, rows))
    return counts


def _landing_words(stored: Stored, key: Key, zo: ZO, rows: slice) -> Tensor | None:
    """A draw of their own; or for grid directions, whose words are used up only in part, query 0's once more, also for
    the sum of several queries: given whether its word hit, that is uniform where it is."""
    if not zo.grid:
        return words_for(stored, key, Use.WEIGHT_ROUNDING, rows)
    words = words_for(stored, key, Use.DIRECTION, rows)
    return None if words is None else reuse(words)


def learning_rate(lr: float, schedule: str, step: int, steps: int, warmup: int = 0) -> float:
    """constant: lr.  linear: from lr down to 0 over the run (the released QuZO scripts' schedule).  Either after
    `warmup` steps that rise to it in equal parts (LoRETTA's GLUE script has 500 before a constant rate)."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    return lr if schedule == "constant" else lr * (1 - (step - warmup) / (steps - warmup))


def epoch_of(step: int, examples: int, batch_size: int) -> int:
    """The pass over the examples that a step (from 0) is in, as AdaZeta counts: in whole steps, the last one short."""
    return step // -(-examples // batch_size)


def queries_of(epoch: int, alpha: float, beta: float, most: int) -> int:
    """AdaZeta's schedule (section 3.3 and its code): Q = min(max(floor(alpha * epoch^beta), 1), most), epoch from 0."""
    return min(max(int(alpha * epoch**beta), 1), most)
