"""The losses: closed forms by hand; and the KL estimators' gradients, as exact sums.

What every loss must satisfy with every option is in test_loss_variants.py.
"""

import math
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.losses import ESTIMATORS, LOSSES, k1, k3

grpo, dr_grpo, gspo, rloo, cispo, sapo, dppo = (
    LOSSES[name] for name in ("grpo", "dr_grpo", "gspo", "rloo", "cispo", "sapo", "dppo")
)
MASK = jnp.array([[1.0, 1, 1], [0, 1, 0]])
ADVANTAGES = jnp.array([2.0, -3.0])
ZEROS = jnp.zeros((2, 3))
LN2 = math.log(2)


def one_completion(loss, log_ratios, advantage: float, **options):
    """Loss and its gradient by the logprobs, for one completion; the old logprobs are 0."""

    def value(logprobs):
        old, a = jnp.zeros_like(logprobs), jnp.array([advantage])
        numerator, denominator, _ = loss(logprobs, old, a, jnp.ones_like(old), **options)
        return numerator / denominator

    value, gradient = jax.value_and_grad(value)(jnp.array([log_ratios]))
    return float(value), *gradient[0].tolist()


def one_token(log_ratio: float, advantage: float, **options):
    """GRPO's loss and its gradient by the logprob, for one completion of one token."""
    return one_completion(grpo, [log_ratio], advantage, **options)


# -- by hand: GRPO --------------------------------------------------------------------------------


def test_on_policy_loss_is_minus_the_mean_advantage_and_weighs_completions_alike():
    # ratio 1: the completion's mean is -A whatever its length; mean(-2, 3) = 0.5.
    numerator, denominator, _ = grpo(ZEROS, ZEROS, ADVANTAGES, MASK)
    assert (numerator, denominator) == (1.0, 2.0)


def test_on_policy_gradient_is_minus_a_over_length():
    # d/dlogprob of -ratio A / len is -A / len: -2/3 on each of three tokens, 3 on the only one.
    gradient = jax.grad(lambda x: grpo(x, ZEROS, ADVANTAGES, MASK)[0])(ZEROS)
    np.testing.assert_allclose(gradient, [[-2 / 3] * 3, [0, 3, 0]], rtol=1e-6)


def test_token_level_weighs_tokens_alike():
    # Three tokens of -2 and one of 3, over 4 tokens; by completions it were (-2 + 3) / 2.
    numerator, denominator, _ = grpo(ZEROS, ZEROS, ADVANTAGES, MASK, token_level=True)
    assert (numerator, denominator) == (-3.0, 4.0)
    loss = partial(grpo, token_level=True)
    gradient = jax.grad(lambda x: loss(x, ZEROS, ADVANTAGES, MASK)[0])(ZEROS)
    np.testing.assert_allclose(gradient, [[-2] * 3, [0, 3, 0]], rtol=1e-6)


def test_off_policy_loss_is_minus_ratio_times_advantage():
    assert one_token(LN2, 3.0) == pytest.approx((-6.0, -6.0))
    assert one_token(-LN2, -4.0) == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # better, and far enough already: bounded, no gradient
        (0.5, 1.0, -0.5, -0.5),  # better, but has become rarer: the gradient pulls it back
        (1.5, -1.0, 1.5, 1.5),  # worse, but has become likelier: pulled back
        (0.5, -1.0, 0.8, 0.0),  # worse, and rare enough already
        (1.1, 1.0, -1.1, -1.1),  # inside of 1 +- 0.2 nothing is clipped
        (0.9, 1.0, -0.9, -0.9),
        (1.1, -1.0, 1.1, 1.1),
        (0.9, -1.0, 0.9, 0.9),
    ],
)
def test_clip_binds_on_the_pessimistic_side_alone(ratio, advantage, loss, gradient):
    expected = pytest.approx((loss, gradient), abs=1e-6)
    assert one_token(math.log(ratio), advantage, clip_eps=0.2) == expected


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.4, 1.0, -1.4, -1.4),  # beyond 1 + clip_eps, but the upper bound is its own
        (1.6, 1.0, -1.5, 0.0),
        (0.7, -1.0, 0.8, 0.0),  # the lower bound is still clip_eps
        (0.9, -1.0, 0.9, 0.9),
        (1.6, -1.0, 1.6, 1.6),  # and it binds on the pessimistic side alone
        (0.4, 1.0, -0.4, -0.4),
    ],
)
def test_clip_higher_has_two_bounds(ratio, advantage, loss, gradient):
    got = one_token(math.log(ratio), advantage, clip_eps=0.2, clip_eps_high=0.5)
    assert got == pytest.approx((loss, gradient), abs=1e-6)


@pytest.mark.parametrize("token_level", [False, True])
def test_a_completion_without_tokens_adds_nothing(token_level):
    mask = MASK.at[1].set(0)
    numerator, denominator, _ = grpo(ZEROS, ZEROS, ADVANTAGES, mask, token_level=token_level)
    # By completions it still counts in the mean (-2 over 2); by tokens, 3 tokens of -2 over 3.
    assert (numerator, denominator) == ((-6.0, 3.0) if token_level else (-2.0, 2.0))
    gradient = jax.grad(lambda x: grpo(x, ZEROS, ADVANTAGES, mask)[0])(ZEROS)
    assert not gradient[1].any()


@pytest.mark.parametrize("log_ratio", [20.0, 89.0, 400.0, 1e30, math.inf])
def test_a_ratio_that_overflows_is_clipped_like_any_other(log_ratio):
    for loss in (grpo, gspo, rloo):
        got = one_completion(loss, [log_ratio], 2.0, clip_eps=0.2, clip_eps_high=0.5)
        assert got == pytest.approx((-3.0, 0.0))  # -(1 + 0.5) x 2
        assert one_completion(loss, [log_ratio], 0.0, clip_eps=0.2) == (0.0, 0.0)
        assert one_completion(loss, [log_ratio], 0.0) == (0.0, 0.0)
        got = one_completion(loss, [log_ratio], -2.0, clip_eps=0.2, clip_delta=3.0)
        assert got == pytest.approx((6.0, 0.0))
    sums = one_completion(rloo, [50.0, 45.0], 2.0, clip_eps=0.2)
    assert sums == pytest.approx((-2.4, 0.0, 0.0))
    assert one_completion(sapo, [log_ratio], 2.0) == pytest.approx((-8.0, 0.0))  # the gate: 4 / tau
    assert one_completion(dppo, [log_ratio], 2.0)[1] == 0.0 or log_ratio == 20.0


@pytest.mark.parametrize("width", [1e-12, 1e-9, 1e-8, 6e-8])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_clip_narrower_than_float32_keeps_the_gradient_on_policy(width, advantage):
    assert one_token(0.0, advantage, clip_eps=width) == (-advantage, -advantage)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (2.9, -1.0, 2.9, 2.9),  # below delta it is pulled back as before
        (3.1, -1.0, 3.0, 0.0),
        (0.5, -1.0, 0.8, 0.0),  # the lower bound stays
        (3.1, 1.0, -1.2, 0.0),  # and the upper one where A > 0
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_the_second_clip_bounds_what_is_worse_and_has_become_likelier(
    ratio, advantage, loss, gradient
):
    got = one_token(math.log(ratio), advantage, clip_eps=0.2, clip_delta=3.0)
    assert got == pytest.approx((loss, gradient), rel=1e-5, abs=1e-6)


def test_a_token_level_loss_of_no_tokens_is_zero():
    numerator, denominator, _ = grpo(ZEROS, ZEROS, ADVANTAGES, 0 * MASK, token_level=True)
    assert (numerator, denominator) == (0.0, 1.0)


# -- by hand: the other losses --------------------------------------------------------------------


def test_dr_grpo_divides_by_a_constant():
    # Three tokens of -2 and one of 3, over 2 completions of at most 5 tokens.
    loss = partial(dr_grpo, max_tokens=5)
    numerator, denominator, _ = loss(ZEROS, ZEROS, ADVANTAGES, MASK)
    assert (numerator, denominator) == (-3.0, 10.0)
    gradient = jax.grad(lambda x: loss(x, ZEROS, ADVANTAGES, MASK)[0])(ZEROS)
    np.testing.assert_allclose(gradient, [[-2] * 3, [0, 3, 0]], rtol=1e-6)


def test_gspo_has_one_ratio_a_completion_the_geometric_mean():
    # Ratios 4 and 1: sqrt(4 x 1) = 2. Each logprob moves it by 2 / len: -2 x 3 / 2 on both.
    got = one_completion(gspo, [2 * LN2, 0.0], 3.0)
    assert got == pytest.approx((-6.0, -3.0, -3.0))


def test_gspo_clips_the_completion_or_none_of_it():
    # Beyond 1.2 no token has a gradient, also not the one whose own ratio is 1.
    clipped = one_completion(gspo, [2 * LN2, 0.0], 3.0, clip_eps=0.2)
    assert clipped == pytest.approx((-3.6, 0.0, 0.0))
    # Ratios 4 and 1/4 cancel: by tokens both were outside, the completion's ratio is 1.
    kept = one_completion(gspo, [2 * LN2, -2 * LN2], 3.0, clip_eps=0.2)
    assert kept == pytest.approx((-3.0, -1.5, -1.5), rel=1e-5)


def test_rloo_takes_a_completion_as_one_action():
    # Ratios 2 and 3: the completion is 6 times likelier, and each logprob moves that by 6.
    log_ratios = [LN2, math.log(3)]
    assert one_completion(rloo, log_ratios, 0.5) == pytest.approx((-3.0, -3.0, -3.0))
    clipped = one_completion(rloo, log_ratios, 0.5, clip_eps=0.2)
    assert clipped == pytest.approx((-0.6, 0.0, 0.0))


def test_rloo_on_policy_is_reinforce():
    # -A sum_t grad logprob, mean over completions: no length anywhere.
    gradient = jax.grad(lambda x: rloo(x, ZEROS, ADVANTAGES, MASK)[0])(ZEROS)
    np.testing.assert_allclose(gradient, [[-2] * 3, [0, 3, 0]], rtol=1e-6)
    assert rloo(ZEROS, ZEROS, ADVANTAGES, MASK)[1] == 2


def test_cispo_caps_the_weight_of_a_token_but_keeps_its_gradient():
    # -min(ratio, 5) A / tokens, with ratios 2 and 8, A = 3 and 2 tokens; a clip would give 0.
    _, *gradient = one_completion(cispo, [LN2, 3 * LN2], 3.0, max_ratio=5.0)
    assert gradient == pytest.approx([-2 * 3 / 2, -5 * 3 / 2])
    _, *gradient = one_completion(cispo, [LN2, 3 * LN2], -3.0, max_ratio=5.0)
    assert gradient == pytest.approx([3.0, 7.5])  # whatever the advantage's sign


def test_sapo_on_policy_is_grpo_and_its_gate_fades():
    # -(4 / tau) sigmoid(tau (r - 1)) A; its gradient by the logprob is -4 s (1 - s) r A.
    assert one_completion(sapo, [0.0], 3.0) == pytest.approx((-6.0, -3.0))
    s = 1 / (1 + math.exp(-1.05))  # at ratio 2, tau 1.05 where A < 0
    got = one_completion(sapo, [LN2], -3.0)
    assert got == pytest.approx((12 / 1.05 * s, 24 * s * (1 - s)), rel=1e-5)


@pytest.mark.parametrize(
    ("p", "p_old", "advantage", "kept"),
    [
        (0.9, 0.6, 1.0, False),  # has moved by 0.3 the way that A pushes
        (0.9, 0.6, -1.0, True),  # and is pulled back
        (0.3, 0.6, -1.0, False),
        (0.3, 0.6, 1.0, True),
        (0.01, 0.0001, 1.0, True),  # 100 times likelier, but next to nothing has moved
        (0.7, 0.6, 1.0, True),
    ],
)
def test_dppo_leaves_out_what_has_moved_too_far_in_probability(p, p_old, advantage, kept):
    def loss(x):
        old = jnp.log(jnp.array([[p_old]]))
        return dppo(x, old, jnp.array([advantage]), jnp.ones((1, 1)), max_difference=0.2)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.log(jnp.array([[p]])))
    expected = -advantage * p / p_old if kept else 0.0
    assert (float(value), float(gradient[0, 0])) == pytest.approx((expected, expected), rel=1e-5)


# -- by hand: what every loss may have besides ----------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [("k1", -LN2, -1.0), ("k2", LN2**2 / 2, LN2), ("k3", 1 - LN2, 1.0)],
)
def test_kl_at_twice_the_odds_by_hand(estimator, value, gradient):
    # k of d = ln 2: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1; k' = -1, d, e^d - 1.
    options = {"beta": 0.5, "kl_estimator": estimator}
    to_old = one_token(LN2, 0.0, **options)  # d = logprob - old: the gradient is k'
    assert to_old == pytest.approx((0.5 * value, 0.5 * gradient), rel=1e-5)
    ref = {"ref_logprobs": jnp.array([[LN2]])}
    to_base = one_token(0.0, 0.0, **options, **ref)  # d = ref - logprob: it is -k'
    assert to_base == pytest.approx((0.5 * value, -0.5 * gradient), rel=1e-5)


def test_on_policy_the_kl_to_the_old_policy_cannot_hold_back_an_update():
    assert one_token(0.0, 0.0, beta=0.5, kl_estimator="k2") == (0.0, 0.0)
    assert one_token(0.0, 0.0, beta=0.5, kl_estimator="k3") == (0.0, 0.0)
    assert one_token(0.0, 0.0, beta=0.5, kl_estimator="k1") == (0.0, -0.5)  # zero on average only


def test_importance_weights_by_hand():
    # Weights 1.5 and 3, capped at 2, on -A = -3; the KL (k3 at d = ln 2, gradient -1) has none.
    sampler, ref = -jnp.log(jnp.array([[1.5, 3.0]])), jnp.full((1, 2), LN2)
    options = {"importance_cap": 2.0, "sampler_logprobs": sampler, "token_level": True}
    got = one_completion(grpo, [0.0, 0.0], 3.0, **options)
    assert got == pytest.approx((-(1.5 + 2) * 3 / 2, -1.5 * 3 / 2, -2 * 3 / 2), rel=1e-5)
    options |= {"beta": 0.5, "ref_logprobs": ref}
    with_kl = one_completion(grpo, [0.0, 0.0], 3.0, **options)
    expected = (-5.25 + 0.5 * (1 - LN2), -2.25 - 0.5 / 2, -3.0 - 0.5 / 2)
    assert with_kl == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("token_truncate", (0.5, 2.0)),  # of 0.5 and 3
        ("token_mask", (0.5, 0.0)),
        ("sequence_truncate", (1.5, 1.5)),  # 0.5 x 3
        ("sequence_mask", (1.5, 1.5)),
    ],
)
def test_importance_weights_a_token_or_a_sequence_truncated_or_masked(mode, weights):
    sampler = -jnp.log(jnp.array([[0.5, 3.0]]))
    options = {"importance_mode": mode, "sampler_logprobs": sampler}
    _, *gradient = one_completion(grpo, [0.0, 0.0], 2.0, importance_cap=2.0, **options)
    assert gradient == pytest.approx([-w for w in weights], rel=1e-5)
    beyond = {"sequence_truncate": 1.2, "sequence_mask": 0.0}
    if mode in beyond:
        _, *gradient = one_completion(grpo, [0.0, 0.0], 2.0, importance_cap=1.2, **options)
        assert gradient == pytest.approx([-beyond[mode]] * 2, rel=1e-5)


def test_an_importance_weight_is_a_constant():
    # By old_logprobs there is the ratio's gradient, +w ratio A = 1.5 x 3; through the weight too
    # it were w ratio A - w ratio A = 0.
    def loss(old):
        sampler = {"importance_cap": 2.0, "sampler_logprobs": -jnp.log(jnp.full((1, 1), 1.5))}
        return grpo(jnp.zeros((1, 1)), old, jnp.array([3.0]), jnp.ones((1, 1)), **sampler)[0]

    assert float(jax.grad(loss)(jnp.zeros((1, 1)))[0, 0]) == pytest.approx(4.5)


def test_the_entropy_bonus_lowers_the_loss():
    # On policy the loss is 0.5 (above). Mean over completions of mean entropies: (2 + 5) / 2.
    entropies = jnp.array([[1.0, 2.0, 3.0], [9.0, 5.0, 9.0]])

    def loss(entropies):
        options = {"entropy_coef": 0.1, "entropies": entropies}
        numerator, denominator, _ = grpo(ZEROS, ZEROS, ADVANTAGES, MASK, **options)
        return numerator / denominator

    value, gradient = jax.value_and_grad(loss)(entropies)
    assert float(value) == pytest.approx(0.5 - 0.1 * 3.5)
    np.testing.assert_allclose(gradient, [[-0.1 / 6] * 3, [0, -0.1 / 2, 0]], rtol=1e-6)


def test_metrics_are_sums_over_trained_tokens():
    # Ratios 2, 1, 1/2 and (outside of the mask) 9: |ratio - 1| > 0.6 for the first alone.
    logprobs = jnp.log(jnp.array([[2.0, 1.0, 0.5, 9.0]]))
    mask, zeros = jnp.array([[1.0, 1, 1, 0]]), jnp.zeros((1, 4))
    _, _, metrics = grpo(logprobs, zeros, jnp.ones(1), mask, clip_eps=0.6)
    approx_kl = (1 - LN2) + 0 + (-0.5 + LN2)
    assert metrics == pytest.approx({"clip_fraction": 1, "approx_kl": approx_kl}, rel=1e-5)
    # d = ref - logprob is 0, ln 2, ln 4; weights are 1/4, 1, 3.
    _, _, metrics = cispo(
        logprobs, zeros, jnp.ones(1), mask, max_ratio=0.9,
        beta=0.1, kl_estimator="k1", ref_logprobs=jnp.full((1, 4), LN2),
        importance_cap=0.5, sampler_logprobs=-jnp.log(jnp.array([[0.25, 1, 3, 7]])),
    )  # fmt: skip
    expected = {
        "clip_fraction": 2, "approx_kl": approx_kl, "kl": -3 * LN2,
        "importance_weight": 4.25, "importance_capped": 2,
    }  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_a_completion_outside_the_range_is_counted_with_all_its_tokens():
    # Mean log ratios ln 2 (three tokens) and 0; sums 3 ln 2 and 0. The advantage's sign is none
    # of it: at A = -3 nothing would be clipped.
    logprobs = jnp.array([[3 * LN2, 0, 0], [0, 0, 0]])
    for loss in (gspo, rloo):
        for advantages in (ADVANTAGES, -ADVANTAGES):
            _, _, metrics = loss(logprobs, ZEROS, advantages, MASK, clip_eps=0.2)
            assert metrics["clip_fraction"] == 3
            assert metrics["approx_kl"] == pytest.approx(8 - 1 - 3 * LN2, rel=1e-5)  # by tokens


# -- the KL estimators, as exact sums over a distribution -----------------------------------------

THETA = np.array([0.3, -1.0, 0.8, 0.1, -0.4])  # of the policy
OTHER = np.array([-0.5, 0.2, 0.4, -1.2, 0.6])  # of the old policy, or of the base


def kl(p, q):
    """KL(p || q) of logprobs."""
    return (jnp.exp(p) * (p - q)).sum()


def half_squares(p, q):
    """E_p[(log q - log p)^2] / 2"""
    return (jnp.exp(p) * (q - p) ** 2).sum() / 2


@partial(jax.jit, static_argnums=(1, 2))
def expected_kl_term(theta, estimator: str, to: str):
    """E of the loss's KL term over samples, and of its gradient by theta. Each outcome is a
    completion of one token, and counts by its probability, held fixed, under who samples: the old
    policy where the KL is to it, the policy itself where the KL is to the base."""

    def term(new, other):
        old, ref = (other, {}) if to == "old" else (new, {"ref_logprobs": other})
        old = jax.lax.stop_gradient(old)
        return grpo(
            new, old, jnp.zeros(1), jnp.ones((1, 1)), beta=1.0, kl_estimator=estimator, **ref
        )[0]

    def mean(theta):
        new, other = jax.nn.log_softmax(theta), jax.nn.log_softmax(OTHER)
        samples = jax.lax.stop_gradient(jnp.exp(other if to == "old" else new))
        return (samples * jax.vmap(term)(new[:, None, None], other[:, None, None])).sum()

    return jax.value_and_grad(mean)(theta)


# What losses.py says of each: the function of (policy, other) whose gradient it has on average.
SAID = {
    ("k1", "old"): lambda new, old: kl(old, new),
    ("k2", "old"): lambda new, old: half_squares(old, new),
    ("k3", "old"): lambda new, old: kl(old, new),
    ("k1", "base"): lambda new, base: 0.0 * new.sum(),
    ("k2", "base"): lambda new, base: kl(new, base),
    ("k3", "base"): lambda new, base: kl(base, new),
}


def test_the_gradient_of_each_kl_estimator_is_what_it_is_said_to_be():
    with jax.enable_x64(True):

        def gradient(f):
            logprobs = jax.nn.log_softmax(OTHER)
            return jax.grad(lambda theta: f(jax.nn.log_softmax(theta), logprobs))(THETA)

        for (estimator, to), said in SAID.items():
            _, got = expected_kl_term(THETA, estimator, to)
            np.testing.assert_allclose(got, gradient(said), rtol=1e-10, atol=1e-14)
        # The candidates differ, so that none of these holds by accident.
        differ = [gradient(SAID[key]) for key in SAID if key not in (("k3", "old"), ("k3", "base"))]
        gaps = [np.abs(a - b).max() for a, b in combinations(differ, 2)]
        assert min(gaps) > 0.01


@pytest.mark.parametrize("to", ["old", "base"])
def test_as_values_k1_and_k3_are_unbiased_and_k2_only_near_by(to):
    """Of samples from q, the mean of k(log p - log q) is KL(q || p)."""
    with jax.enable_x64(True):
        for distance, k2_is_near in ((1.0, False), (1e-3, True)):
            theta = OTHER + distance * (THETA - OTHER)
            new, other = jax.nn.log_softmax(theta), jax.nn.log_softmax(OTHER)
            exact = kl(other, new) if to == "old" else kl(new, other)
            off = {e: abs(expected_kl_term(theta, e, to)[0] / exact - 1) for e in ESTIMATORS}
            assert max(off["k1"], off["k3"]) < 1e-8
            assert (off["k2"] < 1e-3) == k2_is_near


def test_k3_is_never_negative_and_varies_less_than_k1():
    p, q = np.array([0.1, 0.2, 0.7]), np.array([0.5, 0.3, 0.2])
    assert (k3(jnp.log(p / q)) >= 0).all()
    d = jnp.log((0.9 * q + 0.1 * p) / q)
    variance = [float((q * k(d) ** 2).sum() - (q * k(d)).sum() ** 2) for k in (k1, k3)]
    assert variance[1] < variance[0] / 10


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_weighed_by_the_ratio_the_kl_to_the_base_is_exact_off_policy(estimator):
    """Samples of a third policy: value and gradient are those of KL(new || base)."""
    with jax.enable_x64(True):
        sampled, base = jax.nn.log_softmax(np.array([1.0, 0.1, -0.7, 0.4, 0.2])), OTHER

        def term(new, old, ref):
            options = {"beta": 1.0, "kl_estimator": estimator, "kl_weighted": True}
            one = jnp.ones((1, 1))
            return grpo(new * one, old * one, jnp.zeros(1), one, ref_logprobs=ref * one, **options)[
                0
            ]

        def mean(theta):
            new, ref = jax.nn.log_softmax(theta), jax.nn.log_softmax(base)
            return (jnp.exp(sampled) * jax.vmap(term)(new, sampled, ref)).sum()

        def exact(theta):
            return kl(jax.nn.log_softmax(theta), jax.nn.log_softmax(base))

        (value, gradient), (said, pull) = (jax.value_and_grad(f)(THETA) for f in (mean, exact))
        assert float(value) == pytest.approx(float(said), rel=1e-12)
        np.testing.assert_allclose(gradient, pull, rtol=1e-10)
