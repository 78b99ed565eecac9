"""Learning curves as a PNG: python -m jgrpo.plot runs/1 runs/2 --out curves.png."""

from jgrpo.errors import stop_at_once

if __name__ == "__main__":
    stop_at_once()

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jgrpo.errors import InputError, exit_status
from jgrpo.run.curves import draw, run_names
from jgrpo.run.rundir import read_metrics


@dataclass(frozen=True)
class Options:
    """Draw the learning curves of one or several runs into a PNG, and print its path."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Run folders."""
    out: Path | None = None
    """The picture. Default: curves.png in the run folder, or, of several runs, right here."""


def save(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the runs into `out` (default as in Options) and return the path."""
    if not folders:
        raise InputError("give at least one run folder")
    if len(set(map(Path.resolve, folders))) < len(folders):
        raise InputError(f"a run folder is given twice: {', '.join(map(str, folders))}")
    runs = dict(zip(run_names(folders), map(read_metrics, folders), strict=True))
    if empty := [name for name, rows in runs.items() if not rows]:
        raise InputError(f"run {', '.join(empty)}: metrics.jsonl has no line yet")
    if out is None:
        out = folders[0] / "curves.png" if len(folders) == 1 else Path("curves.png")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give a file, as {out}/curves.png")
    try:
        draw(runs).savefig(out)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: {error}") from error
    return out


def main() -> None:
    options = tyro.cli(Options, prog="python -m jgrpo.plot")
    with exit_status():
        print(save(options.runs, options.out))


if __name__ == "__main__":
    main()
