"""Ragged rows -> micro-batches: by hand, and for any lengths."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgrpo.policy.batch import Rows, bucket, completion_mask, micro_batches, width, with_signal


def make_rows(groups: list[tuple[int, list[int]]]) -> Rows:
    """Groups of (prompt length, completion lengths); every token is another number, and a
    completion's advantage its number, from 1."""
    counter = iter(range(1, 10**6))
    take = lambda n: [next(counter) for _ in range(n)]  # noqa: E731
    prompts, completions = [], []
    for prompt_length, lengths in groups:
        prompt = take(prompt_length)
        prompts += [prompt] * len(lengths)
        completions += [take(n) for n in lengths]
    logprobs = [[-float(token) for token in c] for c in completions]
    return Rows(prompts, completions, logprobs, np.arange(1, len(prompts) + 1, dtype=np.float32))


def cut(rows: Rows, index, micro_batch_size: int, longest: tuple[int, int]):
    """`micro_batches`; `longest`: what a prompt and a completion may have."""
    return micro_batches(
        rows, index, micro_batch_size=micro_batch_size,
        max_prompt_tokens=longest[0], max_tokens=longest[1],
    )  # fmt: skip


def test_buckets_by_hand():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 65, 97)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 96, 128,
    ]  # fmt: skip


@given(st.integers(16, 10**6))
def test_a_bucket_holds_its_rows_and_wastes_less_than_a_third(n):
    assert n <= bucket(n) < 1.5 * n


def test_widths_by_hand():
    """The limit's bucket is 128; what is longer than the limit has a bucket of its own."""
    lengths = 128, 100, 65, 64, 33, 17, 200
    assert [width(n, 100) for n in lengths] == [128, 128, 128, 64, 64, 32, 256]


def test_a_micro_batch_by_hand():
    """Two completions of one prompt share a row, the third has its own; the other prompt's single
    one has the third row. Of 320 tokens, three prompts with a row for each are the best use; the
    third prompt only fills up."""
    rows = make_rows([(3, [40, 36, 28]), (2, [1])])
    (batch,) = cut(rows, np.arange(4), 5, (24, 40))
    assert (batch.prompts.shape, batch.rows.shape, batch.mask.shape) == ((3, 64), (4, 64), (9, 64))
    assert batch.prompts[:, :4].tolist() == [[1, 2, 3, 0], [108, 109, 0, 0], [0] * 4]
    assert batch.prompt_lengths.tolist() == [3, 2, 1]
    first, second, third = (list(range(a, b)) for a, b in ((4, 44), (44, 80), (80, 108)))
    # The row of 36 has room for the 28, that of 40 has not.
    assert batch.rows.tolist() == [first + [0] * 24, second + third, [110, *[0] * 63], [0] * 64]
    assert batch.segments.tolist() == [
        [1] * 40 + [0] * 24, [1] * 36 + [2] * 28, [1, *[0] * 63], [0] * 64,
    ]  # fmt: skip
    assert batch.row_prompts.tolist() == [0, 0, 1, 0]
    assert batch.starts[:4].tolist() == [0, 64, 100, 128]
    assert batch.mask.sum(axis=1).tolist() == [40, 36, 28, 1] + [0] * 5
    assert batch.advantages.tolist() == [1, 2, 3, 4] + [0] * 5
    assert batch.sampler_logprobs[2, :29].tolist() == [*[-float(t) for t in third], 0]


def test_completions_that_are_not_trained_on_have_no_mask():
    rows = dataclasses.replace(make_rows([(3, [2, 2])]), trained=np.array([True, False]))
    (batch,) = cut(rows, np.arange(2), 2, (8, 8))
    assert batch.mask.sum(axis=1).tolist() == [2, 0]


def test_a_prompt_is_computed_once_for_a_whole_group():
    rows = make_rows([(64, [192] * 8)] * 4)
    for micro_batch_size in (8, 16):
        batches = cut(rows, np.arange(32), micro_batch_size, (64, 192))
        assert sum(b.n_tokens for b in batches) == 4 * 64 + 32 * 192


def realistic_rows(seed: int) -> Rows:
    """Log-normal lengths, mean about 0.4 of the longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(sigma=0.5, size=(32, 8))
    lengths = np.ceil(lengths / lengths.max() * 1024).astype(int).tolist()
    return make_rows([(int(rng.integers(50, 200)), group) for group in lengths])


@pytest.mark.parametrize("micro_batch_size", [4, 8, 16])
def test_realistic_rollouts_are_packed_with_little_waste(micro_batch_size):
    """One row for each completion would compute 2.5 times their tokens, and the prompts eight
    times."""
    rows = realistic_rows(0)
    batches = cut(rows, np.arange(256), micro_batch_size, (256, 1024))
    useful = sum(map(len, rows.completions)) + sum(map(len, rows.prompts[::8]))
    assert sum(b.n_tokens for b in batches) < 1.2 * useful
    assert sum(b.prompts.size + b.rows.size for b in batches) < 1.75 * useful
    assert len({b.rows.shape for b in batches}) == 1


groups_strategy = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(0, 60), min_size=1, max_size=9)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=300, deadline=None)
@given(groups_strategy, st.integers(1, 20), st.data())
def test_every_indexed_completion_once_and_exactly(groups, micro_batch_size, data):
    rows = make_rows(groups)
    if data.draw(st.booleans()):  # the first prompt again, as where an epoch ends within a step
        n_last = len(groups[-1][1])
        again = [*rows.prompts[:-n_last], *[rows.prompts[0]] * n_last]
        rows = dataclasses.replace(rows, prompts=again)
    everything = range(len(rows.completions))
    chosen = data.draw(st.lists(st.sampled_from(everything), unique=True, min_size=1))
    index = np.array(sorted(chosen))
    batches = cut(rows, index, micro_batch_size, (40, 60))
    seen, n_trained = [], 0
    for batch in batches:
        row_width, flat = batch.rows.shape[1], batch.rows.reshape(-1)
        used = np.zeros(flat.shape, bool)
        for start, mask, logprobs, advantage in zip(
            batch.starts, batch.mask, batch.sampler_logprobs, batch.advantages, strict=True
        ):
            if not advantage:  # a slot that only fills up
                assert not mask.any()
                assert not logprobs.any()
                continue
            i = int(advantage) - 1
            seen.append(i)
            n = len(rows.completions[i])
            assert mask.tolist() == [1] * n + [0] * (row_width - n)
            assert flat[start : start + n].tolist() == rows.completions[i]
            assert logprobs[:n].tolist() == rows.sampler_logprobs[i]
            if n:
                row, column = divmod(int(start), row_width)
                segment = batch.segments[row]
                assert np.flatnonzero(segment == segment[column]).tolist() == list(
                    range(column, column + n)
                )
                p = batch.row_prompts[row]
                length = batch.prompt_lengths[p]
                assert batch.prompts[p, :length].tolist() == rows.prompts[i]
                assert not used[start : start + n].any()
                used[start : start + n] = True
                n_trained += n
        assert (used == (batch.segments.reshape(-1) > 0)).all()
        in_prompt = np.arange(batch.prompts.shape[1]) < batch.prompt_lengths[:, None]
        in_prompt[len(set(batch.row_prompts)) :] = False
        needed = np.flatnonzero(np.concatenate([in_prompt.reshape(-1), used]))
        n_slots = batch.prompts.size + batch.rows.size
        places = batch.places[batch.places < n_slots].tolist()
        assert places == sorted(set(places))
        assert set(needed) <= set(places)
        assert len(places) in (n_slots, len(needed))
        assert batch.prompt_lengths.min() >= 1
    assert sorted(seen) == index.tolist()
    assert n_trained == sum(len(rows.completions[i]) for i in index)

    one_row = batches[0].prompts.shape[1] + row_width
    assert batches[0].n_tokens <= max(micro_batch_size * bucket(40 + 60), one_row)
    assert len({tuple(x.shape for x in b) for b in batches}) == 1


def test_a_prompt_that_comes_twice_has_two_groups():
    """Where an epoch ends within a step, around a group without a signal."""
    rows = make_rows([(8, [5] * 4)] * 3)
    rows = dataclasses.replace(rows, prompts=[*rows.prompts[:8], *rows.prompts[:4]])
    index = np.array([0, 1, 2, 3, 8, 9, 10, 11])
    batches = cut(rows, index, 8, (8, 8))
    seen = sorted(int(a) - 1 for batch in batches for a in batch.advantages if a)
    assert seen == index.tolist()


@pytest.mark.parametrize(("micro_batch_size", "most"), [(4, 3), (8, 3)])
def test_a_run_meets_few_shapes(micro_batch_size, most):
    """Each is a compilation. With any number of prompts and rows there would be 5 and 12."""
    shapes = set()
    for seed in range(30):
        batches = cut(realistic_rows(seed), np.arange(256), micro_batch_size, (256, 1024))
        shapes |= {tuple(x.shape for x in b) for b in batches}
    assert len(shapes) <= most


def test_rows_without_signal_are_left_out():
    np.testing.assert_array_equal(with_signal(np.array([0, 0.5, -0.0, -1e-8])), [1, 3])


def test_one_row_is_kept_where_none_has_signal():
    np.testing.assert_array_equal(with_signal(np.zeros(3)), [0])


def test_completion_mask_counts_every_completion():
    rows = make_rows([(2, [3]), (5, [1]), (1, [0])])
    np.testing.assert_array_equal(completion_mask(rows), [[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_nothing_to_train_is_no_micro_batch(micro_batch_size):
    rows, none = make_rows([(2, [3])]), np.array([], int)
    assert cut(rows, none, micro_batch_size, (8, 8)) == []
