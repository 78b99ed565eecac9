"""Steps in which no group's rewards differ: nothing is learned, and what to look at."""

from collections.abc import Mapping

from jgrpo.config import Config
from jgrpo.errors import short

FIRST, RARER = 3, 10
"""Told after so many steps in a row without a signal, then after RARER times as many, and so on."""


class Alike:
    """Counts the steps in a row whose rewards are alike in every group."""

    def __init__(self, config: Config, run_dir: str):
        self.config, self.run_dir = config, run_dir
        self.n_steps, self.next_told = 0, FIRST

    def after(self, step: int, metrics: Mapping[str, float]) -> str:
        """What to tell after a step; mostly nothing. Of the tags of a step's metrics."""
        if metrics["train/zero_advantage_fraction"] < 1:
            self.n_steps, self.next_told = 0, FIRST
            return ""
        self.n_steps += 1
        if self.n_steps < self.next_told:
            return ""
        self.next_told *= RARER
        return (
            f"step {step}: in the last {self.n_steps} steps all completions of a problem got the "
            f"same reward (mean {metrics['train/reward_mean']:.3g}), so that nothing was learned: "
            f"{self._look_at(metrics)}. To see completions beside their gold answers: "
            f"python -m jgrpo.show {short(self.run_dir)}"
        )

    def _look_at(self, metrics: Mapping[str, float]) -> str:
        right, boxed = metrics["train/accuracy"], metrics["train/boxed_fraction"]
        if self.config.reward_function:
            files = ", ".join(self.config.reward_function)
            return f"look at what {files} returns, and at the completions that it is given"
        if right == 1:
            return "all are right, the problems are too easy: take harder ones"
        if metrics["train/truncated_fraction"] == 1:
            return "max_tokens cuts off every completion: raise it, or ask for less in the prompt"
        if boxed == 0:
            return (
                "no completion has a \\boxed{}: look at prompt_template, and whether the model "
                "follows it"
            )
        if right == 0:
            return (
                "no answer is right: look at the gold answers (answer_column), at the grader's "
                "verdicts, and whether the problems are too hard for the model"
            )
        return "whole groups are right or wrong: raise group_size or temperature"
