"""Steps as CUDA graphs: the host then launches one thing instead of thousands, and the GPU never waits for it.

A forward of 32 layers is some 700 kernels, and Python takes 10 to 40 us to launch each of them.  A graph is that list
of launches, recorded once: the same kernels at the same addresses, so the same bits.  What changes from step to step
has to be in memory: the batch, a step's number (it keys every draw) and its factors.  Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Replayed:
    """`function(step, inputs, *constants)` -> Tensor, recorded for each set of input shapes and constants.

    function: launches kernels and never waits for one.  step is an int, or while a graph is recorded [1] int32; what
    hangs on it has to take both.  inputs are tensors on one GPU, or None.  The result is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device):
        self.function, self.device = function, device
        self.met: set[Hashable] = set()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}
        self.step, self.pool = torch.zeros(1, dtype=torch.int32, device=device), torch.cuda.graph_pool_handle()

    def __call__(self, step: int, inputs: list[Tensor | None], *constants: Hashable) -> Tensor:
        which = (*constants, *(None if x is None else x.shape for x in inputs))
        if which not in self.met:  # the first time compiles kernels, which cannot be recorded
            self.met.add(which)
            return self.function(step, inputs, *constants)
        if which not in self.graphs:
            self.graphs[which] = self._record(inputs, *constants)
        graph, places, result = self.graphs[which]
        for place, new in zip(places, inputs, strict=True):
            if place is not None:
                place.copy_(new)
        self.step.fill_(step)
        graph.replay()
        return result

    def _record(self, inputs: list[Tensor | None], *constants: Hashable) -> tuple:
        """All graphs share their memory: only one runs at a time, and its result is read before the next one does."""
        places = [None if x is None else x.clone() for x in inputs]
        torch.cuda.empty_cache()  # the first call's memory, which recorded ones do not share
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
            result = self.function(self.step, places, *constants)
        return graph, places, result
