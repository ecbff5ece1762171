"""Step time and peak memory: ours, the peers' ways, and how ours grows.  Random weights, so that nothing is needed.

    python -m benchmarks.speed                                    # the whole table, on a GPU
    python -m benchmarks.speed --cases growth "QuZO int4"         # the rows whose names hold one of these
    python -m benchmarks.speed --model tiny --device cpu --repeats 1 --cases peer     # does it run?

A step is all of it: its losses and its update.  Every case has a process of its own, which takes warm-up steps and
then a timed run; `ms` is the median step, beside the fastest and the slowest, from one return to the next (the run by
the clock is in the JSON).  The peak is the allocator's, warm-up included, building not (on a CPU the whole process's);
what it holds in reserve beyond that, graphs' own memory among it, is in the JSON.  Ratios are to the peer that perturbs
in place, at the same model and size.  Peers (benchmarks/peers.py) have bf16 tensors.  They run as released, on
`transformers`' model, or tight, on ours; they compute the logits of every word at every position, as released, and
nothing of theirs is compiled, except where a row says otherwise.  Targets are what is to be reached at most on an H200.
Last line JSON, with what failed if anything did.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

import tensor_train
from benchmarks.memory import build, examples, step_function
from benchmarks.peers import (
    full_loss,
    last_loss,
    mezo_step,
    quzo_step,
    transformers_loss,
    transformers_model,
)
from data.scoring import BatchLoss, Encoded, collate
from data.tasks import TASKS
from model import LanguageModel
from runtime.config import Config, parse, spec_of
from runtime.hub import check_known, raw_config
from runtime.problem import Problem
from runtime.run_folder import git_commit
from train import parameters, peak_memory, reserved_memory

EPS, LR, WARM_UP = 1e-3, 1e-6, 3  # the second step records launches
PEERS = {  # name: a step, and the loss that it takes
    "mezo": (mezo_step, full_loss),
    "mezo, last position": (mezo_step, last_loss),
    "quzo": (quzo_step, full_loss),
    "mezo, released": (partial(mezo_step, released=True), transformers_loss),
    "quzo, released": (partial(quzo_step, released=True), transformers_loss),
}
SHAPES = {"llama-28m": {
    "model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 32000, "tie_word_embeddings": True,
}}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row for each size, all of them from one process."""

    flags: str  # train.py's
    sizes: tuple[tuple[int, int], ...] = ((16, 64),)  # sequences and tokens of each (0: SST-2's own), smallest first
    peer: str | None = None  # a name in PEERS; its weights are built by the flags, or as transformers' model
    model: str | None = None  # a shape of its own in place of --model
    targets: tuple[str, ...] = ()  # one for each size


BF16 = "--method mezo --weights bf16"
INT8 = "--method quzo --weights int8 --direction-bits 4 --estimator q-rge2"
SPARSE = "--method quzo --weights int8 --direction-bits sparse"
FP8 = "--method quzo --weights fp8"
EAGER = f"{BF16} --no-compile"  # as released
REFERENCE, MIDDLE = "peer: MeZO in place", "QuZO int8, 4 bits"
BOTH = ((16, 64), (16, 256))
OWN = ((16, 0), (32, 0), (64, 0), (128, 0))
DOUBLING = tuple((2**i, 256) for i in range(7))  # 256 to 16,384 tokens
CASES = {
    REFERENCE: Case(EAGER, BOTH, peer="mezo"),
    "peer: MeZO in place, last position": Case(EAGER, peer="mezo, last position"),
    "peer: MeZO in place, last, compiled": Case(BF16, peer="mezo, last position"),
    "peer: QuZO in place": Case(EAGER, peer="quzo"),
    "peer: MeZO as released": Case(EAGER, BOTH, peer="mezo, released"),
    "peer: QuZO as released": Case(EAGER, peer="quzo, released"),
    "peer: AdamW, bf16": Case("--method fo --weights bf16"),
    "peer: AdamW, fo-ste int8": Case("--method fo-ste --weights int8"),
    "MeZO bf16": Case(BF16, targets=("14.2 GiB, 0.4x",)),
    "bf16, sparse": Case("--method quzo --weights bf16", targets=("44 ms",)),
    MIDDLE: Case(INT8, BOTH, targets=("66 ms, 7.6 GiB", "190 ms")),
    "QuZO W8A8": Case(f"{SPARSE} --activations int8", BOTH, targets=("48 ms, 6.9 GiB", "")),
    "QuZO int8, sparse": Case(SPARSE, BOTH, targets=("65 ms, 7.6 GiB", "190 ms")),
    "QuZO fp8": Case(FP8),
    "QuZO fp8, fp8 activations": Case(f"{FP8} --activations fp8", BOTH, targets=("31 ms", "95 ms")),
    "QuZO int4": Case("--method quzo --weights int4", BOTH, targets=("46 ms, 4.4 GiB", "165 ms")),
    "QuZO int4, SST-2's lengths": Case("--method quzo --weights int4", OWN, targets=("32 ms", "", "", "")),
    "AdaZeta Q = 4, int4 base": Case("--method adazeta --weights int4 --queries 4"),
    "QuZO int4, 13B": Case("--method quzo --weights int4", model="llama2-13b", targets=("90 ms, 8.1 GiB",)),
    "SubZero bf16": Case("--method subzero"),
    "SubZero int8": Case("--method subzero --weights int8"),
    "LeZO int8, a quarter, 4 bits": Case("--method lezo --weights int8 --direction-bits 4"),
    "LeZO int8, a quarter, sparse": Case("--method lezo --weights int8"),
    "LeZO int8, a quarter, sparse, no rest": Case("--method lezo --weights int8 --no-rest"),
    "LeZO W8A8, a quarter, sparse": Case("--method lezo --weights int8 --activations int8"),
    "ElasticZO bf16": Case("--method elasticzo"),
    "ElasticZO int8, sparse": Case("--method elasticzo --weights int8"),
    "ZO2 bf16": Case("--method zo2"),
    "ZO2 int4, sparse": Case("--method zo2 --weights int4"),
    "ZO2 int4, sparse, 13B": Case("--method zo2 --weights int4", model="llama2-13b", targets=("3 GiB",)),
    "growth with tokens": Case(INT8, DOUBLING),
    "growth with parameters, 28M": Case(INT8, model="llama-28m"),
    "growth with parameters, 1.1B": Case(INT8, model="tinyllama-1.1b"),
    "growth with parameters, 13B": Case(INT8, model="llama2-13b"),
}

# ---------------------------------------------------------------- one case, in its own process


def measure(name: str, model: str, device: str, repeats: int, extra: tuple[str, ...] = ()) -> list[dict]:
    """The rows of one case.  extra: flags for train.py beside the case's own."""
    case = CASES[name]
    model, problem, rates, rows = case.model or model, None, {}, []
    raw = SHAPES[model] if model in SHAPES else raw_config(model)
    targets = case.targets if model == (case.model or "llama2-7b") else ()
    for (batch_size, tokens), target in zip_longest(case.sizes, targets, fillvalue=""):
        flags = f"--device {device} --batch-size {batch_size} --lr {LR} {case.flags}"
        c = parse(["--model", model, *flags.split(), *extra])
        if problem is None:
            problem = problem_of(case, c, raw)
            if spec_of(c, raw["model_type"]):
                rates = forward_rates(c, problem, tokens, repeats)
                tensor_train.attach(problem.lm, spec_of(c, raw["model_type"]), c.seed)
        take_step = None  # with its graphs
        clear(c.device)
        take_step = step_of(case, c, problem, examples(c, tokens, raw["vocab_size"]))
        row = timed(take_step, repeats, c.device)
        peak, reserved = peak_memory(c.device), reserved_memory(c.device)
        if rates:
            rates["tokens_per_second"] = probed(c) * batch_size * tokens / row["ms"] * 1e3
        rows.append({
            "case": name, "model": model, "parameters": count(problem.lm), "sequences": batch_size,
            "tokens": tokens, **row, **rates, "peak_bytes": peak, "reserved_bytes": reserved,
            "target": target,
        })  # fmt: skip
    return rows


def probed(c: Config) -> int:
    """Forwards of one batch in a step."""
    return 2 * c.queries


def clear(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def problem_of(case: Case, c: Config, raw: dict) -> Problem:
    """A problem without files and with random weights; its lm may be transformers' model."""
    if case.peer and PEERS[case.peer][1] is transformers_loss:
        return Problem(transformers_model(raw, c.device), TASKS["sst2"], None, [], [], {}, 0, c.batch_size)
    return build(c, raw)


def count(lm: LanguageModel | nn.Module) -> int:
    return sum(w.numel() for w in lm.parameters()) if isinstance(lm, nn.Module) else parameters(lm.weights)


def step_of(case: Case, c: Config, problem: Problem, batch: list[Encoded]) -> Callable[[int], object]:
    """One step, given its number."""
    if case.peer is None:
        take_step = step_function(c, problem)
        return lambda at: take_step(at, batch, LR)
    (take_step, loss), lm = PEERS[case.peer], problem.lm
    weights = list(lm.parameters()) if isinstance(lm, nn.Module) else [stored.value for stored in lm.weights.values()]
    loss_fn = partial(loss, lm, collate(batch, problem.pad, lm.device))
    return lambda at: take_step(weights, loss_fn, at, EPS, LR)


def timed(take_step: Callable[[int], object], repeats: int, device: str) -> dict:
    """Milliseconds: the median step, the fastest, the slowest, and the run of them by the clock over their number.

    From one return to the next: a step waits for its losses, and its update runs while the next one is prepared.
    """
    clock = []
    for at in range(WARM_UP + repeats):
        take_step(at)
        clock.append(time.perf_counter())
    clock = clock[WARM_UP - 1 :]
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    steps = [1e3 * (after - before) for before, after in zip(clock, clock[1:], strict=False)]
    return {"ms": statistics.median(steps), "fastest_ms": min(steps), "slowest_ms": max(steps),
            "run_ms": 1e3 * (clock[-1] - clock[0]) / repeats}  # fmt: skip


@torch.no_grad()
def forward_rates(c: Config, problem: Problem, tokens: int, repeats: int) -> dict:
    """Tokens a second of a plain forward by the base without adapters: of one batch, and of as many as a step has."""
    rates = {}
    for name, batches in (("one_batch", 1), ("a_step", probed(c))):
        sequences = c.batch_size * batches
        batch = examples(dataclasses.replace(c, batch_size=sequences), tokens, problem.lm.config.vocab_size)
        forward = forward_of(c, problem.lm, BatchLoss(problem.lm, [collate(batch, problem.pad, problem.lm.device)]))
        row = timed(lambda at, forward=forward: forward(at).tolist(), repeats, c.device)
        rates[f"forward_of_{name}_tokens_per_second"] = sequences * tokens / row["ms"] * 1e3
    return rates


def forward_of(c: Config, lm: LanguageModel, loss_fn: BatchLoss) -> Callable[[int], Tensor]:
    def forward(step: Tensor, inputs: list[Tensor | None]) -> Tensor:
        return loss_fn.with_tensors(inputs)(lm.stored_view())

    if not c.graphs:
        return lambda at: loss_fn(lm.stored_view())
    from gpu.graphs import CudaGraphed  # needs Triton

    graphed = CudaGraphed(lm.device)
    return lambda at: graphed("forward", forward, at, loss_fn.tensors())


# ---------------------------------------------------------------- the table


def alone(name: str, *args) -> list[dict]:
    """measure, in a fresh process: memory and compiled code of one case must not shape another's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, name, *args).result()


HEADER = f"{'case':36} | {'tokens':>8} | {'ms (spread)':>26} | {'peak GiB':>8} | {'to MeZO':>7} | target"


def row_text(row: dict, reference: dict | None) -> str:
    """A row as a line; another below it where tokens a second were measured."""
    size = f"{row['sequences']} x {row['tokens'] or 'own'}"
    spread = f"({row['fastest_ms']:.1f} to {row['slowest_ms']:.1f})"
    ratio = f"{row['ms'] / reference['ms']:.2f}" if reference else "-"
    line = f"{row['case']:36} | {size:>8} | {row['ms']:8.1f} {spread:>17} | {row['peak_bytes'] / 2**30:8.2f}"
    line += f" | {ratio:>7} | {row['target'] or '-'}"
    if "tokens_per_second" in row:
        rates = [row[name] for name in row if name.endswith("tokens_per_second")]
        line += "\n    tokens/s: plain forward {:,.0f}, of as many as a step {:,.0f}; probes {:,.0f}".format(*rates)
    return line


def reference_of(row: dict, rows: list[dict]) -> dict | None:
    """The peer's row at this row's model and size, if it was measured."""
    same = ("model", "sequences", "tokens")
    found = (r for r in rows if r["case"] == REFERENCE and all(r[name] == row[name] for name in same))
    return next(found, None)


def line_through(x: list[float], y: list[float]) -> dict:
    """Least squares, and the largest distance of a point from the line, over the point."""
    slope, intercept = statistics.linear_regression(x, y)
    miss = max(abs(intercept + slope * a - b) / b for a, b in zip(x, y, strict=True))
    return {"slope": slope, "intercept": intercept, "miss": miss}


def growth(rows: list[dict]) -> dict[str, dict]:
    """A line for time and one for peak, against thousands of tokens and against billions of parameters."""
    along = {"tokens": lambda r: r["sequences"] * r["tokens"] / 1e3, "parameters": lambda r: r["parameters"] / 1e9}
    units = {"ms": lambda r: r["ms"], "GiB": lambda r: r["peak_bytes"] / 2**30}
    lines = {}
    for what, x in along.items():
        points = [row for row in rows if row["case"].startswith(f"growth with {what}")]
        if what == "parameters" and points:  # the row with the same flags
            points += [row for row in rows if row["case"] == MIDDLE and row["tokens"] == points[0]["tokens"]]
        if len({x(row) for row in points}) > 1:
            lines |= {f"{unit} with {what}": line_through([*map(x, points)], [*map(y, points)])
                      for unit, y in units.items()}  # fmt: skip
    return lines


def growth_text(name: str, line: dict) -> str:
    unit, what = name.split(" with ")
    each = {"tokens": "thousand tokens", "parameters": "billion parameters"}[what]
    return f"{unit} = {line['intercept']:.3g} + {line['slope']:.4g} a {each} (within {line['miss']:.0%})"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="a preset or a directory: only its sizes are used")
    parser.add_argument("--cases", nargs="+", metavar="NAME", default=[""], help="rows whose names hold one of these")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps, after three that warm up")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="as train.py's")
    args = parser.parse_args(argv)
    try:
        check_known(args.model)
    except ValueError as error:
        parser.error(str(error))
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    for name in args.cases:
        if not any(name in case for case in CASES):
            parser.error(f"no case's name holds {name!r}; there are: {'; '.join(CASES)}")
    return args


def main(argv: list[str]) -> int:
    """Exit code 1 where a case could not be measured, as for want of memory; the others are then whole."""
    args, rows, failed = arguments(argv), [], {}
    extra = () if args.compile is None else ("--compile" if args.compile else "--no-compile",)
    print(HEADER)
    for name in CASES:
        if not any(part in name for part in args.cases):
            continue
        try:
            measured = alone(name, args.model, args.device, args.repeats, extra)
        except (RuntimeError, ImportError) as error:  # out of memory, a process that died, no transformers
            failed[name] = (str(error) or repr(error)).splitlines()[0]
            print(f"{name:36} | {failed[name]}", flush=True)
            continue
        rows += measured
        for row in measured:
            print(row_text(row, reference_of(row, rows)), flush=True)
    lines = growth(rows)
    for name, line in lines.items():
        print(growth_text(name, line))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(json.dumps({"gpu": gpu, "torch": torch.__version__, "commit": git_commit(), "arguments": vars(args),
                      "rows": rows, "growth": lines, "failed": failed}))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
