"""The pictures of a report: curves, differences with their intervals, cosines of gradients."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jgrpo.run.curves import COLOURS, GRID, INK
from jgrpo.study.report import BOTH, Interval, Results, Run, paired

GREY = "#9A9A9A"


def draw_curves(results: Results, references: Mapping[str, str]) -> Figure:
    """A panel a variant: evaluation accuracy over the steps, mean and 95 % band, its reference in
    grey."""
    n = len(results)
    columns = min(5, n)
    rows = -(-n // columns)
    figure = Figure(figsize=(2.5 * columns, 2.1 * rows + 0.5), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, runs) in zip(panels.flat, results.items(), strict=False):
        reference = references[name]
        if reference != name:
            _band(axes, results[reference], GREY)
        _band(axes, runs, COLOURS[0])
        axes.set_title(name, fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=8, colors=INK, length=0)
        axes.grid(color=GRID, linewidth=0.7)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    for axes in panels.flat[n:]:
        axes.set_visible(False)
    figure.supylabel("evaluation accuracy", fontsize=9, color=INK)
    figure.supxlabel("step", fontsize=9, color=INK)
    figure.suptitle("blue: the variant; grey: what it is compared with; mean and 95 % over seeds",
                    fontsize=9, color=INK)  # fmt: skip
    return figure


def _band(axes: Axes, runs: Mapping[int, Run], colour: str) -> None:
    first = next(iter(runs.values()))
    at = [Interval.of([r.accuracy[i] for r in runs.values()]) for i in range(len(first.steps))]
    mean, half = np.array([a.mean for a in at]), np.nan_to_num([a.half for a in at])
    low, high = np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1)
    axes.fill_between(first.steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(first.steps, mean, color=colour, linewidth=1.6)


def draw_effects(results: Results, references: Mapping[str, str], margin: float) -> Figure:
    """The paired differences of final and of mean accuracy, in points, with their intervals."""
    names = [n for n in results if references[n] != n]
    size = (8.4, 0.3 * len(names) + 1.2)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what, label in zip(
        panels, BOTH, ("final accuracy", "mean over the run"), strict=True
    ):
        axes.axvspan(-100 * margin, 100 * margin, color=GRID, alpha=0.6, linewidth=0)
        axes.axvline(0, color=GREY, linewidth=0.8)
        gains = [paired(results[n], results[references[n]], what) for n in names]
        x, half = [100 * g.mean for g in gains], np.nan_to_num([100 * g.half for g in gains])
        axes.errorbar(x, range(len(names)), xerr=half, fmt="o", color=COLOURS[0], markersize=4,
                      elinewidth=1.4, capsize=0)  # fmt: skip
        axes.set_title(f"{label}: difference, points", fontsize=9.5, color=INK, loc="left")
        axes.tick_params(labelsize=8.5, colors=INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return figure


def draw_cosines(names: Sequence[str], cosine: np.ndarray) -> Figure:
    """A heat map of the cosines between the variants' gradients [M, M]."""
    side = 0.52 * len(names) + 2.2
    figure = Figure(figsize=(side + 0.8, side), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cosine, vmin=-1, vmax=1, cmap="RdBu")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8, color=INK)
    axes.set_yticks(range(len(names)), names, fontsize=8, color=INK)
    axes.tick_params(length=0)
    for (i, j), value in np.ndenumerate(cosine):
        text = "" if math.isnan(value) else f"{value:.2f}"
        colour = "white" if abs(value) > 0.6 else INK
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, shrink=0.8).ax.tick_params(labelsize=8)
    axes.set_title("cosine between adapter gradients", fontsize=10, color=INK, loc="left")
    return figure
