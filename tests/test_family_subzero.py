"""family/subzero.py: its directions against integer arithmetic and autograd, its subspaces, and its low-rank reads.

Statistical bounds are 5 standard deviations, computed from the table of normal numbers.  Draws are keyed, so a test
that passes once passes always.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_llama, tiny_roberta
from oracles import gaussian, moments, normal_numbers, same_tensors
from torch import Tensor

import tensor_train
from data.scoring import BatchLoss, Encoded
from family.subzero import LowRankLinear, LowRankView, SubZero, enable_low_rank_reads
from model import LanguageModel, Linear, create
from quant import FORMATS, Float, Store, encode
from random_bits import Key, Purpose, bits16, bits32, tensor_id
from zo_optim import ZO, PerturbedWeights, probe_losses, update, zo_step

KEY, U1, U2 = Key(seed=3, step=45, tensor=77), Purpose.PROBE_ROUNDING, Purpose.UPDATE_ROUNDING
STORED = [*((weights, 0) for weights in FORMATS), ("int8", 4), ("int4", 1)]  # format, residual bits
by_stored = pytest.mark.parametrize("weights, residual", STORED)
CPU = torch.device("cpu")


def whole(zo: ZO, key: Key, R: int, C: int) -> Tensor:
    return zo.direction(key, (R, C), torch.arange(R), U1)


def numbers(key: Key, n: int, r: int) -> np.ndarray:
    """A key's [n, r] normal numbers in units of 2^-14, int64, off the oracle's table."""
    return normal_numbers()[bits16(key, Purpose.DIRECTION, torch.arange(n), r)].numpy()


def same(a: dict[str, Store], b: dict[str, Store]) -> bool:
    return all(same_tensors(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize("R, C, r", [(40, 150, 7), (33, 25, 24), (9, 700, 1)])
def test_bases_are_numpys_of_the_same_numbers(R, C, r):
    """Keyed by the window, at the last two queries; orthonormal.

    A basis is rounded to multiples of 2^-22, half of one away at most, and two QRs in float64 are 1e-13 apart.  So an
    inner product of two columns is off by |u| |e| twice and |e|^2, with |e| <= sqrt(n) 2^-23.
    """
    zo = SubZero(rank=r, every=10)
    for B, n, query in zip(zo.subspace(KEY, (R, C), CPU), (R, C), (2**28 - 1, 2**28 - 2), strict=True):
        Q, triangle = np.linalg.qr(numbers(Key(3, 4, query, 77), n, r) / 2**14)
        assert np.abs(B.numpy() - Q * np.sign(np.diag(triangle))).max() <= 2**-23 + 1e-12
        assert B.dtype == torch.float32 and torch.equal(B * 2**22, (B * 2**22).round())
        gap = (B.double().T @ B.double() - torch.eye(r)).abs().max()
        assert gap <= 2 * n**0.5 * 2**-23 + n * 2**-46


@pytest.mark.parametrize("R, C, r", [(40, 150, 7), (300, 25, 24)])
def test_a_direction_by_integers(R, C, r):
    """sqrt(R C) / r * U Z V^T with every sum taken exactly, so that no order of them can matter: all bits."""
    zo, key = SubZero(rank=r, every=10), KEY._replace(query=2)
    U, V = ((B.double() * 2**22).long().numpy() for B in zo.subspace(key, (R, C), CPU))
    left = np.rint((U @ numbers(key, r, r)) / 2**16).astype(np.int64)  # from multiples of 2^-36 to those of 2^-20
    want = torch.from_numpy((left @ V.T) / 2**42 * ((R * C) ** 0.5 / r)).float()
    got = whole(zo, key, R, C)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    rows = torch.tensor([R - 1, 0, 3, 3])
    assert torch.equal(zo.direction(key, (R, C), rows, U2), want[rows])
    for row in (0, 17):
        assert torch.equal(zo.direction(key, (R, C), torch.tensor([row]), U2), want[row : row + 1])


def test_what_has_no_subspace_has_mezos_direction():
    """Vectors, numbers, and matrices with a side of at most the rank."""
    zo, mezo = SubZero(rank=4), ZO()
    for R, C in ((1, 50), (1, 1), (4, 50), (50, 4), (2, 3)):
        assert torch.equal(whole(zo, KEY, R, C), whole(mezo, KEY, R, C))
    assert not torch.equal(whole(zo, KEY, 5, 50), whole(mezo, KEY, 5, 50))


def test_a_subspace_stays_for_its_steps():
    """The span of D's columns and of its rows is the same in steps 40 to 49 and another from 50 on; Z is another in
    each step and query; seeds and tensors differ in all.  A step that is gone back to has the bits that it had."""
    zo, R, C, r = SubZero(rank=3, every=10), 20, 30, 3
    keys = [Key(3, step, query, 77) for step in (40, 49) for query in (0, 1)]
    first, others = keys[0], [Key(3, 50, 0, 77), Key(3, 39, 0, 77), Key(4, 40, 0, 77), Key(3, 40, 0, 78)]
    drawn = {key: whole(zo, key, R, C) for key in (*keys, *others)}
    assert len({d.numpy().tobytes() for d in drawn.values()}) == len(drawn)

    def rank(*keys: Key, dim: int) -> int:  # of what lies side by side
        singular = torch.linalg.svdvals(torch.cat([drawn[key] for key in keys], dim).double())
        return int((singular > 1e-4 * singular[0]).sum())  # rounding leaves some 1e-6

    for dim in (0, 1):
        assert rank(first, dim=dim) == rank(*keys, dim=dim) == r
        for other in others:
            assert rank(first, other, dim=dim) == 2 * r
    assert sorted(tensor for tensor, *_ in zo.bases) == [77, 78]  # one window's of each
    for key in (first, *others):
        assert torch.equal(whole(SubZero(rank=3, every=10), key, R, C), drawn[key])
        assert torch.equal(whole(zo, key, R, C), drawn[key])
    assert zo == SubZero(rank=3, every=10) and replace(zo, queries=2).bases is zo.bases


def test_bases_of_a_window_are_kept(monkeypatch):
    """One QR a side of each matrix, however often the windows' steps, queries and rows are read."""
    done, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x: done.append(tuple(x.shape)) or qr(x))
    zo = SubZero(rank=3, every=10)
    for step in range(30):
        for tensor in range(5):
            for query in range(2):
                whole(zo, Key(0, step, query, tensor), 20, 6)
    assert done == [(20, 3), (6, 3)] * 15


def test_a_window_takes_the_last_ones_memory():
    """Where recorded launches look for it: with the step's number in memory, bases are those that were made for it."""
    weights = {name: encode(torch.randn(shape), "fp32") for name, shape in (("w", (20, 30)), ("b", (20,)))}
    zo, at, addresses = SubZero(rank=3, every=10), Key(3, torch.tensor([0]), 0, tensor_id("w")), set()
    for step in (9, 10, 40, 9):
        zo.fill_buffers(weights, Key(3, step))
        bases = zo.subspace(at, (20, 30), CPU)
        fresh = SubZero(rank=3, every=10).subspace(at._replace(step=step), (20, 30), CPU)
        assert all(map(torch.equal, bases, fresh))
        addresses.add(tuple(B.data_ptr() for B in bases))
    assert len(addresses) == 1 and len(zo.bases) == 1


def test_streams_do_not_meet():
    """The numbers of U, V and Z are each other's nowhere, also in a step that has a window's number."""
    zo, rows = SubZero(rank=8, every=1), torch.arange(16)
    keys = [*(Key(0, step, query) for step in (0, 1) for query in (0, 1)), *(Key(0, s, 2**28 - q) for s in (0, 1)
            for q in (1, 2))]  # fmt: skip
    blocks = {bits16(key, Purpose.DIRECTION, rows[i : i + 1], 8).numpy().tobytes() for key in keys for i in rows}
    assert len(blocks) == len(keys) * 16  # of 8 numbers, 128 bits each
    U, V = zo.subspace(Key(0, 1), (20, 20), CPU)
    assert (U.T @ V).abs().max() < 0.99


def test_norms_are_mezos():
    """|D|^2 = R C |Z|^2 / r^2 each time, to the bases' rounding; so its mean is R C E[z^2], of one subspace and of
    many.  |Z|^2 is the sum of r^2 squares."""
    R, C, r, n = 30, 50, 6, 400
    squares = []
    for zo in (SubZero(rank=r), SubZero(rank=r, every=1)):
        for step in range(n):
            key = Key(1, step, 0, 5)
            squares.append(whole(zo, key, R, C).double().square().sum())
            Z = torch.from_numpy(numbers(key, r, r) / 2**14)
            assert squares[-1] == pytest.approx(R * C * float(Z.square().sum()) / r**2, rel=1e-5)
    second, fourth = (moment.mean() for moment in moments(None))
    deviation = ((fourth - second**2) / r**2 / len(squares)).sqrt()
    assert abs(torch.stack(squares).mean() / (R * C) - second) < 5 * deviation


# ---------------------------------------------------------------- estimates


A, B = gaussian(10, 4, seed=1).double(), gaussian(12, 10, seed=2).double()


def quadratic(w: Tensor) -> Tensor:
    """Of w [12, 10], so that a difference of two probes is exactly the slope between them."""
    return (w @ A).square().sum() / 2 + (w * B).sum()


def losses(view) -> Tensor:
    return torch.stack([quadratic(w) for w in view.read("w")])


def estimates(zo: SubZero, store: dict[str, Store], key: Key) -> Tensor:
    """The mean of g D over the queries, as `update` makes it: a step of lr 1 down from zero, sign turned."""
    plus, minus = probe_losses(store, losses, key, zo)
    zeros = {"w": Float(torch.zeros(12, 10))}
    update(zeros, (plus - minus) / (2 * zo.eps), key, zo, 1.0)
    return -zeros["w"].value.double()


def gradient(store: dict[str, Store]) -> Tensor:
    w = store["w"].dequantise().double().requires_grad_()
    return torch.autograd.grad(quadratic(w), w)[0]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_the_mean_estimate_is_the_projected_gradient(weights):
    """m n / r^2 U U^T G V V^T of autograd's G, sign included, each coordinate within the subspace; outside there is
    nothing but rounding.

    With M = U^T G V, the variance of <M, Z> Z_ab is v^2 (|M|^2 - M_ab^2) + (K - v^2) M_ab^2, v = E[z^2] and
    K = E[z^4].
    """
    n, r, key = 800, 3, Key(3, 45)
    zo, store = SubZero(1e-2, n, rank=r, every=10, dtype=torch.float64), {"w": encode(gaussian(12, 10), weights)}
    got, G = estimates(zo, store, key), gradient(store)
    U, V = (B.double() for B in zo.subspace(key._replace(tensor=tensor_id("w")), (12, 10), CPU))
    M, (v, K) = U.T @ G @ V, (moment.mean() for moment in moments(None))
    variance = v**2 * (M.square().sum() - M**2) + (K - v**2) * M**2
    inside, scale = U.T @ got @ V, 12 * 10 / r**2
    assert ((inside / scale - v * M).abs() < 5 * (variance / n).sqrt()).all()
    along = (inside / scale * M).sum() / M.square().sum()  # a mean of <M, Z>^2 / |M|^2, whose variance is 2 at most
    assert abs(along - v) < 5 * (2 / n) ** 0.5 < 0.3
    assert (got - U @ inside @ V.T).abs().max() < 1e-4 * inside.abs().max()


def test_over_the_subspaces_the_mean_is_the_gradient():
    """Each coordinate and the projection on G, by the draws' own standard deviation."""
    n, zo = 1000, SubZero(1e-2, 1, rank=4, every=1, dtype=torch.float64)
    store, tensor = {"w": encode(gaussian(12, 10), "fp32")}, tensor_id("w")
    G = gradient(store)
    D = torch.stack([whole(zo, Key(3, step, 0, tensor), 12, 10) for step in range(n)]).double()
    draws = (D * G).sum((1, 2), keepdim=True) * D  # of a quadratic, (D . G) is g
    assert (draws[7] - estimates(zo, store, Key(3, 7))).abs().max() < 1e-4 * draws[7].abs().max()
    assert ((draws.mean(0) - G).abs() < 5 * draws.std(0) / n**0.5).all()
    along = (draws * G).sum((1, 2)) / G.square().sum()
    assert abs(along.mean() - 1) < 5 * along.std() / n**0.5 < 0.5


# ---------------------------------------------------------------- steps


def four_tensors(weights: str, residual: int = 0) -> dict[str, Store]:
    """A matrix with a short second group of int4 scales, a vector, a kernel of 4 axes, and a number."""
    shapes = {"w": (12, 150), "vector": (7,), "kernel": (5, 3, 2, 2), "number": ()}
    return {name: encode(gaussian(*shape, seed=len(name)), weights, residual) for name, shape in shapes.items()}


def wavy(w: dict[str, Tensor]) -> Tensor:
    return sum((x * gaussian(*x.shape, seed=9)).sum().sin() + x.square().sum() / 50 for x in w.values())


def wavy_loss(view) -> Tensor:
    return torch.stack([wavy({name: view.read(name)[p] for name in view.weights}) for p in range(view.probes)])


@by_stored
def test_a_step_by_hand(weights, residual):
    """Losses at w + eps D and w - eps D, and one rounding of w - lr / Q sum of g D; a fresh estimator redoes it."""
    zo, lr, key = SubZero(0.02, 2, rank=3, every=10), 2e-3, Key(3, 45)
    store, want, again = (four_tensors(weights, residual) for _ in range(3))
    done = zo_step(store, wavy_loss, key, zo, lr)
    D = {(name, q): whole(SubZero(rank=3, every=10), Key(3, 45, q, tensor_id(name)), *stored.matrix_shape)
         for name, stored in want.items() for q in range(2)}  # fmt: skip
    for sign, got in ((1, done.plus), (-1, done.minus)):
        for q in range(2):
            w = {n: (s.dequantise() + sign * (D[n, q] * 0.02)).view(s.shape) for n, s in want.items()}
            assert got[q] == wavy(w).double()
    lengths = (-lr * done.projected_grads / 2).tolist()
    for name, stored in want.items():
        R, C = stored.matrix_shape
        bits = bits32(key._replace(tensor=tensor_id(name)), Purpose.WEIGHT_ROUNDING, torch.arange(R), C)
        delta = D[name, 0] * lengths[0] + D[name, 1] * lengths[1]
        stored.add_rounded_(slice(0, R), delta, bits if stored.rounds else None)
    assert same(store, want) and not same(store, again)
    update(again, done.projected_grads, key, SubZero(0.02, 2, rank=3, every=10), lr)
    assert same(store, again)


@by_stored
def test_steps_learn_and_steps_of_no_length_change_no_bit(weights, residual):
    """The mean square of 120 numbers that are 1 falls to a half and less, in all formats.

    Each step takes the square within a subspace to 1 - 2 a + a^2 (1 + 37 / 8) of it, a = lr R C / r^2 = 0.15: ten to
    0.15.  A subspace has 36 / 120 of it, give or take 0.16 (two Beta distributions' product), so six of them leave
    (1 - 0.85 * 0.3)^6 = 0.17, a factor e^0.44 a standard deviation, and rounding's noise.
    """
    store, zo = {"w": encode(torch.ones(12, 10), weights, residual)}, SubZero(1e-2, 8, rank=6, every=10)
    before, generator = deepcopy(store), torch.get_rng_state()

    def loss_fn(view) -> Tensor:
        return view.read("w").square().sum((1, 2)) / 2

    for lr, steps in ((0.0, 5), (0.045, 60)):
        for step in range(steps):
            done = zo_step(store, loss_fn, Key(0, step), zo, lr)
        assert done.projected_grads.any()
        if not lr:
            assert same(store, before)
    assert store["w"].dequantise().square().mean() < 0.5
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("wrong", [{"bits": 4}, {"rank": 0}, {"rank": 257}, {"every": 0}, {"eps": 0.0}])
def test_no_estimator(wrong):
    with pytest.raises(ValueError, match=str(*wrong)):
        SubZero(**wrong)


# ---------------------------------------------------------------- low-rank reads


RAWS = {"llama": tiny_llama(), "tied llama with biases": tiny_llama(tie_word_embeddings=True, attention_bias=True),
        "roberta": tiny_roberta()}  # fmt: skip
by_raw = pytest.mark.parametrize("raw", RAWS.values(), ids=RAWS)


def tiny(raw: dict, weights: str = "fp32") -> LanguageModel:
    """A random model with matrices five times the usual size, so that attention is not uniform, and random vectors."""
    lm = create(raw, seed=0)
    for name, stored in lm.weights.items():
        value = stored.value * 5 if stored.value.ndim == 2 else stored.value + 0.3 * gaussian(*stored.shape)
        lm.weights[name] = encode(value, weights)
    lm.format = weights
    return lm


def batch_loss(lm: LanguageModel, n: int = 6) -> BatchLoss:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, 97, (n, 7), generator=generator).tolist()
    return BatchLoss.of(lm, [Encoded([row], [[17], [42]], 5, i % 2) for i, row in enumerate(rows)], 0, 8)


@pytest.mark.parametrize("weights", ["fp32", "int8", "fp8"])
@by_raw
def test_low_rank_reads_are_the_definition(raw, weights, monkeypatch):
    """Losses of 2 copies at a time, and of 2 queries' 4; and no perturbed matrix of a block is made.

    2^-24 is a rounding.  Some 20 products stand behind a logit, each of 32 to 56 terms and the direction's, whose
    roundings add up like random ones: sqrt(20 * 64) 2^-24 of logits of size 3 and less, and a loss takes at most twice
    a logit's error.
    """
    bound = 2 * 3 * (20 * 64) ** 0.5 * 2**-24  # 1.3e-5
    lm, twin = tiny(raw, weights), tiny(raw, weights)
    enable_low_rank_reads(twin)
    made, perturbed = [], SubZero.perturbed
    for zo in (SubZero(0.02, 2, rank=5, every=10), SubZero(0.02, 2, rank=5, every=10, probes_per_forward=None)):
        want = torch.stack(probe_losses(lm.weights, batch_loss(lm), Key(3, 45), zo))
        with monkeypatch.context() as patch:
            patch.setattr(SubZero, "perturbed", lambda *a, **kw: made.append(a[1]) or perturbed(*a, **kw))
            got = torch.stack(probe_losses(twin.weights, batch_loss(twin), Key(3, 45), zo))
        assert (got - want).abs().max() < bound
        spread = min((want[:, :1] - want[:, 1:]).abs().min(), (want[0] - want[1]).abs().min())
        assert spread > 100 * bound  # copies differ by far more
        names = {name for name, stored in twin.weights.items() if any(stored is store for store in made)}
        assert names and not [n for n in names if n.startswith(twin.layers) and twin.weights[n].matrix_shape[0] > 1]


@pytest.mark.parametrize("bias", [False, True])
def test_a_low_rank_layer_is_the_layer_of_perturbed_weights(bias):
    """In float64, where sums of 40 terms of size 1 are 1e-14 apart: input of one copy or of each, rounded first."""
    shapes = {"x": (3, 2, 4, 40), "weight": (1, 20, 40), "left": (3, 20, 6), "right": (1, 40, 6), "bias": (3, 20)}
    x, weight, left, right, b = (gaussian(*shape, seed=len(name)).double() for name, shape in shapes.items())
    plain, low = Linear(40, 20, bias=bias), LowRankLinear(40, 20, bias)
    given = {"bias": b} if bias else {}
    call = torch.func.functional_call
    for rounding in (None, lambda flat: flat.round()):
        plain.round_input = low.round_input = rounding
        for x_of in (x, x[:1]):
            want = call(plain, given | {"weight": weight + left @ right.mT}, (x_of,))
            got = call(low, given | {"weight": weight, "left": left, "right": right}, (x_of,))
            assert got.shape == want.shape == (3, 2, 4, 20) and (got - want).abs().max() < 1e-12
            none = {"left": left[:1, :, :0], "right": right[..., :0]}
            want = call(plain, given | {"weight": weight + left @ right.mT}, (x_of,))
            assert torch.equal(call(low, given | none | {"weight": weight + left @ right.mT}, (x_of,)), want)


@by_raw
@torch.no_grad()
def test_whatever_is_no_probe_of_subzeros_is_read_as_before(raw):
    """To the bit: the stored weights, MeZO's probes, probes of codes, tensors of no subspace, tensors left alone."""
    tokens = torch.randint(5, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    lm, twin = tiny(raw, "int8"), tiny(raw, "int8")
    enable_low_rank_reads(twin)
    assert torch.equal(twin(tokens), lm(tokens)) and twin.weights.keys() == lm.weights.keys()
    still = {"moves": lambda name, key: not name.startswith(lm.layers)}
    for zo in (ZO(0.02), SubZero(0.02, rank=5, probe="codes"), SubZero(0.02, rank=32), SubZero(0.02, rank=5, **still)):
        views = (PerturbedWeights(model.weights, Key(0, 0), zo, [(0, 1), (0, -1)], 2) for model in (lm, twin))
        want, got = (model(tokens, view=view) for model, view in zip((lm, twin), views, strict=True))
        assert torch.equal(got, want) and not torch.equal(got[0], got[1])


def test_what_low_rank_reads_go_with():
    """Input rounding goes over to the layers, and bf16 products stay bf16.  Codes are read as codes, and weights are
    the view's.  Another wrapper of views stays, and adapters that come later are read as without low-rank reads.  A
    second time, other layers and adapters that were there are refused.
    """
    lm = tiny(tiny_llama())
    lm.round_inputs(torch.round)
    enable_low_rank_reads(lm)
    assert all(layer.round_input is torch.round for _, layer in lm.linears())
    with pytest.raises(ValueError, match="LowRankLinear"):
        enable_low_rank_reads(lm)

    lm = tiny(tiny_llama(), "bf16")
    lm.dtype = torch.bfloat16
    enable_low_rank_reads(lm)
    zo = SubZero(0.05, rank=5, dtype=torch.bfloat16)
    assert zo_step(lm.weights, batch_loss(lm), Key(0, 0), zo, 1e-4).projected_grads.all()

    lm, name = tiny(tiny_llama(), "fp8"), "model.layers.0.mlp.up_proj.weight"
    view = PerturbedWeights(lm.weights, Key(0, 0), SubZero(0.05, rank=5), [(0, 1), (0, -1)], 2)
    codes = LowRankView(view, lm).read(name, as_codes=True)
    assert len(codes) == 2 and torch.equal(codes.float(), view.read(name, as_codes=True).float())
    assert torch.equal(LowRankView(view, tiny(tiny_llama())).read(name)[0], lm.weights[name].dequantise())  # the view's

    lm, seen = tiny(tiny_llama()), []
    lm.wrap_view = lambda view: seen.append(view) or view
    enable_low_rank_reads(lm)
    assert lm(torch.ones(1, 3, dtype=torch.int64)).isfinite().all() and seen

    models = [tiny(tiny_llama()), tiny(tiny_llama())]
    enable_low_rank_reads(models[1])
    for lm in models:
        tensor_train.attach(lm, tensor_train.Spec("lora", "qv", 0, 2), seed=0)
    runs = [zo_step(tensor_train.trained(lm), batch_loss(lm), Key(0, 0), SubZero(0.1, rank=5), 0.1) for lm in models]
    assert torch.equal(runs[0].plus, runs[1].plus) and runs[0].projected_grads.all()
    with pytest.raises(ValueError, match="lora"):
        enable_low_rank_reads(models[0])

    lm = tiny(tiny_llama())
    lm.block.set_submodule("mlp.up_proj", type("Other", (Linear,), {})(32, 56))
    with pytest.raises(ValueError, match="Other"):
        enable_low_rank_reads(lm)
