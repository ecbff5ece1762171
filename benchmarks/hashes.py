"""Short runs that cover every method and format, and the hashes of the weights they end with.

    python -m benchmarks.hashes --json before.json             # run and save
    python -m benchmarks.hashes --against before.json          # run again; exit code 1 if any bit differs
    python -m benchmarks.hashes --tree ../other --demo         # another checkout's train.py, and the 500-step demo

Every run trains the embedded model on a CPU for 24 steps, in a process of its own.  A row shows the first digits of the
SHA-256 of the best weights and of all training losses, then dev loss and test accuracy.  Float sums depend on the
number of threads, so both sides of a comparison need the same one; --threads sets it and the file records it.
Back-propagation takes one thread: with more, torch adds up an embedding's gradient in an order that changes from run to
run.  Last line JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

COMMON = "--steps 24 --eval-every 24 --num-eval 200 --device cpu"
INT8, INT4, FP8 = ("--weights int8", "--weights int4", "--weights fp8")
GROWING = "--method adazeta --batch-size 128 --alpha 2 --beta 0.6"  # 8 steps an epoch: 1, 2, then 3 queries
RUNS = {
    "int8, 4 bits": f"{INT8} --direction-bits 4 --estimator q-rge2",
    "int8, q-rge1": f"{INT8} --direction-bits 4 --estimator q-rge1",
    "int8, 8 bits": f"{INT8} --direction-bits 8",
    "int8, sparse": f"{INT8} --direction-bits sparse",
    "int8, sparse, small cells, coin": f"{INT8} --direction-bits sparse --cell 64 --estimator random",
    "int8, full directions": f"{INT8} --direction-bits full",
    "int8, residual": f"{INT8} --residual 4",
    "int8, activations": f"{INT8} --activations int8",
    "int8, probes of codes": f"{INT8} --probe codes",
    "int8, coin": f"{INT8} --estimator random",
    "int8, oracle, residual": f"{INT8} --oracle --residual 4",
    "int8, micro-batches": f"{INT8} --micro-batch-size 8",
    "int8, one probe a forward": f"{INT8} --queries 2 --probes-per-forward 1",
    "int8, warm-up, constant": f"{INT8} --warmup 5 --lr-schedule constant",
    "int8, seed 7, evaluations": f"{INT8} --seed 7 --eval-every 8",
    "int4, sparse": INT4,
    "int4, sparse, queries": f"{INT4} --queries 3",
    "int4, 4 bits, probes of codes": f"{INT4} --direction-bits 4 --probe codes",
    "int4, 4 bits, residual": f"{INT4} --direction-bits 4 --residual 4",
    "int4, residual 8": f"{INT4} --residual 8",
    "int4, nearest": f"{INT4} --direction-bits 4 --rounding nearest",
    "int4, oracle": f"{INT4} --oracle",
    "int4, oracle, residual": f"{INT4} --direction-bits 4 --oracle --residual 4",
    "int4, int8 activations": f"{INT4} --activations int8",
    "fp8, sparse": FP8,
    "fp8, 4 bits": f"{FP8} --direction-bits 4",
    "fp8, fp8 activations": f"{FP8} --activations fp8",
    "fp8, fp8 products": f"{FP8} --activations fp8 --compute fp8",
    "bf16, 4 bits": "--weights bf16",
    "bf16, sparse": "--weights bf16 --direction-bits sparse",
    "fp32, 4 bits": "--weights fp32",
    "fp32, sparse": "--weights fp32 --direction-bits sparse",
    "mezo, bf16": "--method mezo --weights bf16",
    "mezo, bf16 products": "--method mezo --weights bf16 --compute bf16",
    "mezo, fp32": "--method mezo --weights fp32",
    "mezo, 3 queries": "--method mezo --queries 3",
    "mezo, one probe a forward": "--method mezo --queries 2 --probes-per-forward 1",
    "adazeta": GROWING,
    "adazeta, int4 base": f"{GROWING} {INT4}",
    "adazeta, 4 bits, sublayers": f"{GROWING} --direction-bits 4 --placement sublayers",
    "adazeta, norms, released": "--method adazeta --queries 2 --norms --init released",
    "loretta-adp, zo": "--method loretta-adp --optimizer zo --queries 2",
    "loretta-rep, zo": "--method loretta-rep --optimizer zo",
    "lora, zo": f"--method lora --optimizer zo {INT8}",
}
FIRST_ORDER = {  # back-propagation
    "loretta-adp": "--method loretta-adp",
    "loretta-adp, no norms, released": "--method loretta-adp --no-norms --init released --placement sublayers",
    "loretta-rep": "--method loretta-rep",
    "lora": "--method lora",
    "fo": "--method fo",
    "fo, bf16, weight decay": "--method fo --weights bf16 --weight-decay 0.1 --micro-batch-size 8",
    "fo-ste, int8": f"--method fo-ste {INT8}",
    "fo-ste, int4": f"--method fo-ste {INT4}",
    "fo-ste, fp8, bf16 masters": f"--method fo-ste {FP8} --master bf16",
}
DEMO = {"demo": ""}  # every flag at its default
KEPT = ("weights_sha256", "losses_sha256", "dev_loss", "zero_shot", "test", "forwards", "best_step")


def train(tree: Path, flags: str, threads: int) -> dict:
    """Run one tree's train.py -> KEPT, of its result and of its recorded losses."""
    with TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "train.py", *flags.split(), "--out", str(out)]
        # passive: on a busy machine, threads that spin while they wait keep one another from running
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            return {"error": (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]}
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = repr([row["loss"] for row in rows if "loss" in row])  # repr of a float names it exactly
    result = json.loads(done.stdout.splitlines()[-1])
    result["losses_sha256"] = hashlib.sha256(losses.encode()).hexdigest()
    return {name: result[name] for name in KEPT}


def row_text(name: str, row: dict, verdict: str) -> str:
    if "error" in row:
        return f"{name:32} {row['error']}  {verdict}"
    weights, losses = row["weights_sha256"][:12], row["losses_sha256"][:8]
    return f"{name:32} {weights}  {losses}  {row['dev_loss']:9.6f}  {row['test']:6.1%}  {verdict}"


def compare(row: dict, before: dict | None) -> str:
    if before is None:
        return "not in the file"
    names = [name for name in {**before, **row} if before.get(name) != row.get(name)]
    return f"DIFFERS in {', '.join(names)}" if names else "equal"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="whose train.py is run")
    parser.add_argument("--json", type=Path, help="a file to save the results in")
    parser.add_argument("--against", type=Path, help="a saved file to compare with")
    parser.add_argument("--runs", nargs="+", metavar="NAME", default=[""], help="runs whose names hold one of these")
    parser.add_argument("--demo", action="store_true", help="also the demo, which takes 500 steps")
    parser.add_argument("--threads", type=int, default=2, help="of torch, in zeroth-order runs")
    args = parser.parse_args(argv)
    if args.json and args.json.exists():
        parser.error(f"--json {args.json} exists already")
    return args


def main(argv: list[str]) -> int:
    """Exit code 1 if a run fails, or differs from the saved one."""
    args = arguments(argv)
    before = json.loads(args.against.read_text()) if args.against else None
    if before and before["threads"] != args.threads:
        raise SystemExit(f"{args.against} was made with --threads {before['threads']}, got {args.threads}")
    rows, bad = {}, []
    print(f"{'run':32} {'weights':12}  {'losses':8}  {'dev loss':>9}  {'test':>6}  flags")
    for name, flags in (RUNS | FIRST_ORDER | (DEMO if args.demo else {})).items():
        if not any(part in name for part in args.runs):
            continue
        threads = 1 if name in FIRST_ORDER else args.threads
        rows[name] = row = train(args.tree, "--device cpu" if name in DEMO else f"{COMMON} {flags}", threads)
        verdict = compare(row, before["runs"].get(name)) if before else flags
        if "error" in row or (before and verdict != "equal"):
            bad.append(name)
        print(row_text(name, row, verdict), flush=True)
    result = {"threads": args.threads, "runs": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result | {"failed": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
