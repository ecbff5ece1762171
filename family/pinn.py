"""A tensor train that solves a differential equation by forward passes alone: `python -m family.pinn`, half a minute.

u(x, t) is a European call's price by Black and Scholes, in units of twice its strike: x and t in [0, 1], K = 1/2,

    u_t + sigma^2 x^2 / 2 u_xx + r x u_x - r u = 0,    r = 0.05, sigma = 0.2
    u(x, 1) = max(x - K, 0),    u(0, t) = 0,    u(1, t) = 1 - K e^{-r (1 - t)}

and the loss is the sum of four means, of the squares by which a network f fails each.  Optical PINNs (Zhao et al.,
arXiv 2502.12384; github.com/olokevin/scalable_bpfree_onn_training) train it without back-propagation, neither to the
weights nor to x and t.  By Stein's identity the derivatives of u(x) = E f(x + s z), z ~ N(0, I), are

    u_i  = E[z_i (f(x + s z) - f(x - s z))] / (2 s)
    u_ii = E[(z_i^2 - 1) (f(x + s z) + f(x - s z) - 2 f(x))] / (2 s^2)

and a sparse grid takes these means: 13 nodes, so that a loss reads f at 13 places for a point inside.

The paper's: equation, loss, grid and s = 0.001; tanh layers 2 -> 128 -> 128 -> 1, whose hidden matrix is a chain of
cores of rank 2; g = (L(w + eps v) - L(w - eps v)) / (2 eps) along random signs v, eps = 0.01; Adam on g v.  (Of one
query every element of g v has the square g^2, so Adam is momentum here, with one rate for all weights.)
Ours: all weights begin as N(0, 1) and are multiplied by a constant of their tensor (LAYOUT), so that one eps and one
rate fit all; f sees x and t centred; 20,000 steps from 4e-3 down to 0, for 10,000 at 1e-3; points lie on a lattice that
every step shifts; a direction moves all layers, where the released settings perturb one after the other.

f begins 70 to 210 % off over the domain (relative L2 error) and ends 0.5 to 1.1 % off, of eight seeds.  Compare:
max(x - K, 0) is 6.2 % off, max(x - K e^{-r (1 - t)}, 0) 2.9 %.

Shape key: P perturbed copies, N points inside, E on an edge, K nodes, d dimensions, n weights.  Imports model,
quant, random_bits, runtime.curve, tensor_train and zo_optim.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import View
from quant import Float, StoredWeights, encode
from random_bits import Key, Purpose, bits16, tensor_id
from runtime.curve import DEV, INK, LINE, TRAIN, polyline, text
from tensor_train import chain
from zo_optim import ZO, learning_rate, probe_losses, update

STRIKE, RATE, VOLATILITY = 0.5, 0.05, 0.2  # K, r, sigma


def call_price(x: Tensor, t: Tensor) -> Tensor:
    """u in closed form (Black and Scholes, 1973), float64: x N(d_1) - K e^{-r tau} N(d_2), tau = 1 - t."""
    x, tau = x.double().clamp(min=1e-300), (1 - t.double()).clamp(min=1e-30)  # gives the payoff at tau = 0
    spread = VOLATILITY * tau.sqrt()
    d1 = ((x / STRIKE).log() + (RATE + VOLATILITY**2 / 2) * tau) / spread
    return x * torch.special.ndtr(d1) - STRIKE * (-RATE * tau).exp() * torch.special.ndtr(d1 - spread)


# ---------------------------------------------------------------- derivatives from values


def gauss_hermite(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a mean over N(0, 1), exact to degree 2 count - 1 (Golub and Welsch, 1969).

    The nodes are the eigenvalues of the recurrence He_{k+1} = z He_k - k He_{k-1}, written as a symmetric matrix.
    """
    beside = np.sqrt(np.arange(1, count))
    nodes, vectors = np.linalg.eigh(np.diag(beside, 1) + np.diag(beside, -1))
    return nodes, vectors[0] ** 2


def sparse_grid(level: int, d: int = 2) -> tuple[Tensor, Tensor]:
    """Nodes [K, d] and weights [K], float64, of a mean over N(0, I), exact to total degree 2 level - 1 (Smolyak, 1963).

    The sum of (-1)^m C(d - 1, m) U_{i_1} x ... x U_{i_d} over i with m = level + d - 1 - |i| in 0 ... d - 1; U_i is the
    rule of i nodes.  It is symmetric: with z it has -z, of the same weight.
    """
    weights: dict[tuple[float, ...], float] = {}
    for counts in itertools.product(range(1, level + 1), repeat=d):
        m = level + d - 1 - sum(counts)
        if 0 <= m < d:
            for corner in itertools.product(*(zip(*gauss_hermite(i), strict=True) for i in counts)):
                z = tuple(round(node, 12) + 0.0 for node, _ in corner)  # rules share nodes; -0 is 0
                term = (-1) ** m * math.comb(d - 1, m) * math.prod(weight for _, weight in corner)
                weights[z] = weights.get(z, 0.0) + term
    return torch.tensor(list(weights), dtype=torch.float64), torch.tensor(list(weights.values()), dtype=torch.float64)


def stein(s: float, level: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shifts [K, d] and what f there is summed with: to u [K], to its u_i [K, d] and to its u_ii [K, d], float64.

    As the grid is symmetric, the two halves of a difference have the same sum, and one is enough; as it is exact for
    z_i^2, the last identity's f(x) has the factor 0.  At level 2 it is not for z_i^2 (z_i^2 - 1), and u_ii is wrong.
    At s = 0.001 float32 moves u_xx by 0.04 (of 2.0) and the residual by 0.0005 (of 0.004 after training).
    """
    z, w = sparse_grid(level)
    return s * z, w, w[:, None] * z / s, w[:, None] * (z.square() - 1) / s**2


# ---------------------------------------------------------------- the network

WIDTH, RANK = 128, 2
INPUTS, OUTPUTS = (4, 4, 8), (8, 4, 4)  # factors of the hidden matrix
CORE = (WIDTH * RANK**2) ** (-1 / 6)  # an element of the matrix, a sum of RANK^2 products, has the variance 1 / WIDTH
LAYOUT = {  # shapes and multipliers, 1 / sqrt(inputs) as in neural tangent kernels; u's root mean square is 0.2
    "in.weight": ((2, WIDTH), 1.0), "in.bias": ((1, WIDTH), 1.0), "hidden.bias": ((1, WIDTH), 1.0),
    "cores.0": ((1, 4 * 8, RANK), CORE), "cores.1": ((RANK, 4 * 4, RANK), CORE), "cores.2": ((RANK, 8 * 4, 1), CORE),
    "out.weight": ((WIDTH, 1), 0.2 * WIDTH**-0.5), "out.bias": ((1, 1), 0.2),
}  # fmt: skip
SIZES = [math.prod(shape) for shape, _ in LAYOUT.values()]  # they add up to n


def hidden_matrix(cores: list[Tensor]) -> Tensor:
    """W[i_1 i_2 i_3, o_1 o_2 o_3] = G_1[:, i_1 o_1, :] G_2[:, i_2 o_2, :] G_3[:, i_3 o_3, :]: -> [P, WIDTH, WIDTH].

    A core has a factor of the inputs and one of the outputs, so that W may have full rank.  (A TensorTrain has the
    inputs' before the outputs': its rank is at most the bond's between them.)
    """
    pairs = [factor for pair in zip(INPUTS, OUTPUTS, strict=True) for factor in pair]
    return chain(cores).view(-1, *pairs).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, WIDTH, WIDTH)


def network(view: View, points: Tensor) -> Tensor:
    """f of each copy of the weights, at points (x, t) [M, 2] float32: -> [P, M]."""
    vector = view.read("network")  # [P, n]
    pieces = zip(LAYOUT.items(), vector.split(SIZES, 1), strict=True)
    w = {name: piece.view(-1, *shape) * multiplier for (name, (shape, multiplier)), piece in pieces}
    centred = (points * 2 - 1) * points.new_tensor([2.0, 1.0])  # u bends along x, and hardly along t
    h = torch.baddbmm(w["in.bias"], centred.expand(len(vector), -1, -1), w["in.weight"]).tanh_()
    h = torch.baddbmm(w["hidden.bias"], h, hidden_matrix([w[f"cores.{i}"] for i in range(3)])).tanh_()
    return torch.baddbmm(w["out.bias"], h, w["out.weight"])[..., 0]


# ---------------------------------------------------------------- the loss

INSIDE, EDGE = 32, 16  # N and E; 100 and 10 in the paper
GOLDEN = (5**0.5 - 1) / 2  # points (k / N, k GOLDEN mod 1) are spread evenly, whatever N is


def loss_at(key: Key, stencil: list[Tensor]) -> Callable[[View], Tensor]:
    """The loss at a step's points, a view of P copies -> [P]; stencil: of `stein`, in float32."""
    shifts, to_u, to_first, to_second = stencil
    a, b, c = bits16(key, Purpose.DATA_ORDER, torch.zeros(1, dtype=torch.int64), 3)[0] / 65536
    k, side, one = torch.arange(INSIDE), (torch.arange(EDGE) + c) / EDGE, torch.ones(EDGE)
    inside = torch.stack(((k + a) / INSIDE, (k * GOLDEN + b) % 1), 1)  # [N, 2]
    edges = torch.cat([torch.stack(edge, 1) for edge in ((side, one), (0 * one, side), (one, side))])  # [3 E, 2]
    wanted = torch.cat(((side - STRIKE).clamp(min=0), 0 * one, 1 - STRIKE * (-RATE * (1 - side)).exp()))
    points, x = torch.cat(((inside[:, None] + shifts).view(-1, 2), edges)), inside[:, :1]
    equation = to_first[:, 1] + (VOLATILITY * x) ** 2 / 2 * to_second[:, 0] + RATE * (x * to_first[:, 0] - to_u)

    def loss(view: View) -> Tensor:
        f_inside, f_edges = network(view, points).split([equation.numel(), len(edges)], 1)
        residual = (f_inside.view(-1, *equation.shape) * equation).sum(2)  # [P, N], equation [N, K]
        return residual.square().mean(1) + (f_edges - wanted).square().view(-1, 3, EDGE).mean(2).sum(1)

    return loss


# ---------------------------------------------------------------- training


class Signs(ZO):
    """Directions of random signs (Rademacher): E[v v^T] = I, and |v|^2 = n."""

    def direction(self, key: Key, shape: tuple[int, int], rows: Tensor, rounding: Purpose) -> Tensor:
        return 1.0 - 2.0 * (bits16(key, Purpose.DIRECTION, rows, shape[1]) >> 15)


def initial(seed: int) -> dict[str, Float]:
    """All weights as one vector "network" [n], so that a query is one draw; from N(0, 1), of a key that no step has."""
    key, n = Key(seed, 0, tensor=tensor_id("initial")), sum(SIZES)
    return {"network": encode(ZO().direction(key, (1, n), torch.tensor([0]), Purpose.DIRECTION)[0], "fp32")}


def train(weights: dict[str, Float], steps: int, seed: int, queries: int, lr: float = 4e-3, s: float = 1e-3) -> None:
    """Adam (Kingma and Ba, 2015) on 1 / Q sum of g v.  The weights are written in place."""
    zo, w = Signs(eps=0.01, queries=queries), weights["network"].value
    mean, square, stencil = torch.zeros_like(w), torch.zeros_like(w), [part.float() for part in stein(s)]
    for step in range(steps):
        key = Key(seed, step)
        plus, minus = probe_losses(weights, loss_at(key, stencil), key, zo)
        estimate = {"network": encode(torch.zeros_like(w), "fp32")}
        update(estimate, (plus - minus) / (2 * zo.eps), key, zo, lr=-1.0)  # 0 + 1 / Q sum of g v, which is drawn again
        mean.lerp_(estimate["network"].value, 1 - 0.9)
        square.lerp_(estimate["network"].value.square(), 1 - 0.999)
        rate = learning_rate(step, lr, "linear", steps) / (1 - 0.9 ** (step + 1))
        w.sub_(rate * mean / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))


def relative_error(weights: dict[str, Float]) -> float:
    """|f - u| / |u| over 100 x 100 points of the domain, its edges among them."""
    points = torch.cartesian_prod(torch.linspace(0, 1, 100), torch.linspace(0, 1, 100))
    u = call_price(*points.T)
    return float((network(StoredWeights(weights, torch.float32), points)[0] - u).norm() / u.norm())


# ---------------------------------------------------------------- the picture, and the command


def solution_svg(weights: dict[str, Float], title: str) -> str:
    """u around the strike at three times, f's in the closed form's, as the text of an SVG file."""

    def places(x: Tensor, u: Tensor) -> list[tuple[float, float]]:
        return list(zip((50 + 1500 * (x - 0.3)).tolist(), (350 - 1100 * u).tolist(), strict=True))

    parts = [text(50, 28, title, INK, "start"), text(50, 50, "wide: closed form, narrow: network", INK, "start")]
    for i in range(5):
        ((left, height),) = places(torch.tensor([0.3]), torch.tensor([0.05 * i]))
        parts.append(f'<path d="M{left:.0f},{height:.0f}h600" stroke="{LINE}"/>')
        parts.append(text(left - 8, height + 4, f"{0.05 * i:g}", INK, "end"))
        parts.append(text(left + 150 * i, 372, f"x = {0.3 + 0.1 * i:g}", INK, "middle"))
    for t in (0.0, 0.5, 1.0):
        points = torch.stack((torch.linspace(0.3, 0.7, 101), torch.full((101,), t)), 1)
        f, u = network(StoredWeights(weights, torch.float32), points)[0], call_price(*points.T)
        parts += [polyline(places(points[:, 0], u), TRAIN, 6), polyline(places(points[:, 0], f), DEV, 1.5)]
        parts.append(text(658, 354 - 1100 * float(u[-1]), f"t = {t:g}", INK, "start"))
    size = 'viewBox="0 0 720 390" width="720" height="390"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="720" height="390" rx="8" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m family.pinn", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--queries", type=int, default=1, help="Q: pairs of forwards a step")
    parser.add_argument("--out", type=Path, help="file for a picture of the solution (SVG)")
    args = parser.parse_args(argv)
    if min(args.steps, args.queries) < 1:
        parser.error(f"no training: --steps {args.steps}, --queries {args.queries}")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no such directory")
    torch.set_num_threads(1)  # tensors this small gain nothing from a second one
    start, weights = time.perf_counter(), initial(args.seed)
    train(weights, args.steps, args.seed, args.queries)
    seconds, forwards = time.perf_counter() - start, 2 * args.steps * args.queries
    line = f"{relative_error(weights):.2%} off after {forwards:,} forwards of {sum(SIZES)} parameters"
    print(f"{line}: {seconds:.0f} s, seed {args.seed}")
    if args.out:
        args.out.write_text(solution_svg(weights, f"A European call's price u(x, t) at t = 0, 0.5 and 1: {line}"))


if __name__ == "__main__":
    main()
