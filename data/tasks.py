"""The tasks: where their official files are, how an example becomes a prompt, and which words answer it.

Prompts for causal models follow MeZO's large-model protocol, cloze texts for masked models its k-shot protocol
(after LM-BFF).  Metric: accuracy.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

TINY = Path(__file__).parent / "tiny"


class Example(NamedTuple):
    sentence: str
    label: int


@dataclass(frozen=True)
class Task:
    """Single-sentence classification: `{sentence}{joint}{option}`; as a cloze text `{sentence}{joint}<mask>.`, or
    `<mask>: {sentence}` where the mask is first."""

    name: str
    folder: str | Path  # under --data-dir, as the benchmark is distributed; a Path: its own, read whole
    joint: str
    options: tuple[str, ...]  # with the space that goes before them; the label is the index
    ending: str = "tsv"  # of its files; csv: `label,sentence`, without a header
    mask_first: bool = False

    @property
    def embedded(self) -> bool:
        return isinstance(self.folder, Path)

    def prompt(self, example: Example) -> str:
        return example.sentence + self.joint

    def cloze(self, example: Example) -> tuple[str, str, str]:
        """Two texts before the mask and one after it.  The one that holds the sentence may be cut to length."""
        return ("", "", f": {example.sentence}") if self.mask_first else (example.sentence, self.joint, ".")


TASKS = {
    "sst2": Task("sst2", "SST-2", " It was", (" terrible", " great")),
    "trec": Task("trec", "trec", " Type:", (" Description", " Entity", " Expression", " Human", " Location", " Number"),
                 "csv", mask_first=True),  # for causal models the prompt is ours
    "tiny": Task("tiny", TINY, " it was", (" terrible", " great")),
}


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


# ---------------------------------------------------------------- official files


def read_examples(path: Path, classes: int) -> list[Example]:
    """A .tsv file with the header `sentence<TAB>label`, or a .csv file of `label,sentence` without one -> examples.

    Raises ValueError for a missing file, another layout, or a label that is not an integer below `classes`.
    """
    rows = _csv_rows(path) if path.suffix == ".csv" else _tsv_rows(path)
    examples = []
    for number, sentence, label in rows:
        if label not in map(str, range(classes)):
            raise ValueError(f"{path}:{number}: the label must be one of 0 to {classes - 1}, got {label!r}")
        examples.append(Example(sentence.strip(), int(label)))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing; see README.md for where to get the official files")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _tsv_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, sentence, label."""
    # not splitlines, which also splits at characters that sentences may hold, such as U+2028
    lines = _read(path).rstrip("\n").split("\n")
    header = lines[0].split("\t")
    if header != ["sentence", "label"]:
        raise ValueError(f"{path}: the columns must be sentence and label, got {header}")
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != 2:
            raise ValueError(f"{path}:{number}: expected 2 columns, got {len(cells)}")
        yield number, *cells


def _csv_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, cells in enumerate(csv.reader(io.StringIO(_read(path), newline="")), start=1):
        if len(cells) != 2:
            raise ValueError(f"{path}:{number}: expected label,sentence, got {len(cells)} columns")
        yield number, cells[1], cells[0]


class Splits(NamedTuple):
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    files: list[Path]  # what they were read from, for the run's record


def load_splits(
    task: Task, data_dir: str | None, k: int | None, data_seed: int | None, num_train: int | None,
    num_dev: int | None, num_eval: int,
) -> Splits:  # fmt: skip
    """Train and dev to learn from, test to report.

    With k: the published few-shot files, k-shot/TASK/K-SEED/{train,dev,test}.tsv.  Without: MeZO's large-model
    protocol, num_train + num_dev examples drawn from train.tsv by a numpy permutation of data_seed (dev is the
    end of the draw) and num_eval from the labelled dev.tsv.  An embedded task reads its own folder whole.
    """
    classes = len(task.options)
    if task.embedded or k:
        folder = task.folder if task.embedded else Path(data_dir) / "k-shot" / task.folder / f"{k}-{data_seed}"
        files = [folder / f"{split}.{task.ending}" for split in ("train", "dev", "test")]
        train, dev, test = (read_examples(file, classes) for file in files)
        return Splits(train, dev, test[:num_eval], files)
    files = [Path(data_dir) / task.folder / f"{split}.{task.ending}" for split in ("train", "dev")]
    pool, held_out = (read_examples(file, classes) for file in files)
    if len(pool) < num_train + num_dev:
        raise ValueError(f"{files[0]} holds {len(pool)} examples, fewer than {num_train} train + {num_dev} dev")
    drawn = _draw(pool, data_seed, num_train + num_dev)
    return Splits(drawn[:num_train], drawn[num_train:], _draw(held_out, data_seed, num_eval), files)


def _draw(pool: list[Example], seed: int, n: int) -> list[Example]:
    """MeZO's draw; RandomState, because numpy's newer generators would choose other examples."""
    return [pool[i] for i in np.random.RandomState(seed).permutation(len(pool))[:n]]
