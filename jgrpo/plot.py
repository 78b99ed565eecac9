"""Learning curves as a PNG: python -m jgrpo.plot runs, or runs/1 runs/2 --out curves.png."""

from jgrpo.errors import stop_at_once

if __name__ == "__main__":
    stop_at_once()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jgrpo.errors import InputError, exit_status, printable
from jgrpo.run.curves import Rows, draw
from jgrpo.run.differences import briefly, differences, run_folders, run_names, saved_options, words
from jgrpo.run.rundir import read_metrics


@dataclass(frozen=True)
class Command:
    """Draw the learning curves of one or several runs into a PNG, and print its path."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Run folders, or folders of them."""
    out: Path | None = None
    """The picture. Default: curves.png in the run folder, or, of several runs, right here."""


def save(given: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the runs into `out` (default as in Command) and return the path."""
    folders = [folder for one in given for folder in run_folders(one)]
    if not folders:
        raise InputError("give at least one run folder")
    if len(set(map(Path.resolve, folders))) < len(folders):
        raise InputError(f"a run folder is given twice: {', '.join(map(str, given))}")
    runs = labelled(folders)
    if out is None:
        out = folders[0] / "curves.png" if len(given) == len(folders) == 1 else Path("curves.png")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give a file, as {out}/curves.png")
    try:
        draw(runs).savefig(out)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: {error}") from error
    return out


def labelled(folders: Sequence[Path]) -> dict[str, Rows]:
    """The metrics of each run by its name and what differs in its config. A run that has none yet
    is left out, and told of; InputError if that leaves no run."""
    rows = {folder: read_metrics(folder) for folder in folders}
    begun = [folder for folder in folders if rows[folder]]
    if empty := ", ".join(str(folder) for folder in folders if not rows[folder]):
        if not begun:
            raise InputError(f"{empty}: metrics.jsonl has no line yet")
        print(printable(f"left out, no step is done yet: {empty}"), file=sys.stderr)
    names = run_names(begun)
    options = briefly(differences(dict(zip(names, map(saved_options, begun), strict=True))))
    labels = [f"{name}  {words(options[name])}".strip() for name in names]
    return {label: rows[folder] for label, folder in zip(labels, begun, strict=True)}


def main() -> None:
    options = tyro.cli(Command, prog="python -m jgrpo.plot")
    with exit_status():
        print(save(options.runs, options.out))


if __name__ == "__main__":
    main()
