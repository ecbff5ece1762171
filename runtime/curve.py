"""The run folder's curve.svg: training loss, dev loss and dev metric over steps, drawn without a plotting library.

Losses are in nats on the left axis, accuracies or other metrics on the right one, 0 to 100 %.  The best step, whose
weights are kept, is the one of the lowest dev loss.  The drawing carries its own white background, for light and dark
pages alike.  Imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 420  # pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 660, 96, 356  # of the plot
TRAIN, DEV, ACCURACY, INK, LINE = "#8fb3d9", "#1f5a96", "#b23a48", "#333333", "#d9d9d9"
MAX_POINTS = 300  # of the training loss, whatever the run's length

Series = list[tuple[int, float]]  # (step, value)


def curve_svg(
    losses: Series,
    devs: list[tuple[int, int, float, float]],
    title: str,
    zero_shot: float | None = None,
    best_step: int | None = None,
    metric: str = "accuracy",
) -> str:
    """The picture of a run so far, as the text of an SVG file.

    losses: (step, training loss in nats) of each step
    devs: (step, forwards until then, accuracy in [0, 1], dev loss in nats) of each dev evaluation
    zero_shot: test accuracy in [0, 1] before training, drawn at step 0
    best_step: the step whose weights are kept
    metric: what the values called accuracy here are
    Losses that are not finite are left out.
    """
    train = [(step, loss) for step, loss in block_means(losses, MAX_POINTS) if math.isfinite(loss)]
    dev = [(step, loss) for step, _, _, loss in devs if math.isfinite(loss)]
    accuracy = [(step, value) for step, _, value, _ in devs if value is not None]
    last_step = max([step for step, _ in losses + accuracy], default=0) or 1
    highest = max([loss for _, loss in train + dev], default=1.0)
    loss_ticks = ticks(highest if highest > 0 else 1.0)  # a reward above 1 makes losses below 0
    max_loss = loss_ticks[-1]
    title_size = min(15, round(1000 / max(1, len(title)), 1))  # a long title is set smaller, to fit the width

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / last_step

    def y(share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * share

    def loss_points(series: Series) -> Series:
        return [(x(step), y(loss / max_loss)) for step, loss in series]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        text(LEFT, 28, title, INK, "start", f'font-weight="bold" font-size="{title_size:g}"'),
        *legend(zero_shot, metric),
        *axes(last_step, loss_ticks, x, y),
        *best_mark(best_step, devs, x, metric),
        polyline(loss_points(train), TRAIN, 1.5),
        polyline(loss_points(dev), DEV, 2),
        polyline([(x(step), y(value)) for step, value in accuracy], ACCURACY, 2),
        *(square(*point, "dev-loss") for point in loss_points(dev)),
        *(circle(x(step), y(value), "dev-accuracy", ACCURACY) for step, value in accuracy),
    ]
    if zero_shot is not None:
        parts.append(circle(x(0), y(zero_shot), "zero-shot", "#ffffff"))
    if devs:
        parts.append(text(RIGHT, BOTTOM + 42, f"{devs[-1][1]:,} forwards", INK, "end"))
    return "\n".join(part for part in [*parts, "</svg>"] if part) + "\n"


def legend(zero_shot: float | None, metric: str) -> list[str]:
    """One line above the plot; the zero-shot entry states its value."""
    entries = [
        (LEFT, TRAIN, polyline([(LEFT, 50), (LEFT + 18, 50)], TRAIN, 1.5), "training loss"),
        (LEFT + 124, DEV, square(LEFT + 133, 50, "legend"), "dev loss"),
        (LEFT + 220, ACCURACY, circle(LEFT + 229, 50, "legend", ACCURACY), f"dev {metric}"),
    ]
    if zero_shot is not None:
        mark = circle(LEFT + 359, 50, "legend", "#ffffff")
        entries.append((LEFT + 350, ACCURACY, mark, f"test {metric} before training {percent(zero_shot)}"))
    words = [text(x + 24, 54.5, label, DEV if colour == TRAIN else colour, "start") for x, colour, _, label in entries]
    return [mark for _, _, mark, _ in entries] + words


def axes(last_step: int, loss_ticks: list[float], x: Callable, y: Callable) -> list[str]:
    """Frame, grid lines and tick labels: losses left, accuracies right, steps below."""
    parts = []
    for value in loss_ticks:
        height = y(value / loss_ticks[-1])
        parts.append(f'<path d="M{LEFT},{height:.1f}H{RIGHT}" stroke="{LINE}" stroke-width="1"/>')
        parts.append(text(LEFT - 8, height + 4.5, f"{value:g}", DEV, "end"))
    for share in (0, 0.25, 0.5, 0.75, 1):
        height = y(share)
        parts.append(f'<path d="M{RIGHT},{height:.1f}h5" stroke="{ACCURACY}"/>')
        parts.append(text(RIGHT + 8, height + 4.5, f"{100 * share:g} %", ACCURACY, "start"))
    step_ticks = [step for step in ticks(last_step)[:-1] if x(step) < RIGHT - 40]  # the last step has its own label
    for step in [*dict.fromkeys(int(step) for step in step_ticks if step == int(step)), last_step]:
        parts.append(f'<path d="M{x(step):.1f},{BOTTOM}v5" stroke="{INK}"/>')
        parts.append(text(x(step), BOTTOM + 21, f"{step:,}", INK, "middle"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 42, "step", INK, "middle"))
    parts.append(text(LEFT - 8, TOP - 12, "nats", DEV, "end"))
    return parts


def best_mark(
    best_step: int | None, devs: list[tuple[int, int, float | None, float]], x: Callable, metric: str
) -> list[str]:
    """A dashed line at the step whose weights are kept, labelled with its dev loss and metric."""
    found = [(accuracy, loss) for step, _, accuracy, loss in devs if step == best_step]
    if not found:
        return []
    accuracy, loss = found[-1]
    place, middle = x(best_step), (LEFT + RIGHT) / 2
    anchor = "end" if place > middle + 100 else "start" if place < middle - 100 else "middle"
    label = f"best step {best_step:,}: dev loss {loss:.3f}"
    label += "" if accuracy is None else f", dev {metric} {percent(accuracy)}"
    line = f'<path class="best-step" d="M{place:.1f},{TOP - 8}V{BOTTOM}" stroke="{INK}" stroke-dasharray="4 3"/>'
    return [line, text(place, TOP - 13, label, INK, anchor)]


def ticks(largest: float) -> list[float]:
    """Round numbers 0, d, 2 d ... of which the last is at least `largest` (> 0): at most seven."""
    power = 10.0 ** math.floor(math.log10(largest / 5))
    distance = next(d for d in (power, 2 * power, 5 * power, 10 * power) if d * 5 >= largest * 0.999)
    count = math.ceil(largest / distance * 0.999)
    return [float(f"{i * distance:.6g}") for i in range(count + 1)]


def block_means(series: Series, max_points: int) -> Series:
    """Means of consecutive steps, each at its block's last step, so that a long run draws as few points as a short."""
    width = max(1, -(-len(series) // max_points))
    blocks = [series[i : i + width] for i in range(0, len(series), width)]
    return [(block[-1][0], sum(value for _, value in block) / len(block)) for block in blocks]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def text(x: float, y: float, words: str, colour: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def polyline(points: Series, colour: str, width: float) -> str:
    """points: (x, y) in pixels.  The empty string where there are none."""
    if not points:
        return ""
    if len(points) == 1:
        points = 2 * points  # a line of length 0 with round ends is a dot
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    look = f'stroke="{colour}" stroke-width="{width}" stroke-linejoin="round" stroke-linecap="round"'
    return f'<polyline points="{places}" fill="none" {look}/>'


def circle(x: float, y: float, name: str, fill: str) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="4"'
    return f'<circle class="{name}" {place} fill="{fill}" stroke="{ACCURACY}" stroke-width="2"/>'


def square(x: float, y: float, name: str) -> str:
    return f'<rect class="{name}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{DEV}"/>'
