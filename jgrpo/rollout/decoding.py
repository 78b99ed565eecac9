"""The embedded sampler's programs, on arrays alone: prompts are prefilled, rows are decoded in step
as far as their cache has room, and are packed into a smaller batch or given more room.

Axes beside the usual: P prompts, G completions of each, S prompt tokens, U generated tokens. Once
packed, P are groups of one prompt each, which may have several. What comes to be one value a prompt
[P] or a row [P, G] is packed alike. Each device of a mesh has rows of its own, as many as any
other, and all sample the same number of tokens: what is written here is what one does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from jgrpo.policy.attention import MASKED, attention, causal_mask
from jgrpo.policy.backend import backend
from jgrpo.policy.lora import own_columns, rank_of, side_by_side
from jgrpo.policy.model import Decoder
from jgrpo.policy.tracing import traced


class Prefix(NamedTuple):
    """The prompts as the decode loop sees them."""

    keys: jax.Array
    """[L, P, S, K, C]"""
    values: jax.Array
    lengths: jax.Array
    """int32 [P]"""
    members: jax.Array
    """uint32 [P]: which of several adapters computes each"""


class Decoding(NamedTuple):
    """The state of the loop: `t` tokens of a row are sampled, unless it has ended before, and t - 1
    of them are cached."""

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
    """[L, P, G, K, C, U]: so that a product's sums lie beside each other"""
    values: jax.Array
    """[L, P, G, K, U, C]"""


def row_keys(seeds: jax.Array, *, group_size: int) -> jax.Array:
    """One key a row [P, G], from its prompt's seed and its place in the group alone."""
    traced("random keys", f"rows {len(seeds)} x {group_size}")
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


def merged(graph, scales, ranks, adapter, base, members) -> tuple[Decoder, jax.Array | None]:
    """The model with its adapter, or those of several members, and which columns of that are each
    prompt's [P, 1, R]."""
    model = nnx.merge(graph, side_by_side(adapter, scales, ranks), base)
    if len(scales) == 1:  # perhaps without an adapter
        return model, None
    return model, own_columns(members[:, None], ranks or [rank_of(adapter)] * len(scales))


def prefill(model_of, adapter, base, ids, lengths, members) -> tuple[jax.Array, Prefix]:
    """Prompts [P, S] -> logits after the last token of each [P, V], and their prefix."""
    traced("prefill", "prompts {} x {}".format(*ids.shape))
    model, own = model_of(adapter, base, members)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    mask = causal_mask((positions < lengths[:, None]).astype(jnp.int32))
    attend = Partial(lambda mask, q, k, v, _: (attention(q, k, v, mask), (k, v)), mask)
    hidden, (keys, values) = model.model(ids, positions, attend, own=own)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), Prefix(keys, values, lengths, members)


def first_tokens(stops, logits, prefix, keys, real, temperature, top_p, *, group_size, greedy):
    """The state after the first token of every row; rows that only fill up are done already."""
    layers, p, _, kv_heads, c = prefix.keys.shape
    traced("first tokens", f"rows {p} x {group_size}")
    logits = jnp.broadcast_to(logits[:, None], (p, group_size, logits.shape[-1]))
    token, logprob = _pick(logits, keys, 0, temperature, top_p, greedy)
    empty = jnp.zeros((layers, p, group_size, kv_heads, c, 1), prefix.keys.dtype)
    return Decoding(
        t=jnp.ones((), jnp.int32),
        tokens=token[..., None].astype(jnp.int32),
        logprobs=logprob[..., None],
        lengths=jnp.ones((p, group_size), jnp.int32),
        done=jnp.isin(token, jnp.array(stops)) | ~real[:, None],
        keys=empty,
        values=jnp.swapaxes(empty, 4, 5),
    )


def decode(
    model_of, stops, largest, adapter, base, prefix, keys, temperature, top_p, smaller, width,
    state, *, capacity, greedy,
):  # fmt: skip
    """Decode until `capacity` tokens, which the state has room for, or until on each device
    `smaller` groups of `width` have room for all rows that go on (`largest`: of all devices)."""
    traced("decode", "rows {} x {}, up to {capacity}".format(*keys.shape, capacity=capacity))
    model, own = model_of(adapter, base, prefix.members)

    def step(carry):
        s, _ = carry
        previous = jax.lax.dynamic_index_in_dim(s.tokens, s.t - 1, axis=2, keepdims=False)
        positions = jnp.broadcast_to(prefix.lengths[:, None] + s.t - 1, previous.shape)
        attend = Partial(_attend_cached, prefix.lengths, s.t - 1)
        cache = (prefix.keys, prefix.values, s.keys, s.values)
        hidden, (k, v) = model.model(previous, positions, attend, cache, own=own)
        token, logprob = _pick(model.logits(hidden), keys, s.t, temperature, top_p, greedy)
        put = jax.lax.dynamic_update_index_in_dim
        s = Decoding(
            t=s.t + 1,
            tokens=put(s.tokens, token.astype(jnp.int32), s.t, 2),
            logprobs=put(s.logprobs, logprob, s.t, 2),
            lengths=s.lengths + ~s.done,
            done=s.done | jnp.isin(token, jnp.array(stops)),
            keys=put(s.keys, k, s.t - 1, 5),
            values=put(s.values, v, s.t - 1, 4),
        )
        return s, needed(s.done)

    needed = lambda done: largest(-(-(~done).sum(axis=1) // width).sum())  # noqa: E731
    goes_on = lambda carry: (carry[0].t < capacity) & (carry[1] > smaller)  # noqa: E731
    return jax.lax.while_loop(goes_on, step, (state, needed(state.done)))[0]


def grown(state: Decoding, *, capacity: int) -> Decoding:
    """With room for `capacity` tokens a row."""
    traced("room for tokens", str(capacity))
    grow = lambda x, axis: jnp.pad(  # noqa: E731
        x, [(0, capacity - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    )
    return state._replace(
        tokens=grow(state.tokens, 2),
        logprobs=grow(state.logprobs, 2),
        keys=grow(state.keys, 5),
        values=grow(state.values, 4),
    )


def packed(take: Callable, prefix: Prefix, keys: jax.Array, state: Decoding, places, done):
    """Rows by their places among a device's P G, as groups of one prompt each [P', G'], -1 where
    one only fills up, and is `done` -> prefix, keys and state. `take` is `taken`, compiled.

    The arrays given are deleted, each as soon as it is packed: not all are there twice at a time.
    """

    def of_rows(x, axis=0, whole_groups=False):
        new = take(x, places, axis=axis, group_size=keys.shape[1], whole_groups=whole_groups)
        x.delete()
        return new

    def of_prompts(x, axis=0):
        return of_rows(x, axis, whole_groups=True)

    prefix = Prefix(
        of_prompts(prefix.keys, 1),
        of_prompts(prefix.values, 1),
        of_prompts(prefix.lengths),
        of_prompts(prefix.members),
    )
    state = state._replace(
        tokens=of_rows(state.tokens),
        logprobs=of_rows(state.logprobs),
        lengths=of_rows(state.lengths),
        done=done,
        keys=of_rows(state.keys, 1),
        values=of_rows(state.values, 1),
    )
    return prefix, of_rows(keys), state


def taken(x, places, *, axis: int, group_size: int, whole_groups: bool) -> jax.Array:
    """x [.., P, G, ..] by row [P', G'], or x [.., P, ..] by prompt [P'], as `packed` has them."""
    traced("packing", "rows {} x {}".format(*places.shape))
    first = jnp.maximum(places[:, :1], 0)
    rows = jnp.where(places < 0, first, places).astype(jnp.uint32)
    prompts, in_group = rows // group_size, rows % group_size
    index = (prompts[:, 0],) if whole_groups else (prompts, in_group)
    return x[(slice(None),) * axis + index]


def _attend_cached(prompt_lengths, n_cached, q, k, v, cache: Any):
    """One new token a row: q [P, G, H, C], its own k and v [P, G, K, C], and this layer's cache:
    the prompt's keys and values [P, S, K, C], shared by the group, and the row's as in `Decoding`.
    """
    prompt_k, prompt_v, row_k, row_v = cache
    p, g, h, c = q.shape
    q = q.reshape(p, g, k.shape[2], -1, c)
    f32 = {"preferred_element_type": jnp.float32}
    on_prompt = jnp.einsum("pgkhc,pskc->pgkhs", q, prompt_k, **f32)
    on_row = _scores(q, row_k)
    on_self = jnp.einsum("pgkhc,pgkc->pgkh", q, k, **f32)[..., None]
    s, u = prompt_k.shape[1], row_k.shape[-1]
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
    """q [P, G, K, H / K, C] on the row's keys [P, G, K, C, U], float32 [P, G, K, H / K, U]."""
    if backend().cache_by_products:
        return jnp.einsum("pgkhc,pgkcu->pgkhu", q, row_k, preferred_element_type=jnp.float32)
    q, row_k = (x.astype(jnp.float32) for x in (q[..., None], row_k[:, :, :, None]))
    return (q * row_k).sum(axis=-2)


def _weighed(weights, row_v):
    """The sums of the row's values by weights [P, G, K, H / K, U]."""
    if backend().cache_by_products:
        return jnp.einsum("pgkhu,pgkuc->pgkhc", weights, row_v)
    weights = weights[..., None].astype(jnp.float32)
    return (weights * row_v[:, :, :, None]).sum(axis=-2).astype(row_v.dtype)
