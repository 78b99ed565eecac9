"""The parts of a reward, and what puts them together."""

import numpy as np
import pytest

from jgrpo.rewards.parts import combine, length_penalty

OUTCOME = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
PROCESS = np.array([[0.8, 0.4], [0.6, 0.2]], np.float32)
PENALTY = np.array([[0.0, -0.5], [-1.0, 0.0]], np.float32)


def test_the_outcome_alone_is_the_reward():
    np.testing.assert_array_equal(combine({"outcome": OUTCOME}, 0.5), OUTCOME)


def test_a_reward_by_hand():
    # 0.75 * 1 + 0.25 * 0.8 + 0 = 0.95; 0.75 * 0 + 0.25 * 0.4 - 0.5 = -0.4; ...
    parts = {"outcome": OUTCOME, "process": PROCESS, "length_penalty": PENALTY}
    reward = combine(parts, 0.25)
    np.testing.assert_allclose(reward, [[0.95, -0.4], [-0.85, 0.8]], rtol=1e-6)
    assert reward.dtype == np.float32


def test_a_custom_reward_takes_the_outcome_s_place():
    custom = np.array([[3.0, -3.0], [0.5, 0.0]], np.float32)
    parts = {"outcome": OUTCOME, "custom": custom}
    np.testing.assert_array_equal(combine(parts, 0.5), custom)
    mixed = combine(parts | {"process": PROCESS}, 0.5)
    np.testing.assert_allclose(mixed, (custom + PROCESS) / 2, rtol=1e-6)


def test_length_penalty_by_hand():
    # L_max 1024, L_cache 512: free to 512, half-way down at 768, -1 from 1024 on.
    lengths = np.array([[0, 512, 640], [768, 1024, 5000]])
    penalty = length_penalty(lengths, 1024, 512)
    np.testing.assert_allclose(penalty, [[0, 0, -0.25], [-0.5, -1, -1]])
    assert penalty.dtype == np.float32


def test_length_penalty_without_a_cache_is_a_step():
    np.testing.assert_array_equal(length_penalty(np.array([9, 10, 11]), 10, 0), [0, 0, -1])


def test_length_penalty_with_an_impossible_cache_is_refused():
    with pytest.raises(ValueError, match="cache_tokens=11"):
        length_penalty(np.array([1]), 10, 11)
