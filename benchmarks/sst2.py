"""SST-2 on a small real checkpoint: every format and estimator at equal forwards, beside MeZO and first order.

    python -m benchmarks.sst2 --model DIR --data-dir DIR --out runs/sst2 --jobs 15

How arms are tuned and run: benchmarks/tuned.py.
"""

from __future__ import annotations

import itertools

from benchmarks.tuned import main, rates

COMMON = "--task sst2 --k 512 --data-seed 42 --batch-size 32 --lr-schedule linear"
ZO = "--steps 2000 --eval-every 200"
QUZO = f"{ZO} --method quzo"
FP32 = "--compute fp32"  # matrices are multiplied in fp32, so that formats alone differ
FO = "--steps 300 --eval-every 15"  # converged long before


FINE, COARSE = rates("1e-5", "2e-5", "4e-5"), rates("3e-7", "2e-6", "1e-5")
FLOAT = rates("2e-5", "4e-5", "8e-5", "1.6e-4")  # where nothing but the loss's shape limits the rate
SPARSE = rates("2e-5", "4e-5", eps=("1e-3 --cell 256", "1e-3 --cell 1024"))
SPARSE_INT4 = rates("2e-5", "4e-5", eps=("2.5e-4 --cell 1024", "2.5e-4 --cell 4096"))
# rounded activations put so much noise into the projected gradient of a small probe that its size counts as well
NOISY, NOISY_COARSE = rates("2e-5", "4e-5", eps=("1e-3", "2e-3")), rates("5e-6", "2e-5", eps=("1e-3", "2e-3"))
ADAM = rates("3e-6", "1e-5", "3e-5", "1e-4")
FORMATS = {  # name: (flags, rates of directions in every weight, rates of sparse directions)
    "FP8": ("--weights fp8 --activations fp8", NOISY_COARSE, SPARSE),
    "W8A8": ("--weights int8 --activations int8", NOISY, SPARSE),
    "W8": ("--weights int8", FINE, SPARSE),
    "W4": ("--weights int4", COARSE, SPARSE_INT4),
    "W4 + 4 bits": ("--weights int4 --residual 4", FINE, SPARSE_INT4),
    "W4 + 8 bits": ("--weights int4 --residual 8", FINE + rates("8e-5"), SPARSE_INT4),
}
WAYS = {
    "q-rge1": "--direction-bits 4 --eps 1e-3 --estimator q-rge1",
    "q-rge2": "--direction-bits 4 --eps 1e-3 --estimator q-rge2",
    "sparse": "--direction-bits sparse",
}
ARMS = {
    "MeZO, fp32": (f"{ZO} --method mezo --weights fp32", FLOAT),
    "MeZO, bf16": (f"{ZO} --method mezo --weights bf16 {FP32}", FLOAT),
    "MeZO, bf16, products too": (f"{ZO} --method mezo --weights bf16", FLOAT),
    **{
        f"QuZO {name}, {way}": (f"{QUZO} {FP32} {flags} {how}", sparse if way == "sparse" else dense)
        for (name, (flags, dense, sparse)), (way, how) in itertools.product(FORMATS.items(), WAYS.items())
    },
    "QuZO FP8 weights only, sparse": (f"{QUZO} {FP32} --weights fp8 {WAYS['sparse']}", SPARSE),
    "QuZO FP8, sparse, products too": (
        f"{QUZO} --compute fp8 --weights fp8 --activations fp8 {WAYS['sparse']}",
        SPARSE,
    ),
    "QuZO W4A8, sparse": (f"{QUZO} {FP32} --weights int4 --activations int8 {WAYS['sparse']}", SPARSE),
    "QuZO W4, sparse, products in bf16": (f"{QUZO} --weights int4 {WAYS['sparse']}", SPARSE_INT4),
    "QuZO W8, q-rge2, codes": (f"{QUZO} {FP32} --weights int8 {WAYS['q-rge2']} --probe codes", FLOAT),
    "QuZO W4, q-rge2, nearest": (f"{QUZO} {FP32} --weights int4 {WAYS['q-rge2']} --rounding nearest", FINE),
    # not tuned, and tested with its last weights: the luckiest of ten evaluations of a random walk is above chance
    "random, W8, sparse": (
        f"{QUZO} {FP32} --weights int8 {WAYS['sparse']} --cell 256 --estimator random --eval-every 2000",
        rates("4e-5"),
    ),
    "fo, fp32": (f"{FO} --method fo --weights fp32", ADAM),
    "fo-ste, W8A8": (f"{FO} --method fo-ste {FP32} --weights int8 --activations int8", ADAM),
    "fo-ste, W4A8": (f"{FO} --method fo-ste {FP32} --weights int4 --activations int8", ADAM),
}

if __name__ == "__main__":
    main({name: (f"{COMMON} {flags}", choices) for name, (flags, choices) in ARMS.items()}, __doc__, "runs/sst2")
