"""family/poor_man.py: both estimators against autograd on the straight-through float model, and what they write.

Statistical bounds are 5 standard deviations, from exact sums or derived.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers import shortened, tiny_llama
from oracles import gaussian
from torch import Tensor

import train
from data.scoring import BatchLoss, Encoded, collate
from family.poor_man import (
    CodeZO,
    batches,
    example_of,
    main,
    node_gradients,
    node_step,
    random_signs,
    trained,
    weights_of,
)
from model import LanguageModel, create
from quant import Float, Integers, StoredWeights, encode, quantise_tokens, straight_through
from random_bits import Key, Purpose, tensor_id
from runtime.checkpoints import weights_sha256
from runtime.config import parse
from runtime.problem import prepare
from zo_optim import PerturbedWeights, zo_step

KEY = Key(seed=3, step=4)

# ---------------------------------------------------------------- weight perturbation: one small layer


@dataclass
class Layer:
    """y = x W^T with W of 3 x 4 codes and x of 8 tokens, int8 too; the loss is (y - 1)^2 / 2, without a third
    derivative.  Two of the codes may be at the edge."""

    at_edge: bool

    def __post_init__(self):
        self.x = quantise_tokens(gaussian(8, 4, seed=1), "int8")
        self.store = Integers.encode(gaussian(3, 4), 8, scale=torch.tensor([[0.03], [0.04], [0.05]]))
        assert self.store.codes.abs().max() < 127
        if self.at_edge:
            self.store.codes[0, 1], self.store.codes[2, 3] = 127, -127

    def loss(self, w: Tensor) -> Tensor:
        return ((self.x.to(w.dtype) @ w.T - 1).square() / 2).sum()

    def loss_fn(self, view) -> Tensor:
        return torch.stack([self.loss(w.double()) for w in view.read("w")])

    def weight(self, codes: Tensor) -> Tensor:
        return codes.double() * self.store.scale.double()

    def mean(self) -> Tensor:
        """What g u is on average: dL/dc = s dL/dw by autograd; of codes at the edge, which are probed at 126 and 127 as
        if they were at 126.5, a half."""
        codes = self.store.codes.double()
        edge = codes.abs() == 127
        w = self.weight(torch.where(edge, codes.sign() * 126.5, codes)).requires_grad_()
        self.loss(w).backward()
        return torch.where(edge, 0.5, 1.0) * w.grad * self.store.scale

    def differences(self) -> tuple[Tensor, Tensor]:
        """All u [4096, 3, 4], and L(s (c + u)) - L(s c) of each, codes held inside the range."""
        u = 1 - 2.0 * (torch.arange(4096)[:, None] >> torch.arange(12) & 1).double().view(-1, 3, 4)
        moved = [self.loss(self.weight((self.store.codes + of_one).clamp(-127, 127))) for of_one in u]
        return u, torch.stack(moved) - self.loss(self.weight(self.store.codes))


@pytest.mark.parametrize("at_edge", [False, True])
def test_the_mean_over_all_signs_is_the_gradient(at_edge):
    """To float64's rounding."""
    layer = Layer(at_edge)
    u, g = layer.differences()
    torch.testing.assert_close((g[:, None, None] * u).mean(0), layer.mean(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("at_edge", [False, True])
def test_a_step_is_that_of_sgd(at_edge):
    """The mean of 2,000 draws is within 5 of its deviations, known from all signs; and codes move by -lr / s^2 of it,
    rounded: by less than one code more or less."""
    layer, lr, Q = Layer(at_edge), 2e-2, 2000
    before, want, (_, g) = layer.store.codes.clone(), layer.mean(), layer.differences()
    step = zo_step({"w": layer.store}, layer.loss_fn, KEY, CodeZO(queries=Q), lr)
    key = KEY._replace(tensor=tensor_id("w"))
    u = torch.stack([random_signs(key._replace(query=query), torch.arange(3), 4) for query in range(Q)]).double()
    mean = (step.projected_grads[:, None, None] * u).mean(0)
    deviation = ((g.square().mean() - want.square()) / Q).sqrt()
    assert ((mean - want).abs() < 5 * deviation).all() and want.abs().max() > 20 * deviation.max()
    moves = -lr / layer.store.scale.double().square() * mean
    assert ((layer.store.codes - (before + moves).clamp(-127, 127)).abs() < 1).all()
    assert (moves.abs() > 2).sum() > 6 and not torch.equal(before + moves.round(), layer.store.codes.double())


def test_probes():
    """Every code one more or less, none beyond 127; rows alone are the same, and so are codes; the other side is the
    stored weights, once; and u is balanced."""
    store = encode(gaussian(40, 300), "int8")
    codes, zo, losses = store.codes.float(), CodeZO(queries=5, probes_per_forward=2), []
    view = PerturbedWeights({"w": store}, KEY, zo, [(2, 1)], 1)
    u = random_signs(KEY._replace(query=2, tensor=tensor_id("w")), torch.arange(40), 300)
    assert set(u.unique().tolist()) == {-1.0, 1.0} and u.sum().abs() < 5 * u.numel() ** 0.5
    want = (codes + u).clamp(-127, 127)
    assert ((want - codes).abs() <= 1).all() and (want == codes).sum() < 40 <= (codes.abs() == 127).sum()
    assert torch.equal(view.read("w")[0], want * store.scale)
    rows = torch.tensor([7, 3, 7])
    assert torch.equal(view.read("w", rows)[0], (want * store.scale)[rows])
    assert torch.equal(view.read("w", as_codes=True)[0], want.to(torch.int8))

    def loss_fn(view) -> Tensor:
        losses.append(view.read("w").sum((1, 2)))
        return losses[-1]

    step = zo_step({"w": store}, loss_fn, KEY, zo, lr=0.0)
    assert [len(of_view) for of_view in losses] == [1, 2, 2, 1]  # the stored ones, then 5 queries
    assert step.plus.tolist() == torch.cat(losses[1:]).tolist() and step.minus.tolist() == losses[0].tolist() * 5
    assert torch.equal(step.projected_grads, step.plus - step.minus) and torch.equal(store.codes.float(), codes)


# ---------------------------------------------------------------- node perturbation: a small language model

OF_LAST, OF_FIRST = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"
SMALL = tiny_llama(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)


def small() -> LanguageModel:
    lm = create(SMALL)
    lm.weights = {n: encode(s.value * (8 if s.value.ndim == 2 else 1), "int8") for n, s in lm.weights.items()}
    lm.format = "int8"
    return lm


def examples(lengths: list[int], answers: list[list[int]]) -> list[Encoded]:
    """Each of a token of its own, so that it shows whose a token is."""
    return [Encoded([[3 + i] * n], answers, n - 1, i % 2) for i, n in enumerate(lengths)]


def mixed_examples() -> list[Encoded]:
    tokens = torch.randint(3, 97, (6, 5), generator=torch.Generator().manual_seed(2)).tolist()
    return [Encoded([t[: 3 + i % 3]], [[17], [42]], 2 + i % 3, i % 2) for i, t in enumerate(tokens)]


class Seen(NamedTuple):
    """By autograd: of a weight dL/dW, and of each example at its real tokens x [T, I] as it is multiplied, dL_b/dy
    [T, O] and a spacing of y's int8 grid [T, 1]."""

    gradient: Tensor
    examples: list[tuple[Tensor, Tensor, Tensor]]


def autograd(lm: LanguageModel, of_examples: list[Encoded], names: list[str]) -> dict[str, Seen]:
    """Of the straight-through float model, whose weights are what the codes stand for."""
    codes, calls, seen = lm.weights, Counter(), {}
    lm.weights = {n: Float(s.dequantise().clone().view(s.shape).requires_grad_()) for n, s in codes.items()}

    def note(path: str, layer, args, y: Tensor) -> None:
        y.retain_grad()
        x = args[0] if layer.round_input is None else layer.round_input(args[0])
        seen[f"model.layers.{calls[path]}.{path}.weight"] = x[0].detach(), y
        calls[path] += 1

    paths = {name.split(".", 3)[3].removesuffix(".weight") for name in names}
    handles = [lm.block.get_submodule(path).register_forward_hook(partial(note, path)) for path in paths]
    BatchLoss.of(lm, of_examples, 0, 8)(lm.stored_view()).sum().backward()
    for handle in handles:
        handle.remove()
    found, B = {}, len(of_examples)
    for name in names:
        x, y = seen[name]
        dy, q = y.grad[0] * B, y[0].detach().abs().amax(-1, keepdim=True) / 127
        at = [b if x.ndim == 3 else slice(b, b + 1) for b in range(B)]  # the last block has one token of each alone
        real = [slice(e.width if x.ndim == 3 else 1) for e in of_examples]
        parts = [tuple(of[a][r] for of in (x, dy, q)) for a, r in zip(at, real, strict=True)]
        found[name] = Seen(lm.weights[name].value.grad, parts)
    lm.weights = codes
    return found


def eighths(x: Tensor) -> Tensor:
    return straight_through(x, (8 * x).round() / 8)


@pytest.mark.parametrize("rounding, names", [(None, [OF_LAST, OF_FIRST]),
                                             pytest.param(eighths, [OF_LAST], marks=pytest.mark.full)])  # fmt: skip
def test_node_perturbation_estimates_the_gradient(rounding, names):
    """The mean of 800 draws, element by element, within 5 deviations.

    To first order g_b is the sum of a_to v_to over all that moves, a = dL_b/dy * length; an element's estimate is
    1 / B sum over b, t of g_b v_to x_ti / length_t, and so its variance 1 / B^2 sum over b of
    [sum a^2 * sum_t (x_ti / length_t)^2 - 2 sum_t (x_ti dy_to)^2 + (sum_t x_ti dy_to)^2].
    Probes are of a tenth of a spacing, so that third derivatives do not count.  Inputs are rounded coarsely, but none
    after a probe, or the loss would move by jumps.
    """
    lm, draws, codes = small(), 800, 0.1
    for _, layer in lm.linears():
        layer.round_input = rounding
    of_examples = mixed_examples()
    want = autograd(lm, of_examples, names)
    found, loss = node_gradients(lm, collate(of_examples, 0, lm.device), names, KEY, draws, codes)
    assert loss == pytest.approx(BatchLoss.of(lm, of_examples, 0, 8)(lm.stored_view()).item(), rel=1e-6)
    B, squares = len(of_examples), [0.0] * len(of_examples)  # of a
    for b in range(B):
        squares[b] = sum((dy * q * codes).square().sum() for _, dy, q in (want[name].examples[b] for name in names))
    for name in names:
        variance = torch.zeros_like(found[name])
        for of_example, (x, dy, q) in zip(squares, want[name].examples, strict=True):
            variance += of_example * (x / (q * codes)).square().sum(0)
            variance += -2 * dy.square().T @ x.square() + (dy.T @ x).square()
        error = found[name] - want[name].gradient
        assert (error.abs() <= 5 * (variance / B**2 / draws).sqrt()).all(), name
        assert want[name].gradient.norm() > 1.5 * error.norm(), name


@pytest.mark.parametrize("lengths, answers, rows", [
    ([4, 9, 6], [[17], [42]], 3),
    ([40, 20, 15, 38, 22, 30], [[17], [42]], 3),
    ([40, 20, 15, 38, 22, 12], [[17, 18], [42]], 3),
    ([4, 9, 6], [[17, 18], [42]], 3),
], ids=["a row each", "packed", "packed, with options of their own", "options of their own"])  # fmt: skip
def test_whose_a_token_is(lengths, answers, rows):
    of_examples = examples(lengths, answers)
    if len(answers[0]) > 1:
        of_examples = [Encoded([e.sequences[0] + a for a in answers], answers, -1, e.label) for e in of_examples]
    batch = collate(of_examples, 0, torch.device("cpu"))
    assert len(batch.tokens) == rows
    found, prompt = example_of(batch), (batch.tokens >= 3) & (batch.tokens < 3 + len(lengths)) & (batch.mask > 0)
    assert torch.equal(found[prompt], batch.tokens[prompt] - 3) and int(prompt.sum()) == sum(lengths)
    assert (found[batch.mask == 0] == len(lengths)).all() and (found[batch.mask > 0] < len(lengths)).all()


def test_no_hook_stays_and_an_error_leaves_none(monkeypatch):
    lm, batch = small(), collate(mixed_examples(), 0, torch.device("cpu"))
    tokens = torch.arange(3, 9)[None]
    before = lm(tokens)
    node_gradients(lm, batch, [OF_LAST, OF_FIRST], KEY, 2)
    assert torch.equal(lm(tokens), before)
    lm.weights.pop("model.norm.weight")
    with pytest.raises(KeyError):
        node_gradients(lm, batch, [OF_LAST], KEY, 1)
    assert not [layer for _, layer in lm.linears() if layer._forward_hooks]


def test_a_layer_that_adds_up_zeros_is_left_alone():
    """Its grid has no spacing, while another layer changes the losses."""
    lm = small()
    lm.weights[OF_FIRST].codes.zero_()
    found, _ = node_gradients(lm, collate(mixed_examples(), 0, lm.device), [OF_LAST, OF_FIRST], KEY, 2)
    assert not found[OF_FIRST].any() and found[OF_LAST].any()


def test_an_infinite_loss_counts_as_no_difference():
    """Of an example's whose options' logits are not finite, in every draw."""
    lm = small()
    lm.weights["lm_head.weight"].scale[42] = torch.inf
    found, loss = node_gradients(lm, collate(mixed_examples(), 0, lm.device), [OF_LAST], KEY, 2)
    assert not loss.isfinite() and not found[OF_LAST].any()


# ---------------------------------------------------------------- what is written


def moved(lm: LanguageModel, lr: float, by_node: bool) -> set[str]:
    """The tensors that three steps on two layers change."""
    names, before = [OF_LAST, OF_FIRST], {n: weights_sha256({n: s}) for n, s in lm.weights.items()}
    for step in range(3):
        key = Key(1, step)
        if by_node:
            node_step(lm, collate(mixed_examples(), 0, lm.device), names, key, 3, lr)
        else:
            zo = CodeZO(queries=3, moves=lambda name, key: name in names)
            zo_step(lm.weights, BatchLoss.of(lm, mixed_examples(), 0, 8), key, zo, lr)
    return {n for n, s in lm.weights.items() if weights_sha256({n: s}) != before[n]}


@pytest.mark.parametrize("by_node", [False, True])
def test_a_rate_of_0_leaves_every_bit_and_others_the_named_layers(by_node):
    lm = small()
    lm.round_inputs(lambda x: quantise_tokens(x, "int8"))
    assert moved(lm, 0.0, by_node) == set()
    assert moved(lm, 1e-2, by_node) == {OF_LAST, OF_FIRST}


def test_node_steps_are_sgd_rounded_onto_codes():
    """-lr dL/dW / s codes, less than one more or less; of many elements the rounding adds up to nothing, within 5 of
    its deviations, a half a code each at most."""
    lm, lr, batch = small(), 3.0, collate(mixed_examples(), 0, torch.device("cpu"))
    gradients, _ = node_gradients(lm, batch, [OF_LAST], KEY, 4)
    store = lm.weights[OF_LAST]
    want = (store.codes - lr * gradients[OF_LAST] / store.scale).clamp(-127, 127)
    codes = store.codes.clone()
    node_step(lm, batch, [OF_LAST], KEY, 4, lr)
    error = store.codes - want
    assert error.abs().max() < 1 + 1e-3 and (store.codes != codes).float().mean() > 0.2
    assert error.sum().abs() < 5 * 0.5 * error.numel() ** 0.5 and (error % 1 > 0.1).any()


def test_streams_are_apart():
    """Each query, step, seed and tensor has signs of its own, and any rows of them are drawn alone."""
    keys = [KEY._replace(tensor=tensor_id(name)) for name in (OF_LAST, OF_FIRST)]
    keys += [keys[0]._replace(query=1), keys[0]._replace(step=9), keys[0]._replace(seed=4)]
    drawn = torch.stack([random_signs(key, torch.arange(20), 50).flatten() for key in keys])
    overlap = (drawn @ drawn.T / 1000).fill_diagonal_(0).abs()
    assert overlap.max() < 5 / 1000**0.5
    rows = torch.tensor([3, 17])
    assert torch.equal(random_signs(keys[0], rows, 50).flatten(), drawn[0].view(20, 50)[rows].flatten())
    direction = CodeZO().direction(keys[0], (20, 50), torch.arange(20), Purpose.PROBE_ROUNDING)
    assert torch.equal(direction.flatten(), drawn[0])


# ---------------------------------------------------------------- runs


def test_batches_are_train_pys():
    with shortened(train=10):
        c = replace(parse(["--seed", "3"]), batch_size=4)
        problem, _ = prepare(c)
    found = batches(problem, c)
    for step in range(6):
        assert next(found) == [problem.train[i] for i in train.batch_indices(3, step, 4, 10)]


@pytest.mark.parametrize("method, steps, draws, lr", [
    ("node", 10, 5, 0.1), pytest.param("weight", 20, 20, 0.03, marks=pytest.mark.full),
    pytest.param("mixed", 20, 10, 0.05, marks=pytest.mark.full),
])  # fmt: skip
def test_it_learns(method, steps, draws, lr):
    """Dev loss falls from above 1.5 by 1.1 at least, below that of guessing, ln 2."""
    with shortened():
        before, after, forwards = trained(method, steps, draws, lr, [])
    assert before.loss > 1.5 and after.loss < before.loss - 1.1 and after.metric > before.metric + 0.2
    assert forwards == steps * (draws + 1) * (2 if method == "mixed" else 1)


def test_the_table(capsys):
    with shortened(dev=8):
        main("--steps 1 --draws 1 --lr 0 --batch-size 2".split())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[1:]] == [["weight", "2"], ["node", "2"], ["mixed", "4"]]
    for _, _, before, _, after, *accuracy in lines[1:]:  # a rate of 0
        assert before == after and accuracy[0] == accuracy[2]


@pytest.mark.parametrize("flags, message", [
    ("--steps 0", "no training: 0 steps"), ("--draws 0", "0 draws"), ("--lr -1", "lr -1.0"),
    ("--weights int4", "model.layers.0.self_attn.o_proj.weight has none"), ("--nonsense", "unrecognized arguments"),
])  # fmt: skip
def test_bad_input_ends_with_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as error, shortened(dev=8):
        main(["--method", "weight", *flags.split()])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_layers_are_named_in_every_block():
    lm = small()
    assert weights_of(lm, ("mlp.down_proj",)) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert StoredWeights(lm.weights, torch.float32).read(OF_LAST).shape == (1, 16, 24)
    with pytest.raises(ValueError, match="model.layers.0.input_layernorm.weight has none"):
        weights_of(lm, ("input_layernorm",))
