"""Kill training at random moments, or fill its disk, then finish it: every folder must equal the uninterrupted run's.

    python -m tests.fuzz.kills --count 200 --seed 0
    python -m tests.fuzz.kills --disks 20 --seed 0      # needs the right to mount a tmpfs

Half of the kills fall into the last tenth of a run, and every fourth run is killed once more while it is resumed.  A
folder is compared file by file, but for time, memory and paths.  Last line JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from helpers import assert_equal_folders, shortened  # noqa: E402

import train  # noqa: E402

SHORT = "--steps 24 --eval-every 5 --num-eval 64 --batch-size 8 --device cpu --lr 1e-3"
METHODS = {
    "quzo int8": "", "mezo": "--method mezo", "int4 with a residual": "--weights int4 --residual 4",
    "adazeta": "--method adazeta --alpha 2 --beta 1 --max-queries 3 --batch-size 86",
    "loretta by zo": "--method loretta-adp --optimizer zo", "adamw": "--method fo",
    "loretta by adamw": "--method loretta-rep",
}  # fmt: skip


def child(argv: list[str], log: Path) -> int:
    """train.py in a process of its own, which has imported everything already -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = train.main(argv)
    os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(argv: list[str], log: Path, after: float) -> bool:
    """Whether it was still running then."""
    pid = child(argv, log)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return ended(pid) < 0


def surely_killed(flags: list[str], out: Path, log: Path, after: float) -> None:
    """A run that ends before its moment is begun again, with an earlier one."""
    while not killed([*flags, "--out", str(out)], log, after):
        shutil.rmtree(out)
        after *= 0.96


def finish(flags: list[str], out: Path, log: Path) -> int:
    """What a user would do: the same command where there is no folder, else --resume."""
    argv = ["--resume", str(out)] if out.exists() else [*flags, "--out", str(out)]
    code = ended(child(argv, log))
    return 0 if code == 2 and f"{out} is complete" in log.read_text().splitlines()[-1] else code


def wholes(folder: Path) -> dict[str, tuple[list[str], Path, float]]:
    """Each method's flags, its uninterrupted run, and the seconds that it took."""
    done = {}
    for number, (name, more) in enumerate(METHODS.items()):
        flags, out, started = [*SHORT.split(), *more.split()], folder / f"whole{number}", time.perf_counter()
        if ended(child([*flags, "--out", str(out)], folder / "log")):
            raise RuntimeError((folder / "log").read_text()[-2000:])
        done[name] = flags, out, time.perf_counter() - started
    return done


def kills(args: argparse.Namespace, folder: Path) -> dict:
    draw, counts, faults = random.Random(args.seed), Counter(), []
    done = wholes(folder)
    for number in range(args.count):
        name = list(METHODS)[number % len(METHODS)]
        flags, whole, seconds = done[name]
        out, log = folder / f"cut{number}", folder / f"log{number}"
        share = draw.uniform(0.9, 1.0) if number % 2 else draw.random()
        surely_killed(flags, out, log, share * seconds)
        counts["killed"] += 1
        if number % 4 == 0 and out.exists():
            counts["killed again"] += killed(["--resume", str(out)], log, draw.random() * seconds)
        code = finish(flags, out, log)
        try:
            assert code == 0, log.read_text()[-500:]
            assert_equal_folders(out, whole)
            counts["equal"] += 1
            shutil.rmtree(out)
        except AssertionError as error:
            faults.append({"number": number, "method": name, "share": share, "error": str(error)[:500]})
            print(json.dumps(faults[-1]), flush=True)
    return {"runs": args.count, **counts, "faults": faults}


def mount(folder: Path, kilobytes: int, again: bool = False) -> None:
    options = f"{'remount,' if again else ''}size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def disks(args: argparse.Namespace, folder: Path) -> dict:
    """Each run has a disk of a random size below what it needs, which then grows."""
    draw, counts, faults = random.Random(args.seed), Counter(), []
    done, disk = wholes(folder), folder / "disk"
    disk.mkdir()
    for number in range(args.disks):
        name = list(METHODS)[number % len(METHODS)]
        flags, whole, _ = done[name]
        needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 1024 + 64
        mount(disk, draw.randint(4, needed))
        try:
            out, log = disk / "run", folder / f"log{number}"
            code = ended(child([*flags, "--out", str(out)], log))
            said = log.read_text().splitlines()[-1] if log.read_text() else ""
            counts["full"] += code == 1 and "No space left" in said
            assert code in (0, 1) and "Traceback" not in log.read_text(), (code, log.read_text()[-500:])
            mount(disk, 2**16, again=True)
            assert finish(flags, out, log) == 0, log.read_text()[-500:]
            assert_equal_folders(out, whole)
            counts["equal"] += 1
        except AssertionError as error:
            faults.append({"number": number, "method": name, "error": str(error)[:700]})
            print(json.dumps(faults[-1]), flush=True)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return {"disks": args.disks, **counts, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=0, help="runs that are killed")
    parser.add_argument("--disks", type=int, default=0, help="runs whose disk is full")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for wanted, do in ((args.count, kills), (args.disks, disks)):
        if wanted:  # of few examples, so that a run takes a second or two, most of it in steps
            with TemporaryDirectory() as folder, shortened():
                print(json.dumps(do(args, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
