"""The update: a pure function of (adapter, optimizer state, base, micro-batches).

Gradients are sums over micro-batches, divided once by the denominator of the whole rollout; then
one optimizer update. The adapter and the optimizer's state are donated; nothing returns to the host
until the step is over. Nothing here forbids a leading axis of adapters (vmap) or a mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jgrpo.batch import MicroBatch
from jgrpo.logprobs import token_logprobs
from jgrpo.losses import Terms, k3

Loss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Terms]
Tree = Any


class Sums(NamedTuple):
    """What micro-batches add up to: a gradient and sums over tokens; and the largest gap."""

    gradient: Tree
    metrics: dict[str, jax.Array]
    largest_gap: jax.Array


OUR_SUMS = ("loss", "entropy", "tokens", "gap", "sampler_kl")


def adam(lr: float) -> optax.GradientTransformation:
    """Adam without weight decay, the global gradient norm clipped at 1 (the study's optimizer)."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr, b1=0.9, b2=0.999, eps=1e-8))


class Update:
    """Compiled once for each shape of micro-batch.

    `loss` is one of `losses.LOSSES` with its options bound. Without old_logprobs the policy is the
    one that sampled (first update of a rollout): they equal the logprobs, and no pass is spent.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        temperature: float = 1.0,
        checkpoint: bool = False,
    ):
        self.graph, self.loss, self.optimizer = graph, loss, optimizer
        self.temperature, self.checkpoint = temperature, checkpoint
        self._accumulate = jax.jit(self._micro_step, donate_argnums=0)
        self._apply = jax.jit(self._optimizer_step, donate_argnums=(0, 1))

    def __call__(
        self,
        adapter: Tree,
        opt_state: Tree,
        base: Tree,
        batches: Sequence[MicroBatch],
        denominator: float,
        old_logprobs: Sequence[jax.Array] | None = None,
    ) -> tuple[Tree, Tree, dict[str, jax.Array], list[jax.Array]]:
        """One optimizer update -> adapter, opt_state, metrics (on the device), logprobs.

        `denominator` is the loss's for all completions of the rollout, also those left out of
        `batches` because their advantage is zero. The logprobs, one array a micro-batch, are what
        a second update on the same rollout takes as old_logprobs.
        """
        total, logprobs = self._sum(adapter, base, batches, old_logprobs)
        return *self._apply(adapter, opt_state, total, denominator), logprobs

    def gradient(self, adapter, base, batches, denominator) -> Tree:
        """The gradient alone, as the optimizer would see it before clipping."""
        total, _ = self._sum(adapter, base, batches, None)
        return jax.tree.map(lambda g: g / denominator, total.gradient)

    @property
    def n_compilations(self) -> int:
        """Programs compiled so far: at most one a shape of micro-batch, and one for the rest."""
        return sum(f._cache_size() for f in (self._accumulate, self._apply))  # type: ignore[attr-defined]

    def _sum(self, adapter, base, batches, old_logprobs) -> tuple[Sums, list[jax.Array]]:
        total, logprobs = self._zeros(adapter), []
        for i, batch in enumerate(batches):
            old = None if old_logprobs is None else old_logprobs[i]
            total, new = self._accumulate(total, adapter, base, batch, old)
            logprobs.append(new)
        return total, logprobs

    def _zeros(self, adapter) -> Sums:
        one = jnp.zeros((1, 1))
        names = [*jax.eval_shape(self.loss, one, one, one[0], one)[2], *OUR_SUMS]
        gradient = jax.tree.map(jnp.zeros_like, adapter)
        return Sums(gradient, {name: jnp.zeros(()) for name in names}, jnp.zeros(()))

    def _micro_step(self, total: Sums, adapter, base, batch, old_logprobs):
        def numerator(adapter):
            model = nnx.merge(self.graph, adapter, base)
            logprobs, entropies = token_logprobs(
                model,
                batch.ids,
                batch.segments,
                batch.mask,
                temperature=self.temperature,
                checkpoint=self.checkpoint,
            )
            old = jax.lax.stop_gradient(logprobs) if old_logprobs is None else old_logprobs
            loss, _, metrics = self.loss(logprobs, old, batch.advantages, batch.mask)
            return loss, (metrics, logprobs, entropies)

        gradient_of = jax.value_and_grad(numerator, has_aux=True)
        (loss, (metrics, logprobs, entropies)), gradient = gradient_of(adapter)
        gap = (logprobs - batch.sampler_logprobs) * batch.mask
        ours = (loss, entropies.sum(), batch.mask.sum(), jnp.abs(gap).sum(), k3(gap).sum())
        new = Sums(gradient, metrics | dict(zip(OUR_SUMS, ours, strict=True)), jnp.abs(gap).max())
        gradient, metrics = jax.tree.map(jnp.add, total[:2], new[:2])
        return Sums(gradient, metrics, jnp.maximum(total.largest_gap, new.largest_gap)), logprobs

    def _optimizer_step(self, adapter, opt_state, total: Sums, denominator):
        gradient = jax.tree.map(lambda g: g / denominator, total.gradient)
        updates, opt_state = self.optimizer.update(gradient, opt_state, adapter)
        s, tokens = total.metrics, total.metrics["tokens"]
        metrics = {
            "train/loss": s["loss"] / denominator,
            "train/approx_kl": s["approx_kl"] / tokens,
            "train/clip_fraction": s["clip_fraction"] / tokens,
            "train/entropy": s["entropy"] / tokens,
            "train/grad_norm": optax.tree.norm(gradient),
            "sampler/logprob_diff_mean": s["gap"] / tokens,
            "sampler/logprob_diff_max": total.largest_gap,
            "sampler/kl": s["sampler_kl"] / tokens,
            "tokens/trained": tokens,
        }
        return optax.apply_updates(adapter, updates), opt_state, metrics


def loss_denominator(loss: Loss, mask: np.ndarray) -> float:
    """The denominator for all completions: it depends on their lengths alone (mask [N, T])."""
    zeros = jnp.zeros(mask.shape)
    return float(loss(zeros, zeros, jnp.zeros(len(mask)), jnp.asarray(mask))[1])
