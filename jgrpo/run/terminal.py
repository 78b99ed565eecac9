"""What a run shows while it runs: a line a step, and two bars below the lines (the steps, and the
phase at work), as wide as the terminal and with columns that stay where they are.
"""

import textwrap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column as Width
from rich.text import Text

from jgrpo.config import Config

RECENT_STEPS = 20
"""The time left follows the mean of so many."""


@dataclass(frozen=True)
class Column:
    """A figure of the step line."""

    title: str
    width: int
    tag: str
    form: str
    about: str = ""


ACCURACY = Column("acc", 7, "train/accuracy", "{:.3f}", "share of right completions")
REWARD = Column("reward", 8, "train/reward_mean", "{:.3f}", "mean of the completions")
COLUMNS = (
    Column("len", 8, "train/avg_gen_length", "{:.1f}", "mean tokens of a completion"),
    Column("gap", 9, "sampler/logprob_diff_mean", "{:.1e}", "mean |sampler - trainer logprob|"),
    Column("|grad|", 9, "train/grad_norm", "{:.2g}", "the gradient's norm before clipping"),
    Column("time", 8, "time/step", "{:.1f}s"),
    Column("tok/s", 7, "tokens_per_s", "{:.0f}", "sampled tokens / time without compiling"),
    Column("flat", 6, "train/zero_advantage_fraction", "{:.2f}", "share without an advantage"),
    Column("cut", 6, "train/truncated_fraction", "{:.2f}", "share that max_tokens cut off"),
    Column("entropy", 9, "train/entropy", "{:.3f}", "of the policy, nats a token"),
)
KL = Column("kl", 9, "train/approx_kl", "{:.1e}", "from the step's first policy, nats")
CLIP = Column("clip", 6, "train/clip_fraction", "{:.2f}", "share of clipped tokens")


def columns_of(*configs: Config) -> list[Column]:
    """The columns that can say something for one of these runs: the reward where it is not the
    accuracy, KL and clipping where more than one update lets the policy move."""
    shaped = any(c.reward_function or c.use_prm or c.use_length_penalty for c in configs)
    moving = [c for c in configs if c.updates_per_rollout > 1]
    clips = any(c.use_clip for c in moving)
    extra = [REWARD] * shaped + [KL] * bool(moving) + [CLIP] * clips
    return [ACCURACY, *extra, *COLUMNS]


class StepLines:
    """Turns metrics into lines under a title; the last columns go where the console is narrow."""

    def __init__(self, columns: Sequence[Column], n_steps: int, width: int, name: str = "") -> None:
        self.n_steps, self._width, self._name = n_steps, width, name
        self._first = max(2 * len(str(n_steps)) + 1, 4) + (1 + len(name) if name else 0)
        self._columns: list[Column] = []
        for column in columns:
            width -= column.width
            if width < self._first:
                break
            self._columns.append(column)

    def legend(self) -> str:
        """What the titles mean, in lines that break between them."""
        kept = [f"{c.title}: {c.about}".replace(" ", "\xa0") for c in self._columns if c.about]
        return textwrap.fill("; ".join(kept), self._width).replace("\xa0", " ")

    def title(self) -> str:
        return f"{'step':>{self._first}}" + "".join(f"{c.title:>{c.width}}" for c in self._columns)

    def row(self, step: int, metrics: Mapping[str, Any]) -> Text:
        """A step's figures below the titles."""
        seconds = (metrics.get("time/step") or 0.0) - (metrics.get("time/compile") or 0.0)
        if (tokens := metrics.get("tokens/generated")) and seconds > 0:
            metrics = {**metrics, "tokens_per_s": tokens / seconds}
        of = f"{self._name} {step}/{self.n_steps}" if self._name else f"{step}/{self.n_steps}"
        text = Text(f"{of:>{self._first}}", "dim")
        for c in self._columns:
            value = metrics.get(c.tag)
            shown = "-" if value is None else c.form.format(value)
            style = "bold" if c is ACCURACY else "dim" if c.tag == "time/step" else ""
            text.append(f"{shown:>{c.width}}", f"not dim {style}")
        return text


class TimeLeft:
    """Seconds until the end, by the last steps and evaluations, without what was compiled."""

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> float | None:
        seconds = metrics.get("time/step")
        if seconds is not None:
            self._recent_s.append(max(0.0, seconds - (metrics.get("time/compile") or 0.0)))
        return self._left(step)

    def after_evaluation(self, step: int, metrics: Mapping[str, Any]) -> float | None:
        if self._recent_s:
            self._recent_s[-1] += metrics.get("time/evaluation") or 0.0
        return self._left(step)

    def _left(self, step: int) -> float | None:
        if not self._recent_s:
            return None
        return (self._n_steps - step) * sum(self._recent_s) / len(self._recent_s)


def bars(console: Console, live: bool, compiling: Callable[[], str]) -> Progress:
    """Two lines at most, whose columns keep their places whatever is in them."""
    rest = max(12, min(30, console.width - 50))
    fixed = lambda width, **how: Width(width=width, no_wrap=True, overflow="ellipsis", **how)  # noqa: E731
    return Progress(
        _Name(fixed(10)),
        BarColumn(bar_width=None, table_column=Width(ratio=1)),
        _Count(fixed(11, justify="right")),
        _Clock(fixed(8, justify="right")),
        _Rest(fixed(rest), compiling),
        console=console,
        transient=True,
        disable=not live,
        expand=True,
    )


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`"""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


class _Name(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.description)


class _Count(ProgressColumn):
    """How many of how many; nothing where that is not known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Clock(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed_s = task.finished_time if task.finished else task.elapsed
        return Text("" if elapsed_s is None else clock(elapsed_s), "dim")


class _Rest(ProgressColumn):
    """Of the steps the time left, counting down; of a phase what is being compiled, or completions
    and tokens per second."""

    def __init__(self, width: Width, compiling: Callable[[], str]) -> None:
        super().__init__(width)
        self._compiling = compiling

    def render(self, task: Task) -> Text:
        if (left_s := task.fields.get("left_s")) is not None:
            waited_s = task.get_time() - task.fields["since"]
            return Text(f"{clock(max(0.0, left_s - waited_s))} left", "cyan")
        if "tokens" not in task.fields or task.finished_time or not task.elapsed:
            return Text()
        if program := self._compiling():
            return Text(f"compiling {program}", "yellow")
        if not (tokens := task.fields["tokens"]):
            return Text()
        return Text(
            f"{task.completed / task.elapsed:.1f}/s {tokens / task.elapsed:,.0f} tok/s", "cyan"
        )
