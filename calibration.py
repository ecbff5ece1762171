"""Rounding a model's weights so that its layers' outputs stay what they were, with forward passes alone.

GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323).  A layer's output x W^T errs by E|x (W - Q)^T|^2 =
sum over rows of (w - q) H (w - q)^T, with H = E[x^T x] over its inputs.  Columns are rounded one after the other, those
with the largest inputs first; what a column's rounding cost is made good, as far as it can be, by the columns that are
still to come (section 3.3: with U^T U = H^-1 and U upper triangular, w_j+1.. -= (w_j - q_j) / U_jj * U_j,j+1..).

Shape key: R rows, C columns, N tokens.  Imports quant.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from quant import E4M3, INTEGERS, FakeQuantised, Float, Fp8, Integers, encode, group_size, integer_scales

DAMPING = 0.01  # times the mean of H's diagonal, is added to it (the paper's)
CLIPS = 20  # scales that are tried, from a group's largest size down to 0.4 of it
COLUMNS = 64  # at a time: later ones are made good by one product
SEQUENCES = 16  # a forward
ROW = 256  # tokens
MOMENT_BYTES = 2**31  # all H that are held at a time; layers that exceed it wait for another pass


@torch.no_grad()
def calibrate(
    lm, sequences: list[list[int]], weights: str, residual_bits: int = 0, oracle: bool = False,
    device: str | torch.device = "cpu",
) -> None:  # fmt: skip
    """Turn a model's float matrices into codes, in place, as the forward passes of these token sequences would have it.

    lm: a model.LanguageModel whose stores are floats, which may be elsewhere than on the device where all is computed
    and the codes will be: of the floats only a layer at a time is there.  They come in order.  As many as MOMENT_BYTES
    allows share a pass, each with the inputs that it gets from those of earlier passes as they are rounded by then, and
    from those of its own as they were (a pass for each layer is no better: NOTES.md).  Tables that are only looked up
    are rounded to nearest.  The sequences are read a second time, laid end to end in rows of ROW tokens: a first
    token's inputs are like no others', and in short prompts they would count for much (NOTES.md).
    """
    lm.device = torch.device(device)
    row, tokens = min(ROW, lm.config.longest), [token for sequence in sequences for token in sequence]
    sequences = sequences + [tokens[i : i + row] for i in range(0, len(tokens) - row + 1, row)]
    shapes = {name: store.matrix_shape for name, store in lm.weights.items() if len(store.shape) >= 2}
    waiting = [name for name in lm.weights if name in shapes and name not in (lm.embedding, lm.decoder)]
    waiting.append(lm.decoder)
    while waiting:
        names = [waiting.pop(0)]
        size = 8 * shapes[names[0]][1] ** 2
        while waiting and (size := size + 8 * shapes[waiting[0]][1] ** 2) <= MOMENT_BYTES:
            names.append(waiting.pop(0))
        moments = second_moments(lm, sequences, set(names))
        for name in names:
            tensor = lm.weights[name].value.to(device)
            if name in moments:
                store = compensated(tensor, moments.pop(name), weights, residual_bits)
                lm.weights[name] = FakeQuantised.of(store) if oracle else store
            else:
                lm.weights[name] = encode(tensor, weights, residual_bits, oracle)
    for name, store in lm.weights.items():  # vectors, and tables
        if isinstance(store, Float):
            lm.weights[name] = encode(store.value.to(device), weights, residual_bits, oracle)
    lm.format, lm.residual = weights, residual_bits


def second_moments(lm, sequences: list[list[int]], names: set[str]) -> dict[str, Tensor]:
    """H = sum of x^T x over the inputs x [N, C] of the named matrices, as products, [C, C] float64 each."""
    moments: dict[str, Tensor] = {}
    recent: list[str] = []

    def add(name: str, x: Tensor) -> None:
        if name in names:
            rows = x.flatten(0, -2).double()
            moments[name] = rows.T @ rows + moments.get(name, 0)

    def input_of(path: str, x: Tensor) -> Tensor:
        """A block's modules serve all layers: which one it is, the weights say that were read for it."""
        add(next(name for name in reversed(recent) if name.endswith(f"{path}.weight")), x)
        return x

    class Noting:
        probes = 1

        def read(self, name: str, rows: Tensor | None = None) -> Tensor:
            recent.append(name)
            return view.read(name, rows if rows is None else rows.to(lm.weights[name].device)).to(lm.device)

    view, linears = lm.stored_view(), dict(lm.linears())
    before = {path: module.round_input for path, module in linears.items()}
    for path, module in linears.items():
        module.round_input = partial(input_of, path)
    try:
        for tokens in batches(sequences, lm.device):
            add(lm.decoder, lm.hidden(tokens, None, Noting()))
            recent.clear()
    finally:
        for path, module in linears.items():
            module.round_input = before[path]
    return moments


def batches(sequences: list[list[int]], device: str | torch.device) -> Iterable[Tensor]:
    """Sequences of one length at a time, [B, T] int64: padding would be an input too."""
    for _, same in groupby(sorted(sequences, key=len), key=len):
        yield from torch.tensor(list(same), device=device).split(SEQUENCES)


def compensated(tensor: Tensor, moments: Tensor, weights: str, residual_bits: int = 0) -> Integers | Fp8:
    """A float matrix [R, C, ...] as codes, rounded column by column as its inputs' moments [C, C] say."""
    w, moments = tensor.flatten(1).float(), moments.clone()
    importance = moments.diagonal()
    scale = None if weights == "fp8" else searched_scales(w, INTEGERS[weights], importance.float())
    store = encode(tensor, weights, residual_bits, scale=scale)
    largest = 0 if isinstance(store, Fp8) else store.max_code
    unit = (store.scale if isinstance(store, Fp8) else store.spacing(slice(None))).expand_as(w)
    order = importance.argsort(descending=True)
    moments = moments[order][:, order]
    moments.diagonal().add_(DAMPING * importance.mean() + 1e-30)  # or of a layer without inputs, nothing at all
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).float()
    w, unit, codes = w[:, order], unit[:, order], torch.empty_like(w)
    for start in range(0, w.shape[1], COLUMNS):
        end = min(start + COLUMNS, w.shape[1])
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            x = w[:, j] / unit[:, j]
            codes[:, j] = E4M3.round(x, None).float() if weights == "fp8" else x.round().clamp(-largest, largest)
            error = (w[:, j] - codes[:, j] * unit[:, j]) / upper[j, j]
            w[:, j:end] -= error[:, None] * upper[j, j:end]
            errors[:, j - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    codes = torch.empty_like(codes).index_copy_(1, order, codes)
    if isinstance(store, Fp8):
        store.codes.copy_(codes)
    else:
        store.write(slice(None), codes * 2**residual_bits)
    return store


def searched_scales(w: Tensor, bits: int, importance: Tensor) -> Tensor:
    """The scale of each group, [R, G], whose rounding to nearest errs least: sum_j E[x_j^2] (w_j - q_j)^2.

    Clipping a few large weights may leave finer steps to the rest; weighted alike, it does harm (NOTES.md).
    """
    max_code, size = 2 ** (bits - 1) - 1, group_size(bits, w.shape[1])
    padding = (0, -w.shape[1] % size)
    groups = torch.nn.functional.pad(w, padding).unflatten(1, (-1, size))  # [R, G, size]
    weight = torch.nn.functional.pad(importance, padding).view(-1, size)
    largest, best = groups.abs().amax(2), None
    for i in range(CLIPS):
        scale = integer_scales(largest * (1 - 0.6 * i / CLIPS), bits)
        unit = scale.float()[..., None]
        rounded = (groups / unit).round().clamp(-max_code, max_code) * unit
        error = ((rounded - groups).square_() * weight).sum(2)
        if best is None:
            best, least = scale, error
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
