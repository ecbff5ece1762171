"""ElasticZO: a body by forward passes alone, a tail by back-propagation (Sugiura and Matsutani, "ElasticZO: A
Memory-Efficient On-Device Learning with Combined Zeroth- and First-Order Optimization", arXiv 2501.04287).

    g = (L(b + eps u, v) - L(b - eps u, v)) / (2 eps),    b <- b - lr g u                     the body b: MeZO, QuZO
    G = (dL/dv(b + eps u, v) + dL/dv(b - eps u, v)) / 2,  v <- v - tail_rate lr Adam(G)       the tail v

Back-propagation goes through the tail alone, so that only the tail's activations are kept.  Its gradient comes from
the two forwards that the body's estimate makes anyway: G = dL/dv(b, v) + O(eps^2), as the terms of odd order cancel.

That a body by zeroth order has a tail by first order is the paper's, by its abstract.  Ours:
- The tail: the last n blocks, the final norm or head, and the output matrix where it is not the embedding.
- G from the probes' forwards, with no third one.
- Adam (Kingma and Ba 2015; 0.9, 0.999, no decay) for the tail, with a rate that is tail_rate times the body's: --lr 0
  keeps all of it still, and a schedule is one for both.
- The tail is stored as all else is; a step lands on its codes by stochastic rounding.  For a step it has a float32
  copy and a gradient, and for a run Adam's two moments: TAIL_BYTES a weight, beside the activations.
- A tail's gradient is no scalar that could be recorded: a replay computes it again, from the data.

Shape key: P perturbed copies, Q queries, C columns.  Imports model, quant, random_bits and zo_optim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import LanguageModel
from quant import Store, row_chunks
from random_bits import Key, Purpose, bits32, tensor_id
from zo_optim import LossFn, PerturbedWeights

BETA1, BETA2, TINIEST = 0.9, 0.999, 1e-8  # Adam's
TAIL_BYTES = 16  # a weight of the tail: copy, gradient and two moments, float32 each


@dataclass(eq=False)
class Tail:
    """ZO.moves of ElasticZO: no direction moves a tensor of the tail.  Before a step its loss goes through `watch`;
    after it `observe`, which zo_optim.update calls, steps the tail.

    weights: stores by name, the model's; the tail's are written in place.
    """

    weights: dict[str, Store]
    names: frozenset[str]  # the tail's
    rate: float = 3.0  # Adam's over the body's
    copies: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # float32, with the step's gradient
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    steps: int = field(default=0, init=False)  # of Adam

    def __call__(self, name: str, key: Key) -> bool:
        return name not in self.names

    def watch(self, loss_fn: LossFn, probes: int) -> LossFn:
        """The same losses; calls of it add up the tail's mean gradient over a step's probes, of which there are 2 Q.

        loss_fn: a view -> [P] losses; its `parts`, if it has any, add up to them and are gone through one by one.
        """
        parts_of, copies = getattr(loss_fn, "parts", None) or (lambda view: [loss_fn(view)]), {}

        def watched(view: PerturbedWeights) -> Tensor:
            losses = 0.0
            if not copies:  # not before: the loss of a step may be put together during the one before
                copies.update({name: self.weights[name].dequantise().float().clone().requires_grad_()
                               for name in self.names})  # fmt: skip
                self.copies = copies
            with torch.enable_grad(), repeatable(next(iter(self.copies.values())).device):
                for part in parts_of(TailView(view, copies)):
                    (part.sum() / probes).backward()  # frees its activations
                    losses = losses + part.detach()
            return losses

        return watched

    def observe(self, key: Key, projected_grads: Tensor, lr: float) -> None:
        """One step of Adam on the watched gradient.  Where that is not finite, or there is none, nothing changes."""
        grads = {name: copy.grad for name, copy in self.copies.items() if copy.grad is not None}
        self.copies = {}
        if not grads or not all(bool(grad.isfinite().all()) for grad in grads.values()):
            return
        self.steps += 1
        for name, grad in grads.items():
            first, second = self.moments.setdefault(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
            first.lerp_(grad, 1 - BETA1)
            second.lerp_(grad.square(), 1 - BETA2)
            if lr * self.rate:  # adding +0.0 would turn a stored -0.0 into +0.0
                size = (second / (1 - BETA2**self.steps)).sqrt_().add_(TINIEST)
                delta = (first / size).mul_(-lr * self.rate / (1 - BETA1**self.steps))
                land(self.weights[name], delta, key._replace(tensor=tensor_id(name)))


def repeatable(device: torch.device) -> AbstractContextManager:
    """Attention whose backward pass adds in one order, by which a tail's steps come again to the same bits: on a GPU
    the others do not (measured on an H100: fp32 from 700 tokens, bf16 from 2,000 or with a mask; torch's
    use_deterministic_algorithms leaves them as they are)."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def land(store: Store, delta: Tensor, key: Key) -> None:
    """w <- round(w + delta), stochastically; delta of the store's shape or its matrix's, float32."""
    delta = delta.view(store.matrix_shape)
    for rows in row_chunks(store.matrix_shape, store.device):
        index = torch.arange(rows.start, rows.stop, device=store.device)
        bits = bits32(key, Purpose.WEIGHT_ROUNDING, index, delta.shape[1]) if store.rounds else None
        store.add_rounded_(rows, delta[rows], bits)


class TailView:
    """A view whose tail is float copies, [1, *shape] each, that want a gradient."""

    def __init__(self, view: PerturbedWeights, copies: dict[str, Tensor]):
        self.view, self.copies, self.probes = view, copies, view.probes

    def read(self, name: str, rows: Tensor | None = None, as_codes: bool = False) -> Tensor:
        if name not in self.copies:
            return self.view.read(name, rows, as_codes)
        store, copy = self.view.weights[name], self.copies[name]
        if rows is not None:
            return copy.view(store.matrix_shape)[rows][None]
        return copy.view(1, *store.shape).to(torch.float32 if len(store.shape) < 2 else self.view.zo.dtype)


def tail_of(lm: LanguageModel, blocks: int, rate: float) -> Tail:
    """The last blocks and what comes after them.  Raises ValueError for more blocks than there are, and adapters."""
    if lm.adapters is not None:
        raise ValueError(f"ElasticZO's tail is of a model's own weights, and only {lm.adapters.spec} are trained")
    return Tail(lm.weights, tail_names(lm.weights, type(lm), lm.config.num_hidden_layers, blocks), rate)


def tail_names(names: Iterable[str], kind: type[LanguageModel], layers: int, blocks: int) -> frozenset[str]:
    """Of a model's: what is in the last blocks or after them.  Tables, and RoBERTa's norm of them, are before.

    Raises ValueError for more blocks than there are.
    """
    if not 0 <= blocks <= layers:
        raise ValueError(f"ElasticZO's tail (--tail-blocks) has 0 to {layers} blocks of this model, got {blocks}")
    last = tuple(f"{kind.layers}{layer}." for layer in range(layers - blocks, layers))
    before = (kind.layers, kind.embedding, "roberta.embeddings.")
    return frozenset(name for name in names if name.startswith(last) or not name.startswith(before))


def watching(loss_of: Callable[..., LossFn], tail: Tail) -> Callable[..., LossFn]:
    """The same way from a step's examples and its number of queries to its loss, watched."""
    return lambda examples, queries: tail.watch(loss_of(examples, queries), 2 * queries)
