"""benchmarks/ranks.py: one process, and two that share its batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ranks

FLAGS = ["--model", "tiny", "--device", "cpu", "--batch-size", "3", "--tokens", "8", "--repeats", "1"]


def test_one_process(capsys):
    ranks.main([*FLAGS, "--flags", "--weights int8"])
    line, last = capsys.readouterr().out.splitlines()
    (row,) = json.loads(last)["rows"]
    assert row["ranks"] == 1 and row["sequences"] == 3 and 0 < row["fastest_ms"] <= row["ms"] <= row["slowest_ms"]
    assert line.startswith("--weights int8: 1 ranks, 3 x 8")


@pytest.mark.full
def test_two_processes_end_with_the_same_weights():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29561"]
    done = subprocess.run([*command, "-m", "benchmarks.ranks", *FLAGS, "--flags", "--weights int8"], text=True,
                          capture_output=True, cwd=Path(ranks.__file__).parent.parent, env=os.environ)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["ranks"] == 2
