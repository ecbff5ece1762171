"""Hostile input, made at random from a seed, for train.main: each must end well, in a line or in a right result.

    python -m tests.fuzz.fuzz --minutes 3 --seed 0 --kinds models data flags runs
    python -m tests.fuzz.fuzz --kinds models --seed 0 --only 17 --show       # one input again, with what it printed

An input ends well where the exit code is 0, with JSON of finite numbers on standard output, or 1 or 2 with one line of
at most 500 characters on standard error besides progress; within 20 seconds and 2 GB, and never with a traceback.  Each
runs in a forked process, so that crashes, memory and time are its own.  No network is used.  Prints a table by kind and
one line for each fault; what is written goes into a temporary folder.  Exit code 1 where there are faults.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, normalizers, pre_tokenizers, processors

import train
from data.tasks import TASKS, TINY
from model import create
from runtime import checkpoints
from runtime.checkpoints import save_stored
from runtime.flags import METHODS, Config

try:
    import helpers  # the tests' folder is on the path in pytest alone
except ImportError:
    sys.path.append(str(Path(__file__).parent.parent))
    import helpers

SECONDS, BYTES, LINE = 20, 2 * 10**9, 500  # the most that an input may take, and that a message may have
ADDRESS_SPACE = 8 * 2**30  # beyond which a process gets no memory, so that a fault takes no machine down
Random = random.Random


class Input(NamedTuple):
    what: str  # what was changed
    argv: list[str]


class Outcome(NamedTuple):
    code: int
    fault: str | None  # what is wrong, with the place where it was raised
    seconds: float
    grown: int  # bytes by which the process's peak memory is above that of its parent
    stdout: str
    stderr: str


# ---------------------------------------------------------------- values and texts that nobody expects

DEEP, DIGITS, HUGE = "@deep", "@digits", "@1e999"  # stand for JSON that json.dumps does not write
SPELLED = {f'"{DEEP}"': "[" * 50000 + "]" * 50000, f'"{DIGITS}"': "9" * 6000, f'"{HUGE}"': "1e999"}
ODD = (
    None, [], {}, [[]], [None], {"": {}}, "", " ", "x", "0", "-1", "1e5", "\ud800", "\x00", "\u202e", "x" * 100_000,
    "../../x", "/etc/passwd", True, False, math.nan, math.inf, -math.inf, -1, 0, 1, 2, 3, 7, 0.5, -0.5, 1e-320, 1e308,
    2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**9, 10**400, -(10**400), [1, 2, 3], [1] * 1000, {"a": 1}, ["x"],
    DEEP, DIGITS, HUGE,
)  # fmt: skip


def dumped(value: Any) -> str:
    text = json.dumps(value)
    for mark, spelled in SPELLED.items():
        text = text.replace(mark, spelled)
    return text


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of everything that a JSON value holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in items:
        yield (*path, key)
        yield from places(held, (*path, key))


def changed(rng: Random, value: Any) -> tuple[str, Any]:
    """A JSON value with one to three of its places changed, shallow ones more often."""
    value, said = json.loads(json.dumps(value)), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found or rng.random() < 0.03:
            value = copy.deepcopy(rng.choice(ODD))
            said.append(f"all = {value!r:.40}")
            continue
        found.sort(key=len)
        path = found[min(int(len(found) * rng.random() ** 2), len(found) - 1)]
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        odd = copy.deepcopy(rng.choice(ODD))  # a later change may be within it
        if rng.random() < 0.2:
            del holder[path[-1]]
            said.append(f"{path} deleted")
        elif rng.random() < 0.15 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "__class__", "\ud800", "self"))] = odd
            said.append(f"{path[:-1]} has another {odd!r:.40}")
        elif rng.random() < 0.2 and isinstance(holder[path[-1]], int | float):
            holder[path[-1]] = rng.choice((-1, 0, 1, 2, 10**6, 10**12)) * holder[path[-1]] + rng.choice((-1, 0, 1))
            said.append(f"{path} = {holder[path[-1]]}")
        else:
            holder[path[-1]] = odd
            said.append(f"{path} = {odd!r:.40}")
    return "; ".join(said), value


def damaged(rng: Random, data: bytes) -> tuple[str, bytes]:
    """Bytes with one kind of damage."""
    at, size = rng.randrange(len(data) + 1), rng.randrange(1, 64)
    ways: dict[str, Callable[[], bytes]] = {
        "flipped": lambda: bytes(b ^ (1 << rng.randrange(8)) if rng.random() < 2 / len(data) else b for b in data),
        "truncated": lambda: data[:at],
        "beheaded": lambda: data[at:],
        "cut out": lambda: data[:at] + data[at + size :],
        "NULs": lambda: data[:at] + bytes(size) + data[at:],
        "garbage": lambda: rng.randbytes(size),
        "garbage within": lambda: data[:at] + rng.randbytes(size) + data[at + size :],
        "empty": lambda: b"",
        "BOM": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode("utf-8", "replace").encode("utf-16"),
        "Latin-1": lambda: data[:at] + b"caf\xe9" + data[at:],
        "CRLF": lambda: data.replace(b"\n", b"\r\n"),
        "CR": lambda: data.replace(b"\n", b"\r"),
        "twice": lambda: data + data,
        "a quote": lambda: data[:at] + b'"' + data[at:],
        "a bracket": lambda: data[:at] + rng.choice((b"[", b"{", b"}", b"]", b",", b":")) + data[at:],
        "a surrogate": lambda: data[:at] + b"\\ud800" + data[at:],
        "deep": lambda: b"[" * 50000 + data,
        "a long field": lambda: data[:at] + b"x" * 2**21 + data[at:],
        "control characters": lambda: data[:at] + bytes(range(1, 32)) + data[at:],
    }
    way = rng.choice(list(ways) if data else ["empty", "garbage", "deep"])
    return way, ways[way]()


def replaced(rng: Random, path: Path) -> str:
    """Something that is no file of the kind in the place of a file."""
    way = rng.choice(("missing", "a folder", "a link to itself", "a broken link", "200 MB", "a pipe", "a device"))
    path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way == "a pipe":
        os.mkfifo(path)
    elif way == "200 MB":
        with path.open("wb") as file:
            file.write(rng.choice((b"", b'{"a": "', b"[[],", b"sentence\tlabel\n")))
            file.truncate(200 * 10**6)
    elif way != "missing":
        path.symlink_to({"a link to itself": path, "a broken link": "nowhere", "a device": "/dev/zero"}[way])
    return way


def change_file(rng: Random, path: Path) -> str:
    """Change a file in one of the ways above; JSON mostly stays JSON."""
    if rng.random() < 0.07:
        return f"{path.name}: {replaced(rng, path)}"
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        way, data = change_safetensors(rng, path, data)
    elif path.suffix == ".json" and rng.random() < 0.7:
        way, value = changed(rng, json.loads(data))
        data = dumped(value).encode("utf-8", "surrogatepass")
    elif path.suffix == ".jsonl" and rng.random() < 0.6:
        lines = data.decode().splitlines()
        at = rng.randrange(len(lines))
        way, value = changed(rng, json.loads(lines[at]))
        data = "\n".join([*lines[:at], dumped(value), *lines[at + 1 :]]).encode("utf-8", "surrogatepass")
    else:
        way, data = damaged(rng, data)
    path.write_bytes(data)
    return f"{path.name}: {way}"


def change_safetensors(rng: Random, path: Path, data: bytes) -> tuple[str, bytes]:
    """Bytes, the header, or tensors that are well kept but not those that are wanted."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.random()
    if kind < 0.2:
        return damaged(rng, data)
    if kind < 0.5:
        way, header = changed(rng, json.loads(data[8 : 8 + length]))
        text = dumped(header).encode("utf-8", "surrogatepass")
        size = rng.choice((len(text), len(text), len(text), 0, 1, 2**63, 2**64 - 1, 10**8, len(data)))
        return f"header of {size}: {way}", struct.pack("<Q", size) + text + data[8 + length :]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = rng.choice(sorted(tensors))
    way = rng.choice(("NaN", "inf", "huge", "zero", "missing", "another", "transposed", "fewer", "none", "dtype"))
    tensor, dtypes = tensors.pop(name), (torch.int8, torch.int64, torch.bool, torch.float16, torch.complex64)
    new = {
        "missing": [], "another": [(name, tensor), (f"{name}.x", tensor.clone())], "fewer": [(name, tensor[:1])],
        "transposed": [(name, tensor.T.contiguous())] if tensor.ndim == 2 else [(name, tensor[None])],
        "none": [(name, tensor[:0])], "dtype": [(name, tensor.to(rng.choice(dtypes)))], "zero": [(name, tensor * 0)],
    }  # fmt: skip
    value = {"NaN": math.nan, "inf": math.inf, "huge": 3e38}.get(way)
    if value is not None:
        tensor = tensor.float()
        tensor.view(-1)[:: rng.choice((1, 7, 10**9))] = value
    save_file(tensors | {n: t.clone() for n, t in new.get(way, [(name, tensor)])}, path)
    return f"{name} {way}", path.read_bytes()


# ---------------------------------------------------------------- good input, of which the bad is made

SENTENCES = ("a great film", "it was terrible", "dull and slow", "a fine cast , a fine plot", "not bad at all", "awful",
             "I liked it", "a mess")  # fmt: skip
PROMPT = {"prompt": "{sentence:strip} it was", "cloze": "{sentence:strip} It was<mask>.", "num_dev": 3,
          "options": {"0": " terrible", "1": " great"}, "label": "label", "passage": "sentence"}  # fmt: skip
OWN_TASKS = {
    "own": PROMPT | {"files": {"train": "train.jsonl", "dev": "dev.csv", "test": "test.tsv"}},
    "drawn": PROMPT | {"files": {"train": "train.jsonl", "test": "test.tsv"}, "metric": "f1_macro"},
    "choice": {"prompt": "{sentence} ->", "options": ["{a}", " {b:lower|strip}"], "label": "right", "loss": "answer",
               "files": {"train": "choice.jsonl", "dev": "choice.jsonl", "test": "choice.jsonl"}},
    "listed": {"prompt": "{sentence} ->", "options": "choices", "label": "rights", "names": "choices", "group": "a",
               "also": ["f1", "exact_questions"], "rename": {"b": "c"},
               "files": {"train": "choice.jsonl", "dev": "choice.jsonl", "test": "choice.jsonl"}},
    "written": {"prompt": "{sentence} ?", "answer": " {answers}\n", "label": "answers", "metric": "f1",
                "also": ["exact_match"],
                "files": {"train": "choice.jsonl", "dev": "choice.jsonl", "test": "choice.jsonl"}},
}  # fmt: skip
TEMPLATES = (
    "{sentence", "sentence}", "{}", "{0}", "{sentence!r}", "{sentence.__class__}", "{sentence[0]}", "{sentence[_a]}",
    "{sentence:>999999999}", "{sentence:{sentence}}", "{" * 5000, "{{{{sentence}}}}", "{sentence:strip|strip|nope}",
    "{sentence[" * 2000, "{label}", "{choices[9]}", "{sentence:conjunction}", "", "{a" + "[x]" * 5000 + "}",
    "\ud800{sentence}", "{choices[99999999999999999999]}", "{sentence:strip|lower|without_last}",
    "<mask>{sentence}<mask>", "{sentence}" * 20000, "{sentence:" + "strip|" * 20000 + "}", "x" * 2**20 + "{sentence}",
)  # fmt: skip
SPAN = {"start": 0, "end": 4}
OFFICIAL: dict[str, tuple[str, Any]] = {  # task: its training file, and some of its contents; lists are lines
    "multirc": ("MultiRC/train.jsonl", [{"idx": i, "passage": {"text": "A b c.", "questions": [
        {"idx": 0, "question": "Who?", "answers": [{"text": "b", "label": 1, "idx": 0},
                                                  {"text": "c", "label": 0, "idx": 1}]}]}} for i in range(8)]),
    "record": ("ReCoRD/train.jsonl", [{"passage": {"text": "Maria shot him. Nuria waits.", "entities": [
        SPAN, {"start": 16, "end": 20}]}, "qas": [{"query": "@placeholder ran", "answers": [{"text": "Maria"}]}]}] * 8),
    "squad": ("squad/train-v1.1.json", {"data": [{"title": "T", "paragraphs": [{"context": "Denver won.", "qas": [
        {"id": str(i), "question": "Who?", "answers": [{"text": "Denver", "answer_start": 0}]} for i in range(8)]}]}]}),
    "drop": ("drop/drop_dataset_train.json", {"p": {"passage": "Denver won 3.", "qa_pairs": [
        {"query_id": str(i), "question": "How many?", "answer": {"number": "3", "date": {"day": "", "month": "",
         "year": ""}, "spans": []}, "validated_answers": [{"number": "", "date": {"day": "1", "month": "May",
         "year": "1990"}, "spans": ["x"]}]} for i in range(8)]}}),
    "wsc": ("WSC/train.jsonl", [{"text": "Mark told Pete. He lied.", "label": False, "target": {
        "span1_text": "Mark", "span2_text": "He"}}] * 8),
    "copa": ("COPA/train.jsonl", [{"premise": "It rained.", "choice1": "A b.", "choice2": "I c.", "question": "cause",
                                   "label": 0}] * 8),
    "boolq": ("BoolQ/train.jsonl", [{"passage": "Tax.", "question": "is it", "label": True}] * 8),
    "rte": ("RTE/train.jsonl", [{"premise": "A b.", "hypothesis": "b", "label": "entailment"}] * 8),
    "sst2": ("SST-2/train.tsv", "sentence\tlabel\n" + "a great film\t1\nawful\t0\n" * 4),
    "trec": ("trec/train.csv", '0,what is it ?\n1,"who, me ?"\n2,a b\n3,c d\n' * 2),
}  # fmt: skip
TESTS = {"multirc": "val.jsonl", "record": "val.jsonl", "squad": "dev-v1.1.json", "drop": "drop_dataset_dev.json",
         "wsc": "val.jsonl", "copa": "val.jsonl", "boolq": "val.jsonl", "rte": "val.jsonl", "sst2": "dev.tsv",
         "trec": "test.csv"}  # fmt: skip


def write_data(folder: Path) -> None:
    """A file of every layout, and tasks of a user's own."""
    folder.mkdir()
    rows = [{"sentence": text, "label": str(i % 2)} for i, text in enumerate(SENTENCES)]
    choices = [{"sentence": text, "a": "yes", "b": " No", "right": i % 2, "choices": ["one", "two"], "rights": [i % 2],
                "answers": ["one", "two"]} for i, text in enumerate(SENTENCES)]  # fmt: skip
    for name, lines in (("train", rows), ("choice", choices)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "dev.csv").write_text("sentence,label\n" + "".join(f'"{r["sentence"]}",{r["label"]}\n' for r in rows))
    (folder / "test.tsv").write_text("sentence\tlabel\n" + "".join(f"{r['sentence']}\t{r['label']}\n" for r in rows))
    for name, task in OWN_TASKS.items():
        (folder / f"{name}.json").write_text(json.dumps(task))
    for name, (file, contents) in OFFICIAL.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        text = contents if isinstance(contents, str) else "".join(
            json.dumps(value) + "\n" for value in (contents if isinstance(contents, list) else [contents]))  # fmt: skip
        for each in (path, path.with_name(TESTS[name])):
            each.write_text(text)


def write_models(folder: Path) -> None:
    """A model directory with each kind of tokenizer and of weights, of 2 layers and 32 wide."""
    folder.mkdir()
    shutil.copy(TINY / "model" / "tokenizer.json", folder)
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    llama = create(helpers.tiny_llama(vocab_size=size))
    llama.other_files = [folder / "tokenizer.json"]
    llama.save(folder / "llama")
    for name, contents in (("tokenizer_config", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}),
                           ("generation_config", {"eos_token_id": 2, "max_length": 20})):  # fmt: skip
        (folder / "llama" / f"{name}.json").write_text(json.dumps(contents))
    shards, checkpoints.SHARD_BYTES = checkpoints.SHARD_BYTES, 20_000
    llama.save(folder / "shards")
    checkpoints.SHARD_BYTES = shards
    coded = create(helpers.tiny_llama(vocab_size=size), weights="int8")
    save_stored(folder / "codes", coded.raw_config, "int8", 0, coded.weights, llama.other_files)
    create(helpers.tiny_llama(vocab_size=296, model_type="mistral", sliding_window=64, rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})).save(folder / "pieces")  # fmt: skip
    text = [*SENTENCES, *(word for option in PROMPT["options"].values() for word in [option] * 9)] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "pieces" / "tokenizer"), model_type="bpe",
        vocab_size=296, byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
    )  # fmt: skip
    (folder / "pieces" / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "pieces" / "tokenizer_config.json").write_text(json.dumps(settings))
    built, special = tokenizers.ByteLevelBPETokenizer(), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    built.train_from_iterator(text, 320, special_tokens=special, show_progress=False)
    create(helpers.tiny_roberta(vocab_size=400)).save(folder / "roberta")
    bpe = json.loads(built._tokenizer.to_str())["model"]
    (folder / "roberta" / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = "".join(" ".join(pair) + "\n" for pair in bpe["merges"])
    (folder / "roberta" / "merges.txt").write_text("#version: 0.2\n" + merges)
    settings = {"mask_token": {"content": "<mask>", "lstrip": True}, "added_tokens_decoder": {}}
    (folder / "roberta" / "tokenizer_config.json").write_text(json.dumps(settings))
    fast = tokenizers.Tokenizer.from_str(built._tokenizer.to_str())
    fast.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\t", " "),
                                            normalizers.Replace(tokenizers.Regex(" +"), " ")])  # fmt: skip
    split = pre_tokenizers.Split(tokenizers.Regex(r"\d{1,3}|\w+| ?[^\s\w]+|\s+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    fast.post_processor = processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 2)])])  # fmt: skip
    fast.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens([tokenizers.AddedToken("<new>", lstrip=True)])
    fast.enable_padding()
    fast.save(str(folder / "tokenizer.json"))
    both = create(helpers.tiny_llama(vocab_size=400, model_type="qwen2"))
    both.other_files = [folder / "tokenizer.json"]
    both.save(folder / "fast")


RUNS = {
    "quzo": "--method quzo --weights int8", "lora": "--method lora --optimizer zo",
    "loretta": "--method loretta-adp --optimizer zo",
}  # fmt: skip


def write_runs(folder: Path, models: Path, task: Path) -> None:
    """Finished runs of four steps, and each again as a kill after two would leave it."""
    folder.mkdir()
    for name, flags in RUNS.items():
        argv = f"--steps 4 --eval-every 2 --batch-size 2 --num-eval 4 --device cpu --model {models / 'llama'}"
        argv = [*argv.split(), "--task", str(task), *flags.split(), "--out", str(folder / name)]
        outcome = run_forked(lambda argv=argv: train.main(argv), folder)
        if outcome.code:
            raise RuntimeError(f"a run that should be good failed: {outcome.stderr}")
        killed = folder / f"{name}-killed"
        shutil.copytree(folder / name, killed)
        (killed / "result.json").unlink()
        (killed / "trajectory").write_text("".join((killed / "trajectory").read_text().splitlines(True)[:3]))


# ---------------------------------------------------------------- one input of each kind


def models_input(rng: Random, good: Path, place: Path) -> Input:
    """A changed model directory, which is evaluated, trained for a step, asked for text, or dry-run."""
    name = rng.choice(sorted(path.name for path in (good / "models").iterdir() if path.is_dir()))
    shutil.copytree(good / "models" / name, place / "m")
    files = sorted(path for path in (place / "m").iterdir() if path.is_file())
    weights = [4 if path.name == "config.json" else 2 if path.suffix == ".json" else 1 for path in files]
    chosen = rng.choices(files, weights, k=rng.choice((1, 1, 1, 2)))
    what = ", ".join(change_file(rng, path) for path in dict.fromkeys(chosen))
    asked = rng.choice((
        "--evaluate {m} --num-eval 8", "--evaluate {m} --num-eval 8", "--evaluate {m} --generate great",
        "--model {m} --steps 1 --num-eval 4 --eval-every 1 --batch-size 2", "--evaluate {m} --export {e}",
        "--model {m} --dry-run", "--model {m} --show 2",
        "--model {m} --weights int4 --steps 1 --num-eval 4 --eval-every 1 --batch-size 2",
    ))  # fmt: skip
    argv = [word.format(m=place / "m", e=place / "exported") for word in asked.split()]
    return Input(f"{name} {what}", [*argv, "--task", str(good / "data" / "own.json")])


def data_input(rng: Random, good: Path, place: Path) -> Input:
    """Changed files of examples, or a changed task."""
    shutil.copytree(good / "data", place / "d")
    folder = place / "d"  # the models are those whose tokenizers spell every text
    argv = ["--model", str(good / "models" / ("pieces" if rng.random() < 0.8 else "roberta"))]
    if rng.random() < 0.4:
        name = rng.choice(sorted(OFFICIAL))
        file = folder / OFFICIAL[name][0]
        what = change_file(rng, file)
        argv += ["--task", name, "--data-dir", str(folder), "--num-train", "4", "--num-dev", "2"]
        if rng.random() < 0.1:
            argv = [*argv[:-4], "--k", "1"]
    else:
        name = rng.choice(sorted(OWN_TASKS))
        own = folder / f"{name}.json"
        file = folder / rng.choice(sorted(set(json.loads(own.read_text())["files"].values())))
        argv += ["--task", str(own)]
        if rng.random() < 0.3:
            task = json.loads(own.read_text())
            field = rng.choice([key for key in ("prompt", "cloze", "answer", "options") if key in task])
            template = rng.choice(TEMPLATES)
            if field == "options" and isinstance(task[field], list):
                task[field][0] = template
            else:
                task[field] = template
            own.write_text(json.dumps(task))
            what = f"{name}.json: {field} = {template:.40}"
        elif rng.random() < 0.4:
            what = change_file(rng, own)
        else:
            what = change_file(rng, file)
    how = rng.choice(("--show 4", "--show 8", "--num-eval 8", "--steps 1 --eval-every 1 --batch-size 2", "--dry-run",
                      "--predict {f}"))  # fmt: skip
    if how == "--num-eval 8":
        argv[0] = "--evaluate"
    return Input(f"{name} {what}", [*argv, *(word.format(f=file) for word in how.split())])


TEXTS = ("", " ", "-", "--", "x", "0", "-1", "1", "2", "7", "nan", "inf", "-inf", "1e-9", "1e999", "0.5", "1e5",
         "9" * 400, "9" * 6000, "\u0664", "1_000", "None", "true", "\u202e", "\ud800", "x" * 5000, "../..",
         "/", "/dev/null", "a,b", "\n", "\x1b[31m", "4294967296", "2147483647", "18446744073709551615", "~", "*", "%s",
         "{x}", "cuda:99999999999", "lr=1,2", "lr=", "=", "lr=1e-3,nan", "cpu", "cuda")  # fmt: skip
USUAL = {"int": ("1", "2", "3", "8", "64", "1000"), "float": ("0", "1e-3", "0.5", "1", "30", "1e4")}


def flags_input(rng: Random, good: Path, place: Path) -> Input:
    """A good command with some flags more, of odd values or of good ones that may not go together.

    --steps stays small and nothing is compiled: a run that is asked for may take its time.
    """
    task, model = good / "data" / rng.choice(("own.json", "written.json")), good / "models" / "llama"
    argv = ["--model", str(model), "--task", str(task), "--batch-size", "2", "--num-eval", "4", "--device", "cpu"]
    argv += ["--eval-every", "1", "--out", str(place / "out"), "--steps", "1"]
    more = ["--method", rng.choice(METHODS)] if rng.random() < 0.6 else []
    for f in rng.sample(dataclasses.fields(Config), rng.choice((1, 1, 1, 2, 2, 3, 5))):
        flag = "--" + f.name.replace("_", "-")
        if f.type.startswith("bool"):
            more.append(flag if rng.random() < 0.5 and f.name != "compile" else f"--no-{flag[2:]}")
        elif f.metadata["choices"] and rng.random() < 0.95:
            more += [flag, str(rng.choice(f.metadata["choices"]))]
        elif f.name == "task" and rng.random() < 0.5:
            more += [flag, rng.choice(sorted(TASKS))]
        elif rng.random() < 0.7 and f.type.split(" ")[0] in USUAL and f.name not in ("steps", "jobs"):
            more += [flag, rng.choice(USUAL[f.type.split(" ")[0]])]
        elif f.name == "steps":
            more += [flag, rng.choice([text for text in TEXTS if not re.fullmatch(r"[\d_]{4,12}|\d{20}", text)])]
        else:
            more += [flag, rng.choice(TEXTS)]
    more += rng.choice((["--unknown"], ["word"], ["\ud800"], ["--seed"])) if rng.random() < 0.05 else []
    return Input(" ".join(f"{word:.30}" for word in more), argv + more)


def runs_input(rng: Random, good: Path, place: Path) -> Input:
    """A changed run folder, which is finished, redone, evaluated or asked."""
    name = rng.choice(sorted(path.name for path in (good / "runs").iterdir() if path.is_dir()))
    shutil.copytree(good / "runs" / name, place / "r")
    kept = ("config.json", "metrics.jsonl", "trajectory", "result.json")
    files = [path for path in sorted((place / "r").rglob("*")) if path.is_file()]
    files = [path for path in files if path.name in kept or path.parent.name == "model"]
    path = rng.choice([path for path in files if path.name in kept or rng.random() < 0.4] or files)
    if path.suffix in ("", ".jsonl") and rng.random() < 0.3:
        lines = path.read_text().splitlines(True)
        rng.shuffle(lines)
        path.write_text("".join(rng.choice((lines, lines[1:], lines * 2, ["\n"] + lines))))
        what = f"{path.name}: lines shuffled"
    else:
        what = change_file(rng, path)
    ask = rng.choice(("--resume", "--resume", "--replay", "--evaluate", "--evaluate", "--generate", "--export"))
    argv = ["--evaluate", str(place / "r")] if ask in ("--generate", "--export") else [ask, str(place / "r")]
    argv += {"--generate": [ask, "great"], "--export": [ask, str(place / "e")]}.get(ask, [])
    return Input(f"{name} {what}", argv)


KINDS: dict[str, Callable[[Random, Path, Path], Input]] = {
    "models": models_input, "data": data_input, "flags": flags_input, "runs": runs_input,
}  # fmt: skip


# ---------------------------------------------------------------- running one, and judging how it ended


def no_network(*_) -> None:
    raise OSError("the fuzzer has no network")


def run_forked(act: Callable[[], int], folder: Path, seconds: float = SECONDS) -> Outcome:
    """act's exit code and what it printed, in a process of its own that works in the folder."""
    files = [folder / "stdout.txt", folder / "stderr.txt"]
    before, started = resident_bytes(), time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            os.chdir(folder)
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            socket.socket.connect = no_network
            code = act()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    watched = os.pidfd_open(child)
    if not select.select([watched], [], [], seconds + 5)[0]:
        os.killpg(child, signal.SIGKILL)
    os.close(watched)
    _, status, usage = os.wait4(child, 0)
    took, grown = time.perf_counter() - started, usage.ru_maxrss * 1024 - before
    stdout, stderr = (file.read_text(errors="replace") if file.is_file() else "" for file in files)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, fault_of(code, stdout, stderr, took, grown), took, grown, stdout, stderr)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


PROGRESS = re.compile(  # and what a run says of itself
    r"\s*|\s*\d+%\|.*|\s*\d+step \[.*|"
    r"(.*run folder|zero-shot test|no evaluation had|the run diverged|.* differ|\d+ of) .*"
)


def fault_of(code: int, stdout: str, stderr: str, seconds: float, grown: int) -> str | None:
    """What is wrong with an ending, None where nothing is."""
    lines = [line for line in re.split(r"[\r\n]", stderr) if not PROGRESS.fullmatch(line)]
    if "Traceback" in stderr or code == 70:
        ours = [f"{path}:{number}" for path, number in re.findall(r'File "[^"]*?/([\w./-]+)", line (\d+)', stderr)]
        return f"{lines[-1] if lines else ''} at {' < '.join(ours[:-4:-1])}"
    if seconds > SECONDS:
        return f"took {seconds:.0f} s"
    if grown > BYTES:
        return f"took {grown / 1e9:.1f} GB"
    if code not in (0, 1, 2):
        return f"ended by {code}: {stderr[-300:]!r}"
    expected = 1 if code == 2 or (code == 1 and not stdout) else 0
    if len(lines) != expected:
        return f"exit code {code} and {len(lines)} lines: {lines[:3]}"
    if lines and (len(lines[0]) > LINE or not lines[0].startswith("train.py: ") or not lines[0].isprintable()):
        return f"a line of {len(lines[0])} characters: {lines[0]!r:.200}"
    return None if code else fault_of_result(stdout)


def fault_of_result(stdout: str) -> str | None:
    """A result is JSON, its last line at least, of finite numbers."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} in a result")

    if "show this help" in stdout:
        return None
    try:
        json.loads(stdout.splitlines()[-1], parse_constant=refuse)
    except (ValueError, IndexError) as error:
        return f"exit code 0 and no result: {error}"
    return None


def make_good(folder: Path, kinds: list[str]) -> None:
    write_models(folder / "models")
    write_data(folder / "data")
    if "runs" in kinds:
        write_runs(folder / "runs", folder / "models", folder / "data" / "own.json")


def try_one(kind: str, seed: int, number: int, good: Path, place: Path) -> tuple[Input, Outcome]:
    """The input of this kind, seed and number, and how it ended."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    given = KINDS[kind](Random(f"{seed} {kind} {number}"), good, place)
    return given, run_forked(lambda: train.main(given.argv), place)


class Tally:
    """Of one kind: how its inputs ended."""

    def __init__(self):
        self.codes, self.faults = Counter(), []
        self.slowest, self.largest = (0.0, 0), (0, 0)  # seconds and bytes, each with the input's number

    def count(self, number: int, given: Input, outcome: Outcome) -> None:
        self.codes[outcome.code] += 1
        self.slowest = max(self.slowest, (outcome.seconds, number))
        self.largest = max(self.largest, (outcome.grown, number))
        if outcome.fault:
            self.faults.append((number, given.what, outcome.fault))

    def row(self, kind: str) -> str:
        codes = [self.codes[code] for code in (0, 1, 2)]
        inputs = sum(self.codes.values())
        counts = "".join(f"{n:8,}" for n in (*codes, inputs - sum(codes), len(self.faults)))
        (seconds, slowest), (grown, largest) = self.slowest, self.largest
        return f"{kind:8}{inputs:7,}{counts}{seconds:9.1f} s ({slowest}){grown / 1e6:9,.0f} MB ({largest})"


HEAD = "kind     inputs  exit 0  exit 1  exit 2   other  faults    slowest (which)  memory (which)"


def fuzz(kinds: list[str], seed: int, numbers: Iterator[int], seconds: float) -> dict[str, Tally]:
    """Inputs of all kinds in turn, until numbers or seconds are used up."""
    torch.set_num_threads(1)
    tallies, until = {kind: Tally() for kind in kinds}, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        make_good(Path(folder), kinds)
        for number in numbers:
            for kind in kinds:
                if time.monotonic() > until:
                    return tallies
                tallies[kind].count(number, *try_one(kind, seed, number, Path(folder), Path(folder) / "input"))
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--count", type=int, default=10**9, help="inputs of each kind at most")
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the input of this number alone")
    parser.add_argument("--show", action="store_true", help="with --only: the command and what it printed")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    if args.only is not None and args.show:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            make_good(Path(folder), args.kinds)
            for kind in args.kinds:
                given, outcome = try_one(kind, args.seed, args.only, Path(folder), Path(folder) / "input")
                print(given.what, [word[:200] for word in given.argv], sep="\n")
                print(outcome.stdout[-2000:], outcome.stderr[-4000:], sep="\n")
                print(f"exit code {outcome.code}, {outcome.seconds:.1f} s: {outcome.fault}")
        return 0
    numbers = iter([args.only] if args.only is not None else range(args.start, args.start + args.count))
    tallies = fuzz(args.kinds, args.seed, numbers, 60 * args.minutes)
    print("\n".join([HEAD, *(tally.row(kind) for kind, tally in tallies.items())]))
    for kind, tally in tallies.items():
        for number, what, fault in tally.faults:
            print(f"--kinds {kind} --seed {args.seed} --only {number}: {what:.200}\n    {fault:.400}")
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
