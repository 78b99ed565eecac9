"""The embedded sampler: completions from the trainer's own model, without a server.

A prompt is prefilled once and its keys and values are shared by the G completions of its group; one
jitted loop decodes all rows in step (`decoding`). The loop runs in stages of growing cache (32, 64,
128, ... tokens), so that attention never looks at more than twice what is there; and where half of
its rows have ended it stops, and those that go on are packed into half the batch, or less.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgrpo.policy import adapter as adapters
from jgrpo.policy.batch import bucket
from jgrpo.policy.model import ModelConfig
from jgrpo.rollout.decoding import (
    Decoding,
    decode,
    first_tokens,
    grown,
    packed,
    prefill,
    row_keys,
)
from jgrpo.rollout.protocol import Completion, Progress

FIRST_STAGE = 32
HALVINGS, FEWEST_ROWS = 3, 16
"""How often a batch is halved at most, and down to how many rows: each size, at each stage that it
comes to, is a program."""


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
    """Fills `rollout.Sampler`. `max_rows` completions at most are decoded at once, or one group."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        adapter: nnx.State,
        base: nnx.State,
        *,
        stop_token_ids: Sequence[int],
        max_tokens: int,
        max_rows: int,
    ):
        self.adapter, self.base = adapter, base
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self._prefill = jax.jit(partial(prefill, graph))
        self._decode = jax.jit(
            partial(decode, graph, tuple(stop_token_ids)),
            static_argnames=("capacity", "greedy"),
            donate_argnames="state",
        )
        self._first = jax.jit(
            partial(first_tokens, tuple(stop_token_ids)), static_argnames=("group_size", "greedy")
        )

    def load(self, folder: Path) -> None:
        """Sample from the adapter in this PEFT folder from now on."""
        self.adapter = adapters.load(folder, self.adapter)

    def close(self) -> None:
        """Nothing to give back: the arrays are the trainer's."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
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
        completions: list[list[Completion]] = []
        for start in range(0, len(prompts), size):
            chunk = slice(start, start + size)
            completions += self._sample_chunk(
                prompts[chunk], seeds[chunk], size, group_size, temperature, top_p,
                max_tokens or self.max_tokens, progress,
            )  # fmt: skip
        return completions

    def _sample_chunk(
        self, prompts, seeds, size, group_size, temperature, top_p, max_tokens, progress
    ):
        n, width = len(prompts), bucket(max(map(len, prompts)))
        ids, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        keys = row_keys(np.resize(np.asarray(seeds, np.uint32), size), group_size)
        greedy, temperature = temperature == 0, temperature or 1.0
        top_p = top_p if top_p < 1 else None  # without it, nothing is sorted
        logits, prefix = self._prefill(self.adapter, self.base, ids, lengths)
        state = self._first(
            logits, prefix, keys, np.arange(size) < n, temperature, top_p,
            group_size=group_size, greedy=greedy,
        )  # fmt: skip
        # Each packed row has its prompt for itself, for which those that left must have made room.
        may_pack = group_size == 1 or width <= max_tokens
        halves = [size * group_size >> i for i in range(HALVINGS + 1 if may_pack else 1)]
        sizes = [m for i, m in enumerate(halves) if i == 0 or m >= FEWEST_ROWS]
        book = _Book(n * group_size, size * group_size, progress)
        capacity = min(FIRST_STAGE, max_tokens)
        state = grown(state, capacity=capacity)
        while True:
            smaller = max((m for m in sizes if m < keys.size), default=0)
            state = self._decode(
                self.adapter, self.base, prefix, keys, temperature, top_p, smaller,
                state=state, capacity=capacity, greedy=greedy,
            )  # fmt: skip
            going, t = book.enter(state), int(state.t)
            if not going.size or t == max_tokens:
                return book.close(state, group_size)
            if going.size <= smaller:
                n_rows = min(m for m in sizes if m >= going.size)
                book.leave_all_but(going, state)
                prefix, keys, state = packed(prefix, keys, state, going, n_rows)
            if t == capacity:
                capacity = min(2 * capacity, max_tokens)
                state = grown(state, capacity=capacity)


class _Book:
    """What has become of the rows, which are numbered as at the start; the batch has fewer and
    fewer of them. The first `n_real` are asked for, the others fill up the batch."""

    def __init__(self, n_real: int, n_rows: int, progress: Progress | None):
        self.rows = np.arange(n_rows)  # those in the batch
        self.completions: list[Any] = [None] * n_real
        self.lengths, self.done = np.ones(n_rows, int), np.zeros(n_rows, bool)
        self.progress, self.told = progress, (0, 0)

    def enter(self, state: Decoding) -> np.ndarray:
        """Look at the state, tell of what is new -> the places in the batch of rows that go on."""
        lengths, done = (x.reshape(-1) for x in jax.device_get((state.lengths, state.done)))
        n = len(self.rows)
        self.lengths[self.rows], self.done[self.rows] = lengths[:n], done[:n]
        real = slice(len(self.completions))
        self._tell(int(self.done[real].sum()), int(self.lengths[real].sum()))
        return np.flatnonzero(~done)

    def leave_all_but(self, going: np.ndarray, state: Decoding) -> None:
        """The others' completions are taken out of the state."""
        tokens, logprobs = (
            x.reshape(-1, x.shape[-1]) for x in jax.device_get((state.tokens, state.logprobs))
        )
        stays = np.isin(np.arange(len(self.rows)), going)
        for place, row in enumerate(self.rows):
            if row < len(self.completions) and not stays[place]:
                n = self.lengths[row]
                self.completions[row] = Completion(
                    tokens[place, :n].tolist(),
                    logprobs[place, :n].tolist(),
                    "stop" if self.done[row] else "length",
                )
        self.rows = self.rows[going]

    def close(self, state: Decoding, group_size: int) -> list[list[Completion]]:
        self.leave_all_but(np.array([], int), state)
        self._tell(len(self.completions), self.told[1])
        starts = range(0, len(self.completions), group_size)
        return [self.completions[start : start + group_size] for start in starts]

    def _tell(self, completions: int, tokens: int) -> None:
        if self.progress:
            self.progress(completions - self.told[0], tokens - self.told[1])
        self.told = completions, tokens
