"""Runs beside each other as a table: python -m jgrpo.runs runs, or runs/1 runs/2.

How far each is, the last and the best evaluation, the seconds of its steps and evaluations, and the
options in which the runs differ.
"""

from jgrpo.errors import stop_at_once

if __name__ == "__main__":
    stop_at_once()

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jgrpo.errors import InputError, exit_status, printable
from jgrpo.run.curves import Rows
from jgrpo.run.differences import (
    briefly,
    differences,
    run_folders,
    run_names,
    saved_options,
    shown,
    words,
)
from jgrpo.run.rundir import read_metrics
from jgrpo.run.terminal import clock

FIGURES = ("run", "step", "accuracy", "best", "time")


@dataclass(frozen=True)
class Command:
    """Show runs as a table: steps, last and best evaluation, time, and what differs in configs."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = (
        Path("runs"),
    )
    """Run folders, or folders of them."""


def figures(rows: Rows, n_steps: int | None) -> list[str]:
    """Steps done and asked for, last accuracy, best accuracy and its step, time."""
    last_step = max((row["step"] for row in rows), default=0)
    found = [(row["eval/accuracy"], row["step"]) for row in rows
             if row.get("eval/accuracy") is not None]  # fmt: skip
    last = f"{found[-1][0]:.3f}" if found else "-"
    best, at = max(found, key=lambda pair: pair[0], default=(0.0, 0))  # the first of equal ones
    total_s = sum(row.get(tag) or 0.0 for row in rows for tag in ("time/step", "time/evaluation"))
    steps = f"{last_step}/{n_steps}" if n_steps else f"{last_step}"
    return [steps, last, f"{best:.3f} at {at}" if found else "-", clock(total_s)]


def table(folders: Sequence[Path], width: int) -> Table:
    """A row a run. Each option in which runs differ has a column of its own if all fit into the
    width; else they share one."""
    names = run_names(folders)
    configs = dict(zip(names, map(saved_options, folders), strict=True))
    options = differences(configs)
    body = [
        [name, *figures(read_metrics(folder), configs[name].get("n_grpo_steps"))]
        for name, folder in zip(names, folders, strict=True)
    ]
    header, right = _columns(options)
    if _width([[*FIGURES, *header], *map(list.__add__, body, right)]) > width:
        brief = briefly(options)
        header, right = ["what differs"], [[words(brief[name])] for name in names]
    made = Table()
    for title in (*FIGURES, *header):
        figure = title in FIGURES[1:]
        made.add_column(
            title, justify="right" if figure else "left", no_wrap=figure, overflow="fold"
        )
    for cells in map(list.__add__, body, right):
        made.add_row(*(Text(printable(cell)) for cell in cells))
    return made


def _columns(options: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The options as titles, and their values, run by run."""
    titles = list(dict.fromkeys(name for own in options.values() for name in own))
    values = [[shown(own[t]) if t in own else "-" for t in titles] for own in options.values()]
    return titles, values


def _width(cells: Sequence[Sequence[str]]) -> int:
    """Of a table of these cells, with its lines."""
    return 1 + sum(max(map(len, column)) + 3 for column in zip(*cells, strict=True))


def main() -> None:
    command = tyro.cli(Command, prog="python -m jgrpo.runs")
    console = Console(highlight=False)
    with exit_status():
        folders = [folder for given in command.folders for folder in run_folders(given)]
        if len(set(map(Path.resolve, folders))) < len(folders):
            raise InputError("a run folder is given twice")
        console.print(table(folders, console.width))


if __name__ == "__main__":
    main()
