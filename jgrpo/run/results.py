"""What evaluations say: rows for eval.jsonl, one JSON object, a table for the terminal, a curve."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from jgrpo.errors import short
from jgrpo.estimators import Paired, paired
from jgrpo.run.curves import COLOURS, MARKED
from jgrpo.run.evaluation import Evaluation

SHOWN_CHANGES = 3
"""Problems that rose, and that fell, which a comparison shows in the terminal."""


@dataclass(frozen=True)
class Result:
    """One policy (an adapter, or None: the base) on one set ("": the config's own problems)."""

    adapter: Path | None
    eval_set: str
    evaluation: Evaluation

    @property
    def step(self) -> int | None:
        """Of the adapter, if it is one of a run's."""
        if self.adapter is None or self.adapter.parent.name != "adapters":
            return None
        number = self.adapter.name.removeprefix("step_")
        return int(number) if number.isdecimal() else None

    @property
    def run(self) -> Path:
        """Of a step's adapter, the folder of its run."""
        return self.adapter.parent.parent if self.adapter else Path()

    @property
    def policy(self) -> str:
        """Its name in what is printed."""
        if self.adapter is None:
            return "base"
        return short(self.adapter) if self.step is None else f"{short(self.run)} step {self.step}"

    def figures(self) -> dict[str, Any]:
        """As JSON: whose they are, the metrics, and the intervals' ends by tag."""
        whose: dict[str, Any] = {"adapter": str(self.adapter) if self.adapter else None}
        whose |= {} if self.step is None else {"step": self.step}
        whose |= {"eval_set": self.eval_set} if self.eval_set else {}
        ends = {tag: [i.low, i.high] for tag, i in self.evaluation.intervals.items()}
        return whose | self.evaluation.metrics | {"intervals": ends}

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every completion, for eval.jsonl."""
        e = self.evaluation
        parts = zip(e.asked, e.completions, e.texts, e.grades.correct, strict=True)
        for problem, completions, texts, correct in parts:
            for i, completion in enumerate(completions):
                yield {
                    "adapter": str(self.adapter) if self.adapter else None,
                    "step": self.step,
                    "eval_set": self.eval_set or None,
                    "index": problem.index,
                    "sample": i,
                    "problem": problem.problem,
                    "completion": texts[i],
                    "gold": problem.gold,
                    "correct": bool(correct[i]),
                    "finish_reason": completion.finish_reason,
                    "n_tokens": len(completion.token_ids),
                }


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same problems."""

    result: Result
    against: Result

    @property
    def paired(self) -> Paired:
        """Of their accuracies."""
        first, second = (r.evaluation.scores["accuracy"] for r in (self.result, self.against))
        return paired(first, second, self.result.evaluation.n_samples)

    def changed(self, sign: int) -> list[int]:
        """The places of the problems that rose (sign 1) or fell (-1)."""
        first, second = (r.evaluation.scores["accuracy"] for r in (self.result, self.against))
        return np.flatnonzero(np.sign(first - second) == sign).tolist()

    def figures(self) -> dict[str, Any]:
        """As JSON; `rose` and `fell` are the indices of problems, as in eval.jsonl."""
        difference, asked = self.paired.difference, self.result.evaluation.asked
        return {
            "adapter": self.result.figures()["adapter"],
            "against": self.against.figures()["adapter"],
            "eval_set": self.result.eval_set or None,
            "difference": difference.value,
            "interval": [difference.low, difference.high],
            "p_value": self.paired.p_value,
            "rose": [asked[i].index for i in self.changed(1)],
            "fell": [asked[i].index for i in self.changed(-1)],
        }

    def text(self) -> str:
        """For the terminal: the difference, and the first problems that changed."""
        p, asked = self.paired, self.result.evaluation.asked
        test = "McNemar's exact" if self.result.evaluation.n_samples == 1 else "exact sign test's"
        difference = "{:+.1%} [{:+.1%}, {:+.1%}]".format(*p.difference)
        where = f" on {self.result.eval_set}" if self.result.eval_set else ""
        lines = [
            f"{self.result.policy} less {self.against.policy}{where}: {difference}, "
            f"{p.rose} problems rose, {p.fell} fell, {test} p = {p.p_value:.2g}"
        ]
        for verb, sign in (("rose", 1), ("fell", -1)):
            for i in self.changed(sign)[:SHOWN_CHANGES]:
                lines.append(
                    f"  {verb}: [{asked[i].index}] {' '.join(asked[i].problem.split()):.60}"
                )
        return "\n".join(lines)


def compare(results: Sequence[Result], against: Path | None) -> list[Comparison]:
    """Every result with that of `against` (None: the base) on the same set."""
    reference = {r.eval_set: r for r in results if r.adapter == against}
    return [Comparison(r, reference[r.eval_set]) for r in results if r.adapter != against]


def as_json(results: Sequence[Result], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """One result's figures as they are; of several, lists."""
    if len(results) == 1:
        return results[0].figures()
    lists: dict[str, Any] = {"results": [r.figures() for r in results]}
    return lists | ({"comparisons": [c.figures() for c in comparisons]} if comparisons else {})


def table(results: Sequence[Result]) -> Table:
    """A row a result; a cell is the mean over problems and its 95 % interval, in percent."""
    n, shown = results[0].evaluation.n_samples, Table(box=None, pad_edge=False)
    names = {"accuracy": "accuracy" if n == 1 else f"avg@{n}"}
    names |= {f"{kind}@{k}": f"{kind}@{k}" for kind in ("pass", "maj")
              for k in [1 << n.bit_length() - 1] if n > 1}  # fmt: skip
    sets = ["set"] * any(r.eval_set for r in results)
    for title in ("policy", *sets, "problems", *names.values(), "boxed", "cut off", "tokens"):
        shown.add_column(title, justify="left" if title in ("policy", "set") else "right")
    for result in results:
        e, metrics = result.evaluation, result.evaluation.metrics
        cells = ["{:.1f} [{:.1f}–{:.1f}]".format(*(100 * x for x in e.intervals[f"eval/{name}"]))
                 for name in names]  # fmt: skip
        shown.add_row(
            result.policy, *([result.eval_set or "-"] * len(sets)), str(len(e.asked)), *cells,
            f"{metrics['eval/boxed_fraction']:.0%}", f"{metrics['eval/truncated_fraction']:.0%}",
            f"{metrics['eval/avg_gen_length']:.0f}",
        )  # fmt: skip
    return shown


def draw_steps(results: Sequence[Result]) -> Figure:
    """Accuracy over the steps of runs, with its interval: a line a run and set."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    of_steps = [r for r in results if r.step is not None]
    lines = dict.fromkeys((r.run, r.eval_set) for r in of_steps)
    several = len({run for run, _ in lines}) > 1
    for i, (run, name) in enumerate(lines):
        own = {r.step or 0: r for r in of_steps if (r.run, r.eval_set) == (run, name)}
        steps = list(own)
        points = [r.evaluation.intervals["eval/accuracy"] for r in own.values()]
        colour = COLOURS[i % len(COLOURS)]
        label = f"{run.name}: " * several + (name or "evaluation problems")
        axes.plot(steps, [p.value for p in points], color=colour, label=label, **MARKED)
        low, high = [p.low for p in points], [p.high for p in points]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy, with its 95 % interval over problems")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure
