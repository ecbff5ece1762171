"""Pictures: a run folder's curve.svg, and the committed figures of docs/figures.

A picture's looks are judged by eye; held here is that the files are whole, small, true to their numbers and redrawn to
the same bytes.
"""

import importlib.util
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from runtime.curve import block_means, curve_svg, ticks

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
NAMES = ["accuracy_memory", "demo_curve", "rounding", "sparse_directions", "step", "tensor_train"]
SVG = "{http://www.w3.org/2000/svg}"

# ---------------------------------------------------------------- curve.svg


def marks(svg: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """The places of what has that class: (x, y) in pixels."""
    found = [mark for mark in svg.iter() if mark.get("class") == name]
    return [(float(m.get("cx", m.get("x"))), float(m.get("cy", m.get("y")))) for m in found]


def words(svg: ElementTree.Element) -> str:
    return "\n".join(text.text for text in svg.iter(SVG + "text"))


def test_the_curve_has_a_point_of_accuracy_and_of_loss_for_each_dev_evaluation():
    losses = [(step, 1 / step) for step in range(1, 1001)]
    devs = [(250, 500, 0.5, 0.75), (500, 1000, 0.75, 0.25), (1000, 2000, 1.0, 0.5)]
    svg = ElementTree.fromstring(curve_svg(losses, devs, "a run", zero_shot=0.25, best_step=500))
    accuracies, dev_losses = marks(svg, "dev-accuracy"), marks(svg, "dev-loss")
    assert len(accuracies) == len(dev_losses) == 3
    assert accuracies[0][1] > accuracies[1][1] > accuracies[2][1]  # higher is better, and y goes down
    assert dev_losses[0][1] < dev_losses[2][1] < dev_losses[1][1]
    ((x, y),) = marks(svg, "zero-shot")
    assert x < accuracies[0][0] and y > accuracies[0][1]
    assert math.isclose(accuracies[1][0] - x, (accuracies[2][0] - x) / 2, abs_tol=0.1)
    text = words(svg)
    assert "best step 500: dev loss 0.250, dev accuracy 75.0 %" in text
    assert "test accuracy before training 25.0 %" in text and "2,000 forwards" in text
    of_squad = words(ElementTree.fromstring(curve_svg(losses, devs, "a run", 0.25, 500, metric="f1")))
    assert "dev f1 75.0 %" in of_squad and "test f1 before training 25.0 %" in of_squad and "accuracy" not in of_squad
    (line,) = [path for path in svg.iter(SVG + "path") if path.get("class") == "best-step"]
    assert line.get("d").startswith(f"M{accuracies[1][0]}")


def test_a_long_run_draws_as_few_points_as_a_short_one():
    svg = ElementTree.fromstring(curve_svg([(s, 1.0) for s in range(1, 100_001)], [], "long"))
    longest = max(len(line.get("points").split()) for line in svg.iter(SVG + "polyline"))
    assert 200 <= longest <= 300
    assert block_means([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(2, 2.0), (3, 5.0)]


def test_the_curve_escapes_its_title():
    svg = ElementTree.fromstring(curve_svg([(1, 0.5)], [], "A & <b> \"quoted\" 'run'"))
    assert svg.find(SVG + "title").text == "A & <b> \"quoted\" 'run'"
    assert "A & <b>" in words(svg)


@pytest.mark.parametrize("zero_shot", [None, 0.0, 1.0])
@pytest.mark.parametrize(
    "losses, devs",
    [
        ([], []),
        ([(1, 0.7)], []),
        ([(1, 0.7)], [(1, 2, 0.5, 0.7)]),
        ([(1, 0.0), (2, 0.0)], [(2, 4, 0.0, 0.0)]),
        ([(1, math.nan), (2, math.inf)], [(2, 4, 0.5, math.nan)]),
        ([(1, 1e-9)], [(1, 2, 1.0, 1e9)]),
    ],
)
def test_the_curve_of_an_empty_short_or_broken_run_is_whole(losses, devs, zero_shot):
    text = curve_svg(losses, devs, "", zero_shot, best_step=devs[-1][0] if devs else None)
    svg = ElementTree.fromstring(text)
    assert len(marks(svg, "dev-accuracy")) == len(devs)
    assert len(marks(svg, "zero-shot")) == (zero_shot is not None)
    drawn = re.findall(r'(?:points|d|c?[xy])="([^"]*)"', text)
    assert not any("nan" in numbers or "inf" in numbers for numbers in drawn)


@pytest.mark.parametrize("largest", [1e-9, 0.02, 0.3, 0.999, 1, 1.0001, 2.5, 7, 99, 500, 12345])
def test_ticks_are_few_round_and_reach_the_largest(largest):
    values = ticks(largest)
    assert values[0] == 0 and 2 <= len(values) <= 7
    assert 0.999 * largest <= values[-1] <= 2.01 * largest
    assert f"{values[1]:e}"[0] in "125"


# ---------------------------------------------------------------- docs/figures


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_figure_is_whole_small_and_names_no_time(name):
    path = FIGURES / f"{name}.svg"
    assert path.stat().st_size < 150_000
    svg = ElementTree.parse(path).getroot()
    assert svg.tag == SVG + "svg" and svg.find(SVG + "title").text
    assert "dc:date" not in path.read_text() and "<image" not in path.read_text()


@pytest.fixture(scope="module")
def draw():
    """docs/figures/draw.py as a module."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw", FIGURES / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_draws_the_figures_that_are_committed(draw):
    assert sorted(draw.FIGURES) == NAMES == sorted(path.stem for path in FIGURES.glob("*.svg"))


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_redrawn_to_the_same_bytes(name, draw, tmp_path, monkeypatch):
    import matplotlib

    committed = (FIGURES / f"{name}.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip(f"drawn by another version than {matplotlib.__version__}")
    (tmp_path / "demo.json").write_text((FIGURES / "demo.json").read_text())
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.draw(name)
    assert (tmp_path / f"{name}.svg").read_text() == committed


def test_accuracy_and_memory_are_those_of_the_tables(draw):
    tables = (ROOT / "RESULTS.md").read_text()
    for name, _, mean, deviation, seeds, memory in draw.METHODS:
        assert f"| {mean} ({deviation}) | {', '.join(map(str, seeds))} |" in tables, name
        assert f"| {memory} |" in tables, name
    assert f"zollama-28m, zero-shot {draw.ZERO_SHOT} " in tables


def test_the_sparse_figure_shows_what_theory_says(draw):
    """Squared step and rounding noise a weight: (lr g)^2 E u^2, and E |d| (s - |d|) or eps^2 {x} (1 - {x})."""
    key, draws, rate = draw.Key(seed=3, step=0), 40, draw.STEP_LENGTH
    store = draw.int4_weights(key)
    spacing = store.spacing(slice(None))
    assert draw.EPS * math.sqrt(draw.CELL) < float(spacing.min())  # so that M is one spacing everywhere
    x = rate / draw.EPS
    assert not x.is_integer()  # else the sparse step's noise would be 0 by choice of the step
    both = [draw.sparse_draw(key._replace(step=step), store) for step in range(draws)]
    hits = sum(int((u != 0).sum()) for u, _ in both)
    expected = draws * float((draw.EPS / spacing).square().sum())
    assert abs(hits - expected) < 5 * math.sqrt(expected)  # five standard deviations, of independent cells at most
    assert set((both[0][0] * draw.EPS / spacing).round(decimals=4).unique().tolist()) <= {-1.0, 0.0, 1.0}
    updates = [draw.one_update(each, spacing) for each in both]
    noise = sum(float((landed - wanted).square().sum()) for wanted, landed in updates) / hits
    part = x % 1
    assert abs(noise - part * (1 - part)) < 5 / math.sqrt(hits)  # each is below 1
    wanted, landed = draw.one_update(draw.gaussian_draw(key, store), spacing)
    variance = wanted.abs() * (1 - wanted.abs())  # all |wanted| < 1
    noise, theory = float((landed - wanted).square().sum()), float(variance.sum())
    assert abs(noise - theory) < 5 * math.sqrt(theory)  # as its terms are below 1
    assert theory > 20 * float(wanted.square().sum())  # it drowns
