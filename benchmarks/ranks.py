"""A step on one GPU and on several: the same global batch, random weights of a true shape.

    python -m benchmarks.ranks                                # one GPU
    torchrun --nproc-per-node 2 -m benchmarks.ranks           # two
    torchrun --nproc-per-node 2 -m benchmarks.ranks --model tiny --device cpu --batch-size 4 --repeats 2

Ranks share the examples as train.py's do (runtime/ranks.py).  `ms` is the median step of the first rank, from one
return to the next; the ranks must end with the same weights.  Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from benchmarks.memory import build, examples
from benchmarks.speed import WARM_UP
from data.scoring import BatchLoss
from random_bits import Key
from runtime.checkpoints import weights_sha256
from runtime.config import parse
from runtime.hub import raw_config
from runtime.problem import Problem
from runtime.ranks import Ranks, is_first, joined
from train import estimator, installed
from zo_optim import zo_step

LR = 1e-6


def step_times(problem: Problem, flags: list[str], tokens: int, repeats: int, ranks: Ranks) -> list[float]:
    """Milliseconds of each step, after some that warm up."""
    c, lm = parse(flags), problem.lm
    batch = examples(c, tokens, lm.config.vocab_size)
    zo, clock, ready = installed(estimator(c, lm), c, lm, c.graphs), [], []

    def loss_of(rows: list) -> BatchLoss:
        return BatchLoss.of(lm, rows, problem.pad, c.micro_batch_size, problem.multiple)

    shared = ranks.loss_of(loss_of, problem.terms)
    for at in range(WARM_UP + repeats):
        loss_fn = ready.pop() if ready else shared(batch, c.queries)
        loss_fn.meanwhile = lambda: ready.append(shared(batch, c.queries))  # as in train.py
        zo_step(lm.weights, loss_fn, Key(c.seed, at), zo, LR)
        clock.append(time.perf_counter())
    clock = clock[WARM_UP - 1 :]
    return [1e3 * (after - before) for before, after in zip(clock, clock[1:], strict=False)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="a preset or a directory: only its sizes are used")
    parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--flags", nargs="+", default=["--weights int4", "--weights fp8 --activations fp8"])
    args = parser.parse_args(argv)
    rows = []
    with joined("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu") as ranks:
        for flags in args.flags:
            given = f"--model {args.model} --batch-size {args.batch_size} --lr {LR} --device {args.device} {flags}"
            problem = build(parse(given.split()), raw_config(args.model))
            ms = step_times(problem, given.split(), args.tokens, args.repeats, ranks)
            if ranks.world > 1:
                ranks.check_same("their weights", weights_sha256(problem.lm.weights))
            rows.append({"flags": flags, "ranks": ranks.world, "sequences": args.batch_size, "tokens": args.tokens,
                         "ms": statistics.median(ms), "fastest_ms": min(ms), "slowest_ms": max(ms)})  # fmt: skip
            if is_first():
                print("{flags}: {ranks} ranks, {sequences} x {tokens}: {ms:.1f} ms "
                      "({fastest_ms:.1f} to {slowest_ms:.1f})".format(**rows[-1]), flush=True)  # fmt: skip
            del problem
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if is_first():
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        print(json.dumps({"gpu": gpu, "torch": torch.__version__, "model": args.model, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
