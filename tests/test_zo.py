"""One step and its parts: probes, estimates, updates, against hand computations, autograd's gradient, and replays.

Statistical bounds are 5 standard deviations, computed from the table of normal numbers.  Three problems: four tensors
of 2, 1, 4 and no axes, where every bit is computed by hand; a toy, one 6 x 5 matrix under a smooth function, where each
coordinate of a gradient can be checked; and tiny language models.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import direction, tiny_llama, tiny_roberta
from oracles import (
    bracket,
    codes_of,
    gaussian,
    moments,
    nearest,
    neighbours,
    points,
    same_tensors,
    scales_of,
    sparse_direction,
    store_of,
)
from torch import Tensor

import tensor_train
import zo_optim
from data.scoring import BatchLoss, Encoded
from model import LanguageModel, create
from quant import COUNTED, FORMATS, Float, Store, StoredWeights, encode
from random_bits import Key, Purpose, bits32, tensor_id
from runtime.checkpoints import weights_sha256
from zo_optim import ZO, PerturbedWeights, SparseZO, learning_rate, probe_losses, update, zo_step

KEY = Key(seed=3, step=4)
U1, U2 = Purpose.PROBE_ROUNDING, Purpose.UPDATE_ROUNDING
DENSE = {"full": ZO, "4 bits": partial(ZO, bits=4)}
KINDS = DENSE | {"sparse": partial(SparseZO, cell=8)}
WAYS = [*({"kind": kind} for kind in KINDS), {"kind": "4 bits", "estimator": "q-rge1"},
        {"kind": "4 bits", "nearest": True}, {"kind": "sparse", "cell": 64}]  # fmt: skip
STORED = [*((weights, 0) for weights in FORMATS), ("int8", 4), ("int4", 4), ("int4", 1)]  # format, residual bits
METHODS = {"mezo-fp32": ("fp32", ZO()), "mezo-bf16": ("bf16", ZO()), "quzo-int8": ("int8", ZO(bits=4)),
           "sparse-int4": ("int4", SparseZO(0.01, cell=16))}  # fmt: skip
by_method = pytest.mark.parametrize("weights, zo", METHODS.values(), ids=METHODS)
by_stored = pytest.mark.parametrize("weights, residual", STORED)


# ---------------------------------------------------------------- the three problems


def four_tensors(weights: str, residual: int = 0) -> dict[str, Store]:
    """A matrix with a short second group of int4 scales, a vector, a kernel of 4 axes, and a number."""
    shapes = {"w": (6, 150), "vector": (7,), "kernel": (5, 3, 2, 2), "number": ()}
    return {name: encode(gaussian(*shape, seed=len(name)), weights, residual) for name, shape in shapes.items()}


def drawn(name: str, stored: Store, zo: ZO, key: Key, rounding: Purpose) -> Tensor:
    """A tensor's dense direction, [R, C] float32, in sigma."""
    R, C = stored.matrix_shape
    return direction(key._replace(tensor=tensor_id(name)), torch.arange(R), C, zo.bits, rounding)


def sparse(name: str, stored: Store, weights: str, zo: SparseZO, key: Key) -> tuple[Tensor, ...]:
    """oracles.sparse_direction of a tensor: w + eps u, w - eps u, eps u, and the bits to land by."""
    return sparse_direction(stored, weights, key._replace(tensor=tensor_id(name)), zo.eps, zo.cell)


def probe(name: str, stored: Store, weights: str, zo: ZO, key: Key, sign: int) -> Tensor:
    """w + sign * eps * u1 by hand, [R, C] float32."""
    if isinstance(zo, SparseZO):
        return sparse(name, stored, weights, zo, key)[0 if sign > 0 else 1]
    return stored.dequantise() + sign * (drawn(name, stored, zo, key, U1) * zo.eps)


def toy(weights: str) -> dict[str, Store]:
    return {"w": encode(gaussian(6, 5), weights)}


def smooth(w: Tensor) -> Tensor:
    return (w @ gaussian(5, 3, seed=1).to(w.dtype)).sin().sum() + (w**4).sum() / 20


def toy_loss(view: PerturbedWeights) -> Tensor:
    return torch.stack([smooth(w) for w in view.read("w")])


SMALL = tiny_llama(num_hidden_layers=1, hidden_size=16, intermediate_size=24, tie_word_embeddings=True)


def tiny(weights: str, raw: dict = SMALL) -> LanguageModel:
    """A random model with matrices five times the usual size, so that attention is not uniform."""
    lm = create(raw, seed=0)
    dense = {name: stored.value * (5 if stored.value.ndim == 2 else 1) for name, stored in lm.weights.items()}
    lm.weights, lm.format = {name: encode(tensor, weights) for name, tensor in dense.items()}, weights
    return lm


def batch_loss(lm: LanguageModel, n: int = 6, seed: int = 0) -> BatchLoss:
    """Of n random prompts of 3 to 8 tokens with two options of one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    tokens = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    labels = torch.randint(0, 2, (n,), generator=generator).tolist()
    examples = [Encoded([t], [[17], [42]], len(t) - 1, label) for t, label in zip(tokens, labels, strict=True)]
    return BatchLoss.of(lm, examples, 0, 8)


def same(a: dict[str, Store], b: dict[str, Store]) -> bool:
    """Every stored bit; -0 is not 0."""
    return a.keys() == b.keys() and all(same_tensors(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
@by_stored
def test_a_step_by_hand(weights, residual, way):
    """Its four lines for three queries: losses at w + eps u1 and w - eps u1, their differences over 2 eps, and one
    rounding of w - lr / Q sum of g u2 (u1 in q-rge1) by bits of their own; of sparse directions, one of w - lr / Q g u
    after the other, by the bits of their cells."""

    def loss(w: dict[str, Tensor]) -> Tensor:
        return sum((w[name] * gaussian(*shape, seed=9)).sum().sin() + w[name].square().sum() for name, shape in shapes)

    lr, Q, options = 2e-3, 3, {name: value for name, value in way.items() if name != "kind"}
    zo = KINDS[way["kind"]](0.02, Q, **options)
    store, want = four_tensors(weights, residual), four_tensors(weights, residual)
    shapes = [(name, stored.shape) for name, stored in store.items()]
    done = zo_step(store, lambda view: torch.stack([
        loss({name: view.read(name)[p] for name in store}) for p in range(view.probes)
    ]), KEY, zo, lr)  # fmt: skip

    for sign, losses in ((1, done.plus), (-1, done.minus)):
        for q in range(Q):
            w = {n: probe(n, s, weights, zo, KEY._replace(query=q), sign).view(s.shape) for n, s in want.items()}
            assert losses[q] == loss(w).double()
    g = (done.plus - done.minus) / 0.04
    assert torch.equal(done.projected_grads, g) and g.dtype == torch.float64
    assert len(set(g.tolist())) == Q and g.abs().min() > 0.01

    counts, rounding = torch.zeros(COUNTED, dtype=torch.int64), U1 if zo.estimator == "q-rge1" else U2
    lengths = [-lr * g[q].item() / Q for q in range(Q)]
    for name, stored in want.items():
        R, C = stored.matrix_shape
        if isinstance(zo, SparseZO):
            for q in range(Q):
                *_, move, bits = sparse(name, stored, weights, zo, KEY._replace(query=q))
                counts += stored.add_rounded_(slice(0, R), move * (lengths[q] / zo.eps), bits)
            continue
        a, b, c = (drawn(name, stored, zo, KEY._replace(query=q), rounding) * lengths[q] for q in range(Q))
        bits = bits32(KEY._replace(tensor=tensor_id(name)), Purpose.WEIGHT_ROUNDING, torch.arange(R), C)
        counts += stored.add_rounded_(slice(0, R), a + b + c, bits if stored.rounds and not zo.nearest else None)
    assert done.counts.tolist() == counts.tolist() and counts[0] > 0
    assert same(store, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_query_whose_loss_is_not_finite_counts_as_nothing(bad):
    """The other query is stepped along as if that one's losses had been equal."""
    for at in range(4):  # each of two queries' two losses
        stepped = []
        for wrong in (bad, None):
            store, seen = four_tensors("int8"), []

            def loss_fn(view: PerturbedWeights, at=at, seen=seen, wrong=wrong) -> Tensor:
                first = 2 * len(seen)
                seen.append(view)
                losses = [1.0 + p + first for p in range(2)]
                if first <= at < first + 2:
                    losses = [5.0, 5.0] if wrong is None else [wrong if first + p == at else 5.0 for p in range(2)]
                return torch.tensor(losses)

            done = zo_step(store, loss_fn, KEY, ZO(queries=2, bits=4), 0.1)
            assert done.projected_grads[at // 2] == 0 and done.projected_grads[1 - at // 2] != 0 and len(seen) == 2
            stepped.append(store)
        assert same(*stepped) and not same(stepped[0], four_tensors("int8"))


def test_a_projected_gradient_is_clipped_before_it_is_stepped_along():
    """The losses stay as they are; a clip larger than all changes no bit."""
    plain, loose, tight = toy("int8"), toy("int8"), toy("int8")
    done = zo_step(plain, toy_loss, KEY, ZO(0.01, 3, bits=4), 1e-3)
    g = done.projected_grads
    clip = g.abs().median().item()
    assert torch.equal(zo_step(loose, toy_loss, KEY, ZO(0.01, 3, bits=4), 1e-3, 1e9).projected_grads, g)
    clipped = zo_step(tight, toy_loss, KEY, ZO(0.01, 3, bits=4), 1e-3, clip)
    assert torch.equal(clipped.projected_grads, g.clamp(-clip, clip)) and torch.equal(clipped.plus, done.plus)
    turned = zo_step(toy("int8"), lambda view: -toy_loss(view), KEY, ZO(0.01, 3, bits=4), 1e-3, clip)
    assert torch.equal(turned.projected_grads, -clipped.projected_grads)
    redone = toy("int8")
    update(redone, clipped.projected_grads, KEY, ZO(0.01, 3, bits=4), 1e-3)
    assert same(plain, loose) and same(tight, redone) and not same(tight, plain)


def test_adapters_alone_are_trained():
    """Their vector, by -lr / Q sum of g u2; every other bit of the model stays, the adapters' starting values too."""
    lm = tiny("int8")
    tensor_train.attach(lm, tensor_train.Spec("rep", "qv", 8, 2), seed=0)
    weights, zo = tensor_train.trained(lm), ZO(1e-2, 3, probes_per_forward=None)
    name, before = tensor_train.TRAINED_VECTOR, deepcopy(lm.weights)
    assert list(weights) == [name] and tensor_train.INITIAL_VECTOR in lm.weights
    done = zo_step(weights, batch_loss(lm), KEY, zo, 1.0)
    g, start = done.projected_grads, before.pop(name).value
    u2 = [drawn(name, weights[name], zo, KEY._replace(query=q), U2)[0].double() for q in range(3)]
    wanted = start - sum(g[q] * u2[q] for q in range(3)) / 3
    assert same({name: lm.weights[name] for name in before}, before) and done.counts[0] > 0.99 * len(start)
    assert g.all() and (weights[name].value - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_which_copies_share_a_forward_changes_rounding_only():
    """Three queries one copy at a time, two, four, all six: losses near 0.7, each a few units of 2^-24 off."""
    lm, runs = tiny("int8"), []
    for n in (1, 2, 4, None):
        zo = ZO(queries=3, bits=4, probes_per_forward=n)
        runs.append(torch.stack(probe_losses(lm.weights, batch_loss(lm), KEY, zo)))
        assert (runs[-1] - runs[0]).abs().max() < 1e-6
    assert len(set(runs[0].flatten().tolist())) == 6 and runs[0].std() > 1e-4


# ---------------------------------------------------------------- probes


@pytest.mark.parametrize("kind, codes", [*((kind, False) for kind in KINDS), *((kind, True) for kind in DENSE)])
@by_stored
def test_a_view_reads_plus_and_minus(weights, residual, kind, codes):
    """W + eps u1 and W - eps u1 in float32, then matrices in the compute dtype: every bit is determined.  As codes,
    where the store lands, both by the same bits, of the stream and the query for that purpose.

    Chosen rows are rows of that, in float32; of several queries, or one sign alone, each copy is as by itself.
    """
    store, zo = four_tensors(weights, residual), KINDS[kind](eps=0.1, probe="codes" if codes else "float")
    copies, index = [(5, 1), (5, -1), (6, -1)], torch.tensor([4, 0, 0])
    for name, stored in store.items():
        (R, C), want = stored.matrix_shape, []
        for query, sign in copies:
            key = Key(3, 4, query, tensor_id(name))
            if codes:
                bits = bits32(key, Purpose.PROBE_LANDING, torch.arange(R), C) if stored.rounds else None
                shift = sign * (drawn(name, stored, zo, key, U1) * zo.eps)
                want.append(stored.add_rounded(slice(None), shift, bits))
            else:
                want.append(probe(name, stored, weights, zo, key, sign))
        want = torch.stack(want)
        assert name != "w" or all((copy != stored.dequantise()).any() for copy in want)
        for dtype in (torch.float32, torch.bfloat16):
            view = PerturbedWeights(store, KEY, replace(zo, dtype=dtype), copies, 3)
            got = view.read(name)
            assert got.dtype == (dtype if len(stored.shape) > 1 else torch.float32)
            assert torch.equal(got, want.view(3, *stored.shape).to(got.dtype))
            if len(stored.shape) > 1:
                assert torch.equal(view.read(name, index), want[:, index])


@pytest.mark.parametrize("zo", [ZO(bits=4, probe="codes"), SparseZO(0.01, cell=64)], ids=["4 bits", "sparse"])
def test_chunks_do_not_show(zo, monkeypatch):
    """The same weights and the same update where each pass is cut into chunks of one row."""
    reads, stores = [], []
    for _ in range(2):
        store = four_tensors("int4")
        reads.append(PerturbedWeights(store, KEY, zo, [(0, 1), (0, -1)], 2).read("w"))
        update(store, torch.tensor([0.5, -2.0]).double(), KEY, zo, 1e-2)
        stores.append(store)
        monkeypatch.setattr(zo_optim, "row_chunks", lambda shape, _: [slice(i, i + 1) for i in range(shape[0])])
    assert torch.equal(*reads)
    assert same(*stores)


def pair(store: dict[str, Store], zo: ZO, query: int = 5) -> PerturbedWeights:
    return PerturbedWeights(store, KEY, zo, [(query, 1), (query, -1)], 2)


@pytest.mark.parametrize("raw", [tiny_llama(tie_word_embeddings=True), tiny_roberta()], ids=["llama", "roberta"])
@torch.no_grad()
def test_a_probe_is_the_model_with_other_weights(raw):
    """Written into a plain model, W + eps u1 gives the pair's first logits, W - eps u1 the second.

    Tied weights included: a head that draws its own direction would differ by eps * |hidden|, 100 times the bound.
    The bound: float32 rounding in sums of 56 terms, in another order.
    """
    lm, plain = tiny("int8", raw), tiny("fp32", raw)
    tokens, view = torch.tensor([[5, 6, 7, 8], [20, 30, 40, 50]]), pair(lm.weights, ZO(eps=0.05, bits=4))
    logits = lm(tokens, view=view)
    for p in range(2):
        plain.weights = {name: Float(view.read(name)[p].clone()) for name in lm.weights}
        assert (logits[p] - plain(tokens)).abs().max() < 1e-5
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@torch.no_grad()
def test_tied_words_share_their_perturbation():
    """The embedding's rows and the head's rows, read in the three ways in which a model reads them."""
    lm = tiny("int8")
    assert lm.decoder == lm.embedding
    view, words = pair(lm.weights, ZO(eps=0.1, bits=4)), torch.tensor([17, 42])
    embedded = lm.look_up(view, lm.embedding, words[None])[:, 0]  # [P, 2, D]
    hidden = torch.eye(16).expand(2, 16, 16)  # reads the head's matrix out, one column a row
    assert torch.equal(lm.score(hidden, view, words).mT, embedded)
    assert torch.equal(lm.score(hidden, view).mT[:, words], embedded)
    assert (embedded[0] - embedded[1]).abs().max() > 0.1


@pytest.mark.parametrize("weights", ["fp8", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_probes_as_codes(kind, weights):
    """To multiply codes by codes: w + eps u and w - eps u at the nearest point; of sparse directions and of probes of
    codes, the points that they are at, and the last one in the place of one beyond it."""
    store, zo, grid = {"w": encode(gaussian(6, 150), weights)}, KINDS[kind](eps=0.05), points(weights)
    scale, view = store["w"].scale, pair(store, zo)
    codes, x = view.read("w", as_codes=True), (view.read("w").double() / scale.double()).clamp(grid[0], grid[-1])
    assert codes.dtype == store["w"].codes.dtype and torch.equal(codes.double(), nearest(codes.double(), grid))
    assert ((codes.double() - x).abs() <= (nearest(x, grid) - x).abs() + 2**-20 * x.abs()).all()
    landed = PerturbedWeights(store, KEY, replace(zo, probe="float" if kind == "sparse" else "codes"), [(5, -1)], 1)
    numbers = landed.read("w").clamp(float(grid[0]) * scale, float(grid[-1]) * scale)
    assert torch.equal(landed.read("w", as_codes=True).float() * scale, numbers)


# ---------------------------------------------------------------- nothing drifts


@by_stored
def test_no_step_at_lr_0_changes_a_bit_of_any_format(weights, residual):
    """Of a matrix with two rows whose codes are all at the ends of the range, a vector, and -0.0."""
    w = gaussian(6, 5)
    w[4:] = w[4:].sign()
    zeros = Float(torch.full((4, 8), -0.0, dtype=torch.bfloat16 if weights == "bf16" else torch.float32))
    store = {"w": encode(w, weights, residual), "vector": encode(gaussian(5), weights), "zeros": zeros}
    if weights not in ("fp32", "bf16"):
        assert (codes_of(store["w"], weights)[4:].abs() == points(weights)[-1]).all()
    before, generator = deepcopy(store), torch.get_rng_state()

    def loss_fn(view: PerturbedWeights) -> Tensor:
        return toy_loss(view) + 3 * view.read("vector").sum(1)

    for zo in (SparseZO(0.1, 2, cell=8), ZO(0.01, 2, bits=4), ZO(0.01, 2, bits=4, probe="codes")):
        for step in range(25):
            done = zo_step(store, loss_fn, Key(0, step), zo, 0.0)
            assert not done.counts.any() and done.projected_grads.any()
    update(store, torch.zeros(2).double(), KEY, ZO(), 1e-3)  # a step of no length must not even add +0.0
    assert same(store, before) and torch.equal(torch.get_rng_state(), generator)


@by_method
def test_no_step_at_lr_0_changes_a_bit_of_a_model(weights, zo):
    lm = tiny(weights)
    before = deepcopy(lm.weights)
    for dtype in (torch.float32, torch.bfloat16):
        lm.dtype = dtype
        for step in range(5):
            done = zo_step(lm.weights, batch_loss(lm, n=2), Key(0, step), replace(zo, dtype=dtype), 0.0)
            assert done.projected_grads.all() and not done.counts.any()
        assert same(lm.weights, before)


# ---------------------------------------------------------------- estimates


def mean_estimate(store: dict[str, Store], loss_fn, zo: ZO) -> dict[str, Tensor]:
    """The mean of g * u2 over the queries, as `update` makes it: a step of lr 1 down from zero, sign turned."""
    plus, minus = probe_losses(store, loss_fn, KEY, zo)
    zeros = {name: Float(torch.zeros(stored.shape)) for name, stored in store.items()}
    update(zeros, (plus - minus) / (2 * zo.eps), KEY, zo, 1.0)
    return {name: -stored.value for name, stored in zeros.items()}


@pytest.mark.parametrize("weights, bits", [("fp32", None), ("int8", 2)])
def test_the_mean_estimate_is_the_gradient(weights, bits):
    """Each coordinate and the projection on the gradient, sign included, where the weights are as dequantised.

    The variance of (g . u1) u2_i is V^2 (|g|^2 - g_i^2) + (M - 1) g_i^2, with V = E[Q^2] and M = E[u1^2 u2^2].  The
    bias is of order eps^2 = 1e-6.  One rounding, not two, would make the mean V g: 3.19 g at 2 bits.
    """
    store, n = toy(weights), 1000
    w = store["w"].dequantise().double().requires_grad_()
    (g,) = torch.autograd.grad(smooth(w), w)
    got = mean_estimate(store, toy_loss, ZO(queries=n, bits=bits, dtype=torch.float64))["w"].double()
    V, M = moments(bits)[0].mean(), moments(bits)[0].square().mean()
    variance = V**2 * (g.square().sum() - g**2) + (M - 1) * g**2
    assert ((got - g).abs() < 5 * (variance / n).sqrt()).all()
    assert abs((got * g).sum() / g.square().sum() - 1) < 5 * projection_std(g.flatten(), bits, n)


def projection_std(g: Tensor, bits: int | None, n: int) -> float:
    """Of the mean of n draws of (g . u1) (g . u2) / |g|^2, whose mean is 1.

    Expanded over pairs of coordinates, the second moment is M S + (V^2 + 2) (1 - S), S = sum of g_i^4 / |g|^4.
    """
    second = moments(bits)[0]
    S = (g**4).sum() / g.square().sum() ** 2
    return float(((second.square().mean() * S + (second.mean() ** 2 + 2) * (1 - S) - 1) / n).sqrt())


def gradient(lm: LanguageModel, loss_fn) -> Tensor:
    """Autograd's, of the weights as dequantised, all tensors in one vector."""
    dense = {n: s.dequantise().view(s.shape).float().requires_grad_() for n, s in lm.weights.items()}
    view = StoredWeights({name: Float(tensor) for name, tensor in dense.items()}, lm.dtype)
    grads = torch.autograd.grad(loss_fn(view)[0], list(dense.values()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("method", ["quzo-int8", *(pytest.param(f"mezo-{w}", marks=pytest.mark.full)
                                                   for w in ("fp32", "bf16"))])  # fmt: skip
def test_the_mean_estimate_of_a_language_model(method):
    """Its projection on the gradient is 1, and what is left over is the noise of n estimates.

    |mean - g|^2 is the mean of p^2 |u2|^2 over n, V^2 d |g|^2 / n (p: a projected gradient), where p^2 alone varies:
    by sqrt(2) of it.
    """
    (weights, zo), n = METHODS[method], 100
    lm = tiny(weights)
    g = gradient(lm, batch_loss(lm))
    mean = mean_estimate(lm.weights, batch_loss(lm), replace(zo, queries=n))
    got = torch.cat([mean[name].flatten() for name in lm.weights])
    assert abs(got @ g / (g @ g) - 1) < 5 * projection_std(g.double(), zo.bits, n)
    noise = (got - g).square().sum() / (g @ g) / (moments(zo.bits)[0].mean() ** 2 * len(g) / n)
    assert abs(noise - 1) < 5 * (2 / n) ** 0.5


@pytest.mark.parametrize("weights, eps", [("fp32", 0.1), ("bf16", 4e-3), ("int8", 5e-3), ("int4", 0.1), ("fp8", 0.02)])
def test_the_mean_estimate_of_sparse_directions_is_the_gradient(weights, eps):
    """Of a quadratic, whose projected gradient is g . u however far the probes are apart.  Sign included.

    A row of 5 is a cell, so that one of it moves at a time.  Where the points around w are uneven, the two probes are
    c_i off centre, and see the gradient there: g_i + L_ii c_i.  With K_i = E[u_i^4] = (M_i / eps)^2, the variance of
    (g . u) u_i is the other rows' sum of g_j^2, and (K_i - 1) g_i^2; and E[(g . u)^4] is the sum of K_i g_i^4 and 3
    times the products of different rows' sums of squares.
    """
    A, B = gaussian(5, 3, seed=1).double(), gaussian(6, 5, seed=2).double()
    zo, store, n = SparseZO(eps, 500, dtype=torch.float64, cell=8), toy(weights), 500
    w, x, scale = (
        f(store["w"], weights) for f in (lambda stored, _: stored.dequantise().double(), codes_of, scales_of)
    )
    low, high = (point * scale for point in bracket(x, eps * 8**0.5 / scale.double(), weights))
    g = 2 * w @ A @ A.T + B + 2 * A.square().sum(1) * ((low + high) / 2 - w)
    plus, minus = probe_losses(
        store, lambda view: torch.stack([(w @ A).square().sum() + (w * B).sum() for w in view.read("w")]), KEY, zo
    )
    hits = [zo.hits(store["w"], KEY._replace(query=q, tensor=tensor_id("w"))) for q in range(n)]
    u = torch.stack([torch.zeros(6, 5).index_put(hit.places, hit.move()).double() / eps for hit in hits])
    projected_grads, K = (plus - minus) / (2 * eps), ((high - low) / 2 / eps) ** 2
    of_rows, squares = g.square().sum(1, keepdim=True), g.square().sum() ** 2
    variance = of_rows.sum() - of_rows + (K - 1) * g**2
    rare = 3 * (K * g.square().sum()).sqrt() * K.sqrt() / n
    assert ((torch.einsum("q,qij->ij", projected_grads, u) / n - g).abs() < 5 * (variance / n).sqrt() + rare).all()
    on_g = (projected_grads * (g * u).sum((1, 2))).mean() / g.square().sum()
    fourth = (K * g**4).sum() + 3 * (squares - of_rows.square().sum())
    assert abs(on_g - 1) < 5 * ((fourth - squares) / squares / n).sqrt() < 0.7
    assert weights == "fp32" or K.max() > 10


def test_the_control_turns_projected_gradients_over_by_coin():
    """The same losses and sizes, fair and keyed signs, so that no step has a direction: E[coin * g] = 0."""
    n, runs = 300, [zo_step(toy("fp32"), toy_loss, KEY, ZO(queries=300, estimator=name), 1e-9)
                    for name in ("q-rge2", "random", "random")]  # fmt: skip
    true, coined = (run.projected_grads for run in runs[:2])
    assert torch.equal(runs[0].plus, runs[1].plus) and torch.equal(coined, runs[2].projected_grads)
    assert torch.equal(true.abs(), coined.abs())
    coins = (true * coined).sign()
    assert abs(coins.mean()) < 5 / n**0.5 and abs((coins[1:] * coins[:-1]).mean()) < 5 / n**0.5
    assert abs(coined.mean()) < 5 * (true.square().mean() / n).sqrt()
    for other in (Key(3, 5), Key(4, 4)):  # another step's, another seed's
        others = zo_optim.coins(other, n)
        assert set(others.tolist()) == {1, -1} and abs((coins * others).mean()) < 5 / n**0.5


def test_a_small_step_goes_down():
    """Over random directions it changes the loss by -lr |g|^2 on average: by -lr p^2 each, of std sqrt 2 (p: the
    projected gradient).

    lr is such that a step's second-order term stays below a tenth of that; float64 would see it all.
    """
    n, lr, w = 200, 1e-4, gaussian(6, 5)
    g, changes = torch.func.grad(smooth)(w), []
    for seed in range(n):
        store = {"w": encode(w, "fp32")}
        zo_step(store, toy_loss, Key(seed, 0), ZO(), lr)
        changes.append(smooth(store["w"].value.double()) - smooth(w.double()))
    assert abs(torch.stack(changes).mean() / (-lr * g.square().sum()) - 1) < 5 * (2 / n) ** 0.5 + 0.1


# ---------------------------------------------------------------- where steps land

CENTRE = {"int8": [-50, -3, 0, 1, 7, 90], "int4": [-4, -3, -1, 0, 2, 5], "bf16": [4.5, 5.0, -6.0, 4.25, 5.5, -7.0],
          "fp8": [-1.5, 1.125, 1.25, 1.5, 1.75, 1.875]}  # fmt: skip
SCALE, N = 2.0**-5, 2000  # the spacing too; of fp8, in the middle of a binade, it is an eighth


def around(stored: Store, weights: str, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Around each wanted weight: the gap between points, the variance of landing there, gap^2 f (1 - f), and whether
    the grid goes on that far.  In weight units, float64."""
    scale, grid = scales_of(stored, weights).double(), points(weights)
    x = wanted / scale
    low, high = neighbours(x, grid)
    return (high - low) * scale, (high - x) * (x - low) * scale**2, (x > grid[0]) & (x < grid[-1])


def landed(weights: str, zo: ZO, projected_grads: list[float], lr: float, step: int = 0) -> tuple[Tensor, ...]:
    """Land one update in N equal rows: what landing added, got - wanted, its variance given the directions, and the
    step's signs."""
    stored = store_of(torch.tensor(CENTRE[weights], dtype=torch.float64).repeat(N, 1), weights)
    if weights != "bf16":
        stored.scale.fill_(SCALE)
    before, wanted = stored.dequantise().double(), stored.dequantise().double()
    for q, g in enumerate(projected_grads):
        length, key = -lr * g / len(projected_grads), Key(0, step, q)
        if isinstance(zo, SparseZO):
            wanted += (sparse("w", stored, weights, zo, key)[2] * (length / zo.eps)).double()
        else:
            wanted += (drawn("w", stored, zo, key, U2) * length).double()
    _, variance, inside = around(stored, weights, wanted)
    assert inside.all()
    update({"w": stored}, torch.tensor(projected_grads, dtype=torch.float64), Key(0, step), zo, lr)
    return stored.dequantise().double() - wanted, variance, (wanted - before).sign()


@pytest.mark.parametrize("reach", [1, 4])
@pytest.mark.parametrize("weights", CENTRE)
def test_landing_a_sparse_step_adds_next_to_no_noise(weights, reach):
    """A hit's step is x = lr |g| M / (eps s) spacings s long.  Landing it is unbiased, and its variance a weight, over
    hits and misses, is (eps s / M)^2 x (1 - x), x < 1, which is a quarter of the first factor at most; a dense
    direction's is s^2 f (1 - f) in every weight, about s |step|.
    """
    s, unit = SCALE / 8 if weights == "fp8" else SCALE, 1.0 if weights == "bf16" else SCALE
    eps = s * (1 / 16 if reach == 1 else 3.7 / 8**0.5)
    far = torch.tensor(eps * 8**0.5 / unit).double()
    low, high = bracket(torch.tensor(CENTRE[weights]).double(), far, weights)
    M, squares = (high - low) / 2 * unit, {}
    lr = 0.3 * eps * s / M.max().item()
    for kind, zo in KINDS.items():
        excess, variance, sign = landed(weights, zo(eps), [-1.0], lr)
        for ahead in (excess, excess * sign):  # to round down, or to nearest, would lose about |step| each time
            assert abs(ahead.mean()) < 5 * variance.sum().sqrt() / excess.numel()
        squares[kind], error = excess.square().mean(), 5 * ((excess**4).mean() / excess.numel()) ** 0.5
        assert abs(squares[kind] - variance.mean()) < error
        if kind != "sparse" and reach == 1:  # E|u| is 0.80 or more
            assert variance.mean() > 0.7 * s * lr
    x = lr * M / (eps * s)
    want, bound = ((eps * s / M) ** 2 * x * (1 - x)).mean(), ((eps * s / M) ** 2 / 4).mean()
    assert squares["sparse"] < bound and abs(squares["sparse"] - want) < error
    assert reach > 1 or 10 * squares["sparse"] < min(squares[dense] for dense in DENSE)


@pytest.mark.parametrize("weights, reach", [*((weights, 1) for weights in CENTRE), ("int8", 3)])
def test_a_sparse_step_of_whole_spacings_is_not_rounded(weights, reach):
    """lr |g| = eps: every hit goes M up or down, and all that moves is counted."""
    eps = (reach - 0.5) * (SCALE / 8 if weights == "fp8" else SCALE) / 8**0.5
    for sign in (1, -1):
        excess, variance, step = landed(weights, SparseZO(eps, cell=8), [sign], eps)
        assert not excess.any() and not variance.any() and step.count_nonzero() > 100


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_one_landing_for_all_queries_adds_no_more_noise_than_one_for_each(weights):
    """Of all roundings to whole codes with the right mean, rounding the sum has the least variance, f (1 - f).

    Measured against both: it is the sum's, below that of four landings, which is measured too.
    """
    zo, grads, lr = ZO(bits=4), [1.0, -2.0, 0.5, 1.5], 0.02
    excess, variance, _ = landed(weights, zo, grads, lr)
    n, together = excess.numel(), excess.square().mean()
    assert (excess.mean(0).abs() < 5 * variance.sum(0).sqrt() / N).all()
    assert abs(together - variance.mean()) < 5 * (excess**4).mean().sqrt() / n**0.5
    each = [landed(weights, zo, [g], lr / 4, step=1 + q) for q, g in enumerate(grads)]
    apart, variance, _ = (sum(column) for column in zip(*each, strict=True))
    assert abs(apart.square().mean() - variance.mean()) < 5 * (apart**4).mean().sqrt() / n**0.5
    assert together < apart.square().mean()


# ---------------------------------------------------------------- keys, batches, replay, schedules


@by_method
def test_a_run_is_its_seed_and_its_projected_gradients_redo_it(weights, zo):
    """Two queries a step, a new batch a step.  Afterwards `update` alone, with no loss, comes to the same bits."""
    zo, runs, hashes = replace(zo, queries=2), [], []
    for seed in (1, 1, 2):
        lm = tiny(weights)
        runs.append([
            zo_step(lm.weights, batch_loss(lm, seed=step), Key(seed, step), zo, 1e-3).projected_grads.tolist()
            for step in range(3)
        ])  # fmt: skip
        hashes.append(weights_sha256(lm.weights))
    assert runs[0] == runs[1] != runs[2] and hashes[0] == hashes[1] != hashes[2]
    redone = tiny(weights)
    for step, projected_grads in enumerate(runs[0]):
        update(redone.weights, torch.tensor(projected_grads, dtype=torch.float64), Key(1, step), zo, 1e-3)
    assert weights_sha256(redone.weights) == hashes[0] != weights_sha256(tiny(weights).weights)


def test_learning_rates():
    def rates(lr: float, schedule: str, steps: int, warmup: int = 0) -> list[float]:
        return [learning_rate(step, lr, schedule, steps, warmup) for step in range(steps + 1)]

    assert rates(0.5, "constant", 4) == [0.5] * 5
    assert rates(0.5, "linear", 4) == [0.5, 0.375, 0.25, 0.125, 0]
    assert rates(0.5, "constant", 4, 1) == [0.25, 0.5, 0.5, 0.5, 0.5]
    assert rates(1.0, "linear", 7, 3) == [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]
