"""benchmarks/offset.py: what a constant between two options takes away, and what it cannot."""

import pytest
import torch

from benchmarks.offset import accuracy, auc, best_constant, differences
from config import parse
from train import prepare

LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("shift", [-3.0, 0.0, 2.5])
def test_a_constant_is_found_and_leaves_the_order_as_it_is(shift):
    """By hand: one of nine pairs is in the wrong order, and any constant has one of six examples wrong."""
    x = torch.tensor([-1.0, 2.0, 0.5, 0.25, 3.0, -2.0]) + shift
    assert accuracy(x, LABELS, best_constant(x, LABELS)) == pytest.approx(5 / 6)
    assert auc(x, LABELS) == pytest.approx(8 / 9)


def test_ties_are_half_right():
    assert auc(torch.zeros(6), LABELS) == 0.5
    assert auc(torch.tensor([0.0, 0.0, -1.0, 1.0]), torch.tensor([0, 1, 0, 1])) == pytest.approx(3.5 / 4)


def test_differences_are_the_models_opinion():
    problem, _ = prepare(parse([]))
    assert accuracy(*differences(problem, problem.test)) == problem.quality(problem.test).accuracy
