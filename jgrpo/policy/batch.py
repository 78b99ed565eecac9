"""Ragged token lists -> micro-batches of a few fixed shapes, which compute nothing twice.

A prompt is there once for all its completions in a micro-batch. These are packed, several short
ones to a row, into rows that belong to one prompt each. Prompts and rows are padded, but only
attention sees them so: the rest of the model computes their tokens one after another. How many
prompts, rows and tokens there are is chosen, of a few sizes, to waste the least.

Axes: P prompts of S tokens; R rows of U tokens, packed with completions; M tokens that are computed
of the P S + R U slots; N completions of at most U tokens, as the loss sees them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import NamedTuple

import numpy as np

SMALLEST_BUCKET, SMALLEST_PROMPT, SMALLEST_ROW = 16, 64, 64
EIGHTHS = (1, 2, 3, 5, 8)
"""How many tokens a micro-batch may have, in eighths of the most. Few: each is a compilation. The
most is what a long rollout takes: the fewer micro-batches, the less is read and left over."""
ROOM = 1.25
"""Rows have room for so many times its tokens: completions do not fill them."""
SLOT_COST, BATCH_COST = 0.15, 32
"""What a slot costs (attention alone), and what a micro-batch costs beside its tokens (the weights
are read), in tokens."""


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
    members: np.ndarray | None = None
    """int [N]: which of several adapters sampled each; None: there is one"""

    def member(self, i: int) -> int:
        return 0 if self.members is None else int(self.members[i])


class MicroBatch(NamedTuple):
    """Some completions of a rollout. What only fills up is zero. What only indexes is unsigned (JAX
    adds code for negative indices): do not subtract from it.
    """

    prompts: np.ndarray
    """int32 [P, S], padded"""
    prompt_lengths: np.ndarray
    """int32 [P], at least 1"""
    rows: np.ndarray
    """int32 [R, U]: completions, end token included, one after another"""
    segments: np.ndarray
    """int32 [R, U]: 1 on a row's first completion, 2 on its second, ...; 0 on padding"""
    row_prompts: np.ndarray
    """uint32 [R]: which prompt a row's completions answer"""
    members: np.ndarray
    """uint32 [P]: which of several adapters computes a prompt and its completions"""
    completions: np.ndarray
    """uint32 [N]: which of the rollout's each is; what only fills up is beyond their end"""
    places: np.ndarray
    """uint32 [M]: the slot of each token that is computed, among those of the prompts and then the
    rows, flattened; P S + R U where it only fills up"""
    starts: np.ndarray
    """uint32 [N]: where in the flattened rows a completion begins"""
    mask: np.ndarray
    """float32 [N, U]: 1 on tokens that are trained"""
    sampler_logprobs: np.ndarray
    """float32 [N, U], 0 where there is no token"""
    advantages: np.ndarray
    """float32 [N]"""

    @property
    def n_tokens(self) -> int:
        """Tokens computed, with those that only fill up."""
        return self.places.size


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
    m: int

    @property
    def n_slots(self) -> int:
        return self.p * self.s + self.r * self.u

    @property
    def cost(self) -> float:
        """In tokens."""
        return self.m + SLOT_COST * self.n_slots + BATCH_COST


def bucket(n: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128, ... that is >= n."""
    size = SMALLEST_BUCKET
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def width(longest: int, at_most: int) -> int:
    """The bucket of `at_most`, its half, its quarter, ...: the smallest that is >= longest."""
    size = bucket(max(longest, at_most))
    while size // 2 >= longest:
        size //= 2
    return size


def completion_mask(rows: Rows) -> np.ndarray:
    """float32 [N, longest completion]: 1 where a completion that is trained on has a token."""
    lengths = np.array([len(c) for c in rows.completions])
    trained = np.ones(len(lengths), bool) if rows.trained is None else rows.trained
    there = np.arange(lengths.max(initial=0)) < lengths[:, None]
    return (there & trained[:, None]).astype(np.float32)


def with_signal(advantages: np.ndarray) -> np.ndarray:
    """Indices of the rows whose advantage is not exactly zero; the first row if none has one, so
    that what is measured on trained tokens (entropy, sampler gap) is measured at every step."""
    index = np.flatnonzero(advantages)
    return index if len(index) else np.array([0])


def micro_batches(
    rows: Rows,
    index: np.ndarray,
    *,
    micro_batch_size: int,
    max_prompt_tokens: int,
    max_tokens: int,
    n_devices: int = 1,
) -> list[MicroBatch]:
    """The completions of `index` as micro-batches of one shape, which `n_devices` go through side
    by side.

    Each has at most as many tokens as micro_batch_size rows of the longest bucket, but has room for
    a prompt with a row. Shapes are few, since each is a compilation: prompts and rows are as wide
    as their limits or half as wide, and so on (but not too narrow: rows are shared), and a pair of
    widths has six (`_shapes`), of which it is the cheapest for this rollout. Nothing else decides,
    and no rollout before it: a resumed run and a replayed step sum in the same order.
    """
    if not len(index):
        return []
    plans = _plans(rows, index, micro_batch_size, max_prompt_tokens, max_tokens)
    shape, batches = min(plans, key=lambda plan: ceil(len(plan[1]) / n_devices) * plan[0].cost)
    return [_fill(rows, shape, parts) for parts in batches]


def emptied(batch: MicroBatch) -> MicroBatch:
    """One as large, of which nothing is trained: its sums are zero."""
    of_tokens = {name: np.zeros_like(getattr(batch, name)) for name in ("mask", "sampler_logprobs")}
    return batch._replace(advantages=np.zeros_like(batch.advantages), **of_tokens)


def largest_micro_batch(
    rows: Rows, *, micro_batch_size: int, max_prompt_tokens: int, max_tokens: int
) -> MicroBatch:
    """Of the shapes that rollouts as wide as this one have, the one that computes the most, full of
    it."""
    index = np.arange(len(rows.completions))
    plans = _plans(rows, index, micro_batch_size, max_prompt_tokens, max_tokens)
    shape, batches = max(plans, key=lambda plan: plan[0].cost)
    return _fill(rows, shape, batches[0])


def _plans(rows, index, micro_batch_size, max_prompt_tokens, max_tokens):
    """The shapes that a rollout may have, and how it is cut for each."""
    whose = lambda i: (rows.member(i), tuple(rows.prompts[i]))  # noqa: E731
    runs = [list(g) for _, g in groupby(range(len(rows.prompts)), whose)]  # either may come again
    run_of = [n for n, run in enumerate(runs) for _ in run]
    groups = [list(g) for _, g in groupby(index, run_of.__getitem__)]
    s = width(max(SMALLEST_PROMPT, *(len(rows.prompts[g[0]]) for g in groups)), max_prompt_tokens)
    u = width(max(SMALLEST_ROW, *(len(rows.completions[i]) for i in index)), max_tokens)
    packed = [_pack(rows, group, u) for group in groups]
    limit = micro_batch_size * bucket(max_prompt_tokens + max_tokens)
    shapes = _shapes(limit, s, u, max(map(len, runs)))
    return [(shape, _fill_up(rows, packed, shape)) for shape in shapes]


def _shapes(limit: int, s: int, u: int, g: int) -> list[Shape]:
    """Those that a rollout may have. One is for completions as long as they may be: whole groups, a
    row each, nothing left over. In the others prompts are as many as M tokens hold with their
    completions, if those are 0.4 times as long and prompts half as long as they may be, and one,
    since groups are cut."""
    p = max(1, limit // (s + g * u))
    r = max(1, min(p * g, (limit - p * s) // u))
    shapes = [Shape(p, s, r, u, g, p * s + r * u)]
    for m in (limit * eighths // 8 for eighths in EIGHTHS):
        if m >= s + u:
            r = ceil(ROOM * m / u)
            p = min(r, ceil(m / (0.5 * s + 0.4 * g * u)) + 1)
            shapes.append(Shape(p, s, r, u, g, min(m, p * s + r * u)))
    return shapes


def _row_tokens(rows: Rows, row: Sequence[int]) -> int:
    return sum(len(rows.completions[i]) for i in row)


def _prompt(rows: Rows, packed: Packed) -> Sequence[int]:
    return rows.prompts[packed[0][0]]


def _n_tokens(rows: Rows, parts: Sequence[Packed]) -> int:
    return sum(
        len(_prompt(rows, packed)) + sum(_row_tokens(rows, row) for row in packed)
        for packed in parts
    )


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


def _fill_up(rows: Rows, packed: Sequence[Packed], shape: Shape) -> list[list[Packed]]:
    """What goes into each micro-batch, one after another; where one is full, a prompt's rows are
    cut, and the prompt comes again in the next."""
    batches: list[list[Packed]] = []
    free_prompts = free_rows = free_tokens = 0
    for group in packed:
        there = False  # the prompt, in the last micro-batch
        for row in group:
            n, prompt = _row_tokens(rows, row), len(_prompt(rows, group))
            fits = free_rows and (
                free_tokens >= n if there else free_prompts and free_tokens >= n + prompt
            )
            if not fits:
                batches.append([])
                free_prompts, free_rows, free_tokens = shape.p, shape.r, shape.m
                there = False
            if not there:
                batches[-1].append([])
                free_prompts, free_tokens, there = free_prompts - 1, free_tokens - prompt, True
            batches[-1][-1].append(row)
            free_rows, free_tokens = free_rows - 1, free_tokens - n
    return batches


def _fill(rows: Rows, shape: Shape, parts: Sequence[Packed]) -> MicroBatch:
    n = shape.p * shape.g
    batch = MicroBatch(
        prompts=np.zeros((shape.p, shape.s), np.int32),
        prompt_lengths=np.ones(shape.p, np.int32),
        rows=np.zeros((shape.r, shape.u), np.int32),
        segments=np.zeros((shape.r, shape.u), np.int32),
        row_prompts=np.zeros(shape.r, np.uint32),
        members=np.zeros(shape.p, np.uint32),
        completions=np.full(n, len(rows.completions), np.uint32),
        places=np.arange(shape.m, dtype=np.uint32),
        starts=np.zeros(n, np.uint32),
        mask=np.zeros((n, shape.u), np.float32),
        sampler_logprobs=np.zeros((n, shape.u), np.float32),
        advantages=np.zeros(n, np.float32),
    )
    row = slot = 0
    for p, packed in enumerate(parts):
        prompt = _prompt(rows, packed)
        batch.prompts[p, : len(prompt)], batch.prompt_lengths[p] = prompt, len(prompt)
        batch.members[p] = rows.member(packed[0][0])
        for members in packed:
            batch.row_prompts[row] = p
            start = 0
            for segment, i in enumerate(members, 1):
                end = start + len(rows.completions[i])
                batch.rows[row, start:end] = rows.completions[i]
                batch.segments[row, start:end] = segment
                batch.completions[slot], batch.starts[slot] = i, row * shape.u + start
                batch.mask[slot, : end - start] = rows.trained is None or rows.trained[i]
                batch.sampler_logprobs[slot, : end - start] = rows.sampler_logprobs[i]
                batch.advantages[slot] = rows.advantages[i]
                slot, start = slot + 1, end
            row += 1
    if shape.m < shape.n_slots:  # else all slots are computed, used or not
        in_prompts = np.arange(shape.s) < batch.prompt_lengths[:, None]
        in_prompts[len(parts) :] = False
        used = np.flatnonzero(np.concatenate([in_prompts.ravel(), batch.segments.ravel()]))
        batch.places[:] = shape.n_slots
        batch.places[: len(used)] = used
    return batch
