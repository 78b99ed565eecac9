"""The update's programs: pure functions of what one device of a mesh has, of E members at once.

They go through a stack of micro-batches and add up gradients and metrics, compute logprobs alone,
and make the optimizers' steps of sums (`update/step.py` calls them).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jgrpo.losses import Terms, k3
from jgrpo.policy.backend import Backend
from jgrpo.policy.batch import MicroBatch
from jgrpo.policy.logprobs import head_logprobs, hidden_states, token_logprobs
from jgrpo.policy.lora import side_by_side
from jgrpo.policy.mesh import added_up, gathered_when_read, on_each
from jgrpo.policy.model import Decoder
from jgrpo.policy.tape import Tape
from jgrpo.policy.tracing import traced
from jgrpo.update.optimizer import global_norm

Loss = Callable[..., Terms]
"""One of `losses.LOSSES` with its options bound. Besides logprobs, old_logprobs, advantages and
mask it is given the arrays ref_logprobs (if there are any), sampler_logprobs and entropies."""
Tree = Any


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


@dataclass(frozen=True)
class Programs:
    """Each is compiled once for each shape of its arrays. The fields are as in `step.Update`; equal
    ones are to be `shared`."""

    graph: nnx.GraphDef
    objectives: tuple[Objective, ...]
    optimizer: optax.GradientTransformationExtraArgs
    scales: tuple[float, ...]
    ranks: tuple[int, ...] | None
    temperature: float
    checkpoint: bool
    entropy_gradient: bool
    attn_implementation: str
    mesh: Mesh
    backend: Backend

    @cached_property
    def zeros(self) -> Any:
        """Sums of nothing, of adapters."""
        return on_each(self.mesh, self._no_sums, ["all"], "each")

    @cached_property
    def new_tape(self) -> Any:
        """A tape to give to `accumulate`; None where that makes its own."""
        return on_each(self.mesh, self._blank_tape, ["all", "base", "each"], "each")

    @cached_property
    def accumulate(self) -> Any:
        """Sums, tape, adapters, base, a stack of micro-batches, how many of it count, and the
        stack's old and reference logprobs or None -> sums, tape, logprobs."""
        given = ["each", "each", "all", "base", "each", "all", "each", "each"]
        return on_each(self.mesh, self._through_stack, given, "each", donated=(0, 1))

    @cached_property
    def forward(self) -> Any:
        """Adapters, base, a stack and how many of it count -> logprobs."""
        given = ["all", "base", "each", "all"]
        return on_each(self.mesh, self._logprobs_of_stack, given, "each")

    @cached_property
    def apply(self) -> Any:
        """Adapters, optimizer states, sums, denominators, rates -> new ones, and metrics."""
        given = ["all", "all", "each", "all", "all"]
        return on_each(self.mesh, self._optimizer_steps, given, "all", donated=(0, 1))

    @cached_property
    def init(self) -> Any:
        """Adapters -> the states of their optimizers."""
        return jax.jit(jax.vmap(self.optimizer.init))

    @cached_property
    def of_all_devices(self) -> Any:
        """Sums of each device -> of all."""
        return on_each(self.mesh, self._of_all, ["each"], "all")

    @property
    def n_compiled(self) -> int:
        """Programs of the update itself: for each shape of micro-batch one with the gradient, one
        forward alone where that is needed, one more where only later updates have old_logprobs;
        and the optimizer's."""
        return sum(f._cache_size() for f in (self.accumulate, self.forward, self.apply))

    @property
    def _of_layers(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks or (1,) * len(self.objectives),
            "checkpoint": self.checkpoint,
            "attn_implementation": self.attn_implementation,
        }

    @property
    def _of_head(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "entropy_gradient": self.entropy_gradient}

    def _model(self, adapters, base) -> Decoder:
        base = gathered_when_read(self.mesh, base)
        return nnx.merge(self.graph, side_by_side(adapters, self.scales, self.ranks), base)

    def _blank_tape(self, adapters, base, stack: MicroBatch) -> Tape | None:
        traced("tape", _words(stack))
        if not self.backend.tape_outlives_programs:
            return None
        return self._empty_tape(adapters, base, stack)

    def _empty_tape(self, adapters, base, stack: MicroBatch) -> Tape:
        def written(adapters, base, batch):
            return hidden_states(self._model(adapters, base), batch, [], **self._of_layers)

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
                token_logprobs(model, batch, **self._of_layers, **self._of_head)[0]
            )

        return jax.lax.fori_loop(0, n, step, jnp.zeros(stack.mask.shape))

    def _no_sums(self, adapters) -> Sums:
        zeros = lambda: jnp.zeros(len(self.objectives))  # noqa: E731
        names = {*OUR_SUMS}.union(*(metrics_of(o.loss) for o in self.objectives))
        gradient = jax.tree.map(jnp.zeros_like, adapters)
        return Sums(gradient, {name: zeros() for name in sorted(names)}, zeros())

    def _micro_step(self, total: Sums, tape, adapters, base, batch, old_logprobs, ref_logprobs):
        mine = self._of_each(batch)

        def numerator(adapters):
            model = self._model(adapters, base)
            hidden, written = hidden_states(model, batch, tape, **self._of_layers)
            logprobs, entropies = head_logprobs(model, hidden, batch, **self._of_head)
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


@lru_cache(maxsize=8)
def shared(programs: Programs) -> Programs:
    """The first of those that equal it, with what it has compiled: runs of one process that ask for
    the same compile once. The last few are kept."""
    return programs


def _words(stack: MicroBatch) -> str:
    (p, s), (r, u), m = stack.prompts.shape[1:], stack.rows.shape[1:], stack.places.shape[1]
    return f"prompts {p} x {s}, rows {r} x {u}, {m} tokens"


def _nth(stack: Tree, i: jax.Array) -> Tree:
    """The i-th of a stack, or of several (x[i] is code for negative i too)."""
    i = i.astype(jnp.uint32)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stack)


@cache
def metrics_of(loss: Loss) -> list[str]:
    """The names of a loss's metrics; found by tracing it, which is not done at every step."""
    one = jnp.zeros((1, 1))
    arrays = {"sampler_logprobs": one, "entropies": one}
    return [*jax.eval_shape(loss, one, one, one[0], one, **arrays)[2]]
