"""How much of a model's error is one constant: that it prefers an option whatever the text says.

    python -m benchmarks.offset --model DIR --data-dir DIR
    python -m benchmarks.offset --model runs/.../model --weights int8 --data-dir DIR

On SST-2, k = 512: accuracy and loss as they are; accuracy on test after the constant that does best on dev has been
taken away from the difference of the two options' scores; and the share of pairs, one sentence of either label, that
the difference has in the right order (AUC), which no constant changes.  A model that is moved at random may gain
accuracy where it had a large constant; its AUC is not expected to rise.  Last line JSON.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor

from data.scoring import Encoded
from runtime.config import parse
from runtime.problem import Problem, prepare


def differences(problem: Problem, split: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Score of the second option less that of the first, and labels: [N] float32 and [N] int64."""
    first, second = torch.tensor([answer.scores for answer in problem.answers(split)]).unbind(1)
    return second - first, torch.tensor([encoded.label for encoded in split])


def accuracy(difference: Tensor, labels: Tensor, constant: float = 0.0) -> float:
    return ((difference > constant).long() == labels).double().mean().item()


def best_constant(difference: Tensor, labels: Tensor) -> float:
    """The one that parts the labels best, in the middle between two neighbours."""
    ordered = difference.sort().values
    between = torch.cat((ordered[:1] - 1, (ordered[1:] + ordered[:-1]) / 2, ordered[-1:] + 1))
    return max(between.tolist(), key=lambda constant: accuracy(difference, labels, constant))


def auc(difference: Tensor, labels: Tensor) -> float:
    """Share of pairs in the right order, ties half: 0.5 is chance, 1 is perfect."""
    gaps = difference[labels == 1][:, None] - difference[labels == 0]
    return ((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean().item()


def loss(difference: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy of the right option."""
    return F.binary_cross_entropy_with_logits(difference, labels.float()).item()


def opinion(problem: Problem) -> dict[str, float]:
    """The figures that are printed, by name."""
    test, constant = differences(problem, problem.tests["test"]), best_constant(*differences(problem, problem.dev))
    return {"test": accuracy(*test), "test_loss": loss(*test), "constant": constant,
            "test_without_constant": accuracy(*test, constant), "auc": auc(*test)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--weights", default="fp32")
    args = parser.parse_args()
    flags = f"--method quzo --task sst2 --k 512 --data-seed 42 --compute fp32 --no-compile --weights {args.weights}"
    row = opinion(prepare(parse([*flags.split(), "--model", args.model, "--data-dir", args.data_dir]))[0])
    for name, value in row.items():
        print(f"{name:24}{value:8.3f}")
    print(json.dumps({"model": args.model, "weights": args.weights} | row))


if __name__ == "__main__":
    main()
