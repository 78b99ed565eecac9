"""What layers keep for their backward pass, in memory that outlives the program: the gradient is
that without it, whatever stood there before, and nothing is kept that is at hand anyway."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import adapted, in_one_batch
from flax import nnx

from jgrpo.losses import LOSSES
from jgrpo.policy.batch import MicroBatch
from jgrpo.policy.logprobs import hidden_states
from jgrpo.update.step import STACK, Update, adam


@pytest.fixture(scope="module")
def parts(checkpoint):
    return adapted(checkpoint("qwen3-tied"), 2)


def wider(batch: MicroBatch) -> MicroBatch:
    """One more token is computed, which only fills up."""
    n_slots = batch.prompts.size + batch.rows.size
    return batch._replace(places=np.append(batch.places, n_slots).astype(np.uint32))


def update_of(graph) -> Update:
    return Update(graph, LOSSES["grpo"], adam(0.01))


def written(parts, batch, tape, recomputed=False):
    """The gradient of a sum over hidden states, and the tape."""
    graph, adapter, base = parts

    def loss(adapter, base, batch, tape):
        model = nnx.merge(graph, adapter, base)
        hidden, new = hidden_states(model, batch, tape, checkpoint=recomputed)
        return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum(), new

    return jax.jit(jax.grad(loss, has_aux=True))(adapter, base, batch, tape)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_gradient_is_that_of_a_plain_scan(parts, rows, recomputed):
    batch = in_one_batch(rows)
    plain, nothing = written(parts, batch, None, recomputed)
    taped, tape = written(parts, batch, [], recomputed)
    old = [jnp.full_like(x, np.nan) for x in tape]  # whatever was there is written over
    again, new = written(parts, batch, old, recomputed)
    assert nothing is None
    for expected, *got in zip(*map(jax.tree.leaves, (plain, taped, again)), strict=True):
        for gradient in got:
            largest = float(jnp.abs(expected).max())
            np.testing.assert_allclose(gradient, expected, atol=2e-5 * largest)
    for first, second in zip(tape, new, strict=True):
        np.testing.assert_allclose(second, first, atol=1e-5)


def test_a_tape_holds_neither_weights_nor_masks(parts, rows):
    """With recomputation a layer's input is all: three layers, all slots computed, width 32."""
    batch = in_one_batch(rows)
    _, tape = written(parts, batch, [], recomputed=True)
    assert [(x.shape, x.dtype) for x in tape] == [((3, 1, batch.n_tokens, 32), jnp.float32)]
    _, tape = written(parts, batch, [])
    weights = {x.shape for x in jax.tree.leaves(parts[1:])}
    assert len(tape) > 5
    assert all(x.dtype == jnp.float32 and x.shape not in weights for x in tape)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only the CPU needs a tape")
def test_updates_write_into_the_same_memory(parts, rows):
    graph, adapter, base = parts
    update, batch = update_of(graph), in_one_batch(rows)

    def places(batches) -> list[int]:
        jax.block_until_ready(update.gradient(adapter, base, batches, 5.0))
        return [x.unsafe_buffer_pointer() for x in update._tape]

    first = places([batch])
    assert places([batch]) == places([batch] * (STACK + 1)) == first
    other = places([wider(batch)])  # another shape takes another tape, in the first one's place
    assert update._tape[0].shape[2] == batch.n_tokens + 1
    assert places([wider(batch)]) == other


@pytest.mark.slow
def test_programs_for_a_gpu_give_the_same_gradient(parts, rows, monkeypatch):
    """They make their own tape, in a loop over several micro-batches, and nothing outlives them."""
    graph, adapter, base = parts
    batches = [in_one_batch(rows)] * 2
    expected = update_of(graph).gradient(adapter, base, batches, 5.0)
    jax.clear_caches()  # of layers as they are for a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    update = update_of(graph)
    got = update.gradient(adapter, base, batches, 5.0)
    assert update._tape is None
    for e, g in zip(*map(jax.tree.leaves, (expected, got)), strict=True):
        np.testing.assert_allclose(g, e, atol=2e-5 * float(jnp.abs(e).max()))


def test_the_memory_goes_with_the_update(parts, rows):
    graph, adapter, base = parts
    update = update_of(graph)
    jax.block_until_ready(update.gradient(adapter, base, [in_one_batch(rows)], 5.0))
    tape, gone = weakref.ref(update._tape[0]), weakref.ref(update)
    gc.disable()  # some day it would find a cycle
    try:
        del update
        assert gone() is None
        assert tape() is None
    finally:
        gc.enable()


def test_a_program_that_fails_leaves_no_tape_behind(parts, rows, monkeypatch):
    graph, adapter, base = parts
    update, batch = update_of(graph), in_one_batch(rows)
    expected = update.gradient(adapter, base, [batch], 5.0)

    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setitem(vars(update.programs), "accumulate", out_of_memory)
        with pytest.raises(MemoryError):
            update.gradient(adapter, base, [batch], 5.0)
    assert update._tape is None
    again = update.gradient(adapter, base, [batch], 5.0)
    for a, b in zip(*map(jax.tree.leaves, (again, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
