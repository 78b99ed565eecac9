"""What a run leaves behind: its folder, its log, and the checkpoints from which it goes on."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from jgrpo.checks import unread, without_effect
from jgrpo.config import Config
from jgrpo.errors import InputError, short
from jgrpo.run.checkpoint import Checkpoints
from jgrpo.run.rundir import (
    adapter_folder,
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
from jgrpo.run.screen import Screen
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

    def __init__(
        self, session: Session, member: int, resume: Path | None, stack: ExitStack
    ) -> None:
        self.config, self.session, self.member = session.configs[member], session, member
        self.resumed = resume is not None
        self.run_dir = resume or _new_run_dir(self.config)
        stack.enter_context(claimed(self.run_dir, new=not resume))
        several = len(session.configs) > 1
        self.checkpoints = Checkpoints(
            self.run_dir,
            # of several, each has one that all have, wherever they are stopped
            keep=max(self.config.save_total_limit, 1 + several),
            keep_period=self.config.checkpoint_keep_period,
        )
        stack.callback(self.checkpoints.close)
        self.inputs, self.first = fingerprints(self.config, session.problems), 0

    def saved(self) -> list[int]:
        """The steps that the run can go on after; 0 if it was killed before its first checkpoint,
        and begins anew. InputError if it cannot go on."""
        if not self.resumed:
            return [0]
        check_inputs(self.run_dir, self.inputs)
        steps = self.checkpoints.steps()
        if not steps and sorted((self.run_dir / "adapters").glob("step_*"))[1:]:
            raise InputError(
                f"{self.checkpoints.folder} holds no checkpoint to resume from, though the run "
                "has trained: bring the folder back, or start a new run with --config"
            )
        return steps or [0]

    def restore(self, first: int, state: State) -> State:
        """The state that the run goes on from, that after step `first`, in the structure of a fresh
        one. InputError if it cannot go on."""
        self.first = first
        self.keep(0, state)
        if first not in self.checkpoints.steps():
            return state
        if self.first > self.config.n_grpo_steps:
            raise InputError(
                f"n_grpo_steps={self.config.n_grpo_steps}: the run has done {self.first} steps; "
                "ask for more"
            )
        for step in range(max(0, first - self.config.rollouts_ahead), first):
            if not (folder := adapter_folder(self.run_dir, step)).is_dir():
                raise InputError(
                    f"there is no {folder}, from which rollouts_ahead="
                    f"{self.config.rollouts_ahead} samples: bring it back, or start a new run"
                )
        state = self.checkpoints.restore(self.first, state)
        self.keep(self.first, state)
        return state

    def begin(self, stack: ExitStack, screen: Screen, name: str = "") -> RunLog:
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
                columns=columns_of(*self.session.configs),
                resume_step=resume_step,
                config=c,
                screen=screen,
                name=name,
            )
        )
        if self.resumed:
            add_resume(run_dir, c, self.first, devices)
            remove_later(run_dir, self.first)
            self.checkpoints.tidy(self.first)
        return log

    def tell(self, log: RunLog) -> None:
        """What is about to run."""
        for line in self.session.problems.report if not self.member else ():
            log.screen.info(line)
        log.info(f"{self.session.about(self.member)}; run: {short(self.run_dir)}")
        idle = unread(self.config)  # perhaps set for a variant: said, but no alarm
        for line in without_effect(self.config):
            log.info(line, style="dim" if line in idle else "yellow")

    def keep(self, step: int, state: State) -> None:
        """Remember the state after `step`, which is whole, safe from donation."""
        self.whole = step, jax.device_get(state)

    def save(self) -> None:
        """A checkpoint of the last whole step."""
        self.checkpoints.save(*self.whole)

    def finish(self, log: RunLog) -> None:
        """The learning curve, and where everything is."""
        picture, unfinished = self.run_dir / "curves.png", self.run_dir / ".curves.png.tmp"
        save_curves(self.run_dir, unfinished)
        unfinished.replace(picture)
        last = sorted((self.run_dir / "adapters").iterdir())[-1]
        log.info(f"learning curve: {short(picture)}\nadapter: {short(last)}")


def save_curves(run_dir: Path, file: Path) -> None:
    """Draw a run's learning curves into a PNG."""
    from jgrpo.run.curves import draw  # matplotlib, for which the start of a run need not wait

    draw({run_dir.name: read_metrics(run_dir)}).savefig(file, format="png")


def where_it_went(shares: dict[str, float], config: Config) -> str:
    """The largest phases in a line, and what would help most where one thing would."""
    parts = [f"{share:.0%} {name}" for name, share in shares.items() if share >= 0.01]
    line = "where it went: " + ", ".join(parts)
    waited = shares.get("generation", 0.0) + shares.get("waiting", 0.0)
    if config.rollout != "vllm":
        return line
    if waited > 0.5:
        line += (
            f"; {waited:.0%} of the time the trainer waited for completions: another server would "
            "help most"
        )
    elif waited > 0.2 and not config.rollouts_ahead:
        line += (
            f"; for {waited:.0%} of the time the trainer waited for completions: with "
            "--rollouts_ahead 1 they would be sampled while it trains"
        )
    elif config.rollouts_ahead and shares.get("training", 0.0) > 0.5:
        line += "; the sampler kept up with the trainer: a faster one of those would help most"
    return line


def stop(records: Sequence[Record]) -> str:
    """Save the last whole step of each run, and say from where they can go on."""
    step, problem = records[0].whole[0], ""
    for record in records:
        try:
            record.save()
        except Exception as error:  # whatever it is, it must not hide why the run ends
            last = max(record.checkpoints.steps(), default=0)
            problem = f"{error}\nto go on after step {last}"
    again, how = " ".join(short(record.run_dir) for record in records), problem or "to go on"
    return f"stopped after step {step}; {how}: python -m jgrpo.train --resume {again}"


def common_step(records: Sequence[Record]) -> int:
    """The last step that all runs can go on after. InputError if there is none."""
    saved = {record: record.saved() for record in records}
    if common := set.intersection(*map(set, saved.values())):
        return max(common)
    which = "; ".join(
        f"{short(r.run_dir)} those of {', '.join(map(str, steps))}" for r, steps in saved.items()
    )
    raise InputError(
        f"these runs cannot go on together, they share no step's checkpoint ({which}): resume "
        "those that are as far together, and the others apart"
    )


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
