"""Frozen configs of LLaMA and RoBERTa, read strictly from config.json and from nothing else.

Imports nothing of ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: its base, and llama3's frequency scaling where factor > 1."""

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_config(cls, raw: dict) -> Rope:
        """Reads `rope_parameters`, or the older `rope_theta` beside `rope_scaling`."""
        scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise ValueError(f"rope_scaling must be an object, got {scaling!r}")
        theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return cls(theta)
        if kind != "llama3":
            raise ValueError(f"rope scaling {kind!r} is not supported; known: default, llama3")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [n for n in names if n not in scaling]
        if missing:
            raise ValueError(f"llama3 rope scaling lacks {', '.join(missing)}")
        return cls(theta, *(scaling[n] for n in names))

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) not in (int, float) or not value > 0:
                raise ValueError(f"rope_{f.name} must be a number above 0, got {value!r}")


@dataclass(frozen=True)
class LlamaConfig:
    masked: ClassVar[bool] = False  # reads left to right
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # fewer than num_attention_heads means grouped queries
    head_dim: int
    rope: Rope
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: int = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return self.max_position_embeddings

    @classmethod
    def from_raw(cls, raw: dict) -> LlamaConfig:
        known = _known(cls, raw)
        heads = known["num_attention_heads"]
        derived = {"num_key_value_heads": heads, "head_dim": known["hidden_size"] // heads}
        config = cls(**derived | known, rope=Rope.from_config(raw))
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported for llama; known: silu")
        if heads % config.num_key_value_heads:
            raise ValueError(f"{heads} heads do not split into {config.num_key_value_heads} key-value heads")
        if config.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {config.head_dim}")
        return config


@dataclass(frozen=True)
class RobertaConfig:
    masked: ClassVar[bool] = True  # answers at a mask
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    bos_token_id: int = 0
    eos_token_id: int = 2
    pad_token_id: int = 1
    tie_word_embeddings: bool = True
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have: positions count from the padding's index + 1."""
        return self.max_position_embeddings - 1 - self.pad_token_id

    @classmethod
    def from_raw(cls, raw: dict) -> RobertaConfig:
        config = cls(**_known(cls, raw))
        supported = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
        for name, value in supported.items():
            if getattr(config, name) != value:
                raise ValueError(f"{name} {getattr(config, name)!r} is not supported for roberta; known: {value!r}")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{config.num_attention_heads} heads do not divide hidden_size {config.hidden_size}")
        return config


def _known(cls: type, raw: dict) -> dict:
    """The fields of a config class that config.json gives; null counts as absent, except where it is a value."""
    known = {}
    for f in fields(cls):
        value = raw.get(f.name)
        above = -1 if f.name.endswith("_id") else 0
        if value == -1 and "None" in f.type:  # some checkpoints' way of saying none
            value = None
        if value is not None and not _fits(value, f.type, above):
            raise ValueError(f"{f.name} {value!r} is not a usable {f.type}")
        if value is not None or (f.name in raw and "None" in f.type):
            known[f.name] = value
    return known


def _fits(value: object, kind: str, above: int) -> bool:
    """Whether a JSON value is of an annotated type.  bool is an int to Python, so types are compared exactly."""
    if isinstance(value, list) and "list" in kind:
        return all(_fits(v, "int", above) for v in value)
    if kind in ("bool", "str"):
        return type(value).__name__ == kind
    return (type(value) is int or (kind == "float" and type(value) is float)) and value > above


def config_of(raw: dict) -> LlamaConfig | RobertaConfig:
    """The contents of config.json -> a frozen config.  Raises ValueError for what is unknown or unsupported."""
    kinds = {"llama": LlamaConfig, "roberta": RobertaConfig}
    if raw.get("model_type") not in kinds:
        raise ValueError(f"model_type {raw.get('model_type')!r} is not supported; known: {', '.join(kinds)}")
    try:
        return kinds[raw["model_type"]].from_raw(raw)
    except KeyError as error:
        raise ValueError(f"lacks {error}") from None
    except TypeError as error:  # a required field without a default
        raise ValueError(str(error).split("__init__() ")[-1]) from None


def read_config(directory: str | Path) -> tuple[LlamaConfig | RobertaConfig, dict]:
    """config.json -> (the frozen config, the raw dictionary that `save` writes back)."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json; --model takes a Hugging Face model directory or a preset")
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError(f"must hold an object, got {type(raw).__name__}")
        return config_of(raw), raw
    except (ValueError, RecursionError) as error:  # what json raises is a ValueError too
        raise ValueError(f"{path}: {error}") from None
