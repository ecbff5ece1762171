"""Steps as CUDA graphs: the host then launches one thing instead of thousands, and the GPU never waits for it.

A forward of 32 layers is some 700 kernels, and Python takes 10 to 40 us to launch each of them.  A graph is that list
of launches, recorded once: the same kernels at the same addresses, so the same bits.  What changes from step to step
has to be in memory: the batch, a step's number (it keys every draw) and its factors.

What a graph works in is its own: memory that nothing else can use between two replays.  So beside the allocator's peak
a run holds it in reserve, once for all graphs of a function.  Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MOST = 64  # graphs kept: each holds its launches in the host's and the driver's memory


class Replayed:
    """`function(step, inputs, *constants)` -> Tensor, recorded for each set of input shapes and constants.

    function: launches kernels and never waits for one.  step is [1] int32; inputs are tensors on one GPU, or None.
    The next call overwrites the result.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device):
        self.function, self.device = function, device
        self.met: set[Hashable] = set()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}
        self.step, self.pool = torch.zeros(1, dtype=torch.int32, device=device), self.new_pool()

    def __call__(self, step: int, inputs: list[Tensor | None], *constants: Hashable) -> Tensor:
        self.step.fill_(step)
        which = (*constants, *(None if x is None else x.shape for x in inputs))
        if which not in self.met:  # the first time compiles kernels, which cannot be recorded
            self.met.add(which)
            return self.function(self.step, copies(inputs), *constants)
        if which not in self.graphs:
            if len(self.graphs) == MOST:
                self.graphs.clear()
            self.graphs[which] = self.record(inputs, *constants)
        graph, places, result = self.graphs[which]
        for place, new in zip(places, inputs, strict=True):
            if place is not None:
                place.copy_(new)
        graph.replay()
        return result

    def record(self, inputs: list[Tensor | None], *constants: Hashable) -> tuple:
        """All graphs share their memory: only one runs at a time, and its result is read before the next one does."""
        places = copies(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):  # waits for all else at first
            result = self.function(self.step, places, *constants)
        return graph, places, result

    @staticmethod
    def new_pool() -> object:
        return torch.cuda.graph_pool_handle()


def copies(inputs: list[Tensor | None]) -> list[Tensor | None]:
    """What a function is compiled with has to be like what it is recorded with: torch.compile takes a view for another
    kind of input than a tensor with memory of its own, and would compile once more, which cannot be recorded."""
    return [None if x is None else x.clone() for x in inputs]
