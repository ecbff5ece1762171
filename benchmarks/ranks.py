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
import sys
from functools import partial

import torch

from benchmarks.memory import build, examples, step_function
from benchmarks.speed import LR, timed
from runtime.checkpoints import weights_sha256
from runtime.config import parse
from runtime.hub import raw_config
from runtime.ranks import is_first, joined


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
            c, raw = parse(given.split()), raw_config(args.model)
            problem, batch = build(c, raw), examples(c, args.tokens, raw["vocab_size"])
            take_step = partial(step_function(c, problem, ranks), examples=batch, lr=LR)
            row = timed(take_step, args.repeats, c.device)
            if ranks.world > 1:
                ranks.check_same("their weights", weights_sha256(problem.lm.weights))
            row |= {"flags": flags, "ranks": ranks.world, "sequences": args.batch_size, "tokens": args.tokens}
            rows.append(row)
            if is_first():
                print("{flags}: {ranks} ranks, {sequences} x {tokens}: {ms:.1f} ms "
                      "({fastest_ms:.1f} to {slowest_ms:.1f})".format(**row), flush=True)  # fmt: skip
            del problem, take_step
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if is_first():
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        print(json.dumps({"gpu": gpu, "torch": torch.__version__, "model": args.model, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
