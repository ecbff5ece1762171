"""How fast a bf16 checkpoint becomes codes, and in how much memory, at a true shape with random weights.

    python -m benchmarks.loading --model llama2-7b --weights int8 int4

Writes the checkpoint into a temporary folder (--folder: where), then loads it in a fresh process for every row, with
its files in the page cache (warm) or dropped from it (cold; where the system can).  Beside it the speed at which the
same files are plainly read into one buffer, in the same state, just before: the floor.  Memory, at its peak while
loading: the host's is what the process itself allocates, so without the page cache that files are mapped from; pinned
is torch's, and may be part of it; the GPU's is the allocator's.  The finished store is taken off wherever it lies.
Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model import expected_shapes, load
from quant import FORMATS
from runtime.checkpoints import BUFFER_BYTES, write_directory
from runtime.config import best_device
from runtime.dry_run import block_of
from runtime.hub import raw_config
from runtime.model_configs import config_of


def random_tensors(shapes: dict[str, torch.Size], device: str) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16, device=device)
        yield name, tensor.normal_(0.0, 0.02) if len(shape) == 2 else tensor


def read_plainly(files: list[Path]) -> None:
    with mmap.mmap(-1, BUFFER_BYTES) as buffer:  # memory that is really given back, unlike a bytearray's
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def drop(files: list[Path]) -> None:
    """Take files out of the page cache, which needs no privileges once they are written to the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


CACHE = {"warm": read_plainly} | ({"cold": drop} if hasattr(os, "posix_fadvise") else {})  # how to get there


def own_memory() -> float:
    """Bytes that this process holds in RAM and that no file backs; NaN where the system does not say."""
    status = Path("/proc/self/status")
    found = re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", status.read_text() if status.exists() else "")
    return 1024 * sum(map(int, found)) if found else math.nan


def timed(work: Callable, *args) -> tuple[float, object]:
    started = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - started, result


def watched(work: Callable, *args) -> tuple[float, object]:
    """-> the most that own_memory grew by while `work` ran, sampled every 5 ms, and its result."""
    done, before = threading.Event(), own_memory()
    seen = [before]

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work(*args)
    finally:
        done.set()
        thread.join()
    return max(*seen, own_memory()) - before, result


def measure(directory: Path, weights: str, cache: str, device: str) -> dict:
    files, gpu = sorted(directory.glob("*.safetensors")), device.startswith("cuda")

    def whole() -> int:
        lm = load(directory, device, weights=weights)
        if gpu:
            torch.cuda.synchronize()
        return sum(tensor.nbytes for stored in lm.weights.values() for tensor in stored.tensors().values())

    if gpu:
        torch.ones(1, device=device)  # starting CUDA is not loading
    CACHE[cache](files)
    plain, _ = timed(read_plainly, files)
    CACHE[cache](files)
    seconds, (host, stored) = timed(watched, whole)
    return {
        "weights": weights, "cache": cache, "seconds": seconds, "plain_seconds": plain, "stored_bytes": stored,
        "file_bytes": sum(file.stat().st_size for file in files), "host_bytes": host - (0 if gpu else stored),
        "pinned_bytes": torch.cuda.host_memory_stats()["allocated_bytes.peak"] if gpu else 0,
        "gpu_bytes": torch.cuda.max_memory_allocated(device) - stored if gpu else 0,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="a preset or a directory: only its sizes are used")
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"], choices=FORMATS)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--folder", help="where the checkpoint is written for as long as this runs")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    raw = raw_config(args.model)
    config, rows = config_of(raw), []
    layer = 2 * sum(p.numel() for p in block_of(config).parameters())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        directory = Path(folder) / "model"
        write_directory(directory, {"config.json": raw}, [], random_tensors(expected_shapes(config), args.device))
        print(f"one layer in bf16: {layer / 1e9:.3f} GB (10^9 bytes)")
        print(f"{'':12}{'s':>8}{'GB/s':>8}{'plain GB/s':>12}{'share':>8}{'host GB':>10}{'pinned':>8}{'GPU GB':>8}")
        for weights, cache, _ in ((w, c, i) for w in args.weights for c in CACHE for i in range(args.repeats)):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory of one row must not shape another's
                row = pool.apply(measure, (directory, weights, cache, args.device))
            rows.append(row)
            size, seconds, plain = row["file_bytes"] / 1e9, row["seconds"], row["plain_seconds"]
            print(f"{weights:7}{cache:5}{seconds:8.2f}{size / seconds:8.2f}{size / plain:12.2f}{plain / seconds:8.0%}"
                  f"{row['host_bytes'] / 1e9:10.3f}{row['pinned_bytes'] / 1e9:8.3f}{row['gpu_bytes'] / 1e9:8.3f}",
                  flush=True)  # fmt: skip
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    print(json.dumps({"model": args.model, "device": name, "layer_bytes": layer, "rows": rows}))


if __name__ == "__main__":
    main()
