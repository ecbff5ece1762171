"""Peak GPU memory of training steps at a true shape with random weights, against what --dry-run predicts.

    python -m benchmarks.memory --model llama2-7b --batch-size 16 --tokens 64

Every case runs three whole steps (losses, update; for first order forward, backward, AdamW) in a process of its own and
reports the allocator's peak over them; and, an evaluation later, the most that it has held in reserve, which the card
must have beside what CUDA itself takes.  Ratios are to the first case, the leanest first-order run with fp32 masters.
Last line JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from collections.abc import Callable

import torch

from data.scoring import Encoded, evaluate
from data.tasks import TASKS
from model import create
from random_bits import Key
from runtime.config import Config, parse
from runtime.dry_run import predict
from runtime.first_order import adamw_step, make_trainable, optimizer
from runtime.hub import raw_config
from runtime.problem import DTYPES, Problem, set_up_forwards
from runtime.ranks import Ranks
from tensor_train import trained
from train import estimator, installed, losses_of, reserved_memory
from zo_optim import Step, zo_step

CASES = {  # name: flags
    "fo-ste int8, fp32 masters": "--method fo-ste --weights int8 --master fp32",
    "fo-ste int8, bf16 masters": "--method fo-ste --weights int8 --master bf16",
    "fo-ste int4, bf16 masters": "--method fo-ste --weights int4 --master bf16",
    "fo, bf16": "--method fo --weights bf16",
    "MeZO, bf16": "--method mezo --weights bf16",
    "QuZO, fp8": "--method quzo --weights fp8",
    "QuZO, int8": "--method quzo --weights int8",
    "QuZO, int4": "--method quzo --weights int4",
    "QuZO, int4 + 4 bits": "--method quzo --weights int4 --residual 4",
}


def build(c: Config, raw: dict) -> Problem:
    """A problem without files: random weights."""
    fo = c.optimizer == "adamw"
    weights = (c.master or c.weights) if fo else c.weights
    lm = create(raw, device=c.device, dtype=DTYPES[c.compute], weights=weights, residual=c.residual)
    if fo:
        lm.format = c.weights
        lm.weights = make_trainable(lm.weights, c.weights if c.method == "fo-ste" else None, DTYPES[weights])
    set_up_forwards(c, lm)
    return Problem(lm, TASKS["sst2"], None, [], [], {}, 0, c.batch_size)


SST2 = (  # LLaMA's tokens of the first 128 prompts that a run of 1,000 examples draws from the official file, seed 0
    5, 44, 6, 23, 16, 24, 9, 11, 11, 15, 5, 7, 7, 27, 9, 21, 13, 42, 5, 17, 9, 9, 23, 16, 5, 35, 5, 10, 8, 21, 10,
    6, 18, 6, 22, 10, 23, 10, 9, 19, 7, 43, 10, 18, 5, 29, 9, 21, 14, 17, 5, 15, 23, 21, 25, 9, 21, 13, 31, 30, 25,
    13, 13, 13, 9, 5, 5, 7, 12, 25, 8, 7, 12, 8, 21, 5, 10, 24, 25, 44, 5, 60, 5, 16, 4, 6, 5, 6, 9, 6, 11, 26, 6,
    28, 13, 12, 9, 42, 23, 23, 29, 7, 60, 14, 5, 8, 7, 19, 12, 49, 22, 6, 7, 6, 7, 52, 9, 16, 13, 13, 57, 10, 5, 6,
    23, 4, 29, 9,
)  # fmt: skip


def examples(c: Config, tokens: int, vocabulary: int) -> list[Encoded]:
    """Random words, so many a text, or for 0 as many as SST-2's prompts have."""
    lengths, g = [tokens or SST2[i % len(SST2)] for i in range(c.batch_size)], torch.Generator().manual_seed(0)
    rows = [torch.randint(0, vocabulary, (length,), generator=g).tolist() for length in lengths]
    return [Encoded([row], [[5], [6]], len(row) - 1, i % 2) for i, row in enumerate(rows)]


def step_function(
    c: Config, problem: Problem, ranks: Ranks | None = None
) -> Callable[[int, list[Encoded], float], Step | float]:
    """One step of train.py's loop, of a fixed number of queries: (number, examples, learning rate) -> what it found.

    It is given the same examples each time, so that those of the next step are known.
    """
    lm, weights, zo = problem.lm, trained(problem.lm), None
    if c.optimizer == "adamw":
        adamw = optimizer(weights, c.lr, c.weight_decay or 0.0)
    else:
        zo = installed(estimator(c, lm), c, lm, c.graphs)
    loss_of, ready = losses_of(c, problem, zo, ranks or Ranks()), []

    def step(at: int, examples: list[Encoded], lr: float) -> Step | float:
        loss_fn = ready.pop() if ready else loss_of(examples, c.queries)
        if zo is None:
            return adamw_step(adamw, loss_fn.parts(lm.stored_view()), lr)
        loss_fn.meanwhile = lambda: ready.append(loss_of(examples, c.queries))  # as train.py
        return zo_step(weights, loss_fn, Key(c.seed, at), zo, lr)

    return step


def measure(flags: str, model: str, batch_size: int, tokens: int) -> dict:
    c = parse(f"{flags} --model {model} --batch-size {batch_size} --compute bf16 --device cuda --lr 1e-6".split())
    raw = raw_config(model)
    problem = build(c, raw)
    batch = examples(c, tokens, raw["vocab_size"])
    take_step = step_function(c, problem)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for step in range(3):  # the second one records launches
        started = time.perf_counter()
        take_step(step, batch, 1e-6)
        torch.cuda.synchronize()
    seconds, peak, predicted = time.perf_counter() - started, torch.cuda.max_memory_allocated(), predict(c, raw, tokens)
    evaluate(problem.lm, 2 * batch, problem.pad, 2 * c.batch_size)
    return {
        "peak_bytes": peak, "step_seconds": round(seconds, 4), "predicted_bytes": predicted["expected_peak_bytes"],
        "reserved_bytes": reserved_memory(c.device),
        "predicted_reserved_bytes": predicted["expected_reserved_bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="a preset or a directory: only its sizes are used")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    results = {}
    print(f"{'':28}{'peak GiB':>10}{'predicted':>11}{'off by':>8}{'ratio':>8}"
          f"{'reserved':>10}{'predicted':>11}{'step s':>9}")  # fmt: skip
    for name, flags in CASES.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory of one case must not shape another's
            row = pool.apply(measure, (flags, args.model, args.batch_size, args.tokens))
        results[name] = row
        first = next(iter(results.values()))["peak_bytes"]
        print(
            f"{name:28}{row['peak_bytes'] / 2**30:10.2f}{row['predicted_bytes'] / 2**30:11.2f}"
            f"{row['predicted_bytes'] / row['peak_bytes'] - 1:8.1%}{first / row['peak_bytes']:8.1f}"
            f"{row['reserved_bytes'] / 2**30:10.2f}{row['predicted_reserved_bytes'] / 2**30:11.2f}"
            f"{row['step_seconds']:9.3f}", flush=True,
        )  # fmt: skip
    print(json.dumps({"model": args.model, "gpu": torch.cuda.get_device_name(), "cases": results}))


if __name__ == "__main__":
    main()
