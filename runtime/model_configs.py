"""Frozen configs of LLaMA (Mistral and Qwen2 too) and RoBERTa, read strictly from config.json and from nothing else.

Of runtime, imports json_files.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from runtime.json_files import read_object, shown


def within(low: float, high: float, default: Any = MISSING) -> Any:
    """A field of numbers between these two, both included."""
    return field(default=default, metadata={"low": low, "high": high})


def size(high: int, default: Any = MISSING) -> Any:
    """A field of counts.  Bounds are some ten times those of the largest models, and their products fit 63 bits."""
    return within(1, high, default)


TOKENS, WIDTH, LAYERS, POSITIONS = 2**24, 2**20, 1000, 2**31


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: its base, and how its frequencies are scaled for longer contexts (model.rope_frequencies)."""

    theta: float = within(1e-6, 1e15, 10000.0)
    kind: str = "default"
    factor: float = within(1e-6, 1e6, 1.0)
    original_max_position_embeddings: float = within(1, POSITIONS, 8192)  # before scaling: llama3, yarn, dynamic
    low_freq_factor: float = within(1e-6, 1e6, 1.0)  # llama3
    high_freq_factor: float = within(1e-6, 1e6, 4.0)
    beta_fast: float = within(1e-6, 1e6, 32.0)  # yarn
    beta_slow: float = within(1e-6, 1e6, 1.0)
    attention_factor: float = within(1e-6, 1e6, 1.0)  # of cosines and sines
    truncate: bool = True

    @classmethod
    def from_config(cls, raw: dict, max_positions: int) -> Rope:
        """Reads `rope_parameters`, or the older `rope_theta` beside `rope_scaling`, or all that mean the same."""
        given = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)}
        ropes = [cls._from_object(name, scaling, raw, max_positions) for name, scaling in given.items()]
        if len(set(ropes)) > 1:  # transformers would take rope_scaling, without the base that the other one names
            both = " and ".join(f"{name} {shown(value, 150)}" for name, value in given.items())
            raise ValueError(f"{both} contradict each other: keep one")
        return ropes[0] if ropes else cls._from_object("rope_parameters", {}, raw, max_positions)

    @classmethod
    def _from_object(cls, name: str, scaling: object, raw: dict, max_positions: int) -> Rope:
        if not isinstance(scaling, dict):
            raise ValueError(f"{name} must be an object, got {shown(scaling)}")
        here = {f"{name}.{key}": value for key, value in scaling.items()}
        kind = _agreed(here, f"{name}.rope_type", f"{name}.type") or "default"
        needed = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
                  "llama3": ("factor", "low_freq_factor", "high_freq_factor")}  # fmt: skip
        if kind not in list(needed):  # a list compares, where a dictionary would hash
            raise ValueError(f"rope scaling {shown(kind)} is not supported; known: {', '.join(needed)}")
        missing = [key for key in needed[kind] if scaling.get(key) is None]
        if missing:
            raise ValueError(f"{kind} rope scaling lacks {', '.join(missing)}")
        part = _agreed(here | raw, f"{name}.partial_rotary_factor", "partial_rotary_factor")
        if part not in (None, 1):
            raise ValueError(f"partial_rotary_factor {shown(part)} is not supported; known: 1.0")
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
            if found["attention_factor"] is None and _fits(found["factor"], "float", 1, 1e6):
                found["attention_factor"] = 0.1 * math.log(found["factor"]) + 1  # YaRN (2309.00071), eq. 22
        if kind != "default" and found.get("original_max_position_embeddings") is None:
            found["original_max_position_embeddings"] = max_positions
        return cls(kind=kind, **{key: value for key, value in found.items() if value is not None})

    def __post_init__(self):
        for f in fields(self):
            _check(f"rope_{f.name}", f, getattr(self, f.name))
        if self.kind == "yarn" and self.theta <= 1:
            raise ValueError(f"rope_theta must be above 1 for yarn, got {self.theta!r}")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"low_freq_factor {low!r} must be below high_freq_factor {high!r}")


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
    vocab_size: int = size(TOKENS)
    hidden_size: int = size(WIDTH)
    intermediate_size: int = size(WIDTH)
    num_hidden_layers: int = size(LAYERS)
    num_attention_heads: int = size(2**16)
    num_key_value_heads: int = size(2**16)  # fewer than num_attention_heads means grouped queries
    head_dim: int = size(2**16)
    rope: Rope
    max_position_embeddings: int = size(POSITIONS, 2048)
    rms_norm_eps: float = within(1e-30, 1, 1e-6)
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of attention's output
    mlp_bias: bool = False
    sliding_window: int | None = size(POSITIONS, None)  # no sequence may be longer
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = within(0, TOKENS, 1)
    eos_token_id: int | list[int] | None = within(0, TOKENS, 2)
    pad_token_id: int | None = within(0, TOKENS, None)

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
        windowed = kind != "qwen2" or (
            raw.get("use_sliding_window") and "sliding_attention" in cls._layer_types(raw, layers)
        )
        known |= {} if windowed else {"sliding_window": None}
        rope = Rope.from_config(raw, known.get("max_position_embeddings", cls.max_position_embeddings))
        config = cls(**derived | known, rope=rope)
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act {shown(config.hidden_act)} is not supported for llama; known: silu")
        if heads % config.num_key_value_heads:
            raise ValueError(f"{heads} heads do not split into {config.num_key_value_heads} key-value heads")
        if config.head_dim < 1:
            raise ValueError(f"hidden_size {config.hidden_size} is less than num_attention_heads {heads}")
        if config.head_dim % 2 or (config.head_dim == 2 and rope.kind == "dynamic"):
            least = " and above 2" if rope.kind == "dynamic" else ""
            raise ValueError(f"head_dim must be even{least} for rotary embedding, got {config.head_dim}")
        return config

    @staticmethod
    def _layer_types(raw: dict, layers: int) -> list:
        """The kinds of Qwen2's layers that are there; without a list, those from max_window_layers on have a window."""
        given, first = raw.get("layer_types") or [], raw.get("max_window_layers", 28)
        if not isinstance(given, list):
            raise ValueError(f"layer_types must be a list, got {shown(given)}")
        if type(first) is not int:
            raise ValueError(f"max_window_layers must be an int, got {shown(first)}")
        return given or ["sliding_attention"] * (layers > first)


@dataclass(frozen=True)
class RobertaConfig:
    masked: ClassVar[bool] = True  # answers at a mask
    vocab_size: int = size(TOKENS)
    hidden_size: int = size(WIDTH)
    intermediate_size: int = size(WIDTH)
    num_hidden_layers: int = size(LAYERS)
    num_attention_heads: int = size(2**16)
    max_position_embeddings: int = size(TOKENS)
    type_vocab_size: int = size(2**16, 2)
    layer_norm_eps: float = within(1e-30, 1, 1e-12)
    bos_token_id: int = within(0, TOKENS, 0)
    eos_token_id: int = within(0, TOKENS, 2)
    pad_token_id: int = within(0, TOKENS, 1)
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
                given = shown(getattr(config, name))
                raise ValueError(f"{name} {given} is not supported for roberta; known: {value!r}")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{config.num_attention_heads} heads do not divide hidden_size {config.hidden_size}")
        return config


def _agreed(given: dict, *spellings: str) -> object:
    """The value that these spellings of one setting give, None where none does (null counts as absent).

    Raises ValueError with both where two differ.
    """
    values = {name: given[name] for name in spellings if given.get(name) is not None}
    if any(value != list(values.values())[0] for value in values.values()):
        both = " and ".join(f"{name} {shown(value)}" for name, value in values.items())
        raise ValueError(f"{both} contradict each other: keep one")
    return next(iter(values.values()), None)


def _known(cls: type, raw: dict) -> dict:
    """The fields of a config class that config.json gives; null counts as absent, except where it is a value."""
    known = {}
    for f in fields(cls):
        value = raw.get(f.name)
        if value == -1 and "None" in f.type:  # some checkpoints' way of saying none
            value = None
        if value is not None and f.name in raw and f.type != "Rope":
            _check(f.name, f, value)
            known[f.name] = value
        elif f.name in raw and "None" in f.type:
            known[f.name] = None
    return known


def _check(name: str, f: Field, value: object) -> None:
    """Raises ValueError for a value that a field cannot have."""
    low, high = f.metadata.get("low", -math.inf), f.metadata.get("high", math.inf)
    if not _fits(value, f.type, low, high):
        bounds = f" from {low:,} to {high:,}" if f.metadata else ""
        kind = f.type.removesuffix(" | None").replace("list[int]", "list of int").replace(" | ", " or ")
        raise ValueError(f"{name} {shown(value)} is not a usable {kind}{bounds}")


def _fits(value: object, kind: str, low: float, high: float) -> bool:
    """Whether a JSON value is of an annotated type.  bool is an int to Python, so types are compared exactly."""
    if isinstance(value, list) and "list" in kind:
        return all(_fits(v, "int", low, high) for v in value)
    if kind in ("bool", "str"):
        return type(value).__name__ == kind
    return (type(value) is int or (kind == "float" and type(value) is float)) and low <= value <= high


def config_of(raw: dict) -> LlamaConfig | RobertaConfig:
    """The contents of config.json -> a frozen config.  Raises ValueError for what is unknown or unsupported."""
    kinds = dict.fromkeys(ABSENT, LlamaConfig) | {"roberta": RobertaConfig}
    if raw.get("model_type") not in list(kinds):  # a list compares, where a dictionary would hash
        raise ValueError(f"model_type {shown(raw.get('model_type'))} is not supported; known: {', '.join(kinds)}")
    try:
        config = kinds[raw["model_type"]].from_raw(raw)
    except KeyError as error:
        raise ValueError(f"lacks {error}") from None
    except TypeError as error:  # a required field without a default
        raise ValueError(f"lacks {str(error).split(': ')[-1]}") from None
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and token >= config.vocab_size:
                raise ValueError(
                    f"{name} {token} is outside the vocabulary of {config.vocab_size}: write null or another"
                )
    if config.longest < 1:
        positions = f"max_position_embeddings {config.max_position_embeddings}"
        raise ValueError(f"{positions} leaves no position behind pad_token_id {config.pad_token_id}")
    return config


def read_config(directory: str | Path) -> tuple[LlamaConfig | RobertaConfig, dict]:
    """config.json -> (the frozen config, the raw dictionary that `save` writes back)."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json; --model takes a Hugging Face model directory or a preset")
    raw = read_object(path)
    try:
        return config_of(raw), raw
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
