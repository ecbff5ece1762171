"""LLaMA and RoBERTa as plain modules without storage, which are handed their weights at each call.

The model is a pure function and the weights are data.  A View says how the weights are read: as they are
stored, or as the P perturbed copies of a zeroth-order step.  Each block is one weightless nn.Module, called with
a layer's weights through torch.func.functional_call, so only one layer is ever materialised.

LLaMA: Touvron et al. 2023; RMSNorm, rotary embedding in split halves (as in Hugging Face files), SwiGLU,
grouped-query attention; Mistral and Qwen2 have its blocks.  RoBERTa: Liu et al. 2019; post-norm, learned positions,
masked-LM head.

Shape key: P perturbed copies, B batch, T tokens, S cached + new tokens, M wanted tokens, D hidden, H heads, K
key-value heads, d head width, V vocabulary.  Imports quant and random_bits, and of runtime model_configs and
checkpoints, to load and save.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quant import StoredWeights, encode
from random_bits import tensor_id
from runtime import checkpoints
from runtime.model_configs import LlamaConfig, RobertaConfig, Rope, config_of, read_config

# ---------------------------------------------------------------- parts


class Linear(nn.Linear):
    """x [P, ..., D] times each copy's own weight [P, O, D], or a shared one [1, O, D], -> [P, ..., O] in one product.

    The bias [P, O] stays float32 in its store and takes the activation's dtype here.  round_input is what may be done
    to the input first, [P, N, D] -> the same shape (quant.quantise_tokens).
    """

    round_input: Callable[[Tensor], Tensor] | None = None

    @property
    def input_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1, -2)  # [P, N, D]
        flat = flat if self.round_input is None else self.round_input(flat)
        copies = max(len(flat), len(self.weight), 1 if self.bias is None else len(self.bias))
        flat = flat.expand(copies, -1, -1)  # they may differ from here on
        if len(self.weight) < len(flat):  # a frozen weight, which all copies share: one large product
            shared = self.bias is not None and len(self.bias) == 1
            y = F.linear(flat, self.weight[0], self.bias[0].to(x.dtype) if shared else None)
            if self.bias is not None and not shared:  # which moves without its weight
                y = y + self.bias.to(x.dtype)[:, None]
        elif self.bias is None:
            y = torch.bmm(flat, self.weight.mT)
        else:
            y = torch.baddbmm(self.bias.to(x.dtype)[:, None], flat, self.weight.mT)
        return y.view(copies, *x.shape[1:-1], -1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32; x [P, ..., D], weight [P, D]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(len(self.weight), *[1] * (x.ndim - 2), -1)
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps) * weight


class LayerNorm(nn.LayerNorm):
    """Normalises in float32, as RMSNorm; weight and bias [P, D]."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (v.view(len(v), *[1] * (x.ndim - 2), -1) for v in (self.weight, self.bias))
        return torch.addcmul(bias, F.layer_norm(x.float(), x.shape[-1:], None, None, self.eps), weight)


@cache
def rope_frequencies(rope: Rope, d: int, device: torch.device) -> Tensor:
    """[d / 2] radians per position.

    linear slows all waves by `factor`.  llama3 and yarn slow long waves alone and blend the ones in between: by the
    turns that a wave makes over the original context, or by its place among waves of given turns.
    """
    frequency = rope.theta ** -(torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    if rope.factor == 1.0 or rope.kind == "dynamic":
        return frequency
    keep = torch.zeros_like(frequency)
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)  # over the original context
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    if rope.kind == "yarn":
        context = rope.original_max_position_embeddings / (2 * math.pi)
        first, last = (
            d * math.log(context / turns) / (2 * math.log(rope.theta)) for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, d - 1)
        places = torch.arange(d // 2, device=device, dtype=torch.float32)
        keep = 1 - ((places - first) / ((last - first) or 0.001)).clamp(0, 1)  # or 0.001: as transformers
    return frequency * (keep + (1 - keep) / rope.factor)


def dynamic_change(rope: Rope, d: int, positions: Tensor) -> Tensor:
    """What dynamic scaling (NTK) multiplies frequencies by, [d/2] float32: beyond the original context, the longest
    sequence, of positions [B, T], decides by how much the base grows."""
    original = rope.original_max_position_embeddings
    growth = rope.factor * (positions.max() + 1).clamp(min=original) / original - (rope.factor - 1)
    return growth ** -(torch.arange(0, d, 2, device=positions.device) / (d - 2))


def rotate(x_BTHd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Rotary embedding in split halves: element i pairs with i + d/2, not with its neighbour (Meta's own files).

    Any axes may come before B.
    """
    first, second = x_BTHd.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x_BTHd * cos_BTd[:, :, None] + turned * sin_BTd[:, :, None]


def attend(q_PBTHd: Tensor, k_PBSHd: Tensor, v_PBSHd: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax attention of each sequence of each copy -> [P, B, T, H * d].

    seen [P * B or more, 1, 1 or T, S] bool; None is the usual causal mask, for which there are faster kernels.
    """
    P = max(len(q_PBTHd), len(k_PBSHd), len(v_PBSHd))  # where one moves, and the others do not
    q, k, v = (x.expand(P, -1, -1, -1, -1).flatten(0, 1).transpose(1, 2) for x in (q_PBTHd, k_PBSHd, v_PBSHd))
    seen = None if seen is None else seen[: len(q)]  # copies have the same ones
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
    return y.transpose(1, 2).reshape(P, *q_PBTHd.shape[1:3], -1)


TokenIndex = tuple[Tensor, Tensor]  # the tokens that a caller wants: rows and positions, [M] int64 each.
# The last block goes on with these alone after its attention: x [P, B, T, D] -> x[:, *wanted] [P, M, D]


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
        self.o_proj = Linear(self.heads * self.d, c.hidden_size, bias=c.output_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, wanted: TokenIndex | None,
        cache: KVCache | None = None, layer: int = 0,
    ) -> Tensor:  # fmt: skip
        q_PBTHd = rotate(self.q_proj(x).unflatten(-1, (self.heads, self.d)), cos, sin)
        k_PBTKd = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, self.d)), cos, sin)
        v_PBTKd = self.v_proj(x).unflatten(-1, (self.kv_heads, self.d))
        if cache is not None:
            k_PBTKd, v_PBTKd = cache.extend(layer, k_PBTKd, v_PBTKd)
        group = self.heads // self.kv_heads
        if group > 1:  # once each would be a copy
            k_PBTKd, v_PBTKd = k_PBTKd.repeat_interleave(group, 3), v_PBTKd.repeat_interleave(group, 3)
        y = attend(q_PBTHd, k_PBTKd, v_PBTKd, seen)
        return self.o_proj(y if wanted is None else y[:, *wanted])


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
        self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, wanted: TokenIndex | None, *cache
    ) -> tuple[Tensor, Tensor]:
        """x is the residual stream and y what comes to it from the block before: -> the same for the next one.  To add
        them here spares a pass over x, which the norm wanted anyway.

        x is float32 whatever the products are computed in: sums in bf16 put more noise into a small projected
        gradient than all products together."""
        dtype, x = y.dtype, x + y
        residual = x if wanted is None else x[:, *wanted]
        x = residual + self.self_attn(self.input_layernorm(x).to(dtype), cos, sin, seen, wanted, *cache)
        return x, self.mlp(self.post_attention_layernorm(x).to(dtype))


class RobertaSelfAttention(nn.Module):
    def __init__(self, c: RobertaConfig):
        super().__init__()
        self.heads, self.d = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        self.query, self.key, self.value = (Linear(c.hidden_size, c.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return attend(*(p(x).unflatten(-1, (self.heads, self.d)) for p in (self.query, self.key, self.value)), seen)


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

    def forward(self, x: Tensor, seen: Tensor, wanted: TokenIndex | None) -> Tensor:
        """x is float32, as in LlamaBlock."""
        dtype = self.output.dense.input_dtype
        attended = self.attention["self"](x.to(dtype), seen)
        if wanted is not None:
            attended, x = attended[:, *wanted], x[:, *wanted]
        x = self.attention["output"](attended, x)
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
        return self.layer_norm(F.gelu(self.dense(x.to(self.dense.input_dtype))))


# ---------------------------------------------------------------- whole models


class View(Protocol):
    """A way of reading the weights.  The leading axis P has one entry for each copy, or 1 where a tensor is frozen."""

    probes: int  # P

    def read(self, name: str, rows: Tensor | None = None, as_codes: bool = False) -> Tensor:
        """[P, *shape]: matrices in the compute dtype, vectors in float32; as_codes, an fp8 or int8 matrix's codes.

        rows [n] int64: those rows of a matrix, [P, n, C] float32.
        """


MAX_RECOMPILES = 48  # of a compiled block: torch's default is 8


class LanguageModel:
    """A config, named stores of weights, and the functions that run them.

    Forward passes come in two pieces, so that a caller who wants a few tokens and a few words pays for no more:
    `hidden` runs the blocks, `score` turns hidden states into logits.  Calling the model does both for all of them.
    """

    parts: tuple[nn.Module, ...]  # all modules, which have no storage
    block: nn.Module  # the one that serves all layers
    layers: str  # the prefix of a block's tensor names, before its number
    embedding: str  # name of the word embedding
    decoder: str  # name of the output matrix, which is the embedding where they are tied
    bias: str | None = None  # name of the output bias

    def __init__(self, config, raw_config: dict, weights: dict, dtype: torch.dtype, format: str, residual: int = 0):
        """weights: stores by name (quant.Store); dtype: what matrices are multiplied in; format: how they are kept."""
        self.config, self.raw_config, self.weights, self.dtype = config, raw_config, weights, dtype
        self.format, self.residual, self.is_compiled = format, residual, False
        self.device = weights[self.embedding].device
        self.round_input: Callable[[Tensor], Tensor] | None = None
        self.stored_view_class = StoredWeights
        self.wrap_view: Callable[[View], View] = lambda view: view  # adapters and products of codes read through others
        self.adapters = None  # tensor_train.attach
        self.fuse_adapters: Callable[[LanguageModel], None] = lambda lm: None  # put in by gpu.install
        self.offloaded = None  # family.zo2, where blocks are in host memory
        self.other_files: list[Path] = []  # tokenizer and such, copied along by `save`

    def round_inputs(self, rounding: Callable[[Tensor], Tensor]) -> None:
        """Round the input of every linear layer and of the output matrix, [..., C] -> the same shape."""
        self.round_input = rounding
        for _, module in self.linears():
            module.round_input = rounding

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """The linear layers of all parts, which serve every layer, by their weights' names less the layer's prefix."""
        for part in self.parts:
            yield from ((path, module) for path, module in part.named_modules() if isinstance(module, Linear))

    def stored_view(self) -> View:
        """The weights as they are stored: P = 1."""
        return self.stored_view_class(self.weights, self.dtype)

    def __call__(self, tokens: Tensor, mask: Tensor | None = None, view: View | None = None) -> Tensor:
        """tokens [B, T] int64, mask [B, T] (1 = real token, padding on either side) -> logits [B, T, V] float32.

        With a view of P copies the result is [P, B, T, V].
        """
        if view is None:
            return self(tokens, mask, self.stored_view())[0]
        return self.score(self.hidden(tokens, mask, view), view)

    def hidden(self, tokens: Tensor, mask: Tensor | None, view: View, wanted: TokenIndex | None = None) -> Tensor:
        """The last hidden states, after the final norm or head transform: -> [P, B, T, D] float32, or of the wanted
        tokens alone [P, M, D]."""
        raise NotImplementedError

    def score(self, hidden: Tensor, view: View, words: Tensor | None = None) -> Tensor:
        """Hidden states [P, ..., D] -> float32 logits [P, ..., V], or [P, ..., n] for n chosen words.

        Chosen words read only their own rows of the output matrix, in float32: they are few, and bf16 would round
        logits near 10 to 1/16.
        """
        view = self.wrap_view(view)
        matrix = view.read(self.decoder) if words is None else view.read(self.decoder, words)
        flat = hidden.flatten(1, -2)  # [P, N, D]
        flat = (flat if self.round_input is None else self.round_input(flat)).to(matrix.dtype)
        logits = (flat @ matrix.mT).float()
        if self.bias is not None:
            bias = view.read(self.bias)  # [P, V]
            logits = logits + (bias if words is None else bias[:, words])[:, None]
        return logits.unflatten(1, hidden.shape[1:-1])

    def look_up(self, view: View, name: str, index: Tensor) -> Tensor:
        """Rows of a table: index [B, T] -> [P, B, T, D] float32."""
        if index.is_cuda:  # to know how many are different, the host would have to wait for the GPU
            return view.read(name, index.flatten()).unflatten(1, index.shape)
        used, place = index.unique(return_inverse=True)  # a row is drawn and dequantised once
        return view.read(name, used)[:, place]

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the block, for all layers, batches and lengths at once: weights are inputs, sizes are symbols.

        But the number of copies is none.  One sequence is another case than several; the last layer, where it goes on
        with some tokens alone, than the others, and by whether there is one of them a sequence; and weights that want
        gradients, in a pass that keeps them or not.  Most runs meet four of these cases, none more than MAX_RECOMPILES.
        """
        limit = torch._dynamo.config.recompile_limit  # beyond it, blocks would run as they are
        torch._dynamo.config.recompile_limit = max(MAX_RECOMPILES, limit)
        self.block.compile(backend=backend, dynamic=True)
        self.is_compiled = True

    def apply(self, part: nn.Module, prefix: str, view: View, x: Tensor, *context) -> Tensor | tuple[Tensor, Tensor]:
        """Run one weightless module on x [P, ..., D], each copy with the weights that the view gives it."""
        weights = {name: view.read(prefix + name) for name, _ in part.named_parameters()}
        return functional_call(part, weights, (x, *context))

    def generate(
        self, tokens: Tensor, max_new_tokens: int, mask: Tensor | None = None, ends: Sequence[int] = (),
        view: View | None = None,
    ) -> Tensor:  # fmt: skip
        raise ValueError(f"{type(self).__name__} is a masked language model and does not generate")

    def save(self, directory: str | Path) -> None:
        """Write a directory that transformers.from_pretrained loads; codes as the fp32 that they stand for.

        Raises ValueError where adapters have not been merged.
        """
        if self.adapters is not None:
            raise ValueError("a plain checkpoint has no adapters: merge them first, or save them alone")
        weights = self.weights
        if self.bias is not None and "lm_head.bias" not in weights:  # transformers would miss it, but never read it
            weights = weights | {"lm_head.bias": copy.deepcopy(weights[self.bias])}
        checkpoints.save_dense(Path(directory), self.raw_config, self.format, weights, self.other_files)


class Llama(LanguageModel):
    """LLaMA, Mistral and Qwen2."""

    layers = "model.layers."
    embedding = "model.embed_tokens.weight"
    decoder = "lm_head.weight"

    def __init__(self, config: LlamaConfig, *rest):
        super().__init__(config, *rest)
        if config.tie_word_embeddings:
            self.decoder = self.embedding
        self.block, self.norm = self.parts = llama_parts(config)
        self.cache_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.cache_bytes *= self.dtype.itemsize  # of one token's keys and values

    def hidden(
        self, tokens: Tensor, mask: Tensor | None, view: View, wanted: TokenIndex | None = None,
        cache: KVCache | None = None, branch: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """mask covers cached and new tokens, [B, S].  Without one every token is read, which padding on the right does
        not change: what reads left to right never sees it.

        branch [B, T, 2], without a cache: of each token, which of several texts in its row it is of, and which of
        several continuations of that text's beginning.  Texts do not see each other.  Tokens of branch 0 are the
        beginning; those of branch k go on from there, and do not see the others.
        """
        view = self.wrap_view(view)
        x = self.look_up(view, self.embedding, tokens)  # of a frozen embedding P = 1, up to the first part that moves
        x = x if self.adapters is None else x.expand(view.probes, -1, -1, -1)  # which multiply copies by copies
        x = x.clone()  # a view would be another kind of input to torch.compile than a layer's x
        y = torch.zeros_like(x, dtype=self.dtype).requires_grad_(x.requires_grad)  # for the same reason
        if mask is None and cache is None and branch is None:
            seen, positions = None, torch.arange(tokens.shape[1], device=tokens.device)[None]
        else:
            seen = causal(torch.ones_like(tokens) if mask is None else mask, tokens.shape[1], branch)
            positions = seen.sum(-1)[:, 0] - 1  # as many as a token sees before itself
            seen = seen.repeat(view.probes, 1, 1, 1)
        window, S = self.config.sliding_window, (tokens if mask is None else mask).shape[1]
        if window is not None and window < S and positions.max() >= window:  # the latter makes a host wait for a GPU
            raise ValueError(f"{int(positions.max()) + 1} tokens exceed the sliding window of {window}")
        rope, d = self.config.rope, self.config.head_dim
        frequency = rope_frequencies(rope, d, positions.device)
        if rope.kind == "dynamic":
            frequency = frequency * dynamic_change(rope, d, positions)
        angles = (positions[..., None] * frequency).repeat(1, 1, 2)  # [B, T, d]
        cos, sin = ((wave * rope.attention_factor).to(self.dtype) for wave in (angles.cos(), angles.sin()))
        for i in range(self.config.num_hidden_layers):
            last = i == self.config.num_hidden_layers - 1  # to all tokens of the others, the next block attends
            cached = () if cache is None else (cache, i)  # torch.compile would make a graph for every number
            context = (y, cos, sin, seen, wanted if last else None, *cached)
            x, y = self.apply(self.block, f"{self.layers}{i}.", view, x, *context)
        return self.apply(self.norm, "model.norm.", view, x + y)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, mask: Tensor | None = None, ends: Sequence[int] = (),
        view: View | None = None,
    ) -> Tensor:  # fmt: skip
        """Greedy: tokens [B, T] (left-padded where mask is 0) -> [B, T + new], new <= max_new_tokens.

        Stops when every row has produced an end token, the checkpoint's or one of `ends`; rows that end early are
        filled with the padding token.  By the weights as they are stored, or by a view of one copy of them.  Blocks run
        uncompiled: each layer of a growing cache would be compiled anew.
        """
        mask = torch.ones_like(tokens) if mask is None else mask
        if not mask[:, -1].all():
            raise ValueError("generation needs left padding: the last token of every row must be real")
        eos = self.config.eos_token_id
        stops = [eos] if isinstance(eos, int) else list(eos or [])
        pad = self.config.pad_token_id if self.config.pad_token_id is not None else (stops or [0])[0]
        stops = torch.tensor([*stops, *ends], dtype=torch.int64, device=tokens.device)
        cache, view, new = KVCache(), view or self.stored_view(), tokens
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            with torch.compiler.set_stance("force_eager"):
                last = self.hidden(new, mask, view, cache=cache)[:, :, -1]
            new = self.score(last, view)[0].argmax(-1, keepdim=True).masked_fill(done[:, None], pad)
            tokens, mask = torch.cat((tokens, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
            done |= torch.isin(new[:, 0], stops)
            if done.all():
                break
        return tokens


def causal(mask: Tensor, T: int, branch: Tensor | None = None) -> Tensor:
    """mask [B, S] -> [B, 1, T, S] bool: the last T tokens see themselves and the real tokens before them.

    Padding sees itself, because a row that sees nothing would be NaN.  Tokens of a branch (Llama.hidden) see branch 0
    and their own, of their text.
    """
    at = torch.arange(mask.shape[1], device=mask.device)
    query = at[-T:, None]
    seen = ((at <= query) & mask[:, None].bool()) | (at == query)
    if branch is not None:
        text, part = branch.unbind(-1)
        seen &= (text[:, None] == text[..., None]) & ((part[:, None] == 0) | (part[:, None] == part[..., None]))
    return seen[:, None]


class Roberta(LanguageModel):
    layers = "roberta.encoder.layer."
    embedding = "roberta.embeddings.word_embeddings.weight"
    decoder, bias = "lm_head.decoder.weight", "lm_head.decoder.bias"  # untied, transformers never reads lm_head.bias

    def __init__(self, config: RobertaConfig, *rest):
        super().__init__(config, *rest)
        if config.tie_word_embeddings:
            self.decoder, self.bias = self.embedding, "lm_head.bias"
        self.embed, self.block, self.head = self.parts = roberta_parts(config)

    def hidden(
        self, tokens: Tensor, mask: Tensor | None, view: View, wanted: TokenIndex | None = None,
        branch: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """branch [B, T, 2]: as of Llama.hidden, but texts have no continuations."""
        mask = torch.ones_like(tokens) if mask is None else mask
        view = self.wrap_view(view)
        seen, place = (mask.bool() | ~mask.any(1, keepdim=True))[:, None], mask.cumsum(1)  # [B, 1 or T, T]; [B, T]
        if branch is not None:
            text = branch[..., 0]
            seen = seen & (text[:, None] == text[..., None])
            place = seen.tril().sum(-1)
        positions = place * mask + self.config.pad_token_id  # the first real token is at padding index + 1
        limit = self.config.max_position_embeddings
        if tokens.shape[1] + self.config.pad_token_id >= limit and positions.max() >= limit:
            raise ValueError(f"{tokens.shape[1]} tokens exceed {limit} positions")
        x = self.look_up(view, self.embedding, tokens)
        x = x if self.adapters is None else x.expand(view.probes, -1, -1, -1)
        x = x + self.look_up(view, "roberta.embeddings.position_embeddings.weight", positions)
        x = x + view.read("roberta.embeddings.token_type_embeddings.weight", positions[:1, 0] * 0)[:, :, None]
        x = self.apply(self.embed, "roberta.embeddings.", view, x)
        seen = seen[:, None].repeat(view.probes, 1, 1, 1)
        for i in range(self.config.num_hidden_layers):
            last = i == self.config.num_hidden_layers - 1  # to all tokens of the others, the next block attends
            x = self.apply(self.block, f"{self.layers}{i}.", view, x, seen, wanted if last else None)
        return self.apply(self.head, "lm_head.", view, x)


MODELS = {LlamaConfig: Llama, RobertaConfig: Roberta}


def llama_parts(c: LlamaConfig) -> tuple[nn.Module, ...]:
    """One block and the final norm without storage: the weights are an input, so one block serves all layers."""
    with torch.device("meta"):
        return LlamaBlock(c), RMSNorm(c.hidden_size, c.rms_norm_eps)


def roberta_parts(c: RobertaConfig) -> tuple[nn.Module, ...]:
    with torch.device("meta"):
        return RobertaEmbedding(c), RobertaBlock(c), RobertaHead(c)


# ---------------------------------------------------------------- loading


def expected_shapes(config: LlamaConfig | RobertaConfig) -> dict[str, torch.Size]:
    """Every tensor that a checkpoint of this config must hold, with its shape, in the order of the forward pass."""

    def named(prefix: str, part: nn.Module) -> dict[str, torch.Size]:
        return {prefix + name: p.shape for name, p in part.named_parameters()}

    V, D, layers = config.vocab_size, config.hidden_size, range(config.num_hidden_layers)
    if isinstance(config, LlamaConfig):
        block, norm = llama_parts(config)
        shapes = {Llama.embedding: torch.Size((V, D))}
        for i in layers:
            shapes |= named(f"{Llama.layers}{i}.", block)
        shapes |= named("model.norm.", norm)
        return shapes if config.tie_word_embeddings else shapes | {Llama.decoder: torch.Size((V, D))}
    embed, block, head = roberta_parts(config)
    tables = {"word": V, "position": config.max_position_embeddings, "token_type": config.type_vocab_size}
    shapes = {f"roberta.embeddings.{t}_embeddings.weight": torch.Size((n, D)) for t, n in tables.items()}
    shapes |= named("roberta.embeddings.", embed)
    for i in layers:
        shapes |= named(f"{Roberta.layers}{i}.", block)
    shapes |= named("lm_head.", head)
    if config.tie_word_embeddings:
        return shapes | {"lm_head.bias": torch.Size((V,))}
    return shapes | {Roberta.decoder: torch.Size((V, D)), Roberta.bias: torch.Size((V,))}


def ignorable(name: str, config: LlamaConfig | RobertaConfig) -> bool:
    """The tensors that a checkpoint may hold and that mean nothing to us."""
    if name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids")):
        return True  # recomputed; older files carry them as buffers
    if name.startswith("roberta.pooler."):
        return True  # the sentence pooler, which the masked LM does not use
    if isinstance(config, RobertaConfig) and name in ("lm_head.bias", "lm_head.decoder.bias"):
        return True  # tied, they are one tensor; untied, only the decoder's is read
    return config.tie_word_embeddings and name in ("lm_head.weight", "lm_head.decoder.weight")


def stored_ties(directory: Path, config: LlamaConfig | RobertaConfig) -> tuple[bool, dict[str, str]]:
    """How a checkpoint whose config ties the output matrix to the embedding holds them, read as transformers reads it:
    -> whether they are the same, and the names in the files of tensors that have another name there.

    One matrix may have either name; two that differ are both used, whatever the config says.
    """
    files = checkpoints.find_tensors(directory, ignorable=lambda name: ignorable(name, config))
    kind, stored_as, tied = MODELS[type(config)], {}, True
    if kind.decoder in files and kind.embedding in files:
        shape = torch.Size((config.vocab_size, config.hidden_size))
        both = checkpoints.read_tensors(files, dict.fromkeys((kind.embedding, kind.decoder), shape))
        first, second = (tensor for _, tensor in both)
        tied = torch.equal(first.double(), second.double()) if first.dtype != second.dtype else first.equal(second)
    elif kind.decoder in files:
        stored_as[kind.embedding] = kind.decoder
    if kind.bias is not None:  # transformers uses the decoder's, where that is there
        stored_as["lm_head.bias" if tied else kind.bias] = kind.bias if kind.bias in files else "lm_head.bias"
    return tied, stored_as


def create(
    raw: dict, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32, weights: str = "fp32",
    residual: int = 0,
) -> LanguageModel:  # fmt: skip
    """A model with random weights from a config.json's contents: matrices N(0, 0.02^2), norms 1, biases 0.

    For pre-training, benchmarks and tests.  The numbers depend on the kind of device.
    """
    config = config_of(raw)
    stores = {}
    for name, shape in expected_shapes(config).items():
        generator = torch.Generator(device).manual_seed(tensor_id(f"{seed} {name}"))  # takes 32 bits of a seed
        is_matrix, is_bias = len(shape) == 2, name.endswith("bias")
        tensor = torch.full(shape, 1.0 - is_bias, device=device)
        if is_matrix:
            tensor.normal_(0.0, 0.02, generator=generator)
        stores[name] = encode(tensor, weights, residual)
    return MODELS[type(config)](config, raw, stores, dtype, weights, residual)


def load(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str | None = None,
    residual: int = 0,
    oracle: bool = False,
) -> LanguageModel:
    """Load a checkpoint directory: config.json and safetensors, one tensor at a time into its final store.

    weights is how matrices are stored (quant.FORMATS), residual the extra bits of integer codes; where weights is None,
    codes stay what they are and floats become fp32.  oracle keeps codes as fake-quantised fp32 (quant.FakeQuantised);
    dtype is what matrices are multiplied in.  Raises ValueError for anything missing, unexpected, wrongly shaped, not
    finite, corrupt, or of an unknown architecture.
    """
    directory, (config, raw), stored_as = Path(directory), read_config(directory), {}
    if weights is None:
        weights, residual = checkpoints.stored_format(raw) if checkpoints.holds_codes(directory) else ("fp32", 0)
    if config.tie_word_embeddings and not checkpoints.holds_codes(directory):
        tied, stored_as = stored_ties(directory, config)
        config, raw = replace(config, tie_word_embeddings=tied), raw | {"tie_word_embeddings": tied}
    stores = checkpoints.load_weights(
        directory, raw, expected_shapes(config), lambda name: ignorable(name, config), torch.device(device),
        weights, residual, oracle, stored_as,
    )  # fmt: skip
    assert len({tensor_id(name) for name in stores}) == len(stores)  # or two tensors would share their directions
    lm = MODELS[type(config)](config, raw, stores, dtype, weights, residual)
    lm.other_files = checkpoints.companion_files(directory)
    return lm
