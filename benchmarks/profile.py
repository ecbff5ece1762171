"""Where the time of a zeroth-order step goes, told by the names of its kernels.  Random weights of a true shape.

    python -m benchmarks.profile                                       # QuZO int8 at the shape of Llama-2-7B, on a GPU
    python -m benchmarks.profile --cases "QuZO int4" --no-graphs       # rows of benchmarks.speed whose names hold this
    python -m benchmarks.profile --model tiny --device cpu

On a GPU phases are sums over kernels, whether launched one by one or replayed by a CUDA graph; those of no other phase
are the rest of the forward, and the GPU is idle while none runs.  On a CPU they are sums over torch's operators and two
methods of the estimator, and the rest is everything else.  TFLOP/s are those of the blocks' matrices, counted from
their shapes, over the time of products.  The profiler slows down a step of many small operators, so the step without
it is printed too.  Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, record_function

import tensor_train
from benchmarks.memory import build, examples, step_function
from benchmarks.speed import CASES, LR, MIDDLE, SHAPES, timed
from model import LanguageModel
from runtime.config import parse, spec_of
from runtime.hub import raw_config
from zo_optim import ZO

PHASES = {  # the first pattern that a name holds decides
    "reading the weights": r"^_(pair|probe|move|write)_kernel|^ZO\.perturbed",
    "update": r"^_(update|step|land|land_product)_kernel|^ZO\.add_directions_",
    "attention": r"fmha|flash|attention",  # some are called cutlass too
    "products": r"gemm|gemv|nvjet|cutlass|xmma|triton_tem_fused|splitK|^aten::(mm|bmm|addmm|baddbmm)$",
    "copies": r"^Mem(cpy|set)",
}
PROFILED = "profiled steps"  # the range on the timeline that counts
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events


def phase_of(name: str) -> str | None:
    return next((phase for phase, pattern in PHASES.items() if re.search(pattern, name)), None)


def phase_times(events: list[dict]) -> Counter:
    """A trace's events -> microseconds by phase, which add up to the profiled range.

    Where events overlap, the later one counts from the earlier one's end: nested ones belong to the outer.
    """
    span = next(e for e in events if e["name"] == PROFILED and e["cat"] == "user_annotation")
    on_gpu, us, end = any(e["cat"] in ON_DEVICE for e in events), Counter(), span["ts"]
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        counts = event["cat"] in (ON_DEVICE if on_gpu else ("cpu_op", "user_annotation"))
        phase = phase_of(event["name"]) or ("rest of the forward" if on_gpu else None)
        stop = event["ts"] + event["dur"]
        if counts and phase and stop > end and span["ts"] <= event["ts"] < span["ts"] + span["dur"]:
            us[phase] += stop - max(end, event["ts"])  # graphs' kernels begin a little before the last one's end
            end = stop
    us["idle" if on_gpu else "rest"] = span["dur"] - us.total()
    return us


def traced(take_step: Callable[[int], object], steps: int, device: str) -> list[dict]:
    """The events of a profile of some steps, after one that starts the profiler up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profile:
        take_step(0)
        wait()
        with record_function(PROFILED):
            for step in range(1, 1 + steps):
                take_step(step)
            wait()
    with TemporaryDirectory() as directory:
        profile.export_chrome_trace(f"{directory}/trace.json")
        trace = json.loads(Path(directory, "trace.json").read_text())
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def product_flops(lm: LanguageModel, sequences: int, tokens: int, copies: int) -> int:
    """Two for each weight of a block's matrix, token and copy; after its attention the last block goes on with one
    token a sequence."""
    last, flops = f"{lm.layers}{lm.config.num_hidden_layers - 1}.", 0
    for name, stored in lm.weights.items():
        if name.startswith(lm.layers) and len(stored.shape) == 2:
            narrow = name.startswith(last) and not re.search(r"[qkv]_proj|attention\.self\.", name)
            flops += 2 * copies * sequences * (1 if narrow else tokens) * math.prod(stored.shape)
    return flops


def measure(name: str, model: str, device: str, steps: int, extra: list[str]) -> dict:
    for method in "perturbed", "add_directions_":  # ranges on a CPU's timeline
        setattr(ZO, method, record_function(f"ZO.{method}")(getattr(ZO, method)))
    case = CASES[name]
    model, (sequences, tokens) = case.model or model, case.sizes[0]
    raw = SHAPES[model] if model in SHAPES else raw_config(model)
    flags = f"--device {device} --batch-size {sequences} --lr {LR} {case.flags}"
    c = parse(["--model", model, *flags.split(), *extra])
    problem = build(c, raw)
    if spec := spec_of(c, raw["model_type"]):
        tensor_train.attach(problem.lm, spec, c.seed)
    batch = examples(c, tokens, raw["vocab_size"])
    take_step = partial(step_function(c, problem), examples=batch, lr=LR)
    row, us = timed(take_step, steps, c.device), phase_times(traced(take_step, steps, c.device))
    phases = {phase: time / steps / 1e3 for phase, time in us.most_common()}
    flops = product_flops(problem.lm, sequences, tokens, 2 * c.queries)
    return {"case": name, "model": model, "sequences": sequences, "tokens": tokens, "graphs": c.graphs,
            "unprofiled_ms": row["ms"], "ms": sum(phases.values()), "phases": phases,
            "tflop_per_s": flops / phases["products"] / 1e9}  # fmt: skip


def row_text(row: dict) -> str:
    lines = [f"{row['case']}, {row['model']}, {row['sequences']} x {row['tokens']}{', graphs' * row['graphs']}: "
             f"{row['ms']:.1f} ms a step, {row['unprofiled_ms']:.1f} without the profiler"]  # fmt: skip
    for phase, ms in row["phases"].items():
        rate = f"  {row['tflop_per_s']:.3g} TFLOP/s" if phase == "products" else ""
        lines.append(f"    {phase:20} {ms:9.2f} ms {ms / row['ms']:6.1%}{rate}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="a preset or a directory: only its sizes are used")
    parser.add_argument("--cases", nargs="+", metavar="NAME", default=[MIDDLE], help="as those of benchmarks.speed")
    parser.add_argument("--steps", type=int, default=5, help="profiled steps")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    for flag in "--compile", "--graphs":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help="as train.py's")
    args, rows = parser.parse_args(argv), []
    given = {"compile": args.compile, "graphs": args.graphs}
    extra = [f"--{name}" if given[name] else f"--no-{name}" for name in given if given[name] is not None]
    zeroth_order = [name for name, case in CASES.items() if not case.peer and "--method fo" not in case.flags]
    for name in [name for name in zeroth_order if any(part in name for part in args.cases)]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # no case shapes another's memory
            rows.append(pool.submit(measure, name, args.model, args.device, args.steps, extra).result())
        print(row_text(rows[-1]), flush=True)
    print(json.dumps({"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
