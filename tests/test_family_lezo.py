"""family/lezo.py: which blocks a step moves, that nothing else is touched, that both signs share a beginning, AdaLeZO.

Oracles: ZO's own update of the chosen tensors alone; plain models with the perturbed weights written in; a view in
which every tensor has P copies.  Statistical bounds are 5 standard deviations.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import tiny_llama, tiny_roberta
from oracles import same_tensors
from torch import Tensor

import tensor_train
from data.scoring import BatchLoss, Encoded
from family import lezo as family
from family.lezo import ActiveBlocks, Bandit, active_blocks, adalezo, block_of, lezo
from model import LanguageModel, create
from quant import FORMATS, Float, Store, StoredWeights, encode
from random_bits import Key, Purpose, philox_blocks
from zo_optim import ZO, PerturbedWeights, SparseZO, probe_losses, update, zo_step

KEY = Key(seed=3, step=5)
KINDS = {"full": ZO, "4 bits": partial(ZO, bits=4), "sparse": partial(SparseZO, cell=16)}
CASES = [*(("4 bits", weights, 0) for weights in FORMATS), ("4 bits", "int8", 4), ("full", "fp32", 0),
         ("full", "bf16", 0), *(("sparse", weights, 0) for weights in ("bf16", "int8", "int4", "fp8"))]  # fmt: skip
LLAMA = tiny_llama(num_hidden_layers=4, hidden_size=16, intermediate_size=24)
ROBERTA = tiny_roberta(num_hidden_layers=4, hidden_size=16, intermediate_size=24)
by_model = pytest.mark.parametrize("raw", [LLAMA, ROBERTA], ids=["llama", "roberta"])
by_kind = pytest.mark.parametrize("kind", KINDS)
by_case = pytest.mark.parametrize("kind, weights, residual", CASES)  # directions, format, residual bits


def tiny(raw: dict = LLAMA, weights: str = "fp32", residual: int = 0) -> LanguageModel:
    """A random model with matrices five times the usual size, so that attention is not uniform."""
    lm = create(raw)
    dense = {name: stored.value * (5 if stored.value.ndim == 2 else 1) for name, stored in lm.weights.items()}
    lm.weights, lm.format = {name: encode(tensor, weights, residual) for name, tensor in dense.items()}, weights
    return lm


def batch_loss(lm: LanguageModel, n: int = 3, tokens_an_option: int = 1) -> BatchLoss:
    """Of n random prompts of 3 to 8 tokens, padded, with two options: of one token, read off one place; of several,
    each in a branch of its own, which needs attention's mask."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    options = [[17, 5, 6][:tokens_an_option], [42, 7, 8][:tokens_an_option]]
    if tokens_an_option == 1:
        examples = [Encoded([p], options, len(p) - 1, i % 2) for i, p in enumerate(prompts)]
    else:
        examples = [Encoded([p + option for option in options], options, -1, i % 2) for i, p in enumerate(prompts)]
    return BatchLoss.of(lm, examples, 0, 8)


def same(a: dict[str, Store], b: dict[str, Store]) -> bool:
    """Every stored bit; -0 is not 0."""
    return a.keys() == b.keys() and all(same_tensors(a[name], b[name]) for name in a)


def pair(lm: LanguageModel, zo: ZO, query: int = 0) -> PerturbedWeights:
    return PerturbedWeights(lm.weights, KEY, zo, [(query, 1), (query, -1)], 2)


# ---------------------------------------------------------------- the active blocks


@pytest.mark.parametrize("blocks, share, size", [
    (12, 0.25, 3), (12, 1.0, 12), (1, 0.25, 1), (4, 0.1, 1), (10, 0.25, 2), (14, 0.25, 4), (24, 0.3, 7),
])  # fmt: skip
def test_a_step_has_so_many_blocks(blocks, share, size):
    for step in range(50):
        chosen = active_blocks(0, step, blocks, share)
        assert len(chosen) == size and chosen <= set(range(blocks))


def test_all_sets_are_as_likely_and_each_step_has_its_own():
    """2 of 4 blocks: 6 sets, each in a sixth of n steps, and neighbouring steps agree as often as chance has it."""
    n, state = 1500, torch.get_rng_state()
    drawn = [active_blocks(7, step, 4, 0.5) for step in range(n)]
    count = Counter(drawn)
    assert len(count) == 6 and all(abs(c - n / 6) < 5 * (n * 5 / 36) ** 0.5 for c in count.values())
    again = sum(a == b for a, b in zip(drawn, drawn[1:], strict=False))
    assert abs(again - n / 6) < 5 * (n * 5 / 36) ** 0.5
    other = sum(active_blocks(8, step, 4, 0.5) == chosen for step, chosen in enumerate(drawn))
    ordered = 0  # as by the words that the order of the data is drawn from
    for step, chosen in enumerate(drawn):
        words = philox_blocks(Key(7, step), Purpose.DATA_ORDER, torch.arange(4), 8)[:, 0, 0].long() & 0xFFFFFFFF
        ordered += set(words.argsort()[:2].tolist()) == chosen
    for agreements in (other, ordered):
        assert abs(agreements - n / 6) < 5 * (n * 5 / 36) ** 0.5
    assert torch.equal(torch.get_rng_state(), state)


def test_the_draw_is_pinned():
    """A change would replay no recorded run."""
    assert [sorted(active_blocks(0, step, 12, 0.25)) for step in range(3)] == [[2, 3, 11], [2, 3, 8], [1, 3, 10]]
    assert sorted(active_blocks(2**63 + 5, 2**31, 32, 0.125)) == [10, 13, 18, 20]


@by_model
def test_every_tensor_of_a_block_goes_with_it(raw):
    """Names as the model has them; blocks 1 and 10 are not confused."""
    lm = tiny(raw | {"num_hidden_layers": 12})
    for rest in (True, False):
        moves = lezo(ZO(), lm, 0.25, rest).moves
        chosen = active_blocks(KEY.seed, KEY.step, 12, 0.25)
        for name in lm.weights:
            inside = [i for i in range(12) if name.startswith(f"{lm.layers}{i}.")]
            assert block_of(name, lm.layers) == (inside[0] if inside else None)
            assert moves(name, KEY) == (inside[0] in chosen if inside else rest)
            assert moves(name, KEY._replace(query=3, tensor=9)) == moves(name, KEY)
    assert hash(moves) == hash(ActiveBlocks(lm.layers, 12, 0.25, False))


def test_what_is_no_share_is_refused():
    for share in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"got {share} of 4"):
            lezo(ZO(), tiny(), share)
        with pytest.raises(ValueError, match=f"got {share} of 4"):
            adalezo(ZO(), tiny(), share)
    with pytest.raises(ValueError, match="of 0"):
        ActiveBlocks("x.", 0)
    lm = tiny()
    tensor_train.attach(lm, tensor_train.Spec("rep", "qv", 8, 2), seed=0)
    with pytest.raises(ValueError, match="adapters are one tensor"):
        lezo(ZO(), lm)


# ---------------------------------------------------------------- a step


@by_case
def test_share_1_is_the_estimator_without_it(kind, weights, residual):
    runs = []
    for wrap in (lambda zo, lm: zo, partial(lezo, share=1.0)):
        lm = tiny(weights=weights, residual=residual)
        done = zo_step(lm.weights, batch_loss(lm), KEY, wrap(KINDS[kind](0.01), lm), 1e-3)
        runs.append((done, lm.weights))
    (plain, stepped), (full, other) = runs
    assert all(torch.equal(a, b) for a, b in zip(plain, full, strict=True)) and plain.counts[0] > 0
    assert same(stepped, other)


@pytest.mark.parametrize("rest", [True, False])
@by_case
def test_a_step_moves_the_active_blocks_as_without_it_and_nothing_else(kind, weights, residual, rest):
    """To the bit: as an update of the chosen tensors alone, by the same projected gradients; the others stay."""
    lm, zo = tiny(weights=weights, residual=residual), KINDS[kind](0.01, 2)
    before, chosen = deepcopy(lm.weights), active_blocks(KEY.seed, KEY.step, 4, 0.25)
    done = zo_step(lm.weights, batch_loss(lm), KEY, lezo(zo, lm, 0.25, rest), 1e-3)
    assert len(chosen) == 1 and done.projected_grads.all()
    moved = {n for n in before if (rest if block_of(n, lm.layers) is None else block_of(n, lm.layers) in chosen)}
    want = {name: store for name, store in before.items() if name in moved}
    counts = update(want, done.projected_grads, KEY, zo, 1e-3)
    assert same({name: lm.weights[name] for name in moved}, want) and torch.equal(done.counts, counts)
    fresh = tiny(weights=weights, residual=residual).weights
    assert same({n: lm.weights[n] for n in before.keys() - moved}, {n: fresh[n] for n in before.keys() - moved})
    changed = {name for name in moved if not same_tensors(lm.weights[name], fresh[name])}
    assert all(any(block_of(name, lm.layers) == block for name in changed) for block in chosen)


@by_case
def test_no_step_at_lr_0_changes_a_bit(kind, weights, residual):
    lm = tiny(weights=weights, residual=residual)
    lm.weights["model.layers.0.zeros"] = Float(torch.full((4, 8), -0.0))
    before, zo = deepcopy(lm.weights), KINDS[kind](0.01)
    for step in range(2):
        for wrapped in (lezo(zo, lm, 0.5), lezo(zo, lm, 0.5, rest=False), adalezo(zo, lm, 0.5)):
            done = zo_step(lm.weights, batch_loss(lm, 2), Key(0, step), wrapped, 0.0)
            assert done.projected_grads.all() and not done.counts.any()
    assert same(lm.weights, before)


@pytest.mark.parametrize("raw, kind", [(LLAMA, "full"), (LLAMA, "sparse"), (ROBERTA, "4 bits")])
@torch.no_grad()
def test_a_probe_is_the_model_with_the_active_blocks_perturbed(raw, kind):
    """Written into a plain model: w +- eps u as ZO reads it where active, w elsewhere; the same blocks for all queries.

    The bound is GAP; a block more or less moves losses 100 times as far.
    """
    lm, zo = tiny(raw, "int8"), KINDS[kind](0.02, 2)
    plus, minus = probe_losses(lm.weights, batch_loss(lm), KEY, lezo(zo, lm, 0.5))
    chosen = active_blocks(KEY.seed, KEY.step, 4, 0.5)
    plain, losses = tiny(raw), {}
    for active in (chosen, frozenset(range(4)), chosen - {max(chosen)}):
        for query in range(2):
            view = pair(lm, zo, query)
            for p, sign in enumerate((1, -1)):
                plain.weights = {
                    name: Float(view.read(name)[p] if block_of(name, lm.layers) in {None, *active}
                                else store.dequantise().view(store.shape)) for name, store in lm.weights.items()
                }  # fmt: skip
                losses[active, query, sign] = batch_loss(plain)(plain.stored_view())[0].item()
    for query in range(2):
        for sign, found in ((1, plus), (-1, minus)):
            assert abs(found[query] - losses[chosen, query, sign]) < GAP
    for other in {active for active, _, _ in losses} - {chosen}:
        assert max(abs(losses[other, q, s] - losses[chosen, q, s]) for q in range(2) for s in (1, -1)) > 2e-4


@by_kind
def test_a_run_is_its_seed_and_its_projected_gradients_redo_it(kind):
    lm, runs, fresh = tiny(weights="int8"), [], tiny(weights="int8")
    zo = lezo(KINDS[kind](0.01, 2), lm, 0.25)
    for step in range(3):
        runs.append(zo_step(lm.weights, batch_loss(lm), Key(1, step), zo, 1e-3).projected_grads)
    for step, projected_grads in enumerate(runs):
        update(fresh.weights, projected_grads, Key(1, step), lezo(KINDS[kind](0.01, 2), fresh, 0.25), 1e-3)
    assert same(lm.weights, fresh.weights) and not same(lm.weights, tiny(weights="int8").weights)


# ---------------------------------------------------------------- what both signs share

GAP = 2e-6  # float32 rounding of losses below 1 (32 units of 2^-24), where products have other shapes: measured are 2


class Materialised:
    """A view that gives every tensor P copies of its own, whether it moves or not."""

    def __init__(self, view: PerturbedWeights):
        self.view, self.probes = view, view.probes

    def read(self, name: str, *args) -> Tensor:
        read = self.view.read(name, *args)
        return read.expand(self.probes, *read.shape[1:]).contiguous()


@by_model
@pytest.mark.parametrize("rest", [True, False])
@torch.no_grad()
def test_copies_that_nothing_moves_are_read_once(raw, rest):
    lm = tiny(raw, "int8")
    view, chosen = pair(lm, lezo(ZO(0.02), lm, 0.5, rest)), active_blocks(KEY.seed, KEY.step, 4, 0.5)
    stored, plain = StoredWeights(lm.weights, torch.float32), pair(lm, ZO(0.02))
    for name in lm.weights:
        block = block_of(name, lm.layers)
        if rest if block is None else block in chosen:
            assert torch.equal(view.read(name), plain.read(name)) and len(view.read(name)) == 2
        else:
            assert torch.equal(view.read(name), stored.read(name)) and len(view.read(name)) == 1


@pytest.mark.parametrize("raw, tokens", [(LLAMA, 1), (LLAMA, 3), (ROBERTA, 1)], ids=["llama", "branches", "roberta"])
@pytest.mark.parametrize("rest", [True, False])
@torch.no_grad()
def test_losses_are_those_of_copies_of_everything(raw, tokens, rest):
    """On padded batches, to a fiftieth of what the signs differ by."""
    lm = tiny(raw, "int8")
    view, loss = pair(lm, lezo(ZO(0.02), lm, 0.5, rest)), batch_loss(lm, tokens_an_option=tokens)
    shared, apart = loss(view), loss(Materialised(view))
    assert shared.shape == (2,) and (shared - apart).abs().max() < GAP and 0.02 * abs(shared[0] - shared[1]) > GAP


@pytest.mark.parametrize("raw, tokens", [(LLAMA, 1), (LLAMA, 3), (ROBERTA, 1)], ids=["llama", "branches", "roberta"])
@pytest.mark.parametrize("queries", [1, 2])
@torch.no_grad()
def test_blocks_before_the_first_active_one_run_once(raw, tokens, queries):
    """One copy goes into each block up to the first active one and all come out of that; two queries share it too."""
    lm, first = tiny(raw, "int8"), set()
    for step in range(6):
        zo, seen = lezo(ZO(0.02, queries), lm, 0.25, rest=False), []
        copies = [(query, sign) for query in range(queries) for sign in (1, -1)]
        view = PerturbedWeights(lm.weights, Key(3, step), zo, copies, len(copies))
        hook = lm.block.register_forward_pre_hook(lambda block, args, seen=seen: seen.append(len(args[0])))
        shared = batch_loss(lm, tokens_an_option=tokens)(view)
        hook.remove()
        (active,) = active_blocks(3, step, 4, 0.25)
        assert seen == [1] * (active + 1) + [2 * queries] * (3 - active)
        apart = batch_loss(lm, tokens_an_option=tokens)(Materialised(view))
        assert (shared - apart).abs().max() < GAP and 0.02 * (apart[::2] - apart[1::2]).abs().min() > GAP
        first.add(active)
    assert len(first) > 1


@pytest.mark.parametrize("raw", [tiny_llama(attention_bias=True, mlp_bias=True), ROBERTA], ids=["llama", "roberta"])
@torch.no_grad()
def test_what_moves_may_be_any_tensors(raw):
    """Vectors alone: a bias then has a copy for each sign where its weight is one for both."""
    lm = tiny(raw, "int8")
    for of_bias in (True, False):
        zo = ZO(0.02, moves=lambda name, key, of_bias=of_bias: name.endswith("bias") or not of_bias and "orm" in name)
        view, loss = pair(lm, zo), batch_loss(lm)
        shared, apart = loss(view), loss(Materialised(view))
        assert (shared - apart).abs().max() < GAP and 0.02 * (apart[0] - apart[1]).abs() > GAP


# ---------------------------------------------------------------- AdaLeZO


def test_chances_follow_the_rewards():
    """By hand, of 4 blocks: the softmax of R / (tau max R) with a floor; what was never drawn counts as the best."""
    bandit, R = Bandit("x.", 4, 0.5), {}
    assert bandit.chances == (0.25,) * 4 and bandit.draws == 2
    for step in range(30):
        chosen, g = set(bandit.counts(Key(0, step))), torch.tensor([step + 1.0, -2.0], dtype=torch.float64)
        bandit.observe(Key(0, step), g, 0.1)
        R |= {block: 0.9 * R.get(block, (step + 3) / 2) + 0.1 * (step + 3) / 2 for block in chosen}
        best = max(R.values())
        scores = torch.tensor([R.get(block, best) / best for block in range(4)], dtype=torch.float64) / 0.1
        assert torch.allclose(torch.tensor(bandit.chances).double(), 0.8 * scores.softmax(0) + 0.05, rtol=1e-6)
    assert set(R) == {0, 1, 2, 3} and min(bandit.chances) > 0.05 and max(bandit.chances) > 0.3
    silent = Bandit("x.", 4)
    silent.observe(KEY, torch.zeros(2), 0.1)
    assert silent.chances == (0.25,) * 4


def test_the_weights_mean_is_1_whatever_the_chances_are():
    """c is binomial of k draws, so that c / (k p) has the variance (1 - p) / (k p)."""
    bandit, n = Bandit("x.", 4, 0.75), 1500
    bandit.chances = (0.55, 0.3, 0.1, 0.05)
    weight = torch.tensor([[bandit.weight(f"x.{i}.w", Key(5, step)) for i in range(4)] for step in range(n)])
    p = torch.tensor(bandit.chances)
    assert ((weight.mean(0) - 1).abs() < 5 * ((1 - p) / (3 * p * n)).sqrt()).all()
    assert torch.allclose((weight * p * 3).sum(1), torch.tensor(3.0)) and bandit.weight("head", KEY) == 1
    for block in range(4):
        assert bandit(f"x.{block}.w", KEY) == (bandit.counts(KEY)[block] > 0)


@pytest.mark.parametrize("kind, weights", [("full", "fp32"), ("4 bits", "int8"), ("sparse", "int8")])
def test_a_weighted_step_is_that_of_a_weighted_gradient(kind, weights):
    """4 equally likely blocks and 2 draws: weights 2 and 4 are exact, and so is each block's update by 2 or 4 times
    the projected gradients.  The rest has weight 1."""
    seen = set()
    for step in range(6):
        lm, zo, key = tiny(weights=weights), KINDS[kind](0.01, 2), Key(0, step)
        ada, want = adalezo(zo, lm, 0.5), tiny(weights=weights).weights
        done = zo_step(lm.weights, batch_loss(lm), key, ada, 1e-3)
        for name, store in want.items():
            weight = ada.moves.weight(name, key)
            assert weight in (({1.0}) if block_of(name, lm.layers) is None else {0.0, 2.0, 4.0})
            update({name: store}, done.projected_grads * weight, key, zo, 1e-3)
            seen.add(weight)
        assert same(lm.weights, want) and done.projected_grads.all()
    assert seen == {0.0, 1.0, 2.0, 4.0}


@by_kind
def test_a_replay_that_observes_has_the_same_blocks(kind):
    """Without observing it would draw others."""
    lm, grads, hit = tiny(weights="int8"), [], []
    zo = adalezo(KINDS[kind](0.01, 2), lm, 0.5, rest=False)
    for step in range(6):
        hit.append(zo.moves.counts(Key(0, step)))
        grads.append(zo_step(lm.weights, batch_loss(lm), Key(0, step), zo, 1e-3).projected_grads)
    for observes in (True, False):
        fresh = tiny(weights="int8")
        again = adalezo(KINDS[kind](0.01, 2), fresh, 0.5, rest=False)
        if not observes:
            again.moves.observe = lambda key, projected_grads, lr: None
        for step, g in enumerate(grads):
            assert not observes or again.moves.counts(Key(0, step)) == hit[step]
            update(fresh.weights, g, Key(0, step), again, 1e-3)
        assert same(lm.weights, fresh.weights) == observes


def test_adalezo_is_for_two_estimators():
    with pytest.raises(ValueError, match="AdaLeZO weights the steps of"):
        adalezo(adalezo(ZO(), tiny()), tiny())
    zo = ZO(0.5, 3, 4, "q-rge1", "codes", True, torch.bfloat16, None)
    assert replace(adalezo(zo, tiny()), moves=None) == family.AdaLeZO(0.5, 3, 4, "q-rge1", "codes", True,
                                                                     torch.bfloat16, None)  # fmt: skip
    assert adalezo(SparseZO(cell=64), tiny()).cell == 64
