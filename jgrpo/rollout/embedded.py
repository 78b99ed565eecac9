"""The embedded sampler: completions from the trainer's own model, without a server.

A prompt is prefilled once and its keys and values are shared by the G completions of its group; one
jitted loop decodes all rows in step (`decoding`). The loop runs in stages of growing cache (16, 32,
64, ... tokens), so that attention never looks at more than twice what is there; and where half of
its rows have ended it stops, and those that go on are packed into half the batch, or less.

Prompts are dealt out to the devices in turn, and each decodes its own, in step with the others: the
rows of the one that has the most left say when all pack. Nothing but that number is exchanged, and
where the base is cut a layer's kernels at each token.
"""

import copy
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jgrpo.errors import RunError
from jgrpo.policy import adapter as adapters
from jgrpo.policy.backend import Backend, backend
from jgrpo.policy.batch import bucket
from jgrpo.policy.mesh import (
    fetched,
    gathered_when_read,
    handed_out,
    largest,
    make_mesh,
    on_each,
    placed,
)
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
    taken,
)
from jgrpo.rollout.protocol import Completion, Progress

FIRST_STAGE = 16
STATE = Decoding(t="all", **dict.fromkeys(Decoding._fields[1:], "each"))  # type: ignore
"""Where it lies."""
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
    """Fills `rollout.Sampler`. `max_rows` completions at most are decoded at once by each device of
    `mesh` (else all), or one group. `adapter` is one, or those of several members, [E, ...]
    (`scales` and `ranks` as in `lora.side_by_side`)."""

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
        ranks: Sequence[int] | None = None,
        mesh: Mesh | None = None,
    ):
        self.mesh = mesh = make_mesh() if mesh is None else mesh
        self.adapter, self.base = adapter, placed(mesh, base, "base")
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self.is_closed = False
        self.programs = _programs(
            graph, tuple(scales), tuple(ranks) if ranks else None, tuple(stop_token_ids), mesh,
            backend(),
        )  # fmt: skip

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
        size, n_devices = max(1, self.max_rows // group_size), self.mesh.size
        while size * n_devices >= 4 * max(len(prompts), n_devices):
            size //= 4  # few sizes: each is a compilation
        members = members or [0] * len(prompts)
        completions: list[list[Completion]] = []
        for start in range(0, len(prompts), size * n_devices):
            chunk = slice(start, start + size * n_devices)
            completions += self._sample_chunk(
                prompts[chunk], seeds[chunk], members[chunk], size, group_size, temperature, top_p,
                max_tokens or self.max_tokens, progress,
            )  # fmt: skip
        return completions

    def _sample_chunk(
        self, prompts, seeds, members, size, group_size, temperature, top_p, max_tokens, progress
    ):
        n, width = len(prompts), bucket(max(map(len, prompts)))
        order = np.arange(self.mesh.size * size).reshape(size, -1).T  # of each device its prompts
        ids, lengths = np.zeros((order.size, width), np.int32), np.ones(order.size, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        whose, seeds = (np.resize(np.asarray(x, np.uint32), order.size) for x in (members, seeds))
        of_prompts = ids, lengths, whose, seeds, np.arange(order.size) < n
        *asked, seeds, real = handed_out(self.mesh, [x[order.ravel()] for x in of_prompts])
        greedy, temperature = temperature == 0, temperature or 1.0
        top_p = top_p if top_p < 1 else None  # without it, nothing is sorted
        policy = placed(self.mesh, self.adapter, "all"), self.base
        keys = self.programs.keys(seeds, group_size=group_size)
        logits, prefix = self.programs.prefill(*policy, *asked)
        state = self.programs.first(
            logits, prefix, keys, real, temperature, top_p, group_size=group_size, greedy=greedy
        )
        # Packed groups are smaller, for which the rows that left must have made room.
        pair, n_rows = min(group_size, PACKED_GROUP), size * group_size
        may_pack = group_size == 1 or width <= max_tokens
        halves = [n_rows >> i for i in range(1, HALVINGS + 1) if may_pack]
        sizes = [m // pair for m in halves if m >= FEWEST_ROWS]  # in groups
        book = _Book(n, order, group_size, progress)
        capacity = min(FIRST_STAGE, max_tokens)
        state = self.programs.grown(state, capacity=capacity)
        while True:
            if self.is_closed:
                raise RunError("the sampler was closed before all was sampled")
            smaller = max((m for m in sizes if m * pair < book.rows.shape[1]), default=0)
            state = self.programs.decode(
                *policy, prefix, keys, temperature, top_p, smaller, pair, state,
                capacity=capacity, greedy=greedy,
            )  # fmt: skip
            groups, t = book.enter(state, pair), int(state.t)
            if not (most := max(map(len, groups))) or t == max_tokens:
                return book.close(state)
            if most <= smaller:
                places = book.pack(groups, min(m for m in sizes if m >= most), pair, state)
                handed = handed_out(self.mesh, (places, places < 0))
                prefix, keys, state = packed(self.programs.take, prefix, keys, state, *handed)
            if t == capacity:
                capacity = min(2 * capacity, max_tokens)
                state = self.programs.grown(state, capacity=capacity)


class Programs(NamedTuple):
    """`decoding`'s, compiled."""

    keys: Any
    prefill: Any
    first: Any
    decode: Any
    grown: Any
    take: Any


@lru_cache(maxsize=8)
def _programs(
    graph: nnx.GraphDef,
    scales: tuple[float, ...],
    ranks: tuple[int, ...] | None,
    stops: tuple[int, ...],
    mesh: Mesh,
    backend: Backend,
) -> Programs:
    """The same for the same arguments: samplers of one process that ask for the same compile once.
    The last few are kept; `backend` is what the programs are traced for."""

    def model_of(adapter, base, members):
        whole = gathered_when_read(mesh, base)
        return merged(graph, scales, ranks, adapter, whole, members)

    def on(function, given: str, gives: Any, static: str, **options) -> Any:
        where = [STATE if w == "state" else w for w in given.split()]
        return on_each(mesh, function, where, gives, static=static.split(), **options)

    return Programs(
        keys=on(row_keys, "each", "each", "group_size"),
        prefill=on(partial(prefill, model_of), "all base each each each", "each", ""),
        first=on(
            partial(first_tokens, stops), "each each each each all all", STATE, "group_size greedy"
        ),
        decode=on(
            partial(decode, model_of, stops, partial(largest, mesh)),
            "all base each each all all all all state", STATE, "capacity greedy", donated=[8],
        ),
        grown=on(grown, "state", STATE, "capacity"),
        take=on(taken, "each each", "each", "axis group_size whole_groups"),
    )  # fmt: skip


class _Book:
    """What has become of the rows, which are numbered as at the start; the batch has fewer and
    fewer of them. Those of the first n prompts are asked for, the others fill up the batch.
    `order` [D, P]: which prompts each device has."""

    def __init__(self, n: int, order: np.ndarray, group_size: int, progress: Progress | None):
        rows = order[..., None] * group_size + np.arange(group_size)
        self.rows = rows.reshape(len(order), -1)  # by place on each device; -1: none
        self.group_size = group_size
        self.completions: list[Any] = [None] * (n * group_size)
        self.lengths, self.done = np.ones(rows.size, int), np.zeros(rows.size, bool)
        self.progress, self.told = progress, (0, 0)

    def enter(self, state: Decoding, width: int) -> list[list[list[int]]]:
        """Look at the state, tell of what is new -> of each device the places of rows that go on,
        in groups of one prompt, `width` at most."""
        found = fetched((state.lengths, state.done))
        lengths, done = (x.reshape(self.rows.shape) for x in found)
        there = self.rows >= 0
        self.lengths[self.rows[there]], self.done[self.rows[there]] = lengths[there], done[there]
        real = slice(len(self.completions))
        self._tell(int(self.done[real].sum()), int(self.lengths[real].sum()))
        return [self._grouped(*device, width) for device in zip(self.rows, done, strict=True)]

    def _grouped(self, rows: np.ndarray, done: np.ndarray, width: int) -> list[list[int]]:
        of_prompt: dict[int, list[int]] = {}
        for place in np.flatnonzero(~done).tolist():
            of_prompt.setdefault(rows[place] // self.group_size, []).append(place)
        return [g[i : i + width] for g in of_prompt.values() for i in range(0, len(g), width)]

    def pack(self, groups: list[list[list[int]]], n: int, width: int, state: Decoding):
        """The groups' places [D n, width], -1 where there is none; completions of rows that leave
        are taken out of the state."""
        places = np.full((len(groups), n, width), -1)
        for of_device, found in zip(places, groups, strict=True):
            for row, group in zip(of_device, found, strict=False):
                row[: len(group)] = group
        by_device = places.reshape(len(groups), -1)
        self._take_out(state, stays=by_device)
        now = np.take_along_axis(self.rows, np.maximum(by_device, 0), axis=1)
        self.rows = np.where(by_device < 0, -1, now)
        return places.reshape(-1, width)

    def close(self, state: Decoding) -> list[list[Completion]]:
        """All completions [P][G]."""
        self._take_out(state, stays=np.full((len(self.rows), 1), -1))
        self._tell(len(self.completions), self.told[1])
        starts, g = range(0, len(self.completions), self.group_size), self.group_size
        return [self.completions[start : start + g] for start in starts]

    def _take_out(self, state: Decoding, stays: np.ndarray) -> None:
        found = fetched((state.tokens, state.logprobs))
        tokens, logprobs = (x.reshape(*self.rows.shape, -1) for x in found)
        leaves = (self.rows >= 0) & (self.rows < len(self.completions))
        for of_device, places in zip(leaves, stays, strict=True):
            of_device[places[places >= 0]] = False
        for place in zip(*np.nonzero(leaves), strict=True):
            row, n = self.rows[place], self.lengths[self.rows[place]]
            self.completions[row] = Completion(
                tokens[place][:n].tolist(),
                logprobs[place][:n].tolist(),
                "stop" if self.done[row] else "length",
            )

    def _tell(self, completions: int, tokens: int) -> None:
        if self.progress:
            self.progress(completions - self.told[0], tokens - self.told[1])
        self.told = completions, tokens
