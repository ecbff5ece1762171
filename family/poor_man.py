"""Poor man's training: int8 all the way, by forwards alone.  `python -m family.poor_man` trains the embedded model.

After Zhao, Li, Young and Zhang, "Poor Man's Training on MCUs" (arXiv 2411.05873) and its code: weights are int8 codes c
with a scale s for each output channel, w = s c, inputs of layers are int8 too, and a few layers are trained.  u and v
are random signs, drawn n times for a step (50 to 60 in the paper) and again when they are needed, never kept.

Weight perturbation.  A probe moves every code by one, on one side alone:

    g = L(s (c + u)) - L(s c),    E[g u] = dL/dc = s dL/dw    but for third derivatives, as E[u_i u_j u_k] = 0

SGD is w <- w - lr dL/dw, which is c <- c - lr / s dL/dw.  So with dL/dw = E[g u] / s, and rounded onto codes,

    c <- SR(c - lr / s^2 * 1 / n * sum of g u)        (1 / s^2 of each channel, as in the paper; SR: quant.py)

Node perturbation.  What a layer adds up, y = x W^T, moves by 5 spacings q of its own int8 grid at every token t, in all
such layers at once.  Each example b has its own loss L_b and is judged by that alone; the rest is a local product:

    g_b = L_b(y + 5 q v) - L_b(y),    dy_t = 1 / n * sum of g_b v_t / (5 q_t B), t of example b,    dL/dW = dy^T x

A number g_b tells of T x O unknowns a layer, the tokens of an example and the layer's outputs, and a step has B n of
them; g above tells of O x I unknowns a layer, and a step has n.  The paper mixes the two, layer by layer.

Ours: steps land by stochastic rounding.  A code that is at the edge, 127, is probed at 126 and 127, so that its mean
step is half of SGD's.  y is the float32 that the next input is rounded from, and moves on its int8 grid beside it.

Shape key: B examples, R rows of T tokens, N tokens, I in, O out.  Imports data.scoring, model, quant, random_bits,
zo_optim, and of runtime config, flags and problem.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.scoring import Batch, Encoded, collate, option_scores
from model import LanguageModel, Linear
from quant import CODES, COUNTED, Integers, Store, row_chunks, token_codes
from random_bits import Key, Purpose, bits32, permutation, tensor_id
from runtime.config import parse, validate
from runtime.flags import Config
from runtime.problem import Problem, Quality, prepare
from zo_optim import ZO, LossFn, PerturbedWeights, zo_step

LAYERS = ("self_attn.o_proj", "mlp.down_proj")  # of each block
NODES = {"weight": (), "node": LAYERS, "mixed": ("mlp.down_proj",)}  # which of them by node perturbation


def random_signs(key: Key, rows: Tensor, columns: int) -> Tensor:
    """+1 or -1, for chosen rows [r] int64: [r, columns] float32."""
    return (bits32(key, Purpose.DIRECTION, rows, columns) >> 31 | 1).float()


def land(store: Store, chunk: slice, delta: Tensor, key: Key) -> Tensor:
    """w <- SR(w + delta), in some rows -> quant.landing_counts."""
    rows = torch.arange(chunk.start, chunk.stop, device=store.device)
    return store.add_rounded_(chunk, delta, bits32(key, Purpose.WEIGHT_ROUNDING, rows, delta.shape[1]))


# ---------------------------------------------------------------- weight perturbation: an estimator for zo_step


@dataclass(frozen=True)
class CodeZO(ZO):
    """Every code of what `moves` names by +1 or -1, on one side, of int8 stores."""

    eps: float = 0.5  # zo_step divides a difference by 2 eps, and here that is g

    def losses(self, weights: dict[str, Store], loss_fn: LossFn, key: Key, queries: range) -> Tensor:
        """L(s (c + u)) and L(s c) of each query in turn, [2Q]; the latter is computed once."""
        stored, n = loss_fn(self.stored_view(weights, self.dtype)), self.probes_per_forward or len(queries)
        at_once = [[(query, 1) for query in queries[i : i + n]] for i in range(0, len(queries), n)]
        moved = torch.cat([torch.atleast_1d(loss_fn(PerturbedWeights(weights, key, self, p, len(p)))) for p in at_once])
        return torch.stack((moved, stored.expand_as(moved)), 1).flatten()

    def direction(self, key: Key, shape: tuple[int, int], rows: Tensor, rounding: Purpose) -> Tensor:
        return random_signs(key, rows, shape[1])

    def perturbed(
        self, store: Store, key: Key, signs: list[int], dtype: torch.dtype, rows: Tensor | None = None
    ) -> Tensor:
        rows = torch.arange(store.matrix_shape[0], device=store.device) if rows is None else rows
        u = self.direction(key, store.matrix_shape, rows, Purpose.PROBE_ROUNDING)
        codes = [(store.code(rows) + sign * u).clamp_(-store.max_code, store.max_code) for sign in signs]
        return torch.stack([code if dtype in CODES else code * store.spacing(rows) for code in codes]).to(dtype)

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        """w <- SR(w + sum of factor_q u_q / s); in codes, which add_rounded_ counts in, it is / s^2."""
        counts = torch.zeros(COUNTED, dtype=torch.int64, device=factors.device)
        for name, store in weights.items():
            key, shape = key._replace(tensor=tensor_id(name)), store.matrix_shape
            for chunk in row_chunks(shape, store.device):
                rows = torch.arange(chunk.start, chunk.stop, device=store.device)
                step = torch.zeros(len(rows), shape[1], device=store.device)
                for query, factor in enumerate(factors):
                    step += self.direction(key._replace(query=query), shape, rows, Purpose.UPDATE_ROUNDING) * factor
                counts += land(store, chunk, step / store.spacing(chunk), key)
        return counts


# ---------------------------------------------------------------- node perturbation: a step of its own


class Node(NamedTuple):
    """A layer in one batch."""

    x: Tensor  # [N, I]: its input as it is multiplied, rounded
    length: Tensor  # [N, 1]: 5 q
    example: Tensor  # [N] int64: whose token it is; of padding, and of zeros, B


def losses_with(
    lm: LanguageModel, batch: Batch, names: list[str], act: Callable[[str, Linear, Tensor, Tensor], Tensor]
) -> Tensor:
    """L_b of each example, [B] float32, where y of the named weights' layers is act(name, layer, x, y).

    One block's modules serve all layers, one after the other: so their calls are counted.
    """
    calls = Counter()

    def hook(path: str, layer: Linear, args: tuple[Tensor], y: Tensor) -> Tensor:
        name = f"{lm.layers}{calls[path]}.{path}.weight"
        calls[path] += 1
        return act(name, layer, args[0], y) if name in names else y

    handles = [layer.register_forward_hook(partial(hook, path)) for path, layer in lm.linears()]
    try:
        scores, _ = option_scores(lm, batch, lm.stored_view())
    finally:
        for handle in handles:
            handle.remove()
    return F.cross_entropy(scores[0], batch.labels, reduction="none")


def example_of(batch: Batch) -> Tensor:
    """Whose each token is, [R, T] int64, B for padding; several examples may share a row."""
    B = len(batch.labels)
    text = torch.zeros_like(batch.tokens) if batch.branch is None else batch.branch[..., 0]
    owners = batch.tokens.new_zeros(len(text), int(text.max()) + 1)
    owners[batch.row, text[batch.row, batch.at]] = batch.owner // (len(batch.lengths) // B)
    return owners.gather(1, text).masked_fill(batch.mask == 0, B)


@torch.no_grad()
def node_gradients(
    lm: LanguageModel, batch: Batch, names: list[str], key: Key, draws: int, codes: float = 5.0
) -> tuple[dict[str, Tensor], Tensor]:
    """-> dL/dW of each named weight, [O, I] float32, and L, by draws + 1 forwards.  codes: y's move, in q."""
    nodes: dict[str, Node] = {}
    example = example_of(batch)

    def note(name: str, layer: Linear, x: Tensor, y: Tensor) -> Tensor:
        x = x.flatten(1, -2)
        x = (x if layer.round_input is None else layer.round_input(x))[0]
        whose = example if y.ndim == 4 else example[batch.row, batch.at]  # the last block goes on with these alone
        whose = whose.masked_fill(~y[0].any(-1), len(batch.labels))  # what is all zeros has no grid to move on
        nodes[name] = Node(x, codes * token_codes(y[0].flatten(0, -2), "int8")[1], whose.flatten())
        return y

    def v(name: str, query: int) -> Tensor:
        """[N, O]; in the stream of the weight, which is not probed itself."""
        rows = torch.arange(len(nodes[name].x), device=lm.device)
        return random_signs(key._replace(query=query, tensor=tensor_id(name)), rows, len(lm.weights[name].codes))

    stored = losses_with(lm, batch, names, note)
    dy = {name: torch.zeros_like(v(name, 0)) for name in names}
    for query in range(draws):
        moved = losses_with(lm, batch, names, lambda name, _, x, y, query=query: (
            y + (nodes[name].length * v(name, query)).view_as(y)
        ))  # fmt: skip
        g = moved - stored
        g = F.pad(g.where(g.isfinite(), 0.0), (0, 1))  # of B 0
        for name, node in nodes.items():
            dy[name] += g[node.example, None] * v(name, query) / (node.length * draws * len(stored))
    return {name: dy[name].T @ node.x for name, node in nodes.items()}, stored.mean()


def node_step(lm: LanguageModel, batch: Batch, names: list[str], key: Key, draws: int, lr: float) -> Tensor:
    """W <- SR(W - lr dL/dW) -> L before it."""
    gradients, loss = node_gradients(lm, batch, names, key, draws)
    for name, gradient in gradients.items():
        store = lm.weights[name]
        for chunk in row_chunks(store.matrix_shape, store.device):
            land(store, chunk, -lr * gradient[chunk], key._replace(tensor=tensor_id(name)))
    return loss


# ---------------------------------------------------------------- runs


def weights_of(lm: LanguageModel, paths: tuple[str, ...]) -> list[str]:
    """The names of these linear layers' weights, in every block.  Raises ValueError where one has no int8 codes."""
    names = [f"{lm.layers}{i}.{path}.weight" for path in paths for i in range(lm.config.num_hidden_layers)]
    for name in names:
        if not isinstance(lm.weights.get(name), Integers) or lm.weights[name].bits != 8:
            raise ValueError(f"poor man's training is for int8 codes, and {name} has none")
    return names


def batches(problem: Problem, c: Config) -> Iterator[list[Encoded]]:
    """Endless, in train.py's order."""
    n = len(problem.train)
    order = (problem.train[i] for epoch in count() for i in permutation(c.seed, epoch, n).tolist())
    while True:
        yield list(islice(order, c.batch_size))


def run(problem: Problem, c: Config, steps: int, draws: int, lr: float, nodes: tuple[str, ...]) -> int:
    """Train LAYERS, `nodes` of them by node perturbation and the others by weight perturbation -> forwards."""
    lm, by_node = problem.lm, weights_of(problem.lm, nodes)
    by_weight = weights_of(lm, tuple(path for path in LAYERS if path not in nodes))
    zo = CodeZO(queries=draws, dtype=lm.dtype, moves=lambda name, key: name in by_weight)
    for step, examples in enumerate(islice(batches(problem, c), steps)):
        if by_weight:
            zo_step(lm.weights, problem.loss_fn(c.micro_batch_size)(examples), Key(c.seed, step), zo, lr)
        if by_node:
            node_step(lm, collate(examples, problem.pad, lm.device), by_node, Key(c.seed, step), draws, lr)
    return steps * (draws + 1) * (bool(by_weight) + bool(by_node))


def trained(method: str, steps: int, draws: int, lr: float, flags: list[str]) -> tuple[Quality, Quality, int]:
    """One run -> dev before and after, and forwards.  flags: train.py's."""
    if steps < 1 or draws < 1 or not 0 <= lr < math.inf:
        raise ValueError(f"no training: {steps} steps, {draws} draws, lr {lr}")
    c = parse(["--weights", "int8", "--activations", "int8", "--no-compile", *flags])
    validate(c)
    problem, _ = prepare(c)
    if len(problem.parts) > 1 or problem.task.loss != "options":
        raise ValueError(f"one task is needed that has a loss for each example, got --task {c.task}")
    before = problem.quality(problem.dev)
    forwards = run(problem, c, steps, draws, lr, NODES[method])
    return before, problem.quality(problem.dev), forwards


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m family.poor_man", description="Poor man's training of a LLaMA.  Flags of train.py may follow, such "
        "as --model, --task, --batch-size and --seed.", allow_abbrev=False
    )  # fmt: skip
    parser.add_argument("--method", nargs="+", choices=NODES, default=list(NODES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--draws", type=int, default=50, help="n: forwards of a step but one")
    parser.add_argument("--lr", type=float, default=0.05)
    args, flags = parser.parse_known_args(argv)
    print(f"{'method':8}{'forwards':>10}{'dev loss':>20}{'accuracy':>18}")
    for method in args.method:
        try:
            was, now, forwards = trained(method, args.steps, args.draws, args.lr, flags)
        except ValueError as error:
            parser.error(str(error))
        print(f"{method:8}{forwards:10}{was.loss:12.4f} ->{now.loss:7.4f}{was.metric:11.3f} ->{now.metric:6.3f}")


if __name__ == "__main__":
    main()
