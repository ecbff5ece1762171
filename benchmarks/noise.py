"""How much noise low-precision arithmetic puts into a projected gradient, against the size of the probe.

    python -m benchmarks.noise --model DIR --data-dir DIR --weights int4

The same sparse directions at the same SST-2 batch, with products in fp32 (the reference), in bf16, and
with rounded activations, which fp8 weights also multiply as codes.  Printed are the rms of the reference's projected
gradients, and the rms of every other way's difference from them.  Last line JSON.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from torch import Tensor

import gpu
from data.scoring import BatchLoss
from gpu.code_products import enable_code_products
from model import LanguageModel
from quant import quantise_tokens
from random_bits import Key
from runtime.config import parse
from runtime.problem import prepare
from train import batch_indices
from zo_optim import ZO, SparseZO, probe_losses

WAYS = {  # name: (products, activations)
    "fp32": (torch.float32, "none"),
    "bf16": (torch.bfloat16, "none"),
    "fp32, int8 activations": (torch.float32, "int8"),
    "fp32, fp8 activations": (torch.float32, "fp8"),
    "fp8 codes": (torch.bfloat16, "fp8"),  # multiplied by fp8 codes, where the weights are; last, as it stays so
}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def compute_by(lm: LanguageModel, way: str) -> None:
    """Let the forwards multiply and round as one of WAYS."""
    lm.dtype, activations = WAYS[way]
    lm.round_inputs(partial(quantise_tokens, kind=activations))
    if way == "fp8 codes":
        enable_code_products(lm)


def projected_grads(lm: LanguageModel, loss_fn: BatchLoss, zo: ZO) -> Tensor:
    """[Q] float64, of step 0 of seed 1."""
    plus, minus = probe_losses(lm.weights, loss_fn, Key(1, 0), gpu.estimator(zo, str(lm.device)))
    return (plus - minus) / (2 * zo.eps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--directions", type=int, default=24)
    parser.add_argument("--cell", type=int, default=1024, help="see train.py --help")
    parser.add_argument("--eps", type=float, nargs="+", default=[2.5e-4, 5e-4, 1e-3])
    args = parser.parse_args()
    flags = f"--task sst2 --k 512 --data-seed 42 --batch-size 32 --weights {args.weights} --direction-bits sparse"
    c = parse([*flags.split(), "--no-compile", "--model", args.model, "--data-dir", args.data_dir])
    problem, _ = prepare(c)
    lm = problem.lm
    examples = [problem.train[i] for i in batch_indices(0, 0, c.batch_size, len(problem.train))]
    loss_fn, found = BatchLoss.of(lm, examples, problem.pad, c.batch_size, problem.multiple), {}
    for way in [way for way in WAYS if way != "fp8 codes" or args.weights == "fp8"]:
        compute_by(lm, way)
        for eps in args.eps:
            zo = SparseZO(eps, args.directions, dtype=lm.dtype, cell=args.cell)
            found.setdefault(eps, {})[way] = projected_grads(lm, loss_fn, zo)
    rows = []
    print(f"{'eps':>8}{'grads, rms':>14}" + "".join(f"{way:>26}" for way in list(found[args.eps[0]])[1:]))
    for eps, by_way in found.items():
        exact = by_way.pop("fp32")
        noise = {way: rms(grads - exact) for way, grads in by_way.items()}
        rows.append({"eps": eps, "projected_grads": rms(exact), "noise": noise})
        print(f"{eps:8.1e}{rms(exact):14.2f}" + "".join(f"{value:26.2f}" for value in noise.values()))
    print(json.dumps({"model": args.model, "weights": args.weights, "device": c.device, "rows": rows}))


if __name__ == "__main__":
    main()
