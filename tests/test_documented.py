"""Every command that README.md and RESULTS.md give for a real model, on SmolLM2-135M (tests/README.md): few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import shortened

import train

ROOT = Path(train.__file__).parent
RESULTS = (ROOT / "RESULTS.md").read_text()
REAL = RESULTS.split("\n## The embedded model")[0] + RESULTS.split("\n## The family")[1].split("\n## ")[0]
TEXT = (ROOT / "README.md").read_text() + REAL
COMMANDS = list(dict.fromkeys(re.findall(r"^python train\.py --model DIR (.*)$", TEXT, re.MULTILINE)))
FEW = "--steps 3 --eval-every 3 --num-eval 4 --batch-size 2 --device cpu"


def test_there_are_commands():
    assert len(COMMANDS) >= 8 and any("adazeta" in flags for flags in COMMANDS)


@pytest.mark.full
@pytest.mark.parametrize("flags", COMMANDS)
def test_a_documented_command_runs(flags, smollm2_directory, real_data, tmp_path, monkeypatch, capsys):
    """With the sizes that it is given but for steps and batches, on 16 examples to train with and 8 for dev.  Its last
    step changes weights, and its losses are those of a model that reads: near 1."""
    data = real_data("SST-2").parent
    given = ["--model", str(smollm2_directory), *flags.split(), "--data-dir", str(data), *FEW.split()]
    with shortened(train=16, dev=8):
        assert train.main([*given, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == result["steps"] == 3 and result["diverged"] is None and result["lr"] > 0
    assert all(0 < row["loss"] < 5 for row in steps) and steps[-1]["lr"] > 0
    assert "changed" not in steps[-1] or steps[-1]["changed"] > 0
