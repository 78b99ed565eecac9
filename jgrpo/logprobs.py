"""Log-probability of each token given the ones before it: the only place that shifts by one, and
the only one that divides by the temperature.

The head (D -> V) runs over chunks of the tokens that are trained, and again in the backward pass,
so that no [N, T, V] array ever exists; prompt and padding tokens never reach it.
"""

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
) -> tuple[jax.Array, jax.Array]:
    """ids, segments, mask [N, T] -> logprobs and entropies, float32 [N, T], 0 where mask is 0.

    logprobs[n, t] = log softmax(logits[n, t-1] / temperature)[ids[n, t]], and entropies[n, t] is
    that distribution's entropy in nats (no gradient). The first token of a row has none: its mask
    must be 0.
    """
    hidden, _ = model.model(
        ids, positions_in(segments), full_attention(segments), checkpoint=checkpoint
    )
    before = jnp.roll(hidden, 1, axis=1).reshape(-1, hidden.shape[-1])
    values = _chunked_head(model, before, ids.reshape(-1), mask.reshape(-1) > 0, temperature)
    logprobs, entropies = (v.reshape(ids.shape) for v in values)
    return logprobs, entropies


def _chunked_head(model, hidden, targets, wanted, temperature):
    """hidden [M, D], targets, wanted [M] -> logprob and entropy [M] of the wanted rows."""
    m, vocab = len(targets), model.config.vocab_size
    chunk = min(m, max(8, HEAD_CHUNK_FLOATS // vocab // 8 * 8))
    n_chunks = -(-m // chunk)
    order = jnp.argsort(~wanted, stable=True)  # wanted rows first: later chunks are skipped
    order = jnp.pad(order, (0, n_chunks * chunk - m), constant_values=m)  # m: out of bounds
    n_wanted = wanted.sum()

    @jax.checkpoint
    def head(index):
        logits = model.logits(hidden.at[index].get(mode="fill", fill_value=0)) / temperature
        target = targets.at[index].get(mode="fill", fill_value=0)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        logprob = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0] - log_z
        logits, log_z = jax.lax.stop_gradient((logits, log_z))
        entropy = log_z - jnp.sum(jnp.exp(logits - log_z[:, None]) * logits, axis=-1)
        return logprob, entropy

    def step(start, index):
        zeros = jnp.zeros(chunk), jnp.zeros(chunk)
        return start + chunk, jax.lax.cond(start < n_wanted, head, lambda _: zeros, index)

    _, values = jax.lax.scan(step, 0, order.reshape(n_chunks, chunk))
    scatter = lambda v: jnp.zeros(m).at[order].set(v.reshape(-1), mode="drop") * wanted  # noqa: E731
    return jax.tree.map(scatter, values)
