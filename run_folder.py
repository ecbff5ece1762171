"""The run folder, which is the audit trail of one training run.

config.json    every flag, versions, git commit, hashes of the base weights and of the data files
metrics.jsonl  one line a step, and one a dev evaluation
trajectory     one line a step: the projected gradient of each query, in digits that read back exactly.  With
               config.json and the base checkpoint it redoes every update (zo_optim.update) without a forward
model/         the best-dev weights as they are stored, with config.json and tokenizer; model.load reads it
curve.svg      loss and dev accuracy over steps
profile.json   with --profile, where a step's time goes
result.json    the last line of standard output
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy
import safetensors
import sentencepiece
import tokenizers
import torch


class Past(NamedTuple):
    """What a run folder says of its run."""

    config: dict  # config.json
    slopes: list[list[float]]  # of each whole step
    rows: list[dict]  # of metrics.jsonl, up to that step


class RunFolder:
    """Creates the folder; every line is flushed as it is written, so a killed run is readable to its last step."""

    def __init__(self, path: Path, past: Past | None = None):
        """past: continue that run, with what a killed process left of a step cut off."""
        if past is None:
            check_free(path)
            path.mkdir(parents=True, exist_ok=True)
        self.path, self.model = path, path / "model"
        rows, slopes = (past.rows, past.slopes) if past else ([], [])
        self.losses = [(row["step"], row["loss"]) for row in rows if "slope" in row]
        self.devs = [(row["step"], row["dev"]) for row in rows if "dev" in row]
        self.forwards = max((row["forwards"] for row in rows if "dev" in row), default=0)
        self._write("trajectory", "".join(map(_line, slopes)))
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self._metrics = open(path / "metrics.jsonl", "a")  # noqa: SIM115 (open for the whole run)
        self._trajectory = open(path / "trajectory", "a")  # noqa: SIM115

    def write_config(self, flags: dict, base_sha256: str, data_files: list[Path], other_files: list[Path]) -> None:
        """other_files: what else decides the tokens, such as the tokenizer's."""
        hashes = {"data_sha256": hashed(data_files), "other_sha256": hashed(other_files)}
        hashes["base_weights_sha256"] = base_sha256
        self._write_json("config.json", {"flags": flags, "versions": versions(), "git_commit": git_commit()} | hashes)

    def step(self, step: int, slopes: list[float], loss: float, metrics: dict) -> None:
        """Record step number `step` (from 1), after its update."""
        self._trajectory.write(_line(slopes))
        self._trajectory.flush()
        self.losses.append((step, loss))
        self._row({"step": step, "slope": slopes, "loss": loss} | metrics)

    def dev(self, step: int, forwards: int, accuracy: float, loss: float, peak_memory_bytes: int) -> None:
        """forwards: in all steps until now, each of one batch by one probe."""
        self.devs.append((step, accuracy))
        self.forwards = forwards
        row = {"step": step, "forwards": forwards, "dev": accuracy, "dev_loss": loss}
        self._row(row | {"peak_memory_bytes": peak_memory_bytes})
        self.draw()

    def result(self, result: dict) -> None:
        self._write_json("result.json", result)
        self.draw()
        self._metrics.close()
        self._trajectory.close()

    def profile(self, profile: dict) -> None:
        self._write_json("profile.json", profile)

    def draw(self) -> None:
        self._write("curve.svg", curve_svg(self.losses, self.devs, self.forwards))

    def _row(self, row: dict) -> None:
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()

    def _write_json(self, name: str, value: dict) -> None:
        self._write(name, json.dumps(value, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all."""
        partial = self.path / f"{name}.partial"
        partial.write_text(text)
        os.replace(partial, self.path / name)


def hashed(files: list[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_free(path: Path) -> None:
    """Raises ValueError unless the folder is new or empty and can be made."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {path}: {nearest} is not a folder that can be written to")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"--out {path} is not empty: it may hold a run; give a new folder")


def _line(slopes: list[float]) -> str:
    return " ".join(map(repr, slopes)) + "\n"


def read_past(path: Path) -> Past:
    """Raises ValueError for what is not a run folder."""
    try:
        config = json.loads((path / "config.json").read_text())
        if not {"flags", "base_weights_sha256", "data_sha256"} <= set(config):
            raise ValueError("config.json is not that of a run")
        slopes = read_trajectory(path / "trajectory")
        rows = [json.loads(line) for line in _whole_lines(path / "metrics.jsonl")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a run folder: {error}") from None
    recorded = sum("slope" in row for row in rows)
    slopes = slopes[:recorded]  # a step's line is written there first
    return Past(config, slopes, [row for row in rows if row["step"] <= len(slopes)])


def read_trajectory(path: Path) -> list[list[float]]:
    """The slopes of every whole line: a killed process may have left half a line at the end."""
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


# ---------------------------------------------------------------- curve.svg

WIDTH, HEIGHT, MARGIN = 640, 360, 48


def curve_svg(losses: list[tuple[int, float]], devs: list[tuple[int, float]], forwards: int = 0) -> str:
    """Loss (thin, smoothed; left axis) and dev accuracy (dots; right axis, 0 to 100 %) over steps; below the last, the
    forwards until the last dot."""
    last = max([step for step, _ in losses + devs], default=1) or 1
    smooth = _smooth(losses)
    top = max([loss for _, loss in smooth], default=1.0) * 1.05 or 1.0

    def points(series: list[tuple[int, float]], ceiling: float) -> list[str]:
        inner_x, inner_y = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
        return [f"{MARGIN + inner_x * s / last:.1f},{HEIGHT - MARGIN - inner_y * v / ceiling:.1f}" for s, v in series]

    def text(x: float, y: float, words: str, colour: str = "#333", anchor: str = "middle") -> str:
        return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{words}</text>'

    dots = points(devs, 1.0)
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<path d="M{MARGIN},{MARGIN}V{bottom}H{right}V{MARGIN}" fill="none" stroke="#999"/>',
        f'<polyline points="{" ".join(points(smooth, top))}" fill="none" stroke="#4477aa"/>',
        f'<polyline points="{" ".join(dots)}" fill="none" stroke="#cc6677" stroke-width="2"/>',
        *(f'<circle cx="{d.split(",")[0]}" cy="{d.split(",")[1]}" r="3" fill="#cc6677"/>' for d in dots),
        text(MARGIN - 6, MARGIN + 4, f"{top:.2f}", "#4477aa", "end"),
        text(MARGIN - 6, bottom, "0", "#4477aa", "end"),
        text(right + 6, MARGIN + 4, "100 %", "#cc6677", "start"),
        text(right + 6, bottom, "0 %", "#cc6677", "start"),
        text(MARGIN, MARGIN - 14, "training loss", "#4477aa", "start"),
        text(right, MARGIN - 14, f"dev accuracy{f' {devs[-1][1]:.1%}' if devs else ''}", "#cc6677", "end"),
        text(MARGIN, bottom + 18, "0"),
        text(right, bottom + 18, f"{last}"),
        text(WIDTH / 2, bottom + 32, "step"),
        *([text(right, bottom + 32, f"{forwards:,} forwards", anchor="end")] if forwards else []),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _smooth(series: list[tuple[int, float]], most: int = 300) -> list[tuple[int, float]]:
    """Means of consecutive steps, so that a long run draws as few points as a short one."""
    width = max(1, -(-len(series) // most))
    groups = [series[i : i + width] for i in range(0, len(series), width)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
