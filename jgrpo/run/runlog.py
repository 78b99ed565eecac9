"""What a run tells: metrics to JSON lines, trackers (trackers.py) and the terminal (screen.py)."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from jgrpo.config import Config
from jgrpo.errors import RunError
from jgrpo.run.rundir import json_line, jsonable, truncate_metrics
from jgrpo.run.screen import Screen, is_evaluation
from jgrpo.run.terminal import ACCURACY, COLUMNS, Column, StepLines, TimeLeft
from jgrpo.run.told import completion_text, lines_shown, one_of_each
from jgrpo.run.trackers import Trackers

SHOWN_CHARACTERS = 600
"""Of a completion in the log."""
OF_A_COMPLETION = ("reward", "advantage", "gold", "problem", "completion")


def sample_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A right and a wrong completion of a step, as a tracker shows them."""
    return [{name: row[name] for name in OF_A_COMPLETION} for row in one_of_each(rows)]


class RunLog:
    """The log of one run; a context manager.

    `resume_step`: go on after this step; what was logged of later ones is removed. `config`
    names the trackers, which get it too. Lines go to `screen`, or to one of its own (`live` and
    `console` as there); `name` stands before them where several runs share it.
    """

    def __init__(
        self,
        run_dir: Path,
        n_steps: int,
        *,
        columns: Sequence[Column] = (ACCURACY, *COLUMNS),
        resume_step: int | None = None,
        config: Config | None = None,
        live: bool | None = None,
        console: Console | None = None,
        screen: Screen | None = None,
        name: str = "",
    ) -> None:
        self.screen = screen or Screen(n_steps, done=resume_step or 0, live=live, console=console)
        self._is_alone = screen is None
        self._run_dir, self.name = run_dir, name
        self._lines = StepLines(columns, n_steps, self.screen.console.width, name)
        self._left = TimeLeft(n_steps)
        rows = None if resume_step is None else truncate_metrics(run_dir, resume_step)
        # Unbuffered: one write a line, so that a killed run tears at most the last.
        self._file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        config = config or Config()
        self._show_every = config.show_every
        tell = lambda line: self.info(line, style="yellow")  # noqa: E731
        self._trackers = Trackers(config, run_dir, rows, tell)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._is_alone:
            self.screen.close()
        self._file.close()
        self._trackers.close()

    def info(self, text: str, *, style: str = "") -> None:
        """A line of this run's on the screen."""
        self.screen.info(f"{self.name}: {text}" if self.name else text, style=style)

    def log(
        self, step: int, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Write the metrics of one step; those of an evaluation become a line of their own. `rows`
        are its completions, of which the trackers get some.

        NaN and infinity are null in metrics.jsonl and left out of the trackers. Raises RunError if
        the disk does not take them.
        """
        evaluation = {tag: value for tag, value in metrics.items() if is_evaluation(tag)}
        training = {tag: value for tag, value in metrics.items() if not is_evaluation(tag)}
        for part in (training, evaluation):
            if part:
                self._write(step, jsonable(part))
        if training:
            self._trackers.table("completions/training", step, jsonable(sample_of(rows)))
            self._show_step(step, jsonable(training))
            if self._show_every and step % self._show_every == 0:
                self._show_completions(step, one_of_each(rows))
            self.screen.advanced(step, self._left.after_step(step, training))
        if evaluation:
            self._trackers.table("completions/evaluation", step, jsonable(rows))
            self._show_evaluation(step, jsonable(evaluation))
            self.screen.advanced(step, self._left.after_evaluation(step, evaluation))

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        line = json_line({"step": step, **metrics}).encode()
        try:
            while line:  # a disk that is nearly full takes a part, and fails at the next
                line = line[self._file.write(line) :]
        except OSError as error:
            raise RunError(f"{self._run_dir}: the metrics cannot be written: {error}") from error
        self._trackers.log(step, metrics)

    def _show_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if not self.screen.header_shown:
            self.screen.info(self._lines.legend(), style="dim")
            self.screen.info(self._lines.title(), style="bold")
            self.screen.header_shown = True
        self.screen.console.print(self._lines.row(step, metrics), soft_wrap=True)

    def _show_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Each below its problem, which they may share."""
        console = self.screen.console
        of = f"{self.name}, step {step}" if self.name else f"step {step}"
        for problem, same in groupby(rows, key=lambda row: row["problem"]):
            completions = [*same]
            lines_shown(console, of, problem, gold=completions[0]["gold"])
            for row in completions:
                text = completion_text(row, SHOWN_CHARACTERS, console.encoding)
                console.print(text, soft_wrap=not console.is_terminal)

    def _show_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        accuracy, correct, total = (
            metrics.get(f"eval/{name}") for name in ("accuracy", "correct", "total")
        )
        shown = "-" if accuracy is None else f"{accuracy:.3f}"
        counts = "" if correct is None or total is None else f" ({correct:.0f}/{total:.0f})"
        self.info(f"eval at step {step}: accuracy {shown}{counts}", style="green")
