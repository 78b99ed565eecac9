"""Advantages: the formula by hand, and where rounding would make a signal out of nothing."""

import math

import numpy as np
import pytest

from jgrpo.advantages import group_advantages, leave_one_out


def test_one_right_of_four_by_hand():
    # mean 1/4; squared deviations 9/16 + 3/16 = 3/4, over 4 - 1: variance 1/4, std 1/2.
    # (1 - 1/4) / 0.5001 and (0 - 1/4) / 0.5001. With ddof 0 the std were 0.433: 1.73, not 1.4997.
    advantages = group_advantages(np.array([[1.0, 0, 0, 0]]))
    np.testing.assert_allclose(advantages, [[0.75 / 0.5001] + [-0.25 / 0.5001] * 3], rtol=1e-6)


def test_without_std_the_distance_from_the_mean_remains():
    advantages = group_advantages(np.array([[1.0, 0, 0, 0], [2.0, 4, 6, 8]]), std_norm=False)
    np.testing.assert_array_equal(advantages, [[0.75, -0.25, -0.25, -0.25], [-3, -1, 1, 3]])


def test_the_group_is_a_row():
    # Across columns both groups would have deviations; within rows the second has none.
    advantages = group_advantages(np.array([[0.0, 1], [5.0, 5]]))
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(advantages, [[-half, half], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("std_norm", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, -1 / 3, 1e30])
def test_equal_rewards_give_exact_zeros(reward, std_norm):
    # The mean of 0.1 taken 10 times need not be 0.1; 1e30 would be off by 1e14.
    assert not group_advantages(np.full((3, 10), reward), std_norm).any()


def test_nearly_equal_rewards_are_not_equal():
    assert group_advantages(np.array([[0.0, 1e-9]]), std_norm=False)[0, 1] == np.float32(5e-10)


@pytest.mark.parametrize("std_norm", [True, False])
def test_every_group_sums_to_zero_and_keeps_its_order(std_norm):
    rewards = np.random.default_rng(0).normal(size=(50, 8))
    advantages = group_advantages(rewards, std_norm)
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_array_equal(advantages.argsort(axis=1), rewards.argsort(axis=1))


def test_a_constant_added_to_a_group_changes_nothing():
    rewards = np.random.default_rng(1).normal(size=(20, 8))
    np.testing.assert_allclose(
        group_advantages(rewards + 100), group_advantages(rewards), rtol=1e-5, atol=1e-6
    )


def test_float32_rewards_are_averaged_in_float64():
    # 2**24 + 1 is no float32: a float32 mean of these would lose the 1.
    rewards = np.array([[2.0**24, 2.0**24 + 2]], np.float32)
    advantages = group_advantages(rewards, std_norm=False)
    np.testing.assert_array_equal(advantages, [[-1, 1]])
    assert advantages.dtype == np.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_named(bad):
    rewards = np.zeros((3, 4))
    rewards[2, 1] = bad
    with pytest.raises(ValueError, match=r"rewards\[2, 1\]"):
        group_advantages(rewards)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (2, 2, 2)])
def test_a_shape_without_groups_is_named(shape):
    with pytest.raises(ValueError, match="shape"):
        group_advantages(np.zeros(shape))


def test_the_rewards_are_left_alone():
    rewards = np.array([[1.0, 0.0]])
    group_advantages(rewards)
    np.testing.assert_array_equal(rewards, [[1.0, 0.0]])


# -- leave one out --------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    # The others of [1, 0, 0, 0] have means 0, 1/3, 1/3, 1/3; those of [2, 4, 9]: 6.5, 5.5, 3.
    np.testing.assert_allclose(leave_one_out([[1.0, 0, 0, 0]]), [[1, -1 / 3, -1 / 3, -1 / 3]])
    np.testing.assert_allclose(leave_one_out([[2.0, 4, 9]]), [[-4.5, -1.5, 6]])


@pytest.mark.parametrize("n", [2, 3, 8])
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(n):
    rewards = np.random.default_rng(0).normal(size=(20, n))
    others = [[np.delete(group, g).mean() for g in range(n)] for group in rewards]
    got = leave_one_out(rewards)
    np.testing.assert_allclose(got, rewards - others, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        got, n / (n - 1) * group_advantages(rewards, std_norm=False), rtol=1e-6
    )
    assert got.dtype == np.float32


def test_leave_one_out_with_std_is_divided_as_the_other():
    rewards = np.random.default_rng(1).normal(size=(20, 4))
    std = rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
    expected = leave_one_out(rewards) / std
    np.testing.assert_allclose(leave_one_out(rewards, std_norm=True), expected, rtol=1e-5)


def test_a_constant_added_to_a_group_changes_nothing_of_leave_one_out():
    rewards = np.random.default_rng(2).normal(size=(20, 8))
    shifted = leave_one_out(rewards + np.arange(20)[:, None])
    np.testing.assert_allclose(shifted, leave_one_out(rewards), rtol=1e-5, atol=1e-6)
    assert not leave_one_out(np.full((3, 10), 0.1)).any()  # and equal rewards are exact zeros


@pytest.mark.parametrize("bad", [[[1.0]], [1.0, 2.0], [[0.0, np.nan]]], ids=str)
def test_leave_one_out_refuses_what_has_no_others(bad):
    with pytest.raises(ValueError, match=r"shape|rewards\[0, 1\]"):
        leave_one_out(np.array(bad))
