"""Learning curves of one or several runs, drawn.

Four panels: accuracy, reward, completion length, and how far the sampler's logprobs are from the
trainer's. One colour a run; within a panel, what belongs to training is thin and light.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
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
DOTTED: dict[str, Any] = {"linewidth": 1.4, "alpha": 0.8, "linestyle": ":"}
FONT: dict[str, Any] = {"size": 10, "color": INK}

Rows = Sequence[Mapping[str, Any]]


def series(rows: Rows, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have the tag; a null becomes NaN, a gap in the line."""
    points = sorted((row["step"], row[tag]) for row in rows if tag in row)
    return [step for step, _ in points], [float("nan") if v is None else v for _, v in points]


def draw(runs: Mapping[str, Rows]) -> Figure:
    """Runs by name, each the lines of its metrics.jsonl, in order -> a figure of 2 x 2 panels.

    Pure: nothing is shown or saved. A tag that no run has leaves its panel empty, and says so.
    """
    spacing = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, hspace=0.04, wspace=0.04)
    figure = Figure(figsize=(8.8, 6.6), dpi=150, layout=spacing, facecolor="white")
    (accuracy, reward), (length, gap) = figure.subplots(2, 2, sharex=True)
    for i, rows in enumerate(runs.values()):
        colour = COLOURS[i % len(COLOURS)]
        _line(accuracy, rows, "train/accuracy", colour, FAINT)
        _line(accuracy, rows, "eval/accuracy", colour, MARKED)
        _line(reward, rows, "train/reward_mean", colour, STRONG)
        _line(length, rows, "train/avg_gen_length", colour, STRONG)
        _line(gap, rows, "sampler/logprob_diff_mean", colour, STRONG)
        _line(gap, rows, "sampler/logprob_diff_max", colour, DOTTED)
    _dress(accuracy, "Accuracy", "problems solved")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    _dress(reward, "Reward", "mean of a step")
    _dress(length, "Completion length", "tokens, mean of a step")
    _dress(gap, "Sampler gap", "|sampler - trainer logprob|, nats")
    if any(value > 0 for line in gap.lines for value in line.get_ydata()):
        gap.set_yscale("log", nonpositive="mask")  # exact agreement has no place on it
    colour = COLOURS[0] if len(runs) == 1 else INK
    _key(accuracy, colour, evaluation=MARKED, training=FAINT)
    _key(gap, colour, mean=STRONG, largest=DOTTED)
    _head(figure, list(runs))
    return figure


def _line(axes: Axes, rows: Rows, tag: str, colour: str, look: dict[str, Any]) -> None:
    steps, values = series(rows, tag)
    if len(values) == 1:  # a line needs two
        look = look | {"marker": "o", "markersize": 5}
    if values:
        axes.plot(steps, values, color=colour, solid_capstyle="round", **look)


def _dress(axes: Axes, title: str, unit: str) -> None:
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
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="#999999")


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


def _head(figure: Figure, names: list[str]) -> None:
    """The title: the run's name, or a line of names in their colours."""
    if len(names) == 1:
        figure.suptitle(f"GRPO run {names[0]}", fontsize=13, fontweight="bold", color=INK)
        return
    lines = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=name)
        for i, name in enumerate(names)
    ]
    figure.legend(
        handles=lines,
        loc="outside upper center",
        ncols=min(len(names), 4),
        frameon=False,
        fontsize=10.5,
        labelcolor=INK,
        title="GRPO runs",
        title_fontproperties={"size": 13, "weight": "bold"},
    )


def run_names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their last part if it does, else the paths as given."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
