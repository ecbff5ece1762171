"""Products of codes by codes in place of a model's linear layers: e4m3 by e4m3, or int8 by int8.

Tokens are rounded to codes with a scale each, weights are codes with a scale per output channel, and both scales are
applied to the sum.  A perturbed copy's weights are codes too.  A GPU's tensor cores multiply so, and a CPU its int8.
Imports model and quant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from model import LanguageModel, Linear, View
from quant import E4M3, token_codes


class CodeLinear(Linear):
    """A Linear whose weights come as codes [P or 1, O, I] and whose scales [O, 1] are one more parameter."""

    input_dtype = torch.bfloat16

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias)
        self.weight_scale = nn.Parameter(torch.empty(outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(x.flatten(1, -2), self.weight, self.weight_scale)
        y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None]
        return y.view(len(y), *x.shape[1:-1], -1)


class CodeView:
    """A view that gives CodeLinear its codes and its scales."""

    def __init__(self, view: View, lm: LanguageModel, coded: set[str]):
        self.view, self.lm, self.coded = view, lm, coded
        self.probes = view.probes

    def read(self, name: str, rows: Tensor | None = None) -> Tensor:
        if name.endswith("_scale"):
            return self.lm.weights[name.removesuffix("_scale")].scale
        return self.view.read(name, rows, as_codes=name in self.coded)


def enable_code_products(lm: LanguageModel) -> None:
    """Let the blocks multiply codes by codes.

    Raises ValueError for other weights or products around them, and for sizes that torch does not multiply so.
    """
    if lm.format not in ("fp8", "int8") or lm.dtype != torch.bfloat16:
        wanted = "fp8 or int8 weights and bf16 around them"
        raise ValueError(f"products of codes need {wanted}, got {lm.format} and {lm.dtype}")
    shapes = {name: lm.weights[name].shape for name in lm.weights if name.startswith(lm.layers)}
    coded = {name for name, shape in shapes.items() if len(shape) == 2}
    for name in coded:
        if any(n % 16 for n in shapes[name]):
            message = f"products of codes need sizes that 16 divides, and {name} is {list(shapes[name])}"
            raise ValueError(f"{message}: use --compute bf16")
    for path, layer in list(lm.block.named_modules()):
        if isinstance(layer, Linear):
            outputs, inputs = layer.weight.shape
            with torch.device("meta"):
                lm.block.set_submodule(path, CodeLinear(inputs, outputs, layer.bias is not None))
    inner = lm.wrap_view
    lm.wrap_view = lambda view: CodeView(inner(view), lm, coded)


def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [P, N, C], rounded to codes a token, times codes [P or 1, O, C] with row scales [O, 1] -> [P, N, O] bf16.

    A weight that all copies share is one large product.
    """
    x = x.expand(max(len(x), len(weight)), -1, -1)
    if len(weight) < len(x):
        return multiply(x.flatten(0, 1)[None], weight, scale).view(*x.shape[:2], -1)
    if weight.dtype != torch.int8:
        return multiply_e4m3(*token_codes(x, "fp8"), weight, scale)
    codes, tokens = token_codes(x, "int8")
    return scaled(multiply_int8(codes.to(torch.int8), weight), tokens, scale)


def scaled(sums: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
    """Sums of products of int8 codes [P, N, O] int32 -> products of the numbers, bf16."""
    return (sums * tokens * scale.T).to(torch.bfloat16)


def aligned(scales: Tensor) -> Tensor:
    """cuBLAS wants them to begin at a multiple of 16 bytes."""
    return scales if scales.data_ptr() % 16 == 0 else scales.clone()


def multiply_into(y: Tensor, x: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor) -> None:
    """One copy's product, y [N, O] <- x [N, C] weight [O, C]^T: of floats; of int8 codes, whose sums int32 y takes; or
    of e4m3 codes, with both scales applied (tokens [1, N, 1], scale [O, 1])."""
    if weight.dtype == torch.int8:
        if len(x) > 16 or x.device.type == "cpu":
            torch._int_mm(x, weight.T, out=y)
        else:  # cuBLAS multiplies more rows only
            y.copy_(torch._int_mm(F.pad(x, (0, 0, 0, 17 - len(x))), weight.T)[: len(x)])
    elif weight.dtype == E4M3.dtype and x.device.type == "cpu":  # where torch's takes one scale a tensor, by version
        y.copy_((x.float() @ weight.float().T) * tokens[0] * scale.T)
    elif weight.dtype == E4M3.dtype:
        torch._scaled_mm(
            x, weight.T, scale_a=aligned(tokens[0]), scale_b=scale.T, out_dtype=torch.bfloat16, out=y,
            use_fast_accum=True,  # sums of some 14 bits, an eighth faster (docs/deviations.md)
        )  # fmt: skip
    else:
        torch.mm(x, weight.T, out=y)


# operators of their own, because torch.compile would join the copies' products by one more pass
@library.custom_op("quzo::multiply_int8", mutates_args=())
def multiply_int8(codes: Tensor, weight: Tensor) -> Tensor:
    """int8 codes [P, N, C] times int8 codes [P, O, C] -> [P, N, O] int32, exact on every device."""
    y = torch.empty(*codes.shape[:2], weight.shape[1], dtype=torch.int32, device=codes.device)
    for p in range(len(y)):
        multiply_into(y[p], codes[p], codes[:0], weight[p], weight[p])
    return y


@multiply_int8.register_fake
def _(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.new_empty(*codes.shape[:2], weight.shape[1], dtype=torch.int32)


@library.custom_op("quzo::multiply_e4m3", mutates_args=())
def multiply_e4m3(codes: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 codes [P, N, C] with token scales [P, N, 1], times e4m3 weights [P, O, C] with row scales [O, 1]."""
    y = torch.empty(*codes.shape[:2], weight.shape[1], dtype=torch.bfloat16, device=codes.device)
    for p in range(len(y)):
        multiply_into(y[p], codes[p], tokens[p : p + 1], weight[p], scale)
    return y


@multiply_e4m3.register_fake
def _(codes: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty(*codes.shape[:2], weight.shape[1], dtype=torch.bfloat16)
