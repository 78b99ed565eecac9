"""Attention against its formula in float64, and flash attention against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.policy.attention import attention, causal_mask, chosen


@pytest.mark.slow
def test_attention_has_the_gradient_of_its_formula():
    """Values and all three gradients against what JAX derives from the formula, in float64."""
    rng = np.random.default_rng(0)
    shapes = ((2, 24, 6, 8), (2, 31, 2, 8), (2, 31, 2, 8), (2, 24, 6, 8))
    q, k, v, weights = (rng.normal(size=s) * 2 for s in shapes)
    mask = rng.random((2, 24, 31)) < 0.5
    mask[:, :, 0] = True

    def formula(q, k, v, mask):
        k, v = (jnp.repeat(x, 3, axis=2) for x in (k, v))  # head h looks at key h // 3
        scores = jnp.einsum("nthc,nshc->nhts", q, k) / np.sqrt(8)
        attended = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("nhts,nshc->nthc", attended, v)

    def value_and_gradients(function, dtype):
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
        out, gradient = jax.vjp(lambda *a: function(*a, jnp.asarray(mask)), *arrays)
        return out, *gradient(jnp.asarray(weights, dtype))

    with jax.enable_x64(True):
        expected = [np.asarray(x) for x in value_and_gradients(formula, jnp.float64)]
    for dtype, error in ((jnp.float32, 3e-6), (jnp.bfloat16, 0.02)):
        for found, wanted in zip(value_and_gradients(attention, dtype), expected, strict=True):
            assert found.dtype == dtype
            difference = np.linalg.norm(np.asarray(found, np.float64) - wanted)
            assert difference < error * np.linalg.norm(wanted)


def test_auto_is_flash_attention_on_a_gpu_in_16_bits_alone(monkeypatch):
    assert chosen("auto", "bfloat16", 128) == "xla"  # this is a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen("auto", "bfloat16", 128) == chosen("auto", "float16", 128) == "cudnn"
    for dtype, head_width in (("float32", 128), ("bfloat16", 256), ("bfloat16", 12)):
        assert chosen("auto", dtype, head_width) == "xla"
    assert (chosen("xla", "bfloat16", 128), chosen("cudnn", "bfloat16", 256)) == ("xla", "cudnn")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="flash attention needs a GPU")
def test_flash_attention_equals_the_plain_one():
    """Values and gradients in bfloat16, grouped heads, two segments a row and padding."""
    rng = np.random.default_rng(0)
    shapes = ((2, 256, 8, 64), (2, 256, 2, 64), (2, 256, 2, 64), (2, 256, 8, 64))
    q, k, v, weights = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
    segments = np.zeros((2, 256), np.int32)
    segments[:, :100], segments[:, 100:230] = 1, 2
    mask = causal_mask(jnp.asarray(segments))

    def values(q, k, v, implementation):
        out = attention(q, k, v, mask, implementation)
        return (out * weights)[:, :230].astype(jnp.float32).sum(), out[:, :230]

    found = [
        jax.jit(jax.value_and_grad(values, (0, 1, 2), has_aux=True), static_argnums=3)(
            q, k, v, name
        )
        for name in ("xla", "cudnn")
    ]
    for plain, flash in zip(*map(jax.tree.leaves, found), strict=True):
        error = jnp.linalg.norm((plain - flash).astype(jnp.float32).ravel())
        assert error < 0.02 * jnp.linalg.norm(plain.astype(jnp.float32).ravel())
