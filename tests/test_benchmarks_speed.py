"""The peers that benchmarks/speed.py times ours against take the steps that they are said to take; its table prints."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from helpers import tiny_llama
from torch import Tensor

from benchmarks import peers, speed
from benchmarks.memory import examples
from data.scoring import BatchLoss, collate
from model import LanguageModel, create
from runtime.config import parse, validate

EPS, LR, SEED = 1e-2, 0.5, 3


@pytest.fixture
def lm() -> LanguageModel:
    """A small model in fp32 with gain enough for projected gradients of size 1."""
    lm = create(tiny_llama())
    for stored in lm.weights.values():
        if stored.value.ndim == 2:
            stored.value.mul_(20)
    return lm


@pytest.fixture
def batch(lm):
    c = parse(["--model", "tiny", "--batch-size", "4"])
    return collate(examples(c, 8, lm.config.vocab_size), 0, lm.device)


def weights_of(lm: LanguageModel) -> list[Tensor]:
    return [stored.value for stored in lm.weights.values()]


def directions(weights: list[Tensor], draw) -> list[Tensor]:
    """What every sweep adds, drawn apart: all tensors from one generator, in order."""
    generator = torch.Generator().manual_seed(SEED)
    return [draw(w, generator) for w in weights]


def loss_along(lm, batch, start: list[Tensor], along: list[Tensor], distance: float) -> float:
    """L(w + distance * u), the weights put there by a sum of copies, and left at the start."""
    for w, at, u in zip(weights_of(lm), start, along, strict=True):
        w.copy_(at + distance * u)
    loss = BatchLoss(lm, [batch])(lm.stored_view()).item()
    for w, at in zip(weights_of(lm), start, strict=True):
        w.copy_(at)
    return loss


def projected_grad_along(lm, batch, start: list[Tensor], along: list[Tensor]) -> float:
    plus, minus = (loss_along(lm, batch, start, along, sign * EPS) for sign in (1, -1))
    return (plus - minus) / (2 * EPS)


def loss_fn(lm, batch):
    return lambda: peers.full_loss(lm, batch)


def drift(start: list[Tensor], u: list[Tensor]) -> float:
    """Three sums, each off by half a unit in the last place of the largest number there is."""
    largest = max((w.abs() + EPS * d.abs()).max().item() for w, d in zip(start, u, strict=True))
    return 3 * 2.0**-24 * largest


def test_full_logits_give_the_loss_of_the_last_ones(lm, batch):
    assert peers.full_loss(lm, batch).item() == pytest.approx(peers.last_loss(lm, batch).item(), abs=1e-6)


def test_mezo_steps_against_its_projected_gradient_along_what_it_probed(lm, batch):
    """Losses near 1 are off by some 1e-7, so projected gradients by some 1e-5."""
    weights = weights_of(lm)
    start = [w.clone() for w in weights]
    z = directions(weights, peers.gaussian)
    expected = projected_grad_along(lm, batch, start, z)
    grad = peers.mezo_step(weights, loss_fn(lm, batch), SEED, EPS, LR)
    assert abs(grad) > 0.1 and grad == pytest.approx(expected, abs=1e-4)
    for w, at, d in zip(weights, start, z, strict=True):
        rounding = drift(start, z) + 2.0**-24 * (w.abs().max().item() + LR * abs(grad) * d.abs().max().item())
        assert (w - (at - LR * grad * d)).abs().max() <= rounding


def test_mezo_restores_up_to_rounding_at_rate_0_and_not_further(lm, batch):
    weights = weights_of(lm)
    start = [w.clone() for w in weights]
    grad = peers.mezo_step(weights, loss_fn(lm, batch), SEED, EPS, 0.0)
    assert grad != 0
    gap = max((w - at).abs().max().item() for w, at in zip(weights, start, strict=True))
    assert 0 < gap <= drift(start, directions(weights, peers.gaussian))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantisation_is_unbiased_on_levels_of_the_largest_element(bits):
    n, generator = 4000, torch.Generator().manual_seed(0)
    x = torch.randn(60, generator=generator)
    step = x.abs().max() / 2 ** (bits - 1)
    drawn = torch.stack([peers.fake_quantise(x, bits, generator) for _ in range(n)])
    codes = drawn / step
    assert torch.equal(codes, codes.round()) and codes.abs().max() == 2 ** (bits - 1)
    assert ((drawn - x).abs() < step).all()
    five_sigma = 5 * 0.5 * step / n**0.5  # of a draw that is one of two neighbouring levels
    assert (drawn.mean(0) - x).abs().max() < five_sigma


def test_quzo_steps_along_the_very_direction_that_it_probed_then_lands_on_a_grid(lm, batch):
    """A landing moves a weight by less than one step of its tensor; vectors do not land."""
    weights = weights_of(lm)
    start = [w.clone() for w in weights]
    u = directions(weights, peers.quantised)
    assert all(d.unique().numel() <= 17 for d in u)
    expected = projected_grad_along(lm, batch, start, u)
    grad = peers.quzo_step(weights, loss_fn(lm, batch), SEED, EPS, LR, bits=8)
    assert abs(grad) > 0.1 and grad == pytest.approx(expected, abs=1e-4)
    for w, at, d in zip(weights, start, u, strict=True):
        wanted = at - LR * grad * d
        if w.ndim == 1:
            assert torch.allclose(w, wanted, atol=1e-6)
            continue
        step = wanted.abs().max().item() / 2**7
        assert w.unique().numel() <= 2**8 + 1
        assert (w - wanted).abs().max() < step * (1 + 1e-4)
        assert (w - wanted).mean().abs() < 5 * 0.5 * step / w.numel() ** 0.5


@pytest.mark.parametrize("step, released", [
    (peers.mezo_step, {"released": True}), (peers.quzo_step, {"released": True}),
])  # fmt: skip
def test_as_released_is_the_tight_step_but_for_rounding(lm, batch, step, released):
    """Here transformers' part is played by our own loss.  A last place more or less may turn a landing over."""
    start, ends = [w.clone() for w in weights_of(lm)], []
    for options in ({}, released):
        weights = [w.clone() for w in start]
        for stored, w in zip(lm.weights.values(), weights, strict=True):
            stored.value = w
        loss = Mock(side_effect=loss_fn(lm, batch))
        grad = step(weights_of(lm), loss, SEED, EPS, LR, **options)
        for stored, w in zip(lm.weights.values(), weights, strict=True):
            assert stored.value is w  # an update of the model itself
        ends.append((grad, torch.cat([w.flatten() for w in weights]), loss.call_count))
    (tight, at, _), (grad, there, calls) = ends
    assert grad == pytest.approx(tight, abs=1e-3) and calls == (3 if step is peers.quzo_step else 2)
    assert ((at - there).abs() > 1e-4).double().mean() < 1e-3
    assert ((at - torch.cat([w.flatten() for w in start])).abs() > 1e-3).double().mean() > 0.5


def test_transformers_model_has_our_loss():
    """In bf16: logits near 1, rounded to 2^-8 of themselves some ten times."""
    lm, raw = create(tiny_llama(), weights="bf16"), tiny_llama()
    model = peers.transformers_model(raw, "cpu")
    model.load_state_dict({name: stored.value for name, stored in lm.weights.items()}, strict=False)
    batch = collate(examples(parse(["--model", "tiny", "--batch-size", "4"]), 8, raw["vocab_size"]), 0, lm.device)
    batch.at = torch.tensor([7, 2, 5, 3])
    assert peers.transformers_loss(model, batch).item() == pytest.approx(peers.full_loss(lm, batch).item(), abs=0.02)
    assert peers.transformers_loss(model, batch) != peers.transformers_loss(model, replace(batch, at=batch.at * 0 + 7))


def test_weights_in_bf16_stay_in_bf16(lm, batch):
    weights = [stored.value for stored in create(tiny_llama(), weights="bf16").weights.values()]
    dtypes = [w.dtype for w in weights]
    for draw in (peers.gaussian, peers.quantised):
        peers.sweep(weights, draw, SEED, 1, EPS)
    for draw in (peers.gaussian, peers.quantised_as_released):
        peers.sweep_as_released(weights, draw, SEED, 1, EPS)
    assert [w.dtype for w in weights] == dtypes and torch.bfloat16 in dtypes


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", speed.CASES)
def test_every_case_has_flags_that_train_takes(name):
    case = speed.CASES[name]
    validate(parse(["--model", "llama2-7b", *case.flags.split()]))
    assert case.peer is None or case.peer in speed.PEERS
    assert not case.targets or len(case.targets) == len(case.sizes)


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [speed.REFERENCE, "peer: QuZO in place", "peer: QuZO as released", "AdaZeta Q = 4, int4 base"]
)
def test_a_case_measures_a_row_for_each_size(name):
    rows = speed.measure(name, "tiny", "cpu", 1)
    assert [(row["sequences"], row["tokens"]) for row in rows] == list(speed.CASES[name].sizes)
    for row in rows:
        assert 0 < row["fastest_ms"] <= row["ms"] <= row["slowest_ms"] and row["peak_bytes"] > 0
        assert row["run_ms"] == pytest.approx(row["ms"])  # a run of one
    if "AdaZeta" in name:
        assert rows[0]["tokens_per_second"] == pytest.approx(8 * 16 * 64 / rows[0]["ms"] * 1e3)
        assert "plain forward" in speed.row_text(rows[0], None)


@pytest.mark.full
def test_the_command_prints_a_row_and_json(capsys):
    assert speed.main("--model tiny --device cpu --repeats 2".split() + ["--cases", "last position"]) == 0
    header, row, last = capsys.readouterr().out.splitlines()
    assert header.startswith("case") and row.startswith("peer: MeZO in place, last position")
    result = json.loads(last)
    assert [r["case"] for r in result["rows"]] == ["peer: MeZO in place, last position"] and not result["failed"]


@pytest.mark.parametrize("flags", ["--cases int3", "--model llama9", "--repeats 0"])
def test_the_command_refuses_in_a_line(flags, capsys):
    with pytest.raises(SystemExit):
        speed.main(flags.split())
    assert flags.split()[1] in capsys.readouterr().err.splitlines()[-1]


def test_a_case_that_runs_out_of_memory_costs_no_other_its_row(capsys, monkeypatch):
    def alone(name, *args):
        if "fo-ste" in name:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")
        return [{"case": name, "model": "m", "parameters": 1, "sequences": 16, "tokens": 64, "ms": 1.0,
                 "fastest_ms": 1.0, "slowest_ms": 1.0, "peak_bytes": 1, "target": ""}]  # fmt: skip

    monkeypatch.setattr(speed, "alone", alone)
    assert speed.main(["--cases", "AdamW", "MeZO bf16"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failed"] == {"peer: AdamW, fo-ste int8": "CUDA out of memory."}
    assert [row["case"] for row in result["rows"]] == ["peer: AdamW, bf16", "MeZO bf16"]


def test_ratios_are_to_the_same_model_and_size_and_growth_is_a_line():
    def row(case, sequences, ms, model="m"):
        return {"case": case, "model": model, "sequences": sequences, "tokens": 64, "ms": ms, "peak_bytes": 2**30,
                "parameters": 10**9}  # fmt: skip

    rows = [row(speed.REFERENCE, 16, 200.0), row("other", 32, 100.0), row("other", 16, 50.0, "n")]
    assert [speed.reference_of(r, rows) for r in [row("new", 16, 1.0), *rows[1:]]] == [rows[0], None, None]
    grown = [row("growth with tokens", 1000 * n, 5.0 + 64 * n * 2) for n in (1, 2, 4)]
    lines = speed.growth([*grown, row("growth with parameters, 13B", 16, 1.0)])
    assert set(lines) == {"ms with tokens", "GiB with tokens"}
    smaller = row(speed.MIDDLE, 16, 0.5) | {"parameters": 10**8}
    by_parameters = speed.growth([smaller, smaller | {"tokens": 256}, row("growth with parameters, 13B", 16, 1.0)])
    assert by_parameters["ms with parameters"]["slope"] == pytest.approx(0.5 / 0.9)
    assert lines["ms with tokens"] == pytest.approx({"slope": 2.0, "intercept": 5.0, "miss": 0.0}, abs=1e-9)
    assert lines["GiB with tokens"] == pytest.approx({"slope": 0.0, "intercept": 1.0, "miss": 0.0}, abs=1e-9)
