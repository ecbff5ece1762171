"""Tasks on a real checkpoint: MeZO's for causal models but ReCoRD, LM-BFF's for masked ones, each at 4,000 forwards.

    python -m benchmarks.tasks --model DIR --data-dir DIR --jobs 8 --compile --tune-seeds 4 --seeds 4 5
    python -m benchmarks.tasks --model DIR --data-dir DIR --arms "drop: AdaZeta" "squad: MeZO, bf16"

How arms are run and kept: benchmarks/tuned.py.  None is tuned: zeroth order measures its own rate, and those of AdamW
and LoRA are what SST-2 liked best.  Tasks of masked models begin with k-shot; AdaZeta's steps spend 2,000 queries.
"""

from __future__ import annotations

from benchmarks.adapters import QUERIES, adazeta_steps
from benchmarks.tuned import Arms, main

CAUSAL = {  # examples to train with, of at most 1,000: the official file's less those of dev
    "sst2": 1000, "rte": 1000, "cb": 150, "boolq": 1000, "wsc": 454, "wic": 1000, "multirc": 1000, "copa": 300,
    "squad": 1000, "drop": 1000,
}  # fmt: skip
MASKED = {"sst2": 1024, "sst5": 2560, "snli": 1536, "mnli": 1536, "rte": 1024, "trec": 2646}  # k = 512


def arms_of(name: str, flags: str, examples: int, batch_size: int, first_order: str, fo_rate: str) -> Arms:
    zo = f"{flags} --batch-size {batch_size} --steps {QUERIES} --eval-every {QUERIES // 8}"
    grown = adazeta_steps(examples, batch_size)
    arms = {
        "AdamW": f"{flags} {first_order} --method fo --lr {fo_rate}",
        "LoRA": f"{flags} {first_order} --method lora --lr 1e-3",
        "MeZO, bf16": f"{zo} --method mezo --weights bf16",
        "QuZO int8, sparse (ours)": f"{zo} --weights int8",
        "QuZO int4, sparse (ours)": f"{zo} --weights int4",
        "AdaZeta": f"{flags} --batch-size {batch_size} --steps {grown} --eval-every {grown // 8} --method adazeta",
    }
    return {f"{name}: {arm}": (of, [""]) for arm, of in arms.items()}


ARMS = {}
for task, n in CAUSAL.items():
    causal = f"--task {task} --lr-schedule linear"
    ARMS |= arms_of(task, causal, n, 16, "--batch-size 8 --steps 375 --eval-every 75", "1e-5")
for task, n in MASKED.items():
    masked = f"--task {task} --k 512 --data-seed 42 --lr-schedule linear"
    ARMS |= arms_of(f"k-shot {task}", masked, n, 32, "--batch-size 8 --steps 600 --eval-every 75", "3e-5")

if __name__ == "__main__":
    main(ARMS, __doc__, "runs/tasks")
