"""From a graded rollout to the next adapter: the jitted step, and the learner that takes a
rollout's updates with it."""

from jgrpo.update.learner import Learner
from jgrpo.update.step import Update

__all__ = ["Learner", "Update"]
