"""What a completion is worth: the parts of a reward and how they add up, functions of the user's
own, and the process reward model."""

from jgrpo.rewards.custom import RewardFunction, custom_rewards, load_function, load_functions
from jgrpo.rewards.parts import combine, length_penalty

__all__ = [
    "RewardFunction",
    "combine",
    "custom_rewards",
    "length_penalty",
    "load_function",
    "load_functions",
]
