"""A dense layer with a frozen kernel and a low-rank adapter: y = x W + (alpha / R) (x A) B.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1. No dropout and no bias: the
study uses neither, and both would make the policy that is trained differ from the one sampled.

E adapters over one base are one whose rank is the sum of theirs: A and B stand side by side, and of
x A each token keeps the columns of its own (`own_columns`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgrpo.policy.backend import backend
from jgrpo.policy.remat import keep

Tree = Any


class LoRAParam(nnx.Param):
    """Marks the adapter's arrays, so that `nnx.split(model, LoRAParam, ...)` finds them."""


class LoRADense(nnx.Module):
    """x [..., in] -> [..., out]; kernel [in, out] in `dtype`, A [in, R] and B [R, out] in float32.

    With rank 0 there is no adapter. A starts uniform in +-1/sqrt(in), B at zero, as in PEFT
    (kaiming_uniform with a = sqrt(5)); a fresh adapter therefore changes nothing.
    """

    def __init__(self, fan_in, fan_out, *, rank, alpha, use_bias, dtype, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(normal(rngs.params(), (fan_in, fan_out), dtype))
        self.bias = nnx.Param(jnp.zeros(fan_out, dtype)) if use_bias else None
        self.lora_A = LoRAParam(_uniform(rngs.params(), (fan_in, rank))) if rank else None
        self.lora_B = LoRAParam(jnp.zeros((rank, fan_out))) if rank else None
        self.scale = alpha / rank if rank else 0.0

    def __call__(self, x: jax.Array, own: jax.Array | None = None) -> jax.Array:
        """`own` bool [..., R]: the columns of x A that are not zeroed (`own_columns`)."""
        if self.lora_A is not None and self.lora_B is not None:
            a, b = self.lora_A[...], self.lora_B[...] * self.scale
            y = adapted(x, self.kernel[...], a.astype(x.dtype), b.astype(x.dtype), own)
        else:
            y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


@jax.custom_vjp
def adapted(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, own=None) -> jax.Array:
    """x W + (x A) B, with a gradient that XLA does not fuse to death; of x A what is `own`.

    Left to itself XLA (CPU, jaxlib 0.10) merges the products with A and B into the elementwise
    code around them, transposed, and reads the activations column by column.
    """
    return x @ w + _times_b(_kept(x @ a, own), b)


def _times_b(h: jax.Array, b: jax.Array) -> jax.Array:
    """h B. Of few columns by sums, which are made where they are added to x W, and not written."""
    if len(b) > backend().lora_columns_summed:
        return h @ b
    of_column = lambda r: h[..., r, None].astype(jnp.float32) * b[r].astype(jnp.float32)  # noqa: E731
    return sum(map(of_column, range(len(b))), start=jnp.float32(0)).astype(h.dtype)


def _kept(h: jax.Array, own: jax.Array | None) -> jax.Array:
    return h if own is None else jnp.where(own, h, 0)  # not h * own: 0 times infinity is NaN


def _adapted_forward(x, w, a, b, own):
    h = _kept(keep(x @ a), own)
    return x @ w + h @ b, (x, w, a, b, h, own)


def _adapted_backward(saved, dy):
    (x, w, a, b, h, own), shape = saved, saved[0].shape
    if backend().lora_gradient_alone == "all" or x.shape == dy.shape:
        x, dy = jax.lax.optimization_barrier((x, dy))
    own = own if own is None else jnp.broadcast_to(own, h.shape).reshape(-1, h.shape[-1])
    x, dy, h = (y.reshape(-1, y.shape[-1]) for y in (x, dy, h))
    dh = _kept(dy @ b.T, own)
    dx = (dy @ w.T + dh @ a.T).reshape(shape)
    da = (dh.T @ x).T
    db = h.T @ dy
    return dx, x.T @ dy, da, db, None  # the kernel's is dropped where only the adapter is trained


adapted.defvjp(_adapted_forward, _adapted_backward)


# -- several side by side --------------------------------------------------------------------------


def side_by_side(
    adapters: nnx.State, scales: Sequence[float], ranks: Sequence[int] | None = None
) -> nnx.State:
    """Adapters A [E, L, in, R] and B [E, L, R, out] as one, A [L, in, R'] and B [L, R', out], the
    e-th B times scales[e]. Of each its rank is taken, R' in all, and not the zeros that fill it up;
    None: the whole R. (One alone, without the leading axis, is as it is.)"""

    def one(path, leaf):
        x = leaf[...]
        if x.ndim == 3:
            return leaf
        if path[-1] == "lora_B":
            x = x * jnp.asarray(scales, x.dtype)[:, None, None, None]
        axis = 1 if path[-1] == "lora_B" else 2
        of_each = ranks or [x.shape[axis + 1]] * len(x)
        cut = [jax.lax.slice_in_dim(y, 0, r, axis=axis) for y, r in zip(x, of_each, strict=True)]
        return leaf.replace(jnp.concatenate(cut, axis))

    return nnx.from_flat_state(
        (path, one(path, leaf)) for path, leaf in nnx.to_flat_state(adapters)
    )


def own_columns(members: jax.Array, ranks: Sequence[int]) -> jax.Array | None:
    """bool [..., R']: which columns of x A are those of a token's member [...], where adapters of
    these ranks stand side by side. None where there is only one."""
    if len(ranks) == 1:
        return None
    of_column = np.repeat(np.arange(len(ranks)), ranks)
    return members[..., None] == jnp.asarray(of_column, members.dtype)


def rank_of(adapter: nnx.State) -> int:
    """The rank of its arrays."""
    flat = nnx.to_flat_state(adapter)
    return next(leaf.shape[-1] for path, leaf in flat if path[-1] == "lora_A")


@jax.jit
def stacked_up(trees: Sequence[Tree]) -> Tree:
    """Trees of one shape as one, with a leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@jax.jit
def nth(tree: Tree, e: int) -> Tree:
    """One of those."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, e, keepdims=False), tree)


@jax.jit
def with_nth(tree: Tree, e: int, one: Tree) -> Tree:
    """Those, with another one in its place."""
    return jax.tree.map(lambda x, new: x.at[e].set(new), tree, one)


def with_rank(tree: Tree, rank: int) -> Tree:
    """Arrays A [..., in, R] and B [..., R, out] of an adapter, or of Adam's moments of one, cut or
    filled up with zeros to another rank; other leaves as they are."""

    def one(path, leaf):
        names = jax.tree_util.keystr(path)
        axis = leaf.ndim - 1 if "lora_A" in names else leaf.ndim - 2 if "lora_B" in names else None
        if axis is None or leaf.shape[axis] == rank:
            return leaf
        if leaf.shape[axis] > rank:
            return leaf[(slice(None),) * axis + (slice(rank),)]
        return jnp.pad(leaf, [(0, rank - n if i == axis else 0) for i, n in enumerate(leaf.shape)])

    return jax.tree.map_with_path(one, tree)


# -- one -------------------------------------------------------------------------------------------


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A model's structure, its adapter, and its frozen base; `nnx.merge` puts them together."""
    graph, adapter, base = nnx.split(model, LoRAParam, ...)  # type: ignore[misc]
    return graph, adapter, base


def switched_off(adapter: nnx.State) -> nnx.State:
    """All zeros: the model with it is the base."""
    return jax.tree.map(jnp.zeros_like, adapter)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def fresh_adapter(like: nnx.State, seed: int) -> nnx.State:
    """A new adapter with the shapes of `like` (stacked: A [L, in, R], B [L, R, out])."""
    leaves = nnx.to_flat_state(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return nnx.from_flat_state(
        (
            path,
            leaf.replace(
                _uniform(key, leaf.shape) if path[-1] == "lora_A" else jnp.zeros(leaf.shape)
            ),
        )
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    )
