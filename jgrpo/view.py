"""A page to read runs on: python -m jgrpo.view runs/1 runs/2 [--out page.html].

It is served on this machine alone, until Ctrl-C, or written as one file that can be sent.
"""

from jgrpo.errors import stop_at_once

if __name__ == "__main__":
    stop_at_once()

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jgrpo.errors import InputError, exit_status
from jgrpo.page.data import Runs
from jgrpo.page.server import Server
from jgrpo.page.sheet import default_steps, sheet
from jgrpo.run.completions import steps_kept
from jgrpo.run.differences import run_folders
from jgrpo.run.rundir import write_whole


@dataclass(frozen=True)
class Options:
    """Show runs on a page: curves, completions, one problem through time, health, reports."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Run folders, or folders of runs (an ablation's, say)."""
    out: Path | None = None
    """Write the page into this file instead of serving it."""
    steps: tuple[int, ...] = ()
    """With --out: the steps whose completions are in the file. Default: first, middle and last."""
    port: int = 8642
    """Where it is served on 127.0.0.1; 0: any that is free."""
    open: bool = False
    """Open it in the browser."""


def given(folders: Sequence[Path]) -> Runs:
    """The runs in the folders, and the reports beside and in them. InputError if there is none."""
    if not folders:
        raise InputError("give at least one run folder")
    runs = list(dict.fromkeys(run for folder in folders for run in run_folders(folder)))
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError(f"a run folder is given twice: {', '.join(map(str, folders))}")
    places = [*folders, *runs]
    beside = [place for place in places if (place / "report.md").is_file()]
    inside = [file.parent for run in runs for file in sorted(run.glob("ablation/*/report.md"))]
    return Runs(runs, list(dict.fromkeys([*beside, *inside])))


def write(runs: Runs, out: Path, steps: Sequence[int] = ()) -> Path:
    """The page as a file. InputError if it cannot be written, or no run has one of the steps."""
    there = sorted({step for run in runs.folders for step in steps_kept(run)})
    if odd := sorted(set(steps) - set(there)):
        has = f"{there[0]} to {there[-1]}" if there else "none"
        raise InputError(f"--steps {odd[0]}: no run has its completions; there are {has}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: needs a file in a folder that is there, as page.html")
    runs.steps = frozenset(steps) or default_steps(there)
    try:
        write_whole(out, sheet(runs))
    except OSError as error:
        raise InputError(f"--out {out}: {error}") from error
    return out


def serve(runs: Runs, port: int, *, open_browser: bool = False) -> None:
    """Serve the page until Ctrl-C. InputError if the port cannot be had."""
    try:
        server = Server(runs, port)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: {error}; give another, or 0 for a free one") from error
    with server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        if open_browser:
            webbrowser.open(server.url)
        server.serve_forever()


def main() -> None:
    options = tyro.cli(Options, prog="python -m jgrpo.view")
    with exit_status():
        runs = given(options.runs)
        if options.out is None:
            serve(runs, options.port, open_browser=options.open)
        else:
            out = write(runs, options.out, options.steps)
            steps = ", ".join(map(str, sorted(runs.steps or ()))) or "none"
            print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; completions of steps: {steps}")


if __name__ == "__main__":
    main()
