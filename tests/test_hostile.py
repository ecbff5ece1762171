"""Files that others wrote and nobody expects: each is refused in one line, and none takes memory or time.

Every case is a kind of fault that tests/fuzz/fuzz.py has found, or that reading the code for others like it has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import tiny_llama, tiny_roberta
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import train
from data import files
from data.files import read_rows
from data.metrics import check_metric
from data.tasks import TASKS, TINY, Row, Task, get_task
from data.tokenizer import Tokenizer
from model import create, load
from runtime import json_files
from runtime.checkpoints import companion_files, load_weights, stored_format
from runtime.json_files import read_object
from runtime.model_configs import config_of

ROOT = Path(__file__).parent.parent
DEEP = "[" * 50_000 + "]" * 50_000


def refused(act, *words: str) -> str:
    """What is said, in a line of a length that can be read."""
    with pytest.raises(ValueError) as caught:
        act()
    message = str(caught.value)
    assert len(message) < 1000 and "\n" not in message and all(word in message for word in words), message
    return message


# ---------------------------------------------------------------- JSON

JSON = {  # what is in the file: what is said of it
    DEEP: "nested more than 64 deep",
    '{"a": ' + "[" * 70 + "]" * 70 + "}": "nested more than 64 deep",
    '{"a": "\\ud800"}': "half of a character",
    '["' + "x" * 100_000 + '"]': "of 100,004 characters",
    '{"a": ' + "9" * 5000 + "}": "Exceeds the limit",
    "": "Expecting value",
}


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_json_that_is_no_small_object_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    refused(lambda: read_object(path), str(path), "is not a JSON object", JSON[text])


def test_json_of_many_values_or_bytes_is_refused_unparsed(tmp_path, monkeypatch):
    """What it would take in memory is many times its size; a file that is all hole takes no disk here."""
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(200 * 10**6)
    refused(lambda: read_object(path), "it has 191 MB; at most 32")
    monkeypatch.setattr(json_files, "MOST_VALUES", 9)
    path.write_text('{"a": [[],[],[],[],[]]}')
    refused(lambda: read_object(path), "more than 9 values")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    refused(lambda: read_object(tmp_path / "config.json"), "is missing or no file")


# ---------------------------------------------------------------- config.json

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
CONFIGS = {  # what is said, and of what
    "num_hidden_layers 1000000000 is not a usable int from 1 to 1,000": tiny_llama(num_hidden_layers=10**9),
    "hidden_size 1099511627776 is not a usable int": tiny_llama(hidden_size=2**40),
    "vocab_size 1000": tiny_llama(vocab_size=10**400),
    "type_vocab_size 4294967296 is": tiny_roberta(type_vocab_size=2**32),
    "rms_norm_eps 1e+308 is": tiny_llama(rms_norm_eps=1e308),
    "rope_factor 1000": tiny_llama(rope_parameters=YARN | {"factor": 10**400}),
    "rope_beta_fast 1e-320 is": tiny_llama(rope_parameters=YARN | {"beta_fast": 1e-320}),
    "low_freq_factor 4.0 must be below high_freq_factor 4.0": tiny_llama(
        rope_parameters=LLAMA3 | {"low_freq_factor": 4.0}
    ),
    "head_dim must be even and above 2": tiny_llama(
        head_dim=2, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "hidden_size 1 is less than num_attention_heads 4": tiny_llama(hidden_size=1),
    "max_position_embeddings 2 leaves no position": tiny_roberta(max_position_embeddings=2),
    "layer_types must be a list": tiny_llama(model_type="qwen2", use_sliding_window=True, layer_types=7),
    "max_window_layers must be an int": tiny_llama(model_type="qwen2", use_sliding_window=True, max_window_layers="7"),
    "rope scaling ['yarn'] is not supported": tiny_llama(rope_parameters=YARN | {"rope_type": ["yarn"]}),
    "of 300,000 characters": tiny_llama(eos_token_id=[True] * 50_000),
}  # fmt: skip


@pytest.mark.parametrize("message", CONFIGS)
def test_a_config_that_no_model_has_is_refused(message):
    refused(lambda: config_of(CONFIGS[message]), message)


@pytest.mark.parametrize("held", [{"weights": ["int8"], "residual": 0}, {"weights": "int8", "residual": []}, 3, DEEP])
def test_a_format_of_codes_that_is_none_is_no_format(held, tmp_path):
    lm = create(tiny_llama(), weights="int8")
    train.save(lm, tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text()) | {"codes": held}
    assert stored_format(raw) == ("fp32", 0)
    shapes = {name: torch.Size(stored.shape) for name, stored in lm.weights.items()}
    wanted = tmp_path / "m", raw, shapes, lambda name: False, torch.device("cpu"), "int8"
    refused(lambda: load_weights(*wanted), "must say what the codes are")


@pytest.mark.parametrize("weight_map", [3, ["a"], {"a": 3}, {"a": "x" * 100_000}, {"a": "m\0.safetensors"}])
def test_an_index_of_the_wrong_types_is_refused(weight_map, tmp_path):
    create(tiny_llama()).save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(lambda: load(tmp_path / "m"), "model.safetensors.index.json")


# ---------------------------------------------------------------- tokenizers


def words(**changes) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<s>": 2}, "<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, value in changes.items():
        setattr(built, name, value)
    return built


def byte_pairs() -> tokenizers.Tokenizer:
    built = tokenizers.ByteLevelBPETokenizer()
    built.train_from_iterator(["a great film"] * 9, 270, special_tokens=["<s>"], show_progress=False)
    return built._tokenizer


BYTE_PAIRS = byte_pairs()
TEMPLATE = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
CUT = decoders.Sequence([decoders.Replace("<unk>", ""), decoders.Strip("_", 0, 0)])
DOUBLED = normalizers.Sequence([normalizers.Replace("a", "aa")] * 30)  # 2^30 times as long, two bytes a time
TOKENIZERS = {  # a tokenizer.json, a text in it and what stands there instead
    "a prefix that pieces lack": (BYTE_PAIRS, '"continuing_subword_prefix":null', '"continuing_subword_prefix":"long"'),
    "a template's token that is nowhere": (words(post_processor=TEMPLATE), '"<s>":{"id":"<s>"', '"x":{"id":"x"'),
    "a decoder that cuts beyond the end": (words(decoder=CUT), '"stop":0', '"stop":1'),
    "a normalizer that doubles": (words(normalizer=DOUBLED), "", ""),
    "a decoder that multiplies": (words(decoder=decoders.Sequence([decoders.Replace("a", "a" * 100)])), "", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_panics_or_explodes_is_refused_without_a_word_on_standard_error(case, tmp_path, capfd):
    built, old, new = TOKENIZERS[case]
    text = built.to_str()
    assert old in text
    (tmp_path / "tokenizer.json").write_text(text.replace(old, new) if old else text)
    refused(lambda: Tokenizer(tmp_path), "tokenizer.json is not a readable tokenizer")
    assert capfd.readouterr().err == ""


def test_a_tokenizer_that_cannot_spell_a_text_says_so(tmp_path):
    text = words().to_str()
    (tmp_path / "tokenizer.json").write_text(text.replace('"unk_token":"<unk>"', '"unk_token":"nowhere"'))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a") == [1]
    for act in (lambda: tokenizer.encode("film"), lambda: tokenizer.encode_all(["a", "film"])):
        refused(act, "tokenizer.json cannot be used")


@pytest.mark.parametrize("wrong", [2**63, 2**32, -1, 1.5, True, None, 0], ids=str)
def test_ids_of_pieces_that_tokenizers_would_wrap_or_drop_are_refused(wrong, tmp_path):
    model, pieces = json.loads(BYTE_PAIRS.to_str())["model"], BYTE_PAIRS.get_vocab()
    pieces |= {name: len(pieces) + i for i, name in enumerate(("</s>", "<unk>", "<pad>", "<mask>"))}
    (tmp_path / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (tmp_path / "vocab.json").write_text(json.dumps(pieces))
    Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(pieces | {"x!": wrong}))
    refused(lambda: Tokenizer(tmp_path), "vocab.json is not a readable tokenizer", "different numbers")
    (tmp_path / "vocab.json").write_text(json.dumps(pieces))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": [1]}}))
    refused(lambda: Tokenizer(tmp_path), "mask_token {'content': [1]} has no spelling")


def test_a_tokenizers_file_beyond_any_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10**9)
    refused(lambda: Tokenizer(tmp_path), "has 954 MB; at most 128 are read")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text("pieces")
    lm = create(tiny_llama())
    lm.other_files = companion_files(tmp_path)
    lm.save(tmp_path / "saved")  # as it is: who needs it is told
    refused(lambda: Tokenizer(tmp_path / "saved"), "tokenizer.model is not a readable tokenizer")


# ---------------------------------------------------------------- files of examples, and tasks

TABLE = Task("t", "{sentence} It was", options={"0": " bad", "1": " good"})
LISTED = Task("t", "{sentence} ->", options="choices")
ROWS = {  # file: (its task, its contents, what is said)
    "a.jsonl": (TABLE, f'{{"sentence": {DEEP}, "label": 0}}', ":1: not JSON: lists and objects are nested"),
    "b.jsonl": (TABLE, '{"sentence": "\\ud800", "label": 0}', ":1: not JSON: a text in it holds half of a character"),
    "c.jsonl": (LISTED, json.dumps({"sentence": "a", "choices": ["a", "b"], "label": "\u00b2"}), "one of 0 to 1"),
    "d.jsonl": (LISTED, json.dumps({"sentence": "a", "choices": ["a", "b"], "label": "9" * 6000}), "one of 0 to 1"),
    "e.jsonl": (TABLE, json.dumps({"sentence": "a", "label": list(range(10**5))}), "must be one of '0', '1'"),
    "f.jsonl": (TABLE, json.dumps({f"column {i}": 1 for i in range(10**4)}), "there is no field 'sentence'"),
    "g.tsv": (TABLE, "\t".join(map(str, range(10**4))) + "\n1\n", "expected 10000 columns"),
    "h.csv": (TABLE, "a,b," * 10**4 + "\n1\n", "two columns have the same name"),
    "i.jsonl": (TABLE, json.dumps({"sentence": "a", "more": ["x" * (2**20 + 1)], "label": 0}), "at most 1,048,576"),
    "j.csv": (TABLE, 'sentence,label\n"a,0\n' + "b,1\n" * 99, ":2: a quote that begins here does not end well"),
    "k.jsonl": (TASKS["multirc"], '{"passage": {"questions": [3]}, "idx": 0}', "not in the layout of multirc"),
    "l.json": (TASKS["squad"], DEEP, "not JSON: lists and objects are nested"),
    "m.json": (TASKS["drop"], '{"p": {"qa_pairs": [[]]}}', "not in the layout of drop"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_examples_that_nobody_expects_is_refused_with_its_place(name, tmp_path):
    task, text, message = ROWS[name]
    (tmp_path / name).write_text(text)
    refused(lambda: [task.example(row, False) for row in read_rows(tmp_path / name, task)], f"{name}", message)


def test_lines_and_examples_are_counted_before_they_fill_the_memory(tmp_path, monkeypatch):
    """A file of 300 MB that is one line is not read to its end."""
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(300 * 10**6)
        refused(lambda path=tmp_path / name: read_rows(path, TABLE), "a line has 33,554,432 characters or more")
    monkeypatch.setattr(files, "MOST_ROWS", 2)
    (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + "a\t0\n" * 3)
    refused(lambda: read_rows(tmp_path / "a.tsv", TABLE), "holds more than 2 examples")


FILES = {"train": "a.csv", "test": "b.csv"}
GOOD = {"prompt": "{text} it was", "options": {"0": " bad", "1": " good"}, "files": FILES}
OWN = {  # what is said, and of what
    "passage: prompt has no field 'text'": {"prompt": "{{text}} {other}", "passage": "text"},
    "num_dev must be number from 1 to": {"num_dev": -1},
    "two columns have the same name": {"columns": ["a", "a"]},
    "of 100,002 characters; known": {"x" * 100_000: 1},
    "metric must be text, got [1, 1": {"metric": [1] * 100_000},
    "unknown filter 'xxx": {"prompt": "{text:" + "x" * 100_000 + "}"},
    "prompt: 'a.__class__' is no plain name": {"prompt": "{a.__class__}"},
    "prompt: unknown filter '>999999999'": {"prompt": "{text:>999999999}"},
    "half of a character": {"prompt": "\ud800 {text}"},
}


@pytest.mark.parametrize("message", OWN)
def test_a_task_that_nobody_expects_is_refused(message, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD | OWN[message]))
    refused(lambda: get_task(str(path)), str(path), message)


def test_a_deep_task_and_one_that_is_no_file_are_refused(tmp_path):
    (tmp_path / "deep.json").write_text(DEEP)
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("deep", "folder", "pipe"):
        refused(lambda path=tmp_path / f"{name}.json": get_task(str(path)), f"{name}.json")


def test_a_passage_may_be_a_part_of_a_field_and_texts_are_bounded():
    example = Task("t", "{words[0]} it was", options={"0": " bad", "1": " good"}).example
    assert example(Row("here", {"words": ["fine"], "label": "1"}), False).passage == 0
    long = Task("t", "{text}" * 100, options={"0": " bad", "1": " good"}).example
    refused(lambda: long(Row("here", {"text": "x" * 2**20, "label": 1}), False), "more than 8,388,608 characters")


def test_a_metric_that_exits_is_refused(tmp_path, monkeypatch):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('gone')\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(lambda: check_metric("leaves:metric", True), "gone")


# ---------------------------------------------------------------- whole commands


def asked(capfd, *argv: str) -> str:
    """The one line that a refused command prints."""
    assert train.main([*argv, "--task", "tiny", "--num-eval", "4", "--device", "cpu"]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith("train.py: ") and len(said.err) <= 501 and said.err.count("\n") == 1
    return said.err


def tiny_with(tmp_path: Path, raw: dict, value: float = 1.0) -> str:
    """A directory with the embedded model's tokenizer, and a model whose norms are this many times as large."""
    lm = create(raw)
    for stored in lm.weights.values():
        if stored.value.ndim == 1:
            stored.value.mul_(value).clamp_(-3e38, 3e38)
    lm.other_files = companion_files(TINY / "model")
    lm.save(tmp_path / "m")
    return str(tmp_path / "m")


def test_scores_that_are_not_finite_are_no_evaluation(tmp_path, capfd):
    directory = tiny_with(tmp_path, tiny_llama(vocab_size=400), 1e40)
    assert "gives no finite scores" in asked(capfd, "--evaluate", directory)


@pytest.mark.parametrize("raw, text, message", [
    (tiny_llama(vocab_size=400, bos_token_id=None), "", "no token"),
    (tiny_llama(vocab_size=3), "great", "is outside the model's vocabulary of 3"),
], ids=["nothing", "outside"])  # fmt: skip
def test_a_text_that_cannot_be_continued_is_refused(raw, text, message, tmp_path, capfd):
    assert message in asked(capfd, "--evaluate", tiny_with(tmp_path, raw), "--generate", text)


@pytest.mark.full
def test_a_thousandth_of_all_input_ends_well():
    """The fuzzer, from a fixed seed; its lines say how to see a fault again."""
    command = [sys.executable, "-m", "tests.fuzz.fuzz", "--count", "6", "--minutes", "3", "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
