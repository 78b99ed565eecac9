"""Where a run's time goes: the share of each phase in its steps, from its metrics.

    python benchmarks/step.py RUN [--skip 1]

The first steps compile, so they are left out by default. "rest" is what is in no phase (advantages,
batching, metrics, bookkeeping). Last line: one JSON document.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro

from jgrpo.errors import InputError, exit_status
from jgrpo.run.rundir import read_metrics

PHASES = ("generation", "training", "reward", "export", "reload")


@dataclass
class Args:
    """Print where a run's time went."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    skip: int = 1
    """Steps to leave out at the beginning."""


def shares(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds a step of each phase, of the rest, and of the step."""
    found = {name: median(row.get(f"time/{name}", 0.0) for row in rows) for name in PHASES}
    rest = (row["time/step"] - sum(row.get(f"time/{n}", 0.0) for n in PHASES) for row in rows)
    return found | {"rest": median(rest), "step": median(row["time/step"] for row in rows)}


def main() -> None:
    with exit_status():
        args = tyro.cli(Args)
        rows = [row for row in read_metrics(args.run) if "time/step" in row][args.skip :]
        if not rows:
            raise InputError(f"{args.run} has no more than {args.skip} steps; try --skip 0")
        found = shares(rows)
        print("| phase | seconds | share |\n| --- | --- | --- |")
        for name, seconds in found.items():
            print(f"| {name} | {seconds:.3f} | {seconds / found['step']:.1%} |")
        print(json.dumps({"steps": len(rows), "median_s": found}))


if __name__ == "__main__":
    main()
