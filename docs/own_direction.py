"""Directions of your own in one function: `python docs/own_direction.py`, seconds on a CPU.

Every weight moves by +eps or -eps (Rademacher).  `direction` is all that an estimator needs: probes, steps, rounding
onto codes and replays go by it.  What is made smaller has no gradient: 1 less the accuracy.
"""

import sys

import torch

sys.path.insert(0, f"{sys.path[0]}/..")  # the repository is used in place
from quant import StoredWeights, encode  # noqa: E402
from random_bits import Key, Purpose, bits16  # noqa: E402
from zo_optim import ZO, zo_step  # noqa: E402


class Rademacher(ZO):
    def direction(self, key, shape, rows, rounding):  # chosen rows [r] of a tensor (R, C) -> [r, C] float32
        return (bits16(key, Purpose.DIRECTION, rows, shape[1]) & 1).float() * 2 - 1  # the same for all who ask


torch.manual_seed(0)
x, teacher = torch.randn(2000, 16), torch.randn(4, 16)
y, weights = (x @ teacher.T).argmax(1), {"w": encode(torch.randn(4, 16) / 4, "int8")}


def mistakes(view, at):  # [P]: the share of wrong answers of each perturbed copy in the view
    return ((x[at] @ view.read("w").mT).argmax(-1) != y[at]).float().mean(-1)


for steps in (0, 1000):
    for step in range(steps):
        zo_step(weights, lambda view: mistakes(view, slice(0, 1000)), Key(0, step), Rademacher(eps=0.1), lr=0.02)
    unseen = mistakes(StoredWeights(weights, torch.float32), slice(1000, 2000)).item()
    print(f"int8 after {steps} steps: {100 - 100 * unseen:.1f} % right (unseen)")
