"""Ragged token lists -> micro-batches of a few fixed shapes.

Rows are sorted by length and cut into micro-batches of about equally many tokens, each as wide as
the bucket of its longest row, so that little is computed on padding and little is compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class Rows:
    """A rollout as ragged rows: N prompts with their completions, and what the update needs."""

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    sampler_logprobs: Sequence[Sequence[float]]
    advantages: np.ndarray
    """float32 [N]"""
    trained: np.ndarray | None = None
    """bool [N]: the completions that are trained on; None: all"""


class MicroBatch(NamedTuple):
    """B rows of T tokens: prompt, completion, padding. A row that only fills up is all zeros."""

    ids: np.ndarray
    """int32 [B, T]"""
    segments: np.ndarray
    """int32 [B, T]: 1 on tokens, 0 on padding"""
    mask: np.ndarray
    """float32 [B, T]: 1 on completion tokens, the end token included"""
    sampler_logprobs: np.ndarray
    """float32 [B, T], 0 where mask is 0"""
    advantages: np.ndarray
    """float32 [B]"""


def bucket(n: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that is >= n."""
    size = SMALLEST_BUCKET
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def completion_mask(rows: Rows) -> np.ndarray:
    """float32 [N, longest completion]: 1 where a completion that is trained on has a token."""
    lengths = np.array([len(c) for c in rows.completions])
    trained = np.ones(len(lengths), bool) if rows.trained is None else rows.trained
    there = np.arange(lengths.max()) < lengths[:, None]
    return (there & trained[:, None]).astype(np.float32)


def with_signal(advantages: np.ndarray) -> np.ndarray:
    """Indices of the rows whose advantage is not exactly zero; the first row if none has one, so
    that what is measured on trained tokens (entropy, sampler gap) is measured at every step."""
    index = np.flatnonzero(advantages)
    return index if len(index) else np.array([0])


def micro_batches(
    rows: Rows, index: np.ndarray, *, micro_batch_size: int, max_model_len: int
) -> list[MicroBatch]:
    """The rows of `index` as micro-batches, longest first (so that a lack of memory shows early).

    A micro-batch of the longest bucket has micro_batch_size rows, one of a shorter bucket as many
    more as hold the same number of tokens. The last may have a quarter of the rows: two heights a
    width, and no more, since each shape is a compilation.
    """
    tokens = micro_batch_size * bucket(max_model_len)
    lengths = np.array([len(rows.prompts[i]) + len(rows.completions[i]) for i in index])
    waiting = index[np.argsort(-lengths, kind="stable")]
    lengths = np.sort(lengths)[::-1]
    batches, start = [], 0
    while start < len(waiting):
        width = bucket(int(lengths[start]))
        height = max(1, tokens // width)
        taken = waiting[start : start + height]
        if 4 * len(taken) <= height:
            height //= 4
        batches.append(_fill(rows, taken, height, width))
        start += len(taken)
    return batches


def _fill(rows: Rows, index: np.ndarray, height: int, width: int) -> MicroBatch:
    ids, segments = np.zeros((2, height, width), np.int32)
    mask, sampler_logprobs = np.zeros((2, height, width), np.float32)
    advantages = np.zeros(height, np.float32)
    for b, i in enumerate(index):
        prompt, completion = rows.prompts[i], rows.completions[i]
        start, end = len(prompt), len(prompt) + len(completion)
        ids[b, :start], ids[b, start:end] = prompt, completion
        segments[b, :end] = 1
        mask[b, start:end] = rows.trained is None or rows.trained[i]
        sampler_logprobs[b, start:end] = rows.sampler_logprobs[i]
        advantages[b] = rows.advantages[i]
    return MicroBatch(ids, segments, mask, sampler_logprobs, advantages)
