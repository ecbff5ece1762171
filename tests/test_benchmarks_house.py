"""benchmarks/house.py and hashes.py: what they count and compare, on made-up trees and results, and on this one."""

import json
from pathlib import Path

import pytest

from benchmarks import hashes, house
from runtime.config import parse, validate

HERE = Path(__file__).parent.parent
FILES = {
    "README.md": "# A\n\n![figure](a.svg)\n\n| a | b |\n|---|:-:|\n| 1 | 2 |\n",
    "train.py": "import gpu.kernels\nfrom quant import round\n\n\n"
                "def main(argv):\n    def nested():\n        return 1\n\n    return nested()\n",
    "quant.py": "@property\n@property\ndef round():\n    from runtime import curve\n    return curve\n",
    "gpu/__init__.py": "",
    "gpu/kernels.py": "import os\nfrom gpu import graphs\n",
    "gpu/graphs.py": "",
    "runtime/__init__.py": "",
    "runtime/curve.py": "",
    "tests/test_a.py": "import train\n\n\ndef test():\n" + "    pass\n" * 99,
}  # fmt: skip


@pytest.fixture
def tree(tmp_path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_functions_are_measured_from_def_to_their_last_line(tree):
    """Nested ones too; decorators are not part, nor are tests source."""
    figures = house.function_figures(house.files_of(tree, *house.SOURCE))
    lengths = {"main": 5, "nested": 2, "round": 3}
    assert figures["functions"] == 3 and figures["longest"] == "train.py:5 main"
    assert (figures["longest_lines"], figures["median_lines"], figures["short_share"]) == (lengths["main"], 3, 1.0)
    lines = [line for name, text in FILES.items() if "test" not in name and name.endswith("py")
             for line in text.splitlines() if line]  # fmt: skip
    assert figures["characters_a_line"] == pytest.approx(sum(map(len, lines)) / len(lines))


def test_readme_rows_are_without_the_lines_between(tree):
    assert house.readme_figures(tree) == {"lines": 7, "table_rows": 2, "pictures": 1}


def test_imports_are_found_wherever_they_stand(tree):
    graph = house.imports(tree)
    assert graph["train"] == ["gpu.kernels", "quant"] and graph["quant"] == ["runtime.curve"]
    assert graph["gpu.kernels"] == ["gpu.graphs"] and not house.circles(graph)


def test_circles_are_groups_that_reach_one_another():
    graph = {"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": [], "e": ["f"], "f": ["e"], "g": ["a"]}
    assert house.circles(graph) == [["a", "b", "c"], ["e", "f"]]


def test_a_watched_stack_is_as_deep_as_its_own_frames(tree):
    """Two functions and a generator expression, two of them on the stack beneath a lambda."""
    code = "def outer():\n    return (lambda: inner())()\n\n\ndef inner():\n    return sum(i for i in [1, 2])\n"
    (tree / "quant.py").write_text(code)
    space = {}
    exec(compile(code, tree / "quant.py", "exec"), space)
    watch = house.Watch(tree)
    house.sys.setprofile(watch)
    space["outer"]()
    json.dumps({})
    house.sys.setprofile(None)
    assert watch.deepest == ["outer", "outer.<locals>.<lambda>", "inner", "inner.<locals>.<genexpr>"]
    assert watch.entered["quant.py inner"] == 1 and watch.entered["quant.py inner.<locals>.<genexpr>"] == 3


def test_this_house():
    """One step enters at most 40 functions of ours, and no circle of imports is left."""
    counts = house.count(HERE)
    step = counts["step"]
    assert step["functions"] <= 40 and 0 < step["frames"] < step["functions"] and not counts["circles"]
    assert "zo_optim.py zo_step" in step["entered"] and not any("evaluate" in name for name in step["entered"])
    assert step["deepest"][:3] == ["main", "run", "train"]
    assert counts["lines"]["source"] > counts["lines"]["face"] > 0
    rows = house.table_rows(counts)
    assert rows["one step, functions of ours"].startswith(f"{step['functions']} in ")
    assert "zo_optim -> quant, random_bits" in house.walk_text(counts)


# ---------------------------------------------------------------- hashes


@pytest.mark.parametrize("name", [*hashes.RUNS, *hashes.FIRST_ORDER])
def test_every_run_has_flags_that_mean_something(name):
    c = parse(f"{hashes.COMMON} {(hashes.RUNS | hashes.FIRST_ORDER)[name]}".split())
    validate(c)
    assert (c.optimizer == "adamw") == (name in hashes.FIRST_ORDER)


def test_a_run_that_differs_or_fails_ends_with_code_1(tmp_path, capsys, monkeypatch):
    result = {"weights_sha256": "a" * 64, "losses_sha256": "b" * 64, "dev_loss": 1.0, "test": 0.5}
    runs = {"--weights int4": result, "--weights fp8": result}
    monkeypatch.setattr(hashes, "RUNS", {"one": "--weights int4", "two": "--weights fp8"})
    monkeypatch.setattr(hashes, "FIRST_ORDER", {})
    monkeypatch.setattr(hashes, "train", lambda tree, flags, threads: runs[flags.removeprefix(f"{hashes.COMMON} ")])
    before = tmp_path / "before.json"
    assert hashes.main(["--json", str(before)]) == 0
    assert hashes.main(["--against", str(before)]) == 0
    runs["--weights fp8"] = result | {"dev_loss": 1.0000001}
    capsys.readouterr()
    assert hashes.main(["--against", str(before)]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS in dev_loss" in out and json.loads(out.splitlines()[-1])["failed"] == ["two"]
    runs["--weights fp8"] = {"error": "out of memory"}
    assert hashes.main([]) == 1
    with pytest.raises(SystemExit, match="--threads 2, got 1"):
        hashes.main(["--against", str(before), "--threads", "1"])


@pytest.mark.full
def test_a_run_is_what_train_prints_and_records():
    row = hashes.train(HERE, "--steps 1 --batch-size 2 --num-eval 2 --seed 1 --device cpu", 1)
    assert set(row) == set(hashes.KEPT) and row["forwards"] == 2 and row["best_step"] == 1
    assert hashes.train(HERE, "--steps 0", 1)["error"].endswith("--steps must be in [1, 2147483647], got 0")
