"""Ragged rows -> micro-batches: by hand, and for any lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgrpo.batch import Rows, bucket, completion_mask, micro_batches, with_signal


def make_rows(lengths: list[tuple[int, int]]) -> Rows:
    """Rows of (prompt, completion) lengths; every token of the rollout is another number."""
    counter = iter(range(1, 10**6))
    take = lambda n: [next(counter) for _ in range(n)]  # noqa: E731
    prompts = [take(p) for p, _ in lengths]
    completions = [take(c) for _, c in lengths]
    logprobs = [[-float(token) for token in c] for c in completions]
    return Rows(prompts, completions, logprobs, np.arange(1, len(lengths) + 1, dtype=np.float32))


def test_buckets_by_hand():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 65, 97)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 96, 128,
    ]  # fmt: skip


@given(st.integers(16, 10**6))
def test_a_bucket_holds_its_rows_and_wastes_less_than_a_third(n):
    assert n <= bucket(n) < 1.5 * n


def test_a_row_by_hand():
    rows = Rows([[7, 8, 9]], [[4, 5]], [[-0.5, -1.5]], np.array([2.0], np.float32))
    (batch,) = micro_batches(rows, np.array([0]), micro_batch_size=1, max_model_len=16)
    zeros = [0] * 11
    np.testing.assert_array_equal(batch.ids, [[7, 8, 9, 4, 5, *zeros]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 1, *zeros]])
    np.testing.assert_array_equal(batch.mask, [[0, 0, 0, 1, 1, *zeros]])
    np.testing.assert_array_equal(batch.sampler_logprobs, [[0, 0, 0, -0.5, -1.5, *zeros]])
    np.testing.assert_array_equal(batch.advantages, [2])


def test_short_rows_share_a_micro_batch_of_as_many_tokens():
    # 2 rows of 64 are 128 tokens: two rows of 60, then eight rows of 16.
    rows = make_rows([(4, 12)] * 8 + [(10, 50)] * 2)
    batches = micro_batches(rows, np.arange(10), micro_batch_size=2, max_model_len=64)
    assert [b.ids.shape for b in batches] == [(2, 64), (8, 16)]


lengths_strategy = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(lengths_strategy, st.integers(1, 5), st.data())
def test_every_indexed_row_once_and_exactly(lengths, micro_batch_size, data):
    rows = make_rows(lengths)
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    index, max_model_len = np.array(sorted(chosen)), 100
    batches = micro_batches(
        rows, index, micro_batch_size=micro_batch_size, max_model_len=max_model_len
    )
    seen = []
    for batch in batches:
        for ids, segments, mask, logprobs, advantage in zip(*batch, strict=True):
            if not segments.any():  # a row that only fills up
                assert not any(map(np.any, (ids, mask, logprobs, advantage)))
                continue
            i = int(advantage) - 1
            seen.append(i)
            prompt, completion = rows.prompts[i], rows.completions[i]
            padding = [0] * (len(ids) - len(prompt) - len(completion))
            assert ids.tolist() == [*prompt, *completion, *padding]
            trained = [0] * len(prompt) + [1] * len(completion) + padding
            assert mask.tolist() == trained
            assert segments.tolist() == [1] * (len(prompt) + len(completion)) + padding
            assert logprobs.tolist() == [-t * m for t, m in zip(ids, trained, strict=True)]
    assert sorted(seen) == index.tolist()

    longest = [int(b.segments.sum(axis=1).max()) for b in batches]
    assert [b.ids.shape[1] for b in batches] == [bucket(n) for n in longest]
    assert longest == sorted(longest, reverse=True)
    assert max(b.ids.size for b in batches) <= micro_batch_size * bucket(max_model_len)
    shapes = {b.ids.shape for b in batches}
    assert len(shapes) <= len({width for _, width in shapes}) + 1  # only the last may be cut


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.lists(lengths_strategy, min_size=20, max_size=20))
def test_a_run_meets_few_shapes(micro_batch_size, steps):
    # Each shape is a compilation. A run of any length meets at most two heights a width.
    shapes = set()
    for lengths in steps:
        rows, index = make_rows(lengths), np.arange(len(lengths))
        batches = micro_batches(rows, index, micro_batch_size=micro_batch_size, max_model_len=100)
        shapes |= {b.ids.shape for b in batches}
    widths = [width for _, width in shapes]
    assert max(map(widths.count, widths)) <= 2


def test_rows_without_signal_are_left_out():
    np.testing.assert_array_equal(with_signal(np.array([0, 0.5, -0.0, -1e-8])), [1, 3])


def test_one_row_is_kept_where_none_has_signal():
    np.testing.assert_array_equal(with_signal(np.zeros(3)), [0])


def test_completion_mask_counts_every_completion():
    rows = make_rows([(2, 3), (5, 1), (1, 0)])
    np.testing.assert_array_equal(completion_mask(rows), [[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_nothing_to_train_is_no_micro_batch(micro_batch_size):
    rows, none = make_rows([(2, 3)]), np.array([], int)
    assert micro_batches(rows, none, micro_batch_size=micro_batch_size, max_model_len=16) == []
