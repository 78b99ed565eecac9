"""The embedded sampler: completions from the trainer's own model, without a server.

A prompt is prefilled once and its keys and values are shared by the G completions of its group; one
jitted loop decodes all rows in step (`decoding`). The loop runs in stages of growing cache (16, 32,
64, ... tokens), so that attention never looks at more than twice what is there; and where half of
its rows have ended it stops, and those that go on are packed into half the batch, or less.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgrpo.errors import RunError
from jgrpo.policy import adapter as adapters
from jgrpo.policy.batch import bucket
from jgrpo.policy.model import ModelConfig
from jgrpo.rollout.decoding import (
    Decoding,
    decode,
    first_tokens,
    grown,
    merged,
    packed,
    prefill,
    row_keys,
)
from jgrpo.rollout.protocol import Completion, Progress

FIRST_STAGE = 16
HALVINGS, FEWEST_ROWS = 3, 16
"""How often a batch is halved at most, and down to how many rows: each size, at each stage that it
comes to, is a program."""
PACKED_GROUP = 2
"""Completions of a prompt that share its keys and values once they are packed: more of them leave
more places empty."""


def rows_that_fit(
    model: ModelConfig,
    dtype: str,
    free: int,
    *,
    n_rows: int,
    group_size: int,
    longest: int,
    max_tokens: int,
) -> int:
    """Of n_rows completions those that are decoded at once: all, or a half, a quarter, ... of them
    (each number is a compilation), so that what is cached of them, of the stage before and of their
    prompts of at most `longest` tokens, and their logits, fits into `free` bytes."""
    a_token = 2 * model.n_layers * model.n_kv_heads * model.head_width * jnp.dtype(dtype).itemsize
    cached = max_tokens + min(max_tokens, max(FIRST_STAGE, max_tokens / 2)) + longest / group_size
    a_row = a_token * cached + 4 * 4 * model.vocab_size
    while n_rows > group_size and n_rows * a_row > free:
        n_rows = max(group_size, n_rows // 2)
    return n_rows


class JaxSampler:
    """Fills `rollout.Sampler`. `max_rows` completions at most are decoded at once, or one group.
    `adapter` is one, or those of several members, [E, ...] (`scales` as in `lora.side_by_side`)."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        adapter: nnx.State,
        base: nnx.State,
        *,
        stop_token_ids: Sequence[int],
        max_tokens: int,
        max_rows: int,
        scales: Sequence[float] = (1.0,),
    ):
        self.adapter, self.base = adapter, base
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self.is_closed = False
        model_of = partial(merged, graph, tuple(scales))
        self._prefill = jax.jit(partial(prefill, model_of))
        self._decode = jax.jit(
            partial(decode, model_of, tuple(stop_token_ids)),
            static_argnames=("capacity", "greedy"),
            donate_argnames="state",
        )
        self._first = jax.jit(
            partial(first_tokens, tuple(stop_token_ids)), static_argnames=("group_size", "greedy")
        )

    def load(self, *folders: Path) -> None:
        """Sample from the adapters in these PEFT folders from now on."""
        self.adapter = adapters.load_all(folders, self.adapter)

    def held(self) -> "JaxSampler":
        """As `rollout.Sampler.held`; the programs are the same."""
        return copy.copy(self)

    def close(self) -> None:
        """Nothing to give back: the arrays are the trainer's."""
        self.is_closed = True

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        members: Sequence[int] | None = None,
        group_size: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """As `rollout.Sampler.sample`; the logprobs equal the trainer's (1e-4 in float32)."""
        size = max(1, self.max_rows // group_size)
        while size >= 4 * len(prompts):  # few sizes: each is a compilation
            size //= 4
        members = members or [0] * len(prompts)
        completions: list[list[Completion]] = []
        for start in range(0, len(prompts), size):
            chunk = slice(start, start + size)
            completions += self._sample_chunk(
                prompts[chunk], seeds[chunk], members[chunk], size, group_size, temperature, top_p,
                max_tokens or self.max_tokens, progress,
            )  # fmt: skip
        return completions

    def _sample_chunk(
        self, prompts, seeds, members, size, group_size, temperature, top_p, max_tokens, progress
    ):
        n, width = len(prompts), bucket(max(map(len, prompts)))
        ids, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        keys = row_keys(np.resize(np.asarray(seeds, np.uint32), size), group_size)
        whose = np.resize(np.asarray(members, np.uint32), size)
        greedy, temperature = temperature == 0, temperature or 1.0
        top_p = top_p if top_p < 1 else None  # without it, nothing is sorted
        logits, prefix = self._prefill(self.adapter, self.base, ids, lengths, whose)
        state = self._first(
            logits, prefix, keys, np.arange(size) < n, temperature, top_p,
            group_size=group_size, greedy=greedy,
        )  # fmt: skip
        # Packed groups are smaller, for which the rows that left must have made room.
        pair, n_rows = min(group_size, PACKED_GROUP), size * group_size
        may_pack = group_size == 1 or width <= max_tokens
        halves = [n_rows >> i for i in range(1, HALVINGS + 1) if may_pack]
        sizes = [m // pair for m in halves if m >= FEWEST_ROWS]  # in groups
        book = _Book(n, size, group_size, progress)
        capacity = min(FIRST_STAGE, max_tokens)
        state = grown(state, capacity=capacity)
        while True:
            if self.is_closed:
                raise RunError("the sampler was closed before all was sampled")
            smaller = max((m for m in sizes if m * pair < keys.size), default=0)
            state = self._decode(
                self.adapter, self.base, prefix, keys, temperature, top_p, smaller, pair,
                state=state, capacity=capacity, greedy=greedy,
            )  # fmt: skip
            groups, t = book.enter(state, pair), int(state.t)
            if not groups or t == max_tokens:
                return book.close(state)
            if len(groups) <= smaller:
                n_groups = min(m for m in sizes if m >= len(groups))
                places = book.pack(groups, n_groups, pair, state)
                prefix, keys, state = packed(prefix, keys, state, places)
            if t == capacity:
                capacity = min(2 * capacity, max_tokens)
                state = grown(state, capacity=capacity)


class _Book:
    """What has become of the rows, which are numbered as at the start; the batch has fewer and
    fewer of them. Those of the first n prompts are asked for, the others fill up the batch."""

    def __init__(self, n: int, size: int, group_size: int, progress: Progress | None):
        self.rows = np.arange(size * group_size)  # by place in the batch; -1: none
        self.group_size = group_size
        self.completions: list[Any] = [None] * (n * group_size)
        self.lengths, self.done = np.ones(len(self.rows), int), np.zeros(len(self.rows), bool)
        self.progress, self.told = progress, (0, 0)

    def enter(self, state: Decoding, width: int) -> list[list[int]]:
        """Look at the state, tell of what is new -> the places in the batch of rows that go on, in
        groups of one prompt, `width` at most."""
        lengths, done = (x.reshape(-1) for x in jax.device_get((state.lengths, state.done)))
        there = self.rows >= 0
        self.lengths[self.rows[there]], self.done[self.rows[there]] = lengths[there], done[there]
        real = slice(len(self.completions))
        self._tell(int(self.done[real].sum()), int(self.lengths[real].sum()))
        of_prompt: dict[int, list[int]] = {}
        for place in np.flatnonzero(~done).tolist():
            of_prompt.setdefault(self.rows[place] // self.group_size, []).append(place)
        return [g[i : i + width] for g in of_prompt.values() for i in range(0, len(g), width)]

    def pack(self, groups: list[list[int]], n: int, width: int, state: Decoding) -> np.ndarray:
        """The groups' places [n, width], -1 where there is none; completions of rows that leave are
        taken out of the state."""
        places = np.full((n, width), -1)
        for row, group in zip(places, groups, strict=False):
            row[: len(group)] = group
        self._take_out(state, stays=places)
        self.rows = np.where(places < 0, -1, self.rows[places]).reshape(-1)
        return places

    def close(self, state: Decoding) -> list[list[Completion]]:
        """All completions [P][G]."""
        self._take_out(state, stays=np.array([], int))
        self._tell(len(self.completions), self.told[1])
        starts, g = range(0, len(self.completions), self.group_size), self.group_size
        return [self.completions[start : start + g] for start in starts]

    def _take_out(self, state: Decoding, stays: np.ndarray) -> None:
        tokens, logprobs = (
            x.reshape(-1, x.shape[-1]) for x in jax.device_get((state.tokens, state.logprobs))
        )
        leaves = (self.rows >= 0) & (self.rows < len(self.completions))
        leaves[stays[stays >= 0]] = False
        for place in np.flatnonzero(leaves).tolist():
            row, n = self.rows[place], self.lengths[self.rows[place]]
            self.completions[row] = Completion(
                tokens[place, :n].tolist(),
                logprobs[place, :n].tolist(),
                "stop" if self.done[row] else "length",
            )

    def _tell(self, completions: int, tokens: int) -> None:
        if self.progress:
            self.progress(completions - self.told[0], tokens - self.told[1])
        self.told = completions, tokens
