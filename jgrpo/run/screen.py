"""What a run shows in the terminal: lines, phases with a bar each, what is being compiled, and at
the end where the time went. Runs side by side share one.

On a terminal two bars (steps, and the phase at work) stay below the lines that scroll by. Elsewhere
(a file, a pipe) there are only the lines, without control codes.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TaskID
from rich.text import Text

from jgrpo.errors import READER_GONE, RunError, printable
from jgrpo.rollout.protocol import Progress as Advance
from jgrpo.run.compiling import Compilations
from jgrpo.run.terminal import bars, clock


class _Console(Console):
    """rich would end the process without a word."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()  # from here on the output goes nowhere
        except SystemExit:
            raise RunError(READER_GONE) from None


def is_evaluation(tag: str) -> bool:
    return tag.startswith("eval/") or tag == "time/evaluation"


class Phases:
    """What one thread is at, a phase after another, shown in a bar. The seconds of each add up in
    `seconds`, until `take_seconds` hands them over; those that compilation took of them, in
    `compile`, where it is listened to."""

    def __init__(self, progress: RichProgress, compiling: Compilations | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._taken: dict[str, float] = {}
        self._progress, self._compiling = progress, compiling
        self._phase: TaskID | None = None
        self._now, self._since_s = "", 0.0
        self._lock = threading.Lock()

    def take_seconds(self) -> dict[str, float]:
        """The seconds of each phase since the last call, as `time/<phase>`."""
        taken = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = {}
        return taken

    def spent(self, name: str) -> float:
        """Seconds in a phase so far, the one at work included."""
        since_s = self._since_s if self._now == name else time.perf_counter()
        return self._taken.get(name, 0.0) + time.perf_counter() - since_s

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

        self._since_s, compiled_s = time.perf_counter(), self._compiled_s
        self._now = name
        try:
            yield advance
        finally:
            self._now = ""
            self._add_seconds(name, time.perf_counter() - self._since_s)
            if self._compiling and not is_evaluation(f"time/{name}"):
                self._add_seconds("compile", self._compiled_s - compiled_s)
            self._progress.stop_task(task)

    @property
    def _compiled_s(self) -> float:
        return self._compiling.seconds if self._compiling else 0.0

    def _add_seconds(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._taken[name] = self._taken.get(name, 0.0) + seconds


class Screen(Phases):
    """A context manager, so that the terminal is whole again after an error. Its phases are those
    of the thread that makes it.

    `live` and `console` follow the terminal unless given.
    """

    def __init__(
        self,
        n_steps: int,
        *,
        done: int = 0,
        live: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self.console = console or _Console(highlight=False)
        self.header_shown = False
        self._n_steps = n_steps
        self._start_s = time.perf_counter()
        self._heard = Compilations(lambda line: self.info(line, style="dim"))
        is_live = self.console.is_terminal if live is None else live
        progress = bars(self.console, is_live, lambda: self._heard.now)
        super().__init__(progress, self._heard)
        self._steps = progress.add_task("steps", total=n_steps, completed=done)
        progress.start()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._progress.stop()
        self._heard.close()

    def info(self, text: str, *, style: str = "") -> None:
        """Print text of any origin: nothing in it is taken for markup or a control code."""
        safe = printable(text, self.console.encoding)
        self.console.print(Text(safe, style), soft_wrap=not self.console.is_terminal)

    def advanced(self, step: int, left_s: float | None) -> None:
        """So many steps are done, and so many seconds are left."""
        since = self._progress.get_time()
        self._progress.update(self._steps, completed=step, left_s=left_s, since=since)

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

    def summary(self) -> str:
        """How long the run took, and how much of that was compilation."""
        total_s = time.perf_counter() - self._start_s
        return (
            f"{self._n_steps} steps: this run took {clock(total_s)}, "
            f"{clock(self._heard.seconds)} of it compiling"
        )

    def beside(self) -> Phases:
        """Those of another thread, in a bar of their own."""
        return Phases(self._progress)

    def shares(self) -> dict[str, float]:
        """Share of this run's time, so far, that each phase took, the largest first."""
        total_s = time.perf_counter() - self._start_s
        spent = {name: s / total_s for name, s in self._taken.items() if name != "compile"}
        return dict(sorted(spent.items(), key=lambda pair: -pair[1]))
