"""What a sweep found: a row a variant, with intervals and a verdict; Markdown and HTML.

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
from matplotlib.figure import Figure
from scipy import special

from jgrpo.run.rundir import read_metrics, write_whole
from jgrpo.study.sameness import ROUNDING, sameness

CONFIDENCE = 0.95
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
    folder: Path

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
        folder,
    )


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds and half the width of its interval (nan for one seed)."""

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Student's t: half = t(n - 1) * s / sqrt(n)."""
        n, mean = len(values), float(np.mean(values))
        if n < 2:
            return cls(mean, math.nan, n)
        return cls(mean, _t(n) * float(np.std(values, ddof=1)) / math.sqrt(n), n)

    def seeds_for(self, half: float) -> int:
        """The fewest seeds whose interval would be as narrow, if they vary as these do."""
        s = self.half * math.sqrt(self.n) / _t(self.n)
        n = max(2, int((s / half) ** 2))
        while _t(n) * s / math.sqrt(n) > half:
            n += 1
        return n

    def __str__(self) -> str:
        """In percent."""
        half = "" if math.isnan(self.half) else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:.1f}{half}"


def _t(n: int) -> float:
    return float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))


BOTH = ("final", "mean")
Results = Mapping[str, Mapping[int, Run]]
"""variant -> seed -> run"""


def _same(a: Mapping[int, Run], b: Mapping[int, Run]) -> str:
    return sameness(*({seed: run.folder for seed, run in row.items()} for row in (a, b)))


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
    if gain.half <= margin:
        return f"undecided by little: {100 * margin:g} points lie in its interval" + learns
    n = gain.seeds_for(margin)
    return f"undecided: ± {100 * margin:g} points would take about {n} seeds" + learns


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
            says = verdict(gain, soon, _same(runs, other), margin)
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
contradicts it if it surely gains more. A row whose adapters stay within {100 * ROUNDING:g} % of
their way from its reference's, for as long as both see the same completions, is the same but for
rounding: it says nothing, however far apart its accuracy. Tokens and seconds are means of a run
(start-up not counted); of runs side by side, each has the seconds of all."""


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
