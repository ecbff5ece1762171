"""The run folder, which is the audit trail of one training run.

config.json    what the run began with: flags, versions, the code's and the data's hashes, the base weights' and files'
metrics.jsonl  one line a step, and one a dev evaluation, of which the first is before any step
trajectory     one line a step: the projected gradient of each query, in digits that read back exactly, and a digest of
               the whole record so far.  With config.json and the base checkpoint it redoes every update
               (zo_optim.update) without a forward
metrics.csv    metrics.jsonl as a table, up to the last evaluation, but for what it holds of each query.  A killed run's
               may end in half a row, until --resume makes it anew
tensorboard/   the same as events, with --log tensorboard
masks.safetensors  of MaZO: which weights move, a bit each; config.json has its hash
model/         the best-dev weights so far as they are stored, with config.json and tokenizer; model.load reads it
state-STEP.safetensors  of AdamW, until the run ends: weights and moments at the last evaluation, for --resume
predictions.jsonl  what the weights of the lowest dev loss answer to each test example
curve.svg      loss, dev loss and dev metric over steps; beyond 100 evaluations it may lack the last hundredth of
               them, until the run ends
result.json    the last line of standard output; `diverged` says why a run stopped early, or is null.  A run that has
               none, or one with `interrupted`, was not finished

The record binds itself: config.json carries the SHA-256 of its contents, and every digest is of that and of each line
of metrics.jsonl up to there, without the peak memory, the one number of a line that is not the same when it is done
again.  result.json's digest is of all of that and of its own values, hashes of the other files among them.  An edited
file is found out so; a record that was made up as a whole, by --replay --verify, which computes losses again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import safetensors
import sentencepiece
import tokenizers
import torch

from data.metrics import Prediction
from quant import Store
from runtime.curve import curve_svg
from runtime.first_order import load_state, save_state
from runtime.record import (
    DIGITS,
    FORMAT,
    RecordedRun,
    canonical,
    chain_of,
    digest_of_result,
    recorded_loss,
    sealed,
    small_files,
)
from zo_optim import Step

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COLUMNS = ("step", "loss", "lr", "tokens", "queries", "changed", "held_back", "lost", "forwards", "dev", "dev_loss",
           "peak_memory_bytes")  # fmt: skip


class DevRow(NamedTuple):
    step: int
    forwards: int  # in all steps until then, each of one batch through one copy of the weights
    metric: float | None  # None where text would have to be written
    loss: float


class RunFolder:
    """Every line is flushed as it is written, so a killed run is readable to its last step."""

    def __init__(self, path: Path, title: str, run: RecordedRun, metric: str = "accuracy", events: bool = False):
        """title: of the curve.  run: what the folder holds so far; it is written anew, without a killed process's half
        lines.  metric: what is drawn beside the losses.  events: for TensorBoard."""
        (path / "result.json").unlink(missing_ok=True)  # an interrupted run's, which goes on
        self.path, self.model, self.title = path, path / "model", title
        self.zero_shot: float | None = None  # test metric before the first step
        self.metric, self.flags, self.chain = metric, run.config["flags"], chain_of(run)
        rows = run.rows
        self.losses, self.devs = series(rows)
        self.state_sha256 = {row["step"]: row["state_sha256"] for row in rows if "state_sha256" in row}
        for name, lines in (("trajectory", run.trajectory), ("metrics.jsonl", run.metrics)):
            write_whole(path / name, "".join(line + "\n" for line in lines))
        write_whole(path / "metrics.csv", table_of(run.metrics))
        self.in_table = (path / "metrics.jsonl").stat().st_size  # what of it metrics.csv has
        self.drawn = 0  # evaluations in curve.svg
        self.metrics = open(path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (by line, for the whole run)
        self.trajectory = open(path / "trajectory", "a", buffering=1)  # noqa: SIM115
        done = len(run.trajectory)
        self.events = event_writer(path / "tensorboard", done + 1 if done else None) if events else None

    def save_state(self, step: int, adamw: torch.optim.AdamW, weights: dict[str, Store]) -> dict[str, str]:
        """Weights and moments, from which --resume goes on -> what the evaluation's line says of them."""
        partial = self.path / "state.partial"  # a folder: safetensors writes to a file of another name at first
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        sha256 = self.state_sha256[step] = save_state(partial / "state", adamw, weights)
        os.replace(partial / "state", state_path(self.path, step))
        partial.rmdir()
        return {"state_sha256": sha256}

    def load_state(self, step: int, adamw: torch.optim.AdamW, weights: dict[str, Store]) -> None:
        load_state(state_path(self.path, step), self.state_sha256[step], adamw, weights)

    def remove_states(self, but: int | None = None) -> None:
        """All of them, or the older ones, and what a killed process left half written."""
        shutil.rmtree(self.path / "state.partial", ignore_errors=True)
        for path in self.path.glob("state-*"):
            if but is None or path != state_path(self.path, but):
                path.unlink()

    def predictions(self, found: dict[str, list[Prediction]]) -> None:
        """What was answered to each example of each test split, in order."""
        lines = [
            json.dumps({"split": split, "prediction": p.text, "golds": p.texts, "scores": p.scores}, ensure_ascii=False)
            for split, predictions in found.items() for p in predictions
        ]  # fmt: skip
        write_whole(self.path / "predictions.jsonl", "".join(line + "\n" for line in lines))

    def dev(self, dev: DevRow, best_step: int, peak_memory_bytes: int, more: dict[str, str]) -> None:
        """more: further values for its line."""
        self.devs.append(dev)
        loss = dev.loss if math.isfinite(dev.loss) else None
        row = {"step": dev.step, "forwards": dev.forwards, "dev": dev.metric, "dev_loss": loss} | more
        self.chain.update(canonical(row).encode())
        row |= {"peak_memory_bytes": peak_memory_bytes, "digest": self.chain.copy().hexdigest()[:DIGITS]}
        self.metrics.write(json.dumps(row) + "\n")
        if "state_sha256" in more:
            self.remove_states(but=dev.step)
        if self.events is not None:
            add_events(self.events, row)
        self.tabulate()
        if len(self.devs) > 1.01 * self.drawn:  # a drawing's time grows with their number
            self.draw(best_step)

    def result(self, result: dict) -> dict:
        """Write it down, the last file of a run -> it with its digest."""
        self.tabulate()
        self.draw(result["best_step"])
        result |= {"files_sha256": small_files(self.path)}
        result |= {"digest": digest_of_result(self.chain, result)}
        for file in (self.metrics, self.trajectory, self.events):
            if file is not None:
                file.close()
        write_whole(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        return result

    def tabulate(self) -> None:
        """Add what is new in the record to its table."""
        with (self.path / "metrics.jsonl").open(encoding="utf-8") as file:
            file.seek(self.in_table)
            lines, self.in_table = file.read().splitlines(), file.tell()
        with (self.path / "metrics.csv").open("a", encoding="utf-8") as file:
            file.write(table_of(lines, header=False))

    def draw(self, best_step: int) -> None:
        """The record as a picture."""
        self.drawn = len(self.devs)
        picture = curve_svg(self.losses, self.devs, self.title, self.zero_shot, best_step, self.metric)
        write_whole(self.path / "curve.svg", picture)


def series(rows: list[dict]) -> tuple[list[tuple[int, float]], list[DevRow]]:
    """What a curve shows of a record: (step, loss) of each step, and the evaluations."""
    losses = [(row["step"], recorded_loss(row["loss"])) for row in rows if "projected_grad" in row]
    devs = [DevRow(row["step"], row["forwards"], row["dev"], recorded_loss(row["dev_loss"]))
            for row in rows if "dev" in row]  # fmt: skip
    return losses, devs


def state_path(path: Path, step: int) -> Path:
    return path / f"state-{step}.safetensors"


def check_drawings(path: Path, run: RecordedRun, title: str, result: dict) -> None:
    """Raises ValueError for a table or a picture that is not that of the record, where the folder has them."""
    losses, devs = series(run.rows)
    picture = curve_svg(losses, devs, title, result["zero_shot"], result["best_step"], result["metric"])
    for name, text in (("metrics.csv", table_of(run.metrics)), ("curve.svg", picture)):
        if (path / name).is_file() and (path / name).read_text(encoding="utf-8") != text:
            raise ValueError(f"{path / name} is not what the record says")


def begin(path: Path, config: dict, files: dict[str, bytes]) -> RecordedRun:
    """Make the folder of a new run, which appears with its config.json and other files in it -> its record, still
    empty."""
    check_free(path)
    files = files | {"config.json": (json.dumps(config, indent=2) + "\n").encode()}  # the last: with it a run has begun
    if path.is_dir():
        for name, content in files.items():
            write_whole(path / name, content)
    else:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        try:
            for name, content in files.items():
                write_whole(partial / name, content)
            os.rename(partial, path)
        except OSError:  # a full disk; or another process was first
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return RecordedRun(config, [], [])


@contextmanager
def locked(path: Path) -> Iterator[str | None]:
    """Hold a run folder -> what to tell the user where it cannot be held.

    Raises ValueError where another process holds it.
    """
    if not path.is_dir():
        raise ValueError(f"{path} cannot be read as a run folder: it is not a directory")
    if fcntl is None:
        yield f"{path} is not locked, since this system has no flock: start no second process on it"
        return
    handle, told = os.open(path, os.O_RDONLY), None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{path} is in use: another process trains or finishes that run") from None
    except OSError as error:  # some network file systems have no locks
        told = f"{path} cannot be locked ({error}): start no second process on it"
    try:
        yield told
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and through no link that somebody has put in the way."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def table_of(lines: list[str], header: bool = True) -> str:
    """metrics.csv, from the lines of metrics.jsonl; without its header, what further lines add to it."""
    held = io.StringIO()
    table = csv.DictWriter(held, COLUMNS, extrasaction="ignore", lineterminator="\n")
    if header:
        table.writeheader()
    table.writerows(map(json.loads, lines))
    return held.getvalue()


class NoFolder:
    """What the other ranks of a run have in the place of its folder: they write nothing."""

    model = events = None

    def __init__(self, run: RecordedRun):
        self.chain, (self.losses, self.devs) = chain_of(run), series(run.rows)
        self.metrics = self.trajectory = open(os.devnull, "w")  # noqa: SIM115 (for the whole run)

    def dev(self, dev: DevRow, *rest) -> None:
        self.devs.append(dev)


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
            row = {"step": number, "projected_grad": projected_grads, "loss": loss if math.isfinite(loss) else None}
            if step is not None:
                changed, moves, held, way, lost = counts.tolist()
                for name, losses in (("plus", step.plus), ("minus", step.minus)):  # JSON has no numbers for others
                    row[name] = [loss if math.isfinite(loss) else None for loss in losses.tolist()]
                row["queries"] = len(step.plus)
                row |= {"changed": changed / self.size, "held_back": held / max(moves, 1), "lost": lost / max(way, 1)}
            row |= more
            line, chain = json.dumps(row), self.folder.chain
            chain.update(line.encode())
            digest = chain.copy().hexdigest()[:DIGITS]
            self.folder.trajectory.write(" ".join([*map(repr, projected_grads), digest]) + "\n")
            self.folder.losses.append((number, loss))
            self.folder.metrics.write(line + "\n")
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
    """By their names, where these differ, else by the ends of their paths, as long as they must be to differ."""
    ends = ([file.parts[-length:] for file in files] for length in count(1))
    names = ["/".join(end) for end in next(of_all for of_all in ends if len(set(of_all)) == len(files))]
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in zip(names, files, strict=True)}


def run_config(
    flags: dict, base_sha256: str, data_files: list[Path], other_files: list[Path], masks: bytes = b""
) -> dict:
    """What config.json holds.  other_files: others that decide the tokens and the model, such as its config.json.

    masks: the contents of a masks.safetensors.
    """
    of_masks = {"masks_sha256": hashlib.sha256(masks).hexdigest()} if masks else {}
    return sealed({
        "format": FORMAT, "flags": flags, "versions": versions(), "git_commit": git_commit(),
        "code_sha256": code_sha256(), "data_sha256": hashed(data_files), "other_sha256": hashed(other_files),
        "base_weights_sha256": base_sha256, **of_masks,
    })  # fmt: skip


def code_sha256() -> str:
    """Of all modules that a run can use."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    rooms = ("", "data", "family", "gpu", "runtime")
    for path in sorted(path for room in rooms for path in (root / room).glob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def check_free(path: Path) -> None:
    """Raises ValueError unless the folder is new or empty and can be made."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {path}: {nearest} is not a folder that can be written to")
    left = {"config.json.partial", "masks.safetensors", "masks.safetensors.partial"}  # of a killed process
    if path.is_dir() and not {inside.name for inside in path.iterdir()} <= left:
        raise ValueError(f"--out {path} is not empty: it may hold a run; give a new folder, or --resume {path}")


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
