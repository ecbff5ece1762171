"""Checkpoints as people have them: other families, other spellings, files that contradict each other.

The oracle is `transformers` reading the same directory, before and after we saved it; logits agree within 1e-4, as in
test_model.py, and ids are equal.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from helpers import (
    largest_gap,
    oracle_logits,
    padded_batch,
    random_oracle,
    read_oracle,
    review,
    tiny_llama,
    tiny_roberta,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from tokenizers import processors

from data.scoring import Encoder
from data.tasks import TASKS, Task
from data.tokenizer import Tokenizer
from model import create, load
from runtime.checkpoints import companion_files
from runtime.model_configs import config_of, read_config

TOLERANCE = 1e-4
ROOT = Path(__file__).parent.parent
SST2 = TASKS["sst2"]
TEXT = "a great film . It was terrible , it was great"


@pytest.fixture(autouse=True)
def auto_class_of_any_family(monkeypatch):
    def auto_class(raw: dict):
        masked = raw["model_type"] == "roberta"
        return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM

    monkeypatch.setattr(helpers, "auto_class", auto_class)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_config(directory: Path, **changes) -> None:
    write_json(directory / "config.json", json.loads((directory / "config.json").read_text()) | changes)


def edit_tensors(directory: Path, drop: tuple[str, ...] = (), **added: torch.Tensor) -> None:
    held = load_file(directory / "model.safetensors")
    kept = {name: tensor.clone() for name, tensor in held.items() if name not in drop}
    save_file(kept | added, directory / "model.safetensors", {"format": "pt"})


def same_logits(raw: dict, directory: Path, T: int = 12) -> None:
    """Ours of the directory and of what we save of it, and those of transformers of both, in every padding."""
    lm = load(directory)
    lm.save(directory.parent / "saved")
    for padding in ("no mask", "left", "right"):
        tokens, mask = padded_batch(raw, padding, T=T)
        want = oracle_logits(read_oracle(directory, raw), tokens, mask)
        assert largest_gap(lm(tokens, mask), want, mask) < TOLERANCE, padding
        assert largest_gap(oracle_logits(read_oracle(directory.parent / "saved", raw), tokens, mask), want, mask) < 1e-6


# ---------------------------------------------------------------- Mistral and Qwen2

FAMILIES = {
    "mistral": tiny_llama(model_type="mistral", sliding_window=None),
    "mistral within its window": tiny_llama(model_type="mistral", sliding_window=12, head_dim=16),
    "qwen2": tiny_llama(model_type="qwen2"),
    "tied qwen2 with a window": tiny_llama(
        model_type="qwen2", tie_word_embeddings=True, use_sliding_window=True, sliding_window=12, max_window_layers=1
    ),
    "qwen2 with a window that no layer has": tiny_llama(
        model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
}


@pytest.mark.parametrize("raw", FAMILIES.values(), ids=FAMILIES)
def test_other_families_give_the_logits_and_tokens_of_transformers(raw, tmp_path):
    oracle = random_oracle(raw, tmp_path / "m")
    same_logits(raw, tmp_path / "m")
    tokens, mask = padded_batch(raw, "left", T=5)
    want = oracle.generate(tokens, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(load(tmp_path / "m").generate(tokens, 7, mask), want)


@pytest.mark.parametrize("name", ["mistral within its window", "tied qwen2 with a window"])
def test_a_sequence_longer_than_the_sliding_window_is_refused(name):
    """Padding does not count.  The window does change logits there, so that to go on would be wrong."""
    lm = create(FAMILIES[name])
    assert lm.config.longest == 12
    tokens, mask = padded_batch(FAMILIES[name], "no mask", T=14)[0], torch.ones(3, 14, dtype=torch.long)
    for given in (None, mask):
        with pytest.raises(ValueError, match="14 tokens exceed the sliding window of 12"):
            lm(tokens, given)
    with pytest.raises(ValueError, match="13 tokens exceed the sliding window of 12"):
        lm.generate(tokens[:, :10], 5)
    mask[:, :2] = 0
    assert torch.allclose(lm(tokens, mask)[:, 2:], lm(tokens[:, 2:]), atol=1e-5)


def test_what_config_json_leaves_out_means_what_it_means_to_transformers(tmp_path):
    """A config of these sizes alone, and one with nulls; the window of a model that asks for none is none."""
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 56, "num_hidden_layers": 1}
    for kind, heads, names in (
        ("llama", 4, ()), ("mistral", 16, ("sliding_window",)), ("qwen2", 64, ()),
    ):  # fmt: skip
        raw = sizes | {"model_type": kind, "num_attention_heads": heads}
        theirs = transformers.AutoConfig.for_model(**raw)
        common = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                  "bos_token_id", "eos_token_id", "pad_token_id", *names)  # fmt: skip
        ours = config_of(raw)
        assert {name: getattr(ours, name) for name in common} == {name: getattr(theirs, name) for name in common}
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert config_of(raw | {"sliding_window": None, "bos_token_id": None}).longest == theirs.max_position_embeddings
    windows = [config_of(raw).sliding_window for raw in FAMILIES.values()]  # of a config without layer_types
    assert windows == [None, 12, None, 12, None]


# ---------------------------------------------------------------- output matrices

TIED = {"llama": tiny_llama(tie_word_embeddings=True), "roberta": tiny_roberta(),
        "qwen2": tiny_llama(model_type="qwen2", tie_word_embeddings=True)}  # fmt: skip


def names_of(raw: dict) -> tuple[str, str]:
    if raw["model_type"] == "roberta":
        return "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    return "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("raw", TIED.values(), ids=TIED)
@pytest.mark.parametrize("held", ["both, equal", "both, equal in another dtype", "both, different", "the output alone"])
def test_a_tied_config_is_read_by_what_the_file_holds(raw, held, tmp_path):
    """Different ones are both used, and what is saved says so."""
    random_oracle(raw, tmp_path / "m")
    embedding, output = names_of(raw)
    matrix = load_file(tmp_path / "m" / "model.safetensors")[embedding]
    if "dtype" in held:
        matrix = matrix.bfloat16().float()
        edit_tensors(tmp_path / "m", **{embedding: matrix})
    other = {"both, different": matrix.flip(0), "both, equal in another dtype": matrix.double()}.get(held, matrix)
    edit_tensors(tmp_path / "m", drop=(embedding,) * (held == "the output alone"), **{output: other.clone()})
    same_logits(raw, tmp_path / "m")
    lm = load(tmp_path / "saved")
    assert (output in lm.weights) == (held == "both, different") and embedding in lm.weights
    assert lm.raw_config["tie_word_embeddings"] == (held != "both, different")


@pytest.mark.parametrize("held", ["decoder alone", "different", "different matrices too", "matrices alone"])
def test_a_tied_roberta_has_the_decoders_bias_where_there_is_one(held, tmp_path):
    raw, (embedding, output) = TIED["roberta"], names_of(TIED["roberta"])
    random_oracle(raw, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    added = {} if held == "matrices alone" else {"lm_head.decoder.bias": tensors["lm_head.bias"].flip(0)}
    added |= {output: tensors[embedding].flip(0)} if "matrices" in held else {}
    edit_tensors(tmp_path / "m", drop=("lm_head.bias",) * (held == "decoder alone"), **added)
    same_logits(raw, tmp_path / "m")


def test_output_matrices_that_do_not_fit_or_are_in_no_file_are_refused(tmp_path):
    raw = TIED["llama"]
    random_oracle(raw, tmp_path)
    edit_tensors(tmp_path, **{"lm_head.weight": torch.zeros(98, 32)})
    with pytest.raises(ValueError, match=r"lm_head.weight is \[98, 32\], config.json makes it \[97, 32\]"):
        load(tmp_path)
    edit_tensors(tmp_path, drop=("lm_head.weight", "model.embed_tokens.weight"))
    with pytest.raises(ValueError, match="missing: model.embed_tokens.weight$"):
        load(tmp_path)


# ---------------------------------------------------------------- special tokens and tokenizer files


def trained_bpe() -> dict:
    """The vocabulary and merges of a byte-level BPE, with RoBERTa's special tokens at their places."""
    built = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    built.train_from_iterator([TEXT] * 20, 300, special_tokens=special, show_progress=False)
    return json.loads(built._tokenizer.to_str())["model"]


BPE = trained_bpe()
BEGIN = json.loads(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]).__getstate__())
BOTH_ENDS = json.loads(
    processors.TemplateProcessing(single="</s> $A <pad>", special_tokens=[("</s>", 2), ("<pad>", 1)]).__getstate__()
)
SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FAST, LLAMA_FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "LlamaTokenizerFast"}


def write_tokenizer_json(directory: Path, post_processor: dict | None) -> None:
    added = [{"id": BPE["vocab"][token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for token in ("<s>", "</s>", "<mask>")]  # fmt: skip
    file = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": SPLIT, "post_processor": post_processor, "decoder": SPLIT, "model": BPE}  # fmt: skip
    write_json(directory / "tokenizer.json", file)


def write_pieces(directory: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_prefix=str(directory / "tokenizer"), model_type="bpe",
        vocab_size=256 + 40, byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
    )  # fmt: skip
    (directory / "tokenizer.vocab").unlink()


def write_roberta(directory: Path) -> None:
    write_json(directory / "vocab.json", BPE["vocab"])
    merges = "".join(" ".join(pair) + "\n" for pair in BPE["merges"])
    (directory / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


END_OBJECT = {"__type": "AddedToken", "content": "</s>"}
CAUSAL = {  # tokenizer file and its post-processor, tokenizer_config.json, changes of config.json, what goes before
    "begin token, LLaMA-1's config": (BEGIN, FAST, {"bos_token_id": 1}, [0]),
    "begin token, null in config.json": (BEGIN, FAST, {"bos_token_id": None}, [0]),
    "begin token, no tokenizer_config.json": (BEGIN, None, {"bos_token_id": 1}, [0]),
    "begin token, add_bos_token false beside it": (BEGIN, FAST | {"add_bos_token": False}, {}, [0]),
    "begin token, in mistral": (BEGIN, None, {"model_type": "mistral", "bos_token_id": 1}, [0]),
    "begin token, in qwen2": (BEGIN, None, {"model_type": "qwen2", "bos_token_id": None}, [0]),
    "no processor": (None, FAST | {"bos_token": "<s>"}, {"bos_token_id": 0}, []),
    "no processor, add_bos_token": (None, FAST | {"add_bos_token": True, "bos_token": "<s>"}, {}, []),
    "no processor, no token anywhere": (None, None, {"bos_token_id": None}, []),
    "processor of bytes": (SPLIT, None, {"bos_token_id": 0}, []),
    "two processors": ({"type": "Sequence", "processors": [SPLIT, BEGIN]}, FAST, {"bos_token_id": 1}, [0]),
    "pieces": ("pieces", LLAMA_FAST | {"add_bos_token": True}, {"bos_token_id": 0}, [1]),
    "pieces, no begin token": ("pieces", LLAMA_FAST | {"add_bos_token": False}, {}, []),
    "pieces, nothing said": ("pieces", LLAMA_FAST, {}, []),
    "pieces, a token's object": ("pieces", LLAMA_FAST | {"add_bos_token": True, "bos_token": END_OBJECT}, {}, [2]),
    "pieces, null": ("pieces", LLAMA_FAST | {"add_bos_token": True, "bos_token": None}, {}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CAUSAL.values(), ids=CAUSAL)
def test_a_prompts_ids_are_those_of_transformers(case, tmp_path):
    """By the directory, and by what we save of it.  Short prompts, and one that is cut: the begin token stays."""
    file, settings, changes, begin = case
    create(tiny_llama(vocab_size=400) | changes).save(tmp_path / "m")
    write_pieces(tmp_path / "m") if file == "pieces" else write_tokenizer_json(tmp_path / "m", file)
    if settings is not None:
        write_json(tmp_path / "m" / "tokenizer_config.json", settings)
    load(tmp_path / "m").save(tmp_path / "saved")
    for directory in (tmp_path / "m", tmp_path / "saved"):
        config, theirs = read_config(directory)[0], transformers.AutoTokenizer.from_pretrained(directory)
        encode = Encoder(Tokenizer(directory), SST2, config, 64)
        for sentence in ("a great film", "it was terrible , a film"):
            example = review(sentence, 0)
            want = theirs(f"{sentence} It was").input_ids
            assert all(sequence[: len(want)] == want for sequence in encode(example).sequences)
            assert want[: len(begin)] == begin and want[len(begin)] > 2
        long = encode(review("great film , " * 40, 0)).sequences  # one alone is without its option, the 64th token
        assert len(long[0]) == 64 - (len(long) == 1) and long[0][: len(begin)] == begin


def test_an_end_token_has_no_place_before_an_option(tmp_path):
    """Which transformers puts at the end of every text."""
    write_tokenizer_json(tmp_path, BOTH_ENDS)
    tokenizer, prompt = Tokenizer(tmp_path), "a great film It was"
    write_json(tmp_path / "config.json", tiny_llama(vocab_size=400))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)(prompt).input_ids
    assert [*tokenizer.begin, *tokenizer.encode(prompt), *tokenizer.end] == theirs and tokenizer.end == [1]
    encoded = Encoder(tokenizer, SST2, config_of(tiny_llama(vocab_size=400)), 64)(review("a great film", 0))
    assert encoded.sequences[0] == theirs[:-1]


def test_a_begin_token_that_the_tokenizer_lacks_is_refused(tmp_path):
    write_pieces(tmp_path)
    for token in ("", "<|begin|>", 3):
        write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": True, "bos_token": token})
        with pytest.raises(ValueError, match=f"tokenizer_config.json: bos_token {token!r} is no piece of tokenizer"):
            Tokenizer(tmp_path)
    for text in ("[1]", "{", "null"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match="tokenizer_config.json is not a JSON object"):
            Tokenizer(tmp_path)


CLOZE = Task("t", cloze="{sentence} It was<mask>.", options={"0": " terrible", "1": " great"})
MASK_OBJECT = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
LATER = len(BPE["vocab"])
MASKED = {  # what else is there, and whether there is a tokenizer.json
    "bare": ({}, None),
    "saved long ago": ({"tokenizer_config.json": {}, "special_tokens_map.json": {"mask_token": MASK_OBJECT}}, None),
    "saved later": (
        {"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True,
                                   "added_tokens_decoder": {"4": MASK_OBJECT | {"special": True}}}}, None,
    ),
    "tokens added": ({"added_tokens.json": {"<film>": LATER + 1, "<an>": LATER}, "tokenizer_config.json": {}}, None),
    "tokenizer.json": ({"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}}, BEGIN),
    "tokenizer.json without a processor": ({}, "none"),
    "tokenizer.json with a processor that places nothing": ({}, SPLIT),
}  # fmt: skip


@pytest.mark.parametrize("files, post_processor", MASKED.values(), ids=MASKED)
def test_robertas_files_give_the_ids_of_transformers(files, post_processor, tmp_path):
    """Texts, a cloze text, and the ids of special tokens that are spelled out in a text."""
    create(tiny_roberta(vocab_size=400)).save(tmp_path / "m")
    if post_processor is None:
        write_roberta(tmp_path / "m")
    else:
        write_tokenizer_json(tmp_path / "m", None if post_processor == "none" else post_processor)
    for name, content in files.items():
        write_json(tmp_path / "m" / name, content)
    load(tmp_path / "m").save(tmp_path / "saved")
    for directory in (tmp_path / "m", tmp_path / "saved"):
        ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
        for text in (TEXT, " great", "naïve café, 中文, 😀", "  two  spaces ", "a <film> , a <mask> .", ""):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        encode = Encoder(ours, CLOZE, read_config(directory)[0], 64)
        assert encode(review("a great film", 0)).sequences == [theirs("a great film It was<mask>.").input_ids]
        assert ours.decode(ours.encode(TEXT)).strip() == TEXT


def test_another_models_vocab_json_and_broken_ones_are_refused(tmp_path):
    for name, content, message in (
        ("vocab.json", {"a": 0, "b": 1}, "vocab.json .* is not RoBERTa's, without </s>"),
        ("vocab.json", BPE["vocab"] | {"a": "b"}, "vocab.json is not a readable tokenizer"),
        ("added_tokens.json", {"<film>": 1000}, "'<film>' does not follow the ids of vocab.json"),
        ("tokenizer_config.json", {"mask_token": "[MASK]"}, r"without \[MASK\]"),
        ("merges.txt", None, "vocab.json is not a readable tokenizer: .*merges.txt is missing"),
    ):
        write_roberta(tmp_path)
        Tokenizer(tmp_path)
        (tmp_path / name).unlink(missing_ok=True) if content is None else write_json(tmp_path / name, content)
        with pytest.raises(ValueError, match=message):
            Tokenizer(tmp_path)
        (tmp_path / name).unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_git_lfs_pointer_is_named_as_such(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n")
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`"):
        Tokenizer(tmp_path)


# ---------------------------------------------------------------- what a saved directory holds

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def test_saving_takes_every_tokenizer_file_along_and_no_quantisation(tmp_path):
    """But nothing that is not a tokenizer's; and what is saved can be saved over."""
    create(tiny_llama()).save(tmp_path / "m")
    for name in (*FILES, "README.md", "pytorch_model.bin"):
        (tmp_path / "m" / name).write_text(f'{{"{name}": 1}}')
    edit_config(tmp_path / "m", quantization_config={"quant_method": "gptq", "bits": 4}, unknown={"kept": "é"})
    for _ in range(2):
        load(tmp_path / "m").save(tmp_path / "saved")
        files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
        assert set(files) == {*FILES, "config.json", "model.safetensors"}
        assert all(files[name] == (tmp_path / "m" / name).read_bytes() for name in FILES)
        config = json.loads(files["config.json"])
        assert "quantization_config" not in config and config["unknown"] == {"kept": "é"}
    assert {path.name for path in companion_files(tmp_path / "m")} == set(FILES)


PROGRAM = """
import json, sys
from data.tokenizer import Tokenizer
from model import load
for directory in sys.argv[1:]:
    print(json.dumps([Tokenizer(directory).encode("caf\\u00e9 \\u4e2d"), load(directory).raw_config["author"]]))
load(sys.argv[1]).save(sys.argv[1] + "-saved")
"""


def test_files_are_read_as_utf_8_in_any_locale(tmp_path):
    """Written as they are, not as \\u escapes, by us or by others: config, index, tokenizer files."""
    directories = tmp_path / "roberta", tmp_path / "llama"
    raws = tiny_roberta(vocab_size=400), tiny_llama(vocab_size=400)
    for directory, raw, write in zip(directories, raws, (write_roberta, write_pieces), strict=True):
        create(raw | {"author": "José"}).save(directory)
        write(directory)
        for name in ("config.json", "vocab.json"):
            if (directory / name).is_file():
                text = json.dumps(json.loads((directory / name).read_text(encoding="utf-8")), ensure_ascii=False)
                (directory / name).write_text(text, encoding="utf-8")
        settings = {"tokenizer_class": "é", "bos_token": "<s>", "extra": "中"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    env = {"PATH": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    env |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    command = [sys.executable, "-c", PROGRAM, *map(str, directories)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want = [[Tokenizer(directory).encode("café 中"), "José"] for directory in directories]
    assert [json.loads(line) for line in done.stdout.splitlines()] == want
    assert json.loads((tmp_path / "roberta-saved" / "config.json").read_text())["author"] == "José"


# ---------------------------------------------------------------- real files


def test_what_we_do_with_home_made_files_stays(real_model):
    """They have no tokenizer_config.json: transformers 5 would put no token before a text, and they were trained with
    one.  RoBERTa's says it in its tokenizer.json."""
    ends = [(t.begin, t.end) for t in (Tokenizer(real_model("zollama-28m")), Tokenizer(real_model("zoroberta-26m")))]
    assert ends == [([1], []), ([0], [2])]
    tiny = ROOT / "data" / "tiny" / "model"
    assert Encoder(Tokenizer(tiny), TASKS["tiny"], read_config(tiny)[0], 64).begin == [0]


@pytest.mark.full
def test_a_lone_tokenizer_model_is_exported_with_what_transformers_must_know(real_model, tmp_path):
    """Its class, without which no space would go before a text, and its begin token."""
    directory = real_model("zollama-28m")
    load(directory).save(tmp_path / "saved")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"), Tokenizer(tmp_path / "saved")
    for text in ("Dana Reeve, it\nis", "Hello world", "caf\u00e9 (1.5)"):
        assert theirs.encode(text) == ours.begin + ours.encode(text) == [1, *Tokenizer(directory).encode(text)]
    load(tmp_path / "saved").save(tmp_path / "again")
    assert (tmp_path / "again/tokenizer_config.json").read_text() == (
        tmp_path / "saved/tokenizer_config.json"
    ).read_text()
