"""What a run leaves behind: its folder, its log, and the checkpoints from which it goes on."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from jgrpo.checks import without_effect
from jgrpo.config import Config
from jgrpo.errors import InputError, short
from jgrpo.run.checkpoint import Checkpoints
from jgrpo.run.curves import draw
from jgrpo.run.rundir import (
    add_resume,
    check_inputs,
    claimed,
    named_run_dir,
    next_run_dir,
    read_metrics,
    remove_later,
    write_config,
)
from jgrpo.run.runlog import RunLog
from jgrpo.run.session import Session, fingerprints
from jgrpo.run.terminal import columns_of

State = Any
"""A learner's: adapter and optimizer."""


class Record:
    """The folder of one run, claimed for this process until `stack` ends. `first` is the step that
    the run goes on after, 0 for a new one.

    A new run's folder is filled and a resumed one's changed by `begin` alone, so that whatever is
    wrong until then leaves everything as it was.
    """

    def __init__(self, session: Session, resume: Path | None, stack: ExitStack) -> None:
        self.config, self.session, self.resumed = session.config, session, resume is not None
        self.run_dir = resume or _new_run_dir(self.config)
        stack.enter_context(claimed(self.run_dir, new=not resume))
        self.checkpoints = Checkpoints(
            self.run_dir,
            keep=self.config.save_total_limit,
            keep_period=self.config.checkpoint_keep_period,
        )
        stack.callback(self.checkpoints.close)
        self.inputs, self.first = fingerprints(self.config, session.problems), 0

    def restore(self, state: State) -> State:
        """The state that the run goes on from, in the structure of a fresh one. A run that was
        killed before its first checkpoint begins anew. InputError if it cannot go on."""
        self.whole = 0, jax.device_get(state)
        if not self.resumed:
            return state
        check_inputs(self.run_dir, self.inputs)
        if not (saved := self.checkpoints.steps()):
            if sorted((self.run_dir / "adapters").glob("step_*"))[1:]:
                raise InputError(
                    f"{self.checkpoints.folder} holds no checkpoint to resume from, though the run "
                    "has trained: bring the folder back, or start a new run with --config"
                )
            return state
        self.first = saved[-1]
        if self.first > self.config.n_grpo_steps:
            raise InputError(
                f"n_grpo_steps={self.config.n_grpo_steps}: the run has done {self.first} steps; "
                "ask for more"
            )
        state = self.checkpoints.restore(self.first, state)
        self.keep(self.first, state)
        return state

    def begin(self, stack: ExitStack) -> RunLog:
        """Write config.json, or note the resume and remove what was done after `first`; open the
        log."""
        c, run_dir = self.config, self.run_dir
        devices = {"devices": [str(d) for d in jax.devices()]}
        if not self.resumed:
            date = self.session.problems.date
            write_config(run_dir, c, {"inputs": self.inputs, "date": f"{date}", **devices})
        resume_step = self.first if self.resumed else None
        log = stack.enter_context(
            RunLog(
                run_dir,
                c.n_grpo_steps,
                columns=columns_of(c),
                resume_step=resume_step,
                config=c,
            )
        )
        stack.enter_context(log.warnings())
        if self.resumed:
            add_resume(run_dir, c, self.first, devices)
            remove_later(run_dir, self.first)
            self.checkpoints.tidy()
        return log

    def tell(self, log: RunLog) -> None:
        """What is about to run."""
        for line in (*self.session.problems.report, f"{self.session}; run: {short(self.run_dir)}"):
            log.info(line)
        for line in without_effect(self.config):
            log.info(line, style="yellow")

    def keep(self, step: int, state: State) -> None:
        """Remember the state after `step`, which is whole, safe from donation."""
        self.whole = step, jax.device_get(state)

    def save(self) -> None:
        """A checkpoint of the last whole step."""
        self.checkpoints.save(*self.whole)

    def stop(self) -> str:
        """Save the last whole step, and say from where the run can go on."""
        step, again = self.whole[0], f"python -m jgrpo.train --resume {short(self.run_dir)}"
        try:
            self.save()
        except Exception as error:  # whatever it is, it must not hide why the run ends
            last = max(self.checkpoints.steps(), default=0)
            return f"stopped after step {step}; {error}\nto go on after step {last}: {again}"
        return f"stopped after step {step}; to go on: {again}"

    def finish(self, log: RunLog) -> None:
        """The learning curve, and where everything is."""
        picture, unfinished = self.run_dir / "curves.png", self.run_dir / ".curves.png.tmp"
        draw({self.run_dir.name: read_metrics(self.run_dir)}).savefig(unfinished, format="png")
        unfinished.replace(picture)
        last = sorted((self.run_dir / "adapters").iterdir())[-1]
        log.info(f"{log.summary()}\n{where_it_went(log.shares(), self.config)}")
        log.info(f"learning curve: {short(picture)}\nadapter: {short(last)}")


def where_it_went(shares: dict[str, float], config: Config) -> str:
    """The largest phases in a line, and what would help most where one thing would."""
    parts = [f"{share:.0%} {name}" for name, share in shares.items() if share >= 0.01]
    line = "where it went: " + ", ".join(parts)
    if config.rollout == "vllm" and shares.get("generation", 0.0) > 0.5:
        line += "; the trainer mostly waited for completions: another server would help most"
    return line


def _new_run_dir(config: Config) -> Path:
    return named_run_dir(config.run_dir) if config.run_dir else next_run_dir(config.base_dir)


def skipped_at_the_end(rows: list[dict], updates_per_rollout: int) -> int:
    """The updates in a row that were skipped when a run stopped, from its metrics."""
    found = 0
    for row in reversed([row for row in rows if "train/skipped_updates" in row]):
        found += int(row["train/skipped_updates"])
        if row["train/skipped_updates"] < updates_per_rollout:
            break
    return found
