"""Frozen configs of LLaMA (Mistral and Qwen2 too) and RoBERTa, read strictly from config.json and from nothing else.

Imports nothing of ours.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: its base, and how its frequencies are scaled for longer contexts (model.rope_frequencies)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: float = 8192  # the context before scaling: llama3, yarn, dynamic
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # of cosines and sines
    truncate: bool = True

    @classmethod
    def from_config(cls, raw: dict, max_positions: int) -> Rope:
        """Reads `rope_parameters`, or the older `rope_theta` beside `rope_scaling`, or all that mean the same."""
        given = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)}
        ropes = [cls._from_object(name, scaling, raw, max_positions) for name, scaling in given.items()]
        if len(set(ropes)) > 1:  # transformers would take rope_scaling, without the base that the other one names
            raise ValueError(" and ".join(f"{n} {v}" for n, v in given.items()) + " contradict each other: keep one")
        return ropes[0] if ropes else cls._from_object("rope_parameters", {}, raw, max_positions)

    @classmethod
    def _from_object(cls, name: str, scaling: object, raw: dict, max_positions: int) -> Rope:
        if not isinstance(scaling, dict):
            raise ValueError(f"{name} must be an object, got {scaling!r}")
        here = {f"{name}.{key}": value for key, value in scaling.items()}
        kind = _agreed(here, f"{name}.rope_type", f"{name}.type") or "default"
        needed = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
                  "llama3": ("factor", "low_freq_factor", "high_freq_factor")}  # fmt: skip
        if kind not in needed:
            raise ValueError(f"rope scaling {kind!r} is not supported; known: {', '.join(needed)}")
        missing = [key for key in needed[kind] if scaling.get(key) is None]
        if missing:
            raise ValueError(f"{kind} rope scaling lacks {', '.join(missing)}")
        part = _agreed(here | raw, f"{name}.partial_rotary_factor", "partial_rotary_factor")
        if part not in (None, 1):
            raise ValueError(f"partial_rotary_factor {part!r} is not supported; known: 1.0")
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            raise ValueError("rope scaling by mscale is not supported; known: attention_factor")
        found = {key: scaling[key] for key in needed[kind]}
        found["theta"] = _agreed(here | raw, f"{name}.rope_theta", "rope_theta")
        if kind in ("llama3", "yarn"):
            key = "original_max_position_embeddings"
            found[key] = _agreed(here | raw, f"{name}.{key}", key)
        if kind == "yarn":
            optional = ("beta_fast", "beta_slow", "attention_factor", "truncate")
            found |= {key: scaling.get(key) for key in optional}
            if found["attention_factor"] is None and _fits(found["factor"], "float", 1):
                found["attention_factor"] = 0.1 * math.log(found["factor"]) + 1  # YaRN (2309.00071), eq. 22
        if kind != "default" and found.get("original_max_position_embeddings") is None:
            found["original_max_position_embeddings"] = max_positions
        return cls(kind=kind, **{key: value for key, value in found.items() if value is not None})

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if not _fits(value, f.type, 0):
                wanted = f"a {f.type}" if f.type == "bool" else "a number above 0"
                raise ValueError(f"rope_{f.name} must be {wanted}, got {value!r}")
        if self.kind == "yarn" and self.theta <= 1:
            raise ValueError(f"rope_theta must be above 1 for yarn, got {self.theta!r}")


ABSENT = {  # what a field that is not in config.json means, where that is not a default of LlamaConfig
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
              "bos_token_id": None, "eos_token_id": None},
}  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA, and what has its blocks: Mistral and Qwen2."""

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
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of attention's output
    mlp_bias: bool = False
    sliding_window: int | None = None  # no sequence may be longer
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def from_raw(cls, raw: dict) -> LlamaConfig:
        kind = raw["model_type"]
        known = _known(cls, ABSENT[kind] | raw)
        heads, layers = known["num_attention_heads"], known["num_hidden_layers"]
        derived = {"num_key_value_heads": heads, "head_dim": known["hidden_size"] // heads}
        if kind == "llama":
            known |= {"output_bias": known.get("attention_bias", False), "sliding_window": None}
        else:
            known |= {"attention_bias": kind == "qwen2", "output_bias": False, "mlp_bias": False}
        if kind == "qwen2":
            kinds = raw.get("layer_types") or ["sliding_attention"] * (layers > raw.get("max_window_layers", 28))
            if not raw.get("use_sliding_window") or "sliding_attention" not in kinds:
                known["sliding_window"] = None
        rope = Rope.from_config(raw, known.get("max_position_embeddings", cls.max_position_embeddings))
        config = cls(**derived | known, rope=rope)
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


def _agreed(given: dict, *spellings: str) -> object:
    """The value that these spellings of one setting give, None where none does (null counts as absent).

    Raises ValueError with both where two differ.
    """
    values = {name: given[name] for name in spellings if given.get(name) is not None}
    if any(value != list(values.values())[0] for value in values.values()):
        both = " and ".join(f"{name} {value!r}" for name, value in values.items())
        raise ValueError(f"{both} contradict each other: keep one")
    return next(iter(values.values()), None)


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
    return (type(value) is int or (kind == "float" and type(value) is float)) and above < value < math.inf


def config_of(raw: dict) -> LlamaConfig | RobertaConfig:
    """The contents of config.json -> a frozen config.  Raises ValueError for what is unknown or unsupported."""
    kinds = dict.fromkeys(ABSENT, LlamaConfig) | {"roberta": RobertaConfig}
    if raw.get("model_type") not in list(kinds):  # a list compares, where a dictionary would hash
        raise ValueError(f"model_type {raw.get('model_type')!r} is not supported; known: {', '.join(kinds)}")
    try:
        config = kinds[raw["model_type"]].from_raw(raw)
    except KeyError as error:
        raise ValueError(f"lacks {error}") from None
    except TypeError as error:  # a required field without a default
        raise ValueError(str(error).split("__init__() ")[-1]) from None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and token >= config.vocab_size:
                raise ValueError(
                    f"{name} {token} is outside the vocabulary of {config.vocab_size}: write null or another"
                )
    return config


def read_config(directory: str | Path) -> tuple[LlamaConfig | RobertaConfig, dict]:
    """config.json -> (the frozen config, the raw dictionary that `save` writes back)."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json; --model takes a Hugging Face model directory or a preset")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"must hold an object, got {type(raw).__name__}")
        return config_of(raw), raw
    except (ValueError, RecursionError) as error:  # what json raises is a ValueError too
        raise ValueError(f"{path}: {error}") from None
