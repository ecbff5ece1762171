"""family/elasticzo.py: the tail's gradient from the probes' forwards, the body's own update, Adam on any format, and
that nothing but the tail's activations is kept.

Oracles: autograd on plain models with the perturbed weights written in; ZO's own update of the body's tensors alone;
torch.optim.Adam.  Statistical bounds are 5 standard deviations.
"""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import (
    assert_equal_folders,
    assert_refused,
    last_line,
    one_of_two,
    shortened,
    tiny_llama,
    tiny_roberta,
)
from oracles import same_tensors
from torch import Tensor

import tensor_train
import train
from data.scoring import BatchLoss, Encoded
from family.elasticzo import Tail, land, tail_of, watching
from model import LanguageModel, create, load
from quant import FORMATS, Float, Store, encode
from random_bits import Key, Purpose, bits32, tensor_id
from runtime.checkpoints import weights_sha256
from zo_optim import ZO, PerturbedWeights, SparseZO, probe_losses, update, zo_step

KEY = Key(seed=3, step=5)
KINDS = {"full": ZO, "4 bits": partial(ZO, bits=4), "sparse": partial(SparseZO, cell=16)}
CASES = [("full", "fp32", 0), ("full", "bf16", 0), ("4 bits", "int8", 4), ("sparse", "int4", 0), ("sparse", "fp8", 0),
         *(pytest.param(*case, marks=pytest.mark.full) for case in (
             ("4 bits", "int8", 0), ("4 bits", "fp8", 0), *(("sparse", weights, 0) for weights in FORMATS[:3])
         ))]  # fmt: skip
LLAMA = tiny_llama(num_hidden_layers=3, hidden_size=16, intermediate_size=24)
ROBERTA = tiny_roberta(num_hidden_layers=3, hidden_size=16, intermediate_size=24)
MODELS = {"llama": LLAMA, "llama, tied": LLAMA | {"tie_word_embeddings": True},
          "roberta": ROBERTA | {"tie_word_embeddings": False}, "roberta, tied": ROBERTA}  # fmt: skip
by_model = pytest.mark.parametrize("raw", MODELS.values(), ids=MODELS)
by_case = pytest.mark.parametrize("kind, weights, residual", CASES)  # directions, format, residual bits


def tiny(raw: dict = LLAMA, weights: str = "fp32", residual: int = 0, oracle: bool = False) -> LanguageModel:
    """A random model with matrices five times the usual size, so that attention is not uniform."""
    lm = create(raw)
    dense = {name: stored.value * (5 if stored.value.ndim == 2 else 1) for name, stored in lm.weights.items()}
    lm.weights = {name: encode(tensor, weights, residual, oracle and tensor.ndim == 2)
                  for name, tensor in dense.items()}  # fmt: skip
    lm.format, lm.residual = weights, residual
    return lm


def batch_loss(lm: LanguageModel, micro_batch_size: int = 8, n: int = 5) -> BatchLoss:
    """Of n random prompts of 3 to 8 tokens, padded, with two options of one token."""
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 97, (int(torch.randint(3, 9, (), generator=g)),), generator=g).tolist()
               for _ in range(n)]  # fmt: skip
    return BatchLoss.of(lm, [Encoded([p], [[17], [42]], len(p) - 1, i % 2) for i, p in enumerate(prompts)], 0,
                        micro_batch_size)  # fmt: skip


def same(a: dict[str, Store], b: dict[str, Store]) -> bool:
    """Every stored bit; -0 is not 0."""
    return a.keys() == b.keys() and all(same_tensors(a[name], b[name]) for name in a)


def elastic(zo: ZO, lm: LanguageModel, blocks: int = 1, rate: float = 3.0) -> ZO:
    return replace(zo, moves=tail_of(lm, blocks, rate))


def take_step(lm: LanguageModel, zo: ZO, key: Key = KEY, lr: float = 1e-3, **options):
    """As train.train: the loss is watched."""
    return zo_step(lm.weights, zo.moves.watch(batch_loss(lm, **options), 2 * zo.queries), key, zo, lr)


def watched_gradient(lm: LanguageModel, zo: ZO, **options) -> dict[str, Tensor]:
    """What a step finds for the tail, which the next step forgets."""
    probe_losses(lm.weights, zo.moves.watch(batch_loss(lm, **options), 2 * zo.queries), KEY, zo)
    found = {name: copy.grad.view(lm.weights[name].shape) for name, copy in zo.moves.copies.items()}
    zo.moves.copies = {}
    return found


def gradient(raw: dict, tensors: dict[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
    """Autograd's, of a plain fp32 model of these tensors."""
    plain = create(raw)
    plain.weights = {name: Float(tensor.clone().requires_grad_(name in names)) for name, tensor in tensors.items()}
    batch_loss(plain)(plain.stored_view()).sum().backward()
    return {name: plain.weights[name].value.grad for name in names}


def dense(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: store.dequantise().float().view(store.shape) for name, store in lm.weights.items()}


@torch.no_grad()
def probes(lm: LanguageModel, zo: ZO) -> list[dict[str, Tensor]]:
    """The tensors of each probe, plus before minus, query after query: the body's perturbed, the tail's as they are."""
    body, written = replace(zo, moves=None), []
    for query in range(zo.queries):
        view = PerturbedWeights(lm.weights, KEY, body, [(query, 1), (query, -1)], 2)
        for sign in range(2):
            written.append({name: tensor if name in zo.moves.names else view.read(name)[sign].float()
                            for name, tensor in dense(lm).items()})  # fmt: skip
    return written


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Between two gradients, over the second's size."""
    far, size = (sum(float(x.double().square().sum()) for x in of) for of in ([a[n] - b[n] for n in b], b.values()))
    return (far / size) ** 0.5


# ---------------------------------------------------------------- which tensors


@by_model
def test_the_tail_is_the_last_blocks_and_what_comes_after_them(raw):
    """Names as the model has them; blocks 1 and 10 are not confused.  An output matrix that is the embedding stays."""
    lm = tiny(raw | {"num_hidden_layers": 11})
    head = {"llama": {"model.norm.weight"}, "roberta": {f"lm_head.{module}.{part}" for module in ("dense", "layer_norm")
                                                        for part in ("weight", "bias")}}[raw["model_type"]]  # fmt: skip
    head |= {lm.decoder} - {lm.embedding} | ({lm.bias} - {None})
    for blocks in (0, 1, 2, 11):
        tail, last = tail_of(lm, blocks, 3.0), [f"{lm.layers}{i}." for i in range(11 - blocks, 11)]
        assert tail.names == head | {name for name in lm.weights if name.startswith(tuple(last))}
        assert all(tail(name, KEY) != (name in tail.names) for name in lm.weights)
        assert lm.embedding not in tail.names and not any("embeddings" in name for name in tail.names)


def test_what_has_no_such_tail_is_refused():
    for blocks in (-1, 4):
        with pytest.raises(ValueError, match=f"0 to 3 blocks of this model, got {blocks}"):
            tail_of(tiny(), blocks, 3.0)
    lm = tiny()
    tensor_train.attach(lm, tensor_train.Spec("rep", "qv", 8, 2), seed=0)
    with pytest.raises(ValueError, match="a model's own weights, and only Spec"):
        tail_of(lm, 1, 3.0)


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("model, kind, weights, blocks", [
    ("llama", "full", "fp32", 1), ("llama, tied", "sparse", "int8", 2), ("roberta", "4 bits", "int4", 0),
    ("roberta, tied", "sparse", "fp8", 1), ("llama", "full", "bf16", 3),
])  # fmt: skip
def test_the_gradient_is_the_mean_of_the_probes_own(model, kind, weights, blocks):
    """Of two queries, each sign written into a plain model.  What is left is the order of float32's sums: some 1e-7 of
    a gradient a layer, where one probe for another changes it by a hundredth or more."""
    lm = tiny(MODELS[model], weights)
    zo = elastic(KINDS[kind](0.02, 2), lm, blocks)
    own = [gradient(MODELS[model], tensors, zo.moves.names) for tensors in probes(lm, zo)]
    found = watched_gradient(lm, zo)
    mean = {name: sum(of_one[name] for of_one in own) / 4 for name in zo.moves.names}
    assert found.keys() == zo.moves.names and distance(found, mean) < 3e-6
    for left_out in range(4):
        others = {name: (4 * mean[name] - own[left_out][name]) / 3 for name in mean}
        assert distance(others, mean) > 1e-3


@pytest.mark.parametrize("raw", [LLAMA, ROBERTA], ids=["llama", "roberta"])
def test_the_gradient_is_the_unperturbed_bodys_to_second_order(raw):
    """Half the eps: a quarter of the error, where one sign's alone has half.  At these eps errors are 1e-3 and more,
    rounding 1e-6; terms of the next order are eps^2 of them, a few hundredths."""
    lm, errors, one_sign = tiny(raw), [], []
    for eps in (8e-3, 4e-3):
        zo = elastic(ZO(eps), lm)
        plain = gradient(raw, dense(lm), zo.moves.names)
        errors.append(distance(watched_gradient(lm, zo), plain))
        one_sign.append(distance(gradient(raw, probes(lm, zo)[0], zo.moves.names), plain))
    assert 3.7 < errors[0] / errors[1] < 4.3 and errors[1] > 1e-4
    assert 1.6 < one_sign[0] / one_sign[1] < 2.4 and one_sign[1] > 5 * errors[1]


@pytest.mark.parametrize("raw, weights", [(LLAMA, "int8"), (ROBERTA, "fp32")], ids=["llama", "roberta"])
def test_micro_batches_have_the_same_gradient(raw, weights):
    """And the same losses, but for the order of float32's sums."""
    lm = tiny(raw, weights)
    zo = elastic(SparseZO(0.02, 2, cell=16), lm)
    whole = watched_gradient(lm, zo)
    for size in (1, 3):
        assert distance(watched_gradient(lm, zo, micro_batch_size=size), whole) < 3e-6
    losses = [probe_losses(lm.weights, loss, KEY, zo)[0] for loss in (
        batch_loss(lm), zo.moves.watch(batch_loss(lm), 4), zo.moves.watch(batch_loss(lm, 2), 4)
    )]  # fmt: skip
    assert torch.equal(losses[0], losses[1]) and (losses[0] - losses[2]).abs().max() < 1e-6


# ---------------------------------------------------------------- the activations


@contextmanager
def kept_by_autograd():
    """-> the sizes in bytes of what forwards keep for their backward passes, one entry for each storage."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # which holds it, so that no other
        return tensor  # gets its address

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield storages


def kept(raw: dict, blocks: int, layers: int) -> tuple[int, int]:
    """How many storages, and their bytes, of the forward for both signs."""
    lm = tiny(raw | {"num_hidden_layers": layers}, "int8")
    with kept_by_autograd() as storages:
        watched_gradient(lm, elastic(SparseZO(0.02, cell=16), lm, blocks))
    return len(storages), sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("raw", [LLAMA, ROBERTA], ids=["llama", "roberta"])
def test_the_tails_activations_are_kept_and_the_bodys_are_not(raw):
    """A deeper body keeps nothing more, and a block of the tail as much as another (but the last, of few tokens)."""
    of = [kept(raw, blocks, 5) for blocks in range(4)]
    assert of[:3] == [kept(raw, blocks, 3) for blocks in range(3)]
    assert of[1] > of[0] and of[3][0] - of[2][0] == of[2][0] - of[1][0] > 10
    assert of[3][1] - of[2][1] == of[2][1] - of[1][1] > 0


# ---------------------------------------------------------------- a step


@by_case
def test_the_body_moves_as_without_a_tail_and_no_direction_moves_the_tail(kind, weights, residual):
    """To the bit: as an update of the body's tensors alone by the same projected gradients, which are those of plain
    models with the body perturbed.  With a rate of 0 the tail stays."""
    raw = ROBERTA if weights in ("fp32", "int8") else LLAMA | {"tie_word_embeddings": True}
    lm, zo = tiny(raw, weights, residual), KINDS[kind](0.01, 2)
    with_tail = elastic(zo, lm, rate=0.0)
    before, names = deepcopy(lm.weights), with_tail.moves.names
    plain, losses = create(raw), []
    for tensors in probes(lm, with_tail):
        plain.weights = {name: Float(tensor) for name, tensor in tensors.items()}
        losses.append(batch_loss(plain)(plain.stored_view()).item())
    done = take_step(lm, with_tail)
    found = torch.stack((done.plus, done.minus), 1).flatten()
    assert (found - torch.tensor(losses, dtype=torch.float64)).abs().max() < 2e-6  # 32 units of losses below 1
    want = {name: deepcopy(store) for name, store in before.items() if name not in names}
    counts = update(want, done.projected_grads, KEY, zo, 1e-3)
    assert done.projected_grads.all() and torch.equal(done.counts, counts) and counts[0] > 0
    assert same({name: lm.weights[name] for name in want}, want)
    assert same({name: lm.weights[name] for name in names}, {name: before[name] for name in names})
    assert not all(same_tensors(want[name], before[name]) for name in want)


def rates(step: int) -> float:
    """Of a schedule that begins by measuring."""
    return (0.0, 1e-3, 5e-4, 2e-3, 1e-3)[step % 5]


@pytest.mark.parametrize("raw, queries", [(LLAMA, 1), (ROBERTA, 3)], ids=["llama", "roberta"])
def test_adam_is_torchs(raw, queries):
    """On fp32 weights, from the same gradients, over steps of several rates.  Both round a step of 3e-3 some times, to
    1e-7 of it, and the sum to float32: 6e-8 of a weight of about 1."""
    lm = tiny(raw)
    zo = elastic(ZO(0.01, queries), lm, 1, 3.0)
    theirs = {name: dense(lm)[name].clone().requires_grad_() for name in zo.moves.names}
    adam, before = torch.optim.Adam(theirs.values(), lr=1.0), deepcopy(lm.weights)
    for step in range(6):
        key, lr = Key(1, step), rates(step)
        loss = zo.moves.watch(batch_loss(lm), 2 * queries)
        plus, minus = probe_losses(lm.weights, loss, key, zo)
        for name, weight in theirs.items():
            weight.grad = zo.moves.copies[name].grad.clone().view(weight.shape)
        adam.param_groups[0]["lr"] = 3.0 * lr
        adam.step()
        update(lm.weights, (plus - minus) / (2 * zo.eps), key, zo, lr)
    for name, weight in theirs.items():
        assert torch.allclose(lm.weights[name].value, weight.detach(), rtol=3e-7, atol=1e-8)
        assert not torch.equal(lm.weights[name].value, before[name].value)
    assert zo.moves.steps == 6


def spacing_at(w: Tensor, store: Store) -> Tensor:
    """How far apart the grid's points are there."""
    if isinstance(store, Float):
        return 2.0 ** (w.abs().log2().floor() - 7)
    if store.codes.dtype == torch.float8_e4m3fn:
        return 2.0 ** ((w / store.scale).abs().log2().floor() - 3).clamp(min=-9) * store.scale
    return store.spacing(slice(None)).expand_as(w) / 2**store.residual_bits


@pytest.mark.parametrize("weights, residual", [("bf16", 0), ("int8", 0), ("int8", 4), ("int4", 0), ("fp8", 0)])
def test_a_step_lands_on_codes_without_bias(weights, residual):
    """Adam's first step is lr rate long, against the gradient's sign, which each of n keys rounds for itself: so a
    weight's mean is w - lr rate sign(g) to half a spacing over sqrt(n), and the sum over all weights to that of their
    squares.  Weights at the edge of their grid are left out, and those that a step takes over a power of two are given
    the larger spacing."""
    g, n, length = torch.Generator().manual_seed(0), 200, 3e-4
    matrix, gradients = torch.randn(4, 64, generator=g) * 0.05, torch.randn(4, 64, generator=g)
    encoded = encode(matrix, weights, residual)
    total = torch.zeros(4, 64, dtype=torch.float64)
    for step in range(n):
        store = deepcopy(encoded)
        tail = Tail({"w": store}, frozenset(["w"]), 3.0)
        tail.copies = {"w": torch.zeros(4, 64, requires_grad=True)}
        tail.copies["w"].grad = gradients.clone()
        tail.observe(Key(1, step), torch.zeros(1), length / 3)
        total += exact(store)
    wanted = exact(encoded) - length * gradients.sign()
    step_size = torch.maximum(spacing_at(exact(encoded), encoded), spacing_at(wanted, encoded))
    inside = matrix.abs() < 0.8 * matrix.abs().amax(1, keepdim=True)
    if weights == "int4":  # whose groups are 32 wide
        inside = (matrix.view(4, 2, 32).abs() < 0.8 * matrix.view(4, 2, 32).abs().amax(2, keepdim=True)).view(4, 64)
    error, bound = (total / n - wanted)[inside], 5 * 0.5 * step_size[inside].double() / n**0.5
    assert inside.sum() > 150 and (error.abs() < bound).all() and error.sum().abs() < bound.square().sum().sqrt()
    assert (error * gradients[inside].sign()).sum().abs() < bound.square().sum().sqrt()
    assert length * gradients.abs().sign().sum() > bound.square().sum().sqrt()  # no step at all would be seen


def exact(store: Store) -> Tensor:
    """The number that is stored, of a residual its fine point: float64."""
    if isinstance(store, Float) or not getattr(store, "residual_bits", 0):
        return store.dequantise().double()
    return (store.fine(slice(None)).double() + 0.5) * store.spacing(slice(None)).double() / 2**store.residual_bits


def test_a_landing_has_a_tensors_own_bits():
    """Those of its name and of the step, as the body's: by hand, and with another key another way.  Two tensors with
    the same numbers and gradients land apart."""
    store, delta = encode(torch.randn(8, 40, generator=torch.Generator().manual_seed(1)), "int8"), torch.full((8, 40),
                                                                                                            1e-3)
    key, want = Key(7, 9, tensor=tensor_id("w")), deepcopy(store)
    bits = bits32(key, Purpose.WEIGHT_ROUNDING, torch.arange(8), 40)
    want.add_rounded_(slice(None), delta, bits)
    other = deepcopy(store)
    land(store, delta, key)
    land(other, delta, key._replace(step=10))
    assert same_tensors(store, want) and not same_tensors(other, want)
    tail = Tail({name: deepcopy(store) for name in "vw"}, frozenset("vw"))
    tail.copies = {name: torch.zeros(8, 40, requires_grad=True) for name in "vw"}
    for copy in tail.copies.values():
        copy.grad = torch.ones(8, 40)
    tail.observe(KEY, torch.zeros(1), 1e-3)
    assert not same_tensors(tail.weights["v"], tail.weights["w"])


def test_a_run_watches_as_many_probes_as_it_has():
    """Adam would not show another number: it hardly depends on a gradient's scale."""
    lm = tiny()
    zo, loss_of = elastic(SparseZO(0.02, 2, cell=16), lm), lambda examples, queries: batch_loss(lm)
    wanted = watched_gradient(lm, zo)
    probe_losses(lm.weights, watching(loss_of, zo.moves)([], 2), KEY, zo)
    assert all(torch.equal(copy.grad.view_as(wanted[name]), wanted[name]) for name, copy in zo.moves.copies.items())


@pytest.mark.parametrize("weights, residual", [("int8", 0), pytest.param("int4", 4, marks=pytest.mark.full)])
def test_the_oracle_takes_the_same_steps(weights, residual):
    runs = [tiny(ROBERTA, weights, residual, oracle) for oracle in (False, True)]
    for lm in runs:
        zo = elastic(SparseZO(0.01, cell=16), lm)
        for step in range(2):
            take_step(lm, zo, Key(0, step))
    assert weights_sha256(runs[0].weights) == weights_sha256(runs[1].weights) != weights_sha256(
        tiny(ROBERTA, weights, residual).weights)  # fmt: skip


@by_case
def test_lr_0_leaves_every_bit(kind, weights, residual):
    """And Adam goes on averaging, as torch's would."""
    lm = tiny(ROBERTA, weights, residual)
    lm.weights["lm_head.bias"] = Float(torch.full((97,), -0.0))
    before, zo = deepcopy(lm.weights), elastic(KINDS[kind](0.01, 2), lm, 2)
    for step in range(2):
        done = take_step(lm, zo, Key(0, step), 0.0)
        assert done.projected_grads.all() and not done.counts.any()
    assert same(lm.weights, before) and zo.moves.steps == 2 and zo.moves.moments.keys() == zo.moves.names


@pytest.mark.parametrize("queries", [1, 2])
def test_a_loss_that_is_not_finite_leaves_everything(queries):
    """Weights, moments and the count of steps, in the first step as later.  Of two queries one bad loss keeps the tail
    still, whose gradient is of all; the body goes along the other."""
    lm = tiny(weights="int8")
    zo = elastic(SparseZO(0.01, queries, cell=16), lm)
    tail, real = zo.moves, batch_loss(lm)

    def bad(view) -> Tensor:
        broken = float("nan") if view.view.copies[0][0] == 0 else 1.0  # the first query
        return real(view) * broken

    def state() -> tuple:
        return deepcopy(lm.weights), deepcopy(tail.moments), tail.steps

    for _ in range(2):
        before, moments, steps = state()
        done = zo_step(lm.weights, tail.watch(bad, 2 * queries), KEY, zo, 1e-3)
        assert not done.projected_grads[0] and done.projected_grads[1:].all()
        names = lm.weights.keys() if queries == 1 else tail.names
        assert same({n: lm.weights[n] for n in names}, {n: before[n] for n in names}) and tail.steps == steps
        assert moments.keys() == tail.moments.keys() and not tail.copies
        assert all(torch.equal(a, b) for n in moments for a, b in zip(moments[n], tail.moments[n], strict=True))
        take_step(lm, zo)
        assert tail.steps == steps + 1 and not same({n: lm.weights[n] for n in tail.names},
                                                    {n: before[n] for n in tail.names})  # fmt: skip


# ---------------------------------------------------------------- whole runs

SHORT = "--method elasticzo --device cpu --steps 4 --eval-every 2 --batch-size 8 --num-eval 8".split()


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with shortened(dev=8):
        yield


@pytest.mark.parametrize("flags", ["--weights int8 --tail-blocks 2 --micro-batch-size 5 --queries 2",
                                   pytest.param("--tail-blocks 0 --tail-rate 10", marks=pytest.mark.full)]
                         )  # fmt: skip
def test_a_run_is_redone_and_taken_up_to_the_same_bits(capsys, tmp_path, flags):
    """By the data, in a replay; Adam's moments are made again too."""

    class Stop:
        asked = iter([0, 0, 0])
        signal = property(lambda self: next(self.asked, 2))

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, result = last_line(capsys, *SHORT, *flags.split(), "--out", str(whole))
    assert code == 0 and result["best_step"] == 4 and result["forwards"] == 4 * (4 if "queries" in flags else 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Stop", Stop)
        assert last_line(capsys, *SHORT, *flags.split(), "--out", str(cut))[0] == 130
    assert last_line(capsys, "--resume", str(cut))[0] == 0
    assert_equal_folders(cut, whole)
    code, replayed = last_line(capsys, "--replay", str(cut), "--verify", "4")
    assert code == 0 and replayed["equal"] and replayed["largest_difference"] < 1e-6
    assert replayed["weights_sha256"] == result["weights_sha256"] and len(replayed["verified_steps"]) == 4


def test_a_replay_has_the_threads_of_its_last_line(capsys, tmp_path):
    """Of a small model one: sums over parts of other sizes have other last bits, and so has the tail."""
    assert last_line(capsys, *SHORT, *"--steps 1 --eval-every 1".split(), "--out", str(tmp_path / "run"))[0] == 0
    torch.set_num_threads(2)
    try:
        assert last_line(capsys, "--replay", str(tmp_path / "run"))[0] == 0 and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_a_replay_sees_other_data(capsys, tmp_path):
    """Its gradient would be another."""
    assert last_line(capsys, *SHORT, *"--steps 1 --eval-every 1".split(), "--out", str(tmp_path / "run"))[0] == 0
    with shortened(train=40, dev=8):
        code, replayed = last_line(capsys, "--replay", str(tmp_path / "run"))
    assert code == 1 and not replayed["equal"]


def test_what_a_run_made_is_evaluated_and_exported(capsys, tmp_path):
    out, plain = tmp_path / "run", tmp_path / "plain"
    _, result = last_line(capsys, *SHORT, *"--weights int8 --tail-blocks 0 --steps 2".split(), "--out", str(out))
    code, asked = last_line(capsys, "--evaluate", str(out), "--num-eval", "8", "--device", "cpu")
    assert code == 0 and asked["weights_sha256"] == result["weights_sha256"] and asked["tests"] == result["tests"]
    assert asked["dev_loss"] == pytest.approx(result["dev_loss"], abs=1e-6)
    assert last_line(capsys, "--evaluate", str(out), "--export", str(plain), "--device", "cpu")[0] == 0
    best, exported = load(out / "model", weights="int8"), load(plain)
    assert all(torch.equal(exported.weights[name].value.view(store.matrix_shape), store.dequantise())
               for name, store in best.weights.items())  # fmt: skip


@pytest.mark.parametrize("steps", [25, pytest.param(200, marks=pytest.mark.full)])
def test_the_default_command_learns(capsys, tmp_path, steps):
    """In a few steps what MeZO takes hundreds for."""
    flags = f"--method elasticzo --device cpu --steps {steps} --eval-every {steps} --num-eval 150"
    flags += " --batch-size 16" if steps < 200 else ""
    code, result = last_line(capsys, *flags.split(), "--out", str(tmp_path / "run"))
    assert code == 0 and result["test"] > 0.9 > 0.7 > result["zero_shot"]


REFUSED = {
    "--objective accuracy": "takes a gradient, and --objective accuracy has none", "--tail-blocks -1": "got -1",
    "--tail-blocks 4": "0 to 3 blocks of this model", "--tail-blocks 9 --dry-run": "got 9",
    "--placement mlp": "means nothing beside --method elasticzo",
    "--adapters somewhere": "means nothing beside --method elasticzo", "--tail-rate nan": "got nan",
    "--optimizer adamw": "means --optimizer zo", "--graphs": "of the methods of family/ for subzero and mazo alone",
    "--weights int8 --activations int8 --compute int8": "multiplies floats, not codes: leave out --compute int8",
    "--weights bf16 --rounding nearest": "lands its tail by stochastic rounding: leave out --rounding nearest",
}  # fmt: skip


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path, flags):
    assert_refused(capsys, tmp_path / "run", REFUSED[flags], *SHORT, *flags.split())


def test_processes_do_not_share_its_steps(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "joined", one_of_two)
    assert_refused(capsys, tmp_path / "run", "start one process", *SHORT)
