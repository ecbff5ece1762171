"""Both signs of a sparse probe by one copy of a matrix: few of its elements are moved, it is multiplied, they are moved
the other way, it is multiplied again, and they are put back.

Floats and codes are multiplied where they are stored, so that a probe reads each weight once for each product and
writes next to nothing; other codes are dequantised once for both signs.  The numbers that are multiplied are those of
zo_optim.SparseZO, to the bit (tests/test_fused.py).  Imports model, quant, zo_optim, and of gpu code_products, kernels
and sparse.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, library, nn

from gpu.code_products import CodeLinear, CodeView, multiply_into, scaled
from gpu.kernels import EXACT, VARYING, _by_hand, _kind, _on, as_int32, dequantised, fits
from gpu.sparse import BLOCK, _coded, _hit, _sizes
from model import LanguageModel, Linear, View
from quant import Float, Fp8, Integers, Store, token_codes
from random_bits import LOW, tensor_id
from zo_optim import PerturbedWeights, SparseZO

# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=VARYING)
def _move_kernel(
    w, value, scale, place, minus, old, N, R, C, WIDTH, groups, group_size, t, step, tensor, query, k0, k1,
    CELL: tl.constexpr, KIND: tl.constexpr, PLACED: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w + eps u in place of w, and a list [N] of what to write for w - eps u and, where w is the store, for w again."""
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column, live, code, below, above, unit, up, landing, move = _hit(
        cell, cell < N, value, scale, R, C, WIDTH, groups, group_size, t, step, tensor, query, k0, k1, CELL, KIND,
        BY_HAND,
    )  # fmt: skip
    at = row * C + column
    to, back = tl.where(up, above, below), tl.where(up, below, above)
    if not PLACED:
        to, back = to * unit, back * unit
    elif KIND == "fp8" or KIND == "int8":
        to, back = _coded(to, KIND, BY_HAND), _coded(back, KIND, BY_HAND)
    tl.store(place + cell, tl.where(live, at, -1), mask=cell < N)
    tl.store(minus + cell, back.to(minus.dtype.element_ty), mask=live)
    if PLACED:
        tl.store(old + cell, tl.load(w + at, mask=live, other=0), mask=live)
    tl.store(w + at, to.to(w.dtype.element_ty), mask=live)


@triton.jit
def _write_kernel(w, place, new, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(place + n, mask=n < N, other=-1)
    tl.store(w + at, tl.load(new + n, mask=at >= 0, other=0), mask=at >= 0)


# ---------------------------------------------------------------- one linear layer


@library.custom_op("quzo::probed_products", mutates_args=())  # the matrix is as before, at the end
def probed_products(
    x: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor, key: Tensor, step: Tensor, kind: str, t: float, cell: int,
    coded: bool,
) -> Tensor:  # fmt: skip
    """x [2, N, C] times w + eps u and times w - eps u -> [2, N, O].

    weight, scale: a stored matrix [O, C] and its scales; kind: its format.  key [4] int32: tensor, query, seed's
    halves; step [1] int32.  coded: x are codes too, whose products code_products.multiply_into describes, as tokens.
    """
    _, N, C = x.shape
    store = rebuilt(weight, scale, kind, torch.Size((len(weight), C)))
    (value, scales), (R, _, width), groups = _sizes(store)
    n, placed = -(-R * width // cell), coded or x.dtype == weight.dtype
    w = weight if placed else dequantised(store, x.dtype)[0]
    out = value if placed else w  # fp8's bytes, which Triton is given
    y, blocks = torch.empty(2, N, R, dtype=sums_of(x, kind, coded), device=x.device), (triton.cdiv(n, BLOCK),)
    place, (minus, old) = torch.empty(n, dtype=torch.int64, device=x.device), out.new_empty(2, n)
    with _on(x.device):
        _move_kernel[blocks](
            out, value, scales, place, minus, old, n, R, C, width, *groups, t, step, *key.split(1), CELL=cell,
            KIND=kind, PLACED=placed, BY_HAND=_by_hand(x.device), BLOCK=BLOCK, **EXACT,
        )  # fmt: skip
        try:
            multiply_into(y[0], x[0], tokens[:1], w, scale)
            _write_kernel[blocks](out, place, minus, n, BLOCK=BLOCK)
            multiply_into(y[1], x[1], tokens[-1:], w, scale)
        finally:  # also where memory is out
            if placed:
                _write_kernel[blocks](out, place, old, n, BLOCK=BLOCK)
    return y


@probed_products.register_fake
def _(x, tokens, weight, scale, key, step, kind, t, cell, coded) -> Tensor:
    return x.new_empty(*x.shape[:2], len(weight), dtype=sums_of(x, kind, coded))


def sums_of(x: Tensor, kind: str, coded: bool) -> torch.dtype:
    return (torch.int32 if kind == "int8" else torch.bfloat16) if coded else x.dtype


def rebuilt(weight: Tensor, scale: Tensor, kind: str, shape: torch.Size) -> Store:
    if kind in ("fp32", "bf16"):
        return Float(weight)
    return Fp8(weight, scale, shape) if kind == "fp8" else Integers(weight, scale, shape, int(kind[-1]))


class ProbedLinear(CodeLinear):
    """A linear layer that is given a matrix as it is stored, and a probe's key; or, where there is no such probe, its
    weights as the layer in whose place it is."""

    def __init__(self, layer: Linear, kind: str, t: float, cell: int, dtype: torch.dtype):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight_key, self.weight_step = (nn.Parameter(torch.empty(0), requires_grad=False) for _ in range(2))
        self.kind, self.t, self.cell, self.coded = kind, t, cell, isinstance(layer, CodeLinear)
        self.round_input, self.input_dtype = layer.round_input, dtype

    def forward(self, x: Tensor) -> Tensor:
        if not self.weight_key.numel():
            return CodeLinear.forward(self, x) if self.coded else Linear.forward(self, x)
        flat = x.flatten(1, -2).expand(2, -1, -1)
        tokens = flat[:, :0]
        if self.coded:
            flat, tokens = token_codes(flat, self.kind)
            flat = flat.to(self.weight.dtype)
        elif self.round_input is not None:
            flat = self.round_input(flat)
        y = probed_products(
            flat.contiguous(), tokens, self.weight, self.weight_scale, self.weight_key, self.weight_step, self.kind,
            self.t, self.cell, self.coded,
        )  # fmt: skip
        y = scaled(y, tokens, self.weight_scale) if self.coded and self.kind == "int8" else y
        y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None]
        return y.view(2, *x.shape[1:-1], -1)


# ---------------------------------------------------------------- a model's blocks


class ProbedView:
    """A view that gives ProbedLinear what it wants.  inner: what a view is wrapped in otherwise; keys: those made so
    far, of this model.

    Of a probe by both signs a block's matrix is read as it is stored, `weight_scale` as its scales, `weight_key` and
    `weight_step` as numbers that key its draws; else the matrix as inner has it, and nothing for the other three
    (scales where inner multiplies codes).
    """

    def __init__(self, view: View, inner: View, lm: LanguageModel, zo: SparseZO, keys: dict):
        self.view, self.inner, self.lm, self.keys, self.probes = view, inner, lm, keys, view.probes
        self.none, self.step = torch.empty(0, device=lm.device), None
        self.probing = False
        own = isinstance(view, PerturbedWeights) and view.weights is lm.weights
        if own and isinstance(view.zo, SparseZO) and view.zo.moves is None:
            (query, plus), (other, minus) = view.copies if len(view.copies) == 2 else ((0, 0), (0, 0))
            same = (view.zo.eps, view.zo.cell, view.zo.dtype) == (zo.eps, zo.cell, zo.dtype)
            self.probing = same and query == other and (plus, minus) == (1, -1)

    def read(self, name: str, rows: Tensor | None = None) -> Tensor:
        tensor, _, part = name.partition(".weight_")
        tensor = f"{tensor}.weight" if part else name
        store = self.lm.weights[tensor]
        probed = self.probing and rows is None and tensor.startswith(self.lm.layers) and len(store.shape) == 2
        if not probed:
            coded = part == "scale" and isinstance(self.inner, CodeView)
            return self.inner.read(name, rows) if coded or not part else self.none
        if part == "scale":
            return self.none if isinstance(store, Float) else store.scale
        if part == "step":
            return self.number(self.view.key.step)
        if part == "key":
            return self.key(tensor)
        return store.value if isinstance(store, Float) else store.codes

    def number(self, step: int | Tensor) -> Tensor:
        if self.step is None:
            whole = isinstance(step, Tensor)
            self.step = step if whole else torch.full((1,), step, dtype=torch.int32, device=self.lm.device)
        return self.step

    def key(self, name: str) -> Tensor:
        """Made while kernels are compiled, as nothing can be copied to a GPU while launches are recorded."""
        query, seed = self.view.copies[0][0], self.view.key.seed
        if (name, query, seed) not in self.keys:
            words = as_int32(tensor_id(name), query, seed & LOW, seed >> 32 & LOW)
            self.keys[name, query, seed] = torch.tensor(words, dtype=torch.int32, device=self.lm.device)
        return self.keys[name, query, seed]


def enable_probes_in_place(lm: LanguageModel, zo: SparseZO) -> None:
    """Let the blocks multiply both signs of a probe by one copy of each matrix, where kernels fit all of them."""
    stores = [stored for name, stored in lm.weights.items() if name.startswith(lm.layers) and len(stored.shape) == 2]
    if not all(map(fits, stores)):
        return
    kind, t, keys = _kind(stores[0])[0], zo.eps * math.sqrt(zo.cell), {}
    for path, layer in list(lm.block.named_modules()):
        if isinstance(layer, Linear):
            with torch.device("meta"):
                lm.block.set_submodule(path, ProbedLinear(layer, kind, t, zo.cell, lm.dtype))
    inner = lm.wrap_view
    lm.wrap_view = lambda view: ProbedView(view, inner(view), lm, zo, keys)
