"""Members side by side: in company each has the gradient, the updates and the figures that it has
alone, whatever the others are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OneLearner, with_random_b
from test_learner import ADVANTAGES, ROWS, tiny_config

from jgrpo.policy.adapter import adapter_arrays
from jgrpo.policy.lora import (
    fresh_adapter,
    nth,
    own_columns,
    side_by_side,
    split,
    stacked_up,
    with_rank,
)
from jgrpo.policy.weights import load_model
from jgrpo.update.learner import Learner, Logprobs, batches_of
from jgrpo.update.learner import together as in_company

BASE = {"use_kl_penalty": True, "kl_to": "base"}
MEMBERS = (
    {},
    {"lora_r": 4, "lora_alpha": 8, "use_clip": True, "use_token_level_loss": True},
    {"lora_r": 16, "loss_type": "dr_grpo", "use_std_norm": False, "lr": 0.003},
    {"loss_type": "gspo", "epochs_per_step": 2, "updates_per_epoch": 2, "use_clip": True},
    {"loss_type": "cispo", "lr_scheduler_type": "linear", "use_importance_weights": True},
    {"loss_type": "rloo", "epochs_per_step": 3},
    BASE | {"beta": 0.1, "kl_estimator": "k2", "entropy_coef": 0.1},
    {"loss_type": "sapo", "lora_r": 4},
    {"loss_type": "dppo", "mask_truncated_completions": True},
)
"""Every loss, and the options that make passes of their own."""
TARGETS = ("q_proj", "down_proj")


def config_of(e: int, **changes):
    return dataclasses.replace(tiny_config(), **{**MEMBERS[e], **changes})


def rows_of(e: int):
    """Other advantages for each, and for every other member other completions."""
    cut = [c if e % 2 else [*c[::-1]][:-1] + [66] for c in ROWS.completions]
    blank = [[-1.0 - e] * len(c) for c in cut]
    return dataclasses.replace(
        ROWS, completions=cut, sampler_logprobs=blank, advantages=np.roll(ADVANTAGES, e)
    )


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint("qwen3-tied", num_hidden_layers=1)


def adapter_of(folder, e: int, **changes):
    """A member's adapter, with B far from zero; and the model around it, whose scale is its own."""
    c = config_of(e, **changes)
    model = load_model(folder, rank=c.lora_r, alpha=c.lora_alpha, target_modules=TARGETS)
    graph, adapter, base = split(model)
    return graph, with_random_b(fresh_adapter(adapter, e), seed=e), base


def alone(folder, e: int, **changes) -> OneLearner:
    return OneLearner(config_of(e, **changes), *adapter_of(folder, e, **changes))


def together(folder, members, changes=()) -> Learner:
    """These members over one base, in a graph whose scale is 1."""
    changes = changes or [{}] * len(members)
    configs = [config_of(e, **own) for e, own in zip(members, changes, strict=True)]
    rank = max(c.lora_r for c in configs)
    graph, _, base = split(load_model(folder, rank=rank, alpha=rank, target_modules=TARGETS))
    each = [adapter_of(folder, e, **own)[1] for e, own in zip(members, changes, strict=True)]
    adapters = [with_rank(adapter, rank) for adapter in each]
    scales = [c.lora_alpha / c.lora_r for c in configs]
    return Learner(configs, graph, stacked_up(adapters), base, scales=scales)


def relative_error(got, expected) -> float:
    norm = np.linalg.norm
    return max(norm(got[k] - expected[k]) / max(norm(expected[k]), 1e-12) for k in expected)


@pytest.mark.slow
def test_in_company_each_member_learns_what_it_learns_alone(folder):
    """Nine losses, ranks 1, 4 and 16, one to four updates, micro-batches of all of them: figures of
    the first rollout, and the adapter after two."""
    members = range(len(MEMBERS))
    company = together(folder, members)
    found = [company.learn({e: rows_of(e) for e in members}) for _ in range(2)]
    for e in members:
        lone = alone(folder, e)
        before = adapter_arrays(lone.state(0)[0])
        expected = [lone.learn(rows_of(e)) for _ in range(2)]
        for tag in expected[0].keys() - {"train/compilations"}:
            assert found[0][e][tag] == pytest.approx(expected[0][tag], rel=2e-4, abs=1e-6), (e, tag)
        assert found[0][e].keys() == expected[0].keys()
        moved, wanted = (
            {k: v - before[k] for k, v in adapter_arrays(learner.state(i)[0]).items()}
            for learner, i in ((company, e), (lone, 0))
        )
        assert relative_error(moved, wanted) < 2e-3, e  # Adam's first steps are signs
        np.testing.assert_allclose(company.logprobs[e], lone.logprobs[0], atol=2e-5)


@pytest.mark.slow
def test_gradients_in_company_are_those_alone(folder):
    """To 1e-5, for three losses of ranks 1, 4 and 16, in the same micro-batches; what fills up a
    smaller rank has a gradient of zero."""
    members = (0, 1, 2)
    company = together(folder, members)
    rows = {e: rows_of(e) for e in members}
    rollout = in_company(rows)
    batches = batches_of(config_of(0), rollout, np.arange(len(rollout.completions)))
    assert any(len({*batch.members.tolist()}) > 1 for batch in batches)
    total, _ = company.update._sum(company.adapters, company.base, batches, None, None)
    for e in members:
        lone, rank = alone(folder, e), config_of(e).lora_r
        own = batches_of(config_of(e), rows[e], np.arange(8))
        expected = lone.update.gradient(lone.state(0)[0], lone.base, own, 1.0)
        got = nth(total.gradient, e)
        assert relative_error(*map(adapter_arrays, (with_rank(got, rank), expected))) < 1e-5
        only_own = with_rank(with_rank(got, rank), 16)
        for a, b in zip(*map(jax.tree.leaves, (got, only_own)), strict=True):
            np.testing.assert_array_equal(a, b)


def off_policy_gradients(learner: Learner, rows: dict, old: dict):
    """[E, ...]: of one update of each member from these old logprobs, and those of its KL's policy
    where there are such."""
    rollout, known, refs = in_company(rows), Logprobs(in_company(rows)), Logprobs(in_company(rows))
    batches = batches_of(learner.configs[0], rollout, np.arange(len(rollout.completions)))
    known.values[:] = np.concatenate([old[e] for e in rows])[:, : known.values.shape[1]]
    refs.add(batches, learner.update.logprobs(learner.ref, learner.base, batches))
    total, _ = learner.update._sum(
        learner.adapters, learner.base, batches, known.of(batches), refs.of(batches)
    )
    return learner.update.programs.of_all_devices(total).gradient


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0])
def test_off_policy_each_loss_s_gradient_among_eight_others_is_that_alone(folder, turn):
    """To 1e-5, at ranks 1, 4 and 16 in turn, where ratios are far enough from 1 that clips and
    penalties count. (Turns 1 and 2, with the ranks changed round, take as long again each.)"""
    members, rng = range(len(MEMBERS)), np.random.default_rng(0)
    changes = [{"lora_r": (1, 4, 16)[(e + turn) % 3]} for e in members]
    rows, old, expected = {e: rows_of(e) for e in members}, {}, {}
    for e in members:
        lone = alone(folder, e, **changes[e])
        batches = batches_of(config_of(e), rows[e], np.arange(8))
        known = Logprobs(rows[e])
        known.add(batches, lone.update.logprobs(lone.adapters, lone.base, batches))
        noise = rng.normal(0, 0.3, (8, 64)).astype(np.float32)
        old[e] = noise[:, : known.values.shape[1]] + known.values
        expected[e] = nth(off_policy_gradients(lone, {0: rows[e]}, {0: old[e]}), 0)
    longest = max(x.shape[1] for x in old.values())
    padded = {e: np.pad(x, ((0, 0), (0, longest - x.shape[1])), constant_values=np.nan)
              for e, x in old.items()}  # fmt: skip
    found = off_policy_gradients(together(folder, members, changes), rows, padded)
    for e in members:
        got = with_rank(nth(found, e), changes[e]["lora_r"])
        assert relative_error(*map(adapter_arrays, (got, expected[e]))) < 1e-5, e


@pytest.mark.slow
def test_two_members_of_one_config_stay_equal_and_another_s_overflow_is_its_own(folder):
    """Members 0 and 2 are the same; member 1's rewards are not finite, in both steps."""
    configs = [config_of(0)] * 3
    graph, adapter, base = adapter_of(folder, 0)
    company = Learner(configs, graph, stacked_up([adapter] * 3), base)
    bad = dataclasses.replace(rows_of(0), advantages=np.full(8, np.inf, np.float32))
    for n in (1, 2):
        metrics = company.learn({0: rows_of(0), 1: bad, 2: rows_of(0)})
        assert [m["train/skipped_updates"] for m in metrics.values()] == [0, 1, 0]
        assert company.skipped_in_a_row == [0, n, 0]
    lone = OneLearner(config_of(0), graph, adapter, base)
    for _ in range(2):
        lone.learn(rows_of(0))
    first, second, third = (adapter_arrays(company.state(e)[0]) for e in range(3))
    assert relative_error(third, first) < 1e-6
    assert relative_error(second, adapter_arrays(adapter)) == 0
    assert relative_error(first, adapter_arrays(lone.state(0)[0])) < 1e-3


@pytest.mark.slow
def test_a_member_that_takes_no_part_stays_as_it_is(folder):
    company = together(folder, (0, 1))
    before = jax.tree.map(np.asarray, company.state(1))
    metrics = company.learn({0: rows_of(0)})
    assert metrics.keys() == {0}
    for a, b in zip(*map(jax.tree.leaves, (company.state(1), before)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_side_by_side_keeps_one_alone_as_it_is_and_scales_each(folder):
    _, adapter, _ = adapter_of(folder, 1)
    assert all(
        a is b
        for a, b in zip(
            *map(jax.tree.leaves, (side_by_side(adapter, (3.0,)), adapter)), strict=True
        )
    )
    both = side_by_side(stacked_up([adapter, jax.tree.map(jnp.zeros_like, adapter)]), (3.0, 1.0))
    wide = with_rank(adapter, 8)
    tripled = jax.tree.leaves(wide)[1] * 3
    np.testing.assert_allclose(jax.tree.leaves(both)[1], tripled)


def test_of_a_smaller_rank_only_its_own_columns_are_computed(folder):
    """Ranks 1, 16 and 4 are one of rank 21; each token keeps those of its member."""
    members, ranks = (0, 2, 1), (1, 16, 4)
    company = together(folder, members)
    both = side_by_side(company.adapters, company.update.programs.scales, ranks)
    assert {leaf.shape[-1] for leaf in jax.tree.leaves(both)[::2]} == {21}
    own = np.asarray(own_columns(jnp.array([0, 1, 2], jnp.uint32), ranks))
    assert own.sum(axis=1).tolist() == [1, 16, 4]
    assert own.argmax(axis=1).tolist() == [0, 1, 17]
