"""jgrpo.run.collect: dynamic sampling, with a sampler and a grader that are told what to answer."""

from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jgrpo.answers.grader import Grades
from jgrpo.config import Config
from jgrpo.prompts.problems import Problem, step_indices
from jgrpo.rewards import load_functions
from jgrpo.rollout.protocol import Completion, prompt_seeds
from jgrpo.run.collect import Collector, Rollout
from jgrpo.run.scoring import Scorers
from jgrpo.run.session import Problems

P, G = 4, 3


def problem(index: int) -> Problem:
    return Problem((index,), f"prompt {index}", f"problem {index}", f"gold {index}", index)


class World:
    """`n` problems. Of those in `mixed` completion 0 alone is right; of the others all are (even
    index) or none is (odd). Completion g has g + 1 tokens, each the problem's index."""

    def __init__(self, n: int, mixed: set[int]):
        self.mixed, self.asked, self.seeds = mixed, [], []
        tokenizer: Any = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
        self.problems = Problems(tokenizer, (), [problem(i) for i in range(n)], [], [])

    def sample(self, prompts, *, seeds, members, group_size, temperature, progress):
        assert members == [0] * len(prompts)
        assert (group_size, temperature) == (G, 0.7)
        self.asked.append([index for (index,) in prompts])
        self.seeds.append(list(seeds))
        return [
            [
                Completion([index] * (g + 1), [-1.0] * (g + 1), "length" if g == 2 else "stop")
                for g in range(G)
            ]
            for (index,) in prompts
        ]

    def grade(self, texts, golds):
        indices = [int(gold.removeprefix("gold ")) for gold in golds]
        assert [[text.split()[-1:] for text in group] for group in texts] == [
            [[]] + [[str(i)]] * (G - 1)
            for i in indices  # without the end token g = 0 is empty
        ]
        correct = [[g == 0 if i in self.mixed else i % 2 == 0 for g in range(G)] for i in indices]
        boxed = np.array([[g < 2 for g in range(G)] for _ in indices])
        return Grades(np.array(correct, np.float32), boxed, errors=1, timeouts=2)

    def collect(self, step: int = 1, **options) -> Rollout:
        config = Config(n_prompts_per_step=P, group_size=G, temperature=0.7, **options)
        log: Any = SimpleNamespace(phase=lambda *_: nullcontext())
        sampler: Any = self
        scorers = Scorers(None, load_functions(config.reward_function))
        collector = Collector([config], self.problems, sampler, sampler, [scorers])
        return collector.collect(step, log)[0]


def taken(rollout: Rollout) -> list[int]:
    return [group.problem.index for group in rollout.groups]


def test_without_dynamic_sampling_a_step_is_what_its_number_says():
    for step in (1, 5):
        world = World(30, mixed={0, 1})
        rollout = world.collect(step)
        assert world.asked == [taken(rollout)] == [step_indices(30, P, 42, step)]
        assert world.seeds == [prompt_seeds(42, step, P)]


def test_a_rollout_s_arrays_are_groups_by_completions():
    world = World(30, mixed=set(range(30)))
    rollout = world.collect()
    np.testing.assert_array_equal(rollout.correct, [[1, 0, 0]] * P)
    np.testing.assert_array_equal(rollout.n_tokens, [[1, 2, 3]] * P)
    np.testing.assert_array_equal(rollout.truncated, [[False, False, True]] * P)
    for group in rollout.groups:
        i = str(group.problem.index)
        assert group.texts == ["", i, f"{i} {i} {i}"]  # the end token is no part of the text


def test_mixed_groups_alone_need_one_round_with_dynamic_sampling_too():
    world, plain = World(30, mixed=set(range(30))), World(30, mixed=set(range(30)))
    rollout = world.collect(3, use_dynamic_sampling=True)
    assert taken(rollout) == taken(plain.collect(3)) == step_indices(30, P, 42, 3)
    assert world.seeds == plain.seeds
    assert rollout.metrics["train/sampling_rounds"] == 1


def test_groups_with_nothing_to_teach_are_replaced_by_other_problems():
    first = step_indices(30, P, 42, 1)
    world = World(30, mixed=set(range(30)) - {first[0], first[2]})
    rollout = world.collect(use_dynamic_sampling=True)
    assert [len(asked) for asked in world.asked] == [4, 2]  # as many as are missing
    assert not set(world.asked[1]) & set(first)
    assert taken(rollout) == [first[1], first[3], *world.asked[1]]
    assert all(group.mixed for group in rollout.groups)


@pytest.mark.parametrize("parity", [0, 1], ids=["all right", "all wrong"])
def test_all_right_and_all_wrong_are_both_replaced(parity):
    bad = set(range(parity, 30, 2))
    assert bad & set(step_indices(30, P, 42, 1))
    world = World(30, mixed=set(range(30)) - bad)
    rollout = world.collect(use_dynamic_sampling=True, max_sampling_rounds=30)
    assert len(rollout.groups) == P
    assert not set(taken(rollout)) & bad


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_rounds_are_bounded_and_then_it_takes_what_it_has(rounds):
    # Nothing is ever mixed but one of the first four: the rest of the step is filled in the order
    # in which it was sampled.
    first = step_indices(100, P, 42, 1)
    world = World(100, mixed={first[2]})
    rollout = world.collect(use_dynamic_sampling=True, max_sampling_rounds=rounds)
    assert [len(asked) for asked in world.asked] == [4, 3, 3, 3][:rounds]
    assert rollout.metrics["train/sampling_rounds"] == rounds
    assert taken(rollout) == [first[2], first[0], first[1], first[3]]


def test_no_problem_is_sampled_twice_in_a_step_and_every_round_has_its_own_seeds():
    world = World(100, mixed=set())
    world.collect(use_dynamic_sampling=True, max_sampling_rounds=6)
    asked, seeds = ([*chain(*lists)] for lists in (world.asked, world.seeds))
    assert len(asked) == len(set(asked)) == len(seeds) == len(set(seeds)) == 6 * P


def test_the_same_step_is_sampled_alike_and_another_one_otherwise():
    worlds = [World(1000, mixed={7, 20, 33}) for _ in range(4)]
    for world, (step, seed) in zip(worlds, [(2, 42), (2, 42), (3, 42), (2, 43)], strict=True):
        world.collect(step, use_dynamic_sampling=True, seed=seed)
    first, again, *others = ((world.asked, world.seeds) for world in worlds)
    assert first == again
    for asked, seeds in others:  # from the first round to the last
        for ours, theirs in zip(asked + seeds, first[0] + first[1], strict=True):
            assert not set(ours) & set(theirs)


def test_an_exhausted_data_set_ends_the_rounds_early():
    # Six problems: four, then the two that are left, then none.
    world = World(6, mixed={step_indices(6, P, 42, 1)[3]})
    rollout = world.collect(use_dynamic_sampling=True, max_sampling_rounds=10)
    assert [len(asked) for asked in world.asked] == [4, 2]
    assert sorted(chain(*world.asked)) == list(range(6))
    assert len(rollout.groups) == P
    assert rollout.metrics["train/sampling_rounds"] == 2


def test_figures_count_every_sampled_completion_also_those_that_are_not_kept():
    """Two rounds of 4 and 2 groups: four are mixed (1 of 3 right), one all right, one all wrong."""
    first = step_indices(100, P, 42, 1)
    all_right = next(n for n, i in enumerate(first) if i % 2 == 0)
    all_wrong = next(n for n, i in enumerate(first) if i % 2 == 1)
    world = World(100, mixed=set(range(100)) - {first[all_right], first[all_wrong]})
    rollout = world.collect(use_dynamic_sampling=True)
    assert [len(asked) for asked in world.asked] == [4, 2]
    assert rollout.metrics == pytest.approx({
        "train/accuracy": (4 * 1 + 3) / 18,
        "train/boxed_fraction": 2 / 3,
        "train/avg_gen_length": 2,
        "train/truncated_fraction": 1 / 3,
        "tokens/generated": 6 * (1 + 2 + 3),
        "reward/errors": 2,  # one a call of the grader
        "reward/timeouts": 4,
        "train/sampling_rounds": 2,
    })  # fmt: skip
    np.testing.assert_array_equal(rollout.correct.sum(axis=1), [1] * P)  # those of the kept alone


def test_groups_whose_other_rewards_differ_are_kept():
    """All right or all wrong, but completions have 1, 2 and 3 tokens: a length penalty from 0 to 4
    tells them apart, one that starts beyond them does not."""
    first = step_indices(30, P, 42, 1)
    tells = {"use_length_penalty": True, "expected_maximum_length": 4, "overlong_cache": 4}
    rollout = (world := World(30, mixed=set())).collect(use_dynamic_sampling=True, **tells)
    assert world.asked == [first] == [taken(rollout)]
    np.testing.assert_allclose(rollout.rewards.parts["length_penalty"], [[-0.25, -0.5, -0.75]] * P)
    rollout = (world := World(30, mixed=set())).collect(
        use_dynamic_sampling=True, max_sampling_rounds=2, use_length_penalty=True,
        expected_maximum_length=9, overlong_cache=1,
    )  # fmt: skip
    assert len(world.asked) == 2


def test_a_custom_reward_that_is_the_same_for_all_makes_a_mixed_group_alike(tmp_path):
    """The reward is what counts: right and wrong with the same reward have nothing to teach."""
    (tmp_path / "same.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    world = World(30, mixed=set(range(30)))
    world.collect(use_dynamic_sampling=True, max_sampling_rounds=3,
                  reward_function=f"{tmp_path}/same.py:f")  # fmt: skip
    assert [len(asked) for asked in world.asked] == [4, 4, 4]
