"""Steps as CUDA graphs: the host then launches one thing instead of thousands, and the GPU never waits for it.

A forward of 32 layers is some 700 kernels, and Python takes 10 to 40 us to launch each of them.  A graph is that list
of launches, recorded once: the same kernels at the same addresses, so the same bits.  Everything that changes from
step to step has to be in memory, in static buffers: the batch, a step's number (it keys every draw) and its factors.

A graph's working memory is its own: nothing else can use it between two replays.  So beside the allocator's peak a run
holds it in reserve, once for all graphs of a run.  kernels.GraphedZO records a step so.  Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MAX_GRAPHS = 64  # kept at a time: each holds its launches in the host's and the driver's memory


class CudaGraphed:
    """Runs functions of (step, inputs) by replaying their launches, recorded for each key and set of input shapes.

    A function launches kernels and never waits for one; equal keys stand for equal functions.  The next call
    overwrites the result.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self.warmed_up: set[Hashable] = set()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}
        self.step, self.pool = torch.zeros(1, dtype=torch.int32, device=self.device), self.new_pool()

    def __call__(
        self, key: Hashable, function: Callable[[Tensor, list[Tensor | None]], Tensor], step: int,
        inputs: list[Tensor | None],
    ) -> Tensor:  # fmt: skip
        """step: an int, given to the function as [1] int32 in memory.  inputs: tensors on the GPU, or None."""
        self.step.fill_(step)
        key = (key, *(None if x is None else x.shape for x in inputs))
        if key not in self.warmed_up:  # the first time compiles kernels, which cannot be recorded
            self.warmed_up.add(key)
            return function(self.step, copies(inputs))
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                del self.graphs[next(iter(self.graphs))]  # the one that was not used for longest
            self.graphs[key] = self.record(function, inputs)
        graph, static_inputs, result = self.graphs[key] = self.graphs.pop(key)  # to the end
        for static, new in zip(static_inputs, inputs, strict=True):
            if static is not None:
                static.copy_(new)
        graph.replay()
        return result

    def record(self, function: Callable, inputs: list[Tensor | None]) -> tuple:
        """All graphs share their memory: only one runs at a time, and its result is read before the next one does."""
        static_inputs = copies(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):  # waits for all else at first
            result = function(self.step, static_inputs)
        return graph, static_inputs, result

    @staticmethod
    def new_pool() -> object:
        return torch.cuda.graph_pool_handle()


def copies(inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Tensors with memory of their own, for warming up as for recording: torch.compile takes a view for another kind
    of input, and would compile once more, which cannot be recorded."""
    return [None if x is None else x.clone() for x in inputs]
