"""LoRA on disk in PEFT's format, both ways; adapters that know their base; adapters given as a model.

Half of it needs no PEFT: names, shapes and keys are written down here as PEFT 0.21 has them, and the reference is a
`transformers` model with the products added to its matrices by hand.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import (
    auto_class,
    largest_gap,
    oracle_logits,
    padded_batch,
    random_oracle,
    shortened,
    tiny_llama,
    tiny_roberta,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import tensor_train
import train
from data.tasks import TINY
from model import LanguageModel, load
from runtime import checkpoints
from runtime.checkpoints import weights_sha256, write_directory
from tensor_train import TRAINED_VECTOR, Spec, attach

RAW = {"llama": tiny_llama(attention_bias=True), "roberta": tiny_roberta()}
LAYER = {"llama": "model.layers.{}.", "roberta": "roberta.encoder.layer.{}."}
QV = {"llama": ["self_attn.q_proj", "self_attn.v_proj"], "roberta": ["attention.self.query", "attention.self.value"]}
SIZES = {  # of the tiny models: [O, I]; llama has two key-value heads of width 8
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (56, 32), "mlp.up_proj": (56, 32), "mlp.down_proj": (32, 56),
    "attention.self.query": (32, 32), "attention.self.key": (32, 32), "attention.self.value": (32, 32),
    "attention.output.dense": (32, 32), "intermediate.dense": (56, 32), "output.dense": (32, 56),
}  # fmt: skip
EVERY = {"llama": list(SIZES)[:7], "roberta": list(SIZES)[7:]}
NORMS = {
    "llama": ["model.norm.weight", *(f"model.layers.{i}.{name}_layernorm.weight" for i in range(2)
                                     for name in ("input", "post_attention"))],
    "roberta": [f"roberta.{module}.LayerNorm.{name}" for name in ("weight", "bias")
                for module in ("embeddings", *(f"encoder.layer.{i}.{of}output" for i in range(2)
                                               for of in ("", "attention.")))],
}  # fmt: skip
PEFT_SAVES = {  # what PEFT 0.21.2 writes beside the fields that are given below
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.1, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {}, "revision": None,
    "target_parameters": None, "task_type": None, "trainable_token_indices": None, "use_bdlora": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
PLACEMENTS = {  # the last of each ends like another layer's name, which PEFT's lists cannot tell apart
    "llama": ["qv", "self_attn.k_proj mlp.gate_proj mlp.down_proj"],
    "roberta": ["qv", "attention.output.dense attention.self.key", "output.dense intermediate.dense"],
}
by_type = pytest.mark.parametrize("model_type", RAW)
full = pytest.mark.full


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, tuple]:
    """By model type a random model of `transformers`, and its directory."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RAW}
    return {name: (random_oracle(RAW[name], folder), folder) for name, folder in folders.items()}


def adapted(directory: Path, spec: Spec, weights: str = "fp32") -> LanguageModel:
    """With every trained number elsewhere than at the start."""
    lm = load(directory, weights=weights)
    attach(lm, spec, 0)
    vector = lm.weights[TRAINED_VECTOR].value
    vector += 0.3 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(0))
    return lm


def lora(placement: str = "qv", norms: bool = False, rank: int = 3) -> Spec:
    return Spec("lora", placement, 0, rank, 12.0, norms=norms)


def tensors_for(model_type: str, paths: list[str], rank: int = 3) -> dict[str, Tensor]:
    """Random A [r, I] and B [O, r] of both layers, named as in a PEFT file."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for i in range(2):
        for path in paths:
            O, I = SIZES[path]  # noqa: E741
            name = f"base_model.model.{LAYER[model_type].format(i)}{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, I, generator=generator) / I**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(O, rank, generator=generator) / rank**0.5
    return tensors


def write(directory: Path, tensors: dict[str, Tensor], **config) -> Path:
    """A folder as PEFT writes it."""
    directory.mkdir()
    fields = {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]} | config
    (directory / "adapter_config.json").write_text(json.dumps(PEFT_SAVES | fields, indent=2))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    return directory


def by_hand(oracle, tensors: dict[str, Tensor], scale: float):
    """A copy of the model with W + scale B A for each pair, and with the norms that are there."""
    merged = copy.deepcopy(oracle)
    parameters = dict(merged.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            base = name.removeprefix("base_model.model.")
            if "lora_A" in name:
                B = tensors[name.replace("lora_A", "lora_B")]
                parameters[base.replace("lora_A.", "")] += scale * B.float() @ tensor.float()
            elif "lora_B" not in name:
                parameters[base].copy_(tensor)
    return merged


def refused(lm: LanguageModel, directory: Path, message: str) -> None:
    """In one line that has the message, the model being as it was."""
    before = weights_sha256(lm.weights), lm.adapters
    with pytest.raises(ValueError) as raised:
        tensor_train.load(lm, directory)
    assert "\n" not in str(raised.value) and message in str(raised.value), raised.value
    assert (weights_sha256(lm.weights), lm.adapters) == before


# ---------------------------------------------------------------- what we write


@by_type
def test_a_saved_lora_has_pefts_names_shapes_and_keys(model_type, bases, tmp_path):
    for norms in (False, True):
        lm = adapted(bases[model_type][1], lora(norms=norms))
        lm.adapters.base = "somewhere/base"
        tensor_train.save(lm, tmp_path / "a")
        files = {"adapter_config.json", "adapter_model.safetensors", "base.json"}
        assert {p.name for p in (tmp_path / "a").iterdir()} == files
        saved = {"llama": ["input_layernorm", "norm", "post_attention_layernorm"], "roberta": ["LayerNorm"]}
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
            "peft_type": "LORA", "task_type": "CAUSAL_LM" if model_type == "llama" else None,
            "base_model_name_or_path": "somewhere/base", "r": 3, "lora_alpha": 12, "use_rslora": False,
            "target_modules": QV[model_type], "modules_to_save": saved[model_type] if norms else None,
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "inference_mode": True,
        }  # fmt: skip
        held, own = load_file(tmp_path / "a" / "adapter_model.safetensors"), lm.adapters.named(lm.weights)
        for name, like in tensors_for(model_type, QV[model_type]).items():
            core = own[name.removeprefix("base_model.model.").replace("lora_A.weight", "adapter.low.cores.0")
                       .replace("lora_B.weight", "adapter.low.cores.1")]  # fmt: skip
            tensor = held.pop(name)
            assert tensor.shape == like.shape and tensor.dtype == torch.float32
            assert torch.equal(tensor, core[0].T if "lora_A" in name else core[:, :, 0].T)
        assert set(held) == ({f"base_model.model.{name}" for name in NORMS[model_type]} if norms else set())
        assert all(torch.equal(held[f"base_model.model.{name}"], own[name]) for name in NORMS[model_type] if norms)


@by_type
def test_saved_loras_come_back_to_the_bit(model_type, bases, tmp_path):
    """From every placement, in place of another LoRA, and once more from what was loaded; r = 1 has square cores."""
    directory = bases[model_type][1]
    for placement in PLACEMENTS[model_type]:
        for norms, rank in ((False, 1), (True, 3)):
            lm = adapted(directory, lora(placement, norms, rank), "int8")
            tensor_train.save(lm, tmp_path / "a")
            fresh = load(directory, weights="int8")
            tensor_train.load(fresh, tmp_path / "a")
            named = fresh.adapters.named(fresh.weights)
            assert all(torch.equal(named[name], t) for name, t in lm.adapters.named(lm.weights).items())
            tensor_train.save(fresh, tmp_path / "b")
            first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
            assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
            before = weights_sha256(lm.weights)
            lm.weights[TRAINED_VECTOR].value.zero_()
            tensor_train.load(lm, tmp_path / "b")  # in place, whatever the order of its layers
            assert weights_sha256(lm.weights) == before


@pytest.mark.parametrize("fails_at", ["write_text", "save_file", "replace 1", "replace 2", "replace 3"])
def test_a_failure_while_saving_loses_nothing(fails_at, bases, tmp_path, monkeypatch):
    """The tensors' file is renamed, then the folder that was there, then the new one: where the last fails, what was
    there is under NAME.old; the next saving ends as if nothing had been."""
    directory, place, replaced = bases["llama"][1], tmp_path / "a", []
    old, new = adapted(directory, lora()), adapted(directory, lora("mlp.up_proj"))
    tensor_train.save(old, place)
    kept = {p.name: p.read_bytes() for p in place.iterdir()}

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    def replace_or_fail(source, target, rename=os.replace):
        replaced.append(target)
        return fail() if len(replaced) == int(fails_at[-1]) else rename(source, target)

    with monkeypatch.context() as patch:
        if fails_at == "write_text":
            patch.setattr(Path, "write_text", fail)
        elif fails_at == "save_file":
            patch.setattr(checkpoints, "save_file", fail)
        else:
            patch.setattr(os, "replace", replace_or_fail)
        with pytest.raises(OSError):
            tensor_train.save(new, place)
    left = tmp_path / "a.old" if fails_at == "replace 3" else place
    assert {p.name: p.read_bytes() for p in left.iterdir()} == kept
    tensor_train.save(new, place)
    fresh = load(directory)
    tensor_train.load(fresh, place)
    assert weights_sha256(fresh.weights) == weights_sha256(new.weights)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_never_deletes_what_is_no_adapter(bases, tmp_path):
    """In the folder, beside it, or where a link leads to."""
    lm = adapted(bases["llama"][1], lora())
    for name in ("a", "b.old", "c.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("")
        with pytest.raises(ValueError, match="saving would delete thesis.tex in .*; give a new directory"):
            tensor_train.save(lm, tmp_path / name.partition(".")[0])
    (tmp_path / "d").symlink_to(tmp_path / "a")
    (tmp_path / "e").write_text("")
    for name, kind in (("d", "link"), ("e", "file")):
        with pytest.raises(ValueError, match=f"cannot save to .*{name}: it is a {kind}"):
            tensor_train.save(lm, tmp_path / name)
    assert all((tmp_path / name / "thesis.tex").exists() for name in ("a", "b.old", "c.partial"))


# ---------------------------------------------------------------- what we read

READ = {  # model type, paths; fields of adapter_config.json; the scale, alpha / r or alpha / sqrt(r)
    "names": ("llama", QV["llama"], {}, 2 / 3),
    "longer names": ("llama", QV["llama"], {"target_modules": QV["llama"]}, 2 / 3),
    "whole names": ("llama", ["mlp.up_proj"],
                    {"target_modules": [f"model.layers.{i}.mlp.up_proj" for i in range(2)]}, 2 / 3),
    "every layer": ("llama", EVERY["llama"], {"target_modules": ["down_proj", "o_proj", "k_proj", "q_proj", "gate_proj",
                                                                 "up_proj", "v_proj", "c_attn"]}, 2 / 3),
    "a pattern": ("llama", ["self_attn.k_proj", "mlp.down_proj"],
                  {"target_modules": r"model\.layers\.\d+\.(self_attn\.k|mlp\.down)_proj"}, 2 / 3),
    "rslora": ("llama", QV["llama"], {"use_rslora": True, "lora_alpha": 2.5}, 2.5 / 3**0.5),
    "not started by training": ("llama", QV["llama"], {"init_lora_weights": "gaussian"}, 2 / 3),
    "an older version's": ("llama", QV["llama"], {"enable_lora": None, "merge_weights": False}, 2 / 3),
    "roberta": ("roberta", QV["roberta"], {"target_modules": ["query", "value"]}, 2 / 3),
    "one ending of two layers": ("roberta", ["attention.output.dense", "output.dense"],
                                 {"target_modules": ["output.dense"]}, 2 / 3),
    "one of them": ("roberta", ["output.dense"],
                    {"target_modules": r"roberta\.encoder\.layer\.\d+\.output\.dense"}, 2 / 3),
    "roberta's every layer": ("roberta", EVERY["roberta"], {"target_modules": r".*layer\.\d.*(query|key|value|dense)"},
                              2 / 3),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_peft_folder_gives_the_logits_of_merged_weights(case, bases, tmp_path):
    """Bound: test_model.py's, float32 rounding between us and `transformers`."""
    model_type, paths, config, scale = READ[case]
    (oracle, directory), tensors = bases[model_type], tensors_for(model_type, paths)
    if case == "names":  # as norms that were trained beside the LoRA, and halves as training in bf16 leaves them
        config = {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]}
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        tensors |= {f"base_model.model.{name}": torch.rand(32) + 0.5 for name in NORMS["llama"]}
    lm, (tokens, mask) = load(directory), padded_batch(RAW[model_type], "left")
    before = lm(tokens, mask)
    tensor_train.load(lm, write(tmp_path / "a", tensors, **config))
    want = oracle_logits(by_hand(oracle, tensors, scale), tokens, mask)
    assert largest_gap(lm(tokens, mask), want, mask) < 1e-4 and largest_gap(before, want, mask) > 0.1
    assert largest_gap(tensor_train.merge(lm)(tokens, mask), want, mask) < 1e-4


HEAD = {f"base_model.model.lm_head.lora_{at}.weight": torch.ones(size) for at, size in (("A", (3, 32)), ("B", (97, 3)))}
UNSUPPORTED = {  # fields of adapter_config.json, and what the line must name
    "peft_type": "IA3", "use_dora": True, "lora_bias": True, "bias": "all", "fan_in_fan_out": True,
    "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 1}, "layers_to_transform": [0],
    "layer_replication": [[0, 2]], "exclude_modules": ["model.layers.0.self_attn.q_proj"], "target_parameters": ["w"],
    "trainable_token_indices": [3], "use_qalora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"],
    "something_new": {"a": 1}, "target_modules": None,
}  # fmt: skip
DAMAGED = {  # what is changed in a folder's tensors or fields, and what the line must say
    "rank": (dict(r=4), "is [3, 32]"), "no rank": (dict(r=0), "no usable adapters"),
    "rank 3.0": (dict(r=3.0), "no usable adapters"), "text": (dict(lora_alpha="16"), "does not describe"),
    "-3": (dict(r=-3, use_rslora=True), "does not describe"), "10^400": (dict(lora_alpha=10**400), "does not describe"),
    "NaN": (dict(lora_alpha=float("nan")), "no usable adapters"),
    "no pattern": (dict(target_modules="(q_proj"), "does not describe"),
    "no layer": (dict(target_modules=["c_attn"]), "['c_attn'] names none of self_attn.q_proj, "),
    "all": (dict(target_modules=["q_proj", "k_proj", "v_proj"]), "missing: base_model.model.model.layers.0.self_at"),
    "fewer": (dict(target_modules=["q_proj"]), "unexpected: base_model.model.model.layers.0.self_attn.v_proj.lora_A"),
    "a norm": (dict(modules_to_save=["norm"]), "missing: base_model.model.model.layers.0.input_layernorm.weight"),
    "the head": (HEAD, "unexpected: base_model.model.lm_head.lora_A.weight"),
    "of roberta": (tensors_for("roberta", QV["roberta"]), "unexpected: base_model.model.roberta"),
    "infinite": ({name: t / 0 for name, t in tensors_for("llama", QV["llama"]).items()}, "must hold finite float32"),
    "whole numbers": ({name: t.int() for name, t in tensors_for("llama", QV["llama"]).items()}, "must hold finite"),
}  # fmt: skip


def test_what_is_not_supported_or_damaged_is_refused_by_name(bases, tmp_path):
    lm, good = load(bases["llama"][1]), tensors_for("llama", QV["llama"])
    for name, value in UNSUPPORTED.items():
        folder = write(tmp_path / name, good, **{name: value})
        refused(lm, folder, f"adapter_config.json does not describe adapters for this model: {name} {value!r} is not")
    for case, (change, message) in DAMAGED.items():
        tensors, config = (good | change, {}) if torch.is_tensor(next(iter(change.values()))) else (good, change)
        refused(lm, write(tmp_path / case, tensors, **config), message)
    folder = write(tmp_path / "a", good)
    for text in ("[1]", "null", '{"r": 3', "[" * 100_000, '{"peft_type": "LORA"}'):
        (folder / "adapter_config.json").write_text(text)
        refused(lm, folder, "adapter_config.json does not describe adapters for this model")
    (shutil.rmtree(folder), write(folder, good), (folder / "base.json").write_text("[1]"))
    refused(lm, folder, "does not describe adapters")


def test_pickles_are_refused_with_the_fix(bases, tmp_path):
    folder = write(tmp_path / "a", {})
    os.replace(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    refused(
        load(bases["llama"][1]),
        folder,
        "adapter_model.bin: pickles can run code and are never loaded; convert it "
        "once, somewhere you trust it, with peft: PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW)",
    )


def test_a_lora_that_an_older_version_saved_is_read(bases, tmp_path):
    """Cores by our names, as the other kinds have them, and nothing of the base."""
    lm, fresh = adapted(bases["llama"][1], lora()), load(bases["llama"][1])
    config = {"model_type": "llama", "adapters": asdict(lora())}
    write_directory(tmp_path / "a", {"config.json": config}, [], lm.adapters.named(lm.weights).items(), "adapters")
    tensor_train.load(fresh, tmp_path / "a")
    assert weights_sha256(fresh.weights) == weights_sha256(lm.weights)


# ---------------------------------------------------------------- adapters know their base

KINDS = {"lora": lora(), "adp": Spec("adp", "sublayers", 8, 3), "rep": Spec("rep", "qv", 8, 3, norms=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_is_refused_with_both_hashes(kind, bases, tmp_path):
    """Another checkpoint, or the same in another format; a base that differs in norms alone is the same where these are
    trained, and come with the adapters."""
    directory, folder, spec = bases["llama"][1], tmp_path / "a", KINDS[kind]
    lm = adapted(directory, spec, "int8")
    tensor_train.save(lm, folder)
    path = folder / ("base.json" if kind == "lora" else "config.json")
    norms = [name for name in load(directory).weights if "norm" in name]
    frozen = {name: stored for name, stored in load(directory, weights="int8").weights.items()
              if name not in (norms if spec.norms else ())}  # fmt: skip
    record = json.loads(path.read_text())
    assert (record["base_weights"], record["base_sha256"]) == ("int8", weights_sha256(frozen))

    other = load(directory, weights="int8")
    other.weights["model.layers.1.mlp.up_proj.weight"].codes[3, 5] ^= 1
    for base in (load(directory), other):
        theirs = weights_sha256({name: base.weights[name] for name in frozen})
        refused(base, folder, f"was trained around int8 weights {record['base_sha256']}, the model has {base.format} "
                              f"weights {theirs}: load that base, or give any_base=True")  # fmt: skip
        attach(base, spec, 0)
        refused(base, folder, theirs)
        tensor_train.load(base, folder, any_base=True)
        named = base.adapters.named(base.weights)
        assert all(torch.equal(named[name], t) for name, t in lm.adapters.named(lm.weights).items())

    renormed = load(directory, weights="int8")
    renormed.weights[norms[0]].value[0] += 1
    if spec.norms:
        tensor_train.load(renormed, folder)
        assert weights_sha256(renormed.weights) == weights_sha256(lm.weights)
    else:
        refused(renormed, folder, record["base_sha256"])

    path.unlink() if kind == "lora" else path.write_text(json.dumps({n: record[n] for n in ("model_type", "adapters")}))
    tensor_train.load(load(directory), folder)  # as PEFT's own, and as our older ones


def test_the_base_is_hashed_once(bases, tmp_path, monkeypatch):
    """In a process, however often adapters are saved and restored; not at all for a folder that names no base."""
    hashed, real = [], tensor_train.weights_sha256
    monkeypatch.setattr(tensor_train, "weights_sha256", lambda weights: hashed.append(len(weights)) or real(weights))
    lm = adapted(bases["llama"][1], lora())
    for _ in range(3):
        tensor_train.save(lm, tmp_path / "a")
        tensor_train.load(lm, tmp_path / "a")
    assert hashed == [len(lm.weights) - 1]
    fresh = load(bases["llama"][1])
    tensor_train.load(fresh, tmp_path / "a")
    tensor_train.save(fresh, tmp_path / "a")
    assert len(hashed) == 2
    tensor_train.load(load(bases["llama"][1]), write(tmp_path / "b", tensors_for("llama", QV["llama"])))
    assert len(hashed) == 2


# ---------------------------------------------------------------- on the command line

SHORT = "--steps 2 --eval-every 2 --batch-size 4 --num-eval 4".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run's folder by method, on 16 of the embedded task's examples a part."""
    folder = tmp_path_factory.mktemp("runs")
    with shortened(train=16, dev=4):
        for method in ("lora", "adazeta"):
            assert train.main([*SHORT, "--method", method, "--seed", "2", "--out", str(folder / method)]) == 0
            assert json.loads((folder / method / "result.json").read_text())["best_step"] == 2  # not the start
        yield {method: folder / method for method in ("lora", "adazeta")}


def said(capsys, flags: list[str]) -> str:
    """The one line of a refusal, with exit code 2."""
    assert train.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    return err


def test_adapters_given_as_a_model_get_one_line_that_says_what_to_do(runs, tmp_path, capsys):
    """Ours of either kind, and PEFT's, which may not know their base; --dry-run says it too."""
    known = write(tmp_path / "a", {}, base_model_name_or_path="someone/some-llama")
    cases = {
        runs["lora"] / "model": TINY / "model",
        runs["adazeta"] / "model": TINY / "model",
        known: "someone/some-llama",
        write(tmp_path / "b", {}): "the model that they were trained around",
    }
    for folder, base in cases.items():
        for more in ([], ["--dry-run"]):
            line = said(capsys, ["--model", str(folder), "--task", "tiny", "--out", str(tmp_path / "out"), *more])
            assert line == (f"train.py: {folder} holds adapters and no model: give {base} as --model and {folder} as "
                            "--adapters\n")  # fmt: skip
    assert not (tmp_path / "out").exists()
    (known / "adapter_config.json").write_text("{")
    assert "give the model that they were" in said(capsys, ["--model", str(known), "--task", "tiny"])


def test_a_whole_model_beside_adapters_is_a_model(tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    tensor_train.check_base(tmp_path / "m")


@pytest.mark.parametrize("method", ["lora", "adazeta"])
def test_training_goes_on_from_saved_adapters(method, runs, tmp_path, capsys):
    """At rate 0 to the same bits, which --replay confirms; their base is the folder's."""
    flags = ["--method", method, "--adapters", str(runs[method] / "model")]
    optimizer = ["--optimizer", "zo"] if method == "lora" else []
    assert train.main([*SHORT, *flags, *optimizer, "--lr", "0", "--out", str(tmp_path / "next")]) == 0
    result = json.loads((runs[method] / "result.json").read_text())
    again = json.loads((tmp_path / "next" / "result.json").read_text())
    assert again["weights_sha256"] == result["weights_sha256"] and again["dev_loss"] == result["dev_loss"]
    for file in (runs[method] / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "next" / "model" / file.name).read_bytes()
    moved = shutil.copytree(runs[method] / "model", tmp_path / "moved")
    assert train.main(["--replay", str(tmp_path / "next"), "--adapters", str(moved)]) == 0
    capsys.readouterr()


def test_adapters_that_the_flags_do_not_describe_are_refused(runs, tmp_path, capsys):
    cases = {
        "--method quzo": "--adapters means nothing beside --method quzo",
        "--method lora --lora-rank 4": "rank=8, alpha=16.0, norms=False, identity=True), the model has ",
        "--method lora --weights int8": "was trained around fp32 weights ",
        "--method adazeta": "holds Spec(kind='lora'",
    }
    for flags, message in cases.items():
        given = [*SHORT, *flags.split(), "--adapters", str(runs["lora"] / "model"), "--out", str(tmp_path / "out")]
        assert message in said(capsys, given)
    given = [*SHORT, "--method", "lora", "--adapters", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert "none/config.json does not describe adapters" in said(capsys, given)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- with PEFT itself


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@by_type
def test_peft_reads_ours_to_the_same_logits_and_back(model_type, bases, tmp_path, peft):
    """Norms too, which it keeps as modules to save; what it then saves we read to the bit."""
    oracle, directory = bases[model_type]
    tokens, mask = padded_batch(RAW[model_type], "right")
    for placement in PLACEMENTS[model_type]:
        for norms in (False, True):
            lm = adapted(directory, lora(placement, norms))
            lm.adapters.base = str(directory)
            tensor_train.save(lm, tmp_path / "a")
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), tmp_path / "a").eval()
            want = oracle_logits(theirs, tokens, mask)
            assert largest_gap(lm(tokens, mask), want, mask) < 1e-4
            assert largest_gap(load(directory)(tokens, mask), want, mask) > 0.1
            theirs.save_pretrained(tmp_path / "b", save_embedding_layers=False)
            again = load(directory)
            tensor_train.load(again, tmp_path / "b")
            named = again.adapters.named(again.weights)
            assert all(torch.equal(named[name], t) for name, t in lm.adapters.named(lm.weights).items())
            if not norms:  # which transformers by itself does not find
                whole = auto_class(RAW[model_type]).from_pretrained(tmp_path / "a").eval()  # base and adapters
                assert largest_gap(oracle_logits(whole, tokens, mask), lm(tokens, mask), mask) < 1e-4
            shutil.rmtree(tmp_path / "b")


THEIRS = {
    "by default": ("llama", dict(target_modules=None)),
    "rslora": ("llama", dict(use_rslora=True, lora_alpha=5)),
    "all linear": ("llama", dict(target_modules="all-linear", init_lora_weights="gaussian")),
    "pattern": ("llama", dict(target_modules=r".*\.(o_proj|mlp\.gate_proj)")),
    "norms": ("llama", dict(modules_to_save=["input_layernorm", "post_attention_layernorm", "norm"])),
    "roberta": ("roberta", dict(target_modules=["query", "value"], r=1)),
    "roberta's dense": ("roberta", dict(target_modules=["output.dense"], modules_to_save=["LayerNorm"])),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_read_pefts_to_the_same_logits(case, bases, tmp_path, peft):
    model_type, options = THEIRS[case]
    oracle, directory = bases[model_type]
    options = {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "task_type": None} | options
    theirs = peft.get_peft_model(copy.deepcopy(oracle), peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    lm, (tokens, mask) = load(directory), padded_batch(RAW[model_type], "left")
    before = lm(tokens, mask)
    tensor_train.load(lm, tmp_path / "a")
    want = oracle_logits(theirs, tokens, mask)
    assert largest_gap(lm(tokens, mask), want, mask) < 1e-4 and largest_gap(before, want, mask) > 0.1


def test_what_peft_can_and_we_cannot_is_refused(bases, tmp_path, peft):
    oracle, directory = bases["llama"]
    cases = {
        "use_dora True": dict(use_dora=True),
        "rank_pattern {'q_proj': 2}": dict(rank_pattern={"q_proj": 2}),
        "bias 'lora_only'": dict(bias="lora_only"),
        "layers_to_transform [1]": dict(layers_to_transform=[1]),
        "modules_to_save ['lm_head']": dict(modules_to_save=["lm_head"]),
        "unexpected: base_model.model.lm_head.lora_A.weight": dict(target_modules=["q_proj", "lm_head"]),
        "missing: base_model.model.model.layers.0": dict(target_modules=r".*layers\.1\.self_attn\.q_proj"),
        "init_lora_weights 'pissa'": dict(init_lora_weights="pissa"),
    }
    for i, (message, options) in enumerate(cases.items()):
        config = peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"]} | options)
        model = peft.get_peft_model(copy.deepcopy(oracle), config)
        model.save_pretrained(tmp_path / str(i), save_embedding_layers=False)
        refused(load(directory), tmp_path / str(i), message)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = peft.get_peft_model(copy.deepcopy(oracle), config)
    model.save_pretrained(tmp_path / "ia3")
    refused(load(directory), tmp_path / "ia3", "peft_type 'IA3'")


@full
def test_a_real_llama_with_lora_gives_pefts_logits(smollm2_directory, tmp_path, peft):
    """30 layers of SmolLM2-135M, logits of size 30: a float32 rounding there is 2e-6, and 4e-5 was seen."""
    lm = adapted(smollm2_directory, lora())
    vector = lm.weights[TRAINED_VECTOR].value
    vector *= 0.1  # near the model, where logits keep their size
    tensor_train.save(lm, tmp_path / "a")
    base = auto_class(RAW["llama"]).from_pretrained(smollm2_directory, dtype=torch.float32)
    theirs, tokens = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval(), torch.arange(500, 540)[None]
    assert largest_gap(lm(tokens), oracle_logits(theirs, tokens)) < 1e-4
