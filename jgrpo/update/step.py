"""The update: a pure function of (adapters, optimizer states, base, micro-batches).

It is that of E members at once: E adapters over one base, [E, L, in, R], each with a loss, an
optimizer and figures of its own; a lone run is a population of one. A micro-batch holds completions
of any of them, and a member's gradient comes from its own alone.

Gradients are sums over micro-batches, divided once by the denominator of the member's whole
rollout; then one optimizer update each. Adapters and optimizer states are donated; of an update its
logprobs return to the host. Each device of a mesh goes through micro-batches of its own
(`policy/mesh.py`); what one computes is in `update/programs.py`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jgrpo.policy.backend import backend
from jgrpo.policy.batch import MicroBatch, bucket, emptied
from jgrpo.policy.mesh import (
    collected,
    dealt,
    handed_out,
    make_mesh,
    placed,
)
from jgrpo.policy.tape import Tape
from jgrpo.update.optimizer import adam as adam  # with `Update` where it is made
from jgrpo.update.programs import Loss, Objective, Programs, Tree, metrics_of, shared

Arrays = Sequence[np.ndarray]
"""float32 [N, U], one a micro-batch."""

STACK = 16
"""How many micro-batches one program goes through. XLA's CPU client maps a program's memory anew at
each execution, and new pages cost time: up to a tenth of a micro-batch's."""


class Update:
    """Compiled once for each shape of micro-batch (`programs`).

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
        self.mesh = make_mesh() if mesh is None else mesh
        self.programs = shared(Programs(
            graph, tuple(alone), optimizer,
            scales=tuple(scales or [1.0] * len(alone)),
            ranks=tuple(ranks) if ranks else None,
            temperature=temperature,
            checkpoint=checkpoint,
            entropy_gradient=entropy_gradient,
            attn_implementation=attn_implementation,
            mesh=self.mesh,
            backend=backend(),
        ))  # fmt: skip
        self._compiled_before = self.programs.n_compiled
        self._tape: Tape | None = None

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
        new = self.programs.apply(adapters, opt_states, total, denominators, rates)
        return *new, logprobs

    def init(self, adapters: Tree) -> Tree:
        """The optimizer states of [E, ...] adapters."""
        return self.programs.init(adapters)

    def logprobs(self, adapters, base, batches: Sequence[MicroBatch]) -> Arrays:
        """A forward pass alone: the policies' logprobs."""
        adapters, base = placed(self.mesh, adapters, "all"), placed(self.mesh, base, "base")
        stacks = [
            (self.programs.forward(adapters, base, handed_out(self.mesh, stack), n), n)
            for stack, n in dealt(batches, emptied, self.mesh.size, STACK)
        ]
        return collected(stacks, self.mesh.size, len(batches))

    def tags(self, e: int) -> list[str]:
        """The metrics that say something of a member: its loss has others than another one's."""
        ours = ("loss", "entropy", "grad_norm", "skipped_updates")
        names = [*ours, *metrics_of(self.programs.objectives[e].loss)]
        sampler = ("logprob_diff_mean", "logprob_diff_max", "kl")
        of_sampler = [f"sampler/{name}" for name in sampler]
        return [*(f"train/{name}" for name in names), *of_sampler, "tokens/trained"]

    def gradient(self, adapters, base, batches, denominator) -> Tree:
        """The gradient alone, as the optimizers would see it before clipping."""
        total, _ = self._sum(adapters, base, batches, None, None)
        return jax.tree.map(lambda g: g / denominator, self.programs.of_all_devices(total).gradient)

    def compiled(self, adapters, base, batch: MicroBatch) -> jax.stages.Compiled:
        """The program of a shape of micro-batch (first update of a rollout), of shapes alone."""
        total = self.programs.zeros.eval_shape(adapters)
        (stacked,) = dealt([batch], emptied, self.mesh.size, STACK)
        tape = self.programs.new_tape.eval_shape(adapters, base, stacked[0])
        return self.programs.accumulate.lower(
            total, tape, adapters, base, *stacked, None, None
        ).compile()

    @property
    def n_compilations(self) -> int:
        """Of `programs.n_compiled` those since this update was made."""
        return self.programs.n_compiled - self._compiled_before

    def _sum(self, adapters, base, batches, old, ref):
        """The sums of each device, and the logprobs."""
        adapters, base = placed(self.mesh, adapters, "all"), placed(self.mesh, base, "base")
        total, logprobs, nothing = self.programs.zeros(adapters), [], [None] * len(batches)
        given = [*zip(batches, old or nothing, ref or nothing, strict=True)]
        empty = lambda last: (emptied(last[0]), *last[1:])  # noqa: E731
        for dealt_out, n in dealt(given, empty, self.mesh.size, STACK):
            stack, o, r = handed_out(self.mesh, dealt_out)
            tape = self._take_tape(adapters, base, stack)
            total, self._tape, new = self.programs.accumulate(
                total, tape, adapters, base, stack, n, o, r
            )
            logprobs.append((new, n))
        return total, collected(logprobs, self.mesh.size, len(batches))

    def _take_tape(self, adapters, base, stack: MicroBatch) -> Tape | None:
        """The last program's tape, or a new one where it does not fit this one."""
        tape, self._tape = self._tape, None
        shape_of = lambda tape: jax.tree.map(lambda x: (x.shape, x.dtype), tape)  # noqa: E731
        if shape_of(tape) != shape_of(self.programs.new_tape.eval_shape(adapters, base, stack)):
            del tape
            tape = self.programs.new_tape(adapters, base, stack)
        return tape


def loss_denominator(loss: Loss, mask: np.ndarray) -> float:
    """The denominator for all completions: it depends on their lengths alone (mask [N, T]). At
    least 1, so that where nothing is trained the loss is 0."""
    wider = bucket(mask.shape[1]) - mask.shape[1]  # or each longest length would be compiled for
    return max(1.0, float(_denominator(loss, np.pad(mask, ((0, 0), (0, wider))))))


@jax.jit(static_argnums=0)
def _denominator(loss: Loss, mask: jax.Array) -> jax.Array:
    zeros = jnp.zeros(mask.shape)
    arrays = {"sampler_logprobs": zeros, "entropies": zeros}
    return loss(zeros, zeros, zeros[:, 0], mask, **arrays)[1]
