"""The figures of README.md, RESULTS.md and docs/, as SVG files beside this script.

    python docs/figures/draw.py                       # all of them
    python docs/figures/draw.py rounding              # that one
    python docs/figures/draw.py --demo runs/FOLDER    # demo.json from a run of `python train.py`, then demo_curve.svg

Needs matplotlib.  Every figure is a white card with text as outlines, so that it looks alike on light and dark pages
and on every machine; equal versions of matplotlib give equal bytes.  What is plotted is computed here with the
project's own rounding and random bits, or copied from the tables of RESULTS.md.

Shape key: N weights, T steps.  Imports quant, random_bits, zo_optim.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from statistics import NormalDist

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.path import Path as Outline

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from quant import Integers, stochastic_round  # noqa: E402 (found only after the line above)
from random_bits import Key, Purpose, bits16, bits32, tensor_id  # noqa: E402
from zo_optim import SparseZO  # noqa: E402

WIDTH = 700  # pixels of every figure; 1 px is 0.75 pt
INK, MUTED, FAINT = "#1f2933", "#5a6572", "#d5dae0"
BLUE, RED, GREEN, GOLD = "#1f5a96", "#b23a48", "#2c7a51", "#8a5a00"
PALE_BLUE, PALE_RED, PALE_GREEN, PALE_GOLD = "#e6eef7", "#f8e8ea", "#e5f2ea", "#faf1dc"
SMALL, NORMAL, TITLE = 8.5, 9.5, 12  # pt
STYLE = {
    "font.family": "DejaVu Sans", "font.size": NORMAL, "mathtext.fontset": "dejavusans", "text.color": INK,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "axes.labelsize": NORMAL,
    "svg.fonttype": "path", "svg.hashsalt": "quzo", "path.simplify": False,  # which would drop lines without length
}  # fmt: skip

# ---------------------------------------------------------------- cards, text, arrows


def card(height: int, title: str, subtitle: str = "") -> tuple[Figure, Axes]:
    """An empty white card of WIDTH x height pixels, and axes in its pixels, y downwards, to draw on."""
    fig = Figure(figsize=(WIDTH / 96, height / 96))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")
    ax.add_patch(FancyBboxPatch((6, 6), WIDTH - 12, height - 12, "round,pad=5,rounding_size=8", fc="white", ec=FAINT))
    write(ax, 22, 30, title, ha="left", fontsize=TITLE, weight="bold")
    write(ax, 22, 53, subtitle, MUTED, "left")
    return fig, ax


def panel(fig: Figure, left: float, top: float, width: float, height: float, **kwargs) -> Axes:
    """Axes at a place of the card given in its pixels."""
    whole = fig.get_figheight() * 96
    ax = fig.add_axes((left / WIDTH, 1 - (top + height) / whole, width / WIDTH, height / whole), **kwargs)
    ax.patch.set_alpha(0)
    return ax


def write(ax: Axes, x: float, y: float, words: str, colour: str = INK, ha: str = "center", **more) -> None:
    """Words whose middle is at height y."""
    ax.text(x, y, words, color=colour, ha=ha, va="center", **more)


def box(ax: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str) -> None:
    shape = "round,pad=0,rounding_size=5"
    ax.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=fill, ec=edge, lw=1))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
    ax.annotate("", end, start, arrowprops=style)


def dots(ax: Axes, x: list[float], y: list[float], colour: str, size: float) -> None:
    """Many dots as one outline of lines without length, which is a tenth of a scatter plot's file."""
    places = [point for pair in zip(x, y, strict=True) for point in (pair, pair)]
    outline = Outline(places, [Outline.MOVETO, Outline.LINETO] * len(x))
    ax.add_patch(matplotlib.patches.PathPatch(outline, fill=False, ec=colour, lw=size, capstyle="round", clip_on=False))


def save(fig: Figure, name: str, description: str) -> None:
    """Writes NAME.svg: numbers cut to the hundredths that can be seen, short ids, no comments and no indentation."""
    path = HERE / f"{name}.svg"
    fig.savefig(path, transparent=True, metadata={"Date": None, "Title": description})

    def rounded(match: re.Match) -> str:
        return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), match[0])

    text = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r' (?:d|x|y|width|height)="[^"]*"|translate\([^)]*\)', rounded, text)
    text = re.sub(r"M (\S+ \S+) \nL \1 ", r"M \1 h 0", text).replace("DejaVuSans", "g")  # half of a file of dots
    path.write_text("\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n")


def gaussian(key: Key, rows: int, columns: int) -> torch.Tensor:
    """u ~ N(0, 1) from the counter: [rows, columns] float32."""
    bits = bits16(key, Purpose.DIRECTION, torch.arange(rows), columns)
    quantile = NormalDist().inv_cdf
    table = torch.tensor([quantile((i + 0.5) / 65536) for i in range(65536)])
    return table[bits]


# ---------------------------------------------------------------- 1. one step

LEVEL = 4 / 7  # sigma between two of a 4-bit direction's levels
SHOWN = 10  # weights of the example
RATE = 0.5  # lr * projected gradient / scale of the example


def stems(ax: Axes, x: float, y: float, values: list[float], colour: str, levels: bool) -> None:
    """A direction's elements as bars around y, 13 px apart and 11 px a sigma; levels: with the lines of 4 bits."""
    width = 13 * len(values)
    for level in range(-4, 5) if levels else ():
        ax.plot([x, x + width], [y - 11 * LEVEL * level] * 2, color=FAINT, lw=0.6)
    ax.plot([x, x + width], [y, y], color=MUTED, lw=0.8)
    for i, value in enumerate(values):
        ax.plot([x + 13 * i + 6.5] * 2, [y, y - 11 * value], color=colour, lw=4.5, solid_capstyle="butt")


def cells(ax: Axes, y: float, label: str, values: list[str], marked: list[bool]) -> None:
    """A row of the example's table."""
    write(ax, 222, y, label, ha="right")
    for i, (value, mark) in enumerate(zip(values, marked, strict=True)):
        x = 234 + 44 * i
        ax.add_patch(Rectangle((x, y - 11), 44, 22, fc=PALE_RED if mark else "white", ec=FAINT))
        write(ax, x + 22, y, value.replace("-", "−"), RED if mark else INK, fontsize=SMALL)


def step() -> None:
    key, row = Key(seed=0, step=0, tensor=tensor_id("example")), torch.arange(1)
    u = gaussian(key, 1, SHOWN)
    u1, u2 = (
        stochastic_round(u / LEVEL, bits32(key, purpose, row, SHOWN)) * LEVEL
        for purpose in (Purpose.PROBE_ROUNDING, Purpose.UPDATE_ROUNDING)
    )
    codes = gaussian(key._replace(step=1), 1, SHOWN).mul(45).round()
    moves = -RATE * u2
    landed = codes + stochastic_round(moves, bits32(key, Purpose.WEIGHT_ROUNDING, row, SHOWN))
    before, after = ([f"{code:.0f}" for code in each[0].tolist()] for each in (codes, landed))
    signed = [f"{move:+.2f}" if move else "0" for move in moves[0].tolist()]

    words = "Two forward passes and one update: no backward pass, no stored direction, no float matrix."
    fig, ax = card(536, "One QuZO step", words)
    draw_directions(ax, *(each[0].tolist() for each in (u, u1, u2)))
    draw_flow(ax)
    box(ax, 18, 404, WIDTH - 36, 112, "white", FAINT)
    write(ax, 30, 421, "the update in numbers: 0.29 becomes 1 with probability 0.29, else 0", MUTED, "left")
    cells(ax, 446, "int8 codes before", before, [False] * SHOWN)
    cells(ax, 471, r"step $-\eta\, g\, u_2$ / scale", signed, [False] * SHOWN)
    cells(ax, 496, "codes after", after, (landed != codes)[0].tolist())
    description = (
        "One QuZO step: a Gaussian direction is drawn from a counter and rounded twice to 4 bits; two forward passes "
        "with the weights moved along the first give the projected gradient; the update along the second is rounded "
        "stochastically onto the codes."
    )
    save(fig, "step", description)


def draw_directions(ax: Axes, u: list[float], u1: list[float], u2: list[float]) -> None:
    """The upper band: one Gaussian, two roundings."""
    box(ax, 18, 72, WIDTH - 36, 138, PALE_GOLD, "#ecdcb4")
    write(ax, 30, 90, "Directions", GOLD, "left", weight="bold")
    lines = "drawn from a counter", "(seed, step, tensor,", "element) whenever", "they are needed,", "never stored"
    for i, line in enumerate(lines):
        write(ax, 30, 112 + 18 * i, line, ha="left", fontsize=SMALL)
    for x, words, values, colour in (
        (176, "$u_1$  probed", u1, GOLD),
        (356, "$u$  one Gaussian", u, MUTED),
        (536, "$u_2$  stepped along", u2, GOLD),
    ):
        write(ax, x + 65, 90, words, colour, weight="bold")
        stems(ax, x, 143, values, colour, levels=colour == GOLD)
    arrow(ax, (350, 143), (314, 143), GOLD)
    arrow(ax, (492, 143), (528, 143), GOLD)
    write(ax, 421, 194, "two independent stochastic roundings of $u$ to 4 bits", fontsize=SMALL)


def draw_flow(ax: Axes) -> None:
    """The middle band: codes, two forwards, projected gradient, update, and back."""
    top, height = 242, 104
    gradient = r"$g = \frac{L_+ \, - \; L_-}{2\,\epsilon}$"
    boxes = [
        (18, 116, "Codes", PALE_GREEN, GREEN, ("int8 or int4,", "all that is kept", "$w$ = scale · code")),
        (164, 154, "Two forward passes", PALE_BLUE, BLUE,
         (r"$L_+$ = loss($w + \epsilon u_1$)", r"$L_-$ = loss($w - \epsilon u_1$)", "nothing is written")),
        (348, 146, "Projected gradient", PALE_BLUE, BLUE, ("", "", "one number")),
        (524, 158, "Update", PALE_RED, RED, (r"step $-\eta\, g\, u_2$", "rounded stochastically", "onto the codes")),
    ]  # fmt: skip
    for x, width, name, fill, edge, lines in boxes:
        box(ax, x, top, width, height, fill, edge)
        write(ax, x + width / 2, top + 17, name, edge, weight="bold")
        for i, line in enumerate(lines):
            write(ax, x + width / 2, top + 43 + 22 * i, line)
        if x > 18:
            arrow(ax, (x - 27, top + 52), (x - 3, top + 52))
    write(ax, 421, top + 52, gradient, fontsize=14)
    arrow(ax, (241, 212), (241, top - 3), GOLD)
    arrow(ax, (601, 212), (601, top - 3), GOLD)
    ax.plot([603, 603, 76], [top + height + 3, 376, 376], color=RED, lw=1.4)
    arrow(ax, (76, 376), (76, top + height + 3), RED)
    write(ax, 340, 366, "the only write of the step; the next step draws a new $u$", RED)
    write(
        ax,
        340,
        388,
        r"$\eta$: learning rate     $\epsilon$: length of a probe     loss: of one batch",
        MUTED,
        fontsize=SMALL,
    )


# ---------------------------------------------------------------- 2. stochastic against nearest rounding


def walk(updates: torch.Tensor, rounding: str, key: Key) -> torch.Tensor:
    """updates [N, T], in grid spacings, added one after the other to N weights at 0 -> their values [N, T]."""
    weights = torch.zeros(updates.shape[0])
    values = []
    for t, update in enumerate(updates.T.contiguous()):
        bits = bits32(key._replace(step=t), Purpose.WEIGHT_ROUNDING, torch.arange(len(update)), 1)[:, 0]
        weights = weights + stochastic_round(update, bits if rounding == "stochastic" else None)
        values.append(weights)
    return torch.stack(values, 1)


def rounding() -> None:
    steps, repeats, key = 500, 200, Key(seed=1, step=0, tensor=tensor_id("rounding"))
    update = 0.02 + 0.02 * gaussian(key, 1, steps)
    exact = update.cumsum(1)[0]
    nearest = walk(update, "nearest", key)[0]
    stochastic = walk(update.expand(repeats, steps), "stochastic", key)

    title = "One weight, 500 updates, each far smaller than the grid's spacing"
    words = "Steps of 0.02 ± 0.02 of a spacing: nearest rounding loses all, stochastic rounding none on average."
    fig, _ = card(390, title, words)
    ax = panel(fig, 64, 76, 440, 254, xlim=(0, steps), ylim=(-2, 18), yticks=[0, 5, 10, 15])
    ax.grid(axis="y", color=FAINT, lw=0.6)
    shown = range(5, steps + 1, 5)
    for other in stochastic[1:13]:
        ax.plot(*corners(other), color="#c4d6ea", lw=0.9)
    ax.plot(*corners(stochastic[0]), color=BLUE, lw=1.8)
    ax.plot(shown, stochastic.mean(0)[4::5], color=GREEN, lw=2.2, ls=(0, (4, 2)))
    ax.plot(shown, exact[4::5], color=INK, lw=1.5)
    ax.plot([0, steps], [0, 0], color=RED, lw=2.2)
    assert not nearest.any()
    ax.set_xlabel("step")
    ax.set_ylabel("weight, in grid spacings from its start")

    labels = [  # value at the end, height of the label, colour, words
        (float(stochastic[1:13, -1].max()), 15.5, "#5f86b3", "stochastic: 12 others"),
        (float(stochastic.mean(0)[-1]), 12.4, GREEN, f"stochastic: mean of {repeats}"),
        (float(exact[-1]), 10.8, INK, "exact, in floating point"),
        (float(stochastic[0, -1]), 9.2, BLUE, "stochastic: one weight"),
        (0.0, 0.0, RED, "nearest: never moves"),
    ]
    for value, height, colour, label in labels:
        ax.plot([steps + 3, steps + 20], [value, height], color=colour, lw=0.8, clip_on=False)
        write(ax, steps + 24, height, label, colour, "left")
    description = (
        "A weight under 500 small updates: the exact path, stochastic rounding, which follows it on average, and "
        "nearest rounding, which never moves."
    )
    save(fig, "rounding", description)


def corners(values: torch.Tensor) -> tuple[list[float], list[float]]:
    """A stepwise path [T] from 0 as few points: (steps, values), a pair of points for each change."""
    x, y, last = [0], [0.0], 0.0
    for t, value in enumerate(values.tolist(), 1):
        if value != last:
            x += [t, t]
            y += [last, value]
            last = value
    return [*x, len(values)], [*y, last]


# ---------------------------------------------------------------- 3. sparse directions

ROWS, COLUMNS = 112, 512
EPS, CELL, STEP_LENGTH = 2.5e-4, 1024, 6e-4  # STEP_LENGTH: lr * |projected gradient|


def int4_weights(key: Key) -> Integers:
    """Gaussian weights of standard deviation 0.05 as int4 codes [ROWS, COLUMNS]."""
    return Integers.encode(0.05 * gaussian(key, ROWS, COLUMNS), 4)


def gaussian_draw(key: Key, store: Integers) -> tuple[torch.Tensor, torch.Tensor]:
    """u in every weight, float32, and the bits that a step along it is rounded by, int32: both [ROWS, COLUMNS]."""
    return gaussian(key, ROWS, COLUMNS), bits32(key, Purpose.WEIGHT_ROUNDING, torch.arange(ROWS), COLUMNS)


def sparse_draw(key: Key, store: Integers) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a sparse direction, 0 where it moves nothing."""
    hits = SparseZO(eps=EPS, cell=CELL).hits(store, key)
    u, bits = torch.zeros(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS, dtype=torch.int32)
    u[hits.places], bits[hits.places] = hits.move() / EPS, hits.random_bits
    return u, bits


def one_update(draw: tuple[torch.Tensor, torch.Tensor], spacing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The step STEP_LENGTH * u and what of it lands on the codes -> both [ROWS, COLUMNS], in spacings."""
    wanted = STEP_LENGTH * draw[0] / spacing
    return wanted, stochastic_round(wanted, draw[1])


def sparse_directions() -> None:
    key, draws = Key(seed=0, step=12452, tensor=tensor_id("sparse")), 24  # of this step no two dots touch
    store = int4_weights(key._replace(seed=1))
    spacing = store.spacing(slice(None))
    kinds = {
        "Gaussian direction: every weight, by a little": (gaussian_draw, GOLD),
        "sparse direction: a few weights, by whole codes": (sparse_draw, GREEN),
    }
    title = f"int4: what one probe and one update do to {ROWS * COLUMNS:,} weights"
    sizes = rf"spacing $s \approx {float(spacing.mean()):.2f}$,  $\epsilon$ = {EPS:g},  $\eta g$ = {STEP_LENGTH:g}"
    fig, whole = card(604, title, f"{sizes},  cells of {CELL:,}; both steps are rounded stochastically")
    first_hit = int(sparse_draw(key, store)[0].flatten().nonzero()[0])
    for i, (name, (draw, colour)) in enumerate(kinds.items()):
        top = 86 + 218 * i
        write(whole, 22, top, name, colour, "left", weight="bold", fontsize=10)
        probe = (EPS * draw(key, store)[0] / spacing).flatten()[first_hit - 20 : first_hit + 28]
        plot_probe(panel(fig, 58, top + 44, 150, 120), probe, colour)
        plot_moves(panel(fig, 240, top + 44, 210, 120), one_update(draw(key, store), spacing)[1])
        steps = [one_update(draw(key._replace(step=step), store), spacing) for step in range(draws)]
        size = sum(float((wanted * spacing).square().sum()) for wanted, _ in steps)
        noise = sum(float(((landed - wanted) * spacing).square().sum()) for wanted, landed in steps)
        plot_noise(panel(fig, 484, top + 44, 186, 120), noise / size)
    formula = (
        r"Sparse direction: of each cell one weight, at random, moves by $\epsilon u = \pm M$ with probability "
        r"$(t/M)^2$, where $t = \epsilon\sqrt{cell}$",
        r"and $M$ is the least whole number of spacings that reaches $t$. Then $E[u]=0$ and $E[uu^T]=I$, "
        r"as for a Gaussian.",
        r"Landing a step $d$ without bias adds a variance of at least $|d|\,(s-|d|)$ where $|d|<s$: far above $d^2$ "
        r"where $d$",
        "is small, and nothing where $d$ is a whole number of spacings.",
    )
    for i, line in enumerate(formula):
        write(whole, 22, 530 + 19 * i, line, ha="left", fontsize=SMALL)
    description = (
        "Of int4 weights, a Gaussian direction's step moves many codes at random, with a rounding noise far above the "
        "step; a sparse direction's moves a few, nearly without noise."
    )
    save(fig, "sparse_directions", description)


def plot_probe(ax: Axes, probe: torch.Tensor, colour: str) -> None:
    """probe [N], in spacings: stems."""
    ax.set(xlim=(-1, len(probe)), ylim=(-1.3, 1.3), xticks=[], yticks=[-1, 0, 1], yticklabels=["−1", "0", "+1"])
    ax.set_title(r"probe $\epsilon u$, in codes", fontsize=NORMAL)
    ax.axhline(0, color=MUTED, lw=0.8)
    for i, value in enumerate(probe.tolist()):
        if value:
            ax.plot([i, i], [0, value], color=colour, lw=2.4, solid_capstyle="butt")
    ax.set_xlabel(f"{len(probe)} of the weights; largest {float(probe.abs().max()):.2g}", fontsize=SMALL)


def plot_moves(ax: Axes, landed: torch.Tensor) -> None:
    """landed [ROWS, COLUMNS], in codes: a dot where one moved."""
    ax.set(xlim=(0, COLUMNS), ylim=(ROWS, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(True)
    few = int((landed != 0).sum()) < 50
    for sign, colour in ((1, RED), (-1, BLUE)):
        rows, columns = (landed * sign > 0).nonzero(as_tuple=True)
        dots(ax, (columns + 0.5).tolist(), (rows + 0.5).tolist(), colour, 6 if few else 1.5)
    for row, column in landed.nonzero().tolist() if few else ():
        left = column > COLUMNS * 0.85
        words = f"{int(landed[row, column]):+d}".replace("-", "−")
        write(ax, column + (-14 if left else 14), row, words, ha="right" if left else "left", fontsize=SMALL)
    ax.set_title(f"codes moved by one update: {int((landed != 0).sum()):,}", fontsize=NORMAL)
    ax.set_xlabel(f"red up, blue down, {'by 2 or 3 codes' if few else 'by one code'}", fontsize=SMALL)


def plot_noise(ax: Axes, ratio: float) -> None:
    """Bars of the step's square, which is 1, and of its rounding noise."""
    ax.set(xlim=(0, 40), ylim=(1.7, -0.7), yticks=[], xticks=[0, 10, 20, 30, 40])
    ax.set_title("squared step, rounding noise", fontsize=NORMAL)
    for y, value, colour, label in ((0, 1, MUTED, "step²  1"), (1, ratio, RED, f"noise  {ratio:.2g}")):
        ax.barh(y, value, 0.62, color=colour)
        inside = value > 20
        place, colour, ha = (value - 1, "white", "right") if inside else (value + 1, INK, "left")
        write(ax, place, y, label, colour, ha)


# ---------------------------------------------------------------- 4. a tensor train

FACTORS, RANK, INPUTS = (16, 16, 16, 4, 4, 4), 5, 4096


def tensor_train() -> None:
    ranks = [1, *[RANK] * (len(FACTORS) - 1), 1]
    cores = list(zip(ranks, FACTORS, ranks[1:], strict=False))  # (rank, factor, rank)
    sizes, outputs = [math.prod(core) for core in cores], math.prod(FACTORS) // INPUTS
    dense, total = INPUTS * outputs, sum(sizes)
    half = next(i for i in range(1, len(FACTORS)) if math.prod(FACTORS[:i]) == INPUTS)

    title = f"A {INPUTS:,} × {outputs} matrix as a chain of {len(FACTORS)} cores of rank {RANK}"
    entry = r"$W[i_1 \ldots i_6] = G_1[:, i_1, :] \cdots G_6[:, i_6, :]$"
    fig, ax = card(410, title, f"Each entry is a product of small matrices, one slice of each core: {entry}")
    for i, ((left, factor, right), size) in enumerate(zip(cores, sizes, strict=True)):
        x, y, on_left = 34 + 110 * i, 126, i < half
        fill, edge = (PALE_BLUE, BLUE) if on_left else (PALE_GREEN, GREEN)
        ax.plot([x + 41] * 2, [y - 22, y], color=edge, lw=1.6)
        write(ax, x + 41, y - 33, f"$i_{i + 1}$: {factor}", edge)
        box(ax, x, y, 82, 66, fill, edge)
        write(ax, x + 41, y + 15, f"$G_{i + 1}$", edge, fontsize=11)
        write(ax, x + 41, y + 34, f"{left} × {factor} × {right}")
        write(ax, x + 41, y + 53, f"{size} numbers", MUTED, fontsize=SMALL)
        if i:
            colour, width = (RED, 3) if i == half else (INK, 1.6)
            ax.plot([x - 28, x], [y + 33] * 2, color=colour, lw=width)
            write(ax, x - 14, y + 22, f"{left}", colour, fontsize=SMALL)
    split, end = 34 + 110 * half - 14, 34 + 110 * len(FACTORS) - 28
    halves = [
        (
            34,
            split - 14,
            BLUE,
            f"left half: 16 · 16 · 16 = {INPUTS:,} inputs,\nas a thin matrix $L$, {INPUTS:,} × {RANK}",
        ),
        (
            split + 14,
            end,
            GREEN,
            f"right half: 4 · 4 · 4 = {outputs} outputs,\nas a thin matrix $R$, {RANK} × {outputs}",
        ),
    ]
    for start, stop, colour, words in halves:
        ax.plot([start, start, stop, stop], [204, 210, 210, 204], color=colour, lw=1.4)
        write(ax, (start + stop) / 2, 236, words, colour, linespacing=1.35)
    ax.plot([split] * 2, [166, 268], color=RED, lw=1, ls=(0, (3, 3)))
    words = f"the halves meet here: $y = (x\\,L)\\,R$ passes {RANK} numbers a token, and $W$ is never built"
    write(ax, split, 280, words, RED)

    words = f"tensor train: {' + '.join(map(str, sizes))} = {total:,} numbers, {dense / total:.0f} times fewer"
    bars = [(314, dense, "#b8c0c9", f"dense: {dense:,} numbers"), (354, total, BLUE, f"{words} (bars to scale)")]
    for y, size, colour, label in bars:
        ax.add_patch(Rectangle((22, y), (WIDTH - 44) * size / dense, 22, fc=colour, ec="none"))
        write(ax, 32, y + 11, label, ha="left")
    description = f"The tensor train of a {INPUTS} x {outputs} matrix: six cores, {total} numbers in place of {dense}."
    save(fig, "tensor_train", description)


# ---------------------------------------------------------------- 5. accuracy against memory

# From RESULTS.md: SST-2 test accuracy of zollama-28m in percent, mean, standard deviation and each of three seeds; peak
# GiB of a step of 16 x 64 tokens at the shape of LLaMA-2-7B.  Directions are not stored, so int4's memory, which was
# measured with grid directions, is that of both.
METHODS = [
    ("AdamW, fake int8", "first order", 84.0, 0.5, (83.6, 83.8, 84.5), 100.51),
    ("AdamW", "first order", 84.0, 0.5, (83.5, 83.9, 84.5), 50.29),
    ("MeZO, bf16", "Gaussian", 80.6, 1.1, (79.7, 80.3, 81.9), 13.55),
    ("QuZO, int8", "4-bit Gaussian", 79.7, 0.6, (79.8, 80.3, 79.1), 7.28),
    ("QuZO, int8", "grid", 79.9, 0.4, (79.5, 79.9, 80.2), 7.28),
    ("QuZO, fp8", "grid", 80.4, 0.6, (80.3, 79.8, 81.1), 7.28),
    ("QuZO, fp8, products too", "grid", 79.8, 1.2, (80.7, 78.4, 80.2), 6.94),
    ("QuZO, int4", "4-bit Gaussian", 59.2, 2.6, (62.2, 57.7, 57.7), 4.35),
    ("QuZO, int4", "grid", 77.4, 0.4, (77.8, 77.4, 76.9), 4.35),
]
ZERO_SHOT = 52.2
COLOURS = {"first order": MUTED, "Gaussian": GOLD, "4-bit Gaussian": BLUE, "grid": GREEN}


def accuracy_memory() -> None:
    words = "Each from its own table: accuracy of a model of 28 M parameters, memory of the shape of LLaMA-2-7B."
    fig, ax = card(536, "Accuracy against memory, by method and direction", words)
    limits = {"ylim": (len(METHODS) - 0.4, -0.6), "yticks": []}
    left = panel(fig, 226, 106, 250, 306, xlim=(50, 87), **limits)
    right = panel(fig, 506, 106, 160, 306, xlim=(0, 108), **limits)
    left.set_xlabel("SST-2 test accuracy of zollama-28m, %")
    right.set_xlabel("peak GPU memory, GiB")
    write(ax, 226, 88, "accuracy (28 M parameters)", ha="left", weight="bold")
    write(ax, 506, 88, "memory (7 B shape)", ha="left", weight="bold")
    left.grid(axis="x", color=FAINT, lw=0.6)
    left.axvline(ZERO_SHOT, color=MUTED, lw=1, ls=(0, (3, 3)))
    write(left, ZERO_SHOT + 0.6, 0, f"before training\n{ZERO_SHOT}", MUTED, "left", fontsize=SMALL)
    for y, (name, direction, mean, deviation, seeds, memory) in enumerate(METHODS):
        colour, pixel = COLOURS[direction], 106 + 34 * (y + 0.6)
        write(ax, 22, pixel - 7, name, ha="left")
        kind = direction if direction == "first order" else f"{direction} directions"
        write(ax, 22, pixel + 8, kind, colour, "left", fontsize=SMALL, weight="bold")
        left.plot([min(seeds), max(seeds)], [y, y], color=colour, lw=1.5)
        left.plot(seeds, [y] * len(seeds), "o", color=colour, ms=3.5, mew=0)
        left.plot([mean] * 2, [y - 0.26, y + 0.26], color=colour, lw=2.4)
        place, ha = (max(seeds) + 1, "left") if mean < 70 else (min(seeds) - 1, "right")
        write(left, place, y, f"{mean} ({deviation})", ha=ha, fontsize=SMALL)
        right.barh(y, memory, 0.5, color=colour)
        place, shade, ha = (memory - 2, "white", "right") if memory > 60 else (memory + 2, INK, "left")
        write(right, place, y, f"{memory:.2f}", shade, ha, fontsize=SMALL)
    notes = (
        "Dots: three seeds; bar: their mean (standard deviation). 872 test sentences alone make an error of ±1.35.",
        "Forward-only: 2,000 steps of batch 32; AdamW: 300. Memory: 16 × 64 tokens. Fake int8 keeps fp32 masters, and",
        "its accuracy is with int8 activations; AdamW's accuracy is of fp32, its memory of bf16.",
        "Grid directions were this project's, before sparse ones; the papers' are Gaussian (MeZO) and 4-bit (QuZO).",
    )
    for i, line in enumerate(notes):
        write(ax, 22, 469 + 17 * i, line, MUTED, "left", fontsize=SMALL)
    description = (
        "SST-2 accuracy of a 28 M model and peak memory at the shape of a 7 B one, for AdamW, MeZO and QuZO in int8, "
        "fp8 and int4."
    )
    save(fig, "accuracy_memory", description)


# ---------------------------------------------------------------- 6. the demo


def read_demo(run: Path) -> None:
    """demo.json from a run folder: what demo_curve needs of metrics.jsonl and result.json."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    demo = {key: result[key] for key in ("zero_shot", "test", "best_step", "forwards", "weights_sha256")}
    demo["loss"] = [round(row["loss"], 3) for row in rows if "loss" in row]
    demo["dev"] = [[row["step"], row["dev"], round(row["dev_loss"], 4)] for row in rows if "dev" in row]
    (HERE / "demo.json").write_text(json.dumps(demo) + "\n")


def demo_curve() -> None:
    demo = json.loads((HERE / "demo.json").read_text())
    steps, accuracies, dev_losses = zip(*demo["dev"], strict=True)
    losses = torch.tensor(demo["loss"]).view(-1, 2).mean(1).tolist()
    cost = f"{steps[-1]} steps, {demo['forwards']:,} forward passes, half a minute on two CPU cores"
    fig, _ = card(
        390, "The demo: QuZO on the int8 codes of a LLaMA of 0.6 M parameters", f"4-bit Gaussian directions, {cost}"
    )
    ax = panel(fig, 66, 80, 560, 250, xlim=(-8, steps[-1] + 8), ylim=(0, 2.1), yticks=[0, 0.5, 1, 1.5, 2])
    ax.grid(axis="y", color=FAINT, lw=0.6)
    ax.plot(range(2, steps[-1] + 1, 2), losses, color="#9bb8d8", lw=1)
    ax.plot(steps, dev_losses, "s-", color=BLUE, lw=1.8, ms=3.5)
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats", color=BLUE)
    twin = ax.twinx()
    twin.set(ylim=(0, 105), yticks=[0, 25, 50, 75, 100])
    twin.spines["right"].set_visible(True)
    twin.set_ylabel("accuracy, %", color=RED)
    before, after = 100 * demo["zero_shot"], 100 * demo["test"]
    twin.plot([5, 146], [before, before], color=RED, lw=0.8)
    twin.plot(steps, [100 * accuracy for accuracy in accuracies], "o-", color=RED, lw=1.8, ms=4)
    test = {"color": "white", "mec": RED, "mew": 1.6, "ms": 7, "clip_on": False, "zorder": 5}
    twin.plot([0, steps[-1]], [before, after], "o", **test)
    write(twin, 150, before, f"test accuracy before training: {before:.0f} %", RED, "left", backgroundcolor="white")
    write(twin, steps[-1], after - 8, f"test accuracy at the end: {after:.1f} %", RED, "right")
    write(twin, 114, 80, "dev accuracy", RED, "left")
    write(twin, 86, 27, "dev loss, which chooses the weights", BLUE, "left")
    write(twin, 40, 94, "training loss", "#5f86b3", "left")
    best = demo["best_step"]
    twin.plot([best, best - 12], [4, 13], color=BLUE, lw=0.8)
    write(twin, best, 17, f"lowest: step {best}", BLUE, "right")
    save(fig, "demo_curve", "The demo's training loss, dev loss and dev accuracy over its steps.")


FIGURES = {f.__name__: f for f in (step, rounding, sparse_directions, tensor_train, accuracy_memory, demo_curve)}


def draw(name: str) -> None:
    """Writes that figure's file."""
    with matplotlib.rc_context(STYLE):
        FIGURES[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws docs/figures/*.svg.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES)}; all where none is given")
    parser.add_argument("--demo", type=Path, metavar="RUN", help="take demo.json from this run folder first")
    args = parser.parse_args()
    if unknown := set(args.names) - set(FIGURES):
        parser.error(f"no figure is called {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    if args.demo:
        read_demo(args.demo)
    for name in args.names or (["demo_curve"] if args.demo else FIGURES):
        draw(name)


if __name__ == "__main__":
    main()
