"""TensorBoard's file of a run: a card for what changes, completions to read, options as hparams.

A tag gets its card once two of its values differ, and then all its points: what never changes says
nothing as a curve (it stands in metrics.jsonl). One that has a single point gets it at the end.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import custom_scalars, hparams, text

from jgrpo.errors import printable

MOST_CHARACTERS = 4000
"""Of a completion in a text."""
CHARTS = {
    "learning": {
        "accuracy": ["train/accuracy", "eval/accuracy"],
        "reward": ["train/reward_mean", "reward/.*"],
        "tokens of a completion": ["train/avg_gen_length", "eval/avg_gen_length"],
    },
    "health": {
        "gap": ["sampler/logprob_diff_mean", "sampler/logprob_diff_max"],
        "shares": ["train/.*_fraction"],
    },
    "seconds of a step": {"by phase": ["time/(?!useful).*"]},
}
"""Curves that are read together, in one chart each (the tab `custom scalars`)."""


class Point(NamedTuple):
    """A value of a tag, and when it came."""

    time_s: float
    step: int
    tag: str
    value: float


class TensorBoard:
    """`rows`: a resumed run's metrics so far. Its file holds them again, and its first event hides
    those of the files before it, whatever a kill has torn in them."""

    def __init__(
        self, run_dir: Path, options: Mapping[str, Any], rows: Sequence[Mapping] | None
    ) -> None:
        # Names go by the second; TensorBoard reads the files in the order of their names.
        n_files = len(list(run_dir.glob("events.out.tfevents.*")))
        # Not SummaryWriter: its thread would keep the last points back, and on a full disk die.
        self._events = EventsWriter(str(run_dir / "events"), f".{n_files:06d}")
        self._held: dict[str, list[Point]] = {}
        self._shown: set[str] = set()
        if rows is not None:
            self._write(0, session_log=SessionLog(status=SessionLog.START))
        charts = {
            title: {name: ["Multiline", tags] for name, tags in group.items()}
            for title, group in CHARTS.items()
        }
        self._write(0, summary=custom_scalars(charts))
        for summary in hparams({k: _plain(v) for k, v in options.items()}, {}):
            self._write(0, summary=summary)
        for row in rows or ():
            self.log(row["step"], {tag: value for tag, value in row.items() if tag != "step"})

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Points of the tags that have changed so far; those of the others are held back."""
        now, due = time.time(), []
        for tag, value in metrics.items():
            if value is None or isinstance(value, str):
                continue
            self._held.setdefault(tag, []).append(Point(now, step, tag, value))
            if tag in self._shown or len({p.value for p in self._held[tag]}) > 1:
                self._shown.add(tag)
                due += self._held.pop(tag)
        self._points(due)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows as text, one after another."""
        self._write(step, summary=text(name, "\n\n---\n\n".join(map(_markdown, rows))))

    def close(self) -> None:
        self._points([points[0] for points in self._held.values() if len(points) == 1])
        self._events.close()

    def _points(self, points: Sequence[Point]) -> None:
        ordered = sorted(points, key=lambda p: p[:2])
        for (time_s, step), group in groupby(ordered, key=lambda p: p[:2]):
            values = [Summary.Value(tag=p.tag, simple_value=p.value) for p in group]
            self._write(step, time_s, summary=Summary(value=values))

    def _write(self, step: int, time_s: float | None = None, **what: Any) -> None:
        self._events.write_event(Event(wall_time=time_s or time.time(), step=step, **what))
        self._events.flush()


def _plain(value: Any) -> Any:
    """What hparams can hold."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _markdown(row: Mapping[str, Any]) -> str:
    """A line of the short fields, then each long one as a block: indented, so that nothing in it is
    taken for markup."""
    figures = {k: v for k, v in row.items() if isinstance(v, int | float)}
    head = " · ".join(f"{k} {v:.3g}" for k, v in figures.items())
    blocks = [
        f"{k}:\n\n" + "\n".join(f"    {x}" for x in printable(v[:MOST_CHARACTERS]).split("\n"))
        for k, v in row.items()
        if isinstance(v, str)
    ]
    return "\n\n".join([head, *blocks])
