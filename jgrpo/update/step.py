"""The update: a pure function of (adapter, optimizer state, base, micro-batches).

Gradients are sums over micro-batches, divided once by the denominator of the whole rollout; then
one optimizer update. The adapter and the optimizer's state are donated; nothing returns to the host
until the step is over. Nothing here forbids a leading axis of adapters (vmap) or a mesh.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jgrpo.losses import Terms, k3
from jgrpo.policy.backend import backend
from jgrpo.policy.batch import MicroBatch
from jgrpo.policy.logprobs import head_logprobs, hidden_states, token_logprobs
from jgrpo.policy.tape import Tape
from jgrpo.policy.tracing import traced

Loss = Callable[..., Terms]
"""One of `losses.LOSSES` with its options bound. Besides logprobs, old_logprobs, advantages and
mask it is given the arrays ref_logprobs (if there are any), sampler_logprobs and entropies."""
Schedule = Callable[[int], float]
Tree = Any
Arrays = Sequence[jax.Array]
"""float32 [STACK, N, U], one a stack of micro-batches: what `Update` gave for the same ones."""

STACK = 16
"""How many micro-batches one program goes through. XLA's CPU client maps a program's memory anew at
each execution, and new pages cost time: up to a tenth of a micro-batch's."""


class Sums(NamedTuple):
    """What micro-batches add up to: a gradient and sums over tokens; and the largest gap."""

    gradient: Tree
    metrics: dict[str, jax.Array]
    largest_gap: jax.Array


OUR_SUMS = ("loss", "entropy", "tokens", "gap", "sampler_kl")


def learning_rate(kind: str, lr: float, n_updates: int, warmup_steps: int = 0) -> Schedule | float:
    """The learning rate by the count of updates made: a linear rise over `warmup_steps`, then
    `kind`: constant, or linear or cosine down to 0 at n_updates."""
    if kind == "constant" and not warmup_steps:
        return lr
    left = n_updates - warmup_steps
    after: dict[str, Schedule] = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, left),
        "cosine": optax.cosine_decay_schedule(lr, left),
    }
    rise = optax.linear_schedule(0.0, lr, warmup_steps)
    return optax.join_schedules([rise, after[kind]], [warmup_steps])


def adam(lr: Schedule | float) -> optax.GradientTransformation:
    """Adam without weight decay, the global gradient norm clipped at 1 (the study's optimizer)."""
    clip = optax.clip_by_global_norm(1.0)
    shrunk = lambda g: jax.tree.map(lambda x: x * shrinking(g), g)  # noqa: E731
    small_enough = optax.stateless(lambda g, _: clip.update(shrunk(g), optax.EmptyState())[0])
    return optax.chain(small_enough, optax.adam(lr, b1=0.9, b2=0.999, eps=1e-8))


def shrinking(gradient: Tree) -> jax.Array:
    """A power of two, so that it changes no bit else: what `gradient` times it may be squared and
    summed, which overflows above 1.8e19. 1 below 2^30, and the norm stays above 1 beyond."""
    largest = jnp.max(jnp.array([jnp.abs(g).max() for g in jax.tree.leaves(gradient)]))
    return jnp.where(largest > 2.0**79, 2.0**-78, jnp.where(largest > 2.0**30, 2.0**-29, 1.0))


def global_norm(gradient: Tree) -> jax.Array:
    scale = shrinking(gradient)
    return optax.tree.norm(jax.tree.map(lambda g: g * scale, gradient)) / scale


class Update:
    """Compiled once for each shape of micro-batch.

    Without old_logprobs the policy is the one that sampled (first update of a rollout): they equal
    the logprobs, and no pass is spent. `entropy_gradient` lets the loss see that of the entropies.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        temperature: float = 1.0,
        checkpoint: bool = False,
        entropy_gradient: bool = False,
        attn_implementation: str = "xla",
    ):
        self.graph, self.loss, self.optimizer = graph, loss, optimizer
        self.of_layers: dict[str, Any] = {
            "checkpoint": checkpoint,
            "attn_implementation": attn_implementation,
        }
        self.of_head: dict[str, Any] = {
            "temperature": temperature,
            "entropy_gradient": entropy_gradient,
        }
        self._tape: Tape | None = None
        me = weakref.proxy(self)  # no cycle: the tape goes with the last reference, not some day
        self._new_tape = jax.jit(lambda *given: me._blank_tape(*given))
        self._accumulate = jax.jit(lambda *given: me._through_stack(*given), donate_argnums=(0, 1))
        self._forward = jax.jit(lambda *given: me._logprobs_of_stack(*given))
        self._apply = jax.jit(lambda *given: me._optimizer_step(*given), donate_argnums=(0, 1))

    def __call__(
        self,
        adapter: Tree,
        opt_state: Tree,
        base: Tree,
        batches: Sequence[MicroBatch],
        denominator: float,
        old_logprobs: Arrays | None = None,
        ref_logprobs: Arrays | None = None,
    ) -> tuple[Tree, Tree, dict[str, jax.Array], Arrays]:
        """One optimizer update -> adapter, opt_state, metrics (on the device), logprobs. Where the
        loss or its gradient is not finite nothing is changed, and train/skipped_updates is 1. Where
        the gradient is zero nothing is changed either: momentum alone is no step.

        `denominator` is the loss's for all completions of the rollout, also those left out of
        `batches` because their advantage is zero. The logprobs are what a second update on the
        same rollout takes as old_logprobs.
        """
        total, logprobs = self._sum(adapter, base, batches, old_logprobs, ref_logprobs)
        return *self._apply(adapter, opt_state, total, denominator), logprobs

    def logprobs(self, adapter, base, batches: Sequence[MicroBatch]) -> Arrays:
        """A forward pass alone: the policy's logprobs."""
        return [self._forward(adapter, base, stack, n) for stack, n in _stacked(batches)]

    def gradient(self, adapter, base, batches, denominator) -> Tree:
        """The gradient alone, as the optimizer would see it before clipping."""
        total, _ = self._sum(adapter, base, batches, None, None)
        return jax.tree.map(lambda g: g / denominator, total.gradient)

    def compiled(self, adapter, base, batch: MicroBatch) -> jax.stages.Compiled:
        """The program of a shape of micro-batch (first update of a rollout), of shapes alone."""
        total = jax.eval_shape(self._zeros, adapter)
        (stacked,) = _stacked([batch])
        tape = self._new_tape.eval_shape(adapter, base, stacked[0])
        return self._accumulate.lower(total, tape, adapter, base, *stacked, None, None).compile()

    @property
    def n_compilations(self) -> int:
        """Programs compiled so far: for each shape of micro-batch one with the gradient, one
        forward alone where that is needed, one more where only later updates have old_logprobs;
        and the optimizer's."""
        programs = (self._accumulate, self._forward, self._apply)
        return sum(f._cache_size() for f in programs)  # type: ignore[attr-defined]

    def _sum(self, adapter, base, batches, old, ref) -> tuple[Sums, Arrays]:
        total, logprobs, stacks = self._zeros(adapter), [], _stacked(batches)
        nothing = [None] * len(stacks)
        for stacked, o, r in zip(stacks, old or nothing, ref or nothing, strict=True):
            tape = self._take_tape(adapter, base, stacked[0])
            total, self._tape, new = self._accumulate(total, tape, adapter, base, *stacked, o, r)
            logprobs.append(new)
        return total, logprobs

    def _take_tape(self, adapter, base, stack: MicroBatch) -> Tape | None:
        """The last program's tape, or a new one where it does not fit this one."""
        tape, self._tape = self._tape, None
        shape_of = lambda tape: jax.tree.map(lambda x: (x.shape, x.dtype), tape)  # noqa: E731
        if shape_of(tape) != shape_of(self._new_tape.eval_shape(adapter, base, stack)):
            del tape
            tape = self._new_tape(adapter, base, stack)
        return tape

    def _blank_tape(self, adapter, base, stack: MicroBatch) -> Tape | None:
        """A tape to give to a program; None where it makes its own."""
        traced("tape", _words(stack))
        return self._empty_tape(adapter, base, stack) if backend().tape_outlives_programs else None

    def _empty_tape(self, adapter, base, stack: MicroBatch) -> Tape:
        def written(adapter, base, batch):
            return hidden_states(nnx.merge(self.graph, adapter, base), batch, [], **self.of_layers)

        batch = jax.tree.map(lambda x: x[0], stack)
        _, shapes = jax.eval_shape(written, adapter, base, batch)
        return jax.tree.map(lambda x: jax.lax.empty(x.shape, x.dtype), shapes)

    def _through_stack(self, total: Sums, tape, adapter, base, stack: MicroBatch, n, old, ref):
        traced("update", _words(stack))
        own = tape is None
        tape = self._empty_tape(adapter, base, stack) if own else tape

        def step(i, carry):
            total, tape, logprobs = carry
            batch, o, r = _nth((stack, old, ref), i)
            total, tape, new = self._micro_step(total, tape, adapter, base, batch, o, r)
            return total, tape, logprobs.at[i].set(new)

        carry = total, tape, jnp.zeros(stack.mask.shape)
        total, tape, logprobs = jax.lax.fori_loop(0, n, step, carry)
        return total, None if own else tape, logprobs

    def _logprobs_of_stack(self, adapter, base, stack: MicroBatch, n):
        traced("logprobs", _words(stack))

        def step(i, logprobs):
            batch = _nth(stack, i)
            model = nnx.merge(self.graph, adapter, base)
            return logprobs.at[i].set(
                token_logprobs(model, batch, **self.of_layers, **self.of_head)[0]
            )

        return jax.lax.fori_loop(0, n, step, jnp.zeros(stack.mask.shape))

    def _zeros(self, adapter) -> Sums:
        one = jnp.zeros((1, 1))
        arrays = {"sampler_logprobs": one, "entropies": one}
        names = [*jax.eval_shape(self.loss, one, one, one[0], one, **arrays)[2], *OUR_SUMS]
        gradient = jax.tree.map(jnp.zeros_like, adapter)
        return Sums(gradient, {name: jnp.zeros(()) for name in names}, jnp.zeros(()))

    def _micro_step(self, total: Sums, tape, adapter, base, batch, old_logprobs, ref_logprobs):
        def numerator(adapter):
            model = nnx.merge(self.graph, adapter, base)
            hidden, written = hidden_states(model, batch, tape, **self.of_layers)
            logprobs, entropies = head_logprobs(model, hidden, batch, **self.of_head)
            old = jax.lax.stop_gradient(logprobs) if old_logprobs is None else old_logprobs
            arrays = {"sampler_logprobs": batch.sampler_logprobs, "entropies": entropies}
            if ref_logprobs is not None:
                arrays["ref_logprobs"] = ref_logprobs
            loss, _, metrics = self.loss(logprobs, old, batch.advantages, batch.mask, **arrays)
            return loss, (metrics, logprobs, old, entropies, written)

        gradient_of = jax.value_and_grad(numerator, has_aux=True)
        (loss, (metrics, logprobs, old, entropies, tape)), gradient = gradient_of(adapter)
        gap = (old - batch.sampler_logprobs) * batch.mask  # both are of the policy that sampled
        ours = (loss, entropies.sum(), batch.mask.sum(), jnp.abs(gap).sum(), k3(gap).sum())
        new = Sums(gradient, metrics | dict(zip(OUR_SUMS, ours, strict=True)), jnp.abs(gap).max())
        gradient, metrics = jax.tree.map(jnp.add, total[:2], new[:2])
        largest_gap = jnp.maximum(total.largest_gap, new.largest_gap)
        return Sums(gradient, metrics, largest_gap), tape, logprobs

    def _optimizer_step(self, adapter, opt_state, total: Sums, denominator):
        traced("optimizer", f"{len(jax.tree.leaves(adapter))} arrays")
        gradient = jax.tree.map(lambda g: g / denominator, total.gradient)
        updates, stepped = self.optimizer.update(gradient, opt_state, adapter)
        new, old = (optax.apply_updates(adapter, updates), stepped), (adapter, opt_state)
        s, tokens = total.metrics, total.metrics["tokens"]
        per_token = {name: x / jnp.maximum(tokens, 1) for name, x in s.items()}
        loss, norm = s["loss"] / denominator, global_norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        made = finite & (norm > 0)
        metrics = {
            "train/loss": loss,
            "train/entropy": per_token["entropy"],
            "train/grad_norm": norm,
            "train/skipped_updates": 1 - finite.astype(jnp.float32),
            "sampler/logprob_diff_mean": per_token["gap"],
            "sampler/logprob_diff_max": total.largest_gap,
            "sampler/kl": per_token["sampler_kl"],
            "tokens/trained": tokens,
        }
        metrics |= {f"train/{name}": x for name, x in per_token.items() if name not in OUR_SUMS}
        return *jax.tree.map(lambda n, o: jnp.where(made, n, o), new, old), metrics


def _words(stack: MicroBatch) -> str:
    (p, s), (r, u), m = stack.prompts.shape[1:], stack.rows.shape[1:], stack.places.shape[1]
    return f"prompts {p} x {s}, rows {r} x {u}, {m} tokens"


def _nth(stack: Tree, i: jax.Array) -> Tree:
    """The i-th of a stack, or of several (x[i] is code for negative i too)."""
    i = i.astype(jnp.uint32)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stack)


def _stacked(batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, int]]:
    """Micro-batches of one shape as stacks with a leading axis of STACK, and how many of each
    count: the last one is filled up."""
    parts = [batches[start : start + STACK] for start in range(0, len(batches), STACK)]
    filled = [[*part, *[part[-1]] * (STACK - len(part))] for part in parts]
    stacks = [jax.tree.map(lambda *x: np.stack(x), *part) for part in filled]
    return list(zip(stacks, map(len, parts), strict=True))


def loss_denominator(loss: Loss, mask: np.ndarray) -> float:
    """The denominator for all completions: it depends on their lengths alone (mask [N, T]). At
    least 1, so that where nothing is trained the loss is 0."""
    zeros = jnp.zeros(mask.shape)
    arrays = {"sampler_logprobs": zeros, "entropies": zeros}
    return max(1.0, float(loss(zeros, zeros, jnp.zeros(len(mask)), jnp.asarray(mask), **arrays)[1]))
