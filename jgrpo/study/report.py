"""What a sweep found: a row a variant, with intervals and a verdict; Markdown, HTML, pictures.

Differences are paired by seed: variant and reference saw the same prompts. Intervals are Student's
t over the seeds, 95 % (so n = 5 seeds have 4 degrees of freedom).
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from scipy import special

from jgrpo.run.curves import COLOURS, GRID, INK
from jgrpo.run.rundir import adapter_folder, read_metrics, write_whole

CONFIDENCE = 0.95
ROUNDING = 1e-3
"""Runs whose adapters end closer than this share of their way differ by rounding alone: after six
steps of the quick start GSPO is 3e-6 from GRPO, and what does change something 0.1 or more."""
GREY = "#9A9A9A"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:70em;margin:2em auto}"
    "table{border-collapse:collapse}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;"
    "text-align:left}code,pre{background:#f5f5f5;padding:.1em .3em}img{max-width:100%}"
)


@dataclass(frozen=True)
class Run:
    """The figures of one finished run."""

    steps: list[int]
    accuracy: list[float]
    """of each evaluation, at `steps`"""
    generated_tokens: float
    trained_tokens: float
    seconds: float
    adapter: dict[str, np.ndarray]
    """the last one"""
    fresh: dict[str, np.ndarray]
    """the one that training began from"""

    @property
    def final(self) -> float:
        return self.accuracy[-1]

    @property
    def mean(self) -> float:
        """Over the evaluations after the first: how soon it learned."""
        return float(np.mean(self.accuracy[1:]))


def read_run(folder: Path) -> Run:
    """A run folder's figures. Seconds are of the steps and evaluations, without the start."""
    rows = read_metrics(folder)
    total = lambda tag: sum(row.get(tag) or 0.0 for row in rows)  # noqa: E731
    evaluations = [row for row in rows if "eval/accuracy" in row]
    return Run(
        [row["step"] for row in evaluations],
        [row["eval/accuracy"] for row in evaluations],
        total("tokens/generated"),
        total("tokens/trained"),
        total("time/step") + total("time/evaluation"),
        _adapter(sorted((folder / "adapters").glob("step_*"))[-1]),
        _adapter(adapter_folder(folder, 0)),
    )


def _adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its interval (nan for one seed)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Student's t: half = t(n - 1) * s / sqrt(n)."""
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), math.nan)
        t = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
        return cls(float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(n))

    def __str__(self) -> str:
        """In percent."""
        half = "" if math.isnan(self.half) else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:.1f}{half}"


BOTH = ("final", "mean")
Results = Mapping[str, Mapping[int, Run]]
"""variant -> seed -> run"""


def sameness(a: Mapping[int, Run], b: Mapping[int, Run]) -> str:
    """`to the bit` or `to rounding` if each seed's two runs ended with the same adapter so, and
    their evaluations gave the same; else nothing."""
    if a.keys() != b.keys():
        return ""
    pairs = [(a[seed], b[seed]) for seed in a]
    if any(x.adapter.keys() != y.adapter.keys() or x.accuracy != y.accuracy for x, y in pairs):
        return ""
    largest = max(_distance(x, y) for x, y in pairs)
    return "to the bit" if largest == 0 else "to rounding" if largest < ROUNDING else ""


def _distance(a: Run, b: Run) -> float:
    """How far apart two runs' adapters ended, as a share of how far training took the second; inf
    where their shapes differ."""
    if any(a.adapter[k].shape != b.adapter[k].shape for k in b.adapter):
        return math.inf
    norm = lambda x, y: math.hypot(*(float(np.linalg.norm(x[k] - y[k])) for k in y))  # noqa: E731
    apart, moved = norm(a.adapter, b.adapter), norm(b.adapter, b.fresh)
    return apart / moved if apart else 0.0


def paired(a: Mapping[int, Run], b: Mapping[int, Run], what: str) -> Interval:
    """The difference a - b of `final` or `mean`, over the seeds that both have."""
    return Interval.of([getattr(a[s], what) - getattr(b[s], what) for s in sorted(a.keys() & b)])


def verdict(gain: Interval, soon: Interval, same: str, margin: float) -> str:
    """Does this data support that the simple design is enough, that is, that this row gains no more
    than `margin` over its reference? `same` is what `sameness` says of the two."""
    if same:
        return f"the same {same}: says nothing about the technique"
    if math.isnan(gain.half):
        return "one seed: no interval"
    low, high = gain.mean - gain.half, gain.mean + gain.half
    learns = ""
    if soon.mean - soon.half > 0:
        learns = "; learns sooner"
    elif soon.mean + soon.half < 0:
        learns = "; learns later"
    if high < 0:
        return "supports: it is worse" + learns
    if low > margin:
        return f"contradicts: it gains more than {100 * margin:g} points" + learns
    if high <= margin:
        return f"supports: no gain above {100 * margin:g} points" + learns
    return "undecided: the interval is too wide" + learns


# -- Markdown and HTML ------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def results_table(
    results: Results, references: Mapping[str, str], margin: float
) -> tuple[list[str], list[list[Any]]]:
    """Header and a row a variant: accuracy, difference to its reference, cost, verdict."""
    header = [
        *("variant", "seeds", "final accuracy, %", "mean over the run, %", "against"),
        *("final, points", "mean, points", "tokens generated", "trained", "seconds", "verdict"),
    ]
    rows = []
    for name, runs in results.items():
        other = results[references[name]]
        final, mean = (Interval.of([getattr(r, k) for r in runs.values()]) for k in BOTH)
        against, gains, says = "", ["", ""], "the reference"
        if references[name] != name:
            against = f"`{references[name]}`"
            gain, soon = (paired(runs, other, k) for k in BOTH)
            gains = [_signed(gain), _signed(soon)]
            says = verdict(gain, soon, sameness(runs, other), margin)
        cost = [
            f"{np.mean([getattr(r, k) for r in runs.values()]):,.0f}"
            for k in ("generated_tokens", "trained_tokens", "seconds")
        ]
        rows.append([f"`{name}`", len(runs), final, mean, against, *gains, *cost, says])
    return header, rows


def listing(about: Mapping[str, str]) -> str:
    return "".join(f"- `{name}`: {text}\n" for name, text in about.items())


def explain(margin: float, n_seeds: int) -> str:
    """How to read the table."""
    return f"""Accuracy is greedy, on the evaluation problems; means over {n_seeds} seeds with 95 %
intervals (Student's t). Differences are paired by seed. "Mean over the run" averages all
evaluations after the first: it tells who learns sooner, also where all end alike. A row supports
the simple design if it gains no more than {100 * margin:g} points over its reference, and
contradicts it if it surely gains more. A row whose evaluations equal its reference's, and whose
adapters ended within {100 * ROUNDING:g} % of the way that training took, is the same but for
rounding, and says nothing. Tokens and seconds are means of a run (start-up not counted)."""


def _signed(interval: Interval) -> str:
    return ("+" if interval.mean > 0 else "") + str(interval)


def write_report(out: Path, title: str, markdown: str, pictures: Mapping[str, Figure]) -> None:
    """report.md beside its pictures, and report.html, the same with the pictures inside."""
    text = f"# {title}\n\n{markdown}"
    inline = text
    for name, figure in pictures.items():
        figure.savefig(out / name)
        data = base64.b64encode((out / name).read_bytes()).decode()
        inline = inline.replace(f"]({name})", f"](data:image/png;base64,{data})")
    write_whole(out / "report.md", text)
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    page = (f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
            f"<style>{STYLE}</style>{reader.render(inline)}")  # fmt: skip
    write_whole(out / "report.html", page)


# -- pictures ---------------------------------------------------------------------------------


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
