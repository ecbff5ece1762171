"""How much noise low-precision arithmetic puts into a slope, against the size of the probe.

    python -m benchmarks.noise --model DIR --data-dir DIR --weights int4

The same directions on the weights' grid at the same SST-2 batch, with products in fp32 (the reference), in bf16, and
with rounded activations, which fp8 weights also multiply as codes: the rms of the slopes, and of what each way's
slopes differ by.  Last line JSON.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from torch import Tensor

from config import parse
from train import batch_indices, batches_of, loss_of, prepare
from zo_optim import ZO, estimate

WAYS = {  # name: (products, activations)
    "fp32": (torch.float32, "none"),
    "bf16": (torch.bfloat16, "none"),
    "fp32, int8 activations": (torch.float32, "int8"),
    "fp32, fp8 activations": (torch.float32, "fp8"),
    "fp8 codes": (torch.bfloat16, "fp8"),  # multiplied by fp8 codes, where the weights are
}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--directions", type=int, default=24)
    parser.add_argument("--stride", type=int, default=1, help="see train.py --help")
    parser.add_argument("--eps", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    args = parser.parse_args()
    flags = f"--task sst2 --k 512 --data-seed 42 --batch-size 32 --weights {args.weights} --direction-bits grid"
    c = parse([*flags.split(), "--no-compile", "--model", args.model, "--data-dir", args.data_dir])
    problem, _ = prepare(c)
    batch = [problem.train[i] for i in batch_indices(0, 0, c.batch_size, len(problem.train))]
    loss_fn, rows = partial(loss_of, problem.lm, batches_of(problem, batch, c.batch_size)), []
    ways = {way: how for way, how in WAYS.items() if way != "fp8 codes" or args.weights == "fp8"}
    print(f"{'eps':>8}{'slopes, rms':>14}" + "".join(f"{way:>26}" for way in list(ways)[1:]))
    for eps in args.eps:
        zo, slopes = ZO(eps, args.directions, grid=True, stride=args.stride), {}
        for way, (dtype, activations) in ways.items():
            problem.lm.dtype, problem.lm.multiplies_codes = dtype, False
            problem.lm.round_activations(activations)
            if way == "fp8 codes":
                problem.lm.multiply_codes()
            queries = estimate(problem.lm.store, loss_fn, 1, 0, zo, dtype)
            slopes[way] = torch.tensor([query.slope for query in queries])
        noise = {way: rms(found - slopes["fp32"]) for way, found in slopes.items() if way != "fp32"}
        rows.append({"eps": eps, "slopes": rms(slopes["fp32"]), "noise": noise})
        told = "".join(f"{value:26.2f}" for value in noise.values())
        print(f"{eps:8.0e}{rows[-1]['slopes']:14.2f}{told}", flush=True)
    print(json.dumps({"model": args.model, "weights": args.weights, "device": c.device, "rows": rows}))


if __name__ == "__main__":
    main()
