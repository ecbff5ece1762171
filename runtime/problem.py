"""From flags to a model and a task: all that the loop needs, and all that a finished run is asked with."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

import gpu
import tensor_train
from calibration import calibrate
from data.archives import data_folder
from data.files import Splits, load_splits
from data.metrics import Prediction, check_metric, mean, measure, metric_of_one
from data.scoring import BatchLoss, Encoded, Encoder, MeanLoss, MetricLoss, evaluate, write
from data.tasks import Task, get_task
from data.tokenizer import Tokenizer
from family import mazo
from family.subzero import enable_low_rank_reads
from family.zo2 import offload
from gpu.code_products import enable_code_products
from model import LanguageModel, load
from quant import quantise_tokens
from random_bits import Key, permutation
from runtime.checkpoints import holds_codes, stored_format
from runtime.config import Config, each_task, max_length, spec_of
from runtime.first_order import make_trainable
from runtime.flags import FIRST_ORDER
from runtime.hub import PRESETS, resolve
from runtime.model_configs import read_config
from zo_optim import ZO, SparseZO

CACHE_BYTES = 2**31


class Quality(NamedTuple):
    metric: float | None  # the task's
    loss: float


Answers = dict[str, list[Prediction]]  # to each test split, by its name
Metrics = dict[str, dict[str, float]]  # of each test split, by their names


@dataclass
class Problem:
    """A model and a task, encoded: all that the loop needs."""

    lm: LanguageModel | None  # None until it is read
    task: Task
    tokenizer: Tokenizer
    train: list[Encoded]
    dev: list[Encoded]
    tests: dict[str, list[Encoded]]
    pad: int
    batch_size: int  # of evaluations
    multiple: int = 1  # a step's batches have a multiple of this many tokens
    objective: Callable[[Prediction], float] | None = None  # unless the task's loss is made smaller
    cache_bytes: int = 0  # of keys and values, for which a batch of texts that are written has room at least

    @property
    def parts(self) -> list[Problem]:
        """The tasks: this one alone."""
        return [self]

    @property
    def metric(self) -> str:
        return self.task.metric

    def dev_quality(self) -> Quality:
        return self.quality(self.dev)

    def quality(self, split: list[Encoded]) -> Quality:
        """Its metric is None where text would have to be written, which takes too long for every evaluation."""
        if self.objective is not None:  # what is made smaller is also what the best weights have least of
            answers = self.answers(split)
            return Quality(measure(self.task.metric, answers), 1 - mean(self.objective, answers))
        loss, predictions = evaluate(self.lm, split, self.pad, self.batch_size, self.task.loss)
        return Quality(None if self.task.generates else measure(self.task.metric, predictions), loss)

    def answers(self, split: list[Encoded]) -> list[Prediction]:
        if self.task.generates:
            return write(self.lm, split, self.tokenizer, self.pad, self.batch_size, cache_bytes=self.cache_bytes)
        return evaluate(self.lm, split, self.pad, self.batch_size, self.task.loss).predictions

    def answered(self, *splits: str) -> Answers:
        """To the tests, or to some of them."""
        return {split: self.answers(self.tests[split]) for split in splits or self.tests}

    def measured(self, answered: Answers) -> Metrics:
        """The task's metric, and those that its benchmark reports."""
        names = self.metric, *self.task.also
        return {split: {name: measure(name, answers) for name in names} for split, answers in answered.items()}

    def score(self, measured: Metrics) -> float:
        return measured["test"][self.metric]

    def terms(self, examples: list[Encoded]) -> int:
        """Of how many terms the mean loss over examples is."""
        of_tokens = self.task.loss == "answer" and self.objective is None
        return sum(len(e.answers[e.label]) for e in examples) if of_tokens else len(examples)

    def loss_fn(self, micro_batch_size: int) -> Callable[[list[Encoded]], BatchLoss | MetricLoss]:
        """From the examples of a step to what it makes smaller."""
        if self.objective is None:
            return partial(BatchLoss.of, self.lm, pad=self.pad, micro_batch_size=micro_batch_size,
                           multiple=self.multiple, loss=self.task.loss)  # fmt: skip
        return partial(MetricLoss, self.lm, task=self.task, tokenizer=self.tokenizer, pad=self.pad,
                       batch_size=micro_batch_size, metric=self.objective)  # fmt: skip


@dataclass
class MultiTask:
    """Several tasks of one model in the place of one: losses, metrics and scores are the means of theirs."""

    parts: list[Problem]

    def __post_init__(self):
        self.train = list(chain.from_iterable(part.train for part in self.parts))

    @property
    def lm(self) -> LanguageModel:
        return self.parts[0].lm

    @lm.setter
    def lm(self, lm: LanguageModel) -> None:
        for part in self.parts:
            part.lm = lm

    @property
    def metric(self) -> str:
        return " and ".join(dict.fromkeys(part.metric for part in self.parts))

    def dev_quality(self) -> Quality:
        metrics, losses = zip(*(part.dev_quality() for part in self.parts), strict=True)
        return Quality(None if None in metrics else fmean(metrics), fmean(losses))

    def answered(self, *splits: str) -> Answers:
        """A split's name is its task's, and behind it its own unless that is test: mnli, mnli/test_mismatched."""
        return {f"{part.task.name}/{split}".removesuffix("/test"): answers
                for part in self.parts for split, answers in part.answered(*splits).items()}  # fmt: skip

    def measured(self, answered: Answers) -> Metrics:
        parts = {part.task.name: part for part in self.parts}
        return {split: parts[split.partition("/")[0]].measured({split: answers})[split]
                for split, answers in answered.items()}  # fmt: skip

    def score(self, measured: Metrics) -> float:
        return fmean(measured[part.task.name][part.metric] for part in self.parts)

    def terms(self, examples: list[Encoded]) -> int:
        return len(examples)

    def loss_fn(self, micro_batch_size: int) -> Callable[[list[Encoded]], MeanLoss]:
        """Of examples that are as many of each task, one task after the other."""
        made = [part.loss_fn(micro_batch_size) for part in self.parts]

        def loss_of(examples: list[Encoded]) -> MeanLoss:
            n = len(examples) // len(made)
            return MeanLoss([of_task(examples[i * n : (i + 1) * n]) for i, of_task in enumerate(made)])

        return loss_of


def splits_of(c: Config) -> Splits:
    task = get_task(c.task)
    folder = c.data_dir if c.data_dir or task.folder else data_folder(task)
    return load_splits(task, folder, c.k, c.data_seed, c.num_train, c.num_dev, c.num_eval)


def encoder_of(c: Config) -> Encoder:
    task, directory = get_task(c.task), resolve(c.model)
    config, _ = read_config(directory)
    return Encoder(Tokenizer(directory), task, config, max_length(c, config.masked, task))


def prepare(c: Config, load_lm: Callable[..., LanguageModel] | None = None) -> tuple[Problem | MultiTask, list[Path]]:
    """Read everything -> what is to be learnt, and the files that it was read from.  The weights come last: an error
    elsewhere is then found before gigabytes are read.

    load_lm: in the place of load_base.
    """
    with uncollected():
        parts, files = zip(*map(read_task, each_task(c)), strict=True)
    prompts = [e.sequences[0] for part in parts for e in part.train[: c.calibrate // len(parts)]]
    problem = parts[0] if len(parts) == 1 else MultiTask(list(parts))
    problem.lm = (load_lm or load_base)(c, resolve(c.model), prompts)
    return problem, list(dict.fromkeys(chain.from_iterable(files)))


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for circles of garbage, which reading makes none of: it goes through all rows that are
    there again and again, a quarter of the time that SST-2 takes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_task(c: Config) -> tuple[Problem, list[Path]]:
    """One task, still without its model, and its files."""
    task = get_task(c.task)
    for name in (task.metric, *task.also):
        check_metric(name, task.generates)
    splits = splits_of(c)
    files = splits.files + [Path(c.task)] * c.task.endswith(".json")
    encode = encoder_of(c)
    tokenizer, config = encode.tokenizer, encode.config
    train, dev = encode.all(splits.train, right_alone=c.objective == "loss"), encode.all(splits.dev)
    tests = {split: encode.all(rows) for split, rows in splits.tests.items()}
    batch_size = 2 * c.micro_batch_size  # an evaluation has one copy of the weights where a step has two
    pad, multiple = config.pad_token_id or 0, multiple_of(c, config.longest)
    made_larger = task.metric if c.objective == "reward" else c.objective
    objective = None if c.objective == "loss" else metric_of_one(made_larger)
    cache_bytes = CACHE_BYTES if c.micro_batch_size == c.batch_size else 0  # unless memory is bounded
    return Problem(None, task, tokenizer, train, dev, tests, pad, batch_size, multiple, objective, cache_bytes), files


def multiple_of(c: Config, longest: int) -> int:
    """On a GPU lengths are rounded up to a multiple of 8, where the model's longest sequence allows: eight lengths then
    share a graph.  --no-graphs rounds too, so that it gives the same bits."""
    return 8 if c.device.startswith("cuda") and c.optimizer == "zo" and longest % 8 == 0 else 1


DTYPES = {"fp32": torch.float32} | dict.fromkeys(("bf16", "fp8", "int8"), torch.bfloat16)  # outside of products


def load_base(c: Config, directory: Path, prompts: list[list[int]]) -> LanguageModel:
    """The model to train: with adapters around it, or as floats that take a gradient, or as it is stored.

    prompts: tokens whose forward passes decide how its weights are rounded; where none, each to its nearest code.
    """
    if c.method not in FIRST_ORDER:
        lm = load_weights(c, directory, prompts)
        spec = spec_of(c, lm.raw_config["model_type"])
        if spec is not None:
            tensor_train.attach(lm, spec, c.seed)
            preset = PRESETS.get(c.model)
            lm.adapters.base = preset if isinstance(preset, str) else str(directory.absolute())
            if c.adapters is not None:
                tensor_train.load(lm, c.adapters)
            lm.weights[tensor_train.TRAINED_VECTOR].value.requires_grad_(c.optimizer == "adamw")
        return lm
    lm = load(directory, c.device, DTYPES[c.compute], c.master or c.weights)
    set_up_forwards(c, lm)
    lm.format = c.weights
    format = c.weights if c.method == "fo-ste" else None
    lm.weights = make_trainable(lm.weights, format, DTYPES[c.master or c.weights])
    return lm


def load_weights(c: Config, directory: Path, prompts: Sequence[list[int]] = ()) -> LanguageModel:
    """A checkpoint, or a run's best weights, as the run stores them."""
    if prompts and not holds_codes(directory):
        lm = load(directory, "cpu", DTYPES[c.compute], *stored_format(read_config(directory)[1]))
        calibrate(lm, list(prompts), c.weights, c.residual, c.oracle, c.device)
    else:
        device = "cpu" if c.method == "zo2" else c.device
        lm = load(directory, device, DTYPES[c.compute], c.weights, c.residual, c.oracle)
    set_up_forwards(c, lm)
    return lm


def set_up_forwards(c: Config, lm: LanguageModel) -> None:
    if c.method == "zo2":
        offload(lm, torch.device(c.device))
    gpu.install(lm)
    if c.activations != "none":
        lm.round_inputs(partial(quantise_tokens, kind=c.activations))
    if c.compute in ("fp8", "int8"):
        enable_code_products(lm)
    if c.optimizer == "zo" and c.direction_bits == "sparse":
        gpu.probe_in_place(lm, SparseZO(c.eps, dtype=lm.dtype, cell=c.cell))
    if c.method == "subzero":
        enable_low_rank_reads(lm)
    if c.compile:
        lm.compile_blocks()


def restore_best(c: Config, lm: LanguageModel, directory: Path) -> LanguageModel:
    """A run's weights of the lowest dev loss, in place of the model's own."""
    if lm.adapters is None:
        lm.weights = {}  # before the best weights are read into their place
        if lm.offloaded is not None:
            lm.offloaded.free()
        return load_weights(c, directory)
    tensor_train.load(lm, directory)
    return lm


MASKS = "masks.safetensors"  # of a run folder
MASK_TEXTS, MASK_QUERIES = 64, 16  # training examples, and directions, that a task is measured with
NO_STEP = 2**32 - 1


def mask_file(c: Config, problem: Problem | MultiTask, zo: ZO) -> bytes:
    """MaZO's masks at the model's present weights, each task measured on the first training examples of its order."""
    zo, key, share = replace(zo, queries=MASK_QUERIES), Key(c.seed, NO_STEP), c.batch_size // len(problem.parts)
    tasks = []
    with torch.compiler.set_stance("force_eager"):  # what notes a layer's inputs cannot be compiled
        for at, part in enumerate(problem.parts):
            order = permutation(c.seed, 0, len(part.train), at)[:MASK_TEXTS].tolist()
            some = [part.train[i] for i in order]  # files may have one class after the other
            texts = [example.sequences[0] for example in some]
            tasks.append(mazo.measure(part.lm, part.loss_fn(c.micro_batch_size)(some[:share]), texts, key, zo))
        return mazo.packed(mazo.masks(problem.lm.weights, tasks, key, zo, c.mask_share))


def read_masks(c: Config, lm: LanguageModel, config: dict) -> dict[str, Tensor] | None:
    """The masks in a run's folder, of MaZO's runs.  config: config.json's contents.

    Raises ValueError for others than it began with.
    """
    if c.method != "mazo":
        return None
    path = Path(c.out) / MASKS
    file = path.read_bytes() if path.is_file() else b""
    if sha256(file).hexdigest() != config["masks_sha256"]:
        raise ValueError(f"{path} is {'not what the run began with' if file else 'missing'}: begin a new run")
    return mazo.unpacked(file, lm.weights)


def sizes(problem: Problem | MultiTask) -> str:
    """How many examples there are, and how many did not fit."""
    several = len(problem.parts) > 1
    return "; ".join((f"{part.task.name}: " if several else "") + sizes_of_task(part) for part in problem.parts)


def sizes_of_task(problem: Problem) -> str:
    splits = {"train": problem.train, "dev": problem.dev} | problem.tests
    lines = [", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()) + " examples"]
    for split, rows in splits.items():
        cut = sum(row.cut > 0 for row in rows)
        if cut:
            most = max(row.cut for row in rows)
            lines.append(f"{cut} of {split} lost tokens to --max-length, {most:,} at most, none after their passages")
    return "; ".join(lines)
