"""The parts of a reward, and what puts them together."""

import numpy as np
import pytest

from jgrpo.errors import InputError, RunError
from jgrpo.rewards.parts import combine, custom_rewards, length_penalty, load_function

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


# -- a function of the user's -----------------------------------------------------------------


def write(tmp_path, body: str) -> str:
    (tmp_path / "mine.py").write_text(body)
    return f"{tmp_path}/mine.py:reward"


def call(function, correct=OUTCOME):
    return custom_rewards(
        function,
        ["p0", "p1"],
        [["a", "bb"], ["ccc", ""]],
        [[[1], [1, 2]], [[1, 2, 3], []]],
        ["g0", "g1"],
        correct,
    )


def test_a_function_in_a_file_sees_flat_lists_and_its_values_come_back_in_place(tmp_path):
    spec = write(
        tmp_path,
        "def reward(prompts, completions, completion_ids, gold, correct):\n"
        "    assert prompts == ['p0', 'p0', 'p1', 'p1'] and gold == ['g0', 'g0', 'g1', 'g1']\n"
        "    assert [len(i) for i in completion_ids] == [len(c) for c in completions]\n"
        "    return [10 * c + len(t) for c, t in zip(correct, completions)]\n",
    )
    np.testing.assert_array_equal(call(load_function(spec)), [[11, 2], [3, 10]])


def test_a_function_of_a_module_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("def reward(correct, **_):\n    return correct\n")
    monkeypatch.syspath_prepend(tmp_path)
    np.testing.assert_array_equal(call(load_function("my_module:reward")), OUTCOME)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(): pass", "defines no reward"),
        ("def reward(texts): pass", "takes the keywords prompts, completions"),
        ("import no_such_module", "No module named"),
        ("def reward(:", "SyntaxError"),
        ("reward = 3", "takes the keywords"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        load_function(write(tmp_path, body))


def test_missing_files_and_modules_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_function(f"{tmp_path}/none.py:reward")
    with pytest.raises(InputError, match="No module named 'nowhere'"):
        load_function("nowhere:reward")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: [1.0] * 3, "one finite number for each of the 4"),
        (lambda **_: [1.0, float("nan"), 0, 0], "1 of them NaN"),
        (lambda **_: 1.0, "TypeError"),
        (lambda **_: {}["missing"], "KeyError"),
        (lambda **_: ["good"] * 4, "ValueError"),
    ],
)
def test_what_a_function_returns_is_checked(function, message):
    with pytest.raises(RunError, match=message):
        call(function)
