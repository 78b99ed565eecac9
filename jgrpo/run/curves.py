"""Learning curves of one or several runs, drawn.

Accuracy, large; beside it the reward (where it is not the accuracy), the completions' length, and
small, how far the sampler's logprobs are from the trainer's. One colour a run; within a panel, what
belongs to training is thin and light.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette (2008), told apart with every common kind of colour blindness."""
INK, GRID = "#333333", "#E3E3E3"
STRONG: dict[str, Any] = {"linewidth": 2}
MARKED: dict[str, Any] = {"linewidth": 2, "marker": "o", "markersize": 5}
FAINT: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.4}
THIN: dict[str, Any] = {"linewidth": 1.4}
DOTTED: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.8, "linestyle": ":"}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
LONGEST_LABEL = 110
"""Characters that fit across the figure."""
FONT: dict[str, Any] = {"size": 10, "color": INK}

Rows = Sequence[Mapping[str, Any]]


def series(rows: Rows, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have the tag; a null becomes NaN, a gap in the line."""
    points = sorted((row["step"], row[tag]) for row in rows if tag in row)
    return [step for step, _ in points], [float("nan") if v is None else v for _, v in points]


def draw(runs: Mapping[str, Rows]) -> Figure:
    """Runs by name, each the lines of its metrics.jsonl, in order -> a figure.

    Pure: nothing is shown or saved. A tag that no run has leaves its panel empty, and says so.
    """
    figure, (accuracy, *others) = _panels(list(runs), any(map(_has_own_reward, runs.values())))
    *_, length, gap = others
    for i, rows in enumerate(runs.values()):
        colour, dashes = _look(i)
        _line(accuracy, rows, "train/accuracy", colour, FAINT | dashes)
        _line(accuracy, rows, "eval/accuracy", colour, MARKED | dashes)
        for reward in others[:-2]:
            _line(reward, rows, "train/reward_mean", colour, STRONG | dashes)
        _line(length, rows, "train/avg_gen_length", colour, STRONG | dashes)
        _line(gap, rows, "sampler/logprob_diff_mean", colour, THIN | dashes, positive=True)
        _line(gap, rows, "sampler/logprob_diff_max", colour, DOTTED, positive=True)
    _dress(accuracy, "Accuracy", "problems solved")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    for reward in others[:-2]:
        _dress(reward, "Reward", "mean of a step")
    _dress(length, "Completion length", "tokens, mean")
    _dress(gap, "Sampler gap", "nats", absent="exactly zero, or not logged")
    if gap.lines:
        gap.set_yscale("log")
    colour = COLOURS[0] if len(runs) == 1 else INK
    _key(accuracy, colour, evaluation=MARKED, training=FAINT)
    _key(gap, colour, mean=THIN, largest=DOTTED)
    return figure


def _has_own_reward(rows: Rows) -> bool:
    """Is there a step whose reward is not its accuracy? Also where nothing is logged yet."""
    pairs = [(r.get("train/accuracy"), r["train/reward_mean"]) for r in rows
             if "train/reward_mean" in r]  # fmt: skip
    return not pairs or any(accuracy != reward for accuracy, reward in pairs)


def _look(i: int) -> tuple[str, dict[str, Any]]:
    """The colour of run i, and dashes where colours come again."""
    return COLOURS[i % len(COLOURS)], {"linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def _panels(names: list[str], own_reward: bool) -> tuple[Figure, list[Axes]]:
    """Accuracy, [reward], length, gap, on a figure with the runs' names above them."""
    spacing = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, hspace=0.04, wspace=0.04)
    labels = [textwrap.fill(name, LONGEST_LABEL) for name in names]
    n_columns = max(1, min(4, len(names), LONGEST_LABEL // (max(map(len, labels)) + 6)))
    n_lines = sum(label.count("\n") + 1 for label in labels) / n_columns
    height = 5.8 + (0.2 * n_lines if len(names) > 1 else 0)
    figure = Figure(figsize=(9.6, height), dpi=150, layout=spacing, facecolor="white")
    heights = [1.0] * (1 + own_reward) + [0.6]
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[1.25, 1], height_ratios=heights)
    first = figure.add_subplot(grid[:, 0])
    _head(figure, labels, n_columns)
    others = [figure.add_subplot(grid[i, 1], sharex=first) for i in range(len(heights))]
    return figure, [first, *others]


def _line(
    axes: Axes, rows: Rows, tag: str, colour: str, look: dict[str, Any], *, positive: bool = False
) -> None:
    """`positive`: the line goes on from one value above zero to the next (a step that trains on
    nothing has no gap, and zero no place on a logarithmic axis)."""
    steps, values = series(rows, tag)
    if positive:
        kept = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
        steps, values = [step for step, _ in kept], [value for _, value in kept]
    if len(values) == 1:  # a line needs two
        look = look | {"marker": "o", "markersize": 5}
    if values:
        axes.plot(steps, values, color=colour, solid_capstyle="round", **look)


def _dress(axes: Axes, title: str, unit: str, absent: str = "not logged") -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
    axes.set_ylabel(unit, **FONT)
    axes.set_xlabel("step", **FONT)
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(which="both", colors=INK, labelsize=9.5, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    axes.margins(x=0.02, y=0.1)
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, absent, transform=axes.transAxes, ha="center", color="#999999")


def _key(axes: Axes, colour: str, **looks: dict[str, Any]) -> None:
    if axes.lines:
        lines = [Line2D([], [], color=colour, label=label, **look) for label, look in looks.items()]
        axes.legend(
            handles=lines,
            loc="lower right",
            bbox_to_anchor=(1.01, 0.985),
            ncols=len(lines),
            frameon=False,
            fontsize=9.5,
            labelcolor=INK,
            handlelength=1.8,
            columnspacing=1.2,
        )


def _head(figure: Figure, labels: list[str], n_columns: int) -> None:
    """The title: the run's name, or the runs' in their colours."""
    if len(labels) == 1:
        figure.suptitle(f"GRPO run {labels[0]}", fontsize=13, fontweight="bold", color=INK)
        return
    lines = [
        Line2D([], [], color=colour, linewidth=2.5, label=label, **dashes)
        for label, (colour, dashes) in zip(labels, map(_look, range(len(labels))), strict=True)
    ]
    figure.legend(
        handles=lines,
        loc="outside upper center",
        ncols=n_columns,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        title="GRPO runs",
        title_fontproperties={"size": 13, "weight": "bold"},
    )
