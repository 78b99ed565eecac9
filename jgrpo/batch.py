"""Ragged token lists -> micro-batches of a few fixed shapes, which compute nothing twice.

A prompt is there once for all its completions in a micro-batch. These are packed, several short
ones to a row, into rows that belong to one prompt each; how many rows there are for a prompt is
chosen to waste the least.

Axes: P prompts of S tokens; R rows of U tokens, packed with completions; N completions of at most U
tokens, as the loss sees them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

SMALLEST_BUCKET, SMALLEST_PROMPT, SMALLEST_ROW = 16, 32, 64


@dataclass(frozen=True)
class Rows:
    """A rollout, ragged: N completions with their prompts, groups together, and what the update
    needs."""

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    sampler_logprobs: Sequence[Sequence[float]]
    advantages: np.ndarray
    """float32 [N]"""
    trained: np.ndarray | None = None
    """bool [N]: the completions that are trained on; None: all"""


class MicroBatch(NamedTuple):
    """Some completions of a rollout. What only fills up is zero."""

    prompts: np.ndarray
    """int32 [P, S], padded"""
    prompt_lengths: np.ndarray
    """int32 [P], at least 1"""
    rows: np.ndarray
    """int32 [R, U]: completions, end token included, one after another"""
    segments: np.ndarray
    """int32 [R, U]: 1 on a row's first completion, 2 on its second, ...; 0 on padding"""
    row_prompts: np.ndarray
    """int32 [R]: which prompt a row's completions answer"""
    starts: np.ndarray
    """int32 [N]: where in the flattened rows a completion begins"""
    mask: np.ndarray
    """float32 [N, U]: 1 on tokens that are trained"""
    sampler_logprobs: np.ndarray
    """float32 [N, U], 0 where there is no token"""
    advantages: np.ndarray
    """float32 [N]"""

    @property
    def n_tokens(self) -> int:
        """Tokens computed, with those that only fill up."""
        return self.prompts.size + self.rows.size


Packed = list[list[int]]
"""Completions by index in `Rows`, a list a row."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a micro-batch, by the module's axes; G completions at most of one prompt."""

    p: int
    s: int
    r: int
    u: int
    g: int

    @property
    def n_tokens(self) -> int:
        return self.p * self.s + self.r * self.u


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
    """The completions of `index` as micro-batches of one shape.

    Each has at most as many tokens as micro_batch_size rows of the longest bucket, but at least one
    row. Shapes are few, since each is a compilation: widths are buckets of the longest prompt and
    completion (and not too small: rows are shared), and a prompt has 1, 2, 4, ... rows on average,
    whichever computes the fewest tokens.
    """
    if not len(index):
        return []
    groups = [list(g) for _, g in groupby(index, key=lambda i: tuple(rows.prompts[i]))]
    s = bucket(max(SMALLEST_PROMPT, *(len(rows.prompts[g[0]]) for g in groups)))
    u = bucket(max(SMALLEST_ROW, *(len(rows.completions[i]) for i in index)))
    most = max(len(list(g)) for _, g in groupby(map(tuple, rows.prompts)))
    packed = [_pack(rows, group, u) for group in groups]
    tokens = micro_batch_size * bucket(max_model_len)
    plans = []
    for ratio in (2**i for i in range(most.bit_length())):
        p = max(1, tokens // (s + ratio * u))
        shape = Shape(p, s, min(ratio * p, max(1, (tokens - p * s) // u)), u, most)
        plans.append((shape, _fill_up(packed, shape)))
    shape, batches = min(plans, key=lambda plan: (len(plan[1]) * plan[0].n_tokens, len(plan[1])))
    return [_fill(rows, shape, parts) for parts in batches]


def _pack(rows: Rows, group: Sequence[int], width: int) -> Packed:
    """The longest first, each into the first row that has room for it."""
    packed: Packed = []
    room: list[int] = []
    for i in sorted(group, key=lambda i: -len(rows.completions[i])):
        n = len(rows.completions[i])
        row = next((j for j, free in enumerate(room) if free >= n), len(room))
        if row == len(room):
            packed.append([])
            room.append(width)
        packed[row].append(i)
        room[row] -= n
    return packed


def _fill_up(packed: Sequence[Packed], shape: Shape) -> list[list[Packed]]:
    """What goes into each micro-batch, one after another; a prompt's rows are cut where one is
    full."""
    batches: list[list[Packed]] = []
    free = 0
    for left in packed:
        while left:
            if not free or len(batches[-1]) == shape.p:
                batches.append([])
                free = shape.r
            batches[-1].append(left[:free])
            left, free = left[free:], free - len(left[:free])
    return batches


def _fill(rows: Rows, shape: Shape, parts: Sequence[Packed]) -> MicroBatch:
    n = shape.p * shape.g
    batch = MicroBatch(
        prompts=np.zeros((shape.p, shape.s), np.int32),
        prompt_lengths=np.ones(shape.p, np.int32),
        rows=np.zeros((shape.r, shape.u), np.int32),
        segments=np.zeros((shape.r, shape.u), np.int32),
        row_prompts=np.zeros(shape.r, np.int32),
        starts=np.zeros(n, np.int32),
        mask=np.zeros((n, shape.u), np.float32),
        sampler_logprobs=np.zeros((n, shape.u), np.float32),
        advantages=np.zeros(n, np.float32),
    )
    row = slot = 0
    for p, packed in enumerate(parts):
        prompt = rows.prompts[packed[0][0]]
        batch.prompts[p, : len(prompt)], batch.prompt_lengths[p] = prompt, len(prompt)
        for members in packed:
            batch.row_prompts[row] = p
            start = 0
            for segment, i in enumerate(members, 1):
                end = start + len(rows.completions[i])
                batch.rows[row, start:end] = rows.completions[i]
                batch.segments[row, start:end] = segment
                batch.starts[slot] = row * shape.u + start
                batch.mask[slot, : end - start] = rows.trained is None or rows.trained[i]
                batch.sampler_logprobs[slot, : end - start] = rows.sampler_logprobs[i]
                batch.advantages[slot] = rows.advantages[i]
                slot, start = slot + 1, end
            row += 1
    return batch
