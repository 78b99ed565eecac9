"""Did the adapter that should have sampled do so, or the one before it?

In 16 bits a sampler's logprobs differ from the trainer's by more than one update moves them, so no
mean of gaps can tell. A slope can: with the trainer's logprobs of the same tokens at the right
adapter, t, and at the one before, u, and the sampler's s, the regression of s - t on u - t through
zero is 0 where the right adapter sampled and 1 where the one before did, whatever the noise that
has nothing to do with the update. Both t and u are computed in float32: noise that they share
with each other would pull both slopes to 1/2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgrpo.config import Config
from jgrpo.policy.batch import MicroBatch, Rows, micro_batches
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.policy.lora import side_by_side, stacked_up
from jgrpo.policy.tracing import traced
from jgrpo.run.session import Policy

KEPT = 0.95
"""Of the sums, at each step: they are of the last twenty steps or so."""
LEAST_COMPLETIONS = 12
"""Before so many have been seen, an error of the slope says little."""
STALE_SHARE, BEYOND_DOUBT = 0.2, 4.0
"""The run ends where the slope is above this share by so many of its errors."""


@dataclass
class Slope:
    """A regression through zero, its tokens added up a step at a time. The error is robust: each
    completion is one draw (the cluster sandwich; Liang & Zeger 1986), since tokens of one share
    their errors, and errors have heavy tails."""

    xx: float = 0.0
    xy: float = 0.0
    uu: float = 0.0
    uv: float = 0.0
    vv: float = 0.0
    n: float = 0.0
    """Sums: over tokens of x x and x y; over completions of u u, u v, v v, where u and v are a
    completion's own sums of x y and x x; and of completions."""

    def add(self, x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> None:
        """A step's tokens: an array a completion."""
        u = np.array([float(np.dot(a, b)) for a, b in zip(x, y, strict=True)])
        v = np.array([float(np.dot(a, a)) for a in x])
        new = v.sum(), u.sum(), (u * u).sum(), (u * v).sum(), (v * v).sum(), len(u)
        names = ("xx", "xy", "uu", "uv", "vv", "n")
        for name, value in zip(names, new, strict=True):
            setattr(self, name, KEPT * getattr(self, name) + float(value))

    @property
    def value(self) -> float:
        """NaN where nothing can be said: the two adapters are one so far."""
        return self.xy / self.xx if self.xx else float("nan")

    @property
    def error(self) -> float:
        """Standard error of `value`; NaN before LEAST_COMPLETIONS."""
        if not self.xx or self.n < LEAST_COMPLETIONS:
            return float("nan")
        b = self.value
        spread = max(0.0, self.uu - 2 * b * self.uv + b * b * self.vv)
        return float(np.sqrt(spread * self.n / (self.n - 1)) / self.xx)

    @property
    def is_stale(self) -> bool:
        """Is a part of the tokens another adapter's, beyond doubt?"""
        return self.value - BEYOND_DOUBT * self.error > STALE_SHARE


def of_group(
    policy: Policy, e: int, right: nnx.State, before: nnx.State, rows: Rows, config: Config
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """x = u - t and y = s - t of these rows' tokens, a completion each: `right` and `before` are
    adapters of member e's rank, A [L, in, R] and B [L, R, out]."""
    index = np.array([i for i, tokens in enumerate(rows.completions) if len(tokens)])
    t, u = (_logprobs(policy, e, adapter, rows, index, config) for adapter in (right, before))
    s = [np.asarray(rows.sampler_logprobs[i]) for i in index]
    x = [b - a for a, b in zip(t, u, strict=True)]
    return x, [b - a for a, b in zip(t, s, strict=True)]


def _logprobs(policy: Policy, e: int, adapter, rows: Rows, index, config) -> list[np.ndarray]:
    (dtype,) = {leaf.dtype for leaf in jax.tree.leaves(policy.base)}
    adapter = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), adapter)
    adapter = side_by_side(stacked_up([adapter]), policy.scales[e : e + 1])
    found: dict[int, np.ndarray] = {}
    for batch in micro_batches(
        rows, index, micro_batch_size=len(index),
        max_prompt_tokens=config.max_prompt_tokens, max_tokens=config.max_tokens,
    ):  # fmt: skip
        values = np.asarray(
            _in_float32(policy.graph, adapter, policy.base, batch, config.temperature), np.float64
        )
        for i, row, mask in zip(batch.completions, values, batch.mask, strict=True):
            if (n := int(mask.sum())) > 0:
                found[int(i)] = row[:n]
    return [found[int(i)] for i in index]


@jax.jit(static_argnums=0)
def _in_float32(graph, adapter, base, batch: MicroBatch, temperature):
    """The policy's logprobs [N, U], its products in float32 from the embedding on, whatever the
    base is in."""
    traced("stale", f"{batch.rows.shape[0]} rows of {batch.rows.shape[1]}")

    def one(path, leaf):
        return leaf.replace(leaf[...].astype(jnp.float32)) if path[-1] == "embedding" else leaf

    base = nnx.from_flat_state((path, one(path, leaf)) for path, leaf in nnx.to_flat_state(base))
    return token_logprobs(nnx.merge(graph, adapter, base), batch, temperature=temperature)[0]
