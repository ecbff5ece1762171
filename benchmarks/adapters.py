"""SST-2 and TREC on a small real checkpoint: LoRETTA beside LoRA by AdamW, AdaZeta beside MeZO at equal forwards.

    python -m benchmarks.adapters --model DIR --data-dir DIR --out runs/adapters --jobs 15

How arms are tuned and run: benchmarks/tuned.py.
"""

from __future__ import annotations

from benchmarks.tuned import Arms, main, rates
from zo_optim import adazeta_queries, epoch_of

BATCH, QUERIES = 32, 2000  # two forwards each
EXAMPLES = {"sst2": 1024, "trec": 2646}  # in the files with k = 512
FIRST_ORDER = "--steps 600 --eval-every 60 --weights fp32 --lr-schedule linear --warmup 60"
SMALL = "--bottleneck 16 --tt-rank 3"
FEW = {  # biases are most of a small adapter, and norms as many again
    "a fifth of LoRA's parameters": f"{SMALL} --no-norms",
    "16 wide, rank 4, no norms": "--bottleneck 16 --tt-rank 4 --no-norms",  # a fifth on zoroberta-26m
    "16 wide, rank 2": "--bottleneck 16 --tt-rank 2",  # a fifth on zollama-28m
}
RATES = rates("3e-4", "1e-3", "3e-3", "9e-3")
LRS = ("1e-4", "3e-4", "1e-3", "3e-3")
PROBED = rates(*LRS) + rates(*LRS, eps=("1e-2",))  # at 1e-3, and larger: few parameters make small projected gradients
ZO = "--weights fp32 --lr-schedule constant --eps 1e-3"
SCHEDULES = {"paper's schedule": (0.85, 0.45, 20), "released schedule": (0.85, 0.622, 15)}


def adazeta_steps(
    examples: int, batch_size: int, queries: int = QUERIES, schedule: tuple = SCHEDULES["paper's schedule"]
) -> int:
    """How many steps AdaZeta needs to spend the budget of queries; the last step is whole.  schedule: alpha, beta and
    the most queries."""
    step, asked = 0, 0
    while asked < queries:
        asked += adazeta_queries(epoch_of(step, examples, batch_size), *schedule)
        step += 1
    return step


def zo(method: str, queries: int = 1) -> str:
    steps = QUERIES // queries
    return f"{ZO} --method {method} --queries {queries} --steps {steps} --eval-every {steps // 10}"


def arms_of(task: str) -> Arms:
    few = {
        f"LoRETTA_adp, AdamW, {name}": (f"{FIRST_ORDER} --method loretta-adp --placement sublayers {flags}", RATES)
        for name, flags in FEW.items()
    }
    arms = {
        "LoRA, AdamW": (f"{FIRST_ORDER} --method lora", RATES),
        "LoRA of rank 1, AdamW": (f"{FIRST_ORDER} --method lora --lora-rank 1 --lora-alpha 2", RATES),  # scaled alike
        "LoRETTA_adp, AdamW": (f"{FIRST_ORDER} --method loretta-adp", RATES),
        **few,
        "LoRETTA_rep, AdamW": (f"{FIRST_ORDER} --method loretta-rep", RATES),
        "MeZO": (zo("mezo"), rates("1e-5", "2e-5", "4e-5", "8e-5")),
        "MeZO-LoRA": (zo("lora --optimizer zo"), PROBED),
        "AdaZeta, one query": (zo("adazeta"), PROBED),
        "AdaZeta, one query, small": (f"{zo('adazeta')} {SMALL}", PROBED),
        "AdaZeta, one query, released start": (f"{zo('adazeta')} --init released", PROBED),
        "AdaZeta, four queries": (zo("adazeta", 4), PROBED),
    }
    for name, (alpha, beta, max_queries) in SCHEDULES.items():
        steps = adazeta_steps(EXAMPLES[task], BATCH, schedule=(alpha, beta, max_queries))
        schedule = f"--alpha {alpha} --beta {beta} --max-queries {max_queries} --steps {steps}"
        schedule += f" --eval-every {steps // 10}"
        arms[f"AdaZeta, {name}"] = (f"{ZO} --method adazeta {schedule}", PROBED)
        arms[f"AdaZeta, {name}, released start"] = (f"{ZO} --method adazeta {schedule} --init released", PROBED)
    common = f"--task {task} --k 512 --data-seed 42 --batch-size {BATCH}"
    return {f"{task}: {name}": (f"{common} {flags}", choices) for name, (flags, choices) in arms.items()}


if __name__ == "__main__":
    main(arms_of("sst2") | arms_of("trec"), __doc__, "runs/adapters")
