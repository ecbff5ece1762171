"""What a model is asked without training: an evaluation, predictions, a text, a checkpoint, or what it would read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

import tensor_train
from data.files import read_rows
from data.scoring import MAX_NEW_TOKENS
from data.tasks import Row, Task
from data.tokenizer import Tokenizer
from model import LanguageModel
from runtime.checkpoints import weights_sha256
from runtime.config import Config, each_task, names_a_run, of_the_run, validate
from runtime.flags import ADAPTERS
from runtime.hub import resolve
from runtime.json_files import shown
from runtime.problem import Problem, encoder_of, load_base, load_weights, prepare, splits_of
from runtime.record import read_run
from runtime.run_folder import check_free


def ask(c: Config) -> Iterator[dict]:
    """What is printed, line by line.  Raises ValueError for what cannot be asked of a model or a run."""
    if names_a_run(c.evaluate):
        c = of_the_run(c, read_run(Path(c.evaluate)).config["flags"])
    validate(c)
    if c.show is not None:
        yield from show(c)
    elif c.generate is not None or c.export is not None:
        if c.export is not None:
            check_free(Path(c.export))
        lm = stored(c)
        yield continued(c, lm) if c.generate is not None else export(lm, Path(c.export))
    else:
        yield from predictions(c) if c.predict is not None else evaluation(c)


def load_asked(c: Config, directory: Path, prompts: list[list[int]]) -> LanguageModel:
    """A run's best weights, or a directory's; adapters around what problem.load_base makes of it."""
    best = Path(c.evaluate) / "model" if names_a_run(c.evaluate) else None
    if best is not None and c.method not in ADAPTERS:
        return load_weights(c, best)
    lm = load_base(c, directory, prompts)
    if best is not None:
        tensor_train.load(lm, best)
    return lm


def stored(c: Config) -> LanguageModel:
    """The model alone; its training prompts are read where its codes are to be made again."""
    return prepare(c, load_asked)[0].lm if c.calibrate else load_asked(c, resolve(c.model), [])


def show(c: Config) -> Iterator[dict]:
    """The first training examples as the model reads them."""
    if "," in c.task:
        yield from chain.from_iterable(map(show, each_task(c)))
        return
    rows, encode = splits_of(c).train[: c.show], encoder_of(c)
    for row, encoded in zip(rows, encode.all(rows), strict=True):
        example, prompt = encoded.example, encoded.sequences[0]
        if encoded.at < 0:
            prompt = prompt[: -len(encoded.answers[0])]
        text = encode.tokenizer.decode(prompt) if encoded.cut else "".join(example.pieces)
        yield {
            "from": row.place, "prompt": text, "options": list(example.options),
            "right": [example.options[gold] if isinstance(gold, int) else gold for gold in example.golds],
            "prompt_tokens": len(prompt), "option_tokens": list(map(len, encoded.answers)), "cut": encoded.cut,
            "first_ids": prompt[:8],
        }  # fmt: skip


def evaluation(c: Config) -> Iterator[dict]:
    """The task's metric and loss on dev, and every metric on the tests."""
    problem, _ = prepare(c, load_asked)
    dev = problem.dev_quality()
    if not math.isfinite(dev.loss):
        raise ValueError(f"the loss on dev is {dev.loss}: the model in {c.evaluate or c.model} gives no finite scores")
    yield {"model": c.model, "task": c.task, "metric": problem.metric, "dev": dev.metric, "dev_loss": dev.loss,
           "tests": problem.measured(problem.answered()),
           "weights_sha256": weights_sha256(problem.lm.weights)}  # fmt: skip


def predictions(c: Config) -> Iterator[dict]:
    """Of a file in the form of the task's own, with or without the right answers."""
    encode, file = encoder_of(c), Path(c.predict)
    task, pad = encode.task, encode.config.pad_token_id or 0
    rows = read_rows(file, dataclasses.replace(task, layout=None, folder=file.parent))
    split = encode.all([unanswered(row, task) for row in rows])
    problem = Problem(stored(c), task, encode.tokenizer, [], [], {}, pad, 2 * c.micro_batch_size)
    for row, answer in zip(rows, problem.answers(split), strict=True):
        line = {"from": row.place, "prediction": label_of(answer.option, answer.text, task)}
        yield line | ({"scores": answer.scores} if answer.scores else {})


def unanswered(row: Row, task: Task) -> Row:
    """The row with some answer, whether it has one or not: what is right does not change what is predicted."""
    some = next(iter(task.options)) if isinstance(task.options, dict) else "" if task.generates else 0
    return row._replace(fields=row.fields | {task.label: some})


def label_of(option: int, text: str, task: Task) -> str | int:
    """The label as the task's files have it, or the text."""
    if task.generates or isinstance(task.options, str):
        return text
    return list(task.options)[option] if isinstance(task.options, dict) else option


@torch.no_grad()
def continued(c: Config, lm: LanguageModel) -> dict:
    tokenizer = Tokenizer(resolve(c.model))
    by_config = [] if lm.config.bos_token_id is None else [lm.config.bos_token_id]
    begin = by_config if tokenizer.begin is None else tokenizer.begin
    ids = [*begin, *tokenizer.encode(c.generate)]
    if not ids or max(ids) >= lm.config.vocab_size:
        what = f"token {max(ids)} is outside the model's vocabulary of {lm.config.vocab_size}" if ids else "no token"
        raise ValueError(f"--generate {shown(c.generate)}: {what}")
    written = lm.generate(torch.tensor([ids], device=lm.device), MAX_NEW_TOKENS)
    return {"text": tokenizer.decode(written[0, len(begin) :].tolist())}


def export(lm: LanguageModel, directory: Path) -> dict:
    """A plain checkpoint, which transformers loads; adapters that can be are merged into it."""
    lm = tensor_train.merge(lm) if lm.adapters is not None else lm
    lm.save(directory)
    return {"exported": str(directory)}
