"""Adapters around LLaMA and RoBERTa, against `transformers` models with dense adapters hooked in.  (tests/test_train.py
has their runs.)

The dense reference takes every tensor by name, multiplies the cores out, and adds the result where the papers put it;
nothing of tensor_train.py's forward is in it.
"""

from __future__ import annotations

import copy
import json
import math
import re
from functools import partial, reduce
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import direction, largest_gap, padded_batch, random_oracle, read_oracle, tiny_llama, tiny_roberta
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

import tensor_train
import train
from data.scoring import BatchLoss, Encoded
from data.tasks import TINY
from model import LanguageModel, create, load
from quant import FORMATS, Float
from random_bits import Key, Purpose, tensor_id
from runtime.checkpoints import weights_sha256
from runtime.config import parse, spec_of
from runtime.dry_run import predict
from tensor_train import INITIAL_VECTOR, TRAINED_VECTOR, Spec, TensorTrain, attach, merge
from zo_optim import ZO, adazeta_queries, epoch_of, probe_losses

RAW = {"llama": tiny_llama(attention_bias=True), "roberta": tiny_roberta()}
KINDS = {  # kind, placement
    "adp mlp": ("adp", "mlp"), "adp sublayers": ("adp", "sublayers"), "rep": ("rep", "qv"), "lora": ("lora", "qv"),
}  # fmt: skip
full = pytest.mark.full
by_type = pytest.mark.parametrize("model_type", RAW)
by_kind = pytest.mark.parametrize("kind", KINDS)


def spec(kind: str, **changes) -> Spec:
    """Alpha 12 beside bottleneck 8 and rank 3: scales of 1.5 and 4, which no forgotten division gives."""
    options = dict(bottleneck=0 if kind == "lora" else 8, rank=3, alpha=12.0) | changes
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
    vector = lm.weights[TRAINED_VECTOR].value
    vector += by * torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    return lm


def adapted(
    base: Base, kind: str, weights: str = "fp32", seed: int = 0, by: float = 0.3, dtype: torch.dtype = torch.float32,
    **changes,
) -> LanguageModel:  # fmt: skip
    lm = load(base.directory, weights=weights, dtype=dtype)
    attach(lm, spec(kind, **changes), seed)
    return moved(lm, by, seed)


def named(lm: LanguageModel) -> dict[str, Tensor]:
    return lm.adapters.named(lm.weights)


def sha256(lm: LanguageModel) -> str:
    return weights_sha256(lm.weights)


# ---------------------------------------------------------------- the dense reference

WHERE = {
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
    cores = [tensors[f"{prefix}cores.{i}"] for i in range(count)]
    return reduce(partial(torch.tensordot, dims=1), cores).reshape(inputs, outputs)


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


def reference_logits(
    lm: LanguageModel, oracle: PreTrainedModel, kind: str, tensors: dict[str, Tensor], tokens: Tensor,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Of a copy of the `transformers` model with lm's frozen weights, and dense adapters of these tensors; with a
    gradient for those, adapters and norms."""
    plain, model_type = copy.deepcopy(oracle), lm.raw_config["model_type"]
    parameters = dict(plain.named_parameters())
    for name in set(lm.weights) - {TRAINED_VECTOR, INITIAL_VECTOR}:
        parameters[name].data.copy_(lm.weights[name].dequantise().view(lm.weights[name].shape))
    for i in range(lm.config.num_hidden_layers):
        for path, where in WHERE[model_type, kind].items():
            prefix = f"{LAYERS[model_type]}{i}.{path}."
            hook(plain.get_submodule(prefix[:-1]), where, tensors, f"{prefix}adapter.", lm.adapters.spec)
    norms = {name: tensor for name, tensor in tensors.items() if ".adapter." not in name}
    return functional_call(plain, norms, (tokens,), {"attention_mask": mask}).logits


# ---------------------------------------------------------------- the forward


@by_kind
@by_type
def test_an_identity_changes_no_bit_and_a_released_start_does(model_type, kind, bases):
    """Whatever the frozen weights are and are multiplied in.  LoRA's own start is silent, in its paper's code too."""
    tokens, mask = padded_batch(RAW[model_type], "left")
    ways = [("bf16", torch.bfloat16), ("int8", torch.bfloat16), *((weights, torch.float32) for weights in FORMATS)]
    for (weights, dtype), identity in product(ways, (True, False)):
        lm = load(bases[model_type].directory, dtype=dtype, weights=weights)
        before = lm(tokens, mask)
        attach(lm, spec(kind, norms=identity, identity=identity), 0)
        after = lm(tokens, mask)
        if identity or kind == "lora":
            assert torch.equal(before, after)
        else:
            assert (before - after).abs().max() > 0.02


@by_kind
@by_type
def test_trained_adapters_give_the_logits_of_dense_ones(model_type, kind, bases):
    """Every place where LoRETTA, AdaZeta and LoRA have an adapter, after any training.  Bound: float32 rounding, as
    test_model.py has it for models without adapters."""
    base, cases = bases[model_type], [(weights, False, True, "left") for weights in FORMATS]
    for weights, norms, identity, padding in [*cases, ("fp32", True, False, "right"), ("int4", True, False, "right")]:
        lm = adapted(base, kind, weights, norms=norms, identity=identity)
        tokens, mask = padded_batch(RAW[model_type], padding)
        with torch.no_grad():
            want = reference_logits(lm, base.oracle, kind, named(lm), tokens, mask)
        assert largest_gap(lm(tokens, mask), want, mask) < 1e-4
        without = load(base.directory, weights=weights)(tokens, mask)
        assert (want - without).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["adp mlp", "rep"])
def test_factors_without_a_split_give_the_logits_of_dense_ones(kind, bases, monkeypatch):
    """As 1024 x 8 has in the papers' table."""
    monkeypatch.setitem(tensor_train.TABLE, (32, 8), (16, 8, 2))
    lm, (tokens, mask) = adapted(bases["llama"], kind), padded_batch(RAW["llama"], "right")
    assert any(m.split is None for m in lm.block.modules() if isinstance(m, TensorTrain))
    with torch.no_grad():
        want = reference_logits(lm, bases["llama"].oracle, kind, named(lm), tokens, mask)
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
    tokens, mask = padded_batch(RAW[model_type], "right")
    for kind in KINDS:
        exact, rounded = (adapted(bases[model_type], kind, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        gap = (rounded(tokens, mask) - exact(tokens, mask))[mask.bool()]
        assert gap.square().mean().sqrt() < 0.1


@by_kind
def test_generation_with_the_cache_equals_recomputation(kind, tmp_path):
    """A batch with left padding, a batch of one, a sequence of one: squeezed axes would show here."""
    raw = tiny_llama(eos_token_id=None)
    random_oracle(raw, tmp_path)
    lm, plain = adapted(Base(None, tmp_path), kind, norms=True), load(tmp_path)
    batch, mask = padded_batch(raw, "left")
    for tokens, seen in ((batch, mask), (batch[:1], None), (batch[:, :1], None), (batch[:1, :1], None)):
        whole, every = tokens, torch.ones_like(tokens) if seen is None else seen
        for _ in range(6):  # the whole sequence again for every token
            best = lm(whole, every)[:, -1].argmax(-1, keepdim=True)
            whole, every = torch.cat((whole, best), 1), torch.cat((every, torch.ones_like(best)), 1)
        assert torch.equal(lm.generate(tokens, 6, seen), whole)
        assert not torch.equal(plain.generate(tokens, 6, seen), whole)


@by_kind
@by_type
def test_gradients_are_those_of_dense_adapters(model_type, kind, bases):
    """Every adapter tensor and norm, by autograd through both.  Bound: float32 rounding of sums over 36 tokens and two
    blocks, 1e-4 of the tensor's largest gradient; biases whose gradient is all but zero go by the whole's largest."""
    base = bases[model_type]
    lm = adapted(base, kind, norms=True)
    tokens, mask = padded_batch(RAW[model_type], "left")
    upstream = torch.randn(3, 12, 97, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    vector = lm.weights[TRAINED_VECTOR].value.requires_grad_()
    (lm(tokens, mask) * upstream).sum().backward()
    assert INITIAL_VECTOR not in lm.weights or lm.weights[INITIAL_VECTOR].value.grad is None
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in named(lm).items()}
    (reference_logits(lm, base.oracle, kind, leaves, tokens, mask) * upstream).sum().backward()
    compared = 0
    for name, place in lm.adapters.places.items():
        if place.vector == TRAINED_VECTOR:
            got = vector.grad[place.start : place.start + place.shape.numel()].view(place.shape)
            scale = max(leaves[name].grad.abs().max().item(), 1e-2 * vector.grad.abs().max().item())
            assert (got - leaves[name].grad).abs().max() < 1e-4 * scale, name
            compared += place.shape.numel()
    assert compared == vector.numel() and vector.grad.count_nonzero() > 0.5 * compared


# ---------------------------------------------------------------- where training starts


@by_kind
@by_type
def test_each_layer_and_seed_has_its_own_start(model_type, kind):
    def start(seed: int) -> dict[str, Tensor]:
        lm = create(RAW[model_type])
        attach(lm, spec(kind, identity=False), seed)
        return {name: tensor for name, tensor in named(lm).items() if tensor.any()}

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    kept = list(first.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i] if a.shape == b.shape)


@full
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
def test_what_cannot_be_attached_is_refused_and_leaves_the_model_as_it_was(model_type):
    lm = create(RAW[model_type])
    for kind, placement in (("adp", "qv"), ("adp", "attention"), ("rep", "mlp"), ("lora", "sublayers")):
        with pytest.raises(ValueError, match=f"placement must be one of .* for {kind}, got '{placement}'"):
            attach(lm, Spec(kind, placement, 8, 3), 0)
    assert lm.adapters is None
    attach(lm, spec("adp mlp"), 0)
    before = sha256(lm)
    with pytest.raises(ValueError, match="already has adapters"):
        attach(lm, spec("adp mlp"), 1)
    assert sha256(lm) == before


# ---------------------------------------------------------------- saving and loading


@by_kind
@by_type
def test_adapters_come_back_to_the_bit_and_alone(model_type, kind, bases, tmp_path):
    """Around a model that has none, in place of others, and over their own files.  Those have four bytes a number and
    some 130 a tensor for its name and place; of the base model nothing but the norms that were trained."""
    base, (a, b) = bases[model_type], (tmp_path / "a", tmp_path / "b")
    tokens = padded_batch(RAW[model_type], "no mask")[0]
    for norms in (False, True):
        lm = adapted(base, kind, "int8", norms=norms)
        tensor_train.save(lm, a)
        fresh, other = load(base.directory, weights="int8"), adapted(base, kind, "int8", seed=7, norms=norms)
        assert sha256(other) != sha256(lm)
        for again in (fresh, other):
            tensor_train.load(again, a)
            assert sha256(again) == sha256(lm) and again.adapters == lm.adapters
            assert torch.equal(again(tokens), lm(tokens))
        tensor_train.save(fresh, b)
        files = ["adapters.safetensors", "config.json"]
        if kind == "lora":  # tests/test_peft.py
            files = ["adapter_model.safetensors", "adapter_config.json", "base.json"]
        assert {p.name for p in a.iterdir()} == set(files)
        assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)
        held = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(a / files[0]).items()}
        of_base = {name for name in held if not re.search(r"\.adapter\.|\.lora_[AB]\.", name)}
        assert of_base == {name for name in lm.adapters.places if "norm" in name.lower()} and bool(of_base) == norms
        assert of_base <= set(load_file(base.directory / "model.safetensors"))
        numbers = sum(tensor.numel() for tensor in held.values())
        assert 4 * numbers < (a / files[0]).stat().st_size < 4 * numbers + 200 * len(held)


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


OTHER_TYPES = (
    dict(rank=None), dict(rank=3.0), dict(rank=[3, 3]), dict(bottleneck="8"), dict(bottleneck=8.0), dict(alpha="16"),
    dict(rank=10**9), dict(norms=1), dict(placement=3), dict(kind="dora"), dict(bottleneck=0),
)  # fmt: skip
BROKEN = {  # case: how a saved directory is broken, and what the message must say
    "missing": (rewrite(lambda tensors, name: tensors.pop(name)), "missing: model.layers.0.mlp"),
    "unexpected": (rewrite(lambda tensors, name: tensors.update(more=torch.zeros(2))), "unexpected: more"),
    "of the base": (rewrite(lambda tensors, name: tensors.update({"model.norm.weight": torch.ones(32)})),
                    "unexpected: model.norm.weight"),
    "shape": (rewrite(lambda tensors, name: tensors.update({name: tensors[name][..., None]})), "config.json makes it"),
    "nan": (rewrite(lambda tensors, name: tensors[name].view(-1)[-1].fill_(math.nan)), "finite float32"),
    "infinity": (rewrite(lambda tensors, name: tensors[name].view(-1)[0].fill_(-math.inf)), "finite float32"),
    "1e300": (rewrite(lambda tensors, name: tensors.update({name: tensors[name].double() * 0 + 1e300})), "finite"),
    **{str(dtype): (rewrite(lambda tensors, name, dtype=dtype: tensors.update({name: tensors[name].to(dtype)})), "")
       for dtype in (torch.int32, torch.float8_e4m3fn)},
    "cut short": (cut_short, "is truncated or not a safetensors file"),
    "no tensors": (lambda directory: (directory / "adapters.safetensors").unlink(), "has no adapters.safetensors"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "does not describe adapters"),
    "broken json": (reword('{"model_type": "llama",'), "does not describe adapters"),
    "deep json": (reword("[" * 100_000), "does not describe adapters"),
    "no object": (reword("[1, 2]"), "does not describe adapters"),
    "null": (reword("null"), "does not describe adapters"),
    "a plain model": (reword('{"model_type": "llama"}'), "does not describe adapters .*adapters"),
    "a list": (reword('{"model_type": "llama", "adapters": ["adp"]}'), "does not describe adapters"),
    "lacks a field": (reword(lambda c: c["adapters"].pop("rank")), "rank"),
    "another field": (reword(lambda c: c["adapters"].update(dropout=0.1)), "dropout"),
    "another type": (reword(lambda c: c.update(model_type="roberta")), "are of a roberta, the model is a llama"),
    "another place": (reword(lambda c: c["adapters"].update(placement="all")), "got 'all'"),
    "another rank": (reword(lambda c: c["adapters"].update(rank=4)), "config.json makes it"),
    "norms": (reword(lambda c: c["adapters"].update(norms=True)), "missing: model.layers.0.input_layernorm"),
    **{str(fields): (reword(lambda c, fields=fields: c["adapters"].update(fields)),
                     "does not describe adapters.*no usable adapters") for fields in OTHER_TYPES},
}  # fmt: skip


def test_a_broken_directory_is_refused_in_one_line_and_leaves_the_model_as_it_was(bases, tmp_path):
    lm, tokens = load(bases["llama"].directory), torch.tensor([[5, 6, 7]])
    before = lm(tokens)
    for case, (breaks, message) in BROKEN.items():
        directory = tmp_path / case.replace("/", "")
        tensor_train.save(adapted(bases["llama"], "adp mlp", identity=False), directory)
        breaks(directory)
        with pytest.raises(ValueError) as raised:
            tensor_train.load(lm, directory)
        assert "\n" not in str(raised.value) and re.search(message, str(raised.value)), (case, raised.value)
        assert lm.adapters is None and torch.equal(lm(tokens), before), case


def test_other_adapters_than_the_models_own_are_refused(bases, tmp_path):
    tensor_train.save(adapted(bases["llama"], "adp mlp"), tmp_path / "a")
    for changes in (dict(rank=4), dict(norms=True), dict(identity=False), dict(bottleneck=16)):
        lm = adapted(bases["llama"], "adp mlp", **changes)
        before = sha256(lm)
        with pytest.raises(ValueError, match="holds .*, the model has ") as raised:
            tensor_train.load(lm, tmp_path / "a")
        assert "\n" not in str(raised.value) and sha256(lm) == before
    with pytest.raises(ValueError, match="are of a llama, the model is a roberta"):
        tensor_train.load(load(bases["roberta"].directory), tmp_path / "a")


def test_what_cannot_be_saved_is_refused(bases, tmp_path):
    """Adapters where there are none, a plain checkpoint where there are, and either over somebody's files."""
    with pytest.raises(ValueError, match="no adapters to save"):
        tensor_train.save(load(bases["llama"].directory), tmp_path / "m")
    lm = adapted(bases["llama"], "rep")
    with pytest.raises(ValueError, match="merge them first"):
        lm.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="thesis.tex"):
        tensor_train.save(lm, tmp_path)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", ["rep", "lora"])
@by_type
def test_a_merged_model_gives_the_same_logits_here_and_in_transformers(model_type, kind, bases, tmp_path):
    """Bounds: rounding of x (W + A B) against x W + (x A) B in float32; test_model.py's between us and them."""
    tokens, mask = padded_batch(RAW[model_type], "right")
    for weights, norms, identity in (("bf16", False, True), ("int4", True, True), ("int4", True, False)):
        lm = adapted(bases[model_type], kind, weights, by=0.1, norms=norms, identity=identity)
        before, want = sha256(lm), lm(tokens, mask)
        merged = merge(lm)
        assert merged.adapters is None and merged.format == "fp32"
        assert largest_gap(merged(tokens, mask), want, mask) < 1e-5
        merged.save(tmp_path / "m")
        with torch.no_grad():
            theirs = read_oracle(tmp_path / "m", RAW[model_type])(tokens, attention_mask=mask).logits
        assert largest_gap(theirs, want, mask) < 1e-4
        for stored in merged.weights.values():
            stored.value.zero_()
        assert sha256(lm) == before  # it shares no memory


@by_type
def test_what_cannot_be_merged_is_refused(model_type, bases):
    adp = (adapted(bases[model_type], kind) for kind in ("adp mlp", "adp sublayers"))
    for lm in (*adp, load(bases[model_type].directory)):
        with pytest.raises(ValueError, match="only rep and lora"):
            merge(lm)


def test_a_merged_model_takes_its_tokenizer_along(tmp_path):
    lm = load(TINY / "model")
    attach(lm, spec("lora"), 0)
    merge(lm).save(tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").is_file()


# ---------------------------------------------------------------- probes (tests/test_zo.py has steps)

KEY = Key(3, 4)


def probed(lm: LanguageModel, zo: ZO) -> tuple[Tensor, Tensor]:
    return probe_losses(tensor_train.trained(lm), loss_of(lm), KEY, zo)


def loss_of(lm: LanguageModel) -> BatchLoss:
    """Of six random prompts of 3 to 8 tokens with two options of one token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (6,), generator=generator).tolist()
    rows = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    examples = [Encoded([row], [[17], [42]], len(row) - 1, i % 2) for i, row in enumerate(rows)]
    return BatchLoss.of(lm, examples, lm.config.pad_token_id, 6)


@pytest.mark.parametrize("kind, weights, bits", [
    ("adp mlp", "int4", None), ("adp sublayers", "int8", 4), ("rep", "fp32", None), ("lora", "int8", 4),
])  # fmt: skip
@by_type
def test_probes_can_share_a_forward(model_type, kind, weights, bits, bases):
    """Three queries, six probes: by ones, threes (a query cut in two), fours (a short rest), all, and more room than
    there are.  Losses near 1 of the same weights in other products: 1e-6 of float32 rounding."""
    lm = adapted(bases[model_type], kind, weights, norms=kind == "rep")
    before, pairs = sha256(lm), torch.stack(probed(lm, ZO(0.02, queries=3, bits=bits)))
    assert (pairs[0] - pairs[1]).abs().max() > 1e-4  # so that probes in a wrong order would show
    for at_once in (1, 3, 4, 6, 9, None):
        others = torch.stack(probed(lm, ZO(0.02, queries=3, bits=bits, probes_per_forward=at_once)))
        assert (others - pairs).abs().max() < 2e-6
    assert sha256(lm) == before


@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=full)])
@by_kind
@by_type
def test_a_probe_is_the_model_with_another_vector(model_type, kind, bits, bases):
    """L(w + eps u1) and L(w - eps u1) with u1 drawn by hand and written into the store: signs, queries and streams."""
    lm = adapted(bases[model_type], kind)
    start, loss_fn = lm.weights[TRAINED_VECTOR].value, loss_of(lm)
    plus, minus = probed(lm, ZO(eps=0.02, queries=3, bits=bits, probes_per_forward=None))
    for q in range(3):
        key = KEY._replace(query=q, tensor=tensor_id(TRAINED_VECTOR))
        u = direction(key, torch.arange(1), len(start), bits, Purpose.PROBE_ROUNDING)[0]
        for sign, loss in ((1, plus[q]), (-1, minus[q])):
            lm.weights[TRAINED_VECTOR] = Float(start + sign * 0.02 * u)
            assert loss.item() == pytest.approx(loss_fn(lm.stored_view()).item(), abs=2e-6)


# ---------------------------------------------------------------- AdaZeta's schedule

RELEASED = math.log(20 / 0.85) / math.log(160)
CODE = {0: 1, 1: 1, 2: 1, 5: 2, 10: 3, 20: 5, 40: 8, 80: 12, 100: 14, 101: 15, 130: 15, 159: 15}
PAPER = {0: 1, 1: 1, 2: 1, 5: 1, 10: 2, 20: 3, 40: 4, 80: 6, 120: 7, 159: 8}


@pytest.mark.parametrize("beta, most, by_epoch, mean", [(RELEASED, 15, CODE, 11.0), (0.45, 20, PAPER, 5.25)])
def test_the_schedule_is_the_papers_table(beta, most, by_epoch, mean):
    """The cap of the released command is met at epoch 101."""
    schedule = [adazeta_queries(epoch, 0.85, beta, most) for epoch in range(160)]
    assert {epoch: schedule[epoch] for epoch in by_epoch} == by_epoch
    assert sum(schedule) / 160 == pytest.approx(mean, abs=0.05 if mean == 11.0 else 0.005)
    assert schedule == sorted(schedule) and schedule[0] == 1
    assert adazeta_queries(10**6, 0.85, beta, most) == most


@pytest.mark.parametrize("n, batch_size", [(1000, 16), (10, 4), (12, 4), (5, 8), (1, 1)])
def test_epochs_are_counted_from_zero_in_whole_steps(n, batch_size):
    """floor(k / ceil(D / B)): 63 steps of 16 are one epoch of 1,000."""
    a_pass = math.ceil(n / batch_size)
    assert [epoch_of(step, n, batch_size) for step in range(5 * a_pass)] == [e for e in range(5) for _ in range(a_pass)]


# ---------------------------------------------------------------- which adapters a method has, and how many parameters


@pytest.mark.parametrize("flags, adapters, norms", [
    ("llama2-7b --method loretta-adp", 610_560, 266_240), ("llama2-7b --method adazeta", 610_560, 0),
    ("llama2-7b --method adazeta --tt-rank 8", 921_600, 0), ("llama2-7b --method adazeta --tt-rank 16", 2_426_880, 0),
    ("llama2-7b --method loretta-rep", 249_856, 266_240), ("llama2-7b --method lora", 4_194_304, 0),
    ("llama2-13b --method lora", 6_553_600, 0),
    ("llama2-13b --method loretta-adp --tt-rank 8", 1_676_160 - 81 * 5120, 81 * 5120),
    ("roberta-base --method adazeta", 57_408, 0), ("roberta-base --method loretta-adp", 57_408, 38_400),
])  # fmt: skip
def test_the_papers_parameter_counts(flags, adapters, norms, capsys):
    """They print sums: 7B with norms is .88M for adp and .51M for rep; 13B is 1.67M."""
    assert train.main(["--dry-run", "--task", "sst2", "--model", *flags.split()]) == 0
    predicted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert predicted["trainable"] == {"adapters": adapters, "norms": norms}
    assert predicted["trainable_parameters"] == adapters + norms


@pytest.mark.parametrize("flags", [
    "loretta-adp --placement mlp", "loretta-adp --placement sublayers --bottleneck 16 --tt-rank 2",
    "adazeta --placement mlp --bottleneck 7", "adazeta --placement sublayers --init released",
    "loretta-rep --tt-rank 3", "loretta-rep --init released", "lora --lora-rank 5", "lora --optimizer zo",
])  # fmt: skip
@by_type
def test_what_is_counted_is_what_is_attached(model_type, flags):
    c, lm = parse(["--method", *flags.split()]), create(RAW[model_type])
    before = sum(stored.shape.numel() for stored in lm.weights.values())
    attach(lm, spec_of(c, model_type), c.seed)
    predicted = predict(c, RAW[model_type], 16)
    trained = lm.weights[TRAINED_VECTOR].value.numel()
    assert predicted["trainable_parameters"] == trained == train.parameters(tensor_train.trained(lm))
    assert predicted["total_parameters"] == before + predicted["trainable"]["adapters"]
    norms = sum(tensor.numel() for name, tensor in named(lm).items() if ".adapter." not in name)
    assert predicted["trainable"]["norms"] == norms and (norms > 0) == c.method.startswith("loretta")


def test_each_method_takes_its_own_adapters():
    """Kind, placement by model type, bottleneck, rank, alpha, norms: the papers' settings."""
    want = {
        "loretta-adp": {"llama": Spec("adp", "mlp", 64, 5, 1.0, norms=True),
                        "roberta": Spec("adp", "sublayers", 64, 5, 1.0, norms=True)},
        "adazeta": {"llama": Spec("adp", "mlp", 64, 5, 1.0), "roberta": Spec("adp", "sublayers", 64, 5, 1.0)},
        "loretta-rep": dict.fromkeys(RAW, Spec("rep", "qv", 8, 8, 16.0, norms=True)),
        "lora": dict.fromkeys(RAW, Spec("lora", "qv", 0, 8, 16.0)), "quzo": dict.fromkeys(RAW),
    }  # fmt: skip
    assert {method: {t: spec_of(parse(["--method", method]), t) for t in RAW} for method in want} == want
    released = spec_of(parse("--method adazeta --placement sublayers --init released".split()), "llama")
    assert released == Spec("adp", "sublayers", 64, 5, 1.0, identity=False)
