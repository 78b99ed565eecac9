"""Where the time of a step goes, and how many tokens it learns from in it."""

import time

import jax

from jgrpo.run.ahead import Ahead
from jgrpo.run.groups import Rollout
from jgrpo.run.screen import Screen


class StepClock:
    """Where the time of a step goes, from when this is made."""

    def __init__(self, ahead: Ahead, screen: Screen) -> None:
        self.ahead, self.screen = ahead, screen
        self.start_s, self.busy_s = time.perf_counter(), ahead.busy_s

    def seconds(self) -> dict[str, float]:
        """So far, by phase; those of sampling are of this step's rollouts, whenever that was."""
        total = dict(self.screen.take_seconds())
        for name, seconds in self.ahead.sampling_s.items():
            total[name] = total.get(name, 0.0) + seconds
        whole_s = time.perf_counter() - self.start_s
        idle_s = max(0.0, whole_s - (self.ahead.busy_s - self.busy_s))
        return total | {
            "time/step": whole_s,
            "time/waiting": self.ahead.waited_s,
            "time/sampler_idle": idle_s,
        }


def rates(rollout: Rollout, seconds: dict[str, float]) -> dict[str, float]:
    """Tokens of the completions that a step learns from, a second of it without compilation, and
    for each device of the trainer."""
    without = seconds["time/step"] - seconds.get("time/compile", 0.0)
    each_s = float(rollout.n_tokens.sum()) / max(without, 1e-9)
    return {
        "time/useful_tokens_per_s": each_s,
        "time/useful_tokens_per_s_a_device": each_s / jax.device_count(),
    }
