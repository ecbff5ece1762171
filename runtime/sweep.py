"""`--sweep lr=1e-5,2e-5 seed=0,1,2`: one run for each combination, a choice by dev loss, and one table.

Seeds are repeats: settings are compared by their mean dev loss over seeds, and test never chooses.  Each run is a
process of its own, with a folder of its own in --out, and `--jobs` of them run at a time, spread over the GPUs there
are.  On/off flags are swept as `bandit=true,false`.  The same command with the same --out takes an interrupted sweep up
again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch

from runtime.config import Config, parse, spelled, validate
from runtime.json_files import read_object
from runtime.record import read_result
from runtime.run_folder import write_whole

TRAIN = Path(__file__).parent.parent / "train.py"
Flags = dict[str, str]  # name without dashes in front, as it is spelled: its value
ON_OFF = {f.name.replace("_", "-") for f in dataclasses.fields(Config) if f.type.startswith("bool")}


def combinations(given: list[str]) -> list[Flags]:
    """["lr=1e-5,2e-5", "seed=0,1"] -> one Flags for each pair, the last name changing fastest.

    Raises ValueError for what is no NAME=VALUE,VALUE.
    """
    swept = {}
    for text in given:
        name, _, values = text.partition("=")
        name, listed = name.strip().lstrip("-").replace("_", "-"), [value.strip() for value in values.split(",")]
        if not name or not all(listed) or len(set(listed)) < len(listed):
            raise ValueError(f"--sweep takes NAME=VALUE,VALUE with values that differ, got {text!r}")
        if name in swept:
            raise ValueError(f"--sweep names {name} twice")
        swept[name] = listed
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def command_of(flags: Flags) -> list[str]:
    """One run's flags as words of its command.  An on/off flag takes no value there: true is --bandit, false is
    --no-bandit.

    Raises ValueError for another value of such a flag.
    """
    words = []
    for name, value in flags.items():
        if name not in ON_OFF:
            words += [f"--{name}", value]
        elif value in ("true", "false"):
            words.append(f"--{name}" if value == "true" else f"--no-{name}")
        else:
            raise ValueError(f"--sweep {name}= is over an on/off flag: write true or false, got {value!r}")
    return words


class Slots:
    """`jobs` runs at a time, which share the CPU's cores and are spread over the GPUs."""

    def __init__(self, jobs: int):
        self.gpus, self.free = torch.cuda.device_count(), SimpleQueue()
        self.threads = str(max(1, (os.cpu_count() or 1) // jobs))
        for job in range(jobs):
            self.free.put(job % max(1, self.gpus))

    @contextmanager
    def one(self) -> Iterator[dict[str, str]]:
        """Wait for a slot -> the environment of the process that runs in it."""
        gpu = self.free.get()
        try:
            yield {"OMP_NUM_THREADS": self.threads} | os.environ | (
                {"CUDA_VISIBLE_DEVICES": str(gpu)} if self.gpus > 1 else {}
            )
        finally:
            self.free.put(gpu)


def sweep(c: Config, tell: Callable[[str], None]) -> dict:
    """Run every combination whose result --out does not hold yet -> all results, and which settings are best.

    c: as it was parsed, without defaults.  tell: takes a line for each run that ends.  Raises ValueError, before any
    run, for flags that one of them cannot have, and where --out holds something else.
    """
    runs, argv = combinations(c.sweep), spelled(dataclasses.replace(c, sweep=None, jobs=1, out=None))
    for flags in runs:
        check(argv, flags, c.jobs)
    out = Path(c.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-sweep-{os.getpid()}")
    begin(out, {"flags": argv, "runs": runs})
    slots = Slots(c.jobs)

    def one(flags: Flags) -> dict:
        folder = out / "-".join(f"{name}{value}" for name, value in flags.items()).replace("/", "_")
        done = recorded(folder)
        if done is None:
            begun = (folder / "config.json").is_file()
            command = ["--resume", str(folder)] if begun else [*argv, *command_of(flags), "--out", str(folder)]
            with slots.one() as env:
                ended = subprocess.run([sys.executable, TRAIN, *command], capture_output=True, text=True, env=env)
            done = recorded(folder)
            failed = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            tell(f"{folder}: " + (failed if done is None else f"dev loss {done['dev_loss']:.4f}"))
        return {"flags": flags, "out": str(folder), "result": done}

    pool = ThreadPoolExecutor(c.jobs)
    try:
        ran = list(pool.map(one, runs))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the runs at hand, and starts no others
    return {"sweep": str(out), "chosen": chosen(ran), "failed": sum(not row["result"] for row in ran), "runs": ran}


def check(argv: list[str], flags: Flags, jobs: int) -> None:
    """Raises ValueError for a combination that train.py would not run."""
    for name in flags:
        given = [word for word in (f"--{name}", f"--no-{name}") if word in argv]
        if given:
            raise ValueError(f"{given[0]} is given beside --sweep {name}=")
    one = parse([*argv, *command_of(flags)])
    if one.sweep or one.asks or one.resume or one.replay or one.dry_run or "out" in flags:
        raise ValueError("--sweep is over flags of a new run")
    validate(dataclasses.replace(one, jobs=jobs))


def begin(out: Path, about: dict) -> None:
    """Make OUT, or find it as the same command left it."""
    path = out / "sweep.json"
    if path.is_file():
        if read_object(path) != about:
            raise ValueError(f"--out {out} holds another sweep: {path} says which; give a new folder")
        return
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(about, indent=2) + "\n")


def recorded(folder: Path) -> dict | None:
    """The result of a run that came to its end."""
    result = read_result(folder)
    return None if result is None or result["interrupted"] else result


def settings(flags: Flags) -> Flags:
    return {name: value for name, value in flags.items() if name != "seed"}


def by_settings(ran: list[dict]) -> list[tuple[Flags, list[dict]]]:
    """What was compared, each with its seeds' runs."""
    different = {json.dumps(settings(row["flags"])): settings(row["flags"]) for row in ran}
    return [(one, [row for row in ran if settings(row["flags"]) == one]) for one in different.values()]


def chosen(ran: list[dict]) -> Flags | None:
    """The settings of the lowest mean dev loss, of those of which no run failed."""
    means = [
        (statistics.mean(row["result"]["dev_loss"] for row in rows), one)
        for one, rows in by_settings(ran) if all(row["result"] for row in rows)
    ]  # fmt: skip
    return min(means, key=lambda pair: pair[0])[1] if means else None


def table(swept: dict) -> str:
    """Markdown: a row for each setting, its dev loss, metric and test averaged over seeds; the chosen one is bold."""
    groups = by_settings(swept["runs"])
    names = list(groups[0][0])
    lines = ["| " + " | ".join([*names, "dev loss", "dev", "test (std)", "each seed's test"]) + " |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for one, rows in groups:
        found = [row["result"] for row in rows if row["result"]]
        cells = [""] * 4
        if found:
            tests = [result["test"] for result in found]
            spread = f" ({statistics.stdev(tests):.4f})" if len(tests) > 1 else ""
            devs = [result["dev"] for result in found if result["dev"] is not None]
            cells = [f"{statistics.mean(r['dev_loss'] for r in found):.4f}",
                     f"{statistics.mean(devs):.4f}" if devs else "",
                     f"{statistics.mean(tests):.4f}{spread}", ", ".join(f"{test:.4f}" for test in tests)]  # fmt: skip
        lost = len(rows) - len(found)
        cells[-1] += f" ({lost} of {len(rows)} failed)" if lost else ""
        shown = [*(one[name] for name in names), *cells]
        lines.append("| " + " | ".join(f"**{c}**" if c and one == swept["chosen"] else c for c in shown) + " |")
    return "\n".join(lines)
