"""A bottleneck adapter in one kernel: h + up(relu(down(h))) reads h twice and writes the result once.

In plain torch h and every product become float32 tensors of h's size, and moving them costs several times as much as
the products, which are of a rank of some 5.  Here a program keeps its rows' low-rank products to itself.  Products are
those of float32 (three of TF32 each).  Imports tensor_train.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from tensor_train import Bottleneck

LARGEST = 64, 256  # rank and bottleneck that a program has room for
ROWS, COLUMNS = 32, 128  # of h, at a time


@triton.jit
def _bottleneck_kernel(
    h, left_d, right_d, bias_d, left_u, right_u, bias_u, y, N, D: tl.constexpr, R_D: tl.constexpr,
    R_U: tl.constexpr, B: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows of one copy.  D: h's width; R_D, R_U: ranks of down and up; B: bottleneck; RANK, WIDTH: room for them.

    What lies beyond a rank or the bottleneck is loaded as 0, which adds nothing: relu(0) is 0.
    """
    copy = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    r, b = tl.arange(0, RANK), tl.arange(0, WIDTH)
    h, y = h + copy * N * D, y + copy * N * D
    left_d, right_d, bias_d = left_d + copy * D * R_D, right_d + copy * R_D * B, bias_d + copy * B
    left_u, right_u, bias_u = left_u + copy * B * R_U, right_u + copy * R_U * D, bias_u + copy * D
    low = tl.zeros([ROWS, RANK], tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        x = tl.load(h + row * D + d[None, :], mask=(row < N) & (d < D)[None, :], other=0).to(tl.float32)
        left = tl.load(left_d + d[:, None] * R_D + r[None, :], mask=(d < D)[:, None] & (r < R_D)[None, :], other=0)
        low = tl.dot(x, left, low, input_precision="tf32x3")
    right = tl.load(right_d + r[:, None] * B + b[None, :], mask=(r < R_D)[:, None] & (b < B)[None, :], other=0)
    middle = tl.dot(low, right, input_precision="tf32x3") + tl.load(bias_d + b, mask=b < B, other=0)[None, :]
    left = tl.load(left_u + b[:, None] * R_U + r[None, :], mask=(b < B)[:, None] & (r < R_U)[None, :], other=0)
    low = tl.dot(tl.maximum(middle, 0), left, input_precision="tf32x3")
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        here = (row < N) & (d < D)[None, :]
        right = tl.load(right_u + r[:, None] * D + d[None, :], mask=(r < R_U)[:, None] & (d < D)[None, :], other=0)
        x = tl.load(h + row * D + d[None, :], mask=here, other=0).to(tl.float32)
        x += tl.dot(low, right, input_precision="tf32x3") + tl.load(bias_u + d, mask=d < D, other=0)[None, :]
        tl.store(y + row * D + d[None, :], x.to(y.dtype.element_ty), mask=here)


@library.custom_op("quzo::bottleneck", mutates_args=())
def bottleneck(
    h: Tensor, left_down: Tensor, right_down: Tensor, bias_down: Tensor, left_up: Tensor, right_up: Tensor,
    bias_up: Tensor,
) -> Tensor:  # fmt: skip
    """h [P, N, D] bf16 or float32 -> the same: h + relu(h left_down right_down + bias_down) left_up right_up + bias_up.

    Each factor is float32 with P first: [P, D, r], [P, r, B], [P, B], [P, B, s], [P, s, D], [P, D].
    """
    (P, N, D), R_D, (_, B, R_U) = h.shape, left_down.shape[-1], left_up.shape
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    rank, width = (max(16, triton.next_power_of_2(n)) for n in (max(R_D, R_U), B))  # 16: the least that tl.dot takes
    factors = (f.contiguous() for f in (left_down, right_down, bias_down, left_up, right_up, bias_up))
    with torch.cuda.device_of(h):
        _bottleneck_kernel[triton.cdiv(N, ROWS), P](
            h.contiguous(), *factors, y, N, D, R_D, R_U, B, RANK=rank, WIDTH=width,
            ROWS=ROWS, COLUMNS=COLUMNS, num_stages=3,
        )  # fmt: skip
    return y


@bottleneck.register_fake
def _(h, left_down, right_down, bias_down, left_up, right_up, bias_up) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


class FusedBottleneck(Bottleneck):
    """A Bottleneck by the kernel, where no gradient is wanted and its sizes fit."""

    def forward(self, h: Tensor) -> Tensor:
        trains = (self.down, self.up)
        fits = all(train.rank and train.rank <= LARGEST[0] for train in trains) and self.up.inputs <= LARGEST[1]
        if torch.is_grad_enabled() or not fits:
            return super().forward(h)
        factors = [factor for train in trains for factor in (*train.sides(), train.bias)]
        y = bottleneck(h.flatten(1, -2), *factors)
        return y.view(len(y), *h.shape[1:])
