"""jgrpo.run.alike: a run that learns nothing says so, once and then rarely, and what to look at."""

import pytest

from jgrpo.config import Config
from jgrpo.run.alike import Alike

FLAT = {
    "train/zero_advantage_fraction": 1.0, "train/reward_mean": 0.0, "train/accuracy": 0.0,
    "train/boxed_fraction": 0.5, "train/truncated_fraction": 0.1,
}  # fmt: skip


def told(steps, config=None) -> list[int]:
    alike = Alike(config or Config(), "runs/1")
    return [step for step, metrics in enumerate(steps, 1) if alike.after(step, metrics)]


def test_it_is_told_after_three_steps_then_after_thirty_and_three_hundred():
    assert told([FLAT] * 1000) == [3, 30, 300]


def test_one_group_that_differs_starts_the_count_again():
    mixed = FLAT | {"train/zero_advantage_fraction": 0.97}
    assert told([FLAT, FLAT, mixed] * 20) == []
    assert told([*[FLAT] * 3, mixed, *[FLAT] * 3]) == [3, 7]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "no answer is right: look at the gold answers"),
        ({"train/boxed_fraction": 0.0}, "no completion has a \\boxed{}: look at prompt_template"),
        ({"train/truncated_fraction": 1.0}, "max_tokens cuts off every completion"),
        ({"train/accuracy": 1.0, "train/reward_mean": 1.0}, "all are right"),
        ({"train/accuracy": 0.5}, "whole groups are right or wrong"),
    ],
)
def test_it_says_what_to_look_at(changes, words):
    alike = Alike(Config(), "runs/1")
    message = [alike.after(step, FLAT | changes) for step in (1, 2, 3)][-1]
    assert message.startswith("step 3: in the last 3 steps all completions of a problem got the")
    assert words in message
    assert "jgrpo.show runs/1" in message


def test_a_reward_of_the_user_s_is_named_before_all_else():
    alike = Alike(Config(reward_function=("mine.py:score",)), "runs/1")
    message = [alike.after(step, FLAT) for step in (1, 2, 3)][-1]
    assert "look at what mine.py:score returns" in message
