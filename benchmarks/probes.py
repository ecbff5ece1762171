"""AdaZeta's step with all probes in one forward, beside one forward a probe: time, ratio, agreement of the slopes.

    python -m benchmarks.probes --model DIR --queries 8 --batch-size 16 --tokens 64

Real weights from a directory, random ones in the shape of a preset.  The ways take turns in one process, with the same
seeds; medians of repeats.  Last line JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch

import tensor_train
from benchmarks.memory import build, examples
from config import Config, parse, spec_of
from data.hub import raw_config
from train import Problem, Step, load_base, peak_memory, zeroth_order

LR = 1e-30  # a whole step, and yet every way meets the same weights


def problem_of(c: Config, raw: dict) -> Problem:
    directory = Path(c.model)
    if directory.is_dir():
        return Problem(load_base(c, directory), [], [], [], 0, c.batch_size)
    problem = build(c, raw)
    tensor_train.attach(problem.lm, spec_of(c, raw["model_type"]), c.seed)
    return problem


def timed(take_step, at: int, batch: list, device: str) -> tuple[float, Step]:
    started = time.perf_counter()
    step = take_step(at, batch, LR)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="a directory, or a preset: only its sizes are used")
    parser.add_argument("--weights", default="fp32")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--at-once", type=int, nargs="+", help="probes a forward, the slowest way last (2 Q, 2, 1)")
    parser.add_argument("--repeats", type=int, default=5)
    for flag in "--compile", "--graphs":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=True, help="as train.py's")
    args = parser.parse_args()
    ways = args.at_once or [2 * args.queries, 2, 1]
    flags = f"--method adazeta --queries {args.queries} --weights {args.weights} --batch-size {args.batch_size}"
    without = [f"--no-{name}" for name in ("compile", "graphs") if not getattr(args, name)]
    c, raw = parse(["--model", args.model, *flags.split(), *without]), raw_config(args.model)
    problem = problem_of(c, raw)
    batch = examples(c, args.tokens, raw["vocab_size"])
    steps = {way: zeroth_order(dataclasses.replace(c, probes_per_forward=way), problem) for way in ways}
    times, slopes = {way: [] for way in ways}, {}
    for repeat in range(args.repeats + 2):  # the first of each compiles kernels, the second records launches
        for way, take_step in steps.items():
            seconds, step = timed(take_step, repeat, batch, c.device)
            slopes[way, repeat] = step.slopes
            times[way] += [seconds] if repeat > 1 else []
    median = {way: statistics.median(times[way]) for way in ways}
    of_way = {way: [slope for repeat in range(args.repeats + 2) for slope in slopes[way, repeat]] for way in ways}
    slow = ways[-1]
    scale = max(map(abs, of_way[slow]))
    apart = {way: max(abs(a - b) for a, b in zip(of_way[way], of_way[slow], strict=True)) for way in ways}
    print(f"{'probes a forward':>18}{'step s':>10}{'ratio':>8}{'slopes apart':>14}")
    for way in ways:
        print(f"{way:18}{median[way]:10.4f}{median[slow] / median[way]:8.2f}{apart[way] / scale:14.1e}")
    print(json.dumps({
        "model": args.model, "weights": c.weights, "compute": c.compute, "queries": args.queries,
        "compile": c.compile, "graphs": c.graphs,
        "device": torch.cuda.get_device_name() if c.device != "cpu" else f"cpu, {torch.get_num_threads()} threads",
        "seconds": median, "spread": {way: [min(times[way]), max(times[way])] for way in ways},
        "peak_memory_bytes": peak_memory(c.device),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
