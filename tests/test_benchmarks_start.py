"""The start of a run, told by its stages."""

import json

import pytest

from benchmarks import start


@pytest.mark.full
def test_the_embedded_model_starts(capsys):
    start.main(["--flags", "--device cpu --batch-size 4"])
    cold, warm, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["seconds"]
    for name, line in ("cold", cold), ("warm", warm):
        stages = found[name]
        assert list(stages) == ["imports", "model and data", "step 1", "step 2", "step 3", "to the first step"]
        assert stages["to the first step"] == pytest.approx(sum(list(stages.values())[:3])) and line.startswith(name)
        assert all(0 < seconds < 60 for seconds in stages.values())
