"""One of the runs that are trained side by side: what it is, what it says, and how it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jgrpo.advantages import group_advantages, leave_one_out
from jgrpo.config import Config
from jgrpo.errors import interrupts_later
from jgrpo.policy.batch import Rows
from jgrpo.run.alike import Alike
from jgrpo.run.differences import run_names
from jgrpo.run.groups import Rollout
from jgrpo.run.record import Record
from jgrpo.run.runlog import RunLog

MOST_SKIPPED = 3
"""Updates in a row that may be skipped because they are not finite, before the run ends."""


@dataclass
class Member:
    """One of the runs that are trained side by side: what it is, and what it leaves behind."""

    config: Config
    record: Record
    log: RunLog
    ended: str = ""
    """Why it takes part no more; empty while it does."""
    folder: Path = Path()
    """Of its last adapter."""
    state: Any = None
    """That adapter and the optimizer's state, on the host."""

    def __post_init__(self) -> None:
        self.alike = Alike(self.config, str(self.record.run_dir))

    @property
    def of(self) -> str:
        """Which run an error is of, where there are several."""
        return f"{self.log.name.strip()}, " if self.log.name else ""

    def advantages(self, rollout: Rollout) -> np.ndarray:
        """float32 [P, G]"""
        advantages_of = leave_one_out if self.config.use_leave_one_out else group_advantages
        return advantages_of(rollout.rewards.total, self.config.use_std_norm)

    def rows(self, rollout: Rollout, advantages: np.ndarray) -> Rows:
        return rollout.rows(advantages, self.config.mask_truncated_completions)

    def tell(self, step: int, metrics: dict[str, float], lines: list[dict], skipped: int) -> str:
        """Log a step, which is whole now, and warn of updates that were skipped -> why it has to
        end, if so many were `skipped` in a row."""
        with interrupts_later():  # or the step that is logged last is not the one that is saved
            self.log.log(step, metrics, lines)
            self.record.keep(step, self.state)
        if message := self.alike.after(step, metrics):
            self.log.info(message, style="yellow")
        if not metrics["train/skipped_updates"]:
            return ""
        message = (
            f"step {step}: {metrics['train/skipped_updates']:.0f} update(s) skipped, the loss or "
            f"its gradient is not finite: loss {metrics['train/loss']}, gradient norm "
            f"{metrics['train/grad_norm']}. To see it again: python -m jgrpo.replay "
            f"{self.record.run_dir} --step {step}"
        )
        if skipped < MOST_SKIPPED:
            self.log.info(message, style="yellow")
            return ""
        return f"{message}\n{MOST_SKIPPED} in a row: start a run with a lower lr"

    def end(self, problem: str) -> None:
        """It takes part no more, and can be resumed."""
        self.ended = f"{self.of}{problem}"
        self.record.save()
        self.log.info(f"{problem}; the others go on", style="red")


def member_names(folders: Sequence[Path]) -> list[str]:
    """What stands before the lines of each run, all as long; nothing where there is only one."""
    if len(folders) == 1:
        return [""]
    names = run_names(folders)
    return [f"{name:>{max(map(len, names))}}" for name in names]
