"""What a model is asked without training: an evaluation, predictions, a text, a checkpoint, or what it would read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

import tensor_train
from data.files import load_splits, read_rows
from data.metrics import measure
from data.scoring import MAX_NEW_TOKENS, Encoder
from data.tasks import Row, Task, get_task
from data.tokenizer import Tokenizer
from model import LanguageModel
from runtime.checkpoints import weights_sha256
from runtime.config import Config, max_length, names_a_run, of_the_run, validate
from runtime.hub import resolve
from runtime.model_configs import read_config
from runtime.problem import Problem, load_base, prepare, restore_best
from runtime.run_folder import check_free


def ask(c: Config) -> Iterator[dict]:
    """What is printed, line by line.  Raises ValueError for what cannot be asked of a model or a run."""
    if names_a_run(c.evaluate):
        c = of_the_run(c)
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


def stored(c: Config) -> LanguageModel:
    """The model alone, as a run's best weights or as its directory has it."""
    lm = prepare(c)[0].lm if c.calibrate else load_base(c, resolve(c.model), [])
    return restore_best(c, lm, Path(c.evaluate) / "model") if names_a_run(c.evaluate) else lm


def show(c: Config) -> Iterator[dict]:
    """The first training examples as the model reads them."""
    task, directory = get_task(c.task), resolve(c.model)
    rows = load_splits(task, c.data_dir, c.k, c.data_seed, c.num_train, c.num_dev, c.num_eval).train[: c.show]
    config, tokenizer = read_config(directory)[0], Tokenizer(directory)
    encode = Encoder(tokenizer, task, config, max_length(c, config.masked, task))
    for row, encoded in zip(rows, encode.all(rows), strict=True):
        example, prompt = encoded.example, encoded.sequences[0]
        if encoded.at < 0:
            prompt = prompt[: -len(encoded.answers[0])]
        text = tokenizer.decode(prompt) if encoded.cut else "".join(example.pieces)
        yield {
            "from": row.place, "prompt": text, "options": list(example.options),
            "right": [example.options[gold] if isinstance(gold, int) else gold for gold in example.golds],
            "prompt_tokens": len(prompt), "option_tokens": list(map(len, encoded.answers)), "cut": encoded.cut,
            "first_ids": prompt[:8],
        }  # fmt: skip


def problem_of(c: Config) -> Problem:
    problem, _ = prepare(c)
    if names_a_run(c.evaluate):
        problem.lm = restore_best(c, problem.lm, Path(c.evaluate) / "model")
    return problem


def evaluation(c: Config) -> Iterator[dict]:
    """The task's metric and loss on dev, and every metric on the tests."""
    problem = problem_of(c)
    names, dev = (problem.task.metric, *problem.task.also), problem.quality(problem.dev)
    tests = {split: problem.answers(rows) for split, rows in problem.tests.items()}
    yield {"model": c.model, "task": c.task, "metric": problem.task.metric, "dev": dev.metric, "dev_loss": dev.loss,
           "tests": {split: {name: measure(name, of) for name in names} for split, of in tests.items()},
           "weights_sha256": weights_sha256(problem.lm.weights)}  # fmt: skip


def predictions(c: Config) -> Iterator[dict]:
    """Of a file in the form of the task's own, with or without the right answers."""
    task, directory, file = get_task(c.task), resolve(c.model), Path(c.predict)
    config, tokenizer = read_config(directory)[0], Tokenizer(directory)
    rows = read_rows(file, dataclasses.replace(task, layout=None, folder=file.parent))
    encode = Encoder(tokenizer, task, config, max_length(c, config.masked, task))
    split = encode.all([unanswered(row, task) for row in rows])
    problem = Problem(stored(c), task, tokenizer, [], [], {}, config.pad_token_id or 0, 2 * c.micro_batch_size)
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
    begin = tokenizer.begin if tokenizer.begin is not None else [lm.config.bos_token_id]
    ids = torch.tensor([[*begin, *tokenizer.encode(c.generate)]], device=lm.device)
    return {"text": tokenizer.decode(lm.generate(ids, MAX_NEW_TOKENS)[0, len(begin) :].tolist())}


def export(lm: LanguageModel, directory: Path) -> dict:
    """A plain checkpoint, which transformers loads; adapters that can be are merged into it."""
    lm = tensor_train.merge(lm) if lm.adapters is not None else lm
    lm.save(directory)
    return {"exported": str(directory)}
