"""The first-order baselines against autograd and torch's AdamW on a `transformers` model."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import random_oracle, tiny_llama, tiny_roberta

from data.scoring import BatchLoss, Encoded, collate
from model import load
from quant import INTEGERS, encode
from runtime.first_order import Master, adamw_step, load_state, make_trainable, optimizer, save_state

RAW = {"llama": tiny_llama(), "tied llama": tiny_llama(tie_word_embeddings=True), "roberta": tiny_roberta()}
CODES = ["int8", "int4", "fp8"]


def examples_of(seed: int) -> list[Encoded]:
    """Four sequences of six tokens, answered at the last one by token 5 or 6."""
    rows = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Encoded([row], [[5], [6]], 5, i % 2) for i, row in enumerate(rows)]


def their_loss(oracle, batch) -> torch.Tensor:
    logits = oracle(batch.tokens, attention_mask=batch.mask).logits[batch.row, batch.at]
    return F.cross_entropy(logits[:, batch.words], batch.labels)


@pytest.mark.parametrize("micro_batch_size", [4, 3])
@pytest.mark.parametrize("name", RAW)
def test_three_steps_are_those_of_transformers_and_adamw(name, micro_batch_size, tmp_path):
    """Same gradients to float32 rounding, whole or in parts, at a rate that changes, with a decay of matrices alone.
    AdamW's first step is lr * sign(gradient), so elements whose gradient is rounding noise may go either way: they are
    left out (|gradient| < 1e-6; gradients are 1e-3 to 1)."""
    oracle = random_oracle(RAW[name], tmp_path)
    lm = load(tmp_path)
    lm.weights = make_trainable(lm.weights, None, torch.float32)
    groups = [{"params": [p for p in oracle.parameters() if (p.ndim == 2) == decays], "weight_decay": 0.1 * decays}
              for decays in (True, False)]  # fmt: skip
    theirs, ours = torch.optim.AdamW(groups, lr=1.0), optimizer(lm.weights, 1.0, 0.1)
    sure = {name: torch.ones(stored.shape, dtype=torch.bool) for name, stored in lm.weights.items()}
    for step, lr in enumerate((1e-4, 5e-5, 2e-4)):
        examples = examples_of(step)
        loss_fn = BatchLoss.of(lm, examples, 1, micro_batch_size)
        assert len(loss_fn.batches) == -(-4 // micro_batch_size)
        loss = adamw_step(ours, loss_fn.parts(lm.stored_view()), lr)
        theirs.zero_grad()
        expected = their_loss(oracle, collate(examples, 1, torch.device("cpu")))
        expected.backward()
        for parameter, p in oracle.named_parameters():
            if parameter in sure and p.grad is not None:
                sure[parameter] &= p.grad.abs() > 1e-6
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    parameters, compared = dict(oracle.named_parameters()), 0
    for name, stored in lm.weights.items():
        gap = (stored.value - parameters[name]).abs()[sure[name]]
        assert gap.numel() == 0 or gap.max() < 2e-6, name
        compared += gap.numel()
    assert compared > 10_000


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])  # fmt: skip
@pytest.mark.parametrize("format", [None, "int8"])
def test_training_goes_on_from_a_state_to_the_same_bits(device, format, tmp_path):
    """Weights, both moments and the number of steps, which corrects them."""
    random_oracle(RAW["llama"], tmp_path)
    ended, sha256 = [], ""
    for path in (None, tmp_path / "state"):
        lm = load(tmp_path, device)
        lm.weights = make_trainable(lm.weights, format, torch.float32)
        adamw = optimizer(lm.weights, 1.0, 0.1)
        if path is not None:
            load_state(path, sha256, adamw, lm.weights)
        for step in range(0 if path is None else 3, 5):
            if path is None and step == 3:
                sha256 = save_state(tmp_path / "state", adamw, lm.weights)
            loss_fn = BatchLoss.of(lm, examples_of(step), 1, 4)
            adamw_step(adamw, loss_fn.parts(lm.stored_view()), 1e-3)
        ended.append({name: stored.value for name, stored in lm.weights.items()})
    assert all(torch.equal(ended[0][name], value) for name, value in ended[1].items())
    with pytest.raises(ValueError, match="is not what the run wrote"):
        load_state(tmp_path / "state", "0" * 64, adamw, lm.weights)


def test_a_step_whose_loss_is_not_finite_writes_nothing(tmp_path):
    random_oracle(RAW["llama"], tmp_path)
    lm = load(tmp_path)
    lm.weights = make_trainable(lm.weights, None, torch.float32)
    before, adamw = {name: stored.value.clone() for name, stored in lm.weights.items()}, optimizer(lm.weights, 1.0, 0.1)
    parts = [part * float("nan") for part in BatchLoss.of(lm, examples_of(0), 1, 4).parts(lm.stored_view())]
    assert math.isnan(adamw_step(adamw, parts, 1e-3)) and not adamw.state
    assert all(torch.equal(before[name], stored.value) for name, stored in lm.weights.items())


@pytest.mark.parametrize("weights", CODES)
def test_a_master_is_read_as_its_codes_and_takes_the_gradient_straight(weights):
    value = torch.randn(5, 140, generator=torch.Generator().manual_seed(0)) * 0.05
    master = Master.of(value.clone(), weights, torch.float32)
    master.value.requires_grad_()
    assert torch.equal(master.dequantise(), encode(value, weights).dequantise())
    upstream = torch.randn(2, 140, generator=torch.Generator().manual_seed(1))
    (master.dequantise(torch.tensor([3, 1])) * upstream).sum().backward()
    want = torch.zeros(5, 140)
    want[3], want[1] = upstream
    assert torch.equal(master.value.grad, want)


@pytest.mark.parametrize("weights", CODES)
def test_the_grid_stays_as_it_was_at_the_start(weights):
    """Masters that grow past the grid are read as its edge, and no scale follows them."""
    value = torch.randn(4, 130, generator=torch.Generator().manual_seed(0)) * 0.05
    master = Master.of(value.clone(), weights, torch.float32)
    scale, max_code = master.scale.clone(), 448 if weights == "fp8" else 2 ** (INTEGERS[weights] - 1) - 1
    master.value *= 3
    assert torch.equal(master.tensors()[".scale"], scale)
    each = scale.float().repeat_interleave(32, 1)[:, :130] if scale.shape[1] > 1 else scale
    assert (master.dequantise() / each).abs().max() == pytest.approx(max_code, rel=1e-6)
