"""Loss variants on fixed rollouts: the gradient of every variant from one forward pass.

logprobs and their pull-back depend on the model alone; a variant is a cotangent. So one program
computes logprobs once a micro-batch, every variant's d loss / d logprobs, and pulls each back.

Axes: M variants, B rows of a micro-batch, T tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgrpo.advantages import group_advantages, leave_one_out
from jgrpo.config import Config
from jgrpo.errors import InputError
from jgrpo.policy import adapter as adapters
from jgrpo.policy.batch import Rows, completion_mask
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.policy.lora import switched_off
from jgrpo.rewards.parts import combine, length_penalty
from jgrpo.run.policy import Policy
from jgrpo.run.rundir import existing_adapter
from jgrpo.run.scoring import Scorers
from jgrpo.update.learner import batches_of, loss_of, needs_ref, ref_adapter
from jgrpo.update.programs import Loss
from jgrpo.update.step import loss_denominator

Line = Mapping[str, Any]
FIELDS = {"token_ids", "sampler_logprobs", "advantage", "finish_reason", "reward_parts"}
"""What else is read of a rollouts file."""


@dataclass(frozen=True)
class Comparison:
    """What the variants make of the same rollouts; arrays along M, names in order."""

    names: list[str]
    loss: np.ndarray
    grad_norm: np.ndarray
    cosine: np.ndarray
    """[M, M]; nan where a gradient is zero"""
    metrics: list[dict[str, float]]
    """Means over the tokens: approx_kl, clip_fraction, ..."""


def read_rollouts(file: Path, group_size: int) -> list[Line]:
    """The lines of a rollouts file. InputError if it is not one, or its groups are not whole."""
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        prompts = [line["prompt_ids"] for line in lines]
        if absent := sorted({name for line in lines for name in FIELDS - line.keys()}):
            raise ValueError(f"lines without {', '.join(absent)}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: not a rollouts file: {error!r}") from error
    groups = [prompts[i : i + group_size] for i in range(0, len(prompts), group_size)]
    if not groups or any(g != [g[0]] * group_size for g in groups):
        raise InputError(f"{file}: needs whole groups of {group_size} completions of one prompt")
    return lines


def saved_rows(config: Config, lines: Sequence[Line]) -> Rows:
    """The rollouts as they were trained on, with their saved advantages."""
    truncated = np.array([line["finish_reason"] == "length" for line in lines])
    return Rows(
        [line["prompt_ids"] for line in lines],
        [line["token_ids"] for line in lines],
        [line["sampler_logprobs"] for line in lines],
        np.array([line["advantage"] for line in lines], np.float32),
        ~truncated if config.mask_truncated_completions else None,
    )


def rows_for(config: Config, lines: Sequence[Line], scorers: Scorers) -> Rows:
    """The rollouts with the rewards, advantages and masks that a variant gives them."""
    c, shape = config, (-1, config.group_size)
    parts = {"outcome": np.array([line["reward_parts"]["outcome"] for line in lines])}
    if c.reward_function:
        if "custom" not in lines[0]["reward_parts"]:
            raise InputError("the rollouts have no custom rewards; leave reward_function away")
        parts["custom"] = np.array([line["reward_parts"]["custom"] for line in lines])
    parts = {name: part.reshape(shape) for name, part in parts.items()}
    if scorers.process is not None:
        texts = np.array([line["completion"] for line in lines], object).reshape(shape)
        problems = [line["problem"] for line in lines[:: c.group_size]]
        parts["process"] = scorers.process(problems, texts.tolist())
    if c.use_length_penalty:
        n_tokens = np.array([len(line["token_ids"]) for line in lines]).reshape(shape)
        limits = c.expected_maximum_length, c.overlong_cache
        parts["length_penalty"] = length_penalty(n_tokens, *limits)
    advantages_of = leave_one_out if c.use_leave_one_out else group_advantages
    advantages = advantages_of(combine(parts, c.process_reward_weight), c.use_std_norm)
    return replace(saved_rows(config, lines), advantages=advantages.reshape(-1))


def compare(
    variants: Mapping[str, Config],
    rows: Sequence[Rows],
    policy: Policy,
    old_adapter: nnx.State,
    start: nnx.State | None = None,
) -> Comparison:
    """Every variant's loss and adapter gradient on the same rollouts, M of each.

    `policy.adapter` is the policy that is differentiated, `old_adapter` the one that sampled,
    `start` the one that the run began from (None: the base).
    """
    configs = list(variants.values())
    losses = [loss_of(c) for c in configs]
    ref_wanted = [c.kl_to if needs_ref(c) else None for c in configs]
    start = switched_off(policy.adapter) if start is None else start
    refs = {c.kl_to: ref_adapter(c, start) for c in configs if needs_ref(c)}
    entropy_gradient = any(c.entropy_coef > 0 for c in configs)
    first = configs[0]
    # All rows, whatever their advantages: they are cut alike for all variants.
    stacks = [batches_of(first, r, np.arange(len(r.advantages))) for r in rows]
    forward = _Forward(policy.graph, first.temperature, entropy_gradient)
    step = jax.jit(lambda *args: _gradients(forward, losses, ref_wanted, *args))
    logprobs_of = jax.jit(lambda *args: forward(*args)[0])
    total: Any = None
    for same in zip(*stacks, strict=True):  # one micro-batch, as each variant has it
        advantages, masks = np.stack([b.advantages for b in same]), np.stack([b.mask for b in same])
        batch = same[0]._replace(mask=masks.max(axis=0))
        old = logprobs_of(old_adapter, policy.base, batch)
        ref = {name: logprobs_of(ref, policy.base, batch) for name, ref in refs.items()}
        new = step(policy.adapter, policy.base, batch, old, ref, advantages, masks)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    denominators = [
        loss_denominator(loss, completion_mask(r)) for loss, r in zip(losses, rows, strict=True)
    ]
    return _summary(list(variants), jax.device_get(total), np.array(denominators))


class _Forward:
    """(adapter, base, batch) -> logprobs and entropies [B, T]."""

    def __init__(self, graph: nnx.GraphDef, temperature: float, entropy_gradient: bool):
        self.graph, self.temperature = graph, temperature
        self.entropy_gradient = entropy_gradient

    def __call__(self, adapter, base, batch):
        model = nnx.merge(self.graph, adapter, base)
        return token_logprobs(
            model, batch, temperature=self.temperature, entropy_gradient=self.entropy_gradient
        )


def _gradients(
    forward: _Forward, losses: Sequence[Loss], ref_wanted: Sequence[str | None],
    adapter, base, batch, old, ref, advantages, masks,
):  # fmt: skip
    """Numerators [M], gradients (a leading M on each array) and metrics of one micro-batch."""
    outputs, pull_back = jax.vjp(lambda a: forward(a, base, batch), adapter)
    numerators, cotangents, metrics = [], [], []
    for i, loss in enumerate(losses):

        def numerator(outputs, i=i, loss=loss):
            logprobs, entropies = outputs
            arrays = {"sampler_logprobs": batch.sampler_logprobs, "entropies": entropies}
            if (wanted := ref_wanted[i]) is not None:
                arrays["ref_logprobs"] = ref[wanted]
            value, _, sums = loss(logprobs, old, advantages[i], masks[i], **arrays)
            return value, sums | {"tokens": masks[i].sum()}

        (value, sums), cotangent = jax.value_and_grad(numerator, has_aux=True)(outputs)
        numerators.append(value)
        cotangents.append(cotangent)
        metrics.append(sums)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cotangents)
    (gradients,) = jax.lax.map(pull_back, stacked)  # one at a time: memory as for one loss
    return jnp.stack(numerators), gradients, metrics


def _summary(names: list[str], total, denominators: np.ndarray) -> Comparison:
    numerators, gradients, metrics = total
    flat = np.concatenate(
        [np.asarray(g, np.float64).reshape(len(names), -1) for g in jax.tree.leaves(gradients)], 1
    )
    flat /= denominators[:, None]
    norms = np.linalg.norm(flat, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = flat / norms[:, None]
    means = [
        {k: float(v / max(sums["tokens"], 1)) for k, v in sums.items() if k != "tokens"}
        for sums in metrics
    ]
    return Comparison(names, numerators / denominators, norms, unit @ unit.T, means)


def load_adapters(run: Path, policy: Policy, sampled_by: int, differentiated: int):
    """The adapters of two steps of a run -> the policy with the second, and the first."""
    folders = [existing_adapter(run, k) for k in (sampled_by, differentiated)]
    old, new = (adapters.load(folder, policy.adapter) for folder in folders)
    return Policy(policy.graph, new, policy.base), old
