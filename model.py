"""LLaMA and RoBERTa as plain modules over weights that somebody else keeps, and their safetensors loader.

The model is a pure function and the weights are data.  A View says how the weights are read: as they are
stored, or as seen by the P probes of a zeroth-order step.  Each block is one weightless nn.Module, called with
a layer's weights through torch.func.functional_call, so only one layer is ever materialised.

LLaMA: Touvron et al. 2023; RMSNorm, rotary embedding in split halves (as in Hugging Face files), SwiGLU,
grouped-query attention.  RoBERTa: Liu et al. 2019; post-norm, learned positions, masked-LM head.

Shape key: P probes, B batch, T tokens, S cached + new tokens, M tokens that are read, D hidden, H heads, K key-value
heads, d head width, V vocabulary.  Imports checkpoint, quant, random_bits and fused, to store weights and to round
what is multiplied, and profiler, which names the phases.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from checkpoint import COMPANIONS, check_names, find_tensors, read_tensors, write_directory
from profiler import bytes_decoded, phase
from quant import (
    FLOATS,
    Fp8,
    Integers,
    Oracle,
    Stored,
    check_format,
    encode,
    from_parts,
    multiply_fp8,
    quantise_tokens,
    row_chunks,
    stored_parts,
)
from random_bits import tensor_id

try:
    import fused
except ImportError:  # of Triton, which comes with CUDA builds of torch
    fused = None

if TYPE_CHECKING:  # what may be put around a model; this file only hands it the view
    from tensor_train import Adapters

# ---------------------------------------------------------------- configs: config.json and nothing else


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


# ---------------------------------------------------------------- parts


class Linear(nn.Linear):
    """x [P, ..., D] times each probe's own weight [P, O, D], or a shared one [1, O, D], -> [P, ..., O] in one product.

    The bias [P, O] stays float32 in its store and takes the activation's dtype here.
    """

    activations = "none"  # how the input is rounded: LanguageModel.round_activations

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("weight_scale", None)  # [O, 1], where weights come as fp8 codes

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_scale is not None:
            y = multiply_fp8(x.flatten(1, -2), self.weight, self.weight_scale)
            y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None]
            return y.view(*x.shape[:-1], -1)
        flat = quantise_tokens(x.flatten(1, -2), self.activations)  # [P, N, D]
        if len(self.weight) < len(flat):  # a frozen weight, which all probes share: one large product
            y = F.linear(flat, self.weight[0], None if self.bias is None else self.bias[0].to(x.dtype))
        elif self.bias is None:
            y = torch.bmm(flat, self.weight.mT)
        else:
            y = torch.baddbmm(self.bias.to(x.dtype)[:, None], flat, self.weight.mT)
        return y.view(*x.shape[:-1], -1)


def product_dtype(layer: Linear) -> torch.dtype:
    """What a layer's input comes in."""
    return layer.weight.dtype if layer.weight_scale is None else torch.bfloat16


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32; x [P, ..., D], weight [P, D]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps) * along(self.weight, x)


class LayerNorm(nn.LayerNorm):
    """In float32, as RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        normal = F.layer_norm(x.float(), x.shape[-1:], None, None, self.eps)
        return torch.addcmul(along(self.bias, x), normal, along(self.weight, x))


def along(vector: Tensor, x: Tensor) -> Tensor:
    """A vector of each probe [P, D], to broadcast with x [P, ..., D]."""
    return vector.view(len(vector), *[1] * (x.ndim - 2), -1)


def rope_frequencies(rope: Rope, d: int, device: torch.device) -> Tensor:
    """[d / 2] radians per position.  llama3 slows long waves by `factor` and blends the ones in between."""
    frequency = rope.theta ** -(torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    if rope.factor == 1.0:
        return frequency
    turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)  # over the original context
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return frequency * (keep + (1 - keep) / rope.factor)


def rotate(x_BTHd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Rotary embedding in split halves: element i pairs with i + d/2, not with its neighbour (Meta's own files).

    Any axes may come before B.
    """
    first, second = x_BTHd.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x_BTHd * cos_BTd[:, :, None] + turned * sin_BTd[:, :, None]


def attend(q_PBTHd: Tensor, k_PBSHd: Tensor, v_PBSHd: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax attention of each sequence of each probe -> [P, B, T, H * d].

    seen [P * B, 1, 1 or T, S] bool; None is what each token has before it, for which there are faster kernels.
    """
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_PBTHd, k_PBSHd, v_PBSHd))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
    return y.transpose(1, 2).reshape(*q_PBTHd.shape[:3], -1)


Reads = tuple[Tensor, Tensor]  # the tokens that a caller wants: rows and positions, [M] int64 each


def chosen(x_PBTD: Tensor, reads: Reads | None) -> Tensor:
    """-> [P, M, D], or all where there are no reads.  The last block goes on with these alone after its attention."""
    return x_PBTD if reads is None else x_PBTD[:, *reads]


class KVCache:
    """Keys and values of the tokens so far, one pair [P, B, S, K, d] a layer."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            old_key, old_value = self.layers[layer]
            key, value = torch.cat((old_key, key), 2), torch.cat((old_value, value), 2)  # along S
        self.layers[layer] = key, value
        return key, value


class LlamaAttention(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.heads, self.kv_heads, self.d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.heads * self.d, bias=c.attention_bias)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.d, bias=c.attention_bias)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.d, bias=c.attention_bias)
        self.o_proj = Linear(self.heads * self.d, c.hidden_size, bias=c.attention_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, reads: Reads | None, cache=None, layer: int = 0
    ) -> Tensor:
        P, B, T, _ = x.shape
        q_PBTHd = rotate(self.q_proj(x).view(P, B, T, self.heads, self.d), cos, sin)
        k_PBTKd = rotate(self.k_proj(x).view(P, B, T, self.kv_heads, self.d), cos, sin)
        v_PBTKd = self.v_proj(x).view(P, B, T, self.kv_heads, self.d)
        if cache is not None:
            k_PBTKd, v_PBTKd = cache.extend(layer, k_PBTKd, v_PBTKd)
        group = self.heads // self.kv_heads
        if group > 1:  # once each would be a copy
            k_PBTKd, v_PBTKd = k_PBTKd.repeat_interleave(group, 3), v_PBTKd.repeat_interleave(group, 3)
        return self.o_proj(chosen(attend(q_PBTHd, k_PBTKd, v_PBTKd, seen), reads))


class LlamaMLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(c), LlamaMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, reads: Reads | None, *cache
    ) -> tuple[Tensor, Tensor]:
        """x is the residual stream and y what comes to it from the block before: -> the same for the next one.  To add
        them here spares a pass over x, which the norm reads anyway.

        x is float32 whatever the products are computed in: sums in bf16 put more noise into a small probe's slope than
        all products together."""
        dtype, x = product_dtype(self.mlp.gate_proj), x + y
        x = chosen(x, reads) + self.self_attn(self.input_layernorm(x).to(dtype), cos, sin, seen, reads, *cache)
        return x, self.mlp(self.post_attention_layernorm(x).to(dtype))


class RobertaSelfAttention(nn.Module):
    def __init__(self, c: RobertaConfig):
        super().__init__()
        self.heads, self.d = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        self.query, self.key, self.value = (Linear(c.hidden_size, c.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        P, B, T, _ = x.shape
        return attend(*(p(x).view(P, B, T, self.heads, self.d) for p in (self.query, self.key, self.value)), seen)


class RobertaOutput(nn.Module):
    """Projection, residual, then the norm: post-norm."""

    def __init__(self, width: int, c: RobertaConfig):
        super().__init__()
        self.dense, self.LayerNorm = Linear(width, c.hidden_size), LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(y) + residual)


class RobertaBlock(nn.Module):
    """Attribute names spell the checkpoint's keys: attention.self.query, intermediate.dense, output.LayerNorm."""

    def __init__(self, c: RobertaConfig):
        super().__init__()
        self.attention = nn.ModuleDict({"self": RobertaSelfAttention(c), "output": RobertaOutput(c.hidden_size, c)})
        self.intermediate = nn.ModuleDict({"dense": Linear(c.hidden_size, c.intermediate_size)})
        self.output = RobertaOutput(c.intermediate_size, c)

    def forward(self, x: Tensor, seen: Tensor, reads: Reads | None) -> Tensor:
        """x is float32, as in LlamaBlock."""
        dtype = product_dtype(self.output.dense)
        attended = chosen(self.attention["self"](x.to(dtype), seen), reads)
        x = self.attention["output"](attended, chosen(x, reads))
        return self.output(F.gelu(self.intermediate["dense"](x.to(dtype))), x)


class RobertaEmbedding(nn.Module):
    """The part after the table look-ups."""

    def __init__(self, c: RobertaConfig):
        super().__init__()
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(x)


class RobertaHead(nn.Module):
    """The masked-LM head up to its decoder."""

    def __init__(self, c: RobertaConfig):
        super().__init__()
        self.dense = Linear(c.hidden_size, c.hidden_size)
        self.layer_norm = LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(F.gelu(self.dense(x.to(product_dtype(self.dense)))))


# ---------------------------------------------------------------- whole models


class View(Protocol):
    """A way of reading the weights.  The leading axis P has one entry for each probe, or 1 where a tensor is frozen."""

    probes: int  # P

    def read(self, name: str) -> Tensor:
        """[P, *shape]; matrices in the compute dtype, all else in float32."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a matrix: index [n] int64 -> [P, n, C] float32."""

    def codes(self, name: str) -> Tensor:
        """An fp8 matrix as codes, [P, R, C] e4m3; its row scales are the store's."""


def has_read_kernel(stored: Stored) -> bool:
    """Codes on a GPU; floats are there already, and may want a gradient."""
    return fused is not None and isinstance(stored, Integers | Fp8) and fused.serves(stored)


class StoredView:
    """The weights as they are stored: P = 1."""

    probes = 1

    def __init__(self, store: dict[str, Stored], dtype: torch.dtype):
        self.store, self.dtype = store, dtype

    @phase("materialise", bytes_decoded)
    def read(self, name: str) -> Tensor:
        stored = self.store[name]
        if len(stored.shape) != 2:
            return stored.read().view(1, *stored.shape)
        if not isinstance(stored, Integers | Fp8 | Oracle):
            return stored.read().to(self.dtype)[None]
        if has_read_kernel(stored):
            return fused.read(stored, self.dtype)
        weight = torch.empty(1, *stored.shape, dtype=self.dtype, device=stored.device)
        for rows in row_chunks(stored.shape, stored.device):  # codes are unpacked through numbers of 32 bits
            weight[0, rows] = stored.read(rows)
        return weight

    @phase("materialise", bytes_decoded)
    def rows(self, name: str, index: Tensor) -> Tensor:
        stored = self.store[name]
        if has_read_kernel(stored):
            return fused.read(stored, torch.float32, index)
        return stored.read(index).float()[None]

    def codes(self, name: str) -> Tensor:
        return self.store[name].codes[None]


GRAPHS = 24  # of a compiled block: torch keeps 8 unless told


class LanguageModel:
    """A config, a store of named weights, and the functions that run them.

    Forward passes come in two pieces, so that a caller who wants a few tokens and a few words pays for no more:
    `hidden` runs the blocks, `score` turns hidden states into logits.  Calling the model does both for all of them.
    """

    block: nn.Module  # without storage: one serves all layers
    layers: str  # what the names of a block's tensors begin with, before its number
    embedding: str  # name of the word embedding
    decoder: str  # name of the output matrix, which is the embedding where they are tied

    def __init__(
        self, config, raw_config: dict, store: dict[str, Stored], dtype: torch.dtype, weights: str, residual: int = 0
    ):
        self.config, self.raw_config, self.store, self.dtype = config, raw_config, store, dtype
        self.weights, self.residual = weights, residual
        self.activations, self.multiplies_codes, self.is_compiled = "none", False, False
        self.adapters: Adapters | None = None  # tensor_train.attach
        self.other_files: list[Path] = []  # tokenizer and such, copied along by `save`

    def round_activations(self, kind: str) -> None:
        """Round the input of every linear layer and of the output matrix, one scale a token (quant.ACTIVATIONS)."""
        self.activations = kind
        for part in self.parts():
            for module in part.modules():
                if isinstance(module, Linear):
                    module.activations = kind

    def parts(self) -> tuple[nn.Module, ...]:
        """The weightless modules."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.store[self.embedding].device

    def stored_view(self) -> StoredView:
        return StoredView(self.store, self.dtype)

    def __call__(self, tokens: Tensor, mask: Tensor | None = None, view: View | None = None) -> Tensor:
        """tokens [B, T] int64, mask [B, T] (1 = real token, padding on either side) -> logits [B, T, V] float32.

        With a view of P probes the result is [P, B, T, V].
        """
        if view is None:
            return self(tokens, mask, self.stored_view())[0]
        return self.score(self.hidden(tokens, mask, view), view)

    def hidden(self, tokens: Tensor, mask: Tensor | None, view: View, reads: Reads | None = None) -> Tensor:
        """The last hidden states, after the final norm or head transform: -> [P, B, T, D] float32; of reads alone,
        [P, M, D]."""
        raise NotImplementedError

    def reads_of_blocks(self, reads: Reads | None) -> list[Reads | None]:
        """What is wanted of each block: all tokens, to which the next one attends; of the last one, reads."""
        return [None] * (self.config.num_hidden_layers - 1) + [reads]

    def score(self, hidden: Tensor, view: View, words: Tensor | None = None) -> Tensor:
        """Hidden states [P, ..., D] -> float32 logits [P, ..., V], or [P, ..., n] for n chosen words.

        Chosen words read only their own rows of the output matrix, in float32: they are few, and bf16 would round
        logits near 10 to 1/16.
        """
        matrix = view.read(self.decoder) if words is None else view.rows(self.decoder, words)
        flat = quantise_tokens(hidden.flatten(1, -2), self.activations).to(matrix.dtype)  # [P, N, D]
        logits = (flat @ matrix.mT).float() + self.output_bias(view, words)
        return logits.view(*hidden.shape[:-1], -1)

    def output_bias(self, view: View, words: Tensor | None) -> Tensor | float:
        return 0.0

    def words(self, view: View, tokens: Tensor) -> Tensor:
        """Word embeddings: tokens [B, T] -> [P, B, T, D] float32."""
        return self.look_up(view, self.embedding, tokens).expand(view.probes, -1, -1, -1)

    @staticmethod
    def look_up(view: View, name: str, index: Tensor) -> Tensor:
        """Rows of a table: index [B, T] -> [P, B, T, D] float32."""
        if index.is_cuda:  # which would have to be waited for, to know how many are different
            return view.rows(name, index.flatten()).unflatten(1, index.shape)
        used, place = index.unique(return_inverse=True)  # a row is drawn and dequantised once
        return view.rows(name, used)[:, place]

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the block, for all layers, batches and lengths at once: weights are inputs, sizes are symbols.

        But the number of probes is none.  One sequence is another case than several; the last layer, where it goes on
        with some tokens alone, than the others, and by whether there is one of them a sequence; and weights that want
        gradients, in a pass that keeps them or not.  Most runs meet four of these cases, none more than GRAPHS.
        """
        limit = torch._dynamo.config.recompile_limit  # beyond it, blocks would run as they are
        torch._dynamo.config.recompile_limit = max(GRAPHS, limit)
        self.block.compile(backend=backend, dynamic=True)
        self.is_compiled = True

    def multiply_codes(self) -> None:
        """Let the blocks multiply fp8 codes by fp8 codes (quant.multiply_fp8).

        Raises ValueError for other weights, activations or products around them, and for sizes that torch does not
        multiply so.
        """
        if (self.weights, self.activations, self.dtype) != ("fp8", "fp8", torch.bfloat16):
            raise ValueError(f"products of fp8 codes need fp8 weights and activations, and bf16 around them, got "
                             f"{self.weights}, {self.activations} and {self.dtype}")  # fmt: skip
        for name, stored in self.store.items():
            if name.startswith(self.layers) and isinstance(stored, Fp8) and any(n % 16 for n in stored.shape):
                told = f"products of fp8 codes need sizes that 16 divides, and {name} is {list(stored.shape)}"
                raise ValueError(f"{told}: use --compute bf16")
        self.multiplies_codes = True

    def apply(self, part: nn.Module, prefix: str, view: View, x: Tensor, *context) -> Tensor | tuple[Tensor, Tensor]:
        """Run one weightless module on x [P, ..., D], each probe with the weights that the view gives it."""
        weights = {}
        for name, _ in part.named_parameters():
            stored = self.store.get(prefix + name)
            if self.multiplies_codes and isinstance(stored, Fp8):
                weights |= {name: view.codes(prefix + name), name + "_scale": stored.scale}
            else:
                weights[name] = view.read(prefix + name)
        return functional_call(part, weights, (x, *context))

    def generate(self, tokens: Tensor, max_new_tokens: int, mask: Tensor | None = None) -> Tensor:
        raise ValueError(f"{type(self).__name__} is a masked language model and does not generate")

    def save(self, directory: str | Path) -> None:
        """Write a directory that transformers.from_pretrained loads; codes as the fp32 that they stand for.

        Raises ValueError where adapters have not been merged.
        """
        if self.adapters is not None:
            raise ValueError("a plain checkpoint has no adapters: merge them first, or save them alone")
        tensors = ((name, stored.read().view(stored.shape)) for name, stored in self.store.items())
        write_directory(Path(directory), self._config_to_save(), self.other_files, tensors)

    def save_stored(self, directory: str | Path) -> None:
        """Write the weights as they are stored, codes and scales, for `load` with the same `weights` and `residual`.

        Raises ValueError for a model with adapters: tensor_train.save writes those alone.
        """
        if self.adapters is not None:
            raise ValueError("a model with adapters is not saved whole: save the adapters alone")
        parts = ((name + suffix, t) for name, s in self.store.items() for suffix, t in s.parts().items())
        if self.weights in FLOATS:
            return write_directory(Path(directory), self._config_to_save(), self.other_files, parts)
        config = self._config_to_save() | {CODES: {"weights": self.weights, "residual": self.residual}}
        return write_directory(Path(directory), config, self.other_files, parts, CODES)

    def _config_to_save(self) -> dict:
        kept = {key: value for key, value in self.raw_config.items() if key not in ("torch_dtype", CODES)}
        return kept | {"dtype": "bfloat16" if self.weights == "bf16" else "float32"}

    def sha256(self) -> str:
        """Hash of every stored bit: name, dtype, shape and bytes of each part, in order of name."""
        digest = hashlib.sha256()
        for name in sorted(self.store):
            for suffix, part in self.store[name].parts().items():
                digest.update(f"{name}{suffix} {part.dtype} {tuple(part.shape)}\n".encode())
                digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Llama(LanguageModel):
    layers = "model.layers."
    embedding = "model.embed_tokens.weight"

    def __init__(self, config: LlamaConfig, *rest):
        super().__init__(config, *rest)
        self.decoder = self.embedding if config.tie_word_embeddings else "lm_head.weight"
        self.block, self.norm = llama_parts(config)

    def parts(self) -> tuple[nn.Module, ...]:
        return self.block, self.norm

    def hidden(
        self, tokens: Tensor, mask: Tensor | None, view: View, reads: Reads | None = None,
        cache: KVCache | None = None, branch: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """mask covers cached and new tokens, [B, S].  Without one every token is read, which padding on the right does
        not change: what reads left to right never sees it.

        branch [B, T], without a cache: several continuations of one beginning at once.  Tokens of branch 0 are the
        beginning; those of branch k go on from there, and do not see the others.
        """
        view = view if self.adapters is None else self.adapters.view(view)
        x = self.words(view, tokens).clone()  # a view would be another kind of input to torch.compile than a layer's x
        y = torch.zeros_like(x, dtype=self.dtype).requires_grad_(x.requires_grad)  # for the same reason
        if mask is None and cache is None and branch is None:
            seen, positions = None, torch.arange(tokens.shape[1], device=tokens.device)[None]
        else:
            seen = causal(torch.ones_like(tokens) if mask is None else mask, tokens.shape[1], branch)
            positions = seen.sum(-1)[:, 0] - 1  # as many as a token sees before itself
            seen = seen.repeat(len(x), 1, 1, 1)
        angles = positions[..., None] * rope_frequencies(self.config.rope, self.config.head_dim, tokens.device)
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        for i, of_block in enumerate(self.reads_of_blocks(reads)):
            kept = () if cache is None else (cache, i)  # torch.compile would make a graph for every number
            x, y = self.apply(self.block, f"model.layers.{i}.", view, x, y, cos, sin, seen, of_block, *kept)
        return self.apply(self.norm, "model.norm.", view, x + y)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, mask: Tensor | None = None) -> Tensor:
        """Greedy: tokens [B, T] (left-padded where mask is 0) -> [B, T + new], new <= max_new_tokens.

        Stops when every row has produced an end token; rows that end early are filled with the padding token.
        """
        mask = torch.ones_like(tokens) if mask is None else mask
        if not mask[:, -1].all():
            raise ValueError("generation needs left padding: the last token of every row must be real")
        eos = self.config.eos_token_id
        ends = torch.tensor([eos] if isinstance(eos, int) else eos or [], device=tokens.device)
        pad = self.config.pad_token_id if self.config.pad_token_id is not None else (ends.tolist() or [0])[0]
        cache, view, new = KVCache(), self.stored_view(), tokens
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            last = self.hidden(new, mask, view, cache=cache)[:, :, -1]
            new = self.score(last, view)[0].argmax(-1, keepdim=True).masked_fill(done[:, None], pad)
            tokens, mask = torch.cat((tokens, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
            done |= torch.isin(new[:, 0], ends)
            if done.all():
                break
        return tokens


def causal(mask: Tensor, T: int, branch: Tensor | None = None) -> Tensor:
    """mask [B, S] -> [B, 1, T, S] bool: the last T tokens see themselves and the real tokens before them.

    Padding sees itself, because a row that sees nothing would be NaN.  Tokens of a branch (Llama.hidden) see branch 0
    and their own.
    """
    at = torch.arange(mask.shape[1], device=mask.device)
    query = at[-T:, None]
    seen = ((at <= query) & mask[:, None].bool()) | (at == query)
    if branch is not None:
        seen &= (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    return seen[:, None]


class Roberta(LanguageModel):
    layers = "roberta.encoder.layer."
    embedding = "roberta.embeddings.word_embeddings.weight"

    def __init__(self, config: RobertaConfig, *rest):
        super().__init__(config, *rest)
        tied = config.tie_word_embeddings
        self.decoder = self.embedding if tied else "lm_head.decoder.weight"
        self.bias = "lm_head.bias" if tied else "lm_head.decoder.bias"  # transformers never reads the other one
        self.embed, self.block, self.head = roberta_parts(config)

    def parts(self) -> tuple[nn.Module, ...]:
        return self.embed, self.block, self.head

    def hidden(self, tokens: Tensor, mask: Tensor | None, view: View, reads: Reads | None = None) -> Tensor:
        mask = torch.ones_like(tokens) if mask is None else mask
        view = view if self.adapters is None else self.adapters.view(view)
        positions = mask.cumsum(1) * mask + self.config.pad_token_id  # the first real token is at padding index + 1
        limit = self.config.max_position_embeddings
        if tokens.shape[1] + self.config.pad_token_id >= limit and positions.max() >= limit:
            raise ValueError(f"{tokens.shape[1]} tokens exceed {limit} positions")
        x = self.words(view, tokens) + self.look_up(view, "roberta.embeddings.position_embeddings.weight", positions)
        x = x + view.rows("roberta.embeddings.token_type_embeddings.weight", positions[:1, 0] * 0)[:, :, None]
        x = self.apply(self.embed, "roberta.embeddings.", view, x)
        seen = (mask.bool() | ~mask.any(1, keepdim=True))[:, None, None].repeat(len(x), 1, 1, 1)  # [P * B, 1, 1, T]
        for i, of_block in enumerate(self.reads_of_blocks(reads)):
            x = self.apply(self.block, f"roberta.encoder.layer.{i}.", view, x, seen, of_block)
        return self.apply(self.head, "lm_head.", view, x)

    def output_bias(self, view: View, words: Tensor | None) -> Tensor:
        bias = view.read(self.bias)  # [P, V]
        return (bias if words is None else bias[:, words])[:, None]


def llama_parts(c: LlamaConfig) -> tuple[nn.Module, ...]:
    """One block and the final norm without storage: the weights are an input, so one block serves all layers."""
    with torch.device("meta"):
        return LlamaBlock(c), RMSNorm(c.hidden_size, c.rms_norm_eps)


def roberta_parts(c: RobertaConfig) -> tuple[nn.Module, ...]:
    with torch.device("meta"):
        return RobertaEmbedding(c), RobertaBlock(c), RobertaHead(c)


# ---------------------------------------------------------------- checkpoints


def expected_shapes(config: LlamaConfig | RobertaConfig) -> dict[str, torch.Size]:
    """Every tensor that a checkpoint of this config must hold, with its shape, in the order of the forward pass."""

    def named(prefix: str, part: nn.Module) -> dict[str, torch.Size]:
        return {prefix + name: p.shape for name, p in part.named_parameters()}

    V, D, layers = config.vocab_size, config.hidden_size, range(config.num_hidden_layers)
    if isinstance(config, LlamaConfig):
        block, norm = llama_parts(config)
        shapes = {Llama.embedding: torch.Size((V, D))}
        for i in layers:
            shapes |= named(f"model.layers.{i}.", block)
        shapes |= named("model.norm.", norm)
        return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": torch.Size((V, D))}
    embed, block, head = roberta_parts(config)
    tables = {"word": V, "position": config.max_position_embeddings, "token_type": config.type_vocab_size}
    shapes = {f"roberta.embeddings.{t}_embeddings.weight": torch.Size((n, D)) for t, n in tables.items()}
    shapes |= named("roberta.embeddings.", embed)
    for i in layers:
        shapes |= named(f"roberta.encoder.layer.{i}.", block)
    shapes |= named("lm_head.", head)
    if config.tie_word_embeddings:
        return shapes | {"lm_head.bias": torch.Size((V,))}
    return shapes | {"lm_head.decoder.weight": torch.Size((V, D)), "lm_head.decoder.bias": torch.Size((V,))}


def ignorable(name: str, config: LlamaConfig | RobertaConfig) -> bool:
    """The tensors that a checkpoint may hold and that mean nothing to us."""
    if name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids")):
        return True  # recomputed; older files carry them as buffers
    if name.startswith("roberta.pooler."):
        return True  # the sentence pooler, which the masked LM does not use
    if isinstance(config, RobertaConfig) and name in ("lm_head.bias", "lm_head.decoder.bias"):
        return True  # tied, they are one tensor; untied, only the decoder's is read
    return config.tie_word_embeddings and name in ("lm_head.weight", "lm_head.decoder.weight")


def create(
    raw: dict, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32, weights: str = "fp32",
    residual: int = 0,
) -> LanguageModel:
    """A model with random weights from a config.json's contents: matrices N(0, 0.02^2), norms 1, biases 0.

    For pre-training, benchmarks and tests.  The numbers depend on the kind of device.
    """
    config = config_of(raw)
    store = {}
    for name, shape in expected_shapes(config).items():
        generator = torch.Generator(device).manual_seed(tensor_id(f"{seed} {name}"))  # takes 32 bits of a seed
        is_matrix, is_bias = len(shape) == 2, name.endswith("bias")
        tensor = torch.full(shape, 1.0 - is_bias, device=device)
        if is_matrix:
            tensor.normal_(0.0, 0.02, generator=generator)
        store[name] = encode(tensor, weights, residual)
    return _whole(config, raw, store, dtype, weights, residual)


def _whole(config: LlamaConfig | RobertaConfig, *rest) -> LanguageModel:
    return (Llama if isinstance(config, LlamaConfig) else Roberta)(config, *rest)


CODES = "codes"  # a file name of their own, so that no other program takes codes for weights; and a config key


def load(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str = "fp32",
    residual: int = 0,
    oracle: bool = False,
) -> LanguageModel:
    """Load a checkpoint directory: config.json and safetensors, one tensor at a time into its final store.

    weights is how matrices are stored (quant.FORMATS), residual the extra bits of integer codes, oracle keeps those
    as fake-quantised fp32 (quant.Oracle); dtype is what matrices are multiplied in.  Raises ValueError for anything
    missing, unexpected, wrongly shaped, not finite, corrupt, or of an unknown architecture.
    """
    check_format(weights, residual, oracle)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed at once.  See NOTES.md: glibc then keeps what forwards free
    directory, device, form = Path(directory), torch.device(device), (weights, residual, oracle)
    config, raw = read_config(directory)
    has_codes = any(directory.glob(f"{CODES}*.safetensors"))
    if has_codes:
        _check_same_codes(directory, raw.get(CODES), weights, residual)
    store = (_load_codes if has_codes else _load_dense)(directory, config, device, form)
    assert len({tensor_id(name) for name in store}) == len(store)  # or two tensors would share their directions
    lm = _whole(config, raw, store, dtype, weights, residual)
    lm.other_files = [directory / name for name in COMPANIONS if (directory / name).is_file()]
    return lm


def _load_dense(directory: Path, config, device: torch.device, form: tuple) -> dict[str, Stored]:
    shapes, files, store, finite = expected_shapes(config), find_tensors(directory), {}, {}
    check_names(directory, set(files), set(shapes), lambda name: ignorable(name, config))
    for name, tensor in read_tensors(files, shapes, device):
        finite[name] = _is_finite(files[name], name, tensor)
        store[name] = encode(tensor, *form)
    _check_finite(files, finite)
    return {name: store[name] for name in shapes}


def _is_finite(file: Path, name: str, tensor: Tensor) -> Tensor:
    """A bool on the tensor's device: to ask for its value would make the host wait for a GPU.

    Raises ValueError for a type that no checkpoint has.
    """
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):  # float8 has scales
        raise ValueError(f"{file}: {name} is {tensor.dtype}, expected floating point of 16 bits or more")
    ends = torch.stack(tensor.aminmax())  # both are NaN where any element is; isfinite would make copies
    return ends.float().isfinite().all()  # as float32, where 1e300 is infinite


def _check_finite(files: dict[str, Path], finite: dict[str, Tensor]) -> None:
    for name, verdict in finite.items():
        if not verdict:
            raise ValueError(f"{files[name]}: {name} holds NaN or infinity")


def _check_same_codes(directory: Path, held: object, weights: str, residual: int) -> None:
    if held == {"weights": weights, "residual": residual}:
        return
    if not isinstance(held, dict) or set(held) != {"weights", "residual"}:
        raise ValueError(f"{directory / 'config.json'} must say what the codes are, got {CODES} {held!r}")
    raise ValueError(
        f"{directory} holds {held['weights']} codes with {held['residual']} residual bits; load it with weights "
        f"{held['weights']} and residual {held['residual']}, got {weights} and {residual}"
    )


def _load_codes(directory: Path, config, device: torch.device, form: tuple) -> dict[str, Stored]:
    """The inverse of save_stored for codes."""
    shapes, files = expected_shapes(config), find_tensors(directory, CODES)
    suffixes = {name: stored_parts(shape, *form[:2]) for name, shape in shapes.items()}
    expected = {name + suffix: part for name, parts in suffixes.items() for suffix, part in parts.items()}
    check_names(directory, set(files), set(expected), lambda name: False)
    read = read_tensors(files, {name: shape for name, (_, shape) in expected.items()}, device)
    tensors = {name: tensor.clone() for name, tensor in read}  # on a CPU they are mapped from their files
    store, finite = {}, {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            finite[name] = _is_finite(files[name], name, tensors[name])
        try:
            store[name] = from_parts({suffix: tensors.pop(name + suffix) for suffix in suffixes[name]}, shape, *form)
        except ValueError as error:
            raise ValueError(f"{files[name]}: {name}{error}") from None
    _check_finite(files, finite)
    return store
