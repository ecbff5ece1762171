"""SST-2 on a small real checkpoint: every format and estimator at equal forwards, beside MeZO and first order.

    python -m benchmarks.sst2 --model DIR --data-dir DIR --out runs/sst2 --jobs 15

First every arm's choices (rates, and where it matters probe sizes) are run with the first tuning seed; those within
0.01 of the lowest dev loss are run with the other tuning seeds too, and the lowest mean is kept.  Then that choice is
run with the reported seeds, which tuning never saw.  Each run is tested with the weights of its lowest dev loss.  Test
never chooses anything.  Each run is `python train.py ...` in a process of its own, `jobs` of them at a time, spread
over the machine's GPUs.  Finished runs are kept in OUT/results.jsonl and are not run again while model and flags are
the same; --minutes stops starting new ones, so that a table can be made in several sittings.  Last line JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import torch

from run_folder import git_commit

TRAIN = Path(__file__).parent.parent / "train.py"
COMMON = "--task sst2 --k 512 --data-seed 42 --batch-size 32 --lr-schedule linear"
ZO = "--steps 2000 --eval-every 200"
QUZO = f"{ZO} --method quzo"
FP32 = "--compute fp32"  # matrices are multiplied in fp32, so that formats alone differ
FO = "--steps 300 --eval-every 15"  # converged long before


def rates(*lrs: str, eps: tuple[str, ...] = ()) -> list[str]:
    """What an arm is tuned over."""
    return [f"--lr {lr} --eps {e}" for e in eps for lr in lrs] if eps else [f"--lr {lr}" for lr in lrs]


FINE, COARSE = rates("1e-5", "2e-5", "4e-5"), rates("3e-7", "2e-6", "1e-5")
GRID = rates("2e-5", "4e-5", "8e-5", "1.6e-4")  # where nothing but the loss's shape limits the rate: MeZO too
# rounded activations put so much noise into a small probe's slope that the probe's size counts as well
NOISY, NOISY_GRID = rates("2e-5", "4e-5", eps=("1e-3", "2e-3")), rates("2e-5", "4e-5", eps=("5e-4", "1e-3"))
NOISY_COARSE = rates("5e-6", "2e-5", eps=("1e-3", "2e-3"))
ADAM = rates("3e-6", "1e-5", "3e-5", "1e-4")
FORMATS = {  # name: (flags, rates of directions in every weight, rates of directions on the grid)
    "FP8": ("--weights fp8 --activations fp8", NOISY_COARSE, NOISY_GRID),
    "W8A8": ("--weights int8 --activations int8", NOISY, NOISY_GRID),
    "W8": ("--weights int8", FINE, GRID),
    "W4": ("--weights int4", COARSE, GRID),
    "W4 + 4 bits": ("--weights int4 --residual 4", FINE, GRID),
}
WAYS = {
    "q-rge1": "--direction-bits 4 --eps 1e-3 --estimator q-rge1",
    "q-rge2": "--direction-bits 4 --eps 1e-3 --estimator q-rge2",
    "grid": "--direction-bits grid --eps 1e-4",
}
ARMS = {  # name: (flags, what to choose from; of two flags the later one counts)
    "MeZO, fp32": (f"{ZO} --method mezo --weights fp32", GRID),
    "MeZO, bf16": (f"{ZO} --method mezo --weights bf16 {FP32}", GRID),
    "MeZO, bf16, products too": (f"{ZO} --method mezo --weights bf16", GRID),
    **{
        f"QuZO {name}, {way}": (f"{QUZO} {FP32} {flags} {how}", grid if way == "grid" else dense)
        for (name, (flags, dense, grid)), (way, how) in itertools.product(FORMATS.items(), WAYS.items())
    },
    "QuZO FP8 weights only, grid": (f"{QUZO} {FP32} --weights fp8 {WAYS['grid']}", GRID),
    "QuZO W4A8, grid": (f"{QUZO} {FP32} --weights int4 --activations int8 {WAYS['grid']}", NOISY_GRID),
    "QuZO W4, grid, products in bf16": (f"{QUZO} --weights int4 --direction-bits grid --eps 2e-4", GRID),
    "QuZO W8, q-rge2, codes": (f"{QUZO} {FP32} --weights int8 {WAYS['q-rge2']} --probe codes", GRID),
    "QuZO W4, q-rge2, nearest": (f"{QUZO} {FP32} --weights int4 {WAYS['q-rge2']} --rounding nearest", FINE),
    # tested with its last weights: the best of ten evaluations of a random walk is above chance
    "random, W8, grid": (f"{QUZO} {FP32} --weights int8 {WAYS['grid']} --estimator random --eval-every 2000", FINE),
    "fo, fp32": (f"{FO} --method fo --weights fp32", ADAM),
    "fo-ste, W8A8": (f"{FO} --method fo-ste {FP32} --weights int8 --activations int8", ADAM),
    "fo-ste, W4A8": (f"{FO} --method fo-ste {FP32} --weights int4 --activations int8", ADAM),
}


class Runs:
    """Runs on demand, each once: what is in OUT/results.jsonl is not run again."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.lock = args, Lock()
        self.ends = time.monotonic() + 60 * args.minutes
        self.path = Path(args.out) / "results.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = [row for row in map(json.loads, lines) if row["model"] == args.model and row["flags"] == flags_of(row)]
        self.done = {(row["arm"], row["choice"], row["seed"]): row for row in found}  # of the arms as they are now
        self.slots = SimpleQueue()  # which GPU a run is on: as many on each
        for job in range(args.jobs):
            self.slots.put(job % max(1, torch.cuda.device_count()))

    def __call__(self, jobs: list[tuple[str, str, int]]) -> None:
        todo = [job for job in jobs if job not in self.done]
        todo.sort(key=lambda job: "--activations" not in ARMS[job[0]][0])  # the longest runs first
        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(pool.map(self._one, todo))

    def _one(self, job: tuple[str, str, int]) -> None:
        if time.monotonic() > self.ends:
            return
        gpu = self.slots.get()
        try:
            result = run(self.args, gpu, *job)
        finally:
            self.slots.put(gpu)
        with self.lock:
            self.done[job] = result
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")


def flags_of(row: dict) -> str | None:
    """What train.py is given; None for an arm or a choice that there is no more."""
    flags, choices = ARMS.get(row["arm"], ("", ()))
    return f"{COMMON} {flags} {row['choice']} --seed {row['seed']}" if row["choice"] in choices else None


def run(args: argparse.Namespace, gpu: int, arm: str, choice: str, seed: int) -> dict:
    """One training run -> its result; a run that diverged counts as chance.

    Any other failure raises: it must not pass for a measurement.
    """
    out = Path(args.out) / f"{arm}-{choice}-{seed}-{time.time_ns()}".replace(" ", "").lower()
    row = {"arm": arm, "choice": choice, "seed": seed, "model": args.model}
    row |= {"flags": flags_of(row), "commit": git_commit()}
    paths = ["--model", args.model, "--data-dir", args.data_dir, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    env |= {"CUDA_VISIBLE_DEVICES": str(gpu)} if torch.cuda.device_count() > 1 else {}
    command = [sys.executable, TRAIN, *row["flags"].split(), *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode and "the loss is not finite" not in done.stderr:
        raise RuntimeError(f"{arm} {choice} seed {seed}: {done.stderr[-2000:]}")
    result = {"dev": 0.5, "dev_loss": 0.6931, "test": 0.5, "seconds": 0.0, "best_step": 0}
    if done.returncode:
        print(f"{arm} {choice} seed {seed}: {done.stderr.splitlines()[-1]}", file=sys.stderr, flush=True)
    else:
        result = json.loads(done.stdout)
    kept = ("dev", "dev_loss", "best_step", "test", "seconds", "zero_shot", "forwards", "peak_memory_bytes")
    row |= {name: result.get(name) for name in kept}
    # no test accuracy here: whoever watches must not tune by it
    print(f"{arm} {choice} seed {seed}: dev loss {row['dev_loss']:.4f}", file=sys.stderr, flush=True)
    return row


TIE = 0.01  # of dev loss: about what another seed changes


def tune(runs: Runs, arms: list[str], seeds: list[int]) -> dict[str, str | None]:
    """The choice of each arm; None where time was up."""
    first, *others = seeds
    runs([(arm, choice, first) for arm in arms for choice in ARMS[arm][1]])
    close = {arm: contenders(runs, arm, first) for arm in arms}
    runs([(arm, choice, seed) for arm in arms if len(close[arm]) > 1 for choice in close[arm] for seed in others])
    return {arm: winner(runs, arm, choices, seeds) for arm, choices in close.items()}


def contenders(runs: Runs, arm: str, seed: int) -> list[str]:
    """The choices that tie at the first seed."""
    losses = {c: runs.done[arm, c, seed]["dev_loss"] for c in ARMS[arm][1] if (arm, c, seed) in runs.done}
    if len(losses) < len(ARMS[arm][1]):
        return []
    return [choice for choice, loss in losses.items() if loss <= min(losses.values()) + TIE]


def winner(runs: Runs, arm: str, close: list[str], seeds: list[int]) -> str | None:
    """The lowest mean dev loss over all tuning seeds."""
    if len(close) == 1:
        return close[0]
    if any((arm, choice, seed) not in runs.done for choice in close for seed in seeds):
        return None
    mean = {c: statistics.mean(runs.done[arm, c, seed]["dev_loss"] for seed in seeds) for c in close}
    return min(mean, key=mean.get, default=None)


def row(runs: Runs, arm: str, choice: str, seeds: list[int]) -> str:
    found = [runs.done[arm, choice, seed] for seed in seeds if (arm, choice, seed) in runs.done]
    told = choice.replace("--lr ", "").replace("--eps", "eps")
    if not found:
        return f"| {arm} | {told} | | | |"
    tests = [100 * r["test"] for r in found]
    spread = f" ({statistics.stdev(tests):.1f})" if len(tests) > 1 else ""
    loss, dev = (statistics.mean(r[name] for r in found) for name in ("dev_loss", "dev"))
    each = ", ".join(f"{t:.1f}" for t in tests)
    return f"| {arm} | {told} | {loss:.4f}, {100 * dev:.1f} | {statistics.mean(tests):.1f}{spread} | {each} |"


def main(args: argparse.Namespace) -> None:
    runs, arms = Runs(args), args.arms or list(ARMS)
    best = tune(runs, arms, args.tune_seeds)
    runs([(arm, choice, seed) for seed in args.seeds for arm, choice in best.items() if choice])
    print("| method | lr | dev loss, accuracy | test: mean (std) | each seed |\n" + "|---" * 5 + "|")
    for arm, choice in best.items():
        print(row(runs, arm, choice, args.seeds) if choice else f"| {arm} | not tuned yet | | | |")
    print(json.dumps({"model": args.model, "choices": best, "runs": list(runs.done.values())}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", default="runs/sst2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--tune-seeds", type=int, nargs="+", default=[0, 10, 11])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="all of them where not given")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after this long")
    main(parser.parse_args())
