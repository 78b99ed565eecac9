"""jgrpo.run.stale: under 16-bit noise, the adapter before is told from the right one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import tiny_config

from jgrpo.policy.batch import Rows, micro_batches
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.policy.lora import fresh_adapter, nth, side_by_side, stacked_up
from jgrpo.run import session, stale
from jgrpo.run.policy import open_policies
from jgrpo.run.stale import Slope, of_group

G = 8


def one_step(rng, of_before: float, moved=0.005, noise=0.03, tokens=400):
    """A group's x and y: an update moves a token's logprob by `moved`, the sampler's noise has the
    tails of Student's t with 2.5 degrees of freedom, and a part of it is a completion's own."""
    x, y = [], []
    for _ in range(G):
        n = int(rng.integers(2, 2 * tokens))
        x.append(moved * rng.standard_normal(n))
        own = 0.3 * noise * rng.standard_normal()
        y.append(of_before * x[-1] + noise * rng.standard_t(2.5, n) + own * rng.standard_normal(n))
    return x, y


def test_slope_and_error_are_those_of_the_closed_form(monkeypatch):
    """Of all tokens at once, where nothing is forgotten: the larger of two cluster sandwiches."""
    monkeypatch.setattr(stale, "KEPT", 1.0)
    rng, slope = np.random.default_rng(0), Slope()
    steps = [one_step(rng, 0.4) for _ in range(8)]
    for x, y in steps:
        slope.add(x, y)
    x, y = ([a for step in steps for a in step[i]] for i in (0, 1))
    all_x, all_y = np.concatenate(x), np.concatenate(y)
    expected = np.linalg.lstsq(all_x[:, None], all_y, rcond=None)[0][0]
    assert slope.value == pytest.approx(expected, rel=1e-12)
    in_steps = [[np.concatenate(part) for part in step] for step in steps]
    errors = []
    for draws in (list(zip(x, y, strict=True)), in_steps):
        meat = sum(np.dot(a, b - expected * a) ** 2 for a, b in draws)
        n = len(draws)
        errors.append(np.sqrt(meat * n / (n - 1)) / np.dot(all_x, all_x))
    assert slope.error == pytest.approx(max(errors), rel=1e-9)


@pytest.mark.slow
def test_its_intervals_hold_the_truth_as_often_as_they_say():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(1000):
        slope = Slope()
        for _ in range(12):
            slope.add(*one_step(rng, 0.0, tokens=20))
        inside += abs(slope.value) < 1.96 * slope.error
    assert 930 <= inside <= 990  # 95 % and a little more: the larger of two


def test_noise_that_a_step_s_tokens_share_is_no_evidence():
    """One rounding of the weights, which lies along the update by chance, in each step."""
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(200):
        slope = Slope()
        for _ in range(30):
            x, y = one_step(rng, 0.0, noise=0.002, tokens=20)
            along = 2.0 * rng.standard_normal()
            slope.add(x, [b + along * a for a, b in zip(x, y, strict=True)])
            alarms += slope.is_stale
    assert alarms == 0


def test_nothing_is_said_of_few_steps_or_of_adapters_that_are_one():
    slope = Slope()
    for _ in range(4):
        slope.add([np.ones(5)] * G, [np.ones(5)] * G)
    slope.add([np.full(5, 1e-3)] * G, [np.full(5, 1e-3)] * G)  # which moved it little
    assert np.isnan(slope.error)
    assert not slope.is_stale
    same = Slope()
    for _ in range(20):
        same.add([np.zeros(5)] * G, [np.ones(5)] * G)
    assert np.isnan(same.value)
    assert not same.is_stale


def test_no_false_alarm_in_three_thousand_honest_steps():
    rng = np.random.default_rng(2)
    slopes = [Slope() for _ in range(3)]
    for slope in slopes:
        for _ in range(1000):
            slope.add(*one_step(rng, 0.0))
            assert not slope.is_stale


@pytest.mark.parametrize(("share", "moved"), [(1.0, 0.005), (0.5, 0.015)])
def test_a_sampler_that_stays_behind_is_found_although_no_mean_shows_it(share, moved):
    """From some step on all tokens are the adapter's before, or half of them are."""
    rng, slope = np.random.default_rng(3), Slope()
    honest, behind = [], []
    for _ in range(10):
        x, y = one_step(rng, 0.0, moved)
        honest.append(np.abs(np.concatenate(y)).mean())
        slope.add(x, y)
    for _ in range(60):
        right, wrong = one_step(rng, 0.0, moved), one_step(rng, 1.0, moved)
        half = int(G * share)
        x, y = (a[half:] + b[:half] for a, b in zip(right, wrong, strict=True))
        behind.append(np.abs(np.concatenate(y)).mean())
        slope.add(x, y)
        if slope.is_stale:
            break
    assert slope.is_stale
    assert np.mean(behind) < 1.1 * np.mean(honest)


@pytest.fixture(scope="module")
def policy(root):
    session.configure_jax()
    config = tiny_config(root, dtype="bfloat16", lora_r=2)
    return config, open_policies([config])


@jax.jit(static_argnums=0)
def of_batch(graph, adapter, base, batch):
    return token_logprobs(nnx.merge(graph, adapter, base), batch)[0]


def logprobs_in_16_bits(config, policy, adapter, rows):
    adapter = side_by_side(stacked_up([adapter]), policy.scales)
    n, found = len(rows.completions), {}
    limits = {"max_prompt_tokens": config.max_prompt_tokens, "max_tokens": config.max_tokens}
    for batch in micro_batches(rows, np.arange(n), micro_batch_size=n, **limits):
        values = np.asarray(of_batch(policy.graph, adapter, policy.base, batch))
        found |= dict(zip(batch.completions.tolist(), values, strict=True))
    return [found[i][: len(c)].tolist() for i, c in enumerate(rows.completions)]


@pytest.mark.slow
@pytest.mark.parametrize(("sampled_by", "expected"), [("right", 0.0), ("before", 1.0)])
def test_a_model_in_16_bits_is_told_from_itself_one_small_update_ago(policy, sampled_by, expected):
    """The sampler is the model in bfloat16, whose noise is larger than the update."""
    config, policy = policy
    rng, like = np.random.default_rng(4), nth(policy.adapter, 0)
    before = jax.tree.map(lambda x: x + 0.02, fresh_adapter(like, 5))
    step = fresh_adapter(like, 6)
    right = jax.tree.map(lambda x, s: x + 1e-4 * jnp.sign(s + 1e-9), before, step)
    slope, gaps, moves = Slope(), [], []
    for _ in range(20):
        prompt = rng.integers(3, 19, 9).tolist()
        completions = [rng.integers(3, 19, 20).tolist() for _ in range(G)]
        zero = [[0.0] * 20] * G
        rows = Rows([prompt] * G, completions, zero, np.zeros(G, np.float32))
        adapter = {"right": right, "before": before}[sampled_by]
        sampled = logprobs_in_16_bits(config, policy, adapter, rows)
        x, y = of_group(policy, 0, right, before, replace(rows, sampler_logprobs=sampled), config)
        slope.add(x, y)
        moves.append(np.abs(np.concatenate(x)).mean())
        gaps.append(np.abs(np.concatenate(y)).mean())
    assert np.mean(gaps) > np.mean(moves)  # the noise is the larger
    assert slope.value == pytest.approx(expected, abs=0.15)
    assert slope.is_stale == (sampled_by == "before")
