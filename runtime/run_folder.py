"""The run folder, which is the audit trail of one training run.

config.json    the folder's format version, every flag, versions, git commit, hashes of the base weights and of the data
metrics.jsonl  one line a step, and one a dev evaluation, of which the first is before any step
metrics.csv    the same lines as a table, up to the last evaluation, but for what they hold of each query
tensorboard/   the same as events, with --log tensorboard
trajectory     one line a step: the projected gradient of each query, in digits that read back exactly.  With
               config.json and the base checkpoint it redoes every update (zo_optim.update) without a forward
predictions.jsonl  what the weights of the lowest dev loss answer to each test example
model/         the best-dev weights so far as they are stored, with config.json and tokenizer; model.load reads it
curve.svg      loss, dev loss and dev metric over steps
result.json    the last line of standard output; `diverged` says why a run stopped early, or is null
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import safetensors
import sentencepiece
import tokenizers
import torch

from data.metrics import Prediction
from runtime.curve import curve_svg
from zo_optim import Step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Of the folder.  1 called projected gradients slopes; 2 had no evaluation of step 0, and of a step's landing it had
# `clipped` in the place of `held_back` and `lost`.
FORMAT = 3


COLUMNS = ("step", "loss", "lr", "tokens", "queries", "changed", "held_back", "lost", "forwards", "dev", "dev_loss",
           "peak_memory_bytes")  # fmt: skip


class RecordedRun(NamedTuple):
    """The record of a run, read back from its folder."""

    config: dict  # config.json
    projected_grads: list[list[float]]  # of each whole step
    rows: list[dict]  # of metrics.jsonl, up to that step


class DevRow(NamedTuple):
    step: int
    forwards: int  # in all steps until then, each of one batch through one copy of the weights
    metric: float | None  # None where text would have to be written
    loss: float


class RunFolder:
    """Creates the folder; every line is flushed as it is written, so a killed run is readable to its last step."""

    def __init__(self, path: Path, title: str, past: RecordedRun | None = None, events: bool = False):
        """title: of the curve.  past: continue that run; an unfinished line of a killed process is cut off.  events:
        for TensorBoard."""
        if past is None:
            check_free(path)
            path.mkdir(parents=True, exist_ok=True)
        (path / "result.json").unlink(missing_ok=True)  # an interrupted run's, which goes on
        self.path, self.model, self.title = path, path / "model", title
        self.zero_shot: float | None = None  # test metric before the first step
        self.metric = "accuracy"
        rows, projected_grads = (past.rows, past.projected_grads) if past else ([], [])
        self.losses = [(row["step"], row["loss"]) for row in rows if "projected_grad" in row]
        self.devs = [
            DevRow(row["step"], row["forwards"], row["dev"], row["dev_loss"]) for row in rows if "dev" in row
        ]
        self._write("trajectory", "".join(" ".join(map(repr, grads)) + "\n" for grads in projected_grads))
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.metrics = open(path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (by line, for the whole run)
        self.trajectory = open(path / "trajectory", "a", buffering=1)  # noqa: SIM115
        done = len(projected_grads)
        self.events = event_writer(path / "tensorboard", done + 1 if past else None) if events else None

    def write_config(self, flags: dict, base_sha256: str, data_files: list[Path], other_files: list[Path]) -> None:
        """other_files: others that decide the tokens, such as the tokenizer's."""
        run = {"format": FORMAT, "flags": flags, "versions": versions(), "git_commit": git_commit()}
        run |= {"data_sha256": hashed(data_files), "other_sha256": hashed(other_files)}
        self._write_json("config.json", run | {"base_weights_sha256": base_sha256})

    def predictions(self, found: dict[str, list[Prediction]]) -> None:
        """What was answered to each example of each test split, in order."""
        lines = [
            json.dumps({"split": split, "prediction": p.text, "golds": p.texts, "scores": p.scores}, ensure_ascii=False)
            for split, predictions in found.items() for p in predictions
        ]  # fmt: skip
        self._write("predictions.jsonl", "".join(line + "\n" for line in lines))

    def dev(self, dev: DevRow, best_step: int, peak_memory_bytes: int) -> None:
        self.devs.append(dev)
        row = {"step": dev.step, "forwards": dev.forwards, "dev": dev.metric, "dev_loss": dev.loss}
        row |= {"peak_memory_bytes": peak_memory_bytes}
        self.metrics.write(json.dumps(row) + "\n")
        if self.events is not None:
            add_events(self.events, row)
        self.draw(best_step)

    def result(self, result: dict) -> None:
        self._write_json("result.json", result)
        self.draw(result["best_step"])
        for file in (self.metrics, self.trajectory, self.events):
            if file is not None:
                file.close()

    def draw(self, best_step: int) -> None:
        """The record as a table and as a picture."""
        held = io.StringIO()
        table = csv.DictWriter(held, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(map(json.loads, _whole_lines(self.path / "metrics.jsonl")))
        self._write("metrics.csv", held.getvalue())
        picture = curve_svg(self.losses, self.devs, self.title, self.zero_shot, best_step, self.metric)
        self._write("curve.svg", picture)

    def _write_json(self, name: str, value: dict) -> None:
        self._write(name, json.dumps(value, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all."""
        partial = self.path / f"{name}.partial"
        partial.write_text(text)
        os.replace(partial, self.path / name)


def event_writer(path: Path, purge_step: int | None) -> SummaryWriter:
    """purge_step: events from there on are those of a killed process, whose steps are done again."""
    from torch.utils.tensorboard import SummaryWriter  # whose package is no requirement

    return SummaryWriter(str(path), purge_step=purge_step)


def add_events(events: SummaryWriter, row: dict) -> None:
    for name in COLUMNS[1:]:
        if row.get(name) is not None:
            events.add_scalar(name, row[name], row["step"])


class StepRecorder:
    """Writes a step down when the next one's losses are there, so that a GPU's update is not waited for."""

    def __init__(self, folder: RunFolder, size: int):
        """size: elements that are trained, of which shares are recorded."""
        self.folder, self.size, self.waiting, self.counted = folder, size, None, None

    def __enter__(self) -> StepRecorder:
        return self

    def __exit__(self, *error) -> None:
        self.write()

    def write(self, following: tuple[int, float, Step | None, dict] | None = None) -> None:
        """Write the step that waits, if one does; the following one then waits.

        following: its number, its loss, its zo_optim.Step (None of a first-order step), and more for its line.
        """
        if self.waiting is not None:
            if self.counted is not None:
                self.counted.synchronize()
            (number, loss, step, counts, more), self.waiting = self.waiting, None
            projected_grads = [] if step is None else step.projected_grads.tolist()
            row = {"step": number, "projected_grad": projected_grads, "loss": loss}
            if step is not None:
                changed, moves, held, way, lost = counts.tolist()
                row |= {"plus": step.plus.tolist(), "minus": step.minus.tolist(), "queries": len(step.plus)}
                row |= {"changed": changed / self.size, "held_back": held / max(moves, 1), "lost": lost / max(way, 1)}
            self.folder.trajectory.write(" ".join(map(repr, projected_grads)) + "\n")
            self.folder.losses.append((number, loss))
            row |= more
            self.folder.metrics.write(json.dumps(row) + "\n")
            if self.folder.events is not None:
                add_events(self.folder.events, row)
        if following is not None:
            number, loss, step, more = following
            counts = None if step is None else step.counts
            if counts is not None and counts.is_cuda:
                counts = counts.to("cpu", non_blocking=True)  # into pinned memory; a graph writes its counts anew
                self.counted = torch.cuda.Event()
                self.counted.record()
            self.waiting = number, loss, step, counts, more


def hashed(files: list[Path]) -> dict[str, str]:
    """By their names, where these differ, else by the ends of their paths."""
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        names = ["/".join(file.parts[-2:]) for file in files]
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in zip(names, files, strict=True)}


def check_free(path: Path) -> None:
    """Raises ValueError unless the folder is new or empty and can be made."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {path}: {nearest} is not a folder that can be written to")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"--out {path} is not empty: it may hold a run; give a new folder")


def read_run(path: Path) -> RecordedRun:
    """Raises ValueError for what is not a run folder."""
    try:
        config = json.loads((path / "config.json").read_text())
        if not {"flags", "base_weights_sha256", "data_sha256"} <= set(config):
            raise ValueError("config.json is not that of a run")
        if config.get("format") != FORMAT:
            raise ValueError(f"its format is {config.get('format', 1)}, this version reads {FORMAT}; use the commit "
                             f"{config.get('git_commit')} that made it")  # fmt: skip
        projected_grads = read_trajectory(path / "trajectory")
        rows = [json.loads(line) for line in _whole_lines(path / "metrics.jsonl")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a run folder: {error}") from None
    recorded = sum("projected_grad" in row for row in rows)
    projected_grads = projected_grads[:recorded]  # a step's line is written there first
    return RecordedRun(config, projected_grads, [row for row in rows if row["step"] <= len(projected_grads)])


def read_trajectory(path: Path) -> list[list[float]]:
    """The projected_grads of every whole line: a killed process may have left half a line at the end."""
    return [[float(number) for number in line.split()] for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "sentencepiece": sentencepiece.__version__,
        "tokenizers": tokenizers.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def git_commit() -> str | None:
    """The commit of this checkout, with + where it has uncommitted changes; None outside a checkout."""
    try:
        answers = [
            subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")
