"""Is a completion's answer the gold one? The last box, equality by rules and by algebra, and a
grader that asks in processes which can be killed. Knows text alone."""

from jgrpo.answers.equal import is_correct, last_boxed

__all__ = ["is_correct", "last_boxed"]
