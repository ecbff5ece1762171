"""The first-order baselines against autograd and torch's AdamW on a `transformers` model, and their stored results."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import random_oracle, tiny_llama, tiny_roberta

import train
from data.scoring import Encoded, collate, losses
from first_order import Master, adamw_step, make_trainable, optimizer
from model import load
from quant import INTEGERS, encode

RAW = {"llama": tiny_llama(), "tied llama": tiny_llama(tie_word_embeddings=True), "roberta": tiny_roberta()}


def batch_of(seed: int = 0):
    """Four sequences of six tokens, answered at the last one by token 5 or 6."""
    rows = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return collate([Encoded([row], [[5], [6]], 5, i % 2) for i, row in enumerate(rows)], 1, torch.device("cpu"))


def their_loss(oracle, batch) -> torch.Tensor:
    logits = oracle(batch.tokens, attention_mask=batch.mask).logits[batch.row, batch.at]
    return F.cross_entropy(logits[:, batch.words], batch.labels)


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())
def test_three_steps_are_those_of_transformers_and_adamw(raw, tmp_path):
    """Same gradients to float32 rounding.  AdamW's first step is lr * sign(gradient), so elements whose gradient is
    rounding noise may go either way: they are left out (|gradient| < 1e-6; gradients are 1e-3 to 1)."""
    oracle = random_oracle(raw, tmp_path)
    lm = load(tmp_path)
    lm.store = make_trainable(lm.store, None, torch.float32)
    theirs = torch.optim.AdamW(oracle.parameters(), lr=1e-4, weight_decay=0.0)
    ours, compared = optimizer(lm.store, 1e-4, 0.0), 0
    sure = {name: torch.ones(stored.shape, dtype=torch.bool) for name, stored in lm.store.items()}
    for step in range(3):
        batch = batch_of(step)
        loss = adamw_step(ours, [losses(lm, batch, lm.stored_view())[0]], 1e-4)
        theirs.zero_grad()
        expected = their_loss(oracle, batch)
        expected.backward()
        for name, parameter in oracle.named_parameters():
            if name in sure and parameter.grad is not None:
                sure[name] &= parameter.grad.abs() > 1e-6
        theirs.step()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    parameters = dict(oracle.named_parameters())
    for name, stored in lm.store.items():
        gap = (stored.value - parameters[name]).abs()[sure[name]]
        assert gap.numel() == 0 or gap.max() < 2e-6, name
        compared += gap.numel()
    assert compared > 10_000


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8", "fp8-e5m2"])
def test_a_master_is_read_as_its_codes_and_takes_the_gradient_straight(weights):
    value = torch.randn(5, 140, generator=torch.Generator().manual_seed(0)) * 0.05
    master = Master.of(value.clone(), weights, torch.float32)
    master.value.requires_grad_()
    assert torch.equal(master.read(), encode(value, weights).read())
    upstream = torch.randn(2, 140, generator=torch.Generator().manual_seed(1))
    (master.read(torch.tensor([3, 1])) * upstream).sum().backward()
    want = torch.zeros(5, 140)
    want[3], want[1] = upstream
    assert torch.equal(master.value.grad, want)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_the_grid_stays_as_it_was_at_the_start(weights):
    """Masters that grow past the grid are read as its edge; small moves change no code, and add up."""
    value = torch.randn(4, 130, generator=torch.Generator().manual_seed(0)) * 0.05
    master = Master.of(value.clone(), weights, torch.float32)
    scale = master.scale.clone()
    master.value *= 3
    top = master.codes().grid.top if weights == "fp8" else 2 ** (INTEGERS[weights] - 1) - 1
    assert torch.equal(master.parts()[".scale"], scale)
    assert (master.read() / scale.repeat_interleave(128, 1)[:, :130] if scale.shape[1] > 1 else master.read() / scale
            ).abs().max() <= top * (1 + 1e-6)  # fmt: skip


def quick(tmp_path, *flags: str) -> dict:
    common = "--steps 6 --eval-every 3 --batch-size 8 --num-eval 100 --lr 1e-3".split()
    return train.run(train.parse([*common, "--out", str(tmp_path / "run"), *flags]))


@pytest.mark.parametrize("flags", [
    "--method fo", "--method fo --weights bf16 --weight-decay 0.1",
    "--method fo-ste", "--method fo-ste --weights int4 --activations int8",
    "--method fo-ste --weights fp8 --master bf16",
])  # fmt: skip
def test_a_run_saves_what_it_tested(flags, tmp_path):
    """The same run folder as a zeroth-order run; codes where the method is about codes; losses fall."""
    result = quick(tmp_path, *flags.split())
    config = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    assert load(tmp_path / "run" / "model", weights=config["weights"]).sha256() == result["weights_sha256"]
    assert result["forwards"] == 6
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses_of = [row["loss"] for row in rows if "loss" in row]
    assert len(losses_of) == 6 and losses_of[-1] < losses_of[0]


@pytest.mark.parametrize("flags", ["--method fo", "--method fo-ste --weights int4"])
def test_lr_zero_changes_no_stored_bit(flags, tmp_path):
    result = quick(tmp_path, *flags.split(), "--lr", "0")
    assert result["weights_sha256"] == json.loads((tmp_path / "run" / "config.json").read_text())["base_weights_sha256"]


def test_micro_batches_add_up_to_the_batch(tmp_path):
    """AdamW divides a gradient by its own size, so its rounding may turn over steps of 1e-3 whose gradient is noise;
    the losses that follow differ by far less than one step moves them."""
    runs = []
    for size in ("8", "3"):
        quick(tmp_path / size, "--method", "fo", "--micro-batch-size", size)
        rows = [json.loads(line) for line in (tmp_path / size / "run" / "metrics.jsonl").read_text().splitlines()]
        runs.append([row["loss"] for row in rows if "loss" in row])
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-6)
    assert runs[0][1:] == pytest.approx(runs[1][1:], abs=1e-2)
