"""The embedded sampler: it follows the policy, says so truthfully, and stops where it should."""

from functools import partial
from itertools import chain

import jax
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import (
    PROMPTS,
    adapted,
    in_one_batch,
    merged,
    torch_logits,
    torch_model,
    with_random_b,
)
from peft import PeftModel
from transformers import TopPLogitsWarper

import jgrpo
from jgrpo.policy.batch import Rows
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.rollout import embedded
from jgrpo.rollout.embedded import JaxSampler

STOPS = (11, 40)
MANY_STOPS = (*STOPS, 41, 42, 43)
SEEDS = [101, 202, 303]


@pytest.fixture(scope="module")
def parts(checkpoint):
    return adapted(checkpoint("qwen3-tied"), 2)


@pytest.fixture(scope="module")
def torch_policy(checkpoint, parts, tmp_path_factory):
    """The same policy in PyTorch."""
    folder = tmp_path_factory.mktemp("policy") / "adapter"
    jgrpo.save_adapter(merged(*parts), folder)
    return PeftModel.from_pretrained(torch_model(checkpoint("qwen3-tied")), folder)


@pytest.fixture(scope="module")
def sampler(parts):
    return JaxSampler(*parts, stop_token_ids=STOPS, max_tokens=70, max_rows=64)


TEMPERATURES = [1.0, pytest.param(0.7, marks=pytest.mark.slow)]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logprobs_equal_the_trainers(parts, sampler, temperature):
    groups = sampler.sample(PROMPTS, seeds=SEEDS, group_size=4, temperature=temperature)
    pairs = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    assert sum(len(c.token_ids) for _, c in pairs) > 200
    rows = Rows(
        [p for p, _ in pairs],
        [c.token_ids for _, c in pairs],
        [c.logprobs for _, c in pairs],
        np.ones(len(pairs), np.float32),
    )
    batch = in_one_batch(rows)
    trainer = jax.jit(partial(token_logprobs, temperature=temperature))
    logprobs, _ = trainer(merged(*parts), batch)
    assert np.abs(logprobs - batch.sampler_logprobs).max() < 1e-4
    assert batch.sampler_logprobs[batch.mask > 0].max() < 0


def torch_greedy(model, prompt, n_tokens) -> list[int]:
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=n_tokens,
            use_cache=True,
        )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_greedy_equals_transformers_generate(parts, torch_policy):
    # 70 tokens go through every stage of the cache (16, 32, 64, 70); prompts of 1, 3 and 7 tokens
    # are padded to one width.
    sampler = JaxSampler(*parts, stop_token_ids=[], max_tokens=70, max_rows=64)
    groups = sampler.sample(PROMPTS, seeds=SEEDS, temperature=0)
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        assert completion.token_ids == torch_greedy(torch_policy, prompt, 70)
        assert completion.finish_reason == "length"


def test_a_completion_ends_with_its_end_token(sampler):
    completions = [c for g in sampler.sample(PROMPTS, seeds=SEEDS, group_size=4) for c in g]
    reasons = [c.finish_reason for c in completions]
    assert {"stop", "length"} == set(reasons)
    for c in completions:
        assert len(c.logprobs) == len(c.token_ids)
        stops = [t for t, token in enumerate(c.token_ids) if token in STOPS]
        if c.finish_reason == "stop":
            assert stops == [len(c.token_ids) - 1]
        else:
            assert (stops, len(c.token_ids)) == ([], 70)


@pytest.mark.parametrize(
    "max_tokens", [1, 17, 64, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 16, 32, 65))]
)
def test_max_tokens_cuts_the_same_completions(sampler, max_tokens):
    # Across the cache's stages (16, 32, 64): a shorter limit gives prefixes of the longer's tokens.
    whole = sampler.sample(PROMPTS, seeds=SEEDS, group_size=4)
    cut = sampler.sample(PROMPTS, seeds=SEEDS, group_size=4, max_tokens=max_tokens)
    for group, shorter in zip(whole, cut, strict=True):
        for c, s in zip(group, shorter, strict=True):
            assert s.token_ids == c.token_ids[:max_tokens]
            ended = s.token_ids[-1] in STOPS
            assert s.finish_reason == ("stop" if ended else "length")


@pytest.mark.slow
def test_a_cache_that_is_read_by_sums_gives_the_same(parts, sampler, monkeypatch):
    expected = sampler.sample(PROMPTS, seeds=SEEDS, group_size=4)
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = JaxSampler(*parts, stop_token_ids=STOPS, max_tokens=70, max_rows=64)
    got = on_gpu.sample(PROMPTS, seeds=SEEDS, group_size=4)
    assert ids_of(got) == ids_of(expected)
    for a, b in zip(chain(*got), chain(*expected), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.fixture
def packings(monkeypatch) -> list[int]:
    """How many rows there were each time that a batch was packed."""
    seen, packed = [], embedded.packed
    monkeypatch.setattr(embedded, "packed", lambda *x: (seen.append(x[-1].size), packed(*x))[1])
    return seen


def plainly_sampled(parts, group_size: int, max_tokens: int) -> list[list[list[int]]]:
    """The same draws, with the model called on whole sequences, all rows to the end."""
    prompts = [p for p in PROMPTS for _ in range(group_size)]
    lengths = np.array([len(p) for p in prompts])
    ids = np.zeros((len(prompts), lengths.max() + max_tokens), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = [jax.random.fold_in(jax.random.key(s), g) for s in SEEDS for g in range(group_size)]
    model, keys = merged(*parts), jax.numpy.stack(keys)

    @jax.jit
    def draw(ids, t):
        logits = model(ids)[np.arange(len(ids)), lengths - 1 + t]
        of_row = lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row)  # noqa: E731
        return jax.vmap(of_row)(keys, logits)

    for t in range(max_tokens):
        ids[np.arange(len(ids)), lengths + t] = draw(ids, t)
    rows = [row[n : n + max_tokens].tolist() for row, n in zip(ids, lengths, strict=True)]
    ends = [next((t + 1 for t, x in enumerate(row) if x in MANY_STOPS), max_tokens) for row in rows]
    cut = [row[:end] for row, end in zip(rows, ends, strict=True)]
    return [cut[i : i + group_size] for i in range(0, len(cut), group_size)]


@pytest.mark.slow
def test_rows_that_leave_change_nothing(parts, packings, monkeypatch):
    """48 rows of 64 (the others fill up) become 32 and 16 as they end, by twos of one prompt; what
    is sampled is what the model on whole sequences samples."""
    sampler = JaxSampler(*parts, stop_token_ids=MANY_STOPS, max_tokens=40, max_rows=64)
    told = []
    groups = sampler.sample(
        PROMPTS, seeds=SEEDS, group_size=16, progress=lambda *news: told.append(news)
    )
    assert packings == [32, 16]
    assert ids_of(groups) == plainly_sampled(parts, 16, 40)
    tokens = sum(len(c.token_ids) for group in groups for c in group)
    assert [sum(news) for news in zip(*told, strict=True)] == [48, tokens]
    monkeypatch.setattr(embedded, "HALVINGS", 0)
    stayed = sampler.sample(PROMPTS, seeds=SEEDS, group_size=16)
    assert len(packings) == 2  # none since
    for a, b in zip(chain(*groups), chain(*stayed), strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("group_size", "max_tokens", "leave"),
    [
        (16, 40, False),
        pytest.param(16, 60, True, marks=pytest.mark.slow),
        pytest.param(1, 40, True, marks=pytest.mark.slow),
    ],
)
def test_rows_leave_where_prompts_of_their_own_take_no_more_than_what_left(
    parts, packings, group_size, max_tokens, leave
):
    """Two packed rows have their prompt's keys and values for themselves: 48 tokens here."""
    sampler = JaxSampler(*parts, stop_token_ids=MANY_STOPS, max_tokens=60, max_rows=64)
    prompts = [[*range(2, 2 + 33)]] * (48 // group_size)
    sampler.sample(prompts, seeds=range(len(prompts)), group_size=group_size, max_tokens=max_tokens)
    assert bool(packings) == leave


def ids_of(groups) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in groups]


def test_members_of_a_group_differ_and_equal_seeds_repeat(sampler):
    first, again, other = (
        ids_of(sampler.sample(PROMPTS, seeds=seeds, group_size=4))
        for seeds in (SEEDS, SEEDS, [1, 2, 3])
    )
    assert first == again
    for group, others in zip(first, other, strict=True):
        assert len({tuple(c) for c in [*group, *others]}) == 8


@pytest.mark.slow
def test_chunks_and_neighbours_do_not_change_completions(parts, sampler):
    # max_rows 4 decodes one prompt at a time; alone, a prompt has another padded width.
    whole = ids_of(sampler.sample(PROMPTS, seeds=SEEDS, group_size=4))
    small = JaxSampler(*parts, stop_token_ids=STOPS, max_tokens=70, max_rows=4)
    assert ids_of(small.sample(PROMPTS, seeds=SEEDS, group_size=4)) == whole
    backwards = ids_of(sampler.sample(PROMPTS[::-1], seeds=SEEDS[::-1], group_size=4))
    assert backwards == whole[::-1]


def chi_square_p(counts: np.ndarray, p: np.ndarray) -> float:
    """How likely counts at least as far from p are; outcomes expected less than 5 times pooled."""
    expected = p * counts.sum()
    rare = expected < 5
    pool = lambda x: np.append(x[~rare], x[rare].sum() if rare.any() else [])  # noqa: E731
    pooled = pool(expected)
    statistic = ((pool(counts) - pooled) ** 2 / pooled).sum()
    return float(scipy.stats.chi2.sf(statistic, len(pooled) - 1))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_samples_follow_the_policy(parts, torch_policy, temperature):
    # 4096 completions of two tokens from 256 seeds. The second token is counted after the most
    # frequent first one: a random key used for both would bend it. The seeds are fixed.
    sampler = JaxSampler(*parts, stop_token_ids=[], max_tokens=2, max_rows=4096)
    prompt = PROMPTS[0]
    groups = sampler.sample(
        [prompt] * 256, seeds=range(256), group_size=16, temperature=temperature
    )
    tokens = np.array([c.token_ids for g in groups for c in g])
    assert tokens.shape == (4096, 2)

    def softmax(ids):
        logits = torch_logits(torch_policy, [ids])[0, -1].astype(np.float64)
        return scipy.special.softmax(logits / temperature)

    p, count = softmax(prompt), partial(np.bincount, minlength=67)
    counts = count(tokens[:, 0])
    assert chi_square_p(counts, p) > 0.01
    common = int(counts.argmax())
    after, p_after = count(tokens[tokens[:, 0] == common, 1]), softmax([*prompt, common])
    assert after.sum() > 300
    assert chi_square_p(after, p_after) > 0.01
    # It tells policies apart: of another temperature, or of another place, this is not a sample.
    assert chi_square_p(counts, p**0.8 / (p**0.8).sum()) < 1e-6
    assert chi_square_p(after, p) < 1e-6


def test_top_p_leaves_the_likeliest_tokens_as_the_policy_has_them(parts, torch_policy):
    """Against transformers' own filter, over the first token of 4096 completions."""
    sampler = JaxSampler(*parts, stop_token_ids=[], max_tokens=1, max_rows=4096)
    prompt, top_p, temperature = PROMPTS[0], 0.9, 1.5
    groups = sampler.sample(
        [prompt] * 256, seeds=range(256), group_size=16, temperature=temperature, top_p=top_p
    )
    logits = torch.tensor(torch_logits(torch_policy, [prompt])[:, -1]) / temperature
    kept = TopPLogitsWarper(top_p=top_p)(None, logits).softmax(dim=-1)[0].numpy().astype(float)
    assert 3 < (kept > 0).sum() < 40  # something is left, and something is left out
    completions = [c for group in groups for c in group]
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=67)
    assert not counts[kept == 0].any()
    assert chi_square_p(counts[kept > 0], kept[kept > 0] / kept.sum()) > 0.01
    for c in completions[:100]:  # what it says of them is the filtered policy's
        assert c.logprobs[0] == pytest.approx(np.log(kept[c.token_ids[0]]), abs=1e-4)


def test_loading_a_folder_changes_the_policy(checkpoint, parts, tmp_path):
    graph, adapter, base = parts
    other = merged(graph, with_random_b(adapter, seed=7), base)
    jgrpo.save_adapter(other, tmp_path / "a")
    sampler = JaxSampler(*parts, stop_token_ids=[], max_tokens=12, max_rows=64)
    before = ids_of(sampler.sample(PROMPTS, seeds=SEEDS, temperature=0))
    sampler.load(tmp_path / "a")
    after = ids_of(sampler.sample(PROMPTS, seeds=SEEDS, temperature=0))
    policy = PeftModel.from_pretrained(torch_model(checkpoint("qwen3-tied")), tmp_path / "a")
    assert after == [[torch_greedy(policy, prompt, 12)] for prompt in PROMPTS]
    assert after != before


def test_a_second_call_compiles_nothing(sampler):
    sampler.sample(PROMPTS, seeds=SEEDS, group_size=4)
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event) if "compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        sampler.sample([[3, 4], [5] * 9, [6] * 2], seeds=[7, 8, 9], group_size=4)
        assert compiled == []
        jax.jit(lambda x: x * 3.25)(1.0)  # the listener does hear compilations
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_progress_adds_up_to_what_is_returned(sampler):
    told = []
    groups = sampler.sample(
        PROMPTS, seeds=SEEDS, group_size=4, progress=lambda *news: told.append(news)
    )
    completions, tokens = map(sum, zip(*told, strict=True))
    assert completions == 12
    assert tokens == sum(len(c.token_ids) for g in groups for c in g)
