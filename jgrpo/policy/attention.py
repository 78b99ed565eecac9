"""Attention: who sees whom, and the weighted sums; who asks decides what is seen (`Attend`).

Axes: N rows, T queries and S keys a row, H query heads, K key/value heads, G = H / K query heads
that share one, C head width. Grouped-query attention: Ainslie et al. 2023.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jgrpo.policy.backend import backend
from jgrpo.policy.remat import keep

MASKED = -1e30  # finite: a row that sees nothing must not become NaN

Attend = Partial
"""q [N, T, H, C], k and v [N, T, K, C], this layer's slice of the cache -> out [N, T, H, C], and
what to keep of this layer (stacked along L by the scan). With the arrays that it needs beside them
(masks) it is a pytree, so that these are arguments of a layer and not kept for each."""


def causal_mask(segments: jax.Array) -> jax.Array:
    """segments [N, T] -> bool [N, T, T]: a token sees the tokens before it in its own segment.

    Packed sequences have segments 1, 2, ...; padding has 0, and so is seen by padding alone.
    """
    causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return (segments[:, :, None] == segments[:, None, :]) & causal


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, implementation: str = "xla"
) -> jax.Array:
    """Grouped-query attention: q [N, T, H, C], k and v [N, S, K, C], mask [N, T, S].

    `implementation` "cudnn" is flash attention (Dao et al. 2022): on a GPU, in 16 bits.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    (n, t, h, c), n_kv = q.shape, k.shape[2]
    q = q.reshape(n, t, n_kv, -1, c).transpose(0, 2, 3, 1, 4)  # [N, K, G, T, C]
    out = _softmax_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, None, None])
    return out.transpose(0, 3, 1, 2, 4).reshape(n, t, h, c)


@jax.custom_vjp
def _softmax_attention(q, k, v, mask):
    """q [N, K, G, T, C], k and v [N, K, S, C] -> out [N, K, G, T, C]; each query sees something.

    Kept are exp(score - largest), never divided by their sum: the outputs are. The gradient is that
    of FlashAttention (Dao et al. 2022, appendix B.2) with all scores at hand; what JAX derives from
    a softmax keeps them twice, and writes and transposes them several times more.
    """
    return _softmax_attention_forward(q, k, v, mask)[0]


def _softmax_attention_forward(q, k, v, mask):
    scores = jnp.einsum("nkgtc,nksc->nkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * q.shape[-1] ** -0.5, MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    inverse = 1 / weights.sum(axis=-1)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("nkgts,nksc->nkgtc", weights, v, preferred_element_type=jnp.float32)
    out = (out * inverse[..., None]).astype(v.dtype)
    weights, inverse, out = map(keep, (weights, inverse, out))
    return out, (q, k, v, weights, inverse, out)


def _softmax_attention_backward(saved, dy):
    q, k, v, weights, inverse, out = saved
    scaled = dy * inverse[..., None].astype(dy.dtype)
    dv = jnp.einsum("nkgtc,nkgts->nkcs", scaled, weights).swapaxes(2, 3)
    along = jnp.einsum("nkgtc,nkgtc->nkgt", scaled, out, preferred_element_type=jnp.float32)
    ds = jnp.einsum("nkgtc,nksc->nkgts", scaled, v, preferred_element_type=jnp.float32)
    ds = (weights * (ds - along[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("nkgts,nksc->nkgtc", ds, k)
    dk = jnp.einsum("nkgtc,nkgts->nkcs", q, ds).swapaxes(2, 3)
    return dq, dk, dv, None


_softmax_attention.defvjp(_softmax_attention_forward, _softmax_attention_backward)


def chosen(implementation: str, dtype: str, head_width: int) -> str:
    """ "auto" is flash attention where cuDNN has it on every card: in 16 bits, heads up to 128."""
    if implementation != "auto":
        return implementation
    fits = dtype != "float32" and head_width <= 128 and head_width % 8 == 0
    return "cudnn" if backend().flash_attention and fits else "xla"


def full_attention(segments: jax.Array) -> Attend:
    """Attention over the rows themselves, without a cache: what training uses."""
    return Partial(lambda mask, q, k, v, _: (attention(q, k, v, mask), None), causal_mask(segments))
