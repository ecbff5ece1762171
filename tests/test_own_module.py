"""docs/own_module.py, run as a reader runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "own_module.py"


@pytest.mark.full
def test_both_formats_learn(tmp_path):
    """Three classes: a loss of ln 3 = 1.10 and a third right, or somewhat worse, before; nearly all right after."""
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = re.findall(r"(\w+) after (\d+) steps: loss (\S+), accuracy (\S+) \(unseen\)\n", done.stdout)
    assert [line[:2] for line in found] == [("int8", "0"), ("int8", "400"), ("fp32", "0"), ("fp32", "400")]
    for before, after in (found[:2], found[2:]):
        assert 1.0 < float(before[2]) < 1.4 and float(after[2]) < 0.7
        assert float(before[3]) < 0.5 and float(after[3]) > 0.95
    assert not done.stderr and len(done.stdout.splitlines()) == 4


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 40
