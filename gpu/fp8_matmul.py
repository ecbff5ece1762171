"""Products of fp8 codes by fp8 codes on a GPU's tensor cores, in place of a model's linear layers.

Tokens are rounded to e4m3 with a scale each, weights are e4m3 codes with a scale per output channel, and both scales
are applied to the sum.  A perturbed copy's weights are rounded to codes too.  Imports model and quant.
"""

from __future__ import annotations

import torch
from torch import Tensor, library, nn

from model import LanguageModel, Linear, View
from quant import Fp8, token_codes


class Fp8Linear(Linear):
    """A Linear whose weights come as e4m3 codes [P or 1, O, I] and whose scales [O, 1] are one more parameter."""

    input_dtype = torch.bfloat16

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias)
        self.weight_scale = nn.Parameter(torch.empty(outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = multiply_fp8(x.flatten(1, -2), self.weight, self.weight_scale)
        y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None]
        return y.view(len(y), *x.shape[1:-1], -1)


class Fp8View:
    """A view that gives Fp8Linear its codes and its scales."""

    def __init__(self, view: View, lm: LanguageModel, coded: set[str]):
        self.view, self.lm, self.coded = view, lm, coded
        self.probes = view.probes

    def read(self, name: str, rows: Tensor | None = None) -> Tensor:
        if name.endswith("_scale"):
            return self.lm.weights[name.removesuffix("_scale")].scale
        return self.view.read(name, rows, as_codes=name in self.coded)


def enable_fp8_matmul(lm: LanguageModel) -> None:
    """Let the blocks multiply codes by codes.

    Raises ValueError for other weights or products around them, and for sizes that torch does not multiply so.
    """
    if lm.format != "fp8" or lm.dtype != torch.bfloat16:
        raise ValueError(f"products of fp8 codes need fp8 weights and bf16 around them, got {lm.format} and {lm.dtype}")
    coded = {name for name, stored in lm.weights.items() if name.startswith(lm.layers) and isinstance(stored, Fp8)}
    for name in coded:
        if any(n % 16 for n in lm.weights[name].shape):
            message = f"products of fp8 codes need sizes that 16 divides, and {name} is {list(lm.weights[name].shape)}"
            raise ValueError(f"{message}: use --compute bf16")
    for path, layer in list(lm.block.named_modules()):
        if isinstance(layer, Linear):
            outputs, inputs = layer.weight.shape
            with torch.device("meta"):
                lm.block.set_submodule(path, Fp8Linear(inputs, outputs, layer.bias is not None))
    inner = lm.wrap_view
    lm.wrap_view = lambda view: Fp8View(inner(view), lm, coded)


def multiply_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [P, N, C], rounded to e4m3 a token, times e4m3 weights [P or 1, O, C] with row scales [O, 1] -> [P, N, O] bf16.

    A weight that all copies share is one large product.
    """
    x = x.expand(max(len(x), len(weight)), -1, -1)
    if len(weight) < len(x):
        return multiply_fp8(x.flatten(0, 1)[None], weight, scale).view(*x.shape[:2], -1)
    return multiply_codes(*token_codes(x, "fp8"), weight, scale)


# an operator of its own, because torch.compile would join the copies' products by one more pass
@library.custom_op("quzo::multiply_codes", mutates_args=())
def multiply_codes(codes: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 codes [P, N, C] with token scales [P, N, 1], times e4m3 weights [P, O, C] with row scales [O, 1]."""
    if codes.device.type == "cpu":  # where torch's product takes one scale a tensor, or none, by version
        return ((codes.float() @ weight.float().mT) * tokens * scale.T).to(torch.bfloat16)
    P, N, _ = codes.shape
    y = torch.empty(P, N, weight.shape[1], dtype=torch.bfloat16, device=codes.device)
    for p in range(P):
        scale_a = tokens[p] if N % 4 == 0 else tokens[p].clone()  # cuBLAS wants it to begin at a multiple of 16 bytes
        torch._scaled_mm(
            codes[p], weight[p].T, scale_a=scale_a, scale_b=scale.T, out_dtype=torch.bfloat16, out=y[p],
            use_fast_accum=True,  # sums of some 14 bits, an eighth faster (docs/deviations.md)
        )  # fmt: skip
    return y


@multiply_codes.register_fake
def _(codes: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty(*codes.shape[:2], weight.shape[1], dtype=torch.bfloat16)
