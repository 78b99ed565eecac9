"""What a run tells: metrics to JSON lines, trackers (trackers.py) and the terminal (terminal.py);
phases with a bar each; what is being compiled.

On a terminal two bars (steps, and the phase at work) stay below the lines that scroll by. Elsewhere
(a file, a pipe) there are only the lines, without control codes.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TaskID
from rich.text import Text

from jgrpo.config import Config
from jgrpo.errors import READER_GONE, RunError, printable
from jgrpo.rollout.protocol import Progress as Advance
from jgrpo.run.compiling import Compilations
from jgrpo.run.rundir import json_line, jsonable, truncate_metrics
from jgrpo.run.terminal import ACCURACY, COLUMNS, Column, StepLines, TimeLeft, bars, clock
from jgrpo.run.told import completion_text, lines_shown, one_of_each
from jgrpo.run.trackers import Trackers

SHOWN_CHARACTERS = 600
"""Of a completion in the log."""
OF_A_COMPLETION = ("reward", "advantage", "gold", "problem", "completion")


def sample_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A right and a wrong completion of a step, as a tracker shows them."""
    return [{name: row[name] for name in OF_A_COMPLETION} for row in one_of_each(rows)]


def is_evaluation(tag: str) -> bool:
    return tag.startswith("eval/") or tag == "time/evaluation"


class _Console(Console):
    """rich would end the process without a word."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()  # from here on the output goes nowhere
        except SystemExit:
            raise RunError(READER_GONE) from None


class RunLog:
    """The log of one run; a context manager, so that the terminal is whole again after an error.

    `resume_step`: go on after this step; what was logged of later ones is removed. `config`
    names the trackers, which get it too. `live` and `console` follow the terminal unless given. The
    seconds of each phase add up in `seconds`, until `take_seconds` hands them over;
    those that compilation took of them, in `compile`.
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
    ) -> None:
        self.console = console or _Console(highlight=False)
        self.seconds: dict[str, float] = {}
        self._taken: dict[str, float] = {}
        self._run_dir = run_dir
        self._n_steps = n_steps
        self._start_s = time.perf_counter()
        self._lines = StepLines(columns, n_steps, self.console.width)
        self._left = TimeLeft(n_steps)
        self._header_shown = False
        rows = None if resume_step is None else truncate_metrics(run_dir, resume_step)
        # Unbuffered: one write a line, so that a killed run tears at most the last.
        self._file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        tell = lambda line: self.info(line, style="yellow")  # noqa: E731
        config = config or Config()
        self._show_every = config.show_every
        self._trackers = Trackers(config, run_dir, rows, tell)
        self._compiling = Compilations(lambda line: self.info(line, style="dim"))
        is_live = self.console.is_terminal if live is None else live
        self._progress = bars(self.console, is_live, lambda: self._compiling.now)
        self._steps = self._progress.add_task("steps", total=n_steps, completed=resume_step or 0)
        self._phase: TaskID | None = None
        self._lock = threading.Lock()
        self._progress.start()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._progress.stop()
        self._compiling.close()
        self._file.close()
        self._trackers.close()

    def info(self, text: str, *, style: str = "") -> None:
        """Print text of any origin: nothing in it is taken for markup or a control code."""
        safe = printable(text, self.console.encoding)
        self.console.print(Text(safe, style), soft_wrap=not self.console.is_terminal)

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Show the package's warnings (`logging`) among the lines, while this lasts."""
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.info(record.getMessage(), style="yellow")  # type: ignore[method-assign]
        logging.getLogger("jgrpo").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("jgrpo").removeHandler(handler)

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
            self._show_left(step, self._left.after_step(step, training))
        if evaluation:
            self._trackers.table("completions/evaluation", step, jsonable(rows))
            self._show_evaluation(step, jsonable(evaluation))
            self._show_left(step, self._left.after_evaluation(step, evaluation))

    def summary(self) -> str:
        """How long the run took, and how much of that was compilation."""
        total_s = time.perf_counter() - self._start_s
        return (
            f"{self._n_steps} steps: this run took {clock(total_s)}, "
            f"{clock(self._compiling.seconds)} of it compiling"
        )

    def shares(self) -> dict[str, float]:
        """Share of this run's time, so far, that each phase took, the largest first."""
        total_s = time.perf_counter() - self._start_s
        spent = {name: s / total_s for name, s in self._taken.items() if name != "compile"}
        return dict(sorted(spent.items(), key=lambda pair: -pair[1]))

    def take_seconds(self) -> dict[str, float]:
        """The seconds of each phase since the last call, as `time/<phase>`."""
        taken = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = {}
        return taken

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Show and time one phase. Yields `advance(completions, tokens)`, safe from any thread."""
        if self._phase is not None:
            self._progress.remove_task(self._phase)
        task = self._phase = self._progress.add_task(name, total=total, tokens=0)

        n_tokens = 0

        def advance(completions: int, tokens: int = 0) -> None:
            nonlocal n_tokens
            with self._lock:
                n_tokens += tokens
                self._progress.update(task, advance=completions, tokens=n_tokens)

        start_s, compiled_s = time.perf_counter(), self._compiling.seconds
        try:
            yield advance
        finally:
            self._add_seconds(name, time.perf_counter() - start_s)
            if not is_evaluation(f"time/{name}"):
                self._add_seconds("compile", self._compiling.seconds - compiled_s)
            self._progress.stop_task(task)

    def _add_seconds(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._taken[name] = self._taken.get(name, 0.0) + seconds

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        line = json_line({"step": step, **metrics}).encode()
        try:
            while line:  # a disk that is nearly full takes a part, and fails at the next
                line = line[self._file.write(line) :]
        except OSError as error:
            raise RunError(f"{self._run_dir}: the metrics cannot be written: {error}") from error
        self._trackers.log(step, metrics)

    def _show_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if not self._header_shown:
            self.info(self._lines.legend(), style="dim")
            self.info(self._lines.title(), style="bold")
            self._header_shown = True
        self.console.print(self._lines.row(step, metrics), soft_wrap=True)

    def _show_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Each below its problem, which they may share."""
        for problem, same in groupby(rows, key=lambda row: row["problem"]):
            completions = [*same]
            lines_shown(self.console, f"step {step}", problem, gold=completions[0]["gold"])
            for row in completions:
                text = completion_text(row, SHOWN_CHARACTERS, self.console.encoding)
                self.console.print(text, soft_wrap=not self.console.is_terminal)

    def _show_left(self, step: int, left_s: float | None) -> None:
        since = self._progress.get_time()
        self._progress.update(self._steps, completed=step, left_s=left_s, since=since)

    def _show_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        accuracy, correct, total = (
            metrics.get(f"eval/{name}") for name in ("accuracy", "correct", "total")
        )
        shown = "-" if accuracy is None else f"{accuracy:.3f}"
        counts = "" if correct is None or total is None else f" ({correct:.0f}/{total:.0f})"
        self.info(f"eval at step {step}: accuracy {shown}{counts}", style="green")
