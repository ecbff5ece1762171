"""Several processes of one run, under torchrun: they share the examples of each step, and exchange numbers alone.

Every rank holds all weights and draws all directions.  A step's losses are summed on rank 0 and sent back from there,
so that all ranks take the same step, to the bit; rank 0 alone writes and tells.  The record says nothing of ranks, so
a run can be taken up again by any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Ranks:
    rank: int = 0
    world: int = 1
    asked_to_stop: Callable[[], bool] = bool  # whether this process was
    stopping: bool = False  # whether any was, at the last step: so all of them stop after the same one

    def loss_of(self, loss_of: Callable, terms_of: Callable[[list], int]) -> Callable:
        """loss_of for this rank's share of the examples; terms_of: of how many terms a mean loss over examples is."""
        return loss_of if self.world == 1 else partial(self._share, loss_of, terms_of)

    def _share(self, loss_of: Callable, terms_of: Callable[[list], int], examples: list) -> Callable:
        mine = examples[self.rank :: self.world]
        loss_fn = loss_of(mine or examples[:1])  # what it says without any counts as nothing
        loss_fn.agreed = partial(self._agreed, terms=terms_of(mine))
        return loss_fn

    def _agreed(self, losses: Tensor, terms: int) -> Tensor:
        """Each rank's mean losses [2Q] over so many terms -> the mean over all of them, float64."""
        sums = torch.cat((losses.double() * terms, torch.tensor([terms, self.asked_to_stop()], dtype=torch.float64)))
        if not terms:
            sums[:-1] = 0.0  # also where that loss is not finite
        dist.reduce(sums, 0)
        dist.broadcast(sums, 0)
        self.stopping = bool(sums[-1])
        return sums[:-2] / sums[-2]

    def first(self, value):
        """Rank 0's."""
        if self.world == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]

    def check_same(self, what: str, value: str) -> None:
        """Raises ValueError where ranks differ."""
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
            if len(set(values)) > 1:
                raise ValueError(f"the ranks differ in {what}: {', '.join(map(str, values))}")


def is_first() -> bool:
    """Whether this process writes and tells."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")  # losses are on the CPU by then
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
