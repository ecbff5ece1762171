"""A bottleneck adapter in one kernel: h + up(relu(down(h))) reads h twice and writes the result once.

In plain torch h and every product become float32 tensors of h's size, and moving them costs several times as much as
the products, which are of a rank of some 5: too few for tensor cores.  Here a program keeps its rows' low-rank products
to itself.  Imports model and tensor_train.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library, nn

from model import LanguageModel, View
from tensor_train import Bottleneck, Spec, TensorTrain, sides

LARGEST = 16, 256  # rank and bottleneck that a program has room for
ROWS, COLUMNS = 16, 64  # of h, at a time


@triton.jit
def _bottleneck_kernel(
    h, left_d, right_d, bias_d, left_u, right_u, bias_u, y, N, D: tl.constexpr, R_D: tl.constexpr,
    R_U: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows of one copy.  D: h's width; R_D, R_U: ranks of down and up; B: bottleneck; WIDTH: room for it.

    Sums are a column's at first, of each rank, and only then a row's.  What lies beyond the bottleneck is loaded as 0,
    which adds nothing: relu(0) is 0.
    """
    copy = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    b = tl.arange(0, WIDTH)
    h, y = h + copy * N * D, y + copy * N * D
    left_d, right_d, bias_d = left_d + copy * R_D * D, right_d + copy * R_D * B, bias_d + copy * B
    left_u, right_u, bias_u = left_u + copy * R_U * B, right_u + copy * R_U * D, bias_u + copy * D
    sums = ()
    for _ in tl.static_range(R_D):
        sums = sums + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        x = tl.load(h + row * D + d[None, :], mask=(row < N) & (d < D)[None, :], other=0).to(tl.float32)
        more = ()
        for r in tl.static_range(R_D):
            more = more + (sums[r] + x * tl.load(left_d + r * D + d, mask=d < D, other=0)[None, :],)
        sums = more
    middle = tl.zeros([ROWS, WIDTH], tl.float32) + tl.load(bias_d + b, mask=b < B, other=0)[None, :]
    for r in tl.static_range(R_D):
        middle += tl.sum(sums[r], 1)[:, None] * tl.load(right_d + r * B + b, mask=b < B, other=0)[None, :]
    middle, low = tl.where(middle < 0, 0.0, middle), ()  # on a GPU tl.maximum would make NaN 0
    for r in tl.static_range(R_U):
        low = low + (tl.sum(middle * tl.load(left_u + r * B + b, mask=b < B, other=0)[None, :], 1),)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        here = (row < N) & (d < D)[None, :]
        z = tl.load(h + row * D + d[None, :], mask=here, other=0).to(tl.float32)
        z += tl.load(bias_u + d, mask=d < D, other=0)[None, :]
        for r in tl.static_range(R_U):
            z += low[r][:, None] * tl.load(right_u + r * D + d, mask=d < D, other=0)[None, :]
        tl.store(y + row * D + d[None, :], z.to(y.dtype.element_ty), mask=here)


@library.custom_op("quzo::bottleneck", mutates_args=())
def bottleneck(
    h: Tensor, left_down: Tensor, right_down: Tensor, bias_down: Tensor, left_up: Tensor, right_up: Tensor,
    bias_up: Tensor,
) -> Tensor:  # fmt: skip
    """h [P, N, D], any float dtype -> the same: h + relu(h left_down^T right_down + bias_down) left_up^T right_up +
    bias_up.

    Each factor is float32 with P first: [P, r, D], [P, r, B], [P, B], [P, s, B], [P, s, D], [P, D].
    """
    (P, N, D), R_D, (_, R_U, B) = h.shape, left_down.shape[1], left_up.shape
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    factors = (f.contiguous() for f in (left_down, right_down, bias_down, left_up, right_up, bias_up))
    with torch.cuda.device_of(h):
        _bottleneck_kernel[triton.cdiv(N, ROWS), P](
            h.contiguous(), *factors, y, N, D, R_D, R_U, B, WIDTH=triton.next_power_of_2(B), ROWS=ROWS, COLUMNS=COLUMNS
        )
    return y


@bottleneck.register_fake
def _(h, left_down, right_down, bias_down, left_up, right_up, bias_up) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


class FusedBottleneck(Bottleneck):
    """A Bottleneck by the kernel, where no gradient is wanted.

    Parameters more: down.left [r, D], down.right [r, B], up.left [s, B] and up.right [s, D], both trains' sides, the
    left ones transposed (FactoredView).
    """

    def __init__(self, width: int, spec: Spec):
        super().__init__(width, spec)
        for train in (self.down, self.up):
            train.left = nn.Parameter(torch.empty(train.rank, train.inputs))
            train.right = nn.Parameter(torch.empty(train.rank, train.outputs))

    def forward(self, h: Tensor) -> Tensor:
        down, up = self.down, self.up
        if torch.is_grad_enabled() or len(h) != len(up.bias):
            return super().forward(h)
        y = bottleneck(h.flatten(1, -2), down.left, down.right, down.bias, up.left, up.right, up.bias)
        return y.view(len(y), *h.shape[1:])


class FactoredView:
    """A view that gives FusedBottleneck its trains' sides: cores are multiplied for all layers at once, since a layer's
    products are so small that launching them would take as long as the kernel.

    inner: what a view is wrapped in otherwise.  trains: by path in a block.
    """

    def __init__(self, inner: View, lm: LanguageModel, trains: dict[str, TensorTrain]):
        self.inner, self.lm, self.trains, self.probes = inner, lm, trains, inner.probes
        self.none, self.sides = torch.empty(1, 0, 0, device=lm.device), {}

    def read(self, name: str, rows: Tensor | None = None) -> Tensor:
        path, _, part = name.rpartition(".")
        layer, _, path = path.removeprefix(self.lm.layers).partition(".")
        if part not in ("left", "right") or path not in self.trains:
            return self.inner.read(name, rows)
        if torch.is_grad_enabled():
            return self.none
        if path not in self.sides:
            self.sides[path] = self.multiplied(path)
        return self.sides[path][part == "right"][int(layer)]

    def multiplied(self, path: str) -> tuple[Tensor, Tensor]:
        """Of all layers, Left^T [L, P, r, I] and Right [L, P, r, O]."""
        train, layers = self.trains[path], range(self.lm.config.num_hidden_layers)
        cores = [torch.stack([self.inner.read(f"{self.lm.layers}{i}.{path}.cores.{at}") for i in layers])
                 for at in range(len(train.cores))]  # fmt: skip
        left, right = sides([core.flatten(0, 1) for core in cores], train.split)
        return tuple(side.contiguous().unflatten(0, (len(layers), -1)) for side in (left.mT, right))


def enable_fused_bottlenecks(lm: LanguageModel) -> None:
    """Let a model's bottleneck adapters run by the kernel, if it has any and their sizes fit."""
    layers = {path: layer for path, layer in lm.linears() if type(getattr(layer, "adapter", None)) is Bottleneck}
    trains = {f"{path}.adapter.{part}": layer.adapter.get_submodule(part)
              for path, layer in layers.items() for part in ("down", "up")}  # fmt: skip
    fit = all(train.rank and train.rank <= LARGEST[0] for train in trains.values())
    if not trains or not fit or lm.adapters.spec.bottleneck > LARGEST[1]:
        return
    for layer in layers.values():
        with torch.device("meta"):
            layer.adapter = FusedBottleneck(layer.adapter.down.inputs, lm.adapters.spec)
    inner = lm.wrap_view
    lm.wrap_view = lambda view: FactoredView(inner(view), lm, trains)
