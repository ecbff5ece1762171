"""Where a training step's time goes: `python train.py --profile N`.

`@phase("update")` above a function says what its calls belong to.  While torch's profiler runs, each call is a range on
its timeline, and a phase's time is that of its innermost ranges: on a CPU from end to end, on a GPU that of the kernels
launched there, whoever launched them (an operator of torch or Triton).  Matrix products of the forward are a phase of
their own.  What a phase moves is counted from shapes, and its floor is that over the machine's own pace at a large copy
and a large product, which are measured first.

The profiler slows down what launches many small operators, so a CPU's and a small model's times are too long; and what
it holds, events and half a GB of buffers, shows in peak_memory_bytes.  Times on the timeline are in microseconds.
Imports nothing of ours.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

PHASES = ("data", "materialise", "matmul", "other forward", "loss", "update")
IDLE = "idle"  # on a GPU: no kernel runs; on a CPU: a step's time outside of all phases
LEFT_OUT = "evaluation"  # a phase of no step
WARM_UP = 4  # steps before the first that counts: kernels are compiled, and the last one starts the profiler up

# ---------------------------------------------------------------- ranges


def phase(name: str, moved: Callable[..., int] | None = None) -> Callable:
    """Decorates a function whose calls belong to a phase.

    moved: of the same arguments, the bytes that a call reads and writes; they travel in the range's name.  Without a
    profiler a call costs 0.1 us more than before, where record_function alone costs 8.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def ranged(*args, **kwargs):
            if not torch.autograd.profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            label = f"{name}, {moved(*args, **kwargs)} bytes" if moved else name
            with record_function(label):
                return function(*args, **kwargs)

        return ranged

    return decorate


def kept(stored) -> dict[str, int]:
    """Bytes of each tensor that a store (quant.Stored) holds, by attribute."""
    return {name: part.nbytes for name, part in vars(stored).items() if isinstance(part, Tensor)}


def bytes_probed(view, name: str, index: Tensor | None = None) -> int:
    """Of a view's `read`, or `rows` at an index: codes and scales read once, and every probe's weights written."""
    stored = view.store[name]
    shape = stored.shape if index is None else (len(index), stored.shape[1])
    dtype = view.dtype if index is None and len(shape) == 2 else torch.float32
    read = sum(size for part, size in kept(stored).items() if part != "residual")  # which no forward reads
    return read * math.prod(shape) // math.prod(stored.shape) + view.probes * math.prod(shape) * dtype.itemsize


def bytes_coded(view, name: str) -> int:
    """The same of a view's `codes`, which are a byte each."""
    stored = view.store[name]
    return sum(kept(stored).values()) + view.probes * math.prod(stored.shape)


def bytes_decoded(view, name: str, index: Tensor | None = None) -> int:
    """The same of weights as they are stored: none for floats that are used where they are."""
    stored = view.store[name]
    dtype = view.dtype if len(stored.shape) == 2 else torch.float32
    in_place = index is None and set(kept(stored)) == {"value"} and stored.value.dtype == dtype
    return 0 if in_place else bytes_probed(view, name, index)


def bytes_stepped(store: dict, *_, **__) -> int:
    """Of an update: codes and residuals read and written, scales read."""
    return sum(size * (1 if part == "scale" else 2) for s in store.values() for part, size in kept(s).items())


# ---------------------------------------------------------------- the timeline: events in the form of chrome://tracing

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("user_annotation", "cpu_op")
LAUNCHES = ("cuda_runtime", "cuda_driver")
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_scaled_mm", "aten::_int_mm")
PRODUCT_KERNEL = re.compile("gemm|gemv|nvjet|cutlass|xmma|triton_tem_fused")  # where a compiled region launches it
ATTENTION_KERNEL = re.compile("fmha|flash|attention")  # some of which are called cutlass too
TRITON_KERNELS = {"_pair_kernel": "materialise", "_update_kernel": "update"}  # where a launch was not recorded
SIZES = {"double": 8, "c10::BFloat16": 2, "c10::Half": 2, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1,
         "signed char": 1, "unsigned char": 1}  # fmt: skip


class Piece(NamedTuple):
    """A stretch of the timeline that belongs to one phase, or to no step (None)."""

    start: float
    end: float
    phase: str | None


class Measured(NamedTuple):
    """Sums over all steps, by phase."""

    steps: int
    wall: float  # us
    us: Counter
    moved: Counter  # bytes
    flops: Counter
    waits: Counter  # us in which no kernel ran, by where the host was; empty of a CPU


def measure(events: list[dict]) -> Measured:
    """Kernels on several streams may overlap: phases then add up to more than the wall time."""
    steps = [event for event in events if event["name"] == "step" and event["cat"] == "user_annotation"]
    device = [event for event in events if event["cat"] in ON_DEVICE]
    host = [e for e in events if e["cat"] in LAUNCHES or e["cat"] in ON_HOST and e["tid"] == steps[0]["tid"]]
    pieces, placed = follow(host)
    pieces = [piece for piece in pieces if counts(piece.phase)]
    us, waits, moved, flops = lengths(pieces), Counter(), Counter(), Counter()
    for event, inside, outside in placed:
        if counts(inside):
            moved_here, flops_here = cost(event, inside != outside)
            moved[inside] += moved_here
            flops[inside] += flops_here
    if device:
        launched = {e["args"].get("correlation"): inside for e, inside, _ in placed if e["cat"] in LAUNCHES}
        runs = [Piece(e["ts"], e["ts"] + e["dur"], phase_of_kernel(e, launched)) for e in device]
        waits = us - lengths(common(pieces, union(runs)))
        us = lengths(run for run in runs if counts(run.phase) and pieces[0].start <= run.start < pieces[-1].end)
        us[IDLE] = waits.total()
    return Measured(len(steps), lengths(pieces).total(), us, moved, flops, waits)


def counts(phase: str | None) -> bool:
    return phase not in (None, LEFT_OUT)


def lengths(pieces: Iterable[Piece]) -> Counter:
    total = Counter()
    for piece in pieces:
        total[piece.phase] += piece.end - piece.start
    return total


def follow(events: list[dict]) -> tuple[list[Piece], list[tuple[dict, str | None, str | None]]]:
    """One thread's timeline in pieces, cut wherever its phase may change; and every event with its phase and that of
    what is around it."""
    pieces, placed, around = [], [], []
    last = {"ts": math.inf, "dur": 0.0, "name": "", "cat": "", "args": {}}  # closes all others
    at = -math.inf
    for event in [*sorted(events, key=lambda e: (e["ts"], -e["dur"])), last]:
        while around and around[-1].end <= event["ts"]:
            closed = around.pop()
            pieces.append(Piece(at, closed.end, closed.phase))
            at = max(at, closed.end)
        outside = around[-1].phase if around else None
        pieces.append(Piece(at, event["ts"], outside))
        at, inside = event["ts"], phase_of(event, outside)
        placed.append((event, inside, outside))
        around.append(Piece(event["ts"], event["ts"] + event["dur"], inside))
    return [piece for piece in pieces if piece.end > piece.start], placed[:-1]


def phase_of(event: dict, outside: str | None) -> str | None:
    """Of an event on the host, from that of what is around it."""
    name = event["name"].partition(",")[0]
    if outside == LEFT_OUT:
        return outside
    if event["cat"] == "user_annotation" and name == "step":
        return IDLE
    if event["cat"] == "user_annotation" and name in (*PHASES, LEFT_OUT):
        return name if outside else None  # not yet in a step that counts
    return "matmul" if name in PRODUCTS and outside == "other forward" else outside


def phase_of_kernel(event: dict, launched: dict[int, str | None]) -> str | None:
    """That of its launch."""
    name = event["name"]
    phase = launched.get(event["args"].get("correlation"), TRITON_KERNELS.get(name, "other forward"))
    product = PRODUCT_KERNEL.search(name) and not ATTENTION_KERNEL.search(name)
    if phase == IDLE:  # work of a step outside of all ranges
        phase = "other forward"
    return "matmul" if phase == "other forward" and product else phase


def cost(event: dict, enters: bool) -> tuple[int, int]:
    """Bytes that an event reads and writes, and its floating-point operations; enters: whether it begins a phase."""
    if event["cat"] == "user_annotation":
        told = re.search(r", (\d+) bytes$", event["name"])
        return int(told[1]) if told else 0, 0
    if event["name"] not in PRODUCTS or not enters:
        return 0, 0
    shapes, added = event["args"]["Input Dims"], event["name"].startswith(("aten::add", "aten::badd"))
    a, b = shapes[added : added + 2]
    rows, flops = math.prod(a[:-1]), 2 * math.prod(a) * b[-1]
    numbers = math.prod(a) + math.prod(b) + rows * b[-1] + (math.prod(shapes[0]) if added else 0)
    return numbers * SIZES.get(event["args"]["Input type"][added], 4), flops


def union(pieces: Iterable[Piece]) -> list[Piece]:
    """The same stretches in order, none of them twice, whatever their phase."""
    merged = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if merged and piece.start <= merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(merged[-1].end, piece.end))
        else:
            merged.append(piece)
    return merged


def common(pieces: list[Piece], others: list[Piece]) -> Iterator[Piece]:
    """What pieces share with others; each list is in order and without overlaps."""
    first = 0
    for piece in pieces:
        while first < len(others) and others[first].end <= piece.start:
            first += 1
        at = first
        while at < len(others) and others[at].start < piece.end:
            yield Piece(max(piece.start, others[at].start), min(piece.end, others[at].end), piece.phase)
            at += 1


# ---------------------------------------------------------------- how fast the machine is


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    n, generator = 8192 if device.type == "cuda" else 1024, torch.Generator(device).manual_seed(0)
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)  # zeros would run faster, at less power
    product = torch.empty_like(a)
    return 2 * n**3 / fastest(lambda: torch.mm(a, a, out=product), device)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the best in a tenth of a second, and of no fewer than three tries."""
    calls = 10 if device.type == "cuda" else 1  # a try: waiting for a GPU takes as long as a short kernel
    times, until = [], time.perf_counter() + 0.1
    while len(times) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / calls)
    return min(times)


# ---------------------------------------------------------------- the profile


def profiled(
    steps: Iterable[int], n: int, device: torch.device, dtype: torch.dtype, report: Callable[[dict], None]
) -> Iterator[int]:
    """The same steps, for a loop whose body takes them.  `report` gets the profile of n steps when they have ended, if
    they are not interrupted.  dtype: what matrices are multiplied in."""
    copy, product, steps, seconds = copy_rate(device), product_rate(device, dtype), iter(steps), []
    for step in islice(steps, WARM_UP - 1):
        started = time.perf_counter()
        yield step
        seconds.append(time.perf_counter() - started)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        yield from islice(steps, 1)
        for i, step in enumerate(islice(steps, n)):
            with record_function("step"):
                yield step
                if cuda and i == n - 1:
                    torch.cuda.synchronize()  # or the last step's kernels would run after it
    profile = {"device": torch.cuda.get_device_name(device) if cuda else "cpu", "dtype": str(dtype).split(".")[1]}
    report(profile | summary(measure(timeline(recorded)), copy, product, min(seconds)))
    yield from steps


def timeline(recorded: torch.profiler.profile) -> list[dict]:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def summary(m: Measured, copy: float, product: float, unprofiled: float) -> dict:
    """A step's figures, for profile.json.  copy: bytes a second; product: operations a second; unprofiled: seconds of
    the fastest step without the profiler, its evaluation included.  idle_ms: while the host was in this phase, no
    kernel ran."""
    phases = {}
    for name in (*PHASES, IDLE):
        ms, moved, flops = m.us[name] / m.steps / 1e3, m.moved[name] / m.steps, m.flops[name] / m.steps
        floor = 1e3 * max(moved / copy, flops / product)
        phases[name] = {
            "ms": ms, "bytes": moved or None, "flops": flops or None,
            "gb_per_s": moved / ms / 1e6 if moved and ms else None,
            "tflop_per_s": flops / ms / 1e9 if flops and ms else None,
            "times_floor": ms / floor if floor else None,
            "idle_ms": m.waits[name] / m.steps / 1e3 if m.waits else None,
        }  # fmt: skip
    return {
        "steps": m.steps, "warm_up_steps": WARM_UP, "step_ms": m.wall / m.steps / 1e3,
        "unprofiled_step_ms": 1e3 * unprofiled, "copy_gb_per_s": copy / 1e9, "matmul_tflop_per_s": product / 1e12,
        "phases": phases,
    }  # fmt: skip


def table(profile: dict) -> str:
    """For people: one line a phase, means over the steps."""
    head = (
        f"{profile['steps']} steps of {profile['step_ms']:.1f} ms, {profile['unprofiled_step_ms']:.1f} ms without the "
        f"profiler; {profile['device']}: copy {profile['copy_gb_per_s']:,.0f} GB/s, {profile['dtype']} matmul "
        f"{profile['matmul_tflop_per_s']:.3g} TFLOP/s"
    )
    units = {"ms": 1, "bytes": 1e6, "gb_per_s": 1, "flops": 1e9, "tflop_per_s": 1, "times_floor": 1, "idle_ms": 1}
    titles = ("ms", "MB", "GB/s", "GFLOP", "TFLOP/s", "x floor", "idle ms")
    lines = [f"{'a step':14}" + "".join(f"{title:>11}" for title in titles)]
    for name, row in profile["phases"].items():
        cells = ("-" if row[key] is None else digits(row[key] / unit) for key, unit in units.items())
        lines.append(f"{name:14}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join([head, *lines])


def digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
