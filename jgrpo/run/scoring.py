"""What a step's completions are worth: the parts of the reward that a config asks for."""

from dataclasses import dataclass

from jgrpo.config import Config
from jgrpo.policy.weights import model_folder
from jgrpo.rewards.parts import (
    RewardFunction,
    combine,
    custom_rewards,
    length_penalty,
    load_function,
)
from jgrpo.rewards.prm import ProcessRewards
from jgrpo.run.groups import Rewards, Rollout


@dataclass(frozen=True)
class Scorers:
    """What scores completions beside the grader, where the config asks for it."""

    process: ProcessRewards | None
    custom: RewardFunction | None

    def rewards(self, config: Config, rollout: Rollout) -> Rewards:
        """Each part that the config asks for, and their sum."""
        groups = rollout.groups
        texts = [g.texts for g in groups]
        parts = {"outcome": rollout.correct}
        if self.custom is not None:
            ids = [[completion.token_ids for completion in g.completions] for g in groups]
            prompts, golds = [g.problem.prompt for g in groups], [g.problem.gold for g in groups]
            parts["custom"] = custom_rewards(
                self.custom, prompts, texts, ids, golds, rollout.correct
            )
        if self.process is not None:
            parts["process"] = self.process([g.problem.problem for g in groups], texts)
        if config.use_length_penalty:
            limits = config.expected_maximum_length, config.overlong_cache
            parts["length_penalty"] = length_penalty(rollout.n_tokens, *limits)
        return Rewards(parts, combine(parts, config.process_reward_weight))


def open_scorers(config: Config) -> Scorers:
    """The process reward model and the user's reward function. InputError if one cannot be used."""
    custom = load_function(config.reward_function) if config.reward_function else None
    process = None
    if config.use_prm:
        folder = model_folder(config.prm_model_id, "prm_model_id")
        process = ProcessRewards(folder, dtype=config.dtype, batch_size=config.prm_batch_size)
    return Scorers(process, custom)
