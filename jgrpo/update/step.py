"""The update: a pure function of (adapters, optimizer states, base, micro-batches).

It is that of E members at once: E adapters over one base, [E, L, in, R], each with a loss, an
optimizer and figures of its own; a lone run is a population of one. A micro-batch holds completions
of any of them, and a member's gradient comes from its own alone.

Gradients are sums over micro-batches, divided once by the denominator of the member's whole
rollout; then one optimizer update each. Adapters and optimizer states are donated; of an update its
logprobs return to the host. Each device of a mesh goes through micro-batches of its own
(`policy/mesh.py`): what is written here is what one does.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jgrpo.losses import Terms, k3
from jgrpo.policy.backend import backend
from jgrpo.policy.batch import MicroBatch, emptied
from jgrpo.policy.logprobs import head_logprobs, hidden_states, token_logprobs
from jgrpo.policy.lora import side_by_side
from jgrpo.policy.mesh import (
    added_up,
    collected,
    dealt,
    gathered_when_read,
    handed_out,
    make_mesh,
    on_each,
    placed,
)
from jgrpo.policy.model import Decoder
from jgrpo.policy.tape import Tape
from jgrpo.policy.tracing import traced
from jgrpo.update.optimizer import adam as adam  # with `Update` where it is made
from jgrpo.update.optimizer import global_norm

Loss = Callable[..., Terms]
"""One of `losses.LOSSES` with its options bound. Besides logprobs, old_logprobs, advantages and
mask it is given the arrays ref_logprobs (if there are any), sampler_logprobs and entropies."""
Tree = Any
Arrays = Sequence[np.ndarray]
"""float32 [N, U], one a micro-batch."""

STACK = 16
"""How many micro-batches one program goes through. XLA's CPU client maps a program's memory anew at
each execution, and new pages cost time: up to a tenth of a micro-batch's."""


class Objective(NamedTuple):
    """What a member minimises, and whether that looks at reference logprobs."""

    loss: Loss
    uses_ref: bool = True


class Sums(NamedTuple):
    """What micro-batches add up to: gradients, sums over tokens [E], and the largest gaps [E]."""

    gradient: Tree
    metrics: dict[str, jax.Array]
    largest_gap: jax.Array


OUR_SUMS = ("loss", "entropy", "tokens", "gap", "sampler_kl")


class Update:
    """Compiled once for each shape of micro-batch.

    `objectives` are the members', one each; `scales` multiply their B's beside what the graph does,
    and of each its own of the `ranks` counts (`lora.side_by_side`); one alone needs neither.
    Without old_logprobs the policy is the one that sampled (first update of a rollout): they equal
    the logprobs, and no pass is spent; where one is NaN, it does so too.
    `entropy_gradient` lets the losses see that of the entropies. Without a `mesh` it is that of all
    devices.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        objectives: Sequence[Objective] | Loss,
        optimizer: optax.GradientTransformationExtraArgs,
        *,
        scales: Sequence[float] | None = None,
        ranks: Sequence[int] | None = None,
        temperature: float = 1.0,
        checkpoint: bool = False,
        entropy_gradient: bool = False,
        attn_implementation: str = "xla",
        mesh: Mesh | None = None,
    ):
        alone = [Objective(objectives)] if callable(objectives) else objectives
        self.graph, self.objectives, self.optimizer = graph, [*alone], optimizer
        self.scales, self.ranks = scales or [1.0] * len(self.objectives), ranks
        self.of_layers: dict[str, Any] = {
            "ranks": tuple(ranks or [1] * len(self.objectives)),
            "checkpoint": checkpoint,
            "attn_implementation": attn_implementation,
        }
        self.of_head: dict[str, Any] = {
            "temperature": temperature,
            "entropy_gradient": entropy_gradient,
        }
        self._tape: Tape | None = None
        self.mesh = mesh = make_mesh() if mesh is None else mesh
        me = weakref.proxy(self)  # no cycle: the tape goes with the last reference, not some day
        self._zeros = on_each(mesh, lambda *given: me._no_sums(*given), ["all"], "each")
        self._new_tape = on_each(
            mesh, lambda *given: me._blank_tape(*given), ["all", "base", "each"], "each"
        )
        self._accumulate = on_each(
            mesh,
            lambda *given: me._through_stack(*given),
            ["each", "each", "all", "base", "each", "all", "each", "each"],
            "each",
            donated=(0, 1),
        )
        self._forward = on_each(
            mesh,
            lambda *given: me._logprobs_of_stack(*given),
            ["all", "base", "each", "all"],
            "each",
        )
        self._apply = on_each(
            mesh,
            lambda *given: me._optimizer_steps(*given),
            ["all", "all", "each", "all", "all"],
            "all",
            donated=(0, 1),
        )
        self._added_up = on_each(mesh, lambda total: me._of_all(total), ["each"], "all")

    def __call__(
        self,
        adapters: Tree,
        opt_states: Tree,
        base: Tree,
        batches: Sequence[MicroBatch],
        denominators: np.ndarray,
        rates: np.ndarray,
        old_logprobs: Arrays | None = None,
        ref_logprobs: Arrays | None = None,
    ) -> tuple[Tree, Tree, dict[str, jax.Array], Arrays]:
        """One optimizer update a member -> adapters, opt_states, metrics [E] (on the device),
        logprobs. Where a member's loss or gradient is not finite nothing of it is changed, and
        train/skipped_updates is 1. Where the gradient is zero nothing is changed either: momentum
        alone is no step.

        `denominators` [E] are the losses' for all completions of a member's rollout, also those
        left out of `batches` because their advantage is zero; `rates` [E, n_updates] the learning
        rates by the count of updates made. The logprobs are what a second update on the same
        rollout takes as old_logprobs.
        """
        adapters, opt_states = placed(self.mesh, (adapters, opt_states), "all")
        total, logprobs = self._sum(adapters, base, batches, old_logprobs, ref_logprobs)
        new = self._apply(adapters, opt_states, total, denominators, rates)
        return *new, logprobs

    def init(self, adapters: Tree) -> Tree:
        """The optimizer states of [E, ...] adapters."""
        return jax.vmap(self.optimizer.init)(adapters)

    def logprobs(self, adapters, base, batches: Sequence[MicroBatch]) -> Arrays:
        """A forward pass alone: the policies' logprobs."""
        adapters, base = placed(self.mesh, adapters, "all"), placed(self.mesh, base, "base")
        stacks = [
            (self._forward(adapters, base, handed_out(self.mesh, stack), n), n)
            for stack, n in dealt(batches, emptied, self.mesh.size, STACK)
        ]
        return collected(stacks, self.mesh.size, len(batches))

    def tags(self, e: int) -> list[str]:
        """The metrics that say something of a member: its loss has others than another one's."""
        ours = ("loss", "entropy", "grad_norm", "skipped_updates")
        names = [*ours, *_metrics_of(self.objectives[e].loss)]
        sampler = ("logprob_diff_mean", "logprob_diff_max", "kl")
        of_sampler = [f"sampler/{name}" for name in sampler]
        return [*(f"train/{name}" for name in names), *of_sampler, "tokens/trained"]

    def gradient(self, adapters, base, batches, denominator) -> Tree:
        """The gradient alone, as the optimizers would see it before clipping."""
        total, _ = self._sum(adapters, base, batches, None, None)
        return jax.tree.map(lambda g: g / denominator, self._added_up(total).gradient)

    def compiled(self, adapters, base, batch: MicroBatch) -> jax.stages.Compiled:
        """The program of a shape of micro-batch (first update of a rollout), of shapes alone."""
        total = self._zeros.eval_shape(adapters)
        (stacked,) = dealt([batch], emptied, self.mesh.size, STACK)
        tape = self._new_tape.eval_shape(adapters, base, stacked[0])
        return self._accumulate.lower(total, tape, adapters, base, *stacked, None, None).compile()

    @property
    def n_compilations(self) -> int:
        """Programs compiled so far: for each shape of micro-batch one with the gradient, one
        forward alone where that is needed, one more where only later updates have old_logprobs;
        and the optimizer's."""
        programs = (self._accumulate, self._forward, self._apply)
        return sum(f._cache_size() for f in programs)  # type: ignore[attr-defined]

    def _model(self, adapters, base) -> Decoder:
        base = gathered_when_read(self.mesh, base)
        return nnx.merge(self.graph, side_by_side(adapters, self.scales, self.ranks), base)

    def _sum(self, adapters, base, batches, old, ref):
        """The sums of each device, and the logprobs."""
        adapters, base = placed(self.mesh, adapters, "all"), placed(self.mesh, base, "base")
        total, logprobs, nothing = self._zeros(adapters), [], [None] * len(batches)
        given = [*zip(batches, old or nothing, ref or nothing, strict=True)]
        empty = lambda last: (emptied(last[0]), *last[1:])  # noqa: E731
        for dealt_out, n in dealt(given, empty, self.mesh.size, STACK):
            stack, o, r = handed_out(self.mesh, dealt_out)
            tape = self._take_tape(adapters, base, stack)
            total, self._tape, new = self._accumulate(total, tape, adapters, base, stack, n, o, r)
            logprobs.append((new, n))
        return total, collected(logprobs, self.mesh.size, len(batches))

    def _take_tape(self, adapters, base, stack: MicroBatch) -> Tape | None:
        """The last program's tape, or a new one where it does not fit this one."""
        tape, self._tape = self._tape, None
        shape_of = lambda tape: jax.tree.map(lambda x: (x.shape, x.dtype), tape)  # noqa: E731
        if shape_of(tape) != shape_of(self._new_tape.eval_shape(adapters, base, stack)):
            del tape
            tape = self._new_tape(adapters, base, stack)
        return tape

    def _blank_tape(self, adapters, base, stack: MicroBatch) -> Tape | None:
        """A tape to give to a program; None where it makes its own."""
        traced("tape", _words(stack))
        return self._empty_tape(adapters, base, stack) if backend().tape_outlives_programs else None

    def _empty_tape(self, adapters, base, stack: MicroBatch) -> Tape:
        def written(adapters, base, batch):
            return hidden_states(self._model(adapters, base), batch, [], **self.of_layers)

        batch = jax.tree.map(lambda x: x[0], stack)
        _, shapes = jax.eval_shape(written, adapters, base, batch)
        return jax.tree.map(lambda x: jax.lax.empty(x.shape, x.dtype), shapes)

    def _through_stack(self, total: Sums, tape, adapters, base, stack: MicroBatch, n, old, ref):
        traced("update", _words(stack))
        own = tape is None
        tape = self._empty_tape(adapters, base, stack) if own else tape

        def step(i, carry):
            total, tape, logprobs = carry
            batch, o, r = _nth((stack, old, ref), i)
            total, tape, new = self._micro_step(total, tape, adapters, base, batch, o, r)
            return total, tape, logprobs.at[i].set(new)

        carry = total, tape, jnp.zeros(stack.mask.shape)
        total, tape, logprobs = jax.lax.fori_loop(0, n, step, carry)
        return total, None if own else tape, logprobs

    def _logprobs_of_stack(self, adapters, base, stack: MicroBatch, n):
        traced("logprobs", _words(stack))

        def step(i, logprobs):
            batch, model = _nth(stack, i), self._model(adapters, base)
            return logprobs.at[i].set(
                token_logprobs(model, batch, **self.of_layers, **self.of_head)[0]
            )

        return jax.lax.fori_loop(0, n, step, jnp.zeros(stack.mask.shape))

    def _no_sums(self, adapters) -> Sums:
        zeros = lambda: jnp.zeros(len(self.objectives))  # noqa: E731
        names = {*OUR_SUMS}.union(*(_metrics_of(o.loss) for o in self.objectives))
        gradient = jax.tree.map(jnp.zeros_like, adapters)
        return Sums(gradient, {name: zeros() for name in sorted(names)}, zeros())

    def _micro_step(self, total: Sums, tape, adapters, base, batch, old_logprobs, ref_logprobs):
        mine = self._of_each(batch)

        def numerator(adapters):
            model = self._model(adapters, base)
            hidden, written = hidden_states(model, batch, tape, **self.of_layers)
            logprobs, entropies = head_logprobs(model, hidden, batch, **self.of_head)
            old = jax.lax.stop_gradient(logprobs)
            if old_logprobs is not None:
                old = jnp.where(jnp.isnan(old_logprobs), old, old_logprobs)
            of_members = self._terms(batch, mine, logprobs, old, ref_logprobs, entropies)
            return of_members["loss"].sum(), (of_members, logprobs, old, entropies, written)

        gradient_of = jax.grad(numerator, has_aux=True)
        gradient, (metrics, logprobs, old, entropies, tape) = gradient_of(adapters)
        gap = (old - batch.sampler_logprobs) * batch.mask  # both are of the policy that sampled
        sums = {"entropy": entropies, "tokens": batch.mask, "gap": jnp.abs(gap),
                "sampler_kl": k3(gap)}  # fmt: skip
        metrics |= {name: jnp.where(mine[:, :, None], x, 0).sum((1, 2)) for name, x in sums.items()}
        largest_gap = jnp.where(mine[:, :, None], jnp.abs(gap), 0).max((1, 2))
        gradient, metrics = jax.tree.map(jnp.add, total[:2], (gradient, metrics))
        return Sums(gradient, metrics, jnp.maximum(total.largest_gap, largest_gap)), tape, logprobs

    def _of_each(self, batch: MicroBatch) -> jax.Array:
        """bool [E, N]: which completions are a member's."""
        row = jnp.asarray(batch.starts) // batch.rows.shape[1]
        member = jnp.asarray(batch.members)[jnp.asarray(batch.row_prompts)[row]]
        return member == jnp.arange(len(self.objectives), dtype=member.dtype)[:, None]

    def _terms(self, batch, mine, logprobs, old, ref, entropies) -> dict[str, jax.Array]:
        """The losses' numerators and metrics [E], each of a member's own completions. Members with
        the same loss go through it as one."""
        terms: dict[str, jax.Array] = {}
        for objective in dict.fromkeys(self.objectives):
            arrays = {"sampler_logprobs": batch.sampler_logprobs, "entropies": entropies}
            if ref is not None and objective.uses_ref:
                arrays["ref_logprobs"] = ref
            which = [e for e, o in enumerate(self.objectives) if o == objective]

            def of_one(mine, loss=objective.loss, arrays=arrays):
                mask = jnp.where(mine[:, None], batch.mask, 0)
                value, _, sums = loss(logprobs, old, batch.advantages, mask, **arrays)
                return sums | {"loss": value}

            for name, x in jax.vmap(of_one)(mine[np.array(which)]).items():
                none = jnp.zeros(len(self.objectives))
                terms[name] = terms.get(name, none).at[np.array(which)].set(x)
        return terms

    def _of_all(self, total: Sums) -> Sums:
        sums, largest_gap = added_up(self.mesh, total[:2], total.largest_gap)
        return Sums(sums[0], sums[1], largest_gap)

    def _optimizer_steps(self, adapters, opt_states, total: Sums, denominators, rates):
        traced("optimizer", f"{len(jax.tree.leaves(adapters))} arrays")
        total = self._of_all(total)
        return jax.vmap(self._optimizer_step)(adapters, opt_states, total, denominators, rates)

    def _optimizer_step(self, adapter, opt_state, total: Sums, denominator, rates):
        gradient = jax.tree.map(lambda g: g / denominator, total.gradient)
        lr = rates[optax.tree.get_all_with_path(opt_state, "count")[0][1]]
        updates, stepped = self.optimizer.update(gradient, opt_state, adapter, lr=lr)
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


@cache
def _metrics_of(loss: Loss) -> list[str]:
    """The names of a loss's metrics; found by tracing it, which is not done at every step."""
    one = jnp.zeros((1, 1))
    arrays = {"sampler_logprobs": one, "entropies": one}
    return [*jax.eval_shape(loss, one, one, one[0], one, **arrays)[2]]


def loss_denominator(loss: Loss, mask: np.ndarray) -> float:
    """The denominator for all completions: it depends on their lengths alone (mask [N, T]). At
    least 1, so that where nothing is trained the loss is 0."""
    zeros = jnp.zeros(mask.shape)
    arrays = {"sampler_logprobs": zeros, "entropies": zeros}
    return max(1.0, float(loss(zeros, zeros, jnp.zeros(len(mask)), jnp.asarray(mask), **arrays)[1]))
