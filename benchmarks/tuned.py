"""Tables of tuned runs: an arm's choices are compared on dev with some seeds, and the best is reported on others.

A script with arms calls `main`.  First every arm's choices (rates, and where it matters probe sizes) are run with the
first tuning seed; while the best one has the largest or the smallest rate of its kind, the next rate beyond it is tried
too, four times at the most.  Those within 0.01 of the lowest dev loss are run with the other tuning seeds, and the
lowest mean is kept.  Then that choice is run with the reported seeds, which tuning never saw.  Each run is tested with
the weights of its lowest dev loss.  Test never chooses anything.  Each run is `python train.py ...` in a process of its
own, `jobs` of them at a time, spread over the machine's GPUs.  Finished runs are kept in OUT/results.jsonl and are not
run again while model and flags are the same; --minutes stops starting new ones, so that a table can be made in several
sittings.  Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from runtime.run_folder import git_commit
from runtime.sweep import TRAIN, Slots

Arms = dict[str, tuple[str, list[str]]]  # name: (flags, what to choose from; of two flags the later one counts)


def rates(*lrs: str, eps: tuple[str, ...] = ()) -> list[str]:
    """The choices that an arm is tuned over."""
    return [f"--lr {lr} --eps {e}" for e in eps for lr in lrs] if eps else [f"--lr {lr}" for lr in lrs]


class Runs:
    """Runs on demand, each once: what is in OUT/results.jsonl is not run again."""

    def __init__(self, arms: Arms, args: argparse.Namespace):
        self.arms, self.args, self.lock = arms, args, Lock()
        self.ends = time.monotonic() + 60 * args.minutes
        self.path = Path(args.out) / "results.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [row for row in map(json.loads, lines) if row["model"] == args.model]
        self.done = {(r["arm"], r["choice"], r["seed"]): r for r in rows if r["flags"] == self.flags_of(r)}
        self.slots = Slots(args.jobs)

    def __call__(self, arm: str, choices: list[str], seeds: list[int]) -> None:
        """Run an arm with each choice and seed, as many at once as there are slots."""
        todo = [(arm, choice, seed) for seed in seeds for choice in choices if (arm, choice, seed) not in self.done]
        with ThreadPoolExecutor(max(1, len(todo))) as pool:
            list(pool.map(self._one, todo))

    def flags_of(self, row: dict) -> str | None:
        """The flags that train.py is given; None for an arm that was removed."""
        flags, _ = self.arms.get(row["arm"], (None, ()))
        return f"{flags} {row['choice']} --seed {row['seed']}" if flags else None

    def _one(self, job: tuple[str, str, int]) -> None:
        with self.slots.one() as env:
            if time.monotonic() > self.ends:
                return
            row = dict(zip(("arm", "choice", "seed"), job, strict=True))
            result = run(self.args, env, row | {"model": self.args.model, "flags": self.flags_of(row)})
        with self.lock:
            self.done[job] = result
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")


def run(args: argparse.Namespace, env: dict[str, str], row: dict) -> dict:
    """One training run -> its row with the result: of one that diverged, what its best weights reach.

    Any other failure raises: it must not pass for a measurement.
    """
    title = f"{row['arm']} {row['choice']} seed {row['seed']}"
    out = Path(args.out) / f"{title}-{time.time_ns()}".replace(" ", "").lower()
    paths = ["--model", args.model, "--data-dir", args.data_dir, "--out", str(out)]
    compiled = "--compile" if args.compile else "--no-compile"
    command = [sys.executable, TRAIN, *row["flags"].split(), *paths, compiled]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    diverged = done.returncode == 1 and '"diverged": "' in done.stdout
    if done.returncode and not diverged:
        raise RuntimeError(f"{title}: {done.stderr[-2000:]}")
    result = json.loads(done.stdout)
    kept = ("dev", "dev_loss", "best_step", "test", "seconds", "zero_shot", "forwards", "trainable_parameters",
            "peak_memory_bytes")  # fmt: skip
    row |= {name: result.get(name) for name in kept} | {"commit": git_commit()}
    # no test accuracy here: whoever watches must not tune by it
    print(f"{title}: dev loss {row['dev_loss']:.4f}", file=sys.stderr, flush=True)
    return row


TIE = 0.01  # dev losses this close tie: another seed changes them by about as much
FURTHER = 4  # rates beyond an arm's own


def tune(runs: Runs, arm: str, seeds: list[int]) -> str | None:
    """The choice of an arm; None where time was up."""
    first, *others = seeds
    close = contenders(runs, arm, first)
    if len(close) > 1:
        runs(arm, close, others)
    return winner(runs, arm, close, seeds)


def contenders(runs: Runs, arm: str, seed: int) -> list[str]:
    """The choices that tie at the first seed; none where time was up."""
    choices = list(runs.arms[arm][1])
    for _ in range(1 + FURTHER):
        runs(arm, choices, [seed])
        losses = {c: runs.done[arm, c, seed]["dev_loss"] for c in choices if (arm, c, seed) in runs.done}
        if len(losses) < len(choices):
            return []
        beyond = outward(losses)
        if beyond is None:
            break
        choices.append(beyond)
    return [choice for choice, loss in losses.items() if loss <= min(losses.values()) + TIE]


def outward(losses: dict[str, float]) -> str | None:
    """The next rate beyond the best choice's, if that is the largest or the smallest with its other flags: as far
    beyond as that is from its neighbour, or twice as large.  An arm with one choice is not tuned."""
    if len(losses) == 1:
        return None
    best = min(losses, key=losses.get)
    _, lr, *others = best.split()
    lr, lrs = float(lr), sorted(float(choice.split()[1]) for choice in losses if choice.split()[2:] == others)
    if lrs[0] < lr < lrs[-1]:
        return None
    at = lrs.index(lr)
    ratio = 2 if len(lrs) == 1 else lr / lrs[at - 1 if at else 1]
    return " ".join(("--lr", f"{lr * ratio:.2g}".replace("e-0", "e-"), *others))


def winner(runs: Runs, arm: str, close: list[str], seeds: list[int]) -> str | None:
    """The lowest mean dev loss over all tuning seeds."""
    if len(close) == 1:
        return close[0]
    if any((arm, choice, seed) not in runs.done for choice in close for seed in seeds):
        return None
    mean = {c: statistics.mean(runs.done[arm, c, seed]["dev_loss"] for seed in seeds) for c in close}
    return min(mean, key=mean.get, default=None)


def line(runs: Runs, arm: str, choice: str, seeds: list[int]) -> str:
    found = [runs.done[arm, choice, seed] for seed in seeds if (arm, choice, seed) in runs.done]
    shown = choice.replace("--lr ", "").replace("--", "")
    if len(found) < len(seeds):
        return f"| {arm} | | {shown} | | runs of {len(found)} of {len(seeds)} seeds | |"
    tests = [100 * r["test"] for r in found]
    spread = f" ({statistics.stdev(tests):.1f})" if len(tests) > 1 else ""
    loss, dev = (statistics.mean(r[name] for r in found) for name in ("dev_loss", "dev"))
    size, each = found[0].get("trainable_parameters"), ", ".join(f"{t:.1f}" for t in tests)
    parts = [arm, f"{size:,}" if size else "", shown, f"{loss:.4f}, {100 * dev:.1f}",
             f"{statistics.mean(tests):.1f}{spread}", each]  # fmt: skip
    return f"| {' | '.join(parts)} |"


def whole(runs: Runs, arm: str, args: argparse.Namespace) -> str | None:
    """Tune an arm and run its choice with the reported seeds -> the choice."""
    choice = tune(runs, arm, args.tune_seeds)
    if choice:
        runs(arm, [choice], args.seeds)
    return choice


def main(arms_of_table: Arms, description: str, out: str) -> None:
    args = parse(arms_of_table, description, out)
    runs, arms = Runs(arms_of_table, args), args.arms or list(arms_of_table)
    with ThreadPoolExecutor(len(arms)) as pool:  # no arm waits for another's tuning
        best = dict(zip(arms, pool.map(lambda arm: whole(runs, arm, args), arms), strict=True))
    print("| method | parameters | lr | dev loss, accuracy | test: mean (std) | each seed |\n" + "|---" * 6 + "|")
    for arm, choice in best.items():
        print(line(runs, arm, choice, args.seeds) if choice else f"| {arm} | | not tuned yet | | | |")
    print(json.dumps({"model": args.model, "choices": best, "runs": list(runs.done.values())}))


def parse(arms: Arms, description: str, out: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", default=out)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--tune-seeds", type=int, nargs="+", default=[0, 10, 11])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=arms, metavar="ARM", help="all of them where not given")
    parser.add_argument("--compile", action="store_true", help="as train.py's: short runs gain little")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after this long")
    return parser.parse_args()
