"""docs/own_module.py and docs/own_direction.py, run as a reader runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SCRIPT = DOCS / "own_module.py"


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


def test_a_direction_of_ones_own_learns_from_accuracy_alone(tmp_path):
    """Four classes, a quarter right before."""
    command = [sys.executable, DOCS / "own_direction.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after = re.findall(r"int8 after \d+ steps: (\S+) % right \(unseen\)\n", done.stdout)
    assert float(before) < 40 and float(after) > 85 and not done.stderr


@pytest.mark.parametrize("name", ["own_module.py", "own_direction.py"])
def test_it_is_short(name):
    assert len((DOCS / name).read_text().splitlines()) <= 40
