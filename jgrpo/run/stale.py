"""Did the adapter that should have sampled do so, or the one before it?

In 16 bits a sampler's logprobs differ from the trainer's by more than one update moves them, so no
mean of gaps can tell. A slope can: with the trainer's logprobs of the same tokens at the right
adapter, t, and at the one before, u, and the sampler's s, the regression of s - t on u - t through
zero is 0 where the right adapter sampled and 1 where the one before did, whatever the noise that
has nothing to do with the update. Both t and u are computed in float32: noise of their own would
pull both slopes to 1/2. The adapters are rounded first as the sampler rounds them: of a small
update that may leave another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from scipy import special

from jgrpo.config import Config
from jgrpo.policy import adapter as adapters
from jgrpo.policy.batch import Rows
from jgrpo.policy.lora import nth, with_rank
from jgrpo.run.policy import Policy
from jgrpo.update.learner import Logprobs, batches_of

KEPT = 0.95
"""Of the sums, at each step: they are of the last twenty steps or so."""
LEAST_STEPS = 5.0
"""Before so many steps have been seen (that moved the policy as far), an error of the slope says
little."""
STALE_SHARE, BEYOND_DOUBT = 0.2, 1e-6
"""The run ends where a slope of this share would be seen as large as it is so seldom (Student's t;
a step is a degree of freedom)."""


@dataclass
class Draws:
    """What is one draw of the noise, a completion or a step, by its sums u of x y and v of x x."""

    uu: float = 0.0
    uv: float = 0.0
    vv: float = 0.0
    n: float = 0.0

    def add(self, u: np.ndarray, v: np.ndarray) -> None:
        new = (u * u).sum(), (u * v).sum(), (v * v).sum(), len(u)
        old = self.uu, self.uv, self.vv, self.n
        self.uu, self.uv, self.vv, self.n = (  # KEPT is a weight of u and v
            KEPT**2 * a + float(b) for a, b in zip(old, new, strict=True)
        )

    def spread(self, slope: float) -> float:
        """The sum of the squared residuals u - slope v, as if of as many draws fewer one."""
        squares = max(0.0, self.uu - 2 * slope * self.uv + slope**2 * self.vv)
        return squares * self.n / (self.n - 1) if self.n > 1 else float("inf")


class Slope:
    """A regression through zero, its tokens added up a step at a time. The error is the larger of
    two robust ones (the cluster sandwich; Liang & Zeger 1986): a completion is one draw, since its
    tokens share their errors; and so is a step, since all its tokens share one update and one
    rounding of the weights, which by chance may lie along it."""

    def __init__(self) -> None:
        self.xx = self.xy = 0.0
        self.completions, self.steps = Draws(), Draws()

    def add(self, x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> None:
        """A step's tokens: an array a completion."""
        u = np.array([float(np.dot(a, b)) for a, b in zip(x, y, strict=True)])
        v = np.array([float(np.dot(a, a)) for a in x])
        self.xx, self.xy = KEPT * self.xx + float(v.sum()), KEPT * self.xy + float(u.sum())
        self.completions.add(u, v)
        self.steps.add(u.sum(keepdims=True), v.sum(keepdims=True))

    @property
    def value(self) -> float:
        """NaN where nothing can be said: the two adapters are one so far."""
        return self.xy / self.xx if self.xx else float("nan")

    @property
    def n_steps(self) -> float:
        """Steps as far as they count: one that moved the policy little says little (Kish 1965)."""
        return self.xx**2 / self.steps.vv if self.steps.vv else 0.0

    @property
    def error(self) -> float:
        """Standard error of `value`; NaN before LEAST_STEPS."""
        if self.n_steps < LEAST_STEPS:
            return float("nan")
        spreads = (draws.spread(self.value) for draws in (self.completions, self.steps))
        return float(np.sqrt(max(spreads)) / self.xx)

    @property
    def is_stale(self) -> bool:
        """Is a part of the tokens another adapter's, beyond doubt?"""
        errors_away = -special.stdtrit(max(1.0, self.n_steps - 1), BEYOND_DOUBT)
        return bool(self.value - errors_away * self.error > STALE_SHARE)


class Watch:
    """The slopes of a run's members, one group of each step at a time: 3 % of the tokens of a step
    of 32 groups, without a backward pass."""

    def __init__(self, configs: Sequence[Config], policy: Policy) -> None:
        self.configs, self.policy = configs, policy
        self.slopes = [Slope() for _ in configs]

    def look(self, e: int, step: int, rows: Rows, right: Path, before: Path) -> dict[str, float]:
        """Add a group of a member's step -> its metrics. `right` and `before` are the folders of
        the adapter that should have sampled, and of the one before it."""
        config, slope = self.configs[e], self.slopes[e]
        g = config.group_size
        start = step * g % len(rows.completions)
        chosen = slice(start, start + g)
        group = Rows(
            rows.prompts[chosen], rows.completions[chosen], rows.sampler_logprobs[chosen],
            rows.advantages[chosen],
        )  # fmt: skip
        like = jax.eval_shape(lambda a: with_rank(nth(a, e), config.lora_r), self.policy.adapter)
        at_right, at_before = (adapters.load(folder, like) for folder in (right, before))
        slope.add(*of_group(self.policy, e, at_right, at_before, group, config))
        found = {"slope": slope.value, "slope_error": slope.error}
        return {f"sampler/stale_{name}": x for name, x in found.items() if np.isfinite(x)}

    def problem(self, e: int) -> str | None:
        """What is wrong with the adapters that sample; None if nothing shows."""
        slope = self.slopes[e]
        if not slope.is_stale:
            return None
        return (
            f"the completions of the last steps are not those of their adapter: the sampler's "
            f"logprobs are {slope.value:.2f} +- {slope.error:.2f} of the way from the adapter that "
            "should have sampled (0) to the one before it (1). Does a server serve an older "
            "adapter, or cache under its name? If this is a false alarm: --no_check_stale"
        )


def of_group(
    policy: Policy, e: int, right: nnx.State, before: nnx.State, rows: Rows, config: Config
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """x = u - t and y = s - t of these rows' tokens, a completion each: `right` and `before` are
    adapters of member e's rank, A [L, in, R] and B [L, R, out]."""
    index = np.array([i for i, tokens in enumerate(rows.completions) if len(tokens)])
    if not len(index):
        return [], []
    t, u = (_logprobs(policy, e, adapter, rows, index, config) for adapter in (right, before))
    s = [np.asarray(rows.sampler_logprobs[i]) for i in index]
    x = [b - a for a, b in zip(t, u, strict=True)]
    return x, [b - a for a, b in zip(t, s, strict=True)]


def _logprobs(
    policy: Policy, e: int, adapter: nnx.State, rows: Rows, index, config
) -> list[np.ndarray]:
    (dtype,) = {leaf.dtype for leaf in jax.tree.leaves(policy.base)}
    adapter = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), adapter)
    batches, known = batches_of(config, rows, index), Logprobs(rows)
    known.add(batches, [
        policy.logprobs(e, adapter, batch, config.temperature, True) for batch in batches
    ])  # fmt: skip
    return [known.values[i, : len(rows.completions[i])].astype(np.float64) for i in index]
