"""The house: which file may import which, what may print, and that documents say what is there.

Every import counts, those in functions and for type checking too.  The graph as text: `python -m benchmarks.house`.
"""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import shortened

import quant
import train
import zo_optim
from benchmarks.house import circles, imported, module_name
from runtime import config, flags

ROOT = Path(train.__file__).parent
IGNORED = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}


def files(*endings: str) -> list[Path]:
    """Those of the repository, without what is hidden (but .ci) or ignored."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part in IGNORED or part.startswith(".") and part != ".ci" for part in parts)
        if path.is_file() and not hidden and path.name.endswith(endings):
            found.append(path)
    return found


MODULES = {module_name(path, ROOT).removeprefix("tests."): path for path in files(".py")}  # tests/ is on the path
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
GRAPH = {name: imported(path, set(MODULES)) - {name} for name, path in MODULES.items()}
EMPTY = {name for name, path in MODULES.items() if path.name == "__init__.py" and not GRAPH[name]}
FACE = {name for name, path in MODULES.items() if path.parent == ROOT}
TESTS = {name for name, path in MODULES.items() if path.relative_to(ROOT).parts[0] == "tests"}
SCRIPTS = {name for name, path in MODULES.items() if path.parent.name in ("benchmarks", "docs", "figures")}
SCRIPTS |= {f"family.{name}" for name in ("fedtt", "pinn", "poor_man")}
SOURCE = set(MODULES) - TESTS - SCRIPTS - {".ci.not_installable"}


def calls(name: str) -> set[str]:
    """The functions and methods that a module calls, as they are spelled."""
    return {ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)}


# ---------------------------------------------------------------- which module imports which

MAY_IMPORT = {  # of our modules; one that is not listed is free but for the tests below
    "random_bits": "",
    "quant": "",
    "zo_optim": "quant random_bits",
    "model": "quant random_bits runtime.checkpoints runtime.model_configs",
    "tensor_train": "model quant random_bits runtime.checkpoints runtime.json_files",
    "runtime.checkpoints": "quant runtime.json_files",
    "runtime.json_files": "",
    "runtime.model_configs": "runtime.json_files",
    "runtime.curve": "",
    "runtime.first_order": "quant",
    "runtime.hub": "data.tasks runtime.json_files",
    "runtime.flags": "data.tasks runtime.hub",
    "data.tasks": "runtime.json_files",
    "data.archives": "data.tasks",
    "data.files": "data.tasks runtime.json_files",
    "data.metrics": "",
    "data.tokenizer": "runtime.json_files",
    "data.scoring": "data.metrics data.tasks data.tokenizer",
}


def test_no_imports_go_in_a_circle():
    assert circles({name: sorted(used) for name, used in GRAPH.items()}) == []
    for name, tree in TREES.items():  # what the graph would not see
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], name
        free = name in TESTS or name == "data.metrics"  # which imports what a user's own task names
        assert free or not calls(name) & {"import_module", "importlib.import_module", "__import__"}, name


def test_arrows_go_one_way():
    for name, allowed in MAY_IMPORT.items():
        assert GRAPH[name] <= set(allowed.split()), name
    for name, used in GRAPH.items():
        room, of_gpu = name.split(".")[0], {other for other in used if other.split(".")[0] == "gpu"}
        if room == "gpu":
            assert used - of_gpu <= FACE - {"train"}, name
        elif name not in ("train", "runtime.problem"):  # which put the twins in
            assert not of_gpu or name in TESTS | SCRIPTS, name
        assert "train" not in used or name in TESTS or room == "benchmarks", name
        assert name in TESTS | SCRIPTS or not used & (TESTS | SCRIPTS), name


def named(text: str) -> list[str]:
    """A list of docs/rooms.md: a.b, .c -> ["a.b", "a.c"]."""
    names = []
    for name in text.split(", "):
        names.append(names[-1].partition(".")[0] + name if name.startswith(".") else name)
    return names


def modules_of(name: str) -> set[str]:
    """Of a room or a module, as docs/rooms.md names it, but for packages that import nothing."""
    within = {other for other in MODULES if f"{other}.".startswith(f"{name}.") and other not in EMPTY}
    return {"the face": FACE - {"train"}, "nothing": set()}.get(name, within)


def test_the_table_of_rooms_is_the_graph():
    """Each module is in one row, whose modules import no more than it says, and all that it says."""
    table = re.search(r"```\n(.*?)```", DOCUMENTS[ROOT / "docs" / "rooms.md"], re.DOTALL)[1]
    rows = [map(named, re.split(" {2,}", re.sub(r" \(.*\)", "", line))) for line in table.splitlines()]
    rows, found = [tuple(row) for row in rows], []
    for names, allowed in rows:
        elsewhere = [name for others, _ in rows for name in others if name.startswith(tuple(f"{n}." for n in names))]
        modules = set().union(*map(modules_of, names)).difference(*map(modules_of, elsewhere))
        used = set().union(*(GRAPH[module] for module in modules))
        assert used <= set().union(*map(modules_of, allowed)), names
        assert not [name for name in allowed if name != "nothing" and not modules_of(name) & used], names
        found += modules
    assert sorted(found) == sorted(FACE.union(*map(modules_of, ("data", "family", "gpu", "runtime"))))


def test_test_files_share_helpers_and_oracles_alone():
    for name in TESTS:
        assert GRAPH[name] & TESTS <= {"helpers", "oracles"}, name


# ---------------------------------------------------------------- what a library does not do


def test_only_train_and_scripts_print():
    for name in SOURCE - {"train", "data.tiny.make"}:
        assert not calls(name) & {"print", "input", "sys.stdout.write", "warnings.warn", "logging.warning"}, name


def test_nothing_can_unpickle():
    for name in SOURCE | SCRIPTS:
        assert not calls(name) & {"torch.load", "torch.save"}, name
        assert not re.search(r"^\s*(from|import) pickle|weights_only|allow_pickle", MODULES[name].read_text(), re.M)


PROGRAM = """
import importlib, random, signal, sys
import numpy, torch
from huggingface_hub import snapshot_download  # which draws

def state():
    python, handlers = random.getstate(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    return (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), python, handlers,
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), list(sys.path))

before = state()
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name == "triton", (name, error)
assert state() == before
"""


def test_importing_has_no_effect(tmp_path):
    """No output, no global random draw, no handler, thread or dtype changed, no file made where it runs or at home."""
    env = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROGRAM, *sorted(SOURCE)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["."], ["-e", "."]], ids=["plain", "editable"])
def test_an_install_ends_in_one_line_and_installs_nothing(flags):
    """--dry-run: where this test fails, pip would still install nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Would install" not in done.stdout
    assert re.search(r"\[1 lines of output\]\s+quzo is not installed but used in place: .*PYTHONPATH", done.stderr)


# ---------------------------------------------------------------- documents

README = (ROOT / "README.md").read_text()
DOCUMENTS = {path: path.read_text() for path in files(".md")}
BUDGETS = {"README.md": 200, "docs/walkthrough.py": 160, "docs/walkthrough_tensor_train.py": 120}


@pytest.mark.parametrize("path", BUDGETS)
def test_what_is_to_be_read_at_once_is_short(path):
    assert len((ROOT / path).read_text().splitlines()) <= BUDGETS[path]


def block(name: str) -> str:
    """The code in the README between two marks."""
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- /{name} -->", README, re.DOTALL)[1]


def test_the_readmes_code_is_the_source():
    assert block("zo_step") == inspect.getsource(zo_optim.zo_step)
    assert block("loop") in inspect.getsource(train.train)


def commands(text: str) -> list[str]:
    """The flags of `python train.py` that stand on lines of their own."""
    found = re.findall(r"^python train\.py(.*)$", text, re.MULTILINE)
    return [flags.partition("#")[0] for flags in found if not re.search("--(help|resume|replay|evaluate)|json", flags)]


def test_commands_of_the_documents_parse():
    assert len(commands(README)) >= 5
    for path, text in DOCUMENTS.items():
        for command in commands(text):
            config.validate(config.parse(command.replace("--model DIR", "--model .").split()))
        for name in re.findall(r"python -m (benchmarks\.\w+|data\.tiny\.\w+)", text):
            assert name in MODULES, (path, name)
        for name in re.findall(r"python (\w[\w/]*\.py)", text):
            assert (ROOT / name).is_file(), (path, name)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE)) <= set(targets)


@pytest.mark.full
@pytest.mark.parametrize("model", ["zollama-28m", "zoroberta-26m"])
def test_commands_of_the_readme_run_on_a_real_model(model, real_model, real_data, tmp_path, monkeypatch):
    """One step each, on a few examples, of which few are read to calibrate; on int4 codes, whose making takes most of
    the time, one command of one model alone."""
    directory = real_model(model)
    short = ["--steps", "1", "--batch-size", "4", "--data-dir", str(real_data("k-shot").parent), "--device", "cpu"]
    for at, command in enumerate(command for command in commands(README) if "--model DIR" in command):
        if "int4" in command and (model == "zoroberta-26m" or "loretta" in command):
            continue
        given = [*command.replace("DIR", str(directory)).split(), *short, "--num-eval", "8"]
        with shortened(train=16, dev=8):
            assert train.main([*given, "--out", str(tmp_path / str(at))]) == 0, command
    assert at >= 2


def test_links_and_files_that_documents_name_are_there():
    for path, text in DOCUMENTS.items():
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (path.parent / link).exists(), (path, link)
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)[1]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_equations_live_where_the_readme_says():
    """Each name in the last column is defined in a file whose name is in its row, or in that folder."""
    table = README.partition("## Where each equation lives")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if "`" in line]
    assert len(rows) > 10
    for row in rows:
        for name in re.findall(r"`([\w.]+)`", row.rpartition("|")[0].rpartition("|")[2]):
            outer, _, inner = name.partition(".")
            homes = [path for module, path in MODULES.items() if defines(TREES[module], outer, inner)]
            assert any(path.name in row for path in homes), (name, row)


def defines(tree: ast.Module, outer: str, inner: str) -> bool:
    """At the top, a function, class or name, or a method of a class."""
    for node in tree.body:
        names = [getattr(target, "id", None) for target in getattr(node, "targets", [])]
        if outer in [*names, getattr(node, "name", None)]:
            return not inner or inner in [getattr(part, "name", None) for part in getattr(node, "body", [])]
    return False


def test_no_file_names_a_path_of_a_machine():
    machine = re.compile(r"/(?<![\w.}]/)(home|root|Users|mnt|work|workspace|scratch|tmp|opt|srv|var|media)/")
    for path in files(".py", ".md", ".toml", ".cff", ".txt", ".json", ".svg", "Makefile", "LICENSE", "run"):
        assert not machine.search(path.read_text()), path


def test_tests_readme_names_tests_that_exist():
    text = (ROOT / "tests" / "README.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert test in [node.name for node in TREES[file].body if isinstance(node, ast.FunctionDef)], (file, test)
    assert re.findall(r"^\*\*(\d+)\. ", text, re.MULTILINE) == [str(n) for n in range(1, 11)]


# ---------------------------------------------------------------- flags


def test_choices_are_those_of_the_quantisers_and_help_needs_no_torch():
    """Under a second: most of a start is torch's import, which a reader of --help need not wait for."""
    for name in ("FORMATS", "FLOATS", "RESIDUALS", "ACTIVATIONS"):
        assert getattr(flags, name) == getattr(quant, name)
    program = "import sys; import runtime.flags; sys.exit(bool({'torch', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    done = subprocess.run([sys.executable, "-X", "importtime", "train.py", "--help"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and b"--method" in done.stdout and b"| torch" not in done.stderr


def test_every_flag_is_a_field_and_every_default_has_one_home(capsys):
    """A field's default is its own, or None, and then in tables by method, directions, files.  Nothing else has flags,
    and each flag is used by a document or a test."""
    names = {f.name for f in fields(config.Config)}
    without = {f.name for f in fields(config.Config) if f.default is None}
    assert set(flags.DEFAULTS) == set(flags.TINY_DEFAULTS) == set(flags.METHODS)
    tables = flags.DEFAULTS, flags.TINY_DEFAULTS, flags.ADAPTER_DEFAULTS
    for case in (case for table in (*tables, flags.SPARSE_DEFAULTS, flags.FILE_DEFAULTS) for case in table.values()):
        assert set(case) <= without
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    shown = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert shown == {name.replace("_", "-") for name in names}
    assert not [name for name in SOURCE - {"runtime.flags"} if "argparse" in MODULES[name].read_text()]
    used = "\n".join([*DOCUMENTS.values(), *(MODULES[name].read_text() for name in TESTS | SCRIPTS)])
    assert not [name for name in names if not re.search(rf"--(no-)?{name.replace('_', '-')}\b|\b{name}=", used)]
    assert "auto" not in vars(config.parse([])).values()
