"""SST-2 on a real checkpoint, SmolLM2-135M: every method and format at 4,000 and at 20,000 forwards.

    python -m benchmarks.smollm2 DIR
    python -m benchmarks.real --model DIR --data-dir DIR --jobs 12 --compile --tune-seeds 0 --seeds 11 12 13

How arms are tuned and run: benchmarks/tuned.py.  An arm's name begins with its forwards; AdamW's have 300 or 375 steps,
after which its dev loss only rises.
"""

from __future__ import annotations

from benchmarks.adapters import EXAMPLES, adazeta_steps
from benchmarks.tuned import Arms, main, rates

COMMON = "--task sst2 --k 512 --data-seed 42 --lr-schedule linear"
FO = "--batch-size 8 --eval-every 75"
FULL, DENSE = rates("2e-5", "4e-5", "8e-5"), rates("5e-6", "1e-5")  # sparse or with a residual, and as in the paper
PAPER = "--direction-bits 4 --eps 1e-3"


def arms_of(queries: int) -> Arms:
    zo = f"{COMMON} --batch-size 32 --steps {queries} --eval-every {queries // 8}"
    schedule = adazeta_steps(EXAMPLES["sst2"], 32, queries)
    grown = f"{COMMON} --batch-size 32 --steps {schedule} --eval-every {schedule // 8}"
    arms = {
        "MeZO, fp32": (f"{zo} --method mezo --weights fp32", FULL),
        "MeZO, bf16": (f"{zo} --method mezo --weights bf16", FULL),
        "QuZO int8, sparse (ours)": (f"{zo} --weights int8", FULL),
        "QuZO int8, 4-bit directions (the paper's)": (f"{zo} --weights int8 {PAPER}", DENSE),
        "QuZO int8 and 4 bits of residual, 4-bit directions": (f"{zo} --weights int8 --residual 4 {PAPER}", FULL),
        "QuZO fp8, sparse (ours)": (f"{zo} --weights fp8", FULL),
        "QuZO fp8 weights and activations, sparse (ours)": (f"{zo} --weights fp8 --activations fp8",
                                                            FULL + ["--lr 2e-5 --eps 4e-3 --cell 64",
                                                                    "--lr 2e-5 --eps 8e-3 --cell 16"]),
        "QuZO int4, sparse (ours)": (f"{zo} --weights int4", FULL),
        "AdaZeta, paper's schedule": (f"{grown} --method adazeta", rates("1e-4", "3e-4", "1e-3")),
        "AdaZeta, one query": (f"{zo} --method adazeta --queries 1", rates("1e-4", "3e-4", "1e-3")),
        "MeZO-LoRA": (f"{zo} --method lora --optimizer zo", rates("3e-4", "1e-3", "3e-3")),
    }
    return {f"{2 * queries:,}: {name}": arm for name, arm in arms.items()}


FIRST_ORDER = {
    "AdamW, fp32": (f"{COMMON} {FO} --steps 300 --method fo", rates("1e-5", "3e-5")),
    "LoRA, AdamW": (f"{COMMON} {FO} --steps 375 --method lora", rates("1e-4", "3e-4", "1e-3", "3e-3")),
}

if __name__ == "__main__":
    main(FIRST_ORDER | arms_of(2000) | arms_of(10_000), __doc__, "runs/real")
