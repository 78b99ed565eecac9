"""A dense layer with a frozen kernel and a low-rank adapter: y = x W + (alpha / R) (x A) B.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1. No dropout and no bias: the
study uses neither, and both would make the policy that is trained differ from the one sampled.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jgrpo.policy.backend import backend
from jgrpo.policy.remat import keep


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

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.lora_A is not None and self.lora_B is not None:
            a, b = self.lora_A[...], self.lora_B[...] * self.scale
            y = adapted(x, self.kernel[...], a.astype(x.dtype), b.astype(x.dtype))
        else:
            y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


@jax.custom_vjp
def adapted(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x W + (x A) B, with a gradient that XLA does not fuse to death.

    Left to itself XLA (CPU, jaxlib 0.10) merges the products with A and B into the elementwise
    code around them, transposed, and reads the activations column by column.
    """
    return x @ w + (x @ a) @ b


def _adapted_forward(x, w, a, b):
    h = keep(x @ a)
    return x @ w + h @ b, (x, w, a, b, h)


def _adapted_backward(saved, dy):
    (x, w, a, b, h), shape = saved, saved[0].shape
    if backend().lora_gradient_alone == "all" or x.shape == dy.shape:
        x, dy = jax.lax.optimization_barrier((x, dy))
    x, dy, h = (y.reshape(-1, y.shape[-1]) for y in (x, dy, h))
    dh = dy @ b.T
    dx = (dy @ w.T + dh @ a.T).reshape(shape)
    da = (dh.T @ x).T
    db = h.T @ dy
    return dx, x.T @ dy, da, db  # the kernel's is dropped where only the adapter is trained


adapted.defvjp(_adapted_forward, _adapted_backward)


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
