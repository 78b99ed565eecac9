"""The embedded sampler: completions from the trainer's own model, without a server.

A prompt is prefilled once and its keys and values are shared by the G completions of its group; one
jitted loop decodes all rows in step until every row has ended. The loop runs in stages of growing
cache (32, 64, 128, ... tokens), so that attention never looks at more than twice what is there.

Axes beside the usual: P prompts, G completions of each, S prompt tokens, U generated tokens.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from jgrpo.policy import adapter as adapters
from jgrpo.policy.attention import MASKED, attention, causal_mask
from jgrpo.policy.backend import backend
from jgrpo.policy.batch import bucket
from jgrpo.policy.model import ModelConfig
from jgrpo.policy.tracing import traced
from jgrpo.rollout.protocol import Completion, Progress

FIRST_STAGE = 32


class Prefix(NamedTuple):
    """The prompts as the decode loop sees them."""

    keys: jax.Array
    """[L, P, S, K, C]"""
    values: jax.Array
    lengths: jax.Array
    """int32 [P]"""


class Decoding(NamedTuple):
    """The state of the loop: `t` tokens of every row are sampled, t - 1 of them are cached."""

    t: jax.Array
    tokens: jax.Array
    """int32 [P, G, U]"""
    logprobs: jax.Array
    """float32 [P, G, U]"""
    lengths: jax.Array
    """int32 [P, G]: tokens of the row so far, its end token included"""
    done: jax.Array
    """bool [P, G]"""
    keys: jax.Array
    """[L, P, G, U, K, C]"""
    values: jax.Array


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
        self._prefill = jax.jit(partial(_prefill, graph))
        self._decode = jax.jit(
            partial(_decode, graph, tuple(stop_token_ids)),
            static_argnames=("capacity", "greedy"),
        )
        self._first = jax.jit(
            partial(_first_tokens, tuple(stop_token_ids)), static_argnames=("group_size", "greedy")
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
        keys = _row_keys(np.resize(np.asarray(seeds, np.uint32), size), group_size)
        greedy, temperature = temperature == 0, temperature or 1.0
        top_p = top_p if top_p < 1 else None  # without it, nothing is sorted
        logits, prefix = self._prefill(self.adapter, self.base, ids, lengths)
        state = self._first(
            logits, prefix, keys, np.arange(size) < n, temperature, top_p,
            group_size=group_size, greedy=greedy,
        )  # fmt: skip
        capacity, told = min(FIRST_STAGE, max_tokens), (0, 0)
        while True:
            state = self._decode(
                self.adapter, self.base, prefix, keys, temperature, top_p,
                state=state, capacity=capacity, greedy=greedy,
            )  # fmt: skip
            if progress:
                done = int(state.done[:n].sum()), int(state.lengths[:n].sum())
                progress(done[0] - told[0], done[1] - told[1])
                told = done
            if capacity == max_tokens or bool(state.done.all()):
                break
            capacity = min(2 * capacity, max_tokens)
        if progress:
            progress(n * group_size - told[0], 0)
        return _completions(state, n)


def _completions(state: Decoding, n: int) -> list[list[Completion]]:
    tokens, logprobs, lengths, done = map(np.asarray, jax.device_get(
        (state.tokens, state.logprobs, state.lengths, state.done)
    ))  # fmt: skip
    return [
        [
            Completion(
                tokens[p, g, : lengths[p, g]].tolist(),
                logprobs[p, g, : lengths[p, g]].tolist(),
                "stop" if done[p, g] else "length",
            )
            for g in range(tokens.shape[1])
        ]
        for p in range(n)
    ]


@partial(jax.jit, static_argnames="group_size")
def _row_keys(seeds: jax.Array, group_size: int) -> jax.Array:
    """One key a row [P, G], from its prompt's seed and its place in the group alone."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(lambda seed: fold(jax.random.key(seed), jnp.arange(group_size)))(seeds)


def _pick(logits, keys, t, temperature, top_p, greedy):
    """float32 logits [P, G, V] -> token and logprob [P, G], at the temperature and top_p."""
    logits = logits / temperature
    if top_p is not None:
        logits = _nucleus(logits, top_p)
    if greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row)  # noqa: E731
        token = jax.vmap(jax.vmap(draw))(keys, logits)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _nucleus(logits, top_p):
    """The logits of the fewest likeliest tokens that have `top_p` of the probability; the others
    are masked (Holtzman et al. 2020). Tokens as likely as the last of them stay too."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, MASKED)


def _prefill(graph, adapter, base, ids, lengths) -> tuple[jax.Array, Prefix]:
    """Prompts [P, S] -> logits after the last token of each [P, V], and their prefix."""
    traced("prefill", "prompts {} x {}".format(*ids.shape))
    model = nnx.merge(graph, adapter, base)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    mask = causal_mask((positions < lengths[:, None]).astype(jnp.int32))
    attend = Partial(lambda mask, q, k, v, _: (attention(q, k, v, mask), (k, v)), mask)
    hidden, (keys, values) = model.model(ids, positions, attend)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), Prefix(keys, values, lengths)


def _first_tokens(
    stops, logits, prefix, keys, real, temperature, top_p=None, *, group_size, greedy
):
    """The state after the first token of every row; rows that only fill up are done already."""
    layers, p, _, kv_heads, c = prefix.keys.shape
    traced("first tokens", f"rows {p} x {group_size}")
    logits = jnp.broadcast_to(logits[:, None], (p, group_size, logits.shape[-1]))
    token, logprob = _pick(logits, keys, 0, temperature, top_p, greedy)
    empty = jnp.zeros((layers, p, group_size, 1, kv_heads, c), prefix.keys.dtype)
    return Decoding(
        t=jnp.ones((), jnp.int32),
        tokens=token[..., None].astype(jnp.int32),
        logprobs=logprob[..., None],
        lengths=jnp.ones((p, group_size), jnp.int32),
        done=jnp.isin(token, jnp.array(stops)) | ~real[:, None],
        keys=empty,
        values=empty,
    )


def _decode(
    graph, stops, adapter, base, prefix, keys, temperature, top_p=None, *, state, capacity, greedy
):
    """Decode until `capacity` tokens or until every row is done."""
    traced("decode", "rows {} x {}, up to {capacity}".format(*keys.shape, capacity=capacity))
    model = nnx.merge(graph, adapter, base)
    grow = lambda x, axis: jnp.pad(  # noqa: E731
        x, [(0, capacity - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    )
    state = Decoding(
        state.t,
        grow(state.tokens, 2),
        grow(state.logprobs, 2),
        *state[3:5],
        grow(state.keys, 3),
        grow(state.values, 3),
    )

    def step(s: Decoding) -> Decoding:
        previous = jax.lax.dynamic_index_in_dim(s.tokens, s.t - 1, axis=2, keepdims=False)
        positions = jnp.broadcast_to(prefix.lengths[:, None] + s.t - 1, previous.shape)
        attend = Partial(_attend_cached, prefix.lengths, s.t - 1)
        cache = (prefix.keys, prefix.values, s.keys, s.values)
        hidden, (k, v) = model.model(previous, positions, attend, cache)
        token, logprob = _pick(model.logits(hidden), keys, s.t, temperature, top_p, greedy)
        put = jax.lax.dynamic_update_index_in_dim
        return Decoding(
            t=s.t + 1,
            tokens=put(s.tokens, token.astype(jnp.int32), s.t, 2),
            logprobs=put(s.logprobs, logprob, s.t, 2),
            lengths=s.lengths + ~s.done,
            done=s.done | jnp.isin(token, jnp.array(stops)),
            keys=put(s.keys, k, s.t - 1, 3),
            values=put(s.values, v, s.t - 1, 3),
        )

    return jax.lax.while_loop(lambda s: (s.t < capacity) & ~s.done.all(), step, state)


def _attend_cached(prompt_lengths, n_cached, q, k, v, cache: Any):
    """One new token a row: q [P, G, H, C], its own k and v [P, G, K, C], and this layer's cache:
    the prompt's keys and values [P, S, K, C], shared by the group, and the row's [P, G, U, K, C].
    """
    prompt_k, prompt_v, row_k, row_v = cache
    p, g, h, c = q.shape
    q = q.reshape(p, g, k.shape[2], -1, c)
    f32 = {"preferred_element_type": jnp.float32}
    on_prompt = jnp.einsum("pgkhc,pskc->pgkhs", q, prompt_k, **f32)
    on_row = _scores(q, row_k)
    on_self = jnp.einsum("pgkhc,pgkc->pgkh", q, k, **f32)[..., None]
    s, u = prompt_k.shape[1], row_k.shape[2]
    in_prompt = (jnp.arange(s) < prompt_lengths[:, None])[:, None, None, None]
    on_prompt = jnp.where(in_prompt, on_prompt, MASKED)
    on_row = jnp.where(jnp.arange(u) < n_cached, on_row, MASKED)
    scores = jnp.concatenate([on_prompt, on_row, on_self], axis=-1) * c**-0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    w_prompt, w_row, w_self = jnp.split(weights, (s, s + u), axis=-1)
    out = jnp.einsum("pgkhs,pskc->pgkhc", w_prompt, prompt_v)
    out += _weighed(w_row, row_v) + w_self * v[:, :, :, None]
    return out.reshape(p, g, h, c), (k, v)


def _scores(q, row_k):
    """q [P, G, K, H / K, C] on the row's keys [P, G, U, K, C], float32 [P, G, K, H / K, U]."""
    if backend().cache_by_products:
        return jnp.einsum("pgkhc,pgukc->pgkhu", q, row_k, preferred_element_type=jnp.float32)
    q, row_k = q[:, :, None].astype(jnp.float32), row_k[:, :, :, :, None].astype(jnp.float32)
    return (q * row_k).sum(axis=-1).transpose(0, 1, 3, 4, 2)


def _weighed(weights, row_v):
    """The sums of the row's values by weights [P, G, K, H / K, U]."""
    if backend().cache_by_products:
        return jnp.einsum("pgkhu,pgukc->pgkhc", weights, row_v)
    by_token = weights.transpose(0, 1, 4, 2, 3)[..., None].astype(jnp.float32)
    return (by_token * row_v[:, :, :, :, None]).sum(axis=2).astype(row_v.dtype)
