"""The policy losses: pure functions of arrays, composed of a ratio, a surrogate and an average.

A loss takes logprobs, old_logprobs [N, T], advantages [N] and mask [N, T] (1 on the tokens that
are trained), and returns (numerator, denominator, metrics). Numerators of micro-batches add up;
the update divides once by the denominator of the whole rollout, so the split changes nothing.
Metrics are sums over tokens, to be divided by mask.sum(); `clip_fraction` counts every token whose
ratio is outside the range, also where the clip does not bind because of the advantage's sign.

Every loss takes the options of `with_extras` too (KL, importance weights, entropy): they combine
freely. What a loss cannot have (CISPO a clip, RLOO a token mean) is not an option of it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Terms = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


# -- ratios: how much likelier the policy makes what the old one sampled -----------------------


def log_ratios(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """logprobs - old_logprobs [N, T], exactly 0 (value and gradient) where mask is 0."""
    return jnp.where(mask > 0, logprobs - old_logprobs, 0.0)


def mean_log_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """A completion's mean over its tokens, on each of them [N, T] (GSPO: Zheng et al. 2025, eq. 7:
    the geometric mean of the token ratios)."""
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return sum_log_ratio(log_ratio, mask) / lengths


def sum_log_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """A completion's sum over its tokens, on each of them [N, T]: the log ratio of the whole
    completion, as one action."""
    return jnp.broadcast_to((log_ratio * mask).sum(axis=1, keepdims=True), log_ratio.shape)


# -- surrogate: what is minimised per token ----------------------------------------------------


def bounded_exp(log_ratio: jax.Array, highest: jax.Array) -> jax.Array:
    """exp(log_ratio), but e times `highest` where it is more than that: still beyond the bound, and
    finite. 0 (of what a bound leaves out) times infinity would be a gradient of NaN."""
    most = jnp.log(highest) + 1
    return jnp.exp(jnp.where(log_ratio > most, most, log_ratio))


def surrogate(
    log_ratio: jax.Array,
    advantages: jax.Array,
    clip_eps: float | None = None,
    clip_eps_high: float | None = None,
    clip_delta: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-ratio A [N, T], or PPO's pessimistic clip of it (Schulman et al. 2017, eq. 7):
    -min(ratio A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) A); and where the ratio is outside.

    Two widths are DAPO's clip-higher (Yu et al. 2025, eq. 10); None for the upper is the lower,
    None for the lower is no clip. `clip_delta`, above 1 + clip_eps_high, bounds the ratio where
    A < 0 too, which that minimum does not (dual clip: Ye et al. 2020, eq. 5; two-sided GRPO:
    INTELLECT-2, Prime Intellect 2025).
    """
    a, lower, upper, delta = advantages[:, None], -math.inf, math.inf, clip_delta or math.inf
    if clip_eps is not None:
        lower, upper = 1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    highest = jnp.where(a < 0, delta, upper)
    ratio = bounded_exp(log_ratio, jnp.where((a == 0) & (highest == math.inf), 1.0, highest))
    # By jnp.where: jnp.minimum and clip halve a gradient where both sides are equal.
    bounded = jnp.where(ratio > highest, highest, ratio)
    bounded = jnp.where((a < 0) & (ratio < lower), lower, bounded)
    return -bounded * a, (ratio < lower) | (ratio > upper)


# -- KL estimators (Schulman 2020, "Approximating KL divergence") --------------------------------
# Of samples x from q, with d = log p(x) - log q(x), each estimates KL(q || p). As a value k1 and k3
# are unbiased, k3 with less variance; k2 is biased unless p is near q. As a loss, what counts is
# the gradient (tests/test_losses.py has these as exact sums):
#   p trained, q old (kl_to=old):  k1 and k3 have the gradient of KL(old || new) in expectation; k2
#                                  that of E_old[d^2] / 2.
#   q trained, p fixed (kl_to=base, start): k2 has the gradient of KL(new || p) in expectation; k1
#                                  has expectation zero; k3 has the gradient of KL(p || new). This
#                                  holds on policy: later updates of a rollout have samples of the
#                                  old policy.
#   the same, times the ratio:     k1 and k3 have value and gradient of KL(new || p), also
#                                  off policy (DeepSeek-V3.2, 2025, eq. 7).
# All of it is of one token's distribution given its prefix, not of whole completions.


def k1(d: jax.Array) -> jax.Array:
    return -d


def k2(d: jax.Array) -> jax.Array:
    return d**2 / 2


def k3(d: jax.Array) -> jax.Array:
    """exp(d) - d - 1: never negative."""
    return jnp.expm1(d) - d


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


# -- averages: values, mask [N, T] -> numerator, denominator (which depends on the mask alone) -----


def per_completion(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean over completions of their token means; one without tokens counts as 0."""
    lengths = jnp.maximum(mask.sum(axis=1), 1)
    return ((values * mask).sum(axis=1) / lengths).sum(), jnp.asarray(float(len(mask)))


def per_token(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean over all tokens (DAPO, Yu et al. 2025, eq. 8): long completions weigh more."""
    return (values * mask).sum(), jnp.maximum(mask.sum(), 1)


def per_budget(
    values: jax.Array, mask: jax.Array, *, max_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Sum over all tokens / (completions x max_tokens): Dr. GRPO's constant."""
    return (values * mask).sum(), jnp.asarray(float(len(mask) * max_tokens))


# -- what every loss may have besides ------------------------------------------------------------


def importance_weights(
    log_weight: jax.Array, mask: jax.Array, cap: float, mode: str
) -> tuple[jax.Array, jax.Array]:
    """exp(log_weight) and what is taken of it, [N, T] each: of a token or of its sequence (exp of
    the sum), above the cap truncated to it (Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy training") or masked, 0 (Liu, Li et al. 2025, "When speed kills
    stability"). `mode` is token_ or sequence_, truncate or mask."""
    level, beyond = mode.split("_")
    weight = jnp.exp(sum_log_ratio(log_weight, mask) if level == "sequence" else log_weight)
    return weight, jnp.where(weight > cap, cap if beyond == "truncate" else 0.0, weight)


def with_extras(
    policy: jax.Array,
    clipped: jax.Array,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    mask: jax.Array,
    *,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_weighted: bool = False,
    ref_logprobs: jax.Array | None = None,
    importance_cap: float | None = None,
    importance_mode: str = "token_truncate",
    sampler_logprobs: jax.Array | None = None,
    entropy_coef: float = 0.0,
    entropies: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The policy term [N, T] with the options that every loss takes -> values [N, T], metrics.

    `beta` weighs a KL per token: to `ref_logprobs` if given (the base model's, d = ref - logprobs;
    `kl_weighted`: times the ratio), else to the old policy (d = log ratio; the study's).
    `importance_cap` weighs the policy term by `importance_weights` of old - sampler, constants.
    `entropy_coef` weighs a bonus for entropy (nats). Arrays are [N, T].
    """
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    metrics = {"approx_kl": k3(log_ratio), "clip_fraction": clipped}
    values = policy
    if importance_cap is not None:
        assert sampler_logprobs is not None, "importance_cap needs sampler_logprobs"
        log_weight = log_ratios(jax.lax.stop_gradient(old_logprobs), sampler_logprobs, mask)
        weight, taken = importance_weights(log_weight, mask, importance_cap, importance_mode)
        values = taken * values
        metrics |= {"importance_weight": weight, "importance_capped": weight > importance_cap}
    if beta:
        d = log_ratio if ref_logprobs is None else log_ratios(ref_logprobs, logprobs, mask)
        metrics["kl"] = ESTIMATORS[kl_estimator](d) * (jnp.exp(log_ratio) if kl_weighted else 1)
        values = values + beta * metrics["kl"]
    if entropy_coef:
        assert entropies is not None, "entropy_coef needs entropies"
        values = values - entropy_coef * jnp.where(mask > 0, entropies, 0.0)
    sums = {name: (x * mask).sum() for name, x in metrics.items()}
    return values, jax.lax.stop_gradient(sums)


# -- the losses ----------------------------------------------------------------------------------


def grpo(
    logprobs, old_logprobs, advantages, mask, *,
    clip_eps=None, clip_eps_high=None, clip_delta=None, token_level=False, **extras,
) -> Terms:  # fmt: skip
    """GRPO (Shao et al. 2024, DeepSeekMath, eq. 3; one outcome reward a completion): a ratio a
    token; the mean over completions of their token means, or with `token_level` over all tokens.
    """
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    policy, clipped = surrogate(log_ratio, advantages, clip_eps, clip_eps_high, clip_delta)
    values, metrics = with_extras(policy, clipped, logprobs, old_logprobs, mask, **extras)
    average = per_token if token_level else per_completion
    return *average(values, mask), metrics


def dr_grpo(
    logprobs, old_logprobs, advantages, mask, *,
    max_tokens, clip_eps=None, clip_eps_high=None, clip_delta=None, **extras,
) -> Terms:  # fmt: skip
    """Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training"): as GRPO, but the sum over
    all tokens / (completions x max_tokens), so that no completion's length weighs. The paper takes
    advantages without std (`group_advantages(rewards, std_norm=False)`)."""
    log_ratio = log_ratios(logprobs, old_logprobs, mask)
    policy, clipped = surrogate(log_ratio, advantages, clip_eps, clip_eps_high, clip_delta)
    values, metrics = with_extras(policy, clipped, logprobs, old_logprobs, mask, **extras)
    return *per_budget(values, mask, max_tokens=max_tokens), metrics


def gspo(
    logprobs, old_logprobs, advantages, mask, *,
    clip_eps=None, clip_eps_high=None, clip_delta=None, token_level=False, **extras,
) -> Terms:  # fmt: skip
    """GSPO (Zheng et al. 2025, eq. 5): one ratio a completion, exp(mean log ratio), then as GRPO.

    The mean moves far less than a token's ratio: the paper's widths are 3e-4 and 4e-4.
    """
    log_ratio = mean_log_ratio(log_ratios(logprobs, old_logprobs, mask), mask)
    policy, clipped = surrogate(log_ratio, advantages, clip_eps, clip_eps_high, clip_delta)
    values, metrics = with_extras(policy, clipped, logprobs, old_logprobs, mask, **extras)
    average = per_token if token_level else per_completion
    return *average(values, mask), metrics


def rloo(
    logprobs, old_logprobs, advantages, mask, *,
    clip_eps=None, clip_eps_high=None, clip_delta=None, **extras,
) -> Terms:  # fmt: skip
    """REINFORCE with a completion as one action, as RLOO takes it (Ahmadian et al. 2024, "Back to
    Basics"): one ratio a completion, exp(sum log ratio); mean over completions. At ratio 1 the
    gradient is -A sum_t grad logprob: nothing divides by the length. The leave-one-out baseline is
    in the advantages (`leave_one_out`)."""
    log_ratio = sum_log_ratio(log_ratios(logprobs, old_logprobs, mask), mask)
    policy, clipped = surrogate(log_ratio, advantages, clip_eps, clip_eps_high, clip_delta)
    values, metrics = with_extras(policy, clipped, logprobs, old_logprobs, mask, **extras)
    return *per_completion(values, mask), metrics


def cispo(logprobs, old_logprobs, advantages, mask, *, max_ratio=5.0, **extras) -> Terms:
    """CISPO (MiniMax-M1, 2025): -stop_gradient(min(ratio, max_ratio)) A logprob, mean over all
    tokens. The ratio is a weight: a token beyond the cap keeps its gradient, capped. Only the
    gradient means something, not the value."""
    ratio = jnp.exp(log_ratios(logprobs, old_logprobs, mask))
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, max_ratio))
    policy = -weight * advantages[:, None] * jnp.where(mask > 0, logprobs, 0.0)
    values, metrics = with_extras(policy, ratio > max_ratio, logprobs, old_logprobs, mask, **extras)
    return *per_token(values, mask), metrics


def sapo(
    logprobs, old_logprobs, advantages, mask, *,
    tau_positive=1.0, tau_negative=1.05, token_level=False, **extras,
) -> Terms:  # fmt: skip
    """SAPO (Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv:2511.20347): in place of a
    clip a soft gate, -(4 / tau) sigmoid(tau (ratio - 1)) A, tau by the advantage's sign; its
    gradient fades as the ratio leaves 1, where it is GRPO's. Averages as GRPO."""
    a = advantages[:, None]
    tau = jnp.where(a > 0, tau_positive, tau_negative)
    ratio = bounded_exp(log_ratios(logprobs, old_logprobs, mask), 1 + 100 / tau)  # the gate is shut
    policy = -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * a
    nothing = jnp.zeros_like(ratio, bool)
    values, metrics = with_extras(policy, nothing, logprobs, old_logprobs, mask, **extras)
    average = per_token if token_level else per_completion
    return *average(values, mask), metrics


def dppo(
    logprobs, old_logprobs, advantages, mask, *, max_difference=0.15, token_level=False, **extras
) -> Terms:
    """DPPO, its binary total variation (Qi et al. 2026, "Rethinking the Trust Region in LLM
    Reinforcement Learning", arXiv:2602.04879, eq. 11 to 13; TV of 0.15): -ratio A, but no gradient
    for a token whose probability has moved by more than `max_difference` the way that A pushes it.
    The paper measures from the sampler's probability, here it is the old policy's (their gap is for
    importance weights). Averages as GRPO."""
    a, log_ratio = advantages[:, None], log_ratios(logprobs, old_logprobs, mask)
    p, p_old = (jnp.exp(jnp.where(mask > 0, x, 0.0)) for x in (logprobs, old_logprobs))
    far = jnp.abs(p - p_old) > max_difference
    left_out = (far & (a * log_ratio > 0)) | (a == 0)
    policy = jnp.where(left_out, 0.0, -jnp.exp(jnp.where(left_out, 0.0, log_ratio)) * a)
    values, metrics = with_extras(policy, far, logprobs, old_logprobs, mask, **extras)
    average = per_token if token_level else per_completion
    return *average(values, mask), metrics


LOSSES: dict[str, Callable[..., Terms]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "sapo": sapo,
    "dppo": dppo,
}
