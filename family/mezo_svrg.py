"""MeZO-SVRG: the noise of minibatches taken out (Gautam et al., "Variance-reduced Zeroth-Order Methods for Fine-Tuning
Language Models", ICML 2024, arXiv 2404.08080).

Every q steps the weights are an anchor, where the gradient is estimated on all N training examples.  A step between two
anchors corrects that estimate by how a minibatch's has changed since, which is known better than the estimate itself:

    t % q = 0:   A <- w,    G = g_full z_full,    w <- w - lr1 G
    else:        w <- w - lr2 ((g_w - g_A) z + G)

    g_w, g_A = (L_B(v + eps z) - L_B(v - eps z)) / (2 eps)    of the minibatch B, at v = w and at v = A, along one z
    g_full   = (L(A + eps z_full) - L(A - eps z_full)) / (2 eps)    of all examples

A step's mean is the gradient of L at w, as MeZO's is.  Its variance over directions and B, where d elements move and
E|(z . h) z|^2 = (d + 2) |h|^2, with h_B(v) the gradient of L_B at v, h(v) that of L, and D_B = h_B(w) - h_B(A):

    MeZO:    (d + 2) E|h_B(w)|^2 - |h(w)|^2
    SVRG:    (d + 2) E|D_B|^2 - |h(w) - h(A)|^2 + (d + 1) |h(A)|^2

As w -> A the minibatch's part goes to 0.  What the directions add, (d + 1) |h(A)|^2, stays: it is nearly all there is
where batches agree, and an anchor's q steps have one z_full, so that it is not averaged over them.  Of forwards of one
batch, of B examples, an anchor's step takes 2 ceil(N / B) and another one 4, where MeZO's takes 2.

The released code (github.com/amazon-science/mezo_svrg) has q = 2, eps = 1e-3, lr1 = 1e-3 (2e-3 by its command line)
and lr2 = 1e-6: of two steps one is MeZO's on all examples, and the other one is a thousandth as long.  In it, too:
- The anchor is a copied list of the live parameters, so that A = w, always.
- The estimate at "A" is taken after the step along the one at w, and along another direction: nothing cancels, and two
  estimates' noise is added to G.
- A mean loss that grows by 5 % divides both rates.

Ours:
- One direction for both minibatch estimates, and an anchor that stays where it was.
- A is a copy of the stores: as many bytes as all weights that are trained are stored in (fp32 4 an element, bf16 2,
  int8 and fp8 1, int4 9/16; of adapters next to nothing), and none where q = 1.  G is not kept but drawn again.
- lr2 is the run's rate, lr1 = anchor_rate times that, and both follow the run's schedule.  It is not measured where it
  is not given, as that of other methods is: g_w - g_A, which is 0 at an anchor, says nothing of the slope's size.
- Directions may be rounded to a few bits, as in QuZO: u1 is probed and u2 stepped along, at an anchor too.
- Sparse directions are refused, because they depend on the weights: those at w would not be those at A, so that nothing
  would cancel, and z_full could not be drawn again once w has moved.  So are estimators with blocks or subspaces.

Shape key: none.  Imports quant, random_bits and zo_optim.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant import Store
from random_bits import Key, Purpose
from zo_optim import ZO, LossFn, as_kind


@dataclass(eq=False)
class Anchor:
    """All that SVRG keeps from step to step; no update needs it, only the losses of the steps after it do."""

    key: tuple[int, int] | None = None  # its seed and step
    weights: dict[str, Store] = field(default_factory=dict)  # A
    losses: Tensor | None = None  # [2] float64: L(A + eps z_full), L(A - eps z_full)


@dataclass(frozen=True)
class SVRG(ZO):
    """MeZO-SVRG as two queries a step: 0 is along the step's own direction, 1 along its anchor's.

    At an anchor's step loss_fn is to be of all training examples.  projected_grads are [g_w - g_A, g_full], and [0,
    g_full] at an anchor's step, so that with the key they redo an update, as of any ZO.  `svrg` makes one.
    Raises ValueError for other numbers of queries, tensors that a step leaves alone, every < 1 and anchor_rate <= 0.
    """

    queries: int = 2
    every: int = 2  # q
    anchor_rate: float = 1000.0  # lr1 / lr2
    anchor: Anchor = field(default_factory=Anchor, repr=False, compare=False)  # a copy by `replace` shares it

    def __post_init__(self):
        super().__post_init__()
        if self.queries != 2 or self.moves is not None or self.every < 1 or not self.anchor_rate > 0:
            raise ValueError(f"SVRG needs 2 queries, all weights, every 1 or more and a positive anchor_rate: {self}")

    def is_anchor(self, step: int) -> bool:
        return step % self.every == 0

    def forwards(self, step: int, batches: int) -> int:
        """Of one batch through one copy of the weights; batches: that hold all examples, ceil(N / B)."""
        return 2 * batches if self.is_anchor(step) else 4

    def losses(self, weights: dict[str, Store], loss_fn: LossFn, key: Key, queries: range) -> Tensor:
        """L_B(w +- eps z) - L_B(A +- eps z) + (what L(A +- eps z_full) are on average), L(A +- eps z_full): [4]
        float64 on the weights' device.

        The first two have the slope g_w - g_A, whatever is added to both; with that they estimate L(w) (SVRG's control
        variate, for losses), so that the mean of all four is a loss to report.  At an anchor's step w = A.
        Raises ValueError where processes share a step, and unless the anchor's step was taken, or told to `remember`.
        """
        if getattr(loss_fn, "agreed", None) is not None:
            raise ValueError("SVRG's steps are not shared between processes, which have other batches: start one")
        change = super().losses(weights, loss_fn, key, range(1)).double()
        if self.is_anchor(key.step):
            self.remember(weights, key, change)
            change = torch.zeros_like(change)
        elif self.anchor.key != (key.seed, self.anchor_key(key).step):
            raise ValueError(f"step {key.step} needs the anchor of step {self.anchor_key(key).step}, the one that is "
                             f"kept has (seed, step) {self.anchor.key}: remember that first")  # fmt: skip
        else:
            change = change - super().losses(self.anchor.weights, loss_fn, key, range(1)).double()
        full = self.anchor.losses.to(change.device)
        return torch.cat((change + full.mean(), full))

    def remember(self, weights: dict[str, Store], key: Key, losses: Tensor) -> None:
        """Keep the anchor, at an anchor's step; of others nothing.  losses [2] float64: plus[1] and minus[1] of Step.

        Whatever redoes a run calls this before each update, if more steps, or losses computed again, are to follow.
        """
        if self.is_anchor(key.step):
            self.anchor.weights = {}  # the last anchor's go first, or there would be three of each
            self.anchor.weights = deepcopy(weights) if self.every > 1 else {}
            self.anchor.key, self.anchor.losses = (key.seed, key.step), losses

    def anchor_key(self, key: Key) -> Key:
        """z_full's, with which its anchor's step probed."""
        return key._replace(step=key.step - key.step % self.every, query=0)

    def direction(self, key: Key, shape: tuple[int, int], rows: Tensor, rounding: Purpose) -> Tensor:
        return super().direction(self.anchor_key(key) if key.query else key, shape, rows, rounding)

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        """w <- w - lr2 ((g_w - g_A) z + g_full z_full), or w - lr1 g_full z_full.

        factors [2]: -lr2 / 2 times projected_grads, since `update` takes the mean of queries, and this is their sum.
        """
        factors = factors[1:] * self.anchor_rate if self.is_anchor(key.step) else factors
        return super().add_directions_(weights, factors * 2, key)


def svrg(zo: ZO, every: int = 2, anchor_rate: float = 1000.0) -> SVRG:
    """The same dense estimator of one query with variance reduction, its anchor yet to come.

    Raises ValueError for SparseZO and every other kind of estimator, and for more queries.
    """
    if type(zo) is not ZO or zo.queries != 1:
        raise ValueError(f"SVRG is for dense directions of one query, ZO(queries=1), got {zo}")
    return as_kind(SVRG, zo, queries=2, every=every, anchor_rate=anchor_rate)
