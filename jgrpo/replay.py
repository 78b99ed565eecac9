"""Replay: python -m jgrpo.replay RUN --step K.

Step K is learned from again, with its saved rollouts and the adapter that sampled them, and what
comes out is compared with what the run logged. On the machine of the run it is the same bits.
"""

from jgrpo.errors import InputError, RunError, exit_status, stop_at_once

if __name__ == "__main__":
    stop_at_once()
from jgrpo import cli

if __name__ == "__main__":  # before JAX is imported, as in train
    cli.tune_allocator()

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jgrpo.policy import adapter as adapters
from jgrpo.policy.lora import stacked_up
from jgrpo.run.checkpoint import Checkpoints
from jgrpo.run.policy import open_policy
from jgrpo.run.probe import gaps_to, of_a_stale_policy
from jgrpo.run.rundir import as_begun, existing_adapter, read_metrics, rollouts_file
from jgrpo.run.session import configure_jax
from jgrpo.study.compare import read_rollouts, saved_rows
from jgrpo.update.learner import Learner

TOLERANCE = {"float32": 1e-4, "float16": 0.005, "bfloat16": 0.02}
"""Largest relative difference that another machine may make (and the same below 1e-6)."""
ADAPTER = "adapter/largest_difference"
NOT_OF_THE_STEP = ("train/lr", "train/compilations")


@dataclass(frozen=True)
class Options:
    """Compute a step's loss and gradient again from what its run folder holds, and compare."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    step: int
    """The step, from 1."""


def replay(run: Path, step: int) -> dict[str, tuple[float, float]]:
    """What was logged of a step's update, and what comes out now, by tag; with
    adapter/largest_difference where the optimizer's state before the step is in a checkpoint (the
    last ones are, and those that --checkpoint_keep_period keeps).

    InputError if the run folder lacks something.
    """
    configure_jax()
    config, logged = cli.resumed_config(run), _logged(run, step)
    lines = read_rollouts(rollouts_file(run, step), config.group_size)
    checkpoints = Checkpoints(run, read_only=True)
    saved = checkpoints.steps()
    if config.updates_per_rollout > 1 and step - 1 not in saved:
        raise InputError(
            f"step {step} made {config.updates_per_rollout} updates, so that Adam's state before "
            f"it is needed: --step can be {' or '.join(str(k + 1) for k in saved) or 'none'}"
        )
    policy = open_policy(as_begun(config, run))
    before = adapters.load(existing_adapter(run, step - 1), policy.adapter)
    both = stacked_up([before]), stacked_up([policy.adapter])
    learner = Learner([config], policy.graph, both[0], policy.base, starts=both[1])
    if step - 1 in saved:
        learner.set_state(0, checkpoints.restore(step - 1, learner.state(0)))
    rows = {0: saved_rows(config, lines)}
    metrics = learner.learn(rows)[0]
    if (sampled_by := lines[0].get("policy_step", step - 1)) < step - 1:
        sampled = adapters.load(existing_adapter(run, sampled_by), policy.adapter)
        gaps = gaps_to(stacked_up([sampled]), learner, rows)
        metrics = of_a_stale_policy(metrics) | gaps[0]
    figures = {
        tag: (math.nan if logged[tag] is None else logged[tag], metrics[tag])
        for tag in metrics
        if tag in logged and tag not in NOT_OF_THE_STEP
    }
    if step - 1 in saved:
        new = adapters.adapter_arrays(learner.state(0)[0])
        old = adapters.load(existing_adapter(run, step), policy.adapter)
        pairs = ((new[key], array) for key, array in adapters.adapter_arrays(old).items())
        largest = max(float(np.abs(a - b).max()) for a, b in pairs)
        figures[ADAPTER] = 0.0, largest
    return figures


def _logged(run: Path, step: int) -> Mapping[str, Any]:
    steps = {row["step"]: row for row in read_metrics(run) if "train/loss" in row}
    if step not in steps:
        raise InputError(f"--step {step}: {run} has logged the steps {_range(sorted(steps))}")
    return steps[step]


def _range(steps: list[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if steps else "of no update yet"


def difference(logged: float, now: float) -> float:
    """Relative; 0 for the same number and where both are not finite, infinite where one is not."""
    if logged == now or not (math.isfinite(logged) or math.isfinite(now)):
        return 0.0
    if not (math.isfinite(logged) and math.isfinite(now)):
        return math.inf
    return abs(now - logged) / max(abs(logged), abs(now))


def main() -> None:
    options = tyro.cli(Options, prog="python -m jgrpo.replay")
    with exit_status():
        figures = replay(options.run, options.step)
        print(f"{'':32}{'logged':>16}{'now':>16}{'difference':>12}")
        for tag, (logged, now) in figures.items():
            print(f"{tag:32}{logged:16.9g}{now:16.9g}{difference(logged, now):12.1e}")
        tolerance = TOLERANCE[cli.resumed_config(options.run).dtype]
        wrong = [
            tag
            for tag, pair in figures.items()
            if difference(*pair) > tolerance and not abs(pair[0] - pair[1]) < 1e-6
        ]
        if wrong:
            raise RunError(f"not what was logged: {', '.join(wrong)} (tolerance {tolerance:g})")
        same = all(difference(*pair) == 0 for pair in figures.values())
        parts = "loss and gradient" + " and the adapter" * (ADAPTER in figures)
        print(f"confirmed: {parts}" + (", to the bit" if same else ""))


if __name__ == "__main__":
    main()
