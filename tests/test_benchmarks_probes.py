"""benchmarks/probes.py: the ways that it times take the same steps, and it compiles and records as train.py does."""

import json

import pytest

from benchmarks import probes


def test_every_way_is_timed_on_the_same_steps(capsys):
    flags = "--model tiny --queries 2 --batch-size 2 --tokens 8 --repeats 2 --at-once 4 3 1"
    probes.main(flags.split())
    header, *rows, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert [int(row.split()[0]) for row in rows] == [4, 3, 1] == [int(way) for way in result["seconds"]]
    assert result["projected_grads_apart"]["1"] == 0 and max(result["projected_grads_apart"].values()) < 1e-3
    for way, (fastest, slowest) in result["spread"].items():
        assert 0 < fastest <= result["seconds"][way] <= slowest


@pytest.mark.parametrize("given", [[], ["--no-compile"], ["--no-graphs"]])
def test_flags_are_those_of_a_run_on_a_gpu(given, monkeypatch):
    """A step is compiled and recorded unless told otherwise, whatever it is timed on."""
    seen = []
    monkeypatch.setattr("runtime.config.best_device", lambda: "cuda")
    monkeypatch.setattr(probes, "validate", seen.append)
    for name in "examples", "problem_of", "report":
        monkeypatch.setattr(probes, name, lambda *args: None)
    monkeypatch.setattr(probes, "compare", lambda c, *args: ())
    probes.main(["--model", "tiny", *given])
    assert (seen[0].compile, seen[0].graphs) == ("--no-compile" not in given, "--no-graphs" not in given)


@pytest.mark.parametrize("flags", ["--repeats 0", "--tokens 0", "--queries 0", "--weights int3", "--model llama9"])
def test_the_command_refuses_in_a_line(flags, capsys):
    with pytest.raises(SystemExit):
        probes.main(flags.split())
    assert flags.split()[1] in capsys.readouterr().err.splitlines()[-1]
