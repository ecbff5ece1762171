"""family/mazo.py: the mask against ZO and by hand, the masked estimate against autograd, saliency element by element.

Statistical bounds are 5 standard deviations, computed from the moments of the table of normal numbers.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import direction, tiny_llama, tiny_roberta
from oracles import gaussian, moments, numbers, same_tensors
from torch import Tensor

from calibration import DAMPING
from data.scoring import BatchLoss, Encoded
from family.mazo import MaZO, Measured, estimate, largest_of_rows, masks, mazo, mean_squares, measure, saliency
from model import LanguageModel, create
from quant import FORMATS, Float, Store, encode
from random_bits import Key, Purpose, tensor_id
from zo_optim import ZO, PerturbedWeights, SparseZO, update, zo_step

KEY = Key(seed=3, step=4)
STORED = [*((weights, 0) for weights in FORMATS), ("int8", 4), ("int4", 1)]  # format, residual bits
by_stored = pytest.mark.parametrize("weights, residual", STORED)
by_bits = pytest.mark.parametrize("bits", [None, 4])
SHAPES = {"w": (6, 150), "vector": (7,), "kernel": (5, 3, 2, 2)}


def tensors(weights: str, residual: int = 0) -> dict[str, Store]:
    return {name: encode(gaussian(*shape, seed=len(name)), weights, residual) for name, shape in SHAPES.items()}


def drawn_masks(share: float) -> dict[str, Tensor]:
    """Random masks of the two tensors that are matrices."""
    shapes = {"w": (6, 150), "kernel": (5, 12)}
    return {name: torch.rand(s, generator=torch.Generator().manual_seed(0)) < share for name, s in shapes.items()}


def same(a: dict[str, Store], b: dict[str, Store]) -> bool:
    """Every stored bit; -0 is not 0."""
    return a.keys() == b.keys() and all(same_tensors(a[name], b[name]) for name in a)


def held(store: Store, weights: str, residual: int) -> Tensor:
    """All that a step could change, [R, C]: residuals too, which no forward sees."""
    number = store.dequantise() if len(store.shape) < 2 else numbers(store, weights, residual)
    return number.view(store.matrix_shape)


def loss_fn(view: PerturbedWeights) -> Tensor:
    return sum((view.read(name) * gaussian(*shape, seed=9)).flatten(1).sum(1).sin() for name, shape in SHAPES.items())


# ---------------------------------------------------------------- the mask


@by_bits
@by_stored
def test_masks_of_ones_are_zo(weights, residual, bits):
    zo, runs = ZO(0.02, 3, bits), []
    for estimator in (zo, mazo(zo, drawn_masks(1.0))):
        store = tensors(weights, residual)
        done = zo_step(store, loss_fn, KEY, estimator, 2e-3)
        runs.append((done, store))
    (plain, stepped), (masked, other) = runs
    assert all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True)) and plain.counts[0] > 0
    assert same(stepped, other)


@by_bits
@by_stored
def test_a_probe_and_a_step_are_zos_where_the_mask_is_and_nothing_elsewhere(weights, residual, bits):
    """To the bit, chosen rows too.  A vector has no mask."""
    mask, zo, index = drawn_masks(0.4), ZO(0.02, 2, bits), torch.tensor([4, 0, 0])
    store, plain, before = (tensors(weights, residual) for _ in range(3))
    for name, shape in SHAPES.items():
        one = mask.get(name, torch.ones(1, 7, dtype=torch.bool)).view(shape)
        views = [PerturbedWeights(before, KEY, e, [(1, 1), (1, -1)], 2) for e in (mazo(zo, mask), zo)]
        got, dense = (view.read(name) for view in views)
        stored = before[name].dequantise().float().view(shape)
        assert torch.equal(got, torch.where(one, dense, stored)) and (got[0] != got[1]).any()
        if len(shape) > 1:
            rows = (views[0].read(name, index), torch.where(one, dense, stored).flatten(2)[:, index])
            assert torch.equal(*rows)
    grads = torch.tensor([0.5, -2.0], dtype=torch.float64)
    update(store, grads, KEY, mazo(zo, mask), 0.1)
    update(plain, grads, KEY, zo, 0.1)
    for name in SHAPES:
        one = mask.get(name, torch.ones(1, 7, dtype=torch.bool))
        old, new, dense = (held(stores[name], weights, residual) for stores in (before, store, plain))
        assert torch.equal(new, torch.where(one, dense, old)) and (new != old).any()


@by_bits
@by_stored
def test_no_step_at_lr_0_changes_a_bit(weights, residual, bits):
    store = tensors(weights, residual) | {"zeros": Float(torch.full((4, 8), -0.0))}
    before, state = deepcopy(store), torch.get_rng_state()
    zo = mazo(ZO(0.02, 2, bits), drawn_masks(0.4) | {"zeros": torch.eye(4, 8, dtype=torch.bool)})
    for step in range(5):
        done = zo_step(store, loss_fn, Key(0, step), zo, 0.0)
        assert done.projected_grads.all() and not done.counts.any()
    assert same(store, before) and torch.equal(torch.get_rng_state(), state)


def test_only_zo_has_a_direction_to_mask():
    for other in (SparseZO(), mazo(ZO(), {})):
        with pytest.raises(ValueError, match="MaZO masks dense directions, got"):
            mazo(other, {})
    zo = ZO(0.5, 3, 4, "q-rge1", "codes", True, torch.bfloat16, None)
    assert mazo(zo, {}) == MaZO(0.5, 3, 4, "q-rge1", "codes", True, torch.bfloat16, None)
    mask = drawn_masks(0.5)["w"]
    more = replace(mazo(zo, {"w": mask}), queries=5)
    assert more.queries == 5 and more.masks == {tensor_id("w"): mask} and isinstance(hash(more), int)


# ---------------------------------------------------------------- the estimate

A, B = gaussian(5, 3, seed=1).double(), gaussian(6, 5, seed=2).double()


def quadratic(view: PerturbedWeights) -> Tensor:
    """Its central difference is its gradient along u, whatever eps is."""
    return torch.stack([(w @ A).square().sum() + (w * B).sum() for w in view.read("w")])


@pytest.mark.parametrize("bits", [None, 2])
def test_the_mean_is_the_masked_gradient_and_its_variance_is_the_masks(bits):
    """n estimates of one query each, as `update` makes them: steps of lr 1 down from zero, sign turned.

    With a mask the variance of (g . u1) u2_i is V^2 (|M g|^2 - g_i^2) + (K - 1) g_i^2 where the mask is and 0
    elsewhere, with V = E[Q^2] and K = E[u1^2 u2^2].  Without one |g|^2 stands for |M g|^2.  Summed over the mask the
    two are measured against each other, each to 5 times its own standard error.
    """
    w, n = gaussian(6, 5).double().requires_grad_(), 1000
    (g,) = torch.autograd.grad((w @ A).square().sum() + (w * B).sum(), w)
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.3
    V, K = moments(bits)[0].mean(), moments(bits)[0].square().mean()
    zo, total = ZO(0.1, bits=bits, dtype=torch.float64), {}
    for masked in (True, False):
        estimator, draws = mazo(zo, {"w": mask}) if masked else zo, []
        for step in range(n):
            done = zo_step({"w": Float(w.detach().float())}, quadratic, Key(0, step), estimator, 0.0)
            landed = {"w": Float(torch.zeros(6, 5))}
            update(landed, done.projected_grads, Key(0, step), estimator, 1.0)
            draws.append(-landed["w"].value.double())
        got, seen = torch.stack(draws), mask if masked else torch.ones_like(mask)
        variance = (V**2 * ((seen * g).square().sum() - g**2) + (K - 1) * g**2) * seen
        assert ((got.mean(0) - seen * g).abs() <= 5 * (variance / n).sqrt()).all()
        squares = ((got - seen * g) ** 2 * mask).sum((1, 2))  # of each draw, over the mask
        total[masked] = (variance * mask).sum()
        assert abs(squares.mean() - total[masked]) < 5 * squares.std() / n**0.5 < 0.5 * total[masked]
    assert total[True] < 0.6 * total[False]


def test_the_greedy_gradient_is_the_mean_estimate():
    """As `update` steps along it, of 3 queries: float32 rounding of three terms, of size up to 30."""
    for bits in (None, 4):
        grads, landed = torch.tensor([3.0, -20.0, 7.0], dtype=torch.float64), {"w": Float(torch.zeros(6, 5))}
        update(landed, grads, KEY, ZO(bits=bits), 1.0)
        got = estimate(grads, KEY._replace(tensor=tensor_id("w")), torch.empty(6, 5), ZO(bits=bits))
        assert (got + landed["w"].value).abs().max() < 1e-5 and got.std() > 1


# ---------------------------------------------------------------- saliency and masks


def test_saliency_element_by_element():
    """In Python's numbers, to float32's rounding of a few operations.  An input that is always 0 and a row of zeros."""
    w, h, g = gaussian(4, 6), gaussian(6, seed=1).square(), gaussian(4, 6, seed=2)
    h[2], w[3], g[3] = 0.0, 0.0, 0.0
    for alpha, beta in ((1.0, 0.1), (0.0, 0.0), (2.5, 0.0)):
        got = saliency(w, h, g, alpha, beta)
        for i in range(4):
            row = []
            for j in range(6):
                damped = h[j].item() + DAMPING * sum(h.tolist()) / 6
                row.append(w[i, j].item() ** 2 * h[j].item() + alpha * g[i, j].item() ** 2 / (2 * damped)
                           + beta * abs(w[i, j].item()))  # fmt: skip
            want = torch.tensor([s / sum(row) if i < 3 else 0.0 for s in row])
            assert torch.allclose(got[i], want, rtol=1e-5, atol=0)
    assert saliency(w, h * 0, g, 1.0, 0.1).isfinite().all()


def test_the_largest_of_each_row():
    """Against sorting in Python; of equal ones the first."""
    score = (gaussian(20, 9) * 2).round()
    for k in (1, 4, 9):
        got = largest_of_rows(score, k)
        for row, one in zip(score.tolist(), got.tolist(), strict=True):
            first = sorted(range(9), key=lambda j, row=row: (-row[j], j))[:k]
            assert [j for j in range(9) if one[j]] == sorted(first)


def test_tasks_add_up_each_with_the_same_weight():
    """Two tasks that want other columns: shares of a row are added, so that the louder one does not win.

    One of them by far is as that one alone.  Refused: no task, no share.
    """
    weights = {"w": encode(torch.ones(3, 8), "fp32"), "vector": encode(torch.ones(8), "fp32")}
    quiet, loud = torch.tensor([8.0, 7, 1, 1, 1, 1, 1, 1]), torch.tensor([1.0, 1, 1, 1, 1, 1, 7, 8]) * 1e6
    none = torch.zeros(2, dtype=torch.float64)

    def mask(*h: Tensor, share: float = 0.25) -> Tensor:
        tasks = [Measured({"w": of_task}, none) for of_task in h]
        found = masks(weights, tasks, KEY, ZO(queries=2), share, beta=0.0)
        assert list(found) == ["w"]
        return found["w"]

    assert mask(quiet)[:, :2].all() and mask(loud)[:, 6:].all()
    both = mask(quiet, loud)
    assert both[:, [0, 7]].all() and both.sum(1).eq(2).all()
    assert mask(quiet, share=1.0).all() and mask(quiet, share=1e-3).sum(1).eq(1).all()
    for share, tasks in ((0.0, (quiet,)), (1.1, (quiet,)), (0.5, ())):
        with pytest.raises(ValueError, match=f"got {len(tasks)} and {share}"):
            mask(*tasks, share=share)


# ---------------------------------------------------------------- a model


def tiny(raw: dict, weights: str = "fp32") -> LanguageModel:
    """A random model with matrices five times the usual size, so that attention is not uniform."""
    lm = create(raw)
    dense = {name: stored.value * (5 if stored.value.ndim == 2 else 1) for name, stored in lm.weights.items()}
    lm.weights = {name: encode(tensor, weights) for name, tensor in dense.items()}
    return lm


def batch_loss(lm: LanguageModel, word: int = 17) -> BatchLoss:
    examples = [Encoded([[5, 6, 7 + i]], [[word], [42]], 2, i % 2) for i in range(4)]
    return BatchLoss.of(lm, examples, 0, 8)


SEQUENCES = [[5, 9, 30, 41], [7, 8], [60, 3, 11, 12]]


@pytest.mark.parametrize("raw", [tiny_llama(), tiny_llama(tie_word_embeddings=True), tiny_roberta()],
                         ids=["llama", "tied", "roberta"])  # fmt: skip
@torch.no_grad()
def test_mean_squares_of_every_layers_inputs(raw):
    """Against hooks on the block's layers, one sequence at a time; float32 rounding of means of positive numbers.

    All matrices but those that are only looked up.
    """
    lm, sums, tokens = tiny(raw), {}, sum(map(len, SEQUENCES))
    got = mean_squares(lm, SEQUENCES)
    calls, hooks = [], []
    for part in lm.parts:
        for path, module in part.named_modules():
            if (path, module) in list(lm.linears()):
                hooks.append(module.register_forward_pre_hook(
                    lambda layer, args, path=path: calls.append((path, args[0]))))  # fmt: skip
    for sequence in SEQUENCES:
        calls.clear()
        hidden = lm.hidden(torch.tensor([sequence]), None, lm.stored_view())
        seen = {}
        for path, x in calls:
            at = seen[path] = seen.get(path, -1) + 1
            inside = path in dict(lm.block.named_modules())
            name = f"{lm.layers}{at}.{path}.weight" if inside else f"lm_head.{path}.weight"
            sums[name] = sums.get(name, 0) + x.double().square().flatten(0, -2).sum(0)
        sums[lm.decoder] = sums.get(lm.decoder, 0) + hidden.double().square().flatten(0, -2).sum(0)
    for hook in hooks:
        hook.remove()
    assert got.keys() == sums.keys() and len(got) > 12
    for name, of_one in sums.items():
        assert got[name].dtype == torch.float32 and torch.allclose(got[name].double(), of_one / tokens, rtol=1e-5)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_run_in_the_masks_of_two_tasks(weights):
    """Half of each row of every matrix with inputs, other weights for other tasks; a run moves those and the rest that
    has no mask, and its projected gradients redo it."""
    lm, zo, at = tiny(tiny_llama(), weights), ZO(0.01, 2), Key(0, 2**32 - 1)
    before, fresh = deepcopy(lm.weights), deepcopy(lm.weights)
    tasks = [measure(lm, batch_loss(lm, word), texts, at, zo) for word, texts in ((17, SEQUENCES), (9, [[3, 4, 5]]))]
    assert same(lm.weights, before) and all(task.projected_grads.all() for task in tasks)
    found = masks(lm.weights, tasks, at, zo, 0.5)
    alone = [masks(lm.weights, [task], at, zo, 0.5) for task in tasks]
    for name, mask in found.items():
        assert mask.shape == lm.weights[name].matrix_shape and mask.dtype == torch.bool
        assert mask.sum(1).eq(mask.shape[1] // 2).all() and not torch.equal(alone[0][name], alone[1][name])
    looked_up = {name for name, store in lm.weights.items() if len(store.shape) > 1} - found.keys()
    assert looked_up == {lm.embedding}
    masked, grads = mazo(zo, found), []
    for step in range(2):
        grads.append(zo_step(lm.weights, batch_loss(lm), Key(0, step), masked, 0.05).projected_grads)
    for name, store in lm.weights.items():
        changed = store.dequantise().float() != before[name].dequantise().float()
        assert changed.any() and not (changed & ~found.get(name, torch.ones_like(changed))).any()
    for step, g in enumerate(grads):
        update(fresh, g, Key(0, step), masked, 0.05)
    assert same(lm.weights, fresh)


def test_a_task_that_is_not_finite_has_no_greedy_part():
    lm = tiny(tiny_llama())
    found = measure(lm, lambda view: torch.tensor([float("nan"), 1.0]), SEQUENCES, KEY, ZO())
    assert found.projected_grads.tolist() == [0.0]


def test_directions_are_the_papers_where_unmasked():
    """zo_optim's own, by name: chosen rows of them too."""
    mask = drawn_masks(0.4)["w"]
    zo, rows = mazo(ZO(bits=4), {"w": mask}), torch.tensor([5, 2])
    for name, one in (("w", mask[rows]), ("other", torch.ones(2, 150, dtype=torch.bool))):
        key = KEY._replace(tensor=tensor_id(name))
        got = zo.direction(key, (6, 150), rows, Purpose.UPDATE_ROUNDING)
        assert torch.equal(got, direction(key, rows, 150, 4, Purpose.UPDATE_ROUNDING) * one)
