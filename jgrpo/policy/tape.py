"""A scan over layers that writes what they keep for the backward pass into memory of the caller's.

That memory is the tape: arrays [L, ...], which the caller gives away and gets back written, so that
they can outlive a compiled program. What XLA keeps by itself it gives back to the system at the end
of a program, and has to map anew for the next; on a CPU that takes up to a tenth of the time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Tape = list[jax.Array]
Layer = Callable[[jax.Array, Tree, Tree, Tree], jax.Array]
"""A layer of input, adapter, base, and what all layers share."""


def taped_scan(
    layer: Layer, x: jax.Array, adapter: Tree, base: Tree, shared: Tree, tape: Tape
) -> tuple[jax.Array, Tape]:
    """x through the layers whose weights are stacked along the first axis of adapter and base -> x
    and the tape, written; an empty one is made.

    The gradient is that of x and adapter; all else is constant. A layer keeps its input and what
    `jax.vjp` saves for it, but for its weights and what is shared: those are at hand.
    """
    pullback_tree: Any = None  # of a layer's pullback and its leaves: where each is to be found
    at_hand: list[int | None] = []

    def forward(x, adapter, tape):
        def step(carry, sliced):
            nonlocal pullback_tree, at_hand
            (x, tape), (i, a, b) = carry, sliced
            y, pullback = jax.vjp(lambda x, a: layer(x, a, b, shared), x, a)
            leaves, pullback_tree = jax.tree.flatten(pullback)
            given = {id(leaf): j for j, leaf in enumerate(jax.tree.leaves((x, a, b, shared)))}
            at_hand = [given.get(id(leaf)) for leaf in leaves]
            kept = [x, *(leaf for leaf in leaves if id(leaf) not in given)]
            if not tape:
                return (y, []), kept
            put = jax.lax.dynamic_update_index_in_dim
            return (y, [put(t, k, i, 0) for t, k in zip(tape, kept, strict=True)]), []

        layers = jnp.arange(len(jax.tree.leaves(base)[0]), dtype=jnp.uint32), adapter, base
        (y, tape), new = jax.lax.scan(step, (x, tape), layers)
        return (y, tape or new), (adapter, tape or new)

    def backward(saved, cotangents):
        def step(dy, sliced):
            a, b, (x, *kept) = sliced
            given, read = jax.tree.leaves((x, a, b, shared)), iter(kept)
            leaves = [next(read) if j is None else given[j] for j in at_hand]
            return pullback_tree.unflatten(leaves)(dy)

        adapter, tape = saved
        dx, da = jax.lax.scan(step, cotangents[0], (adapter, base, tape), reverse=True)
        return dx, da, None

    run = jax.custom_vjp(lambda *given: forward(*given)[0])
    run.defvjp(forward, backward)
    return run(x, adapter, tape)
