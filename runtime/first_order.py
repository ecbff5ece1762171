"""The first-order baselines that QuZO compares with: back-propagation and AdamW.

fo: the stored floats are the parameters.  fo-ste: quantisation-aware training; every matrix has a float master, which
is read as the nearest point of a grid that stays as it was at the start, and the gradient passes straight through the
rounding (Bengio et al., 2013).  What is saved and tested then are the codes.  The optimiser is torch's own.

Shape key: R rows, C columns, r some of the rows.  Imports quant.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import Float, Store, encode, straight_through


@dataclass
class Master(Store):
    """A float matrix [R, C], fp32 or bf16, read as its nearest point on a fixed grid of codes."""

    value: Tensor
    format: str  # of the codes
    scale: Tensor  # as that format has it

    def __post_init__(self):
        self.describe(self.value, self.value.shape)

    @classmethod
    def of(cls, value: Tensor, format: str, dtype: torch.dtype) -> Master:
        return cls(value.to(dtype), format, encode(value, format).tensors()[".scale"])

    def codes(self, rows: slice | Tensor = slice(None)) -> Store:
        return encode(self.value.detach()[rows], self.format, scale=self.scale[rows])

    def tensors(self) -> dict[str, Tensor]:
        """The codes are saved and hashed."""
        return self.codes().tensors()

    def dequantise(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Rows [r, C] as the codes' float32, with the master's gradient."""
        return straight_through(self.value[rows], self.codes(rows).dequantise())


def make_trainable(weights: dict[str, Float], format: str | None, master: torch.dtype) -> dict[str, Float | Master]:
    """The stores to train: the floats themselves, or with `format` one of codes, masters of the matrices.

    Empties the given dictionary on the way, so that a large model is not held twice.
    """
    trainable = {}
    for name in list(weights):
        stored = weights.pop(name)
        if format is not None and stored.value.ndim == 2:
            stored = Master.of(stored.value, format, master)
        stored.value.requires_grad_()
        trainable[name] = stored
    return trainable


def optimizer(weights: dict[str, Float | Master], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; its decay, where there is any, is for matrices only."""
    groups = [
        {"params": [s.value for s in weights.values() if len(s.shape) == 2], "weight_decay": weight_decay},
        {"params": [s.value for s in weights.values() if len(s.shape) == 1], "weight_decay": 0.0},
    ]
    on_gpu = next(iter(weights.values())).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=lr, fused=on_gpu)  # the other ways keep copies of all parameters


MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # as torch calls them


def save_state(path: Path, optimizer: torch.optim.AdamW, weights: dict[str, Float | Master]) -> str:
    """Write weights and moments, of which training goes on -> the file's SHA-256."""
    tensors = {name: stored.value.detach() for name, stored in weights.items()}
    tensors |= {f"{name}.{of}": optimizer.state[stored.value][of] for name, stored in weights.items() for of in MOMENTS}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_state(path: Path, sha256: str, optimizer: torch.optim.AdamW, weights: dict[str, Float | Master]) -> None:
    """Raises ValueError for another file than save_state wrote."""
    if _sha256(path) != sha256:
        raise ValueError(f"{path} is not what the run wrote: begin a new one")
    tensors = load_file(path, str(next(iter(weights.values())).device))
    for name, stored in weights.items():
        stored.value.data.copy_(tensors[name])
        state = {of: tensors[f"{name}.{of}"] for of in MOMENTS}
        if not optimizer.defaults["fused"]:
            state["step"] = state["step"].cpu()  # where torch keeps it then
        optimizer.state[stored.value] = state


def adamw_step(optimizer: torch.optim.AdamW, losses: Iterable[Tensor], lr: float) -> float:
    """One step down the gradient of the sum of losses (of one micro-batch after the other) -> the sum.  Where that is
    not finite nothing is written."""
    total = 0.0
    for loss in losses:
        loss.backward()  # frees that micro-batch's activations before the next is run
        total += loss.item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(total):
        optimizer.step()
    optimizer.zero_grad()
    return total
