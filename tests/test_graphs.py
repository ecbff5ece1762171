"""What a recorded step is given.  Recording needs a GPU (tests/test_gpu.py); here the function stands in for it."""

import pytest
import torch

import graphs
from graphs import Replayed


@pytest.fixture
def replayed(monkeypatch):
    """One whose graphs run the function again, on the places that they were recorded with."""
    monkeypatch.setattr(Replayed, "new_pool", staticmethod(lambda: None))
    calls = []

    def function(step, inputs, times):
        calls.append((step.item(), [None if x is None else x.tolist() for x in inputs], times))
        return torch.cat([step, *(x.flatten() for x in inputs if x is not None)]) * times

    def record(self, inputs, *constants):
        places = [None if x is None else torch.zeros_like(x) for x in inputs]
        result = self.function(self.step, places, *constants)

        class Graph:
            def replay(graph):
                result.copy_(self.function(self.step, places, *constants))

        return Graph(), places, result

    monkeypatch.setattr(Replayed, "record", record)
    replayed = Replayed(function, torch.device("cpu"))
    replayed.calls = calls
    return replayed


def test_every_call_sees_its_own_step_inputs_and_constants(replayed):
    for step in range(9):
        shape, times = (2 + step % 2,), 1 + step // 5
        inputs = [torch.full(shape, 10 + step), None]
        assert replayed(step, inputs, times).tolist() == [step * times] + [(10 + step) * times] * shape[0]
        assert inputs[0].tolist() == [10 + step] * shape[0]  # a caller's tensors are not written into
    assert len(replayed.graphs) == 4  # of two lengths, each with two constants


def test_the_first_call_of_a_kind_is_not_recorded(replayed):
    replayed(3, [torch.ones(2)], 1)
    assert not replayed.graphs and len(replayed.calls) == 1
    replayed(4, [torch.ones(2)], 1)
    assert len(replayed.graphs) == 1
    replayed(5, [None], 1)
    assert len(replayed.graphs) == 1


def test_what_is_met_first_is_a_tensor_of_its_own(monkeypatch):
    """As what is recorded is.  torch.compile takes a view for another kind of input, and would compile once more while
    recording, which fails."""
    monkeypatch.setattr(Replayed, "new_pool", staticmethod(lambda: None))
    met, both = [], torch.arange(6).view(2, 3)

    def function(step, inputs):
        met.extend(inputs)
        return inputs[0].sum()[None]

    rows, positions = both
    assert Replayed(function, torch.device("cpu"))(0, [rows, positions, None]).item() == 3
    assert rows._is_view() and not any(x._is_view() for x in met[:2]) and met[2] is None


def test_graphs_are_bounded(replayed, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 3)
    for step in range(40):
        length = 1 + step % 5
        assert replayed(step, [torch.ones(length)], 1).tolist() == [step] + [1] * length
        assert len(replayed.graphs) <= 3
