"""What a recorded step is given.  Recording needs a GPU (tests/test_gpu.py); here the function stands in for it."""

from types import SimpleNamespace

import pytest
import torch

from gpu import graphs
from gpu.graphs import CudaGraphed


@pytest.fixture
def graphed(monkeypatch):
    """A CudaGraphed whose graphs run the function again, on the static inputs that they were recorded with.  As CUDA
    does, it records into no pool whose graphs are all gone."""
    monkeypatch.setattr(CudaGraphed, "new_pool", staticmethod(object))
    used = set()

    def record(self, function, inputs):
        assert self.pool not in used or self.graphs
        used.add(self.pool)
        static_inputs = [None if x is None else torch.zeros_like(x) for x in inputs]
        result = function(self.step, static_inputs)

        def replay():
            result.copy_(function(self.step, static_inputs))

        return SimpleNamespace(replay=replay), static_inputs, result

    monkeypatch.setattr(CudaGraphed, "record", record)
    return CudaGraphed("cpu")


def joined(step, inputs):
    return torch.cat([step, *(x.flatten() for x in inputs if x is not None)])


def test_every_call_sees_its_own_step_inputs_and_function(graphed):
    for step in range(9):
        shape, times = (2 + step % 2,), 1 + step // 5
        inputs = [torch.full(shape, 10 + step), None]
        got = graphed(times, lambda step, inputs, times=times: joined(step, inputs) * times, step, inputs)
        assert got.tolist() == [step * times] + [(10 + step) * times] * shape[0]
        assert inputs[0].tolist() == [10 + step] * shape[0]  # a caller's tensors are not written into
    assert len(graphed.graphs) == 4  # of two lengths, each with two keys


def test_the_first_call_of_a_kind_is_not_recorded(graphed):
    for step, inputs, recorded in ((3, [torch.ones(2)], 0), (4, [torch.ones(2)], 1), (5, [None], 1)):
        graphed("key", joined, step, inputs)
        assert len(graphed.graphs) == recorded and graphed.step.item() == step


def test_a_warm_up_has_tensors_of_its_own(graphed):
    """As what is recorded has.  torch.compile takes a view for another kind of input, and would compile once more while
    recording, which fails."""
    seen, (rows, positions) = [], torch.arange(6).view(2, 3)

    def function(step, inputs):
        seen.extend(inputs)
        return inputs[0].sum()[None]

    assert graphed("key", function, 0, [rows, positions, None]).item() == 3
    assert rows._is_view() and not any(x._is_view() for x in seen[:2]) and seen[2] is None


def test_graphs_are_bounded(graphed, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    for step in range(40):
        length = 1 + step % 5
        assert graphed("key", joined, step, [torch.ones(length)]).tolist() == [step] + [1] * length
        assert len(graphed.graphs) <= 3
