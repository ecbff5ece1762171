"""How the code is laid out, counted: lines, functions, imports, and how far one step walks.

    python -m benchmarks.house                         # this checkout
    python -m benchmarks.house --tree ../before .      # two checkouts side by side

Lines are those of *.py files by room: the face is the top level.  Figures about functions cover the face and then the
source, which is the face, runtime, gpu and data; a function runs from its `def` to its last line, and nested ones count
too.  Characters are the mean over lines that are not blank.  The import graph has every import of one of our modules by
another, of source and docs; imports in function bodies and for type checking count.

A step is the body of the training loop (batch, step, record) of `--method quzo --weights int8` on the embedded model on
a CPU, once it is warm and where no evaluation is due.  It runs under sys.setprofile, which sees every Python function
that is entered.  Hops are the distinct ones of ours, and frames the most of ours on the stack at once, from train.main
down.  Lambdas, generator expressions and comprehensions are counted apart from functions, but are frames like others
(from Python 3.12 on, comprehensions are part of their function).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

FACE = "face"
SOURCE = (FACE, "runtime", "gpu", "data")
ROOMS = (*SOURCE, "docs", "benchmarks", "tests")
SHORT = 5  # lines
WATCHED_STEP = 4  # from 0; by then every cache is warm
STEP_FLAGS = "--method quzo --weights int8 --device cpu --steps 8 --eval-every 100 --num-eval 8"

# ---------------------------------------------------------------- files


def rooms(tree: Path) -> dict[str, list[Path]]:
    found = {room: sorted((tree / room).rglob("*.py")) for room in ROOMS[1:]}
    return {FACE: sorted(tree.glob("*.py"))} | found


def files_of(tree: Path, *wanted: str) -> list[Path]:
    return [path for room, paths in rooms(tree).items() if room in wanted for path in paths]


def functions(paths: list[Path]) -> dict[str, int]:
    """file:line name -> lines."""
    lengths = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{path.name}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return lengths


def function_figures(paths: list[Path]) -> dict:
    lengths = functions(paths)
    longest = max(lengths, key=lengths.get)
    return {
        "functions": len(lengths), "longest_lines": lengths[longest], "longest": longest,
        "median_lines": statistics.median(lengths.values()),
        "short_share": sum(n <= SHORT for n in lengths.values()) / len(lengths),
        "characters_a_line": statistics.mean(
            len(line) for path in paths for line in path.read_text().splitlines() if line.strip()
        ),
    }  # fmt: skip


def readme_figures(tree: Path) -> dict:
    text = (tree / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and not re.fullmatch(r"[|:\- ]+", line)]
    return {"lines": len(text.splitlines()), "table_rows": len(rows),
            "pictures": len(re.findall(r"!\[|<img ", text))}  # fmt: skip


# ---------------------------------------------------------------- which module imports which


def imports(tree: Path) -> dict[str, list[str]]:
    """module -> modules of ours that it imports anywhere in its text."""
    paths = {module_name(path, tree): path for path in files_of(tree, *SOURCE, "docs")}
    return {name: sorted(imported(path, set(paths)) - {name}) for name, path in sorted(paths.items())}


def module_name(path: Path, tree: Path) -> str:
    return ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, ours: set[str]) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}  # `from gpu import kernels`
            names |= parts & ours or {node.module}
    return names & ours


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """Groups of modules that reach one another; none where all arrows go one way."""
    reached = {name: reach(graph, name) for name in graph}
    groups = {tuple(sorted(m for m in reached[name] if name in reached[m])) for name in graph if name in reached[name]}
    return [list(group) for group in sorted(groups)]


def reach(graph: dict[str, list[str]], start: str) -> set[str]:
    seen, ahead = set(), list(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += graph[name]
    return seen


# ---------------------------------------------------------------- one step


class Watch:
    """A hook for sys.setprofile that notes code of ours as it is entered."""

    def __init__(self, tree: Path):
        self.prefix, self.entered, self.deepest = f"{tree}/", Counter(), []

    def is_ours(self, frame: FrameType) -> bool:
        path = frame.f_code.co_filename
        return path.startswith(self.prefix) and "/.venv/" not in path and path != __file__

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event != "call" or not self.is_ours(frame):
            return
        path, name = frame.f_code.co_filename.removeprefix(self.prefix), frame.f_code.co_qualname
        self.entered[f"{path} {name}"] += 1
        stack = []
        while frame is not None:
            if self.is_ours(frame) and frame.f_code.co_name != "<module>":
                stack.append(frame.f_code.co_qualname)
            frame = frame.f_back
        self.deepest = max(self.deepest, stack[::-1], key=len)


def watch_step(tree: Path) -> dict:
    """Train in this process, and watch one step, between two updates of the loop's progress bar (of older trees its
    yields)."""
    import tqdm

    watch = Watch(tree)

    class WatchedBar(tqdm.tqdm):
        def __iter__(self):
            for at, step in enumerate(super().__iter__()):
                if at == WATCHED_STEP:
                    sys.setprofile(watch)
                yield step
                sys.setprofile(None)

        def update(self, n: int = 1) -> bool | None:
            sys.setprofile(None)
            shown = super().update(n)
            if self.n == WATCHED_STEP:
                sys.setprofile(watch)
            return shown

    tqdm.tqdm = WatchedBar
    sys.path.insert(0, str(tree))
    import train

    with TemporaryDirectory() as directory:
        code = train.main([*STEP_FLAGS.split(), "--out", f"{directory}/run"])
    if code:
        raise RuntimeError(f"train.main ended with {code}")
    named = {where: n for where, n in watch.entered.items() if not where.endswith(">")}
    files = Counter(where.split()[0] for where in named)
    return {
        "functions": len(named), "files": len(files), "lambdas_and_comprehensions": len(watch.entered) - len(named),
        "calls": watch.entered.total(), "frames": len(watch.deepest), "by_file": dict(files.most_common()),
        "deepest": watch.deepest, "entered": dict(watch.entered),
    }  # fmt: skip


def step_figures(tree: Path) -> dict:
    """watch_step in a process that has imported nothing of another tree; -P keeps this folder out of its path."""
    command = [sys.executable, "-P", __file__, "--watch", str(tree)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the step of {tree} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the table


def count(tree: Path) -> dict:
    found = rooms(tree)
    lines = {room: sum(len(path.read_text().splitlines()) for path in paths) for room, paths in found.items()}
    graph = imports(tree)
    return {
        "lines": lines | {"source": sum(n for room, n in lines.items() if room in SOURCE)},
        "face": function_figures(found[FACE]), "source": function_figures(files_of(tree, *SOURCE)),
        "readme": readme_figures(tree), "step": step_figures(tree), "imports": graph, "circles": circles(graph),
    }  # fmt: skip


def table_rows(house: dict) -> dict[str, str]:
    rows = {f"lines, {room}": f"{n:,}" for room, n in house["lines"].items()}
    for scope in (FACE, "source"):
        figures = house[scope]
        rows |= {
            f"functions, {scope}": f"{figures['functions']}",
            f"longest function, {scope}": f"{figures['longest_lines']} ({figures['longest'].split()[-1]})",
            f"median function, {scope}": f"{figures['median_lines']:g}",
            f"functions of at most {SHORT} lines, {scope}": f"{figures['short_share']:.0%}",
            f"characters a line, {scope}": f"{figures['characters_a_line']:.1f}",
        }
    rows |= {f"README, {name.replace('_', ' ')}": f"{n}" for name, n in house["readme"].items()}
    step = house["step"]
    rows |= {
        "one step, functions of ours": f"{step['functions']} in {step['files']} files",
        "one step, lambdas and comprehensions": f"{step['lambdas_and_comprehensions']}",
        "one step, frames": f"{step['frames']}",
        "one step, calls": f"{step['calls']:,}",
    }
    return rows | {"import circles": "; ".join(", ".join(group) for group in house["circles"]) or "none"}


def walk_text(house: dict) -> str:
    graph = [f"    {name} -> {', '.join(used)}" for name, used in house["imports"].items() if used]
    leaves = ", ".join(name for name, used in house["imports"].items() if not used)
    files = ", ".join(f"{path} {n}" for path, n in house["step"]["by_file"].items())
    stack = " > ".join(house["step"]["deepest"])
    return "\n".join(["  imports", *graph, f"    of ours nothing: {leaves}", f"  one step: {files}", f"    {stack}"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--tree", type=Path, nargs="+", default=[here], help="checkouts, one column each")
    parser.add_argument("--json", type=Path, help="a file to save the counts in")
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)  # step_figures' process
    args = parser.parse_args(argv)
    if args.watch:
        sys.stdout, out = sys.stderr, sys.stdout  # train.main prints too
        print(json.dumps(watch_step(args.watch)), file=out)
        return 0
    houses = {str(tree): count(tree.resolve()) for tree in args.tree}
    columns = [table_rows(house) for house in houses.values()]
    print(f"{'':42}" + "".join(f"{tree[-30:]:>32}" for tree in houses))
    for name in columns[0]:
        print(f"{name:42}" + "".join(f"{column[name]:>32}" for column in columns))
    for tree, house in houses.items():
        print(f"\n{tree}\n{walk_text(house)}")
    if args.json:
        args.json.write_text(json.dumps(houses, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
