"""Log-probability of each token given the ones before it: the only place that shifts by one, and
the only one that divides by the temperature.

The head (D -> V) runs over chunks of the tokens that are trained, so that no [N, T, V] array ever
exists; prompt and padding tokens do not reach it (but for those that fill up the last chunk).
"""

from functools import partial

import jax
import jax.numpy as jnp

from jgrpo.model import Decoder, full_attention, positions_in

HEAD_CHUNK_FLOATS = 2**24
"""Logits in memory at once (64 MiB in float32); the chunk's backward pass needs a few such."""


def token_logprobs(
    model: Decoder,
    ids: jax.Array,
    segments: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    checkpoint: bool = False,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """ids, segments, mask [N, T] -> logprobs and entropies, float32 [N, T], 0 where mask is 0.

    logprobs[n, t] = log softmax(logits[n, t-1] / temperature)[ids[n, t]], and entropies[n, t] is
    that distribution's entropy in nats (without a gradient, unless `entropy_gradient`). The first
    token of a segment has none: its mask must be 0. The gradient is that of the hidden states; the
    head is frozen.
    """
    hidden, _ = model.model(
        ids, positions_in(segments), full_attention(segments), checkpoint=checkpoint
    )
    before = jnp.roll(hidden, 1, axis=1).reshape(-1, hidden.shape[-1])
    head = _head(model, temperature)
    values = _chunked(
        head, before, ids.reshape(-1), mask.reshape(-1) > 0,
        chunk=_chunk_rows(model.config.vocab_size), entropy_gradient=entropy_gradient,
    )  # fmt: skip
    logprobs, entropies = (v.reshape(ids.shape) for v in values)
    return logprobs, entropies


def _head(model, temperature):
    """hidden [M, D], targets [M] -> the targets' logprobs, and the entropies [M]."""

    def head(hidden, targets):
        logits = model.logits(hidden) / temperature
        log_z = jax.nn.logsumexp(logits, axis=-1)
        logprobs = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - log_z
        entropies = log_z - jnp.sum(jnp.exp(logits - log_z[:, None]) * logits, axis=-1)
        return logprobs, entropies

    return head


def _chunked(head, hidden, targets, wanted, *, chunk, entropy_gradient):
    """`head` of the wanted rows of hidden [M, D], a chunk at a time; 0 for the others.

    Where a gradient is asked for, that of each logprob (and entropy) by its hidden state [M, D] is
    computed with it and kept, so that the backward pass does not come to the head again.
    (Differentiating through the scan would save the kernel once a chunk: JAX stacks what a cond
    keeps.)
    """

    def head_and_gradients(hidden, targets):
        logprobs, of_logprobs, entropies = jax.vjp(lambda h: head(h, targets), hidden, has_aux=True)
        gradients = of_logprobs(jnp.ones_like(logprobs))
        if entropy_gradient:
            _, of_entropies = jax.vjp(lambda h: head(h, targets)[1], hidden)
            gradients += of_entropies(jnp.ones_like(entropies))
        return (logprobs, entropies), gradients

    rows = partial(_by_chunks, wanted=wanted, chunk=chunk)

    @jax.custom_vjp
    def run(hidden):
        return rows(head, hidden, targets)

    def forward(hidden):
        return rows(head_and_gradients, hidden, targets)

    def backward(gradients, cotangents):
        weighed = (g * c[:, None] for g, c in zip(gradients, cotangents, strict=False))
        return (sum(weighed).astype(hidden.dtype),)

    run.defvjp(forward, backward)
    return run(hidden)


def _chunk_rows(vocab_size: int) -> int:
    return max(8, HEAD_CHUNK_FLOATS // vocab_size // 8 * 8)


def _by_chunks(function, *arrays, wanted, chunk):
    """`function` of the wanted rows of `arrays` [M, ...], a chunk at a time; 0 for the others."""
    m = len(wanted)
    chunk = min(m, chunk)
    n_chunks = -(-m // chunk)
    order = jnp.argsort(~wanted, stable=True)  # wanted rows first: later chunks are skipped
    order = jnp.pad(order, (0, n_chunks * chunk - m), constant_values=m)  # m: out of bounds
    n_wanted = wanted.sum()

    def compute(index):
        return function(*(jnp.take(x, index, axis=0, mode="fill", fill_value=0) for x in arrays))

    shapes = jax.eval_shape(compute, order[:chunk])

    def step(start, index):
        zeros = lambda _: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
        return start + chunk, jax.lax.cond(start < n_wanted, compute, zeros, index)

    def back_in_place(stacked):
        stacked = stacked.reshape(-1, *stacked.shape[2:])
        rows = jnp.zeros((m, *stacked.shape[1:]), stacked.dtype).at[order].set(stacked, mode="drop")
        return jnp.where(wanted.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)

    _, values = jax.lax.scan(step, 0, order.reshape(n_chunks, chunk))
    return jax.tree.map(back_in_place, values)
