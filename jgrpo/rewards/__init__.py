"""What a completion is worth: the parts of a reward and how they add up, a function of the user's
own, and the process reward model."""

from jgrpo.rewards.parts import RewardFunction, combine, custom_rewards, length_penalty

__all__ = ["RewardFunction", "combine", "custom_rewards", "length_penalty"]
