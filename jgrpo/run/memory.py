"""What training will take of the device's memory, before anything is loaded or sampled: the largest
micro-batch is compiled, and the compiler says what it needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from jgrpo.config import Config
from jgrpo.policy import batch
from jgrpo.policy.batch import MicroBatch, Rows
from jgrpo.policy.mesh import lies, make_mesh
from jgrpo.run.device import free_memory
from jgrpo.run.policy import Policy
from jgrpo.run.sampler import sampled_at_once
from jgrpo.update.learner import update_of

KNOBS = (
    "a smaller --micro_batch_size or --gradient_checkpointing needs less (--resume takes both), "
    "and so does a run with --dtype bfloat16 or a smaller --max_tokens"
)


@dataclass(frozen=True)
class Memory:
    """Bytes that the training phase holds at its peak, on each device."""

    base: int
    """The frozen weights."""
    adapter: int
    """Adapter, Adam's two moments, and the gradient that is summed up."""
    activations: int
    """What the largest micro-batch's program needs beside them: activations and a chunk of logits.
    """
    batch: MicroBatch
    """That micro-batch."""

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.activations

    def table(self, free: int | None) -> str:
        """For the terminal; `free` as from `free_memory`."""
        (p, s), (r, u) = self.batch.prompts.shape, self.batch.rows.shape
        tokens = f"{p} x {s} prompt and {r} x {u} completion tokens"
        lines = [
            ("base model", self.base),
            ("adapter, Adam's moments, gradient", self.adapter),
            (f"largest micro-batch ({tokens})", self.activations),
            ("training phase at its peak", self.total),
            *([("free now", free)] if free is not None else []),
        ]
        width = max(len(name) for name, _ in lines)
        text = "\n".join(f"{name:{width}}  {size / 2**30:9.3f} GiB" for name, size in lines)
        if free is not None and self.total > free:
            text += f"\nThis does not fit: {KNOBS}."
        return text


def largest_micro_batch(config: Config, prompt_lengths: Sequence[int]) -> MicroBatch:
    """The largest that a rollout may be cut into, with completions that are as long as they may be,
    after the longest prompts."""
    c = config
    longest = sorted(prompt_lengths)[-c.n_prompts_per_step :]
    prompts = [[p] * n for p, n in enumerate(longest) for _ in range(c.group_size)]
    completions = [[0] * c.max_tokens] * len(prompts)
    logprobs = [[0.0] * c.max_tokens] * len(prompts)
    advantages = np.ones(len(prompts) // c.updates_per_epoch, np.float32)
    whole = slice(len(advantages))
    return batch.largest_micro_batch(
        Rows(prompts[whole], completions[whole], logprobs[whole], advantages),
        micro_batch_size=c.micro_batch_size,
        max_prompt_tokens=c.max_prompt_tokens,
        max_tokens=c.max_tokens,
    )


def training_memory(
    configs: Sequence[Config], policy: Policy, prompt_lengths: Sequence[int]
) -> Memory:
    """Of the policies' shapes alone (`open_policies(configs, abstract=True)`); seconds to a minute,
    for the compiler. The sampler's memory and the server's are not in it."""
    batch = largest_micro_batch(configs[0], prompt_lengths)
    update = update_of(configs, policy.graph, policy.adapter, policy.base, policy.scales)
    stats: Any = update.compiled(policy.adapter, policy.base, batch).memory_analysis()
    opt_states = jax.eval_shape(update.init, policy.adapter)
    donated = stats.alias_size_in_bytes - _size(policy.adapter)  # the tape; the gradient is below
    return Memory(
        base=_size_on_each(policy.base, update.mesh),
        adapter=2 * _size(policy.adapter) + _size(opt_states),
        activations=donated + stats.temp_size_in_bytes,
        batch=batch,
    )


def of_sampling(configs: Sequence[Config], policy: Policy, free: int | None) -> str:
    """How the embedded sampler will use `free` bytes, into which the weights are still to go."""
    mesh, m = make_mesh(configs[0].fsdp), configs[0].n_completions_per_step * len(configs)
    left = None if free is None else free - _size_on_each(policy.base, mesh)
    n = min(m, mesh.size * sampled_at_once(configs[0], policy, left))
    return f"the embedded sampler decodes {n} of {m} completions at once"


def is_small(policy: Policy) -> bool:
    """Does the model take so little of the free memory that its training need not be tried?"""
    free = free_memory()
    return free is None or 50 * _size(policy.base) < free


def _size(tree) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _size_on_each(base: nnx.State, mesh: Mesh) -> int:
    """On each device, of a base that may be cut over several."""
    return sum(
        prod(lies(mesh, path, x.shape).shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for path, x in nnx.to_flat_state(base)
    )


def ran_out(error: BaseException) -> bool:
    """Is this the device out of memory?"""
    return isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
