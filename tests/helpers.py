"""What several test files share: tiny configs, random models from `transformers` as oracles, padded batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from oracles import gaussian
from torch import Tensor

import train
from data.tasks import Row
from random_bits import Key, Purpose
from runtime import checkpoints
from runtime import problem as setup
from runtime.ranks import Ranks
from runtime.record import canonical
from tensor_train import Bottleneck, sides
from zo_optim import ZO


def review(sentence: str, label: int) -> Row:
    return Row("here", {"sentence": sentence, "label": str(label)})


def bottleneck_weights(plain: Bottleneck) -> dict[str, Tensor]:
    """Random ones of three copies, and the sides that gpu.adapters.FusedBottleneck reads beside the cores."""
    weights = {name: 0.5 * gaussian(3, *p.shape, seed=i) for i, (name, p) in enumerate(plain.named_parameters())}
    for name, layer in (("down", plain.down), ("up", plain.up)):
        left, right = sides([weights[f"{name}.cores.{i}"] for i in range(len(layer.cores))], layer.split)
        weights |= {f"{name}.left": left.mT, f"{name}.right": right}
    return weights


def tiny_llama(**changes) -> dict:
    """The contents of a config.json.  The epsilon is large, so that a model which ignores it is seen."""
    config = {
        "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 0.01,
        "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return config | changes


def tiny_roberta(**changes) -> dict:
    config = {
        "model_type": "roberta", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 40, "type_vocab_size": 2, "layer_norm_eps": 0.01,
        "tie_word_embeddings": True, "hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
    return config | changes


def direction(key: Key, rows: Tensor, columns: int, bits: int | None, rounding: Purpose) -> Tensor:
    """Rows of a tensor's dense direction, [r, columns] float32, in sigma."""
    return ZO(bits=bits).direction(key, (0, columns), rows, rounding)


def auto_class(raw: dict):
    kinds = {"llama": transformers.AutoModelForCausalLM, "roberta": transformers.AutoModelForMaskedLM}
    return kinds[raw["model_type"]]


def random_oracle(raw: dict, directory: Path, seed: int = 0) -> transformers.PreTrainedModel:
    """A `transformers` model with every parameter random, norms and biases too, which is also saved in directory.

    A fresh model has norms of 1 and biases of 0, which would hide a norm or a bias that is never applied.
    Matrices have gain 1.5, so that attention is far from uniform and logits are of size 1.
    """
    oracle = auto_class(raw).from_config(transformers.AutoConfig.for_model(**raw)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + ("norm" in name.lower() and name.endswith("weight")))
    oracle.save_pretrained(directory)
    return oracle


def read_oracle(directory: Path, raw: dict, **options) -> transformers.PreTrainedModel:
    """A saved directory as `transformers` reads it, in fp32; fails where it finds a tensor missing or unexpected."""
    options = {"dtype": torch.float32, "local_files_only": True} | options
    oracle, info = auto_class(raw).from_pretrained(directory, output_loading_info=True, **options)
    problems = {kind: list(names) for kind, names in info.items() if names}
    assert not problems, f"transformers reports {problems}"
    return oracle.eval()


def padded_batch(raw: dict, padding: str, T: int = 12, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Random tokens [3, T] and their mask; rows 1 and 2 are shorter.  padding: no mask, full, left, right.

    Padding has the padding token's id, by which `transformers` finds RoBERTa's positions.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, raw["vocab_size"], (3, T), generator=generator)
    if padding == "no mask":
        return tokens, None
    mask = torch.ones_like(tokens)
    if padding != "full":
        for row, absent in ((1, 1), (2, T // 2)):
            mask[row, slice(0, absent) if padding == "left" else slice(T - absent, T)] = 0
    return tokens.masked_fill(mask == 0, raw.get("pad_token_id") or 0), mask


@torch.no_grad()
def oracle_logits(oracle: transformers.PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return oracle(tokens, attention_mask=mask).logits


@contextmanager
def through_buffers(size: int = 1001) -> Iterator[None]:
    """Loading to the CPU goes a GPU's way, unpinned.  Matrices of the tiny models come in several pieces, which end
    amid elements."""
    read_tensors = checkpoints.read_tensors

    def read(files, shapes, device):
        return checkpoints.staged(read_tensors(files, shapes, device), torch.device(device))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "BUFFER_BYTES", size)
        patch.setattr(checkpoints, "read_tensors", read)
        yield


def largest_gap(got: Tensor, want: Tensor, mask: Tensor | None = None) -> float:
    """The largest difference of logits [B, T, V] at the real positions."""
    assert want.std() > 0.5, "logits of this size could not show an error"
    gap = (got - want).abs()
    return (gap if mask is None else gap[mask.bool()]).max().item()


@contextmanager
def shortened(train: int = 256, dev: int = 32) -> Iterator[None]:
    """Runs read only so many examples of a task, by default a part of the embedded one's 1,024 and 256, in no time."""
    real = setup.load_splits

    def short(*args):
        splits = real(*args)
        return splits._replace(train=splits.train[:train], dev=splits.dev[:dev])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_splits", short)
        yield


def last_line(capsys, *flags: str) -> tuple[int, dict]:
    """train.main -> its exit code, and the JSON of its last line on standard output."""
    code = train.main([*flags])
    out = capsys.readouterr().out.splitlines()
    return code, json.loads(out[-1]) if out else {}


def assert_refused(capsys, out: Path, message: str, *flags: str) -> None:
    """train.main ends with one line that holds the message, and writes nothing."""
    assert train.main([*flags, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and len(said.err.splitlines()) == 1
    assert not out.exists()


@contextmanager
def one_of_two(device: str) -> Iterator[Ranks]:
    """runtime.ranks.joined, of two processes."""
    yield Ranks(world=2)


def repeated(path: Path) -> bytes | str | list:
    """A file's contents without what is not the same when a run is done again: time, memory and paths."""
    if path.name == "config.json" and path.parent.name != "model":
        return [{**json.loads(path.read_text()), "flags": None}]
    if path.name == "result.json":
        return canonical(json.loads(path.read_text()))
    if path.name == "metrics.jsonl":
        return [(canonical(json.loads(line)), json.loads(line).get("digest")) for line in path.open()]
    if path.name == "metrics.csv":
        return [line.rpartition(",")[0] for line in path.open()]
    return path.read_bytes()


def assert_equal_folders(one: Path, other: Path) -> None:
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if (one / name).is_file():
            assert repeated(one / name) == repeated(other / name), name
