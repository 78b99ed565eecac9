"""The policy losses: pure functions of arrays, one screen each.

A loss takes logprobs, old_logprobs [N, T], advantages [N] and mask [N, T] (1 on the tokens that
are trained), and returns (numerator, denominator, metrics). Numerators of micro-batches add up;
the update divides once by the denominator of the whole rollout, so the split changes nothing.
Metrics are sums over tokens, to be divided by mask.sum(); `clip_fraction` counts every token whose
ratio is outside the range, also where the clip does not bind because of the advantage's sign.
"""

import jax
import jax.numpy as jnp

Terms = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


def surrogate(ratio: jax.Array, advantages: jax.Array, clip_eps: float | None) -> jax.Array:
    """Per-token policy objective to minimise [N, T]: -ratio A, or PPO's pessimistic clip of it
    (Schulman et al. 2017, eq. 7): -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)."""
    a = advantages[:, None]
    if clip_eps is None:
        return -ratio * a
    return -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * a)


def k3(log_ratio: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = log_ratio (Schulman 2020, "Approximating KL divergence"): never
    negative; its mean over samples from q is KL(q || p) where d = log p - log q."""
    return jnp.expm1(log_ratio) - log_ratio


def grpo(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_eps: float | None = None,
    beta: float = 0.0,
    token_level: bool = False,
) -> Terms:
    """GRPO (Shao et al. 2024, DeepSeekMath, eq. 3; one outcome reward a completion).

    The mean over completions of each one's mean token loss; `token_level` averages over all tokens
    instead (DAPO, Yu et al. 2025, eq. 8). `beta` weighs k3 between policy and old policy, the
    study's KL, not DeepSeekMath's KL to the base. A completion without tokens counts as 0.
    """
    log_ratio = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    token_loss = (surrogate(ratio, advantages, clip_eps) + beta * k3(log_ratio)) * mask
    lengths = mask.sum(axis=1)
    if token_level:
        numerator, denominator = token_loss.sum(), lengths.sum()
    else:
        numerator = (token_loss.sum(axis=1) / jnp.maximum(lengths, 1)).sum()
        denominator = jnp.asarray(float(len(mask)))
    width = jnp.inf if clip_eps is None else clip_eps
    metrics = {
        "approx_kl": (k3(log_ratio) * mask).sum(),
        "clip_fraction": ((jnp.abs(ratio - 1) > width) * mask).sum(),
    }
    return numerator, denominator, jax.lax.stop_gradient(metrics)


LOSSES = {"grpo": grpo}
