"""family/mezo_svrg.py: a step by hand, its mean and variance on a quadratic, what the anchor is and costs, replays.

Oracles: ZO's own probes of the weights and of a copy of them; hand-written sums of directions; autograd's gradient;
moments of the table of normal numbers.  Statistical bounds are 5 standard deviations.
"""

from __future__ import annotations

import json
import weakref
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import direction, tiny_llama
from oracles import gaussian, moments, same_tensors
from torch import Tensor

import tensor_train
from data.scoring import BatchLoss, Encoded
from family import mezo_svrg
from family.lezo import lezo
from family.mezo_svrg import SVRG, svrg
from family.subzero import SubZero
from model import LanguageModel, create
from quant import Float, Store, encode
from random_bits import Key, Purpose, bits32, tensor_id
from zo_optim import ZO, LossFn, PerturbedWeights, SparseZO, probe_losses, update, zo_step

CASES = [("fp32", 0, None), ("bf16", 0, None), ("int8", 0, 4), ("int8", 4, 4), ("int4", 0, 2), ("fp8", 0, 8),
         ("fp8", 0, None), ("fp32", 0, 4)]  # fmt: skip
by_case = pytest.mark.parametrize("weights, residual, bits", CASES)  # format, residual bits, bits of directions
SMALL = tiny_llama(num_hidden_layers=1, hidden_size=16, intermediate_size=24, tie_word_embeddings=True)
ALL = range(10)  # examples


def two_tensors(weights: str, residual: int = 0) -> dict[str, Store]:
    """A matrix with a short second group of int4 scales, and a vector in which +0 and -0 are not the same."""
    vector = torch.tensor([1.0, -0.0, 0.5, -2.0, 0.0])
    return {"w": encode(gaussian(6, 40, seed=1), weights, residual), "vector": encode(vector, weights, residual)}


def loss_of(examples: range | list[int]) -> LossFn:
    """The mean of smooth functions that differ from example to example."""

    def loss(view: PerturbedWeights) -> Tensor:
        w, vector = view.read("w"), view.read("vector")
        return sum(
            (w * gaussian(6, 40, seed=10 + i)).flatten(1).sum(1).div(5).sin() + (vector**2).sum(1) * (0.1 + i / 40)
            for i in examples
        ) / len(examples)  # fmt: skip

    return loss


def batch(step: int, size: int = 3) -> list[int]:
    """Examples of a step between anchors."""
    return torch.randperm(len(ALL), generator=torch.Generator().manual_seed(step)).tolist()[:size]


def run(weights: dict[str, Store], zo: SVRG, steps: range, lr: float = 1e-3, seed: int = 3) -> list:
    """zo_step as the loop is to call it: at an anchor's step the loss is of all examples."""
    return [zo_step(weights, loss_of(ALL if zo.is_anchor(t) else batch(t)), Key(seed, t), zo, lr) for t in steps]


def same(a: dict[str, Store], b: dict[str, Store]) -> bool:
    """Every stored bit; -0 is not 0."""
    return a.keys() == b.keys() and all(same_tensors(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- a step


@by_case
def test_steps_by_hand(weights, residual, bits):
    """Two windows of three steps.  Losses are those that ZO's own probes find at w and at a copy of it that is set
    aside; one rounding lands -lr2 times the sum of (g_w - g_A) u2 and g_full u2_full, or -lr1 g_full u2_full.

    anchor_rate is a power of two, by which float32 multiplies exactly: so every bit is determined.
    """
    zo, plain, lr = SVRG(0.02, bits=bits, every=3, anchor_rate=256.0), ZO(0.02, bits=bits), 1e-4
    w, want, anchor = two_tensors(weights, residual), two_tensors(weights, residual), None
    for t in range(6):
        key = Key(3, t)
        (done,) = run(w, zo, range(t, t + 1), lr)
        if t % 3 == 0:
            anchor, anchor_key, full = deepcopy(want), key, torch.cat(probe_losses(want, loss_of(ALL), key, plain))
            change, lengths = torch.zeros(2, dtype=torch.float64), [0.0, 256 * lr]
        else:
            here, there = (torch.cat(probe_losses(at, loss_of(batch(t)), key, plain)) for at in (want, anchor))
            change, lengths = here - there, [lr, lr]
        expected = torch.stack((change + full.mean(), full))  # of each query plus and minus
        assert torch.equal(torch.stack((done.plus, done.minus), 1), expected)
        g = (expected[:, 0] - expected[:, 1]) / 0.04
        assert torch.equal(done.projected_grads, g) and g[1] and bool(g[0]) == (t % 3 > 0)
        for name, stored in want.items():
            (R, C), rows = stored.matrix_shape, torch.arange(stored.matrix_shape[0])
            own, of_anchor = (
                direction(k._replace(tensor=tensor_id(name)), rows, C, bits, Purpose.UPDATE_ROUNDING)
                * torch.tensor(-length * slope.item()).float()
                for k, length, slope in zip((key, anchor_key), lengths, g, strict=True)
            )
            noise = bits32(key._replace(tensor=tensor_id(name)), Purpose.WEIGHT_ROUNDING, rows, C)
            delta = own + of_anchor if t % 3 else of_anchor
            stored.add_rounded_(slice(0, R), delta, noise if stored.rounds else None)
        assert same(w, want) and done.counts[0] > 0
    assert not same(w, two_tensors(weights, residual))


def test_defaults_are_the_released_codes():
    zo, w = SVRG(), two_tensors("fp32")
    assert (zo.every, zo.eps, zo.anchor_rate, zo.bits) == (2, 1e-3, 1000.0, None) and svrg(ZO()) == zo
    before = w["w"].value.clone()
    (done,) = run(w, zo, range(1), 1e-6)
    u = direction(Key(3, 0, tensor=tensor_id("w")), torch.arange(6), 40, None, Purpose.UPDATE_ROUNDING)
    wanted = before - 1e-3 * done.projected_grads[1].float() * u
    assert (w["w"].value - wanted).abs().max() < 1e-6 < (w["w"].value - before).abs().max()  # a few units of 2^-24


@by_case
def test_with_q_1_a_step_is_mezos_on_all_examples(weights, residual, bits):
    """To the bit, -0 included; the rate is anchor_rate times the run's.  Nothing is copied."""
    w, other = two_tensors(weights, residual), two_tensors(weights, residual)
    zo = SVRG(0.02, bits=bits, every=1, anchor_rate=4.0)
    for t in range(3):
        (done,) = run(w, zo, range(t, t + 1), 2**-8)
        plain = zo_step(other, loss_of(ALL), Key(3, t), ZO(0.02, bits=bits), 2**-6)
        assert done.projected_grads.tolist() == [0.0, *plain.projected_grads.tolist()] and plain.projected_grads.all()
        assert (done.plus[1], done.minus[1]) == (plain.plus[0], plain.minus[0])
        assert same(w, other) and torch.equal(done.counts, plain.counts)
    assert zo.anchor.weights == {} and not same(w, two_tensors(weights, residual))


def test_directions_are_drawn_no_more_often_than_is_needed(monkeypatch):
    """Of each tensor: an anchor's step one to probe and to step along; another one to probe w and A, then both."""
    drawn, zo, w = [], SVRG(0.02, every=2), two_tensors("fp32")
    draw = ZO.direction
    monkeypatch.setattr(ZO, "direction", lambda *args: (drawn.append(args[1]), draw(*args))[1])
    for t, directions in ((0, 2), (1, 4)):
        drawn.clear()
        run(w, zo, range(t, t + 1))
        assert len(drawn) == 2 * directions


@by_case
def test_no_step_at_lr_0_changes_a_bit(weights, residual, bits):
    """w stays at A then, so that any batch finds exactly no change: both estimates have one direction, and at A."""
    w = two_tensors(weights, residual)
    for t, done in enumerate(run(w, SVRG(0.02, bits=bits, every=2), range(4), 0.0)):
        assert done.projected_grads[0] == 0 != done.projected_grads[1] and not done.counts.any()
        assert done.plus[0] == done.minus[0] == (done.plus[1] + done.minus[1]) / 2, t
    assert same(w, two_tensors(weights, residual))


@pytest.mark.parametrize("bits", [None, 4])
def test_both_estimates_of_a_minibatch_are_along_one_direction(bits):
    """What is read less what is stored is +-eps u1 twice, where w and A are far apart: to float32's rounding of sums
    of size below 8, 2^-21."""
    zo, w, seen = SVRG(0.5, bits=bits, every=2), two_tensors("fp32"), []

    def loss(view: PerturbedWeights) -> Tensor:
        seen.append(view.read("w").clone())
        return loss_of(ALL)(view)

    zo_step(w, loss, Key(3, 4), zo, 0.0)
    at_anchor = w["w"].value.clone()
    w["w"].value += gaussian(6, 40, seed=5)
    zo_step(w, loss, Key(3, 5), zo, 0.0)
    full, here, there = seen
    assert (here - w["w"].value - (there - at_anchor)).abs().max() < 2**-21
    u1 = direction(Key(3, 5, tensor=tensor_id("w")), torch.arange(6), 40, bits, Purpose.PROBE_ROUNDING)
    assert (there - at_anchor - torch.stack((u1, -u1)) / 2).abs().max() < 2**-21
    assert (full - there).abs().max() > 0.5  # the anchor's own step had another


# ---------------------------------------------------------------- mean and variance on a quadratic

N, D, SIZE, SAMPLES = 8, 32, 2, 320
CURVES, PULLS = 1 + gaussian(N, D, seed=1).double().abs(), 4 * gaussian(N, D, seed=2).double()
PULLS = PULLS - PULLS.mean(0) + 0.5  # a minibatch's gradient is mostly noise
START, WAY = gaussian(D, seed=3).double() / 4, gaussian(D, seed=4).double()


def example_losses(w: Tensor) -> Tensor:
    """w [P, D] float64 -> [P, N]: of each example w . diag(curve) w / 2 - pull . w, of which central differences are
    exact."""
    return (w**2 @ CURVES.T) / 2 - w @ PULLS.T


def gradients(w: Tensor) -> Tensor:
    """Of each example at w, by autograd: [N, D]."""
    return torch.autograd.functional.jacobian(lambda x: example_losses(x[None])[0], w)


@cache
def sampled(kind: str, far: float, bits: int | None = None) -> Tensor:
    """What SAMPLES steps of rate 1 subtracted from w = A + far * WAY, [SAMPLES, D] float64, by anchors and minibatches
    of their own."""
    at = (START + far * WAY).float()
    found = []
    for seed in range(SAMPLES):
        zo = SVRG(0.5, bits=bits, every=2) if kind == "svrg" else ZO(0.5, bits=bits)
        chosen = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:SIZE]
        if kind == "svrg":
            anchor = {"w": Float(START.float().clone())}
            zo_step(anchor, lambda view: example_losses(view.read("w").double()).mean(1), Key(seed, 0), zo, 0.0)
        w = {"w": Float(at.clone())}
        zo_step(w, lambda view, i=chosen: example_losses(view.read("w").double())[:, i].mean(1), Key(seed, 1), zo, 1.0)
        found.append((at - w["w"].value).double())
    return torch.stack(found)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_steps_mean_is_the_gradient(bits):
    """E[u2 u1^T] = E[u^2] I, 1 + 7.8e-5 by the table.  In each coordinate, and along the gradient at A and along how it
    has changed since, by which the gradient at A alone, or twice the change, would be seen."""
    here, there = (gradients(at).mean(0) * moments(None)[0].mean() for at in (START + 0.5 * WAY, START))
    change = here - there
    axes = torch.cat((torch.eye(D).double(), torch.stack((there / there.norm(), change / change.norm()))))
    along = sampled("svrg", 0.5, bits) @ axes.T
    error = 5 * along.std(0) / SAMPLES**0.5
    assert ((along.mean(0) - axes @ here).abs() < error).all()
    assert there.norm() > 1.5 * error[-2] and change.norm() > 1.5 * error[-1]


@pytest.mark.parametrize("far", [0.1, 0.5])
def test_the_minibatchs_noise_is_that_of_what_changed(far):
    """E|(z . h) z|^2 = (m4 + (D - 1) m2^2) |h|^2, m2 and m4 the table's moments, so that both variances are known, and
    with them their ratio.  A minibatch's mean gradient is an average over all pairs of examples."""
    m2, m4 = (moment.mean() for moment in moments(None))
    here, there = gradients(START + far * WAY), gradients(START)

    def square_of_batch(of_each: Tensor) -> Tensor:
        """E|h_B|^2, where B is any two examples."""
        pairs = torch.combinations(torch.arange(N), SIZE)
        return of_each[pairs].mean(1).square().sum(1).mean()

    def total(square: Tensor, mean: Tensor) -> Tensor:
        return (m4 + (D - 1) * m2**2) * square - m2**2 * mean.square().sum()

    whole, change = here.mean(0), (here - there).mean(0)
    directions = total(there.mean(0).square().sum(), there.mean(0))
    want = {"mezo": total(square_of_batch(here), whole),
            "svrg": total(square_of_batch(here - there), change) + directions}  # fmt: skip
    found, errors = {}, {}
    for kind in want:
        squares = (sampled(kind, far) - m2 * whole).square().sum(1)
        found[kind], errors[kind] = squares.mean(), 5 * squares.std() / SAMPLES**0.5
        assert abs(found[kind] - want[kind]) < errors[kind], kind
    ratio = want["svrg"] / want["mezo"]
    relative = sum(errors[kind] / want[kind] for kind in want)  # of a quotient, to first order
    assert abs(found["svrg"] / found["mezo"] - ratio) < relative * ratio
    assert found["svrg"] + errors["svrg"] < found["mezo"] - errors["mezo"]
    if far == 0.1:  # what is left is mostly the directions'
        assert want["svrg"] < 1.25 * directions and ratio < 0.2


# ---------------------------------------------------------------- the anchor


@by_case
def test_the_anchor_stays_where_it_was(weights, residual, bits):
    """The released code's follows the weights."""
    w, zo = two_tensors(weights, residual), SVRG(0.02, bits=bits, every=3)
    for t in range(7):
        before = deepcopy(w)
        run(w, zo, range(t, t + 1), 1e-4)
        if t % 3 == 0:
            start = before
        assert same(zo.anchor.weights, start) and not same(w, start) and zo.anchor.key == (3, t - t % 3)


def test_there_are_never_three_copies(monkeypatch):
    """When an anchor is copied the last one is gone; a copy by `replace` shares it, as its holder is the run's."""
    w, zo, gone = two_tensors("fp32"), SVRG(0.02, every=2), []
    run(w, zo, range(2))
    kept = weakref.ref(zo.anchor.weights["w"].value)

    def copied(weights: dict[str, Store]) -> dict[str, Store]:
        gone.append(kept() is None)
        return deepcopy(weights)

    monkeypatch.setattr(mezo_svrg, "deepcopy", copied)
    other = replace(zo, eps=0.1)
    run(w, other, range(2, 4))
    assert gone == [True] and other.anchor is zo.anchor and hash(other) == hash(replace(zo, eps=0.1))


@by_case
def test_a_record_redoes_a_run_and_goes_on_with_it(weights, residual, bits):
    """projected_grads and keys alone give every bit of the weights.  With the recorded losses, told before each update,
    the run goes on from any step as if it had not ended, at rate 0 and where losses were clipped too."""
    lr, steps = 1e-4, 5
    w, zo = two_tensors(weights, residual), SVRG(0.02, bits=bits, every=3)
    done = run(w, zo, range(steps), lr)
    record = json.loads(json.dumps([[x.tolist() for x in (d.plus, d.minus, d.projected_grads)] for d in done]))
    redone = two_tensors(weights, residual)
    for t, (_, _, grads) in enumerate(record):
        update(redone, torch.tensor(grads, dtype=torch.float64), Key(3, t), SVRG(0.02, bits=bits, every=3), lr)
    assert same(redone, w)
    for end in range(1, steps):
        again, other = two_tensors(weights, residual), SVRG(0.02, bits=bits, every=3)
        for t, (plus, minus, grads) in enumerate(record[:end]):
            other.remember(again, Key(3, t), torch.tensor([plus[1], minus[1]], dtype=torch.float64))
            update(again, torch.tensor(grads, dtype=torch.float64), Key(3, t), other, lr)
        rest = run(again, other, range(end, steps), lr)
        for found, want in zip(rest, done[end:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert same(again, w)


def test_a_run_goes_on_after_a_step_that_moved_nothing():
    """`update` then does nothing, so that it could not keep the anchor; of a clipped one the losses say more."""
    w = two_tensors("fp32")
    first = zo_step(w, loss_of(ALL), Key(3, 0), SVRG(0.02), 0.0, 0.01)
    assert first.projected_grads[1].abs() == 0.01
    zo, other = SVRG(0.02), SVRG(0.02)
    zo_step(w, loss_of(ALL), Key(3, 0), zo, 0.0, 0.01)
    other.remember(w, Key(3, 0), torch.stack((first.plus[1], first.minus[1])))
    for found, want in zip(run(w, other, range(1, 2), 0.0), run(w, zo, range(1, 2), 0.0), strict=True):
        assert torch.equal(found.projected_grads, want.projected_grads) and want.projected_grads[1].abs() > 0.01


@pytest.mark.parametrize("seed, last", [(3, None), (3, 0), (4, 2)])
def test_a_step_without_its_anchor_is_refused(seed, last):
    """None was kept, an older one, or another run's."""
    w, zo = two_tensors("int8"), SVRG(0.02, every=2)
    if last is not None:
        run(w, zo, range(last, last + 1), seed=seed)
    before = deepcopy(w)
    with pytest.raises(ValueError, match="step 3 needs the anchor of step 2, the one that is kept has"):
        run(w, zo, range(3, 4))
    assert same(w, before)


# ---------------------------------------------------------------- models


def tiny(weights: str) -> LanguageModel:
    """A random model with matrices five times the usual size, so that attention is not uniform."""
    lm = create(SMALL, seed=0)
    dense = {name: stored.value * (5 if stored.value.ndim == 2 else 1) for name, stored in lm.weights.items()}
    lm.weights, lm.format = {name: encode(tensor, weights) for name, tensor in dense.items()}, weights
    return lm


def prompts(n: int) -> list[Encoded]:
    """Of 3 to 8 random tokens, with two options of one token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    tokens = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return [Encoded([t], [[17], [42]], len(t) - 1, i % 2) for i, t in enumerate(tokens)]


@pytest.mark.parametrize("n, size, every, at_once", [
    (10, 4, 1, 2), (10, 4, 2, 1), (10, 4, 3, None), (8, 4, 2, 2), (3, 4, 2, 2), (3, 4, 3, 1),
])  # fmt: skip
def test_forwards_are_counted(n, size, every, at_once):
    """Each batch through each copy of the weights; the last of all examples' batches may be short."""
    lm, examples, zo, count = tiny("int8"), prompts(n), SVRG(0.01, every=every, probes_per_forward=at_once), []
    hidden = lm.hidden
    lm.hidden = lambda tokens, mask, view, *args, **more: (
        count.append(view.probes), hidden(tokens, mask, view, *args, **more))[1]  # fmt: skip
    for t in range(4):
        of_step = examples if t % every == 0 else examples[:size]
        count.clear()
        zo_step(lm.weights, BatchLoss.of(lm, of_step, 0, size), Key(0, t), zo, 1e-6)
        assert sum(count) == zo.forwards(t, -(-n // size)) == (2 * -(-n // size) if t % every == 0 else 4)


@pytest.mark.parametrize("weights, bits", [("fp32", None), ("int8", 4), ("adapters", None)])
def test_a_model_learns(weights, bits):
    """The loss on all examples falls, whose minibatches are of 3.  Adapters' anchor is their vector alone."""
    lm, examples = tiny("int8" if weights == "adapters" else weights), prompts(8)
    if weights == "adapters":
        tensor_train.attach(lm, tensor_train.Spec("rep", "qv", 8, 2), seed=0)
    trained, zo = tensor_train.trained(lm), svrg(ZO(1e-3, bits=bits, dtype=lm.dtype), 4, 1.0)
    everything, rate = BatchLoss.of(lm, examples, 0, 8), 0.1 if weights == "adapters" else 1e-3
    first = everything(lm.stored_view())
    for t in range(24):
        loss_fn = everything if zo.is_anchor(t) else BatchLoss.of(lm, examples[t % 5 :][:3], 0, 8)
        zo_step(trained, loss_fn, Key(0, t), zo, rate)
        assert zo.anchor.weights.keys() == trained.keys()
    assert everything(lm.stored_view()) < 0.95 * first


# ---------------------------------------------------------------- what is refused


def test_other_estimators_are_refused_by_name():
    lm = tiny("fp32")
    for zo, name in ((SparseZO(), "SparseZO"), (SubZero(), "SubZero"), (SVRG(), "SVRG"), (ZO(queries=2), "queries=2")):
        with pytest.raises(ValueError, match=rf"SVRG is for dense directions of one query.*got .*{name}"):
            svrg(zo)
    with pytest.raises(ValueError, match="SVRG needs 2 queries, all weights"):
        svrg(lezo(ZO(), lm))
    for wrong in ({"queries": 1}, {"every": 0}, {"anchor_rate": 0.0}, {"anchor_rate": float("nan")}):
        with pytest.raises(ValueError, match="SVRG needs 2 queries.*" + "=".join(map(str, *wrong.items()))):
            SVRG(**wrong)
    zo = ZO(0.5, 1, 4, "q-rge1", "codes", True, torch.bfloat16, None)
    given = svrg(zo, 5, 7.0)
    assert given == SVRG(0.5, 2, 4, "q-rge1", "codes", True, torch.bfloat16, None, every=5, anchor_rate=7.0)


def test_processes_that_share_a_step_are_refused():
    loss = BatchLoss.of(lm := tiny("fp32"), prompts(2), 0, 2)
    loss.agreed = lambda losses: losses
    with pytest.raises(ValueError, match="not shared between processes"):
        zo_step(lm.weights, loss, Key(0, 0), SVRG(), 1e-6)


def test_an_anchor_whose_loss_is_not_finite_stops_its_window():
    """Nothing is known of the gradient at A, and nothing moves until the next anchor."""
    w, zo = two_tensors("int8"), SVRG(0.02, every=2)
    before = deepcopy(w)
    done = zo_step(w, lambda view: torch.tensor([float("inf"), 1.0]), Key(3, 0), zo, 1e-3)
    after = run(w, zo, range(1, 2))[0]
    assert not done.projected_grads.any() and not after.projected_grads.any() and same(w, before)
    assert run(w, zo, range(2, 3))[0].projected_grads.any() and not same(w, before)
