"""MaZO: a fixed mask of each row's most important weights, for several tasks at once (Zhang et al., EMNLP 2025,
arXiv 2502.11513).

    S_t = S_global + alpha S_greedy + beta |W|,    each row divided by its sum;    S = sum of S_t over the tasks t
    M_ij = 1 where S_ij is among the k largest of its row i, else 0
    g = (L(w + eps M u) - L(w - eps M u)) / (2 eps),    w <- w - lr g M u,    L: the mean of the tasks' losses

That much is the paper's, by its abstract and a summary of its equations, but for the probe, which it leaves dense.
Ours, as no code was published:
- S_global = W_ij^2 h_j, what setting that weight to 0 adds to its output's mean squared error.  h_j is the mean of
  x_j^2 over the layer's inputs in one forward pass of a task's texts.
- S_greedy = g_ij^2 / (2 h_j), what the best step in that weight alone takes from a loss of curvature h_j.  g is the
  mean of a few estimates, h_j is damped (calibration.DAMPING).  Of Q queries E[g_ij^2] = G_ij^2 + (|G|^2 + G_ij^2) / Q,
  with G the gradient: unless Q is near the number of weights, it is noise that is alike everywhere.
- Dividing a row by its sum decides how tasks are weighed within it, and nothing else.
- The probe is masked too.  E[g M u] = M G either way, but the variance of an element is |M G|^2 + G_ij^2 instead of
  |G|^2 + G_ij^2.
- Vectors, and tables that are only looked up, have no inputs x: they move as without a mask.

alpha, beta and k are unknown: the defaults are where a grid may begin.

`train.py --method mazo --mask-share 0.5` masks once, before its first step (runtime/problem.py, mask_file), and keeps
the masks in its run folder: a replay reads them and makes no forward.

Shape key: Q queries, R rows, C columns, r some of the rows.  Imports calibration, model, quant, random_bits and
zo_optim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from calibration import DAMPING, second_moments
from model import LanguageModel
from quant import Store, pack_bits, unpack_bits
from random_bits import Key, Purpose, tensor_id
from zo_optim import ZO, LossFn, as_kind, probe_losses

# ---------------------------------------------------------------- the estimator


@dataclass(frozen=True)
class MaZO(ZO):
    """ZO in the weights of a mask: a tensor with none is as in ZO, and masks of ones give ZO's bits.

    A masked weight keeps its value (a float's -0 may become 0).
    """

    masks: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)  # by tensor_id: bool [R, C]
    graphable = True

    def direction(self, key: Key, shape: tuple[int, int], rows: Tensor, rounding: Purpose) -> Tensor:
        """Chosen rows of M u: shape (R, C), rows [r] int64 -> [r, C] float32."""
        u, mask = super().direction(key, shape, rows, rounding), self.masks.get(key.tensor)
        return u if mask is None else u.mul_(mask[rows])


def mazo(zo: ZO, masks: dict[str, Tensor]) -> MaZO:
    """The same estimator in the weights of the masks, bool [R, C] by tensor name, on the weights' device.

    Raises ValueError for other estimators than ZO, which have no dense direction to mask, or a kernel for it.
    """
    if type(zo) is not ZO:
        raise ValueError(f"MaZO masks dense directions, got {zo}")
    return as_kind(MaZO, zo, masks={tensor_id(name): mask for name, mask in masks.items()})


# ---------------------------------------------------------------- the masks


class Measured(NamedTuple):
    """What a task's saliency is made of."""

    mean_squares: dict[str, Tensor]  # h of each matrix with inputs: [C] float32
    projected_grads: Tensor  # [Q] float64, of the key's directions


def measure(lm: LanguageModel, loss_fn: LossFn, sequences: list[list[int]], key: Key, zo: ZO) -> Measured:
    """A task measured at the present weights, which stay: loss_fn as zo_step's, sequences the tokens of its texts.

    key: of no step that is taken, so that the mask does not depend on a step's direction.
    """
    plus, minus = probe_losses(lm.weights, loss_fn, key, zo)
    return Measured(mean_squares(lm, sequences), ((plus - minus) / (2 * zo.eps)).nan_to_num(0.0, 0.0, 0.0))


def mean_squares(lm: LanguageModel, sequences: list[list[int]]) -> dict[str, Tensor]:
    """h_j = mean of x_j^2 over all tokens' inputs to each matrix, [C] float32 by name.

    calibration.second_moments' forward passes, one a block: it holds x^T x, [C, C] float64, of all it is asked for.
    """
    tokens, found = sum(map(len, sequences)), {}
    names = [name for name, store in lm.weights.items() if len(store.shape) >= 2]
    for _, block in groupby(names, lambda name: name.removeprefix(lm.layers).partition(".")[0]):
        moments = second_moments(lm, sequences, set(block))
        found |= {name: (moment.diagonal() / tokens).float() for name, moment in moments.items()}
    return found


def masks(
    weights: dict[str, Store], tasks: list[Measured], key: Key, zo: ZO, share: float = 0.5,
    alpha: float = 1.0, beta: float = 0.1,
) -> dict[str, Tensor]:  # fmt: skip
    """M of each matrix that has inputs: bool [R, C] by name, share of each row's columns (at least one) True.

    tasks, key, zo: what `measure` returned and was given.  Raises ValueError for no task or a share outside (0, 1].
    """
    if not tasks or not 0 < share <= 1:
        raise ValueError(f"MaZO needs a task and a share in (0, 1] of each row, got {len(tasks)} and {share}")
    found = {}
    for name in tasks[0].mean_squares:
        w, total = weights[name].dequantise().float(), 0.0
        for task in tasks:
            grad = estimate(task.projected_grads, key._replace(tensor=tensor_id(name)), w, zo)
            total = total + saliency(w, task.mean_squares[name], grad, alpha, beta)
        found[name] = largest_of_rows(total, max(1, round(share * w.shape[1])))
    return found


def estimate(projected_grads: Tensor, key: Key, w: Tensor, zo: ZO) -> Tensor:
    """The mean of g_q u_q over the queries, the gradient's unbiased estimate: [R, C] float32.  w: that tensor."""
    rows, mean = torch.arange(len(w), device=w.device), torch.zeros_like(w)
    for query, g in enumerate(projected_grads.tolist()):
        u = zo.direction(key._replace(query=query), tuple(w.shape), rows, Purpose.UPDATE_ROUNDING)
        mean.add_(u, alpha=g / len(projected_grads))
    return mean


def saliency(w: Tensor, mean_squares: Tensor, grad: Tensor, alpha: float, beta: float) -> Tensor:
    """S_t, rows that add up to 1 (a row of zeros stays): w and grad [R, C] float32, mean_squares [C] -> [R, C]."""
    damped = mean_squares + DAMPING * mean_squares.mean() + 1e-12  # or an input that is always 0 would outrank all
    score = w.square() * mean_squares + alpha * grad.square() / (2 * damped) + beta * w.abs()
    return score / score.sum(1, keepdim=True).clamp(min=1e-30)


def largest_of_rows(score: Tensor, k: int) -> Tensor:
    """Where a row's k largest are, bool [R, C]; of equal ones the first, so that every device has the same."""
    places = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, places, True)


# ---------------------------------------------------------------- as a file


def packed(masks: dict[str, Tensor]) -> bytes:
    """A safetensors file of masks, a bit a weight: the same for the same masks, on whatever device they are."""
    return save({name: pack_bits(mask, 1).cpu() for name, mask in masks.items()})


def unpacked(file: bytes, weights: dict[str, Store]) -> dict[str, Tensor]:
    """The inverse of packed, on the device of those weights."""
    return {
        name: unpack_bits(bits.to(weights[name].device), 1, weights[name].matrix_shape[1]).bool()
        for name, bits in load(file).items()
    }
