"""calibration.py: second moments against inputs computed by hand, GPTQ against its definition, and whole models."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny_llama, tiny_roberta
from oracles import gaussian, nearest, points, same_tensors
from torch import Tensor

import calibration
from calibration import calibrate, compensated, second_moments
from model import LanguageModel, create
from quant import FakeQuantised, Fp8, encode
from runtime.checkpoints import weights_sha256
from runtime.record import sealed
from train import main

CODED = ["int8", "int4", "fp8"]
SEQUENCES = [[5, 9, 30, 41], [7, 8], [60, 3, 11, 12], [2, 4, 6]]


def tiny(raw: dict) -> LanguageModel:
    """A random model whose matrices are five times the usual size."""
    lm = create(raw, seed=1)
    for store in lm.weights.values():
        if store.value.ndim == 2:
            store.value *= 5
    return lm


def inputs(C: int = 12, N: int = 50) -> Tensor:
    """Correlated inputs [N, C], some of them much larger than others, float64."""
    x = gaussian(N, C, seed=3).double() @ gaussian(C, C, seed=4).double()
    return x * torch.linspace(0.1, 4, C).double()[torch.randperm(C, generator=torch.Generator().manual_seed(0))]


def by_definition(w: Tensor, H: Tensor, unit: Tensor, grid: Tensor) -> Tensor:
    """Optimal brain quantisation in a fixed order: round the column of the largest input that is left, and move all
    that are left by what is best for the output, -e / [H^-1]_jj [H^-1]_j; with the inverse of what is left of H."""
    w, left, codes = w.double().clone(), H.diagonal().argsort(descending=True).tolist(), torch.empty_like(w)
    H = H + calibration.DAMPING * H.diagonal().mean() * torch.eye(len(H)).double()
    while left:
        inverse, j = H[left][:, left].inverse(), left[0]
        codes[:, j] = nearest((w[:, j] / unit[:, j].double()).float(), grid).float()
        error = w[:, j] - codes[:, j].double() * unit[:, j].double()
        w[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
        left.pop(0)
    return codes


@pytest.mark.parametrize("weights", CODED)
@pytest.mark.parametrize("columns", [2, 64])  # made good at a time: in several products, and in one
def test_columns_are_rounded_as_the_paper_says(weights, columns, monkeypatch):
    monkeypatch.setattr(calibration, "COLUMNS", columns)
    x, w = inputs(), gaussian(7, 12)
    store = compensated(w, x.T @ x, weights)
    unit = (store.scale if isinstance(store, Fp8) else store.spacing(slice(None))).expand_as(w)
    want = by_definition(w, x.T @ x, unit, points(weights))
    assert torch.equal(store.code(slice(None)).float(), want)
    plain = encode(w, weights)
    near, made_good = (((w - s.dequantise()).double() @ x.T).square().sum() for s in (plain, store))
    assert made_good < (0.9 if weights == "fp8" else 0.6) * near


@pytest.mark.parametrize("weights", CODED)
def test_without_correlation_nothing_is_made_good(weights):
    """And with equal inputs nothing is clipped that costs more than it gives: never worse than to nearest."""
    w = gaussian(7, 12)
    store, plain = compensated(w, torch.eye(12).double(), weights), encode(w, weights)
    if weights == "fp8":
        assert same_tensors(store, plain) and same_tensors(compensated(w, torch.zeros(12, 12).double(), "fp8"), plain)
    assert (store.dequantise() - w).square().sum() <= (plain.dequantise() - w).square().sum()


def test_a_clip_is_searched_by_the_inputs_size():
    """One large weight that meets no input is clipped, and the others get finer steps; one that meets a large input is
    not.  A group of zeros, and an input that is always 0, have codes too."""
    w = gaussian(4, 16) * 0.1
    w[:, 3] = 2.0
    w[2] = 0
    for importance, clipped in ((1e-6, True), (1e6, False)):
        H = torch.eye(16).double()
        H[3, 3] = importance
        H[5, 5] = 0
        store = compensated(w, H, "int4")
        assert ((store.dequantise()[0, 3] < 1.5) == clipped) and store.dequantise().isfinite().all()
        assert not store.dequantise()[2].any()


def test_moments_of_the_first_layer_by_hand():
    """Its queries' inputs are the embeddings over their root mean square, times the norm's weight."""
    lm, name = tiny(tiny_llama()), "model.layers.0.self_attn.q_proj.weight"
    x = torch.cat([lm.weights[lm.embedding].value[s] for s in map(torch.tensor, SEQUENCES)]).double()
    x = x / (x.square().mean(-1, keepdim=True) + lm.config.rms_norm_eps).sqrt()
    x = x * lm.weights["model.layers.0.input_layernorm.weight"].value.double()
    moments = second_moments(lm, SEQUENCES, {name})
    assert moments.keys() == {name} and torch.allclose(moments[name], x.T @ x, atol=1e-5)


@pytest.mark.parametrize("raw", [tiny_llama(), tiny_llama(tie_word_embeddings=True), tiny_roberta()])
def test_every_matrix_that_multiplies_has_moments(raw):
    lm = tiny(raw)
    before, logits = weights_sha256(lm.weights), lm(torch.tensor([[5, 6]]))
    matrices = {name for name, store in lm.weights.items() if len(store.shape) == 2}
    tables = {name for name in matrices if "embed" in name and name != lm.decoder}
    moments = second_moments(lm, SEQUENCES, matrices)
    assert moments.keys() == matrices - tables
    for name, H in moments.items():
        assert H.shape == (lm.weights[name].shape[1],) * 2 and torch.equal(H, H.T) and H.diagonal().sum() > 0
    assert weights_sha256(lm.weights) == before and torch.equal(lm(torch.tensor([[5, 6]])), logits)


@pytest.mark.parametrize("raw", [tiny_llama(), tiny_llama(tie_word_embeddings=True), tiny_roberta()])
@pytest.mark.parametrize("weights, residual", [("int8", 0), ("int4", 0), ("int4", 4), ("fp8", 0)])
def test_a_calibrated_model_keeps_its_logits_better(raw, weights, residual):
    """On the sequences that it was calibrated with; all its matrices are codes, and the oracle has the same ones."""
    lm, plain = tiny(raw), tiny(raw)
    want = [lm(torch.tensor([s])) for s in SEQUENCES]
    plain.weights = {name: encode(store.value, weights, residual) for name, store in plain.weights.items()}
    calibrate(lm, SEQUENCES, weights, residual)
    assert {n: type(s) for n, s in lm.weights.items()} == {n: type(s) for n, s in plain.weights.items()}
    assert (lm.format, lm.residual) == (weights, residual)
    near, kept = (sum((m(torch.tensor([s])) - w).square().sum() for s, w in zip(SEQUENCES, want, strict=True))
                  for m in (plain, lm))  # fmt: skip
    assert kept < near
    if weights != "fp8":
        oracle = tiny(raw)
        calibrate(oracle, SEQUENCES, weights, residual, oracle=True)
        assert weights_sha256(oracle.weights) == weights_sha256(lm.weights)
        assert all(isinstance(s, FakeQuantised) for s in oracle.weights.values() if len(s.shape) == 2)


@pytest.mark.parametrize("row, most, found", [(5, 64, [5, 5]), (64, 4, [4, 4, 4]), (14, 64, []), (13, 64, [13])])
def test_sequences_are_read_end_to_end_too(monkeypatch, row, most, found):
    """Of 13 tokens, in rows of so many, but no longer than the model allows; what is left over is not."""
    seen = []
    monkeypatch.setattr(calibration, "second_moments", lambda lm, sequences, names: seen.extend(sequences) or {})
    monkeypatch.setattr(calibration, "ROW", row)
    calibrate(tiny(tiny_llama(max_position_embeddings=most)), SEQUENCES, "int4")
    tokens, rows = sum(SEQUENCES, []), seen[len(SEQUENCES) :]
    assert seen[: len(SEQUENCES)] == SEQUENCES and list(map(len, rows)) == found
    assert sum(rows, []) == tokens[: sum(found)]


def test_layers_wait_for_another_pass_where_moments_would_not_fit(monkeypatch):
    passes = []

    def counted(lm, sequences, names):
        passes.append(names)
        return second_moments(lm, sequences, names)

    monkeypatch.setattr(calibration, "second_moments", counted)
    lm = tiny(tiny_llama(num_hidden_layers=2))
    monkeypatch.setattr(calibration, "MOMENT_BYTES", 0)
    calibrate(lm, SEQUENCES, "int4")
    assert len(passes) == 2 * 7 + 1 and len(set.union(*passes)) == len(passes)


@pytest.mark.full
def test_a_calibrated_run_is_resumed_and_replayed(tmp_path, capsys):
    """Its start depends on the data; the run's hash of the base weights says whether it is the same."""

    def result(*flags: str, code: int = 0) -> dict:
        assert main(list(flags)) == code
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    flags = "--weights int4 --calibrate 4 --steps 2 --eval-every 1 --batch-size 4 --num-eval 4 --out".split()
    run = result(*flags, str(tmp_path / "run"))
    assert result("--replay", str(tmp_path / "run"))["equal"]
    plain = result(*[f if f != "4" or flags[i - 1] != "--calibrate" else "0" for i, f in enumerate(flags)],
                   str(tmp_path / "plain"))  # fmt: skip
    assert plain["weights_sha256"] != run["weights_sha256"]
    bases = [json.loads((tmp_path / n / "config.json").read_text())["base_weights_sha256"] for n in ("run", "plain")]
    assert bases[0] != bases[1]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["flags"]["calibrate"] = 3
    config = sealed({name: value for name, value in config.items() if name != "sha256"})
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for name in ("trajectory", "metrics.jsonl"):  # whose digests follow from the config
        (tmp_path / "run" / name).write_text("")
    (tmp_path / "run" / "result.json").unlink()
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert "the run's base_weights_sha256 is" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--weights fp32 --method mezo", "--method fo-ste"])
def test_floats_are_not_calibrated(flags, capsys):
    assert main([*flags.split(), "--calibrate", "4", "--steps", "1"]) == 2
    assert "--calibrate is about codes" in capsys.readouterr().err
