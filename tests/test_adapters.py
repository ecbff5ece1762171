"""Adapters around LLaMA and RoBERTa, against `transformers` models with dense adapters hooked in, and their runs.

The dense reference takes every tensor by name, multiplies the cores out entry by entry, and adds the result where
PAPERS.md 2.2 and 3.2 put it; nothing of tensor_train.py's forward is in it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import largest_gap, padded_batch, random_oracle, read_oracle, tiny_llama, tiny_roberta
from safetensors.torch import load_file, save_file
from test_tensor_train import by_gathering
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

import tensor_train
import train
from config import ADAPTERS, METHODS, parse, spec_of
from data.scoring import Encoded, collate, losses
from data.tasks import TINY
from dry_run import predict
from model import LanguageModel, create, load
from quant import FORMATS, Float
from random_bits import Key, Use, tensor_id
from run_folder import read_trajectory
from tensor_train import FIRST, TRAINED, Spec, TensorTrain, attach, merge
from zo_optim import ZO, direction, epoch_of, estimate, queries_of, update

RAW = {"llama": tiny_llama(attention_bias=True), "roberta": tiny_roberta()}
KINDS = {  # kind, placement
    "adp mlp": ("adp", "mlp"), "adp sublayers": ("adp", "sublayers"), "rep": ("rep", "qv"), "lora": ("lora", "qv"),
}  # fmt: skip
by_type = pytest.mark.parametrize("model_type", RAW)
by_kind = pytest.mark.parametrize("kind", KINDS)
by_format = pytest.mark.parametrize("weights", FORMATS)


def spec(kind: str, **changes) -> Spec:
    """Alpha 12 beside bottleneck 8 and rank 3: scales of 1.5 and 4, which no forgotten division gives."""
    options = dict(bottleneck=8, rank=3, alpha=12.0) | changes
    return Spec(*KINDS[kind], **options)


class Base(NamedTuple):
    oracle: PreTrainedModel
    directory: Path


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Base]:
    """A random checkpoint of each type, and the same in `transformers`."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RAW}
    return {name: Base(random_oracle(RAW[name], folder), folder) for name, folder in folders.items()}


def moved(lm: LanguageModel, by: float = 0.3, seed: int = 0) -> LanguageModel:
    """Every trained number elsewhere, LoRA's B and adp's silent core too."""
    with torch.no_grad():
        vector = lm.store[TRAINED].value
        vector += by * torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    return lm


def adapted(base: Base, kind: str, weights: str = "fp32", seed: int = 0, by: float = 0.3, **changes) -> LanguageModel:
    lm = load(base.directory, weights=weights)
    attach(lm, spec(kind, **changes), seed)
    return moved(lm, by, seed)


# ---------------------------------------------------------------- the dense reference

WHERE = {  # PAPERS 2.2, 3.1, 3.2
    ("llama", "adp mlp"): {"mlp.gate_proj": "before", "mlp.up_proj": "before", "mlp.down_proj": "after"},
    ("llama", "adp sublayers"): {"self_attn.o_proj": "after", "mlp.down_proj": "after"},
    ("llama", "rep"): {"self_attn.q_proj": "beside", "self_attn.v_proj": "beside"},
    ("llama", "lora"): {"self_attn.q_proj": "beside", "self_attn.v_proj": "beside"},
    ("roberta", "adp mlp"): {"intermediate.dense": "before", "output.dense": "after"},
    ("roberta", "adp sublayers"): {"attention.output.dense": "after", "output.dense": "after"},
    ("roberta", "rep"): {"attention.self.query": "beside", "attention.self.value": "beside"},
    ("roberta", "lora"): {"attention.self.query": "beside", "attention.self.value": "beside"},
}
LAYERS = {"llama": "model.layers.", "roberta": "roberta.encoder.layer."}


def dense(tensors: dict[str, Tensor], prefix: str, inputs: int, outputs: int) -> Tensor:
    count = sum(name.startswith(f"{prefix}cores.") for name in tensors)
    return by_gathering([tensors[f"{prefix}cores.{i}"] for i in range(count)], inputs, outputs)


def bottleneck(tensors: dict[str, Tensor], prefix: str, width: int, s: Spec):
    """h + up(relu(down(h))): LoRETTA section 3."""
    down, up = (dense(tensors, f"{prefix}{n}.", *io) for n, io in
                (("down", (width, s.bottleneck)), ("up", (s.bottleneck, width))))  # fmt: skip
    inner, outer = tensors[f"{prefix}down.bias"], tensors[f"{prefix}up.bias"]
    return lambda h: h + F.relu(h @ down + inner) @ up + outer


def beside(tensors: dict[str, Tensor], prefix: str, inputs: int, outputs: int, s: Spec) -> Tensor:
    """What is added to W^T [I, O]."""
    if s.kind == "lora":
        return s.alpha / s.rank * dense(tensors, f"{prefix}low.", inputs, outputs)

    def both(first: str) -> Tensor:
        parts = {"down": (inputs, s.bottleneck), "up": (s.bottleneck, outputs)}
        down, up = (dense(tensors, f"{prefix}{first}{name}.", *io) for name, io in parts.items())
        return down @ up

    return s.alpha / s.bottleneck * (both("") - both("first_") if s.identity else both(""))


def hook(linear: torch.nn.Linear, where: str, tensors: dict[str, Tensor], prefix: str, s: Spec):
    if where == "before":
        adapter = bottleneck(tensors, prefix, linear.in_features, s)
        return linear.register_forward_pre_hook(lambda layer, args: (adapter(args[0]),))
    if where == "after":
        adapter = bottleneck(tensors, prefix, linear.out_features, s)
        return linear.register_forward_hook(lambda layer, args, y: adapter(y))
    added = beside(tensors, prefix, linear.in_features, linear.out_features, s)
    return linear.register_forward_hook(lambda layer, args, y: y + args[0] @ added)


def hooked(lm: LanguageModel, oracle: PreTrainedModel, kind: str, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of the `transformers` model with lm's frozen weights, and dense adapters of these tensors."""
    plain, model_type = copy.deepcopy(oracle), lm.raw_config["model_type"]
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, stored in lm.store.items():
            if name not in (TRAINED, FIRST):
                parameters[name].copy_(stored.read().view(stored.shape))
    for i in range(lm.config.num_hidden_layers):
        for path, where in WHERE[model_type, kind].items():
            prefix = f"{LAYERS[model_type]}{i}.{path}."
            hook(plain.get_submodule(prefix[:-1]), where, tensors, f"{prefix}adapter.", lm.adapters.spec)
    return plain


def reference_logits(
    lm: LanguageModel, oracle: PreTrainedModel, kind: str, tensors: dict[str, Tensor], tokens: Tensor,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """With a gradient for these tensors: adapters and norms."""
    norms = {name: tensor for name, tensor in tensors.items() if ".adapter." not in name}
    return functional_call(hooked(lm, oracle, kind, tensors), norms, (tokens,), {"attention_mask": mask}).logits


def named(lm: LanguageModel) -> dict[str, Tensor]:
    return lm.adapters.named(lm.store)


# ---------------------------------------------------------------- the forward


@by_format
@by_kind
@by_type
def test_an_identity_changes_no_bit_and_a_released_start_does(model_type, kind, weights, bases):
    """LoRA's own start is silent, in its paper's code too."""
    tokens, mask = padded_batch(RAW[model_type], "left")
    for compute in (torch.float32, torch.bfloat16) if weights in ("bf16", "int8") else (torch.float32,):
        for norms, identity in ((True, True), (False, False)):
            lm = load(bases[model_type].directory, dtype=compute, weights=weights)
            before = lm(tokens, mask)
            attach(lm, spec(kind, norms=norms, identity=identity), 0)
            after = lm(tokens, mask)
            if identity or kind == "lora":
                assert torch.equal(before, after)
            else:
                assert (before - after).abs().max() > 0.02


@by_format
@by_kind
@by_type
def test_trained_adapters_give_the_logits_of_dense_ones(model_type, kind, weights, bases):
    """Every place where LoRETTA, AdaZeta and LoRA have an adapter, after any training.  Bound: float32 rounding, as
    test_model.py has it for models without adapters."""
    base, cases = bases[model_type], ((False, True, "left"), (True, False, "right"))
    for norms, identity, padding in cases if weights in ("fp32", "int4") else cases[:1]:
        lm = adapted(base, kind, weights, norms=norms, identity=identity)
        tokens, mask = padded_batch(RAW[model_type], padding)
        with torch.no_grad():
            want = reference_logits(lm, base.oracle, kind, named(lm), tokens, mask)
        assert largest_gap(lm(tokens, mask), want, mask) < 1e-4
        without = load(base.directory, weights=weights)(tokens, mask)
        assert (want - without).abs().max() > 0.1


@by_type
@pytest.mark.parametrize("kind", ["adp mlp", "rep"])
def test_factors_without_a_split_give_the_logits_of_dense_ones(model_type, kind, bases, monkeypatch):
    """As 1024 x 8 has in the papers' table."""
    monkeypatch.setitem(tensor_train.TABLE, (32, 8), (16, 8, 2))
    base = bases[model_type]
    lm = adapted(base, kind)
    assert any(m.split is None for m in lm.block.modules() if isinstance(m, TensorTrain))
    tokens, mask = padded_batch(RAW[model_type], "right")
    with torch.no_grad():
        want = reference_logits(lm, base.oracle, kind, named(lm), tokens, mask)
    assert largest_gap(lm(tokens, mask), want, mask) < 1e-4


@by_kind
def test_adapters_compute_in_float32_beside_bf16(kind):
    """Their output is the bf16 number nearest to the exact result, all but where that is within float32's rounding of
    the middle between two: one in some 10^4.  Products of bf16 numbers would miss it as often as not."""
    s = spec(kind)
    module = tensor_train.Bottleneck(32, s) if s.kind == "adp" else tensor_train.Branch(32, 16, s)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(1, *p.shape, generator=generator) / 3 for name, p in module.named_parameters()}
    x = torch.randn(1, 2, 50, 32, generator=generator).bfloat16()
    tensors = {name: weight[0].double() for name, weight in weights.items()}
    if s.kind == "adp":
        want = bottleneck(tensors, "", 32, s)(x.double())
    else:
        want = x.double() @ beside(tensors, "", 32, 16, s)
    got = functional_call(module, weights, (x,))
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert (got != want.float().bfloat16()).double().mean() < 0.003


@by_type
def test_a_bf16_model_with_adapters_stays_near_the_fp32_one(model_type, bases):
    """bf16 keeps 8 bits, and errors of 2^-9 a product grow to some percent of logits of size 1 over two blocks."""
    for kind in KINDS:
        exact, lm = adapted(bases[model_type], kind), load(bases[model_type].directory, dtype=torch.bfloat16)
        attach(lm, spec(kind), 0)
        moved(lm)
        tokens, mask = padded_batch(RAW[model_type], "right")
        gap = (lm(tokens, mask) - exact(tokens, mask))[mask.bool()]
        assert gap.square().mean().sqrt() < 0.1


@by_kind
@by_type
def test_each_layer_and_seed_has_its_own_start(model_type, kind, bases):
    def start(seed: int) -> dict[str, Tensor]:
        lm = load(bases[model_type].directory)
        attach(lm, spec(kind, identity=False), seed)
        return {name: tensor.clone() for name, tensor in named(lm).items() if tensor.any()}

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    kept = list(first.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i] if a.shape == b.shape)


def test_cores_start_with_the_variance_of_the_papers():
    """W has the variance 1 / (I + O): AdaZeta's target_sdv.  Over 512 draws of 256 entries.

    One draw's mean square varies by no more than its own size (0.3 of it: entries share their few cores), so five
    deviations of the mean are at most 5 / sqrt(512) = 0.22 of it.
    """
    parts, squares = torch.nn.ModuleDict({"down": TensorTrain(32, 8, 5, bias=True)}), []
    for seed in range(512):
        values = tensor_train.initial(parts, spec("rep"), lambda name, seed=seed: tensor_id(f"{seed} {name}"))
        squares.append(dense(values, "down.", 32, 8).square().mean().item())
        assert 0.5 * 8**-0.5 < values["down.bias"].abs().max() <= 8**-0.5
    assert sum(squares) / len(squares) * (32 + 8) == pytest.approx(1, abs=0.22)


@pytest.mark.parametrize("identity", [True, False])
def test_biases_start_uniform_and_the_last_one_at_zero_where_the_model_is_to_be_as_it_was(identity):
    """Of 32 draws the largest is above half the bound but once in 2^32 times."""
    parts = torch.nn.ModuleDict({name: TensorTrain(32, 32, 2, bias=True) for name in ("down", "up")})
    values = tensor_train.initial(parts, spec("adp mlp", identity=identity), tensor_id)
    for name, silent in (("down", False), ("up", identity)):
        largest = values[f"{name}.bias"].abs().max()
        assert largest == 0 if silent else 0.5 * 32**-0.5 < largest <= 32**-0.5
        assert values[f"{name}.cores.0"].any() and values[f"{name}.cores.{len(parts[name].cores) - 1}"].any() != silent


def test_lora_starts_as_its_own_code_does():
    """A uniform in +-1 / sqrt(I), B zero."""
    lm = create(RAW["llama"])
    attach(lm, spec("lora"), 0)
    for name, tensor in named(lm).items():
        if name.endswith("cores.1"):
            assert not tensor.any()
        else:
            assert 0.9 * 32**-0.5 < tensor.abs().max() <= 32**-0.5 and abs(tensor.mean()) < 5 * 0.102 / 96**0.5


@by_type
def test_a_placement_that_is_not_there_is_refused(model_type, bases):
    lm = load(bases[model_type].directory)
    for kind, placement in (("adp", "qv"), ("adp", "attention"), ("rep", "mlp"), ("lora", "sublayers")):
        with pytest.raises(ValueError, match=f"placement must be one of .* for {kind}, got '{placement}'"):
            attach(lm, Spec(kind, placement, 8, 3), 0)


def test_a_refused_placement_leaves_the_model_as_it_was(bases):
    lm = load(bases["llama"].directory)
    with pytest.raises(ValueError):
        attach(lm, Spec("adp", "qv", 8, 3), 0)
    assert lm.adapters is None


def test_attaching_twice_is_refused(bases):
    lm = adapted(bases["llama"], "adp mlp")
    with pytest.raises(ValueError):
        attach(lm, spec("adp mlp"), 0)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("norms", [False, True])
@by_kind
@by_type
def test_gradients_are_those_of_dense_adapters(model_type, kind, norms, bases):
    """Every adapter tensor and norm, by autograd through both.  Bound: float32 rounding of sums over 36 tokens and two
    blocks, 1e-4 of the tensor's largest gradient; biases whose gradient is all but zero go by the whole's largest."""
    base = bases[model_type]
    lm = adapted(base, kind, norms=norms)
    tokens, mask = padded_batch(RAW[model_type], "left")
    upstream = torch.randn(3, 12, 97, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    vector = lm.store[TRAINED].value.requires_grad_()
    (lm(tokens, mask) * upstream).sum().backward()
    assert FIRST not in lm.store or lm.store[FIRST].value.grad is None
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in named(lm).items()}
    (reference_logits(lm, base.oracle, kind, leaves, tokens, mask) * upstream).sum().backward()
    compared = 0
    for name, place in lm.adapters.places.items():
        if place.vector == TRAINED:
            got = vector.grad[place.start : place.start + place.shape.numel()].view(place.shape)
            scale = max(leaves[name].grad.abs().max().item(), 1e-2 * vector.grad.abs().max().item())
            assert (got - leaves[name].grad).abs().max() < 1e-4 * scale, name
            compared += place.shape.numel()
    assert compared == vector.numel() and vector.grad.count_nonzero() > 0.5 * compared


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("norms", [False, True])
@by_kind
@by_type
def test_adapters_come_back_to_the_bit(model_type, kind, norms, bases, tmp_path):
    """Around a model that has none, and in place of others."""
    base = bases[model_type]
    lm = adapted(base, kind, "int8", norms=norms)
    tensor_train.save(lm, tmp_path / "a")
    fresh, other = load(base.directory, weights="int8"), adapted(base, kind, "int8", seed=7, norms=norms)
    assert other.sha256() != lm.sha256()
    tokens = padded_batch(RAW[model_type], "no mask")[0]
    for again in (fresh, other):
        tensor_train.load(again, tmp_path / "a")
        assert again.sha256() == lm.sha256() and again.adapters == lm.adapters
        assert torch.equal(again(tokens), lm(tokens))
    tensor_train.save(fresh, tmp_path / "b")
    files = ["adapters.safetensors", "config.json"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@by_kind
@by_type
def test_the_file_holds_adapters_alone(model_type, kind, bases, tmp_path):
    """Four bytes a number and some 130 a tensor for its name and place; of the base model nothing but the norms that
    were trained."""
    for norms in (False, True):
        lm = adapted(bases[model_type], kind, norms=norms)
        tensor_train.save(lm, tmp_path / "a")
        held = load_file(tmp_path / "a" / "adapters.safetensors")
        of_base = set(held) & set(load_file(bases[model_type].directory / "model.safetensors"))
        wanted = [n for n in lm.adapters.places if "norm" in n.lower() and ".adapter." not in n] if norms else []
        assert of_base == set(wanted) and bool(wanted) == norms
        assert all(".adapter." in name for name in set(held) - of_base)
        numbers = sum(tensor.numel() for tensor in held.values())
        size = (tmp_path / "a" / "adapters.safetensors").stat().st_size
        assert 4 * numbers < size < 4 * numbers + 200 * len(held)


def rewrite(change):
    """A case that changes the saved tensors."""

    def apply(directory: Path) -> None:
        path = directory / "adapters.safetensors"
        tensors = load_file(path)
        change(tensors, sorted(tensors)[5])
        save_file(tensors, path)

    return apply


def reword(change):
    """A case that changes config.json: a function of its contents, or the text itself."""

    def apply(directory: Path) -> None:
        path = directory / "config.json"
        if isinstance(change, str):
            return path.write_text(change)
        config = json.loads(path.read_text())
        change(config)
        return path.write_text(json.dumps(config))

    return apply


def cut_short(directory: Path) -> None:
    path = directory / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


BROKEN = {  # case: how a saved directory is broken, and what the message must say
    "missing": (rewrite(lambda tensors, name: tensors.pop(name)), "missing: model.layers.0.mlp"),
    "unexpected": (rewrite(lambda tensors, name: tensors.update(more=torch.zeros(2))), "unexpected: more"),
    "of the base": (rewrite(lambda tensors, name: tensors.update({"model.norm.weight": torch.ones(32)})),
                    "unexpected: model.norm.weight"),
    "shape": (rewrite(lambda tensors, name: tensors.update({name: tensors[name][..., None]})), "config.json makes it"),
    "nan": (rewrite(lambda tensors, name: tensors[name].view(-1)[-1].fill_(math.nan)), "finite float32"),
    "infinity": (rewrite(lambda tensors, name: tensors[name].view(-1)[0].fill_(-math.inf)), "finite float32"),
    "cut short": (cut_short, "is truncated or not a safetensors file"),
    "no tensors": (lambda directory: (directory / "adapters.safetensors").unlink(), "has no adapters.safetensors"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "does not describe adapters"),
    "broken json": (reword('{"model_type": "llama",'), "does not describe adapters"),
    "no object": (reword("[1, 2]"), "does not describe adapters"),
    "null": (reword("null"), "does not describe adapters"),
    "a plain model": (reword('{"model_type": "llama"}'), "does not describe adapters .*adapters"),
    "a list": (reword('{"model_type": "llama", "adapters": ["adp"]}'), "does not describe adapters"),
    "lacks a field": (reword(lambda c: c["adapters"].pop("rank")), "rank"),
    "another field": (reword(lambda c: c["adapters"].update(dropout=0.1)), "dropout"),
    "another type": (reword(lambda c: c.update(model_type="roberta")), "are of a roberta, the model is a llama"),
    "another kind": (reword(lambda c: c["adapters"].update(kind="dora")), "no usable adapters: .*dora"),
    "another place": (reword(lambda c: c["adapters"].update(placement="all")), "got 'all'"),
    "no bottleneck": (reword(lambda c: c["adapters"].update(bottleneck=0)), "no usable adapters: "),
    "another rank": (reword(lambda c: c["adapters"].update(rank=4)), "config.json makes it"),
    "norms": (reword(lambda c: c["adapters"].update(norms=True)), "missing: model.layers.0.input_layernorm"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_in_one_line(case, bases, tmp_path):
    tensor_train.save(adapted(bases["llama"], "adp mlp"), tmp_path / "a")
    breaks, told = BROKEN[case]
    breaks(tmp_path / "a")
    with pytest.raises(ValueError) as raised:
        tensor_train.load(load(bases["llama"].directory), tmp_path / "a")
    assert "\n" not in str(raised.value) and re.search(told, str(raised.value)), raised.value


def test_a_model_without_adapters_has_none_to_save(bases, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        tensor_train.save(load(bases["llama"].directory), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_other_adapters_than_the_models_own_are_refused(bases, tmp_path):
    saved = adapted(bases["llama"], "adp mlp")
    tensor_train.save(saved, tmp_path / "a")
    for changes in (dict(rank=4), dict(norms=True), dict(identity=False), dict(bottleneck=16)):
        lm = adapted(bases["llama"], "adp mlp", **changes)
        before = lm.sha256()
        with pytest.raises(ValueError, match="holds .*, the model has ") as raised:
            tensor_train.load(lm, tmp_path / "a")
        assert "\n" not in str(raised.value) and lm.sha256() == before
    with pytest.raises(ValueError, match="are of a llama, the model is a roberta"):
        tensor_train.load(load(bases["roberta"].directory), tmp_path / "a")


@pytest.mark.parametrize("adapters", [
    dict(rank=None), dict(rank=3.0), dict(rank=[3, 3]), dict(bottleneck="8"), dict(bottleneck=8.0), dict(alpha="16"),
    dict(rank=10**9), dict(norms=1), dict(placement=3),
], ids=str)  # fmt: skip
def test_a_spec_of_other_types_is_refused_in_one_line(adapters, bases, tmp_path):
    tensor_train.save(adapted(bases["llama"], "adp mlp"), tmp_path / "a")
    reword(lambda config: config["adapters"].update(adapters))(tmp_path / "a")
    with pytest.raises(ValueError, match="does not describe adapters.*no usable adapters") as raised:
        tensor_train.load(load(bases["llama"].directory), tmp_path / "a")
    assert "\n" not in str(raised.value)


def test_a_deep_config_is_refused_in_one_line(bases, tmp_path):
    tensor_train.save(adapted(bases["llama"], "adp mlp"), tmp_path / "a")
    reword("[" * 100_000)(tmp_path / "a")
    with pytest.raises(ValueError, match="does not describe adapters") as raised:
        tensor_train.load(load(bases["llama"].directory), tmp_path / "a")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [
    lambda tensor: tensor.double() * 0 + 1e300, lambda tensor: tensor.to(torch.int32),
    lambda tensor: tensor.to(torch.float8_e4m3fn),
], ids=["1e300", "integers", "float8"])  # fmt: skip
def test_numbers_that_are_no_float32_are_refused(change, bases, tmp_path):
    """As the base model's loader has it."""
    tensor_train.save(adapted(bases["llama"], "adp mlp"), tmp_path / "a")
    rewrite(lambda tensors, name: tensors.update({name: change(tensors[name])}))(tmp_path / "a")
    with pytest.raises(ValueError):
        tensor_train.load(load(bases["llama"].directory), tmp_path / "a")


def test_a_failed_load_leaves_the_model_as_it_was(bases, tmp_path):
    tensor_train.save(adapted(bases["llama"], "adp mlp", identity=False), tmp_path / "a")
    BROKEN["missing"][0](tmp_path / "a")
    lm, tokens = load(bases["llama"].directory), torch.tensor([[5, 6, 7]])
    before = lm(tokens)
    with pytest.raises(ValueError):
        tensor_train.load(lm, tmp_path / "a")
    assert torch.equal(lm(tokens), before)


def test_adapters_save_over_their_own_directory_and_no_other(bases, tmp_path):
    lm = adapted(bases["llama"], "lora")
    for _ in range(2):
        tensor_train.save(moved(lm), tmp_path / "a")
    fresh = load(bases["llama"].directory)
    tensor_train.load(fresh, tmp_path / "a")
    assert fresh.sha256() == lm.sha256()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="thesis.tex"):
        tensor_train.save(lm, tmp_path / "notes")


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("norms, identity", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("weights", ["bf16", "int4"])
@pytest.mark.parametrize("kind", ["rep", "lora"])
@by_type
def test_a_merged_model_gives_the_same_logits_here_and_in_transformers(
    model_type, kind, weights, norms, identity, bases, tmp_path
):
    """Bounds: rounding of x (W + A B) against x W + (x A) B in float32; test_model.py's between us and them."""
    lm = adapted(bases[model_type], kind, weights, by=0.1, norms=norms, identity=identity)
    tokens, mask = padded_batch(RAW[model_type], "right")
    before, want = lm.sha256(), lm(tokens, mask)
    merged = merge(lm)
    assert merged.adapters is None and merged.weights == "fp32" and lm.sha256() == before
    assert largest_gap(merged(tokens, mask), want, mask) < 1e-5
    merged.save(tmp_path / "m")
    theirs = read_oracle(tmp_path / "m", RAW[model_type])
    with torch.no_grad():
        assert largest_gap(theirs(tokens, attention_mask=mask).logits, want, mask) < 1e-4


def test_a_merged_model_shares_no_memory_with_the_first(bases):
    lm = adapted(bases["llama"], "rep", norms=True)
    merged, before = merge(lm), lm.sha256()
    for stored in merged.store.values():
        stored.value.zero_()
    assert lm.sha256() == before


@by_type
def test_what_cannot_be_merged_is_refused(model_type, bases):
    for kind in ("adp mlp", "adp sublayers"):
        with pytest.raises(ValueError, match="only rep and lora"):
            merge(adapted(bases[model_type], kind))
    with pytest.raises(ValueError, match="only rep and lora"):
        merge(load(bases[model_type].directory))


@by_kind
def test_a_model_with_adapters_is_not_saved_as_a_plain_one(kind, bases, tmp_path):
    with pytest.raises(ValueError, match="merge them first"):
        adapted(bases["llama"], kind).save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_merged_model_takes_its_tokenizer_along(tmp_path):
    lm = load(TINY / "model")
    attach(lm, spec("lora"), 0)
    merge(lm).save(tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").is_file()


# ---------------------------------------------------------------- generation


def greedy(lm: LanguageModel, tokens: Tensor, mask: Tensor | None, new: int) -> Tensor:
    """The whole sequence again for every token."""
    mask = torch.ones_like(tokens) if mask is None else mask
    for _ in range(new):
        best = lm(tokens, mask)[:, -1].argmax(-1, keepdim=True)
        tokens, mask = torch.cat((tokens, best), 1), torch.cat((mask, torch.ones_like(best)), 1)
    return tokens


@by_kind
def test_generation_with_the_cache_equals_recomputation(kind, tmp_path):
    """A batch with left padding, a batch of one, a sequence of one: squeezed axes would show here (PAPERS 2.2)."""
    raw = tiny_llama(eos_token_id=None)
    random_oracle(raw, tmp_path)
    lm = adapted(Base(None, tmp_path), kind, norms=True)
    batch, mask = padded_batch(raw, "left")
    plain = load(tmp_path)
    for tokens, seen in ((batch, mask), (batch[:1], None), (batch[:, :1], None), (batch[:1, :1], None)):
        got = lm.generate(tokens, 6, seen)
        assert got.shape == (len(tokens), tokens.shape[1] + 6)
        assert torch.equal(got, greedy(lm, tokens, seen, 6))
        assert not torch.equal(got, plain.generate(tokens, 6, seen))


# ---------------------------------------------------------------- several probes in one forward


def batch_of(n: int = 6, pad: int = 0):
    """n random prompts of 3 to 8 tokens with two options of one token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    rows = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    encoded = [Encoded([row], [[17], [42]], len(row) - 1, i % 2) for i, row in enumerate(rows)]
    return collate(encoded, pad, torch.device("cpu"))


def queries_at(lm: LanguageModel, zo: ZO, at_once: int):
    frozen = None if lm.adapters is None else lm.stored_view()
    loss_fn = partial(losses, lm, batch_of(pad=lm.config.pad_token_id))
    return estimate(tensor_train.trained(lm), loss_fn, 3, 4, zo, lm.dtype, frozen, at_once)


def assert_alike(some: list, others: list, zo: ZO) -> None:
    """Losses near 1 of the same weights in other products: 1e-6 of float32 rounding; slopes divide that by 2 eps."""
    assert len(some) == len(others) == zo.queries
    for a, b in zip(some, others, strict=True):
        assert (a.plus, a.minus) == pytest.approx((b.plus, b.minus), abs=2e-6)
        assert a.slope == pytest.approx(b.slope, abs=2e-6 / zo.eps)
    assert max(abs(q.plus - q.minus) for q in some) > 1e-4  # so that probes in a wrong order would show


@pytest.mark.parametrize("weights, bits", [("fp32", None), ("int8", 4), ("int4", None)])
@by_kind
@by_type
def test_probes_of_adapters_can_share_a_forward(model_type, kind, weights, bits, bases):
    """Three queries, six probes: by ones, twos, threes (a query cut in two), fours (a short rest), all, and more room
    than there are."""
    lm, zo = adapted(bases[model_type], kind, weights, norms=kind == "rep"), ZO(eps=0.02, queries=3, bits=bits)
    before, pairs = lm.sha256(), queries_at(lm, zo, 2)
    for at_once in (1, 3, 4, 6, 9):
        assert_alike(queries_at(lm, zo, at_once), pairs, zo)
    assert lm.sha256() == before


@pytest.mark.parametrize("weights, bits, grid", [("fp32", None, False), ("int8", 4, False), ("int4", None, True)])
@by_type
def test_probes_of_all_weights_can_share_a_forward(model_type, weights, bits, grid, bases):
    lm, zo = load(bases[model_type].directory, weights=weights), ZO(eps=0.01, queries=3, bits=bits, grid=grid)
    pairs = queries_at(lm, zo, 2)
    for at_once in (1, 3, 4, 6):
        assert_alike(queries_at(lm, zo, at_once), pairs, zo)


@pytest.mark.parametrize("bits", [None, 4])
@by_kind
@by_type
def test_a_probe_is_the_model_with_another_vector(model_type, kind, bits, bases):
    """L(w + eps u1) and L(w - eps u1) with u1 drawn by hand and written into the store: signs, queries and streams."""
    lm, zo = adapted(bases[model_type], kind), ZO(eps=0.02, queries=3, bits=bits)
    pad, start = lm.config.pad_token_id, lm.store[TRAINED].value
    for q, query in enumerate(queries_at(lm, zo, 6)):
        key = Key(3, 4, q, tensor_id(TRAINED))
        u = direction(key, torch.arange(1), len(start), bits, Use.PROBE_ROUNDING)[0]
        by_hand = []
        for sign in (1, -1):
            lm.store[TRAINED] = Float(start + sign * 0.02 * u)
            by_hand.append(losses(lm, batch_of(pad=pad), lm.stored_view()).item())
        lm.store[TRAINED] = Float(start)
        assert (query.plus, query.minus) == pytest.approx(by_hand, abs=2e-6)
        assert query.slope == pytest.approx((by_hand[0] - by_hand[1]) / 0.04, abs=1e-4)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_step_is_the_mean_of_its_queries(bits, bases):
    """v - lr / Q * sum of slope * u2 (AdaZeta's g_hat), and nothing else moves.  Bound: float32 rounding of four sums
    of numbers near 1."""
    lm, slopes = adapted(bases["roberta"], "rep"), [0.5, -2.0, 1.5]
    start, frozen = lm.store[TRAINED].value.clone(), hashes(lm)
    update(tensor_train.trained(lm), slopes, 3, 4, ZO(queries=3, bits=bits), 0.1)
    u = [direction(Key(3, 4, q, tensor_id(TRAINED)), torch.arange(1), len(start), bits, Use.UPDATE_ROUNDING)[0]
         for q in range(3)]  # fmt: skip
    want = start - 0.1 / 3 * sum(slope * u_q for slope, u_q in zip(slopes, u, strict=True))
    assert (lm.store[TRAINED].value - want).abs().max() < 1e-6
    assert hashes(lm) == frozen


# ---------------------------------------------------------------- runs


def hashes(lm: LanguageModel) -> dict[str, str]:
    """Of everything in the store that is not trained."""
    def digest(tensor: Tensor) -> str:
        return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    return {f"{name}{suffix}": digest(part) for name, stored in lm.store.items() if name != TRAINED
            for suffix, part in stored.parts().items()}  # fmt: skip


class Run(NamedTuple):
    result: dict
    lm: LanguageModel
    frozen: tuple[dict[str, str], dict[str, str]]  # before and after
    start: dict[str, Tensor]  # what was trained, before
    loss: tuple[float, float]  # on 64 training examples, before and after
    steps: list[dict]
    folder: Path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("--method lora --steps 3") -> a Run on the embedded model; examples cuts its training set."""
    prepare = train.prepare

    def start(flags: str, examples: int = 1024, out: str = "run") -> Run:
        seen = {}

        def watched(c):
            seen["problem"], splits = prepare(c)
            problem = seen["problem"]
            problem.train, problem.dev, problem.test = problem.train[:examples], problem.dev[:8], problem.test[:8]
            seen["frozen"], seen["loss"] = hashes(problem.lm), problem.quality(problem.train[:64]).loss
            seen["start"] = {name: tensor.clone() for name, tensor in named(problem.lm).items()}
            return problem, splits

        monkeypatch.setattr(train, "prepare", watched)
        folder = tmp_path / out
        result = train.run(parse([*flags.split(), "--eval-every", "1000", "--out", str(folder)]))
        problem = seen["problem"]
        after = problem.quality(problem.train[:64]).loss
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "slope" in row]
        frozen = seen["frozen"], hashes(problem.lm)
        return Run(result, problem.lm, frozen, seen["start"], (seen["loss"], after), steps, folder)

    return start


NORMS = ["model.norm.weight", *(f"model.layers.{i}.{n}_layernorm.weight" for i in range(3)
                                for n in ("input", "post_attention"))]  # fmt: skip


@pytest.mark.parametrize("flags, drop", [
    ("adazeta --steps 16", 0.004), ("loretta-adp --steps 8", 0.5), ("loretta-rep --steps 8", 0.5),
    ("lora --steps 12", 0.3), ("loretta-adp --optimizer zo --direction-bits 4 --steps 10", 0.01),
])  # fmt: skip
def test_every_method_learns_and_leaves_the_frozen_weights_alone(flags, drop, run):
    """The embedded task by default settings, from a loss of 1.5 on 64 examples; each drop is about half of what was
    seen.  A forward-only step is worth a thousandth, which shows because the examples are the same ones after it."""
    done, method = run(f"--method {flags}"), flags.split()[0]
    assert done.loss[0] - done.loss[1] > drop
    assert done.frozen[0] == done.frozen[1]
    after, norms = named(done.lm), method.startswith("loretta")
    assert {name for name in after if ".adapter." not in name} == (set(NORMS) if norms else set())
    assert bool(norms) != (set(NORMS) <= set(done.frozen[0]))
    still = [n for n in after if torch.equal(after[n], done.start[n]) and "adapter.first_" not in n]
    assert still == []


@pytest.mark.parametrize("flags, weights", [
    ("adazeta --queries 2", "int4"), ("adazeta", "fp8"), ("loretta-adp", "int8"), ("loretta-rep", "int4"),
    ("loretta-rep --optimizer zo", "bf16"), ("lora --init released", "fp8"), ("lora --optimizer zo", "int8"),
])  # fmt: skip
def test_frozen_codes_keep_every_byte(flags, weights, run):
    """What was saved is what was tested, and the codes stand as they stood."""
    done = run(f"--method {flags} --weights {weights} --steps 2 --batch-size 4", examples=32)
    assert done.frozen[0] == done.frozen[1]
    assert any(name.endswith(".scale") for name in done.frozen[0]) == (weights != "bf16")
    assert any(not torch.equal(tensor, done.start[name]) for name, tensor in named(done.lm).items())
    fresh = load(TINY / "model", weights=weights)
    tensor_train.load(fresh, done.folder / "model")
    assert fresh.sha256() == done.result["weights_sha256"]
    assert done.result["trainable_parameters"] == done.lm.store[TRAINED].value.numel()


@pytest.mark.parametrize("flags", ["loretta-rep", "adazeta"])
def test_lr_zero_leaves_every_bit(flags, run):
    done = run(f"--method {flags} --lr 0 --steps 2 --batch-size 4", examples=32)
    assert all(torch.equal(tensor, done.start[name]) for name, tensor in named(done.lm).items())


# ---------------------------------------------------------------- the schedule

RELEASED = math.log(20 / 0.85) / math.log(160)
CODE = {0: 1, 1: 1, 2: 1, 5: 2, 10: 3, 20: 5, 40: 8, 80: 12, 101: 15, 130: 15, 159: 15}  # PAPERS 2.2
PAPER = {0: 1, 1: 1, 2: 1, 5: 1, 10: 2, 20: 3, 40: 4, 80: 6, 120: 7, 159: 8}


@pytest.mark.parametrize("beta, most, told, mean", [(RELEASED, 15, CODE, 11.0), (0.45, 20, PAPER, 5.25)])
def test_the_schedule_is_the_papers_table(beta, most, told, mean):
    schedule = [queries_of(epoch, 0.85, beta, most) for epoch in range(160)]
    assert {epoch: schedule[epoch] for epoch in told} == told
    assert sum(schedule) / 160 == pytest.approx(mean, abs=0.05 if mean == 11.0 else 0.005)
    assert schedule == sorted(schedule) and schedule[0] == 1
    assert queries_of(10**6, 0.85, beta, most) == most


def test_the_cap_of_the_released_command_is_met_at_epoch_101():
    assert [queries_of(epoch, 0.85, RELEASED, 15) for epoch in (100, 101)] == [14, 15]


@pytest.mark.parametrize("n, batch_size", [(1000, 16), (10, 4), (12, 4), (5, 8), (1, 1)])
def test_epochs_are_counted_from_zero_in_whole_steps(n, batch_size):
    """floor(k / ceil(D / B)): 63 steps of 16 are one epoch of 1,000."""
    a_pass = math.ceil(n / batch_size)
    assert [epoch_of(step, n, batch_size) for step in range(5 * a_pass)] == [e for e in range(5) for _ in range(a_pass)]


def test_a_run_takes_the_queries_of_its_schedule(run):
    """Ten examples by four: three steps an epoch.  max(floor(2 e^0.5), 1): 1 2 2 3, then 4 = the cap.  The record
    redoes the run without a forward."""
    flags = "--method adazeta --alpha 2 --beta 0.5 --max-queries 4 --batch-size 4 --steps 18"
    done, want = run(flags, examples=10), [1] * 3 + [2] * 6 + [3] * 3 + [4] * 6
    slopes = read_trajectory(done.folder / "trajectory")
    assert [row["queries"] for row in done.steps] == want == [len(s) for s in slopes]
    for row in done.steps:
        assert len(row["slope"]) == len(row["plus"]) == len(row["minus"]) == row["queries"]
    assert done.result["forwards"] == 2 * sum(want)
    lm = load(TINY / "model")
    attach(lm, spec_of(parse(["--method", "adazeta"]), "llama"), 0)
    for step, of_step in enumerate(slopes):
        update(tensor_train.trained(lm), of_step, 0, step, ZO(1e-3, len(of_step)), 1e-2)
    assert lm.sha256() == done.result["weights_sha256"]


def test_a_fixed_number_of_queries_stands_for_the_schedule(run):
    done = run("--method adazeta --queries 3 --batch-size 4 --steps 4", examples=4)
    assert [row["queries"] for row in done.steps] == [3] * 4 and done.result["forwards"] == 24


def test_probes_per_forward_change_a_run_by_rounding_only(run):
    """lr 0, so that all stay at the same weights: differences of 2e-6 in losses, over 2 eps in slopes."""
    flags = "--method adazeta --queries 3 --batch-size 4 --steps 2 --lr 0 --probes-per-forward"
    first, *others = (run(f"{flags} {n}", examples=8, out=str(n)).steps for n in (6, 1, 4))
    for steps in others:
        for a, b in zip(first, steps, strict=True):
            assert a["plus"] == pytest.approx(b["plus"], abs=2e-6) and a["minus"] == pytest.approx(b["minus"], abs=2e-6)
            assert a["slope"] == pytest.approx(b["slope"], abs=2e-3)


# ---------------------------------------------------------------- parameter counts


def counted(capsys, *flags: str) -> dict:
    assert train.main(["--dry-run", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("flags, adapters, norms", [
    ("--model llama2-7b --method loretta-adp", 610_560, 266_240),
    ("--model llama2-7b --method adazeta", 610_560, 0),
    ("--model llama2-7b --method adazeta --tt-rank 8", 921_600, 0),
    ("--model llama2-7b --method adazeta --tt-rank 16", 2_426_880, 0),
    ("--model llama2-7b --method loretta-rep", 249_856, 266_240),
    ("--model llama2-7b --method lora", 4_194_304, 0),
    ("--model llama2-13b --method lora", 6_553_600, 0),
    ("--model llama2-13b --method loretta-adp --tt-rank 8", 1_676_160 - 81 * 5120, 81 * 5120),
    ("--model roberta-base --method adazeta", 57_408, 0),
    ("--model roberta-base --method loretta-adp", 57_408, 38_400),
])  # fmt: skip
def test_the_papers_parameter_counts(flags, adapters, norms, capsys):
    """PAPERS 3.3 and 2.2: 7B with norms is .88M for adp and .51M for rep; 13B is 1.67M."""
    predicted = counted(capsys, *flags.split(), "--task", "sst2")
    assert predicted["trainable"] == {"adapters": adapters, "norms": norms}
    assert predicted["trainable_parameters"] == adapters + norms


def test_the_sums_that_the_papers_print(capsys):
    sums = {"llama2-7b loretta-adp": 876_800, "llama2-7b loretta-rep": 516_096}
    for case, total in sums.items():
        model, method = case.split()
        assert counted(capsys, "--model", model, "--method", method)["trainable_parameters"] == total
    flags = "--model llama2-13b --method loretta-adp --tt-rank 8".split()
    assert counted(capsys, *flags)["trainable_parameters"] == 1_676_160


@pytest.mark.parametrize("flags", [
    "loretta-adp --placement mlp", "loretta-adp --placement sublayers --bottleneck 16 --tt-rank 2",
    "adazeta --placement mlp --bottleneck 7", "adazeta --placement sublayers --init released",
    "loretta-rep --tt-rank 3", "loretta-rep --init released", "lora --lora-rank 5", "lora --optimizer zo",
])  # fmt: skip
@by_type
def test_what_is_counted_is_what_is_attached(model_type, flags):
    c = parse(["--method", *flags.split()])
    train.validate(c)
    lm = create(RAW[model_type])
    before = sum(stored.shape.numel() for stored in lm.store.values())
    attach(lm, spec_of(c, model_type), c.seed)
    predicted = predict(c, RAW[model_type], 16)
    assert predicted["trainable_parameters"] == lm.store[TRAINED].value.numel() == train.parameters(
        tensor_train.trained(lm))  # fmt: skip
    assert predicted["total_parameters"] == before + predicted["trainable"]["adapters"]
    norms = sum(tensor.numel() for name, tensor in named(lm).items() if ".adapter." not in name)
    assert predicted["trainable"]["norms"] == norms
    assert (norms > 0) == c.method.startswith("loretta")


def test_the_command_counts_what_a_run_trains(run, capsys):
    done = run("--method loretta-rep --steps 1 --batch-size 2", examples=4)
    assert counted(capsys, "--method", "loretta-rep")["trainable_parameters"] == done.result["trainable_parameters"]


# ---------------------------------------------------------------- flags

TENSOR_TRAINS = {"loretta-adp", "loretta-rep", "adazeta"}
ZO_ONLY = {"quzo", "mezo", "adazeta"}  # of those that have a default optimizer of their own
MEANT = {  # a flag: the methods, with their default optimizer, beside which it means something
    "--placement mlp": {"loretta-adp", "adazeta"}, "--bottleneck 8": TENSOR_TRAINS, "--tt-rank 2": TENSOR_TRAINS,
    "--lora-rank 2": {"lora"}, "--lora-alpha 8": {"lora", "loretta-rep"}, "--init identity": set(ADAPTERS),
    "--init released": set(ADAPTERS), "--alpha 0.5": {"adazeta"}, "--beta 0.5": {"adazeta"},
    "--max-queries 3": {"adazeta"}, "--queries 2": ZO_ONLY, "--eps 0.01": ZO_ONLY, "--probes-per-forward 1": ZO_ONLY,
    "--direction-bits full": ZO_ONLY, "--estimator random": ZO_ONLY,
    "--weight-decay 0.1": {"fo", "fo-ste"}, "--master bf16": {"fo-ste"},
}  # fmt: skip


@pytest.mark.parametrize("flag", MEANT)
def test_a_flag_is_refused_where_it_means_nothing(flag, tmp_path, capsys):
    for method in METHODS:
        argv = ["--method", method, *flag.split(), "--out", str(tmp_path / "run")]
        if method in MEANT[flag]:
            train.validate(parse(argv))
            continue
        assert train.main(argv) == 2, method
        told = capsys.readouterr()
        assert told.out == "" and len(told.err.splitlines()) == 1, told.err
        assert f"{flag.split()[0]} means nothing beside --method {method}" in told.err
    assert not (tmp_path / "run").exists()


REFUSED = {
    "--method adazeta --queries 3 --alpha 0.5": "--alpha means nothing beside",
    "--method adazeta --queries 3 --max-queries 5": "--max-queries means nothing beside",
    "--method loretta-adp --optimizer zo --beta 0.5": "--beta means nothing beside --method loretta-adp --optimizer zo",
    "--method adazeta --weights int4 --probe codes": "--probe means nothing beside --method adazeta",
    "--method lora --optimizer zo --weights int8 --rounding nearest": "--rounding means nothing beside --method lora",
    "--method adazeta --optimizer adamw": "--method adazeta means --optimizer zo, got adamw",
    "--method mezo --optimizer adamw": "--method mezo means --optimizer zo",
    "--method fo --optimizer zo": "--method fo means --optimizer adamw",
    "--method adazeta --direction-bits grid": "adapters are floats",
    "--method lora --optimizer zo --direction-bits grid": "adapters are floats",
    "--method lora --weights int8 --residual 4": "--residual means nothing beside --method lora",
    "--method adazeta --weights int8 --residual 4": "--residual means nothing beside --method adazeta",
    "--method adazeta --weights int8 --oracle": "--oracle means nothing beside --method adazeta",
    "--method loretta-adp --placement qv": "'qv'",
    "--method loretta-adp --init zero": "'zero'",
    "--method loretta": "'loretta'",
    "--method adazeta --bottleneck 0": "--bottleneck must be in [1, 65536], got 0",
    "--method adazeta --tt-rank 0": "--tt-rank must be in",
    "--method adazeta --tt-rank 2.5": "'2.5'",
    "--method lora --lora-rank -1": "--lora-rank must be in",
    "--method lora --lora-alpha 0": "--lora-alpha must be in",
    "--method lora --lora-alpha nan": "got nan",
    "--method adazeta --alpha -1": "--alpha must be in",
    "--method adazeta --beta inf": "--beta must be in",
    "--method adazeta --max-queries 0": "--max-queries must be in",
    "--method adazeta --probes-per-forward 0": "--probes-per-forward must be in",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_contradict_each_other_get_one_line(flags, tmp_path, capsys):
    assert train.main([*flags.split(), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and REFUSED[flags] in told.err, told.err
    assert not (tmp_path / "run").exists()


def test_each_method_takes_its_own_adapters():
    """Kind, placement by model type, bottleneck, rank, alpha, norms: the papers' settings."""
    want = {
        "loretta-adp": {"llama": Spec("adp", "mlp", 64, 5, 1.0, norms=True),
                        "roberta": Spec("adp", "sublayers", 64, 5, 1.0, norms=True)},
        "adazeta": {"llama": Spec("adp", "mlp", 64, 5, 1.0), "roberta": Spec("adp", "sublayers", 64, 5, 1.0)},
        "loretta-rep": dict.fromkeys(RAW, Spec("rep", "qv", 8, 8, 16.0, norms=True)),
        "lora": dict.fromkeys(RAW, Spec("lora", "qv", 0, 8, 16.0)),
    }  # fmt: skip
    for method, by_model in want.items():
        for model_type, wanted in by_model.items():
            assert spec_of(parse(["--method", method]), model_type) == wanted
    released = spec_of(parse("--method adazeta --placement sublayers --init released".split()), "llama")
    assert released == Spec("adp", "sublayers", 64, 5, 1.0, identity=False)
    assert spec_of(parse(["--method", "quzo"]), "llama") is None
