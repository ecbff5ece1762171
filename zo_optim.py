"""Zeroth-order fine-tuning: one step, the perturbed weights that it reads, directions, and schedules.

MeZO (Malladi et al., NeurIPS 2023, algorithm 1): z ~ N(0, I), the projected gradient g = (L(w + eps z) - L(w - eps z))
/ (2 eps), w <- w - lr / Q * sum of g z.  QuZO (EMNLP 2025, eq. 5 to 10 and algorithm 1): the direction is rounded
stochastically to a few bits, twice and independently: u1 = Q1(u) is probed, u2 = Q2(u) is stepped along, and the
step lands on the weight's own grid by stochastic rounding.  Sparse directions (ours, docs/directions.md) move few
weights, by whole spacings of that grid in the first place, so that a step needs next to no rounding.

No direction is ever stored: it is drawn again, element by element, wherever it is needed.

Shape key: Q queries, P perturbed copies, R rows, C columns, r some of the rows.  Imports quant and random_bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, reduce
from statistics import NormalDist, median
from typing import NamedTuple

import torch
from torch import Tensor

from quant import CODES, COUNTED, Places, Store, StoredWeights, row_chunks
from random_bits import Key, Purpose, bits16, bits32, philox_blocks, tensor_id

# ---------------------------------------------------------------- one step


class Step(NamedTuple):
    plus: Tensor  # [Q] float64 on the CPU: L(w + eps u1)
    minus: Tensor  # [Q]: L(w - eps u1)
    projected_grads: Tensor  # [Q]: with the key, all that is needed to redo the update
    counts: Tensor  # [5] int64 on the weights' device: quant.landing_counts


@torch.no_grad()
def zo_step(weights: dict[str, Store], loss_fn: LossFn, key: Key, zo: ZO, lr: float, clip: float = math.inf) -> Step:
    """One step of MeZO or QuZO (algorithm 1 of either).

    weights: stores by name (quant.encode makes one of any tensor), written in place.  loss_fn: a view of P perturbed
    copies -> [P] losses.  key: (seed, step).  clip: the largest size of a projected gradient (not in the papers).  A
    query whose losses are not finite counts as 0.  Raises ValueError, writing nothing, unless there is a loss a copy.
    """
    plus, minus = probe_losses(weights, loss_fn, key, zo)  # L(w + eps u1), L(w - eps u1): nothing is written
    projected_grads = (plus - minus) / (2 * zo.eps)
    if zo.estimator == "random":
        projected_grads = projected_grads * coins(key, zo.queries)
    projected_grads = projected_grads.where(projected_grads.isfinite(), 0.0).clamp(-clip, clip)
    counts = update(weights, projected_grads, key, zo, lr)  # w <- round(w - lr / Q sum g u2): all that ever writes
    return Step(plus, minus, projected_grads, counts)


@torch.no_grad()
def probe_losses(weights: dict[str, Store], loss_fn: LossFn, key: Key, zo: ZO) -> tuple[Tensor, Tensor]:
    """The losses at w + eps u1 and at w - eps u1: [Q] float64 each, on the CPU, all at the same weights w."""
    queries = getattr(loss_fn, "queries", None) or range(zo.queries)  # other processes may have the others
    losses = zo.losses(weights, loss_fn, key, queries)
    getattr(loss_fn, "meanwhile", int)()  # what a host may do while a GPU computes, such as the next batch
    losses = losses.cpu()  # the only place where a step waits for a GPU
    agreed = getattr(loss_fn, "agreed", None)  # with other processes
    losses = losses if agreed is None else agreed(losses)
    if losses.shape != (2 * zo.queries,):
        raise ValueError(f"loss_fn must return one loss for each copy of a view, got {list(losses.shape)} in all")
    return losses.double().view(-1, 2).unbind(1)


@torch.no_grad()
def update(weights: dict[str, Store], projected_grads: Tensor, key: Key, zo: ZO, lr: float) -> Tensor:
    """w <- round(w - lr / Q * sum of g_q u2_q): the mean of the Q queries is rounded onto the weight's grid at once.

    (Algorithm 1 of QuZO rounds each query's step by itself: the same mean with more rounding.)  It needs no forward
    pass: key, projected_grads [Q] float64 and lr redo it, which is what --replay and --resume do.
    Returns Step's counts.
    """
    lengths = -lr * projected_grads / len(projected_grads)
    device = next(iter(weights.values())).device
    if not lengths.any():  # adding +0.0 would turn a stored -0.0 into +0.0
        counts = torch.zeros(COUNTED, dtype=torch.int64, device=device)
    else:
        factors = (lengths / zo.unit).float()
        factors = factors.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else factors
        moved = {name: stored for name, stored in weights.items() if zo.moves is None or zo.moves(name, key)}
        counts = zo.add_directions_(moved, factors, key)
    if hasattr(zo.moves, "observe"):  # what moves next may depend on what was found; and what no direction moves
        zo.moves.observe(key, projected_grads, lr)
    return counts


# ---------------------------------------------------------------- the estimator: how weights are probed and stepped

# Kernels by device type, which return counts, or None where they do not fit; gpu.install puts them here for cuda.  One
# lands in some rows of a tensor, the other a product of thin matrices in all of it (family/subzero.py)
LANDING_TWINS: dict[str, Callable[[Store, slice, Tensor, Key], Tensor | None]] = {}
PRODUCT_TWINS: dict[str, Callable[..., Tensor | None]] = {}


@dataclass(frozen=True)
class ZO:
    """How directions are drawn, probed and stepped along: in every weight, as in the papers.

    bits None: u ~ N(0, I), MeZO's.  bits 2 to 8: QuZO's, u rounded to codes of that width.  (SparseZO is ours;
    gpu.kernels.FusedZO does the same as this one in one kernel a tensor.)
    """

    eps: float = 1e-3  # in weight units
    queries: int = 1  # Q
    bits: int | None = None
    estimator: str = "q-rge2"  # QuZO eq. 8; "q-rge1" steps along u1 itself; "random" is an ablation
    probe: str = "float"  # ablation "codes": w + eps u1 is rounded stochastically onto the weight's grid
    nearest: bool = False  # ablation: steps land by rounding to nearest, which loses nearly all of them
    dtype: torch.dtype = torch.float32  # of perturbed matrices: what a forward multiplies in
    probes_per_forward: int | None = 2  # perturbed copies at a time, which bounds memory; None: all of them
    moves: Callable[[str, Key], bool] | None = None  # which tensors a step probes and moves (family/lezo.py); None: all
    unit = 1.0  # the length of a drawn direction that stands for u (not a field)
    stored_view = StoredWeights  # how a tensor is read that a step leaves alone (not a field)
    graphable = False  # whether a subclass, as it is, launches the same at each step, key.step in memory (not a field)

    def __post_init__(self):
        """Raises ValueError for what no estimator is."""
        fits = self.bits in (None, *range(2, 9)) and self.eps > 0 and self.queries > 0
        if not fits or self.estimator not in ("q-rge2", "q-rge1", "random") or self.probe not in ("float", "codes"):
            raise ValueError(f"no usable estimator: {self}")

    def fill_buffers(self, weights: dict[str, Store], key: Key) -> None:
        """Make, on the host, what recorded launches of a step are to find in memory: here nothing."""

    def losses(self, weights: dict[str, Store], loss_fn: LossFn, key: Key, queries: range) -> Tensor:
        """L(w + eps u1) and L(w - eps u1) of each of these queries in turn: [2Q] float32 on the weights' device."""
        probes = [(query, sign) for query in queries for sign in (1, -1)]
        n = self.probes_per_forward or len(probes)
        at_once = [probes[i : i + n] for i in range(0, len(probes), n)]
        return torch.cat([torch.atleast_1d(loss_fn(PerturbedWeights(weights, key, self, p, len(p)))) for p in at_once])

    def perturbed(
        self, store: Store, key: Key, signs: list[int], dtype: torch.dtype, rows: Tensor | None = None
    ) -> Tensor:
        """w + sign * eps * u1 for each sign, from one draw; the store is not written.

        -> [P, R, C] in dtype (e4m3 or int8: that store's codes), or of chosen rows [n] int64 only, [P, n, C].
        """
        R, C = store.matrix_shape
        copies = torch.empty(len(signs), R if rows is None else len(rows), C, dtype=dtype, device=store.device)
        for chunk in row_chunks(store.matrix_shape, store.device) if rows is None else [rows]:
            index = torch.arange(chunk.start, chunk.stop, device=store.device) if rows is None else rows
            eps_u1 = self.direction(key, (R, C), index, Purpose.PROBE_ROUNDING).mul_(self.eps)
            as_codes, bits = dtype in CODES, None
            rounded = as_codes or self.probe == "codes"
            if self.probe == "codes" and store.rounds:  # the same for both signs, so that codes move symmetrically
                bits = bits32(key, Purpose.PROBE_LANDING, index, C)
            w = None if rounded else store.dequantise(chunk)
            for copy, sign in zip(copies if rows is not None else copies[:, chunk], signs, strict=True):
                if not rounded:
                    copy.copy_(torch.add(w, eps_u1, alpha=sign))
                elif as_codes:
                    copy.copy_(store.rounded_code(chunk, sign * eps_u1, bits)[0])
                else:
                    copy.copy_(store.add_rounded(chunk, sign * eps_u1, bits))
        return copies

    def direction(self, key: Key, shape: tuple[int, int], rows: Tensor, rounding: Purpose) -> Tensor:
        """Chosen rows of one tensor's direction, in units of sigma: shape (R, C), rows [r] int64 -> [r, C] float32.

        bits None: u ~ N(0, 1) itself (MeZO).  Otherwise Q(u) (QuZO eq. 7): stochastic rounding onto 2^bits - 1 levels,
        step = 4 / (2^(bits - 1) - 1) sigma apart.  It is integer arithmetic throughout, and E[Q(u) | u] = u exactly.
        The variance is 1 + step^2 E[f (1 - f)], about 1 + step^2 / 6 for small steps (f: u's distance to the level
        below, in steps).  `rounding` names the draw: PROBE_ROUNDING gives u1, UPDATE_ROUNDING gives u2.
        """
        uniform = bits16(key, Purpose.DIRECTION, rows, shape[1])
        u = normal_table(rows.device).index_select(0, uniform.flatten()).view(uniform.shape)
        if self.bits is None:
            return u * UNIT
        levels = 2 ** (self.bits - 1) - 1
        dither = bits16(key, rounding, rows, shape[1]).to(torch.int32)
        code = (u * levels + dither) >> 16  # 4 sigma * levels = levels << 16, so 16 bits of dither are exact
        return code * (CLIP / levels)

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        """w <- round(w + sum of factor_q * direction_q): all that ever writes.  factors [Q] float32 -> counts."""
        counts = torch.zeros(COUNTED, dtype=torch.int64, device=factors.device)
        twin = LANDING_TWINS.get(factors.device.type)
        rounding = Purpose.PROBE_ROUNDING if self.estimator == "q-rge1" else Purpose.UPDATE_ROUNDING  # u1, or u2
        for name, store in weights.items():
            key = key._replace(tensor=tensor_id(name))
            for rows in row_chunks(store.matrix_shape, store.device):
                index = torch.arange(rows.start, rows.stop, device=store.device)
                delta = reduce(Tensor.add_, (
                    self.direction(key._replace(query=query), store.matrix_shape, index, rounding).mul_(factor)
                    for query, factor in enumerate(factors)
                ))  # fmt: skip
                counted = None if twin is None or self.nearest else twin(store, rows, delta, key)
                if counted is None:
                    noisy = store.rounds and not self.nearest
                    bits = bits32(key, Purpose.WEIGHT_ROUNDING, index, delta.shape[1]) if noisy else None
                    counted = store.add_rounded_(rows, delta, bits)
                counts += counted
        return counts


def as_kind(kind: type[ZO], zo: ZO, **more) -> ZO:
    """The same estimator as one of a subclass.  more: fields that only that has, or that it has another value of."""
    return kind(**{f.name: getattr(zo, f.name) for f in fields(zo) if f.init} | more)


class Hits(NamedTuple):
    """The elements of one tensor that a sparse direction moves, [K] each."""

    owner: Tensor  # int64: which of the rows that were asked for
    places: Places  # row and column
    below: Tensor  # float32, in units of `unit`: the points on either side of w that probes read
    above: Tensor
    unit: Tensor
    up: Tensor  # bool: u's sign
    random_bits: Tensor  # int32, to land by

    def move(self) -> Tensor:
        """eps u in weight units, float32."""
        half = (self.above - self.below) * 0.5 * self.unit
        return torch.where(self.up, half, -half)


@dataclass(frozen=True)
class SparseZO(ZO):
    """Sparse directions on the weights' own grid (ours, docs/directions.md): short lists, whatever the format.

    A tensor is cut into cells of `cell` neighbouring elements.  A direction picks one element of each, at random, and
    moves it by M or -M, with probability (t / M)^2, where t = eps sqrt(cell) and M >= t is half the distance between
    the grid points that are at least t below and above the element.  So E[(eps u_i)^2] = 1 / cell (t / M)^2 M^2 =
    eps^2, E[u u^T] = I whatever the spacings are, and a probe is a network on the grid.
    A step adds -lr g u at the same elements, lr |g| M / eps long there, and is rounded stochastically: a weight's
    variance is eps^2 (s / M)^2 / 4 at most, s its spacing, so that a move of many spacings leaves next to no noise.
    (At the edge of fp8's range M is less than t, and E[u_i^2] less than 1: docs/directions.md.)
    """

    cell: int = 1024  # a power of two, 8 or more: 1 / cell is the density

    def __post_init__(self):
        """Raises ValueError for what no sparse estimator is."""
        super().__post_init__()
        if self.bits or self.nearest or self.probe != "float" or self.cell < 8 or self.cell & self.cell - 1:
            raise ValueError(f"no usable sparse estimator: {self}")

    @property
    def unit(self) -> float:
        return self.eps

    def perturbed(
        self, store: Store, key: Key, signs: list[int], dtype: torch.dtype, rows: Tensor | None = None
    ) -> Tensor:
        R, C = store.matrix_shape
        copies = torch.empty(len(signs), R if rows is None else len(rows), C, dtype=dtype, device=store.device)
        as_codes = dtype in CODES
        for chunk in row_chunks(store.matrix_shape, store.device) if rows is None else [rows]:
            w = store.codes[chunk] if as_codes else store.dequantise(chunk)
            copies[:, chunk if rows is None else slice(None)] = w
        hits = self.hits(store, key, rows)
        for copy, sign in zip(copies, signs, strict=True):
            w = torch.where(hits.up == (sign > 0), hits.above, hits.below)
            if as_codes:  # torch does not index fp8 by a tensor on every device
                codes = w.clamp(-store.max_code, store.max_code).to(dtype)
                copy.view(torch.uint8)[hits.owner, hits.places[1]] = codes.view(torch.uint8)
            else:
                copy[hits.owner, hits.places[1]] = (w * hits.unit).to(dtype)
        return copies

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        """One query after the other, as in QuZO's algorithm 1: two seldom meet in one element."""
        counts = torch.zeros(COUNTED, dtype=torch.int64, device=factors.device)
        for name, store in weights.items():
            key = key._replace(tensor=tensor_id(name))
            for query, factor in enumerate(factors):
                hits = self.hits(store, key._replace(query=query))
                counts += store.add_rounded_(hits.places, hits.move() * factor, hits.random_bits)
        return counts

    def hits(self, store: Store, key: Key, rows: Tensor | None = None) -> Hits:
        """One tensor's direction, or that of chosen rows [n] int64.

        One Philox block a cell says where, whether, which way, and how a step is rounded there.
        """
        R, C = store.matrix_shape
        width = -(-C // 8) * 8  # a row is padded, so that no byte of packed codes belongs to two cells
        if rows is None:
            cells = torch.arange(-(-R * width // self.cell), device=store.device)[None]
        else:  # the first and the last of a row's cells may have other rows' elements too
            cells = rows[:, None] * width // self.cell + torch.arange((width - 1) // self.cell + 2, device=store.device)
        words = philox_blocks(key, Purpose.DIRECTION, cells.flatten(), 8)[:, 0].view(*cells.shape, 4)
        at = cells * self.cell + (words[..., 0] & self.cell - 1)
        row, column = at // width, at % width
        owner = row if rows is None else torch.arange(len(rows), device=store.device)[:, None].expand_as(row)
        real = (column < C) & (row < R if rows is None else row == rows[:, None])
        owner, row, column, words = owner[real], row[real], column[real], words[real]

        t = self.eps * math.sqrt(self.cell)
        below, above, unit = store.bracket((row, column), t)
        half = (above - below) * 0.5 * unit
        chance = (torch.full_like(half, t) / half).clamp_(max=1).square_()  # CUDA divides a number with a rounding more
        moves = (words[:, 1].to(torch.int64) & 0xFFFFFFFF) < (chance * 2.0**32).to(torch.int64)
        found = (owner, row, column, below, above, unit, words[:, 2] < 0, words[:, 3])
        owner, row, column, *rest = (x[moves] for x in found)
        return Hits(owner, (row, column), *rest)


@dataclass
class PerturbedWeights:
    """A view of P perturbed copies of the weights, w + eps u1 or w - eps u1 of some queries, which writes nothing."""

    weights: dict[str, Store]
    key: Key
    zo: ZO
    copies: list[tuple[int, int]]  # query and sign of each copy
    probes: int  # P

    def read(self, name: str, rows: Tensor | None = None, as_codes: bool = False) -> Tensor:
        """[P, *shape], or [1, *shape] of what is not moved: matrices in the compute dtype, vectors in float32;
        as_codes, an fp8 or int8 matrix's codes.

        rows [n] int64: only those rows of a matrix are drawn, [P, n, C] float32.
        """
        if self.zo.moves is not None and not self.zo.moves(name, self.key):  # one tensor for all copies
            return self.zo.stored_view(self.weights, self.zo.dtype).read(name, rows, as_codes)
        store, parts = self.weights[name], []
        in_float32 = rows is not None or len(store.shape) < 2
        dtype = store.codes.dtype if as_codes else torch.float32 if in_float32 else self.zo.dtype
        for query in dict.fromkeys(query for query, _ in self.copies):
            key = self.key._replace(query=query, tensor=tensor_id(name))
            signs = [sign for q, sign in self.copies if q == query]
            parts.append(self.zo.perturbed(store, key, signs, dtype, rows))
        copies = parts[0] if len(parts) == 1 else torch.cat(parts)
        return copies.view(-1, *store.shape) if rows is None else copies


LossFn = Callable[[PerturbedWeights], Tensor]


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


# ---------------------------------------------------------------- schedules


def learning_rate(step: int, lr: float, schedule: str, steps: int, warmup: int = 0) -> float:
    """schedule "constant": lr; "linear": from lr down to 0 over the run (the released QuZO scripts' schedule).

    Either comes after `warmup` steps that rise to it in equal parts (LoRETTA's GLUE script has 500 before a constant
    rate)."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    return lr if schedule == "constant" else lr * (1 - (step - warmup) / (steps - warmup))


MEASURED = 32  # queries that only measure, where no rate is given; of short runs fewer


# A rate is at most the first number, and the second over d.  Weights: between what three models of 26 to 135 million
# did best with; 1e-6 for 7 billion, QuZO's script.  Bottlenecks: 3.3e-4 for SmolLM2-135M's 184,500, where 3e-4 did
# best; 7e-5 for some 880,000 of LLaMA-2-7B's, where AdaZeta has 1e-4.
MOST = {"weights": (3e-5, 7000.0), "adp": (1e-3, 60.0), "lora": (1e-3, math.inf), "rep": (1e-3, math.inf)}


def measured_rate(first_grads: list[float], d: float, kind: str, dense_on_codes: bool = False) -> float:
    """A learning rate from the first projected gradients (ours; docs/deviations.md).

    To first order a step along u changes its batch's loss by lr g^2, whatever the model, the method, eps and d are:
    that is to be 0.03 nats, but at most what MOST says.
    first_grads: at the first weights.  Half of normal numbers are within 0.6745 standard deviations: so g^2 is taken
    from the median, which a few outliers (fp8's) do not move.  d: elements that directions move, of that kind.
    dense_on_codes: steps in every weight are rounded onto codes, whose noise grows with the rate: a quarter of it.
    """
    mean_square = (median(map(abs, first_grads)) / NormalDist().inv_cdf(0.75)) ** 2
    most = min(MOST[kind][0], MOST[kind][1] / d)
    rate = min(0.03 / mean_square, most) if mean_square else most
    return rate / 4 if dense_on_codes else rate


def epoch_of(step: int, examples: int, batch_size: int) -> int:
    """The pass over the examples that a step (from 0) is in, as AdaZeta counts: in whole steps, the last one short."""
    return step // -(-examples // batch_size)


def adazeta_queries(epoch: int, alpha: float, beta: float, max_queries: int) -> int:
    """AdaZeta (section 3.3 and its code): Q = min(max(floor(alpha * epoch^beta), 1), max_queries), epoch from 0."""
    return min(max(int(alpha * epoch**beta), 1), max_queries)


# ---------------------------------------------------------------- ablations
# --estimator random, --probe codes and --rounding nearest are in no paper and learn less: each takes one idea away, to
# show what it is for.  The first is here; the others are ZO.probe and ZO.nearest.


def coins(key: Key, queries: int) -> Tensor:
    """+1 or -1 for each query, [Q] float64: a control whose steps are as long as the estimator's and know nothing."""
    zero = torch.zeros(1, dtype=torch.int64)
    first = [philox_blocks(Key(key.seed, key.step, q), Purpose.COIN, zero, 8)[0, 0, 0] for q in range(queries)]
    return torch.tensor([1.0 if word < 0 else -1.0 for word in first], dtype=torch.float64)
