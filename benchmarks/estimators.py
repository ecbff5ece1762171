"""Scale and noise of each estimator's gradient of a linear loss, measured beside theory.

    python -m benchmarks.estimators

The loss is <g, w>, so the projected gradient is <g, u1> exactly, and g_hat = <g, u1> u2 for the two vectors of an
estimator.  Over many directions, with d elements each:

    scale = E <g_hat, g> / |g|^2          1 means unbiased
    noise = E |g_hat|^2 / scale^2 / ((d + 2) |g|^2)          1 is a Gaussian direction's

Theory: elements are independent and alike, so with b = E[u1 u2], m = E[u1^2] E[u2^2] and k = E[u1^2 u2^2] of one
element, scale = b and noise = ((d - 1) m + k) / b^2 / (d + 2).  The moments are summed over the 65,536 values of the
normal table, not estimated.

Elements of a sparse direction depend on one another: of a cell one moves, by M_i or -M_i (zo_optim.SparseZO).  Signs
are independent, so scale = 1; and with u_i^2 come the squares of the d - cell elements of other cells, 1 each on
average, none of its own cell's, and itself, (M_i / eps)^2: noise = sum of g_i^2 (d - cell + (M_i / eps)^2) / |g|^2 /
(d + 2).  Weights are Gaussian, as large as a model's, in each format; a sparse row's step is the rms of M / eps.
Last line JSON.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from quant import Store, encode
from random_bits import Key, Purpose
from zo_optim import CLIP, UNIT, ZO, SparseZO, normal_table

CPU = torch.device("cpu")
SPARSE = {"fp32": 1e-3, "int8": 1e-3, "fp8": 1e-3, "int4": 2.5e-4}  # format: eps


class Moments(NamedTuple):
    """Moments of one element of the two vectors."""

    both: float  # E[u1 u2]
    first: float  # E[u1^2]
    second: float  # E[u2^2]
    fourth: float  # E[u1^2 u2^2]

    def scale(self) -> float:
        return self.both

    def noise(self, d: int) -> float:
        return ((d - 1) * self.first * self.second + self.fourth) / self.both**2 / (d + 2)


def step_of(bits: int) -> float:
    return CLIP / (2 ** (bits - 1) - 1)


def theory(estimator: str, bits: int) -> Moments:
    """Exact moments, from every value u of the table; SR(u) has two outcomes, q and q + step."""
    u = normal_table(CPU).double() * UNIT
    step = step_of(bits)
    low = (u / step).floor() * step
    p = (u - low) / step  # probability of the upper level
    square = (1 - p) * low**2 + p * (low + step) ** 2  # E[SR(u)^2 | u]
    fourth = (1 - p) * low**4 + p * (low + step) ** 4
    if estimator == "q-rge1":
        return Moments(*(float(m.mean()) for m in (square, square, square, fourth)))
    if estimator == "q-rge2":
        return Moments(*(float(m.mean()) for m in (u**2, square, square, square**2)))
    nearest = (u / step).round() * step
    return Moments(*(float(m.mean()) for m in (nearest**2, nearest**2, nearest**2, nearest**4)))


def draw(estimator: str, bits: int, key: Key, rows: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """The two vectors, [rows, d] each."""
    if estimator == "nearest":
        step = step_of(bits)
        u = (ZO().direction(key, (len(rows), d), rows, Purpose.PROBE_ROUNDING) / step).round() * step
        return u, u
    zo, shape = ZO(bits=bits), (len(rows), d)
    u1 = zo.direction(key, shape, rows, Purpose.PROBE_ROUNDING)
    return u1, u1 if estimator == "q-rge1" else zo.direction(key, shape, rows, Purpose.UPDATE_ROUNDING)


def draw_sparse(zo: SparseZO, store: Store, key: Key, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of a store whose rows are alike: draws differ by the rows and, where there are no more, by the step."""
    R, C = store.matrix_shape
    hits, u = zo.hits(store, key._replace(step=int(rows[0]) // R), rows % R), torch.zeros(len(rows), C)
    u[hits.owner, hits.places[1]] = hits.move() / zo.eps
    return u, u


def sparse_noise(zo: SparseZO, store: Store, g: Tensor) -> tuple[float, float]:
    """The rms of M / eps over a row's elements, and the noise that theory gives."""
    d = len(g)
    below, above, unit = store.bracket((torch.zeros(d, dtype=torch.int64), torch.arange(d)), zo.eps * zo.cell**0.5)
    fourth = ((above - below).double() / 2 * unit / zo.eps).square()  # E u_i^4
    return fourth.mean().sqrt().item(), (g.square() @ (d - zo.cell + fourth) / (g @ g) / (d + 2)).item()


def measure(pairs, g: Tensor, d: int) -> tuple[float, float]:
    """(scale, noise) over batches of (u1, u2)."""
    inner = square = n = 0
    for u1, u2 in pairs:
        projected_grad = u1.double() @ g
        inner += float((projected_grad * (u2.double() @ g)).sum())
        square += float((projected_grad**2 * u2.double().square().sum(1)).sum())
        n += len(u1)
    scale = inner / n / float(g @ g)
    return scale, square / n / scale**2 / ((d + 2) * float(g @ g))


def batches(samples: int, size: int = 250):
    return (torch.arange(i, min(i + size, samples)) for i in range(0, samples, size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=4096, help="a multiple of 1024")
    parser.add_argument("--samples", type=int, default=20000)
    args = parser.parse_args()
    g = torch.randn(args.d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key, rows_out = Key(0, 0), []
    print(f"{'estimator':12}{'bits':>6}{'step':>8}{'scale':>9}{'theory':>9}{'noise':>9}{'theory':>9}")
    for bits in (8, 4, 3, 2):
        for estimator in ("q-rge1", "q-rge2", "nearest"):
            pairs = (draw(estimator, bits, key, rows, args.d) for rows in batches(args.samples))
            got, want = measure(pairs, g, args.d), theory(estimator, bits)
            rows_out.append((estimator, str(bits), step_of(bits), got[0], want.scale(), got[1], want.noise(args.d)))
            report(rows_out[-1])
    weights = 0.02 * torch.randn(args.d, generator=torch.Generator().manual_seed(1))
    for (form, eps), cell in product(SPARSE.items(), (64, 256, 1024)):
        zo, store = SparseZO(eps, cell=cell), encode(weights.expand(250, -1).contiguous(), form)
        got = measure((draw_sparse(zo, store, key, rows) for rows in batches(args.samples)), g, args.d)
        step, want = sparse_noise(zo, store, g)
        rows_out.append((f"sparse {cell}", form, step, got[0], 1.0, got[1], want))
        report(rows_out[-1])
    print(json.dumps({"d": args.d, "samples": args.samples, "rows": rows_out}))


def report(row: tuple) -> None:
    name, bits, step, *numbers = row
    print(f"{name:12}{bits:>6}{step:8.3f}" + "".join(f"{number:9.3f}" for number in numbers), flush=True)


if __name__ == "__main__":
    main()
