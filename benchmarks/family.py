"""The family at equal forwards: SST-2 and TREC, its methods beside MeZO and QuZO, and AdamW and LoRA as upper bounds.

    python -m benchmarks.family --model DIR --data-dir DIR --jobs 12 --compile --tune-seeds 0 --seeds 11 12 13

How arms are tuned and run: benchmarks/tuned.py.  An arm's name begins with its task and its forwards, of one batch
through one copy of the weights.  MeZO-SVRG pays 2 n / batch of them for an anchor and 4 for any other step; MaZO's
measuring and ElasticZO's backward passes through its last block are not counted.  ZO2 has the bits of MeZO and QuZO.
"""

from __future__ import annotations

from benchmarks.adapters import EXAMPLES
from benchmarks.tuned import Arms, main, rates

BATCH, FO = 32, "--batch-size 8 --eval-every 75"
FULL = rates("1e-5", "2e-5", "4e-5", "8e-5")
ANCHORS = rates("1e-5", "2e-5", "4e-5")  # of both kinds of step: --anchor-rate 1


def arms_of(task: str, forwards: int) -> Arms:
    steps, anchor = forwards // 2, 2 * -(-EXAMPLES[task] // BATCH)
    svrg = max(2, 2 * forwards // (anchor + 4))  # every second step is an anchor's
    zo = f"--task {task} --k 512 --data-seed 42 --lr-schedule linear --batch-size {BATCH}"
    of_steps = f"{zo} --steps {steps} --eval-every {steps // 8}"
    arms = {
        "MeZO, bf16": (f"{of_steps} --method mezo --weights bf16", FULL),
        "QuZO int8, sparse (ours)": (f"{of_steps} --weights int8", FULL),
        "SubZero, bf16": (f"{of_steps} --method subzero", FULL),
        "SubZero, int8": (f"{of_steps} --method subzero --weights int8", FULL),
        "LeZO, bf16": (f"{of_steps} --method lezo", FULL),
        "LeZO int8, sparse (ours)": (f"{of_steps} --method lezo --weights int8", FULL),
        "AdaLeZO, bf16": (f"{of_steps} --method lezo --bandit", FULL),
        "MaZO, bf16": (f"{of_steps} --method mazo", FULL),
        "ElasticZO, bf16": (f"{of_steps} --method elasticzo", FULL),
        "ElasticZO int8, sparse (ours)": (f"{of_steps} --method elasticzo --weights int8", FULL),
        "MeZO-SVRG, bf16": (f"{zo} --steps {svrg} --eval-every {-(-svrg // 8)} --method mezo-svrg --anchor-rate 1",
                            ANCHORS),
    }  # fmt: skip
    return {f"{task}, {forwards:,}: {name}": arm for name, arm in arms.items()}


def first_order(task: str) -> Arms:
    common = f"--task {task} --k 512 --data-seed 42 --lr-schedule linear {FO}"
    return {
        f"{task}: AdamW, fp32": (f"{common} --steps 300 --method fo", rates("1e-5", "3e-5")),
        f"{task}: LoRA, AdamW": (f"{common} --steps 375 --method lora", rates("3e-4", "1e-3", "3e-3")),
    }


ARMS = {name: arm for task in EXAMPLES for name, arm in first_order(task).items()}
ARMS |= {name: arm for task in EXAMPLES for n in (4000, 20_000) for name, arm in arms_of(task, n).items()}

if __name__ == "__main__":
    main(ARMS, __doc__, "runs/family")
