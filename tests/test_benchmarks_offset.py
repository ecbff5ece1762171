"""benchmarks/offset.py: what a constant between two options takes away, and what it cannot."""

import pytest
import torch

from benchmarks.offset import accuracy, auc, best_constant, differences, loss, opinion
from runtime.config import parse
from runtime.problem import prepare

LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("shift", [-3.0, 0.0, 2.5])
def test_a_constant_is_found_and_leaves_the_order_as_it_is(shift):
    """By hand: one of nine pairs is in the wrong order, and any constant has one of six examples wrong."""
    x = torch.tensor([-1.0, 2.0, 0.5, 0.25, 3.0, -2.0]) + shift
    assert accuracy(x, LABELS, best_constant(x, LABELS)) == pytest.approx(5 / 6)
    assert auc(x, LABELS) == pytest.approx(8 / 9)


@pytest.mark.parametrize("label", [0, 1])
def test_the_best_constant_may_lie_beyond_all_differences(label):
    x, labels = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([label] * 3)
    assert accuracy(x, labels, best_constant(x, labels)) == 1


def test_ties_are_half_right():
    assert auc(torch.zeros(6), LABELS) == 0.5
    assert auc(torch.tensor([0.0, 0.0, -1.0, 1.0]), torch.tensor([0, 1, 0, 1])) == pytest.approx(3.5 / 4)


def test_the_embedded_models_opinion():
    """Oracle: the loop's evaluation.  Each example's part in the loss says which option is which, and whose label."""
    problem, _ = prepare(parse([]))
    dev, test = differences(problem, problem.dev), differences(problem, problem.tests["test"])
    got, quality = opinion(problem), problem.quality(problem.tests["test"])
    assert got["test"] == quality.metric and got["test_loss"] == pytest.approx(quality.loss, rel=1e-6)
    assert loss(test[0], test[1].flip(0)) != pytest.approx(quality.loss, rel=1e-3)
    assert got["constant"] == best_constant(*dev) and got["auc"] == auc(*test)
    assert got["test_without_constant"] == accuracy(test[0] - got["constant"], test[1]) != got["test"]
