"""Several processes of one run, under torchrun: they share the work of each step, and exchange numbers alone.

Every rank holds all weights.  Of a step it takes some of the queries, where their number divides so, for a direction
is then probed by one rank alone; else some of the examples.  Losses are summed on rank 0 and sent back from there, so
that all ranks take the same step, to the bit; rank 0 alone writes and tells.  The record says nothing of ranks, so a
run can be taken up again by any number of them.
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
        """(examples, Q) -> loss_of for this rank's share of them; terms_of: of how many terms their mean loss is."""
        if self.world == 1:
            return lambda examples, queries: loss_of(examples)
        return partial(self._share, loss_of, terms_of)

    def _share(self, loss_of: Callable, terms_of: Callable[[list], int], examples: list, queries: int) -> Callable:
        whole = queries % self.world == 0
        mine = examples if whole else examples[self.rank :: self.world]
        loss_fn = loss_of(mine or examples[:1])  # what it says without any counts as nothing
        loss_fn.queries = range(self.rank, queries, self.world) if whole else range(queries)
        loss_fn.agreed = partial(self._agreed, terms=terms_of(mine), own=loss_fn.queries, queries=queries)
        return loss_fn

    def _agreed(self, losses: Tensor, terms: int, own: range, queries: int) -> Tensor:
        """Mean losses of this rank's queries, [2 * len(own)], over so many terms -> those of all, [2Q] float64."""
        sums, counts = torch.zeros(2, queries, 2, dtype=torch.float64)
        if terms:  # else the loss may not be finite
            sums[own], counts[own] = losses.double().view(-1, 2) * terms, float(terms)
        sent = torch.cat((sums.flatten(), counts.flatten(), torch.tensor([self.asked_to_stop()], dtype=torch.float64)))
        dist.reduce(sent, 0)
        dist.broadcast(sent, 0)
        self.stopping = bool(sent[-1])
        sums, counts = sent[:-1].chunk(2)
        return sums / counts

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
