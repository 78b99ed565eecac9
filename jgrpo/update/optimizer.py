"""The optimizer, Adam with the gradient's norm clipped at 1, and its learning rate."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any
Schedule = Callable[[int], float]


def learning_rate(kind: str, lr: float, n_updates: int, warmup_steps: int = 0) -> Schedule | float:
    """The learning rate by the count of updates made: a linear rise over `warmup_steps`, then
    `kind`: constant, or linear or cosine down to 0 at n_updates."""
    if kind == "constant" and not warmup_steps:
        return lr
    left = n_updates - warmup_steps
    after: dict[str, Schedule] = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, left),
        "cosine": optax.cosine_decay_schedule(lr, left),
    }
    rise = optax.linear_schedule(0.0, lr, warmup_steps)
    return optax.join_schedules([rise, after[kind]], [warmup_steps])


@cache
def adam(lr: Schedule | float | None = None) -> optax.GradientTransformationExtraArgs:
    """Adam without weight decay, the global gradient norm clipped at 1 (the study's optimizer).
    Without `lr`, update(..., lr=) gives it each time. The same object for
    the same `lr` (`programs.shared`)."""
    clip = optax.clip_by_global_norm(1.0)
    shrunk = lambda g: jax.tree.map(lambda x: x * shrinking(g), g)  # noqa: E731
    small_enough = optax.stateless(lambda g, _: clip.update(shrunk(g), optax.EmptyState())[0])
    down = optax.scale_by_learning_rate(lr) if lr is not None else _given_rate()
    moments = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    return optax.chain(small_enough, optax.chain(moments, down))


def _given_rate() -> optax.GradientTransformationExtraArgs:
    def down(updates, state, params=None, *, lr, **_):
        return jax.tree.map(lambda u: -lr * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), down)


def shrinking(gradient: Tree) -> jax.Array:
    """A power of two, so that it changes no bit else: what `gradient` times it may be squared and
    summed, which overflows above 1.8e19. 1 below 2^30, and the norm stays above 1 beyond."""
    largest = jnp.max(jnp.array([jnp.abs(g).max() for g in jax.tree.leaves(gradient)]))
    return jnp.where(largest > 2.0**79, 2.0**-78, jnp.where(largest > 2.0**30, 2.0**-29, 1.0))


def global_norm(gradient: Tree) -> jax.Array:
    scale = shrinking(gradient)
    return optax.tree.norm(jax.tree.map(lambda g: g * scale, gradient)) / scale
