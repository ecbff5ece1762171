"""From the command to the first steps: imports, model and data, the first step, which compiles, the second, which
records graphs, and the third, each in a fresh process.

    python -m benchmarks.start                                              # the embedded model
    python -m benchmarks.start --flags "--model DIR --data-dir DIR --weights int8 --k 512"
    python -m benchmarks.start --shape llama2-7b --flags "--weights int4"   # random weights, one batch of 16 x 64

Twice: with an empty cache of torch's compiler, and with the one that the first left.  Last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

STEPS = 3


def stages(flags: list[str], shape: str | None) -> dict[str, float]:
    """Seconds of each stage of a start, in this process; the first since the parent asked for it."""
    clock, names = [float(os.environ["QUZO_STARTED"])], []

    def done(name: str) -> None:
        names.append(name)
        clock.append(time.time())

    import train
    from benchmarks.memory import build, examples, step_function
    from runtime.config import parse
    from runtime.hub import raw_config

    done("imports")
    c = parse(["--lr", "1e-6", *flags, *(["--model", shape] if shape else [])])
    if shape:
        raw = raw_config(shape)
        problem, batches = build(c, raw), [examples(c, 64, raw["vocab_size"])] * STEPS
    else:
        train.validate(c)
        problem, _ = train.prepare(c)
        n = len(problem.train)
        batches = [[problem.train[i] for i in train.batch_indices(c.seed, 0, c.batch_size, n)]] * STEPS
    take_step = step_function(c, problem)
    done("model and data")
    for step, batch in enumerate(batches):
        take_step(step, batch, 1e-6)
        if problem.lm.device.type == "cuda":
            train.torch.cuda.synchronize()
        done(f"step {step + 1}")
    return dict(zip(names, (after - before for before, after in zip(clock, clock[1:], strict=False)), strict=True))


def start(flags: list[str], shape: str | None, cache: str) -> dict[str, float]:
    """The stages of a fresh process, and their sum."""
    command = [sys.executable, "-m", "benchmarks.start", "--stages", "--flags", " ".join(flags)]
    command += ["--shape", shape] if shape else []
    env = {"GOMP_SPINCOUNT": "0"} | os.environ  # as train.py
    env |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env | {"QUZO_STARTED": str(time.time())},
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"to the first step": sum(list(found.values())[:STEPS])}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", default="", help="train.py's")
    parser.add_argument("--shape", help="a preset, with random weights")
    parser.add_argument("--stages", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    flags = args.flags.split()
    if args.stages:
        print(json.dumps(stages(flags, args.shape)))
        return
    rows = {}
    with TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            rows[name] = start(flags, args.shape, cache)
            said = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in rows[name].items())
            print(f"{name:6}{said}", flush=True)
    print(json.dumps({"flags": flags, "shape": args.shape, "seconds": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
