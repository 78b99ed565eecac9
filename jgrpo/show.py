"""Completions in the terminal: python -m jgrpo.show RUN --step K [--problem N].

The groups of a step, each with its problem, gold answer and completions: right or wrong, advantage,
parts of the reward. What could steer the terminal is shown as an escape.
"""

from jgrpo.errors import stop_at_once

if __name__ == "__main__":
    stop_at_once()

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from jgrpo.errors import InputError, exit_status
from jgrpo.run import completions as kept
from jgrpo.run.told import completion_text, lines_shown

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """Print a step's completions, problem by problem."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    step: int | None = None
    """Whose completions. Default: the last step."""
    problem: int | None = None
    """Only this problem of the step, from 1."""
    which: tuple[str, ...] = ()
    """Only those that are all of these: right, wrong, boxed, unboxed, truncated."""
    characters: int = 4000
    """Of a completion at most; the middle is left out, and that is said. 0: all."""


KINDS = {
    "right": lambda f: f["right"] is True,
    "wrong": lambda f: f["right"] is False,
    "boxed": lambda f: f["answer"] is not None,
    "unboxed": lambda f: f["answer"] is None,
    "truncated": lambda f: f["truncated"],
}


def groups(run: Path, step: int) -> Iterator[tuple[str, Iterable[dict[str, Any]]]]:
    """A step's completions by problem, in the order of the file, read one at a time."""
    where = f"step {step}, completion"
    rows = (kept.parsed(line, f"{where} {n}") for n, line in kept.lines_of(run, step))
    return groupby(rows, key=lambda row: str(row["problem"]))


def show(options: Options, console: Console) -> int:
    """Print what was asked for -> how many completions. InputError if there is nothing to read."""
    if odd := sorted(set(options.which) - KINDS.keys()):
        raise InputError(f"--which {odd[0]}: give {', '.join(KINDS)}")
    if not (steps := kept.steps_kept(options.run)):
        raise InputError(f"{options.run}: no completions in rollouts/; give a run folder")
    step = steps[-1] if options.step is None else options.step
    shown = n = 0
    for n, (problem, rows) in enumerate(groups(options.run, step), start=1):
        if options.problem in (None, n):
            wanted = [r for r in rows if all(KINDS[k](kept.facts(r)) for k in options.which)]
            if wanted:
                head = f"step {step}, problem {n}"
                lines_shown(console, head, problem, gold=wanted[0]["gold"])
            for row in wanted:
                text = completion_text(row, options.characters, console.encoding)
                console.print(text, soft_wrap=not console.is_terminal)
            shown += len(wanted)
    if options.problem is not None and not 1 <= options.problem <= n:
        raise InputError(f"--problem {options.problem}: step {step} has problems 1 to {n}")
    return shown


def main() -> None:
    options = tyro.cli(Options, prog="python -m jgrpo.show")
    with exit_status():
        if not show(options, Console(highlight=False)):
            print("no completion is like that", file=sys.stderr)


if __name__ == "__main__":
    main()
