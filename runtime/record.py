"""The record of a run, read back from its folder (runtime/run_folder.py), and what in it does not match.

Reading follows every digest, so that a record that was edited is refused before anything is done with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from runtime.json_files import parse, read_object, shown

# Of the folder.  1 called projected gradients slopes; 2 had no evaluation of step 0, and of a step's landing it had
# `clipped` in the place of `held_back` and `lost`; 3 had no digests.
FORMAT = 4
DIGITS = 16  # of a digest that are written
NOT_REPEATED = ("peak_memory_bytes", "reserved_memory_bytes", "seconds", "out", "digest")  # in a run done again
MOST_BYTES = 2**30  # of a file of lines
Chain = Any  # a hashlib object: the SHA-256 of all that was written so far


class RecordedRun(NamedTuple):
    """The record of a run, up to its last whole step and the evaluation that follows it."""

    config: dict  # config.json
    trajectory: list[str]  # its lines, one a step
    metrics: list[str]  # lines of metrics.jsonl

    @property
    def projected_grads(self) -> list[list[float]]:
        """Of each step."""
        return [[float(number) for number in line.split()[:-1]] for line in self.trajectory]

    @property
    def rows(self) -> list[dict]:
        return list(map(json.loads, self.metrics))

    def up_to(self, step: int) -> RecordedRun:
        """The record as it was after that step's evaluation."""
        kept = [line for line in self.metrics if json.loads(line)["step"] <= step]
        return self._replace(trajectory=self.trajectory[:step], metrics=kept)


def canonical(values: dict) -> str:
    """What a digest is of: all but what is not the same when a run is done again."""
    return json.dumps({name: value for name, value in values.items() if name not in NOT_REPEATED})


def chain_of(run: RecordedRun) -> Chain:
    """The digest of a record, to be gone on with."""
    chain = hashlib.sha256(run.config["sha256"].encode())
    for line in run.metrics:
        row = json.loads(line)
        chain.update((canonical(row) if "dev" in row else line).encode())
    return chain


def sealed(contents: dict) -> dict:
    """config.json's contents with their own SHA-256, of all but the folder's path, which may change."""
    hashed = contents | {"flags": {name: value for name, value in contents["flags"].items() if name != "out"}}
    return contents | {"sha256": hashlib.sha256(json.dumps(hashed).encode()).hexdigest()}


def digest_of_result(chain: Chain, result: dict) -> str:
    whole = chain.copy()
    whole.update(canonical(result).encode())
    return whole.hexdigest()[:DIGITS]


def small_files(path: Path) -> dict[str, str]:
    """The SHA-256 of what a finished run wrote beside its record and its weights, which have digests of their own."""
    files = [path / "predictions.jsonl", *sorted((path / "model").glob("*"))]
    files = [file for file in files if file.is_file() and file.suffix != ".safetensors"]
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read_run(path: Path) -> RecordedRun:
    """Raises ValueError for what is not a run folder, and with the file and line for a record that was edited."""
    try:
        config = read_config_of_run(path)
        trajectory, metrics = (whole_lines(path / name) for name in ("trajectory", "metrics.jsonl"))
        return followed(RecordedRun(config, trajectory, metrics))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a run folder: {error}") from None


def read_config_of_run(path: Path) -> dict:
    config = read_object(path / "config.json")
    if not isinstance(config.get("flags"), dict):
        raise ValueError("config.json is not that of a run")
    if config.get("format") != FORMAT:
        raise ValueError(f"its format is {config.get('format', 1)}, this version reads {FORMAT}; use the commit "
                         f"{config.get('git_commit')} that made it")  # fmt: skip
    if config != sealed({name: value for name, value in config.items() if name != "sha256"}):
        raise ValueError("config.json is not what the run began with: its contents do not have the SHA-256 in it")
    return config


def followed(run: RecordedRun) -> RecordedRun:
    """The record without what a killed process left half done: a step is whole with its line in both files."""
    chain, steps, kept = hashlib.sha256(run.config["sha256"].encode()), 0, []
    for number, line in enumerate(run.metrics, start=1):
        row = parse(line)
        if not isinstance(row, dict):
            raise ValueError(f"metrics.jsonl:{number} is not an object")
        of_step, grads = "projected_grad" in row, []
        if of_step and steps == len(run.trajectory):  # it is written there first, but a disk may keep another order
            break
        if of_step:
            *grads, digest = run.trajectory[steps].split() or [""]
            steps += 1
        else:
            digest = row.get("digest")
        chain.update((line if of_step else canonical(row)).encode())
        if of_step and json.dumps(row["projected_grad"]) != f"[{', '.join(grads)}]":
            raise ValueError(f"trajectory:{steps} has other projected gradients than metrics.jsonl:{number}")
        if digest != chain.copy().hexdigest()[:DIGITS]:
            raise ValueError(f"metrics.jsonl:{number} is not what the run wrote: its digest is another")
        kept.append(line)
    return run._replace(trajectory=run.trajectory[:steps], metrics=kept)


def recorded_loss(value: float | None) -> float:
    """A loss as metrics.jsonl has it, where one that was not finite is null, as JSON has no number for it."""
    return math.nan if value is None else value


def whole_lines(path: Path) -> list[str]:
    """A killed process may have left half a line at the end."""
    if not path.is_file():  # a pipe could be waited for without end
        raise ValueError(f"{path.name} is missing or no file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size / 2**30:.1f} GB; at most {MOST_BYTES >> 30} are read")
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def read_result(path: Path) -> dict | None:
    """result.json, of a run that has one."""
    if not (path / "result.json").is_file():
        return None
    result = read_object(path / "result.json")
    needed = {"interrupted": bool, "best_step": int, "digest": str, "files_sha256": dict, "weights_sha256": str}
    if "diverged" not in result or not all(isinstance(result.get(name), kind) for name, kind in needed.items()):
        raise ValueError(f"{path / 'result.json'} is not that of a run")
    return result


def check_result(path: Path, run: RecordedRun, result: dict, derived: dict) -> None:
    """Raises ValueError, with what differs where that can be told, unless the result follows from the record.

    derived: values that the record says, by their names in result.json.
    """
    for name, value in derived.items():
        if result.get(name) != value:
            raise ValueError(f"{path / 'result.json'}: {name} is {shown(result.get(name))}, by the record {value!r}")
    if result["digest"] != digest_of_result(chain_of(run), result):
        raise ValueError(f"{path / 'result.json'} is not what the run wrote: its digest is another")
    found = small_files(path)
    for name, sha256 in result["files_sha256"].items():
        published_without = name.startswith("model/") and not (path / "model").is_dir()
        if found.get(name) != sha256 and not published_without:
            raise ValueError(f"{path / name} is {'not what the run wrote' if name in found else 'missing'}")


def check_same(path: Path, recorded: dict, found: dict) -> None:
    """Raises ValueError, by name, where a run began with something else than what is found here.

    found: of config.json's entries, those to compare, texts or objects of texts.  As many of these are compared in
    their order: of files that are elsewhere now, folders that tell them apart may have other names.
    """
    for name, value in found.items():
        was = recorded[name]
        if isinstance(value, dict):
            value = dict(zip(was, value.values(), strict=True)) if len(was) == len(value) else value
            differ = sorted(key for key in {*was, *value} if was.get(key) != value.get(key))
            if differ:
                raise ValueError(f"{path} began with other contents of {', '.join(differ)} (its {name})")
        elif was != value:
            of_code = f"; its code is commit {recorded['git_commit']}" if name == "code_sha256" else ""
            raise ValueError(f"the run's {name} is {was}, here it is {value}{of_code}")
