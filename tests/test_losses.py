"""The losses: closed forms by hand, finite differences in float64, and what must not leak."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jgrpo.losses import LOSSES, k3

grpo = LOSSES["grpo"]
MASK = jnp.array([[1.0, 1, 1], [0, 1, 0]])
ADVANTAGES = jnp.array([2.0, -3.0])
ZEROS = jnp.zeros((2, 3))
LN2 = math.log(2)


def one_token(log_ratio: float, advantage: float, **options):
    """Loss and its gradient by the logprob, for one completion of one token."""

    def loss(logprob):
        old, a, mask = jnp.zeros((1, 1)), jnp.array([advantage]), jnp.ones((1, 1))
        numerator, denominator, _ = grpo(logprob.reshape(1, 1), old, a, mask, **options)
        return numerator / denominator

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(log_ratio))
    return float(value), float(gradient)


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


def test_on_policy_clip_has_the_gradient_of_no_clip():
    rng = np.random.default_rng(0)
    old = jnp.asarray(rng.normal(-2, 1, (2, 3)), jnp.float32)
    plain, clipped = (
        jax.grad(lambda x, eps=eps: grpo(x, old, ADVANTAGES, MASK, clip_eps=eps)[0])(old)
        for eps in (None, 0.2)
    )
    np.testing.assert_allclose(clipped, plain, rtol=1e-6)


def test_kl_to_the_old_policy_by_hand():
    # beta (ratio - 1 - log ratio) at ratio 2 is beta (1 - ln 2); its gradient is beta (ratio - 1).
    value, gradient = one_token(LN2, 0.0, beta=0.5)
    assert (value, gradient) == pytest.approx((0.5 * (1 - LN2), 0.5), rel=1e-5)
    # On policy it is zero, and so is its gradient: it cannot hold back a first update.
    assert one_token(0.0, 0.0, beta=0.5) == (0.0, 0.0)


def test_k3_is_the_kl_on_average_and_never_negative():
    # Over tokens drawn from q, the mean of k3(log p - log q) is sum q log(q / p), exactly.
    p, q = np.array([0.1, 0.2, 0.7]), np.array([0.5, 0.3, 0.2])
    terms = k3(jnp.asarray(np.log(p / q), jnp.float32))
    assert (terms >= 0).all()
    assert float((q * terms).sum()) == pytest.approx((q * np.log(q / p)).sum(), rel=1e-5)


@pytest.mark.parametrize("token_level", [False, True])
def test_a_completion_without_tokens_adds_nothing(token_level):
    mask = MASK.at[1].set(0)
    numerator, denominator, _ = grpo(ZEROS, ZEROS, ADVANTAGES, mask, token_level=token_level)
    # By completions it still counts in the mean (-2 over 2); by tokens, 3 tokens of -2 over 3.
    assert (numerator, denominator) == ((-6.0, 3.0) if token_level else (-2.0, 2.0))
    gradient = jax.grad(lambda x: grpo(x, ZEROS, ADVANTAGES, mask)[0])(ZEROS)
    assert not gradient[1].any()


@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan, 1e4])
def test_nothing_leaks_from_outside_the_mask(junk):
    rng = np.random.default_rng(0)
    logprobs, old = jnp.asarray(rng.normal(-2, 0.1, (2, 2, 3)), jnp.float32)
    loss = lambda x, y: grpo(x, y, ADVANTAGES, MASK, clip_eps=0.2, beta=0.1)[0]  # noqa: E731
    clean, with_junk = (
        jax.value_and_grad(loss)(jnp.where(MASK > 0, logprobs, j), jnp.where(MASK > 0, old, 0))
        for j in (0.0, junk)
    )
    jax.tree.map(np.testing.assert_array_equal, clean, with_junk)


def test_metrics_are_sums_over_trained_tokens():
    # Ratios 2, 1, 1/2 and (outside of the mask) 9: |ratio - 1| > 0.6 for the first alone.
    logprobs = jnp.log(jnp.array([[2.0, 1.0, 0.5, 9.0]]))
    mask = jnp.array([[1.0, 1, 1, 0]])
    _, _, metrics = grpo(logprobs, jnp.zeros((1, 4)), jnp.ones(1), mask, clip_eps=0.6)
    assert metrics["clip_fraction"] == 1
    assert metrics["approx_kl"] == pytest.approx((1 - LN2) + 0 + (-0.5 + LN2), rel=1e-5)


OPTIONS = [
    {},
    {"clip_eps": 0.2},
    {"beta": 0.3},
    {"token_level": True},
    {"clip_eps": 0.2, "beta": 0.3, "token_level": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_equals_finite_differences(options):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logprobs, old = jnp.asarray(rng.normal(-2, 0.3, (2, 2, 3)))
        assert logprobs.dtype == jnp.float64
        loss = lambda x: grpo(x, old, ADVANTAGES, MASK, **options)[0]  # noqa: E731
        check_grads(loss, (logprobs,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7, eps=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_leading_axis_and_jit_give_the_same(options):
    # jit(vmap(loss)) over two policies equals the loss of each.
    rng = np.random.default_rng(0)
    logprobs = jnp.asarray(rng.normal(-2, 0.3, (2, 2, 3)), jnp.float32)
    loss = partial(grpo, **options)
    both = jax.jit(jax.vmap(loss, (0, None, None, None)))(logprobs, ZEROS - 2, ADVANTAGES, MASK)
    for i in range(2):
        one = loss(logprobs[i], ZEROS - 2, ADVANTAGES, MASK)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=1e-6), both, one)
