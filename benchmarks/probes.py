"""AdaZeta's step with all probes in one forward, beside one forward a probe: times, and whether their estimates agree.

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
from benchmarks.memory import build, examples, step_function
from data.tasks import TASKS
from runtime.config import Config, parse, spec_of, validate
from runtime.hub import raw_config
from runtime.problem import Problem, load_base
from train import peak_memory
from zo_optim import Step

LR = 1e-30  # a whole step, and yet every way meets the same weights


def problem_of(c: Config, raw: dict) -> Problem:
    directory = Path(c.model)
    if directory.is_dir():
        return Problem(load_base(c, directory), TASKS["sst2"], None, [], [], {}, 0, c.batch_size)
    problem = build(c, raw)
    tensor_train.attach(problem.lm, spec_of(c, raw["model_type"]), c.seed)
    return problem


def timed(take_step, at: int, batch: list, device: str) -> tuple[float, Step]:
    started = time.perf_counter()
    step = take_step(at, batch, LR)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started, step


def compare(c: Config, problem: Problem, batch: list, ways: list[int], repeats: int) -> tuple[dict, dict]:
    """-> seconds of each way, and the projected gradients of all its steps, by steps that take turns."""
    steps = {way: step_function(dataclasses.replace(c, probes_per_forward=way), problem) for way in ways}
    times, grads = {way: [] for way in ways}, {way: [] for way in ways}
    for repeat in range(repeats + 2):  # the first of each compiles kernels, the second records launches
        for way, take_step in steps.items():
            seconds, step = timed(take_step, repeat, batch, c.device)
            grads[way] += step.projected_grads.tolist()
            times[way] += [seconds] if repeat > 1 else []
    return times, grads


def report(c: Config, times: dict[int, list[float]], grads: dict[int, list[float]]) -> dict:
    """Print a row for each way, beside the last one."""
    *_, slow = times
    median = {way: statistics.median(seconds) for way, seconds in times.items()}
    scale = max(map(abs, grads[slow]))
    apart = {way: max(abs(a - b) for a, b in zip(grads[way], grads[slow], strict=True)) / scale for way in times}
    print(f"{'probes a forward':>18}{'step s':>10}{'ratio':>8}{'grads apart':>14}")
    for way, seconds in median.items():
        print(f"{way:18}{seconds:10.4f}{median[slow] / seconds:8.2f}{apart[way]:14.1e}")
    return {
        "model": c.model, "weights": c.weights, "compute": c.compute, "queries": c.queries, "compile": c.compile,
        "graphs": c.graphs,
        "device": torch.cuda.get_device_name() if c.device != "cpu" else f"cpu, {torch.get_num_threads()} threads",
        "seconds": median, "spread": {way: [min(seconds), max(seconds)] for way, seconds in times.items()},
        "projected_grads_apart": apart, "peak_memory_bytes": peak_memory(c.device),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="a directory, or a preset: only its sizes are used")
    parser.add_argument("--weights", default="fp32")
    parser.add_argument("--at-once", type=int, nargs="+", help="probes a forward, the slowest way last (2 Q, 2, 1)")
    for flag, usual in {"--queries": 8, "--batch-size": 16, "--tokens": 64, "--repeats": 5}.items():
        parser.add_argument(flag, type=int, default=usual)
    for flag in "--compile", "--graphs":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=True, help="as train.py's")
    args = parser.parse_args(argv)
    if min(args.tokens, args.repeats) < 1:
        parser.error(f"--tokens and --repeats must be 1 or more, got {args.tokens} and {args.repeats}")
    flags = f"--method adazeta --queries {args.queries} --weights {args.weights} --batch-size {args.batch_size}"
    without = [f"--no-{name}" for name in ("compile", "graphs") if not getattr(args, name)]
    try:
        c = parse(["--model", args.model, *flags.split(), *without])
        validate(c)
    except ValueError as error:
        parser.error(str(error))
    raw = raw_config(args.model)
    batch = examples(c, args.tokens, raw["vocab_size"])
    ways = args.at_once or list(dict.fromkeys([2 * args.queries, 2, 1]))
    print(json.dumps(report(c, *compare(c, problem_of(c, raw), batch, ways, args.repeats))))


if __name__ == "__main__":
    main()
