"""SST-2 on a small real checkpoint: every learning rate with every seed, and the rate that is best on dev.

    python benchmarks/sst2.py --model DIR --data-dir DIR --out runs/sst2 --jobs 6

Each run is `python train.py ...` in a process of its own, `jobs` of them at a time on the one device.  Prints a
line a run, then the table; bold is the learning rate with the lowest mean dev loss over the seeds, and each run
is tested with the weights of its lowest dev loss.  Test never chooses anything.  Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TRAIN = Path(__file__).parent.parent / "train.py"
COMMON = "--task sst2 --k 512 --data-seed 42 --batch-size 32 --eps 1e-3"
ARMS = {  # name: (flags, learning rates to choose from)
    "MeZO, fp32": ("--method mezo --weights fp32 --steps 2000 --eval-every 200", ("2e-5", "4e-5")),
    "QuZO, int8": (
        "--method quzo --weights int8 --compute fp32 --steps 4000 --eval-every 200",
        ("1e-5", "2e-5", "4e-5"),
    ),
}


def run(args: argparse.Namespace, arm: str, lr: str, seed: int) -> dict:
    """One training run -> its result, with the learning rate; a run that diverged counts as chance.

    Any other failure raises: it must not pass for a measurement.
    """
    out = Path(args.out) / f"{arm.lower().replace(', ', '-')}-{lr}-{seed}"
    flags = f"{COMMON} {ARMS[arm][0]} --lr {lr} --seed {seed}".split()
    paths = ["--model", args.model, "--data-dir", args.data_dir, "--out", str(out)]
    done = subprocess.run([sys.executable, TRAIN, *flags, *paths], capture_output=True, text=True)
    if done.returncode and "the loss is not finite" not in done.stderr:
        raise RuntimeError(f"{arm} lr {lr} seed {seed}: {done.stderr[-2000:]}")
    if done.returncode:
        print(f"{arm} lr {lr} seed {seed}: {done.stderr.splitlines()[-1]}", flush=True)
        chance = {"dev": 0.5, "dev_loss": 0.6931, "test": 0.5, "seconds": 0.0, "best_step": 0}
        return {"arm": arm, "lr": lr, "seed": seed} | chance
    result = json.loads(done.stdout) | {"arm": arm, "lr": lr, "seed": seed}
    told = "zero-shot {zero_shot:.4f} dev {dev:.4f} loss {dev_loss:.4f} at {best_step}, test {test:.4f}, {seconds} s"
    print(f"{arm} lr {lr} seed {seed}: {told.format(**result)}", flush=True)
    return result


def main(args: argparse.Namespace) -> None:
    arms = {name: ARMS[name] for name in args.arms or ARMS}
    jobs = [(arm, lr, seed) for seed in args.seeds for arm, (_, lrs) in arms.items() for lr in lrs]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda job: run(args, *job), jobs))
    print("\n| method | lr | dev loss, accuracy | test: mean (std) | each seed | seconds a run |\n" + "|---" * 6 + "|")
    for arm, (_, lrs) in arms.items():
        by_lr = {lr: [r for r in runs if (r["arm"], r["lr"]) == (arm, lr)] for lr in lrs}
        best = min(lrs, key=lambda lr: statistics.mean(r["dev_loss"] for r in by_lr[lr]))
        for lr in lrs:
            print(row(arm, lr, by_lr[lr], "**" if lr == best else ""), flush=True)
    print(json.dumps(runs))


def row(arm: str, lr: str, runs: list[dict], bold: str) -> str:
    tests = [100 * r["test"] for r in runs]
    spread = f" ({statistics.stdev(tests):.1f})" if len(tests) > 1 else ""
    loss, dev, seconds = (statistics.mean(r[name] for r in runs) for name in ("dev_loss", "dev", "seconds"))
    each = ", ".join(f"{t:.1f}" for t in tests)
    test = f"{bold}{statistics.mean(tests):.1f}{spread}{bold}"
    return f"| {arm} | {lr} | {loss:.4f}, {100 * dev:.1f} | {test} | {each} | {seconds:.0f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", default="runs/sst2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the one device")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="all of them where not given")
    main(parser.parse_args())
