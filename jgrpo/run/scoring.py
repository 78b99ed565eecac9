"""What a step's completions are worth: the parts of the reward that a config asks for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jgrpo.config import Config
from jgrpo.policy.weights import model_folder
from jgrpo.prompts.problems import Problem
from jgrpo.rewards import RewardFunction, combine, custom_rewards, length_penalty, load_functions
from jgrpo.rewards.custom import arguments
from jgrpo.rewards.prm import ProcessRewards
from jgrpo.rollout.protocol import Completion
from jgrpo.run.groups import Rewards


@dataclass(frozen=True)
class Scorers:
    """What scores completions beside the grader, where the config asks for it."""

    process: ProcessRewards | None = None
    custom: tuple[RewardFunction, ...] = ()

    def rewards(
        self,
        config: Config,
        problems: Sequence[Problem],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        correct: np.ndarray,
    ) -> Rewards:
        """Each part that the config asks for of completions [P][G], and their sum."""
        parts = {"outcome": correct}
        if self.custom:
            size = correct.shape[1]
            ours: dict[str, list[Any]] = {
                "prompts": [p.prompt for p in problems for _ in range(size)],
                "completions": [text for group in texts for text in group],
                "completion_ids": [list(c.token_ids) for group in completions for c in group],
                "gold": [p.gold for p in problems for _ in range(size)],
                "correct": correct.reshape(-1).tolist(),
            }
            given = arguments([p.columns for p in problems], size, ours)
            custom = custom_rewards(self.custom, config.weights_of_rewards, given)
            parts |= {name: part.reshape(correct.shape) for name, part in custom.items()}
        if self.process is not None:
            parts["process"] = self.process([p.problem for p in problems], texts)
        if config.use_length_penalty:
            n_tokens = np.array([[len(c.token_ids) for c in group] for group in completions])
            limits = config.expected_maximum_length, config.overlong_cache
            parts["length_penalty"] = length_penalty(n_tokens, *limits)
        return Rewards(parts, combine(parts, config.process_reward_weight))


def open_scorers(config: Config, columns: Iterable[str] | None = None) -> Scorers:
    """The process reward model and the user's reward functions, which may ask for the `columns` of
    the rows where those are known. InputError if one cannot be used."""
    custom = load_functions(config.reward_function, columns)
    process = None
    if config.use_prm:
        folder = model_folder(config.prm_model_id, "prm_model_id")
        process = ProcessRewards(folder, dtype=config.dtype, batch_size=config.prm_batch_size)
    return Scorers(process, custom)
