"""The policy that is trained: adapter and optimizer state, and how one rollout changes them.

Old and reference logprobs are computed where a technique needs them, and only there: with one
update a rollout the policy is the old one, and without a KL to base or start nobody asks for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jgrpo.config import Config
from jgrpo.losses import LOSSES
from jgrpo.policy.attention import chosen
from jgrpo.policy.batch import MicroBatch, Rows, completion_mask, micro_batches, with_signal
from jgrpo.policy.lora import switched_off
from jgrpo.update.step import Loss, Update, adam, learning_rate, loss_denominator


def loss_of(config: Config) -> Loss:
    """The loss that a config asks for, its options bound."""
    c = config
    options: dict[str, Any] = {}
    if c.use_clip:
        options |= {"clip_eps": c.clip_eps, "clip_eps_high": c.clip_eps_high,
                    "clip_delta": c.clip_delta}  # fmt: skip
    if c.use_token_level_loss and c.loss_type != "cispo":  # CISPO is so by itself
        options["token_level"] = True
    if c.loss_type == "dr_grpo":
        options["max_tokens"] = c.max_tokens
    if c.loss_type == "cispo":
        options["max_ratio"] = c.cispo_max_ratio
    if c.loss_type == "sapo":
        options |= {"tau_positive": c.sapo_tau_positive, "tau_negative": c.sapo_tau_negative}
    if c.loss_type == "dppo":
        options["max_difference"] = c.dppo_max_difference
    if c.use_kl_penalty:
        options |= {"beta": c.beta, "kl_estimator": c.kl_estimator}
        options |= {"kl_weighted": True} if c.use_weighted_kl else {}
    if c.use_importance_weights:
        options["importance_cap"] = c.importance_weight_cap
        options["importance_mode"] = c.importance_weight_mode
    if c.entropy_coef:
        options["entropy_coef"] = c.entropy_coef
    return partial(LOSSES[c.loss_type], **options)


def needs_ref(config: Config) -> bool:
    """Does the loss look at the logprobs of the base model, or of the adapter begun from?"""
    return config.use_kl_penalty and config.beta > 0 and config.kl_to != "old"


def ref_adapter(config: Config, start: nnx.State) -> nnx.State:
    """The adapter of the policy that the KL is to, where `start` is what the run began from: a copy
    of that, since the first update donates it, or zeros (the base)."""
    return jax.tree.map(jnp.copy, start) if config.kl_to == "start" else switched_off(start)


def pulls_without_advantage(config: Config) -> bool:
    """Can a completion whose advantage is zero have a gradient? (k1's is never zero.)"""
    off_policy = config.updates_per_rollout > 1 or config.kl_estimator == "k1"
    return (config.use_kl_penalty and (needs_ref(config) or off_policy)) or config.entropy_coef > 0


@dataclass(frozen=True)
class Part:
    """The completions of one optimizer update."""

    batches: list[MicroBatch]
    denominator: float


class Learner:
    """Holds `state`, (adapter, optimizer state), and changes it a rollout at a time;
    `skipped_in_a_row` counts the last updates that were not finite. `start` is the adapter that the
    run began from, where that is not `adapter` itself."""

    def __init__(
        self,
        config: Config,
        graph: nnx.GraphDef,
        adapter: nnx.State,
        base: nnx.State,
        start: nnx.State | None = None,
    ):
        self.config, self.base = config, base
        self.start = adapter if start is None else start
        self.loss = loss_of(config)
        rate = learning_rate(
            config.lr_scheduler_type, config.lr, config.n_updates, config.warmup_steps
        )
        self.rate: Callable[[int], Any] = rate if callable(rate) else lambda _: rate
        optimizer = adam(rate)
        head_width = nnx.merge(graph, adapter, base).config.head_width
        self.update = Update(
            graph,
            self.loss,
            optimizer,
            temperature=config.temperature,
            checkpoint=config.gradient_checkpointing,
            entropy_gradient=config.entropy_coef > 0,
            attn_implementation=chosen(config.attn_implementation, config.dtype, head_width),
        )
        self.state = adapter, optimizer.init(adapter)
        self.skipped_in_a_row = 0

    @cached_property
    def ref(self) -> nnx.State:
        """What the KL is to; made once, before the first update."""
        return ref_adapter(self.config, self.start)

    def learn(self, rows: Rows) -> dict[str, float]:
        """All optimizer updates on one rollout -> metrics, means over the updates (tokens/trained,
        train/skipped_updates: their sum) without those that were skipped."""
        c, update = self.config, self.update
        adapter, opt_state = self.state
        n_before = int(optax.tree.get_all_with_path(opt_state, "count")[0][1])
        parts = self.parts(rows)
        old: list[Any] = [None]  # of a single part they come with its first update
        if len(parts) > 1:
            old = [update.logprobs(adapter, self.base, part.batches) for part in parts]
        ref: list[Any] = [None] * len(parts)
        if needs_ref(c):
            ref = [update.logprobs(self.ref, self.base, part.batches) for part in parts]
        history = []
        for _ in range(c.epochs_per_step):
            for i, part in enumerate(parts):
                *state, metrics, logprobs = update(
                    *self.state, self.base, part.batches, part.denominator, old[i], ref[i]
                )
                self.state = tuple(state)
                old[i] = old[i] or logprobs
                history.append(metrics)
        values = jax.device_get(history)
        gap, tokens, skipped = "sampler/logprob_diff_max", "tokens/trained", "train/skipped_updates"
        for m in values:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if m[skipped] else 0
        made = [m for m in values if not m[skipped]] or values
        return {tag: float(np.mean([m[tag] for m in made])) for tag in values[0]} | {
            gap: float(max(m[gap] for m in made)),
            tokens: float(sum(m[tokens] for m in values)),
            skipped: float(sum(m[skipped] for m in values)),
            "train/lr": float(self.rate(n_before)),
            "train/compilations": update.n_compilations,
        }

    def parts(self, rows: Rows) -> list[Part]:
        """A rollout cut into the completions of each update of an epoch, whole groups together;
        what can have no gradient is left out of the batches, but not of the denominators.

        Groups are dealt out in turn: dynamic sampling puts those with a signal first, and a part of
        others alone would have nothing to learn."""
        c, mask = self.config, completion_mask(rows)
        pull = np.ones(len(mask)) if pulls_without_advantage(c) else rows.advantages.copy()
        pull[~mask.any(axis=1)] = 0.0
        turn = np.arange(len(mask)) // c.group_size % c.updates_per_epoch
        parts = []
        for part in range(c.updates_per_epoch):
            index = np.flatnonzero(turn == part)
            batches = micro_batches(
                rows,
                index[with_signal(pull[index])],
                micro_batch_size=c.micro_batch_size,
                max_prompt_tokens=c.max_prompt_tokens,
                max_tokens=c.max_tokens,
            )
            parts.append(Part(batches, loss_denominator(self.loss, mask[index])))
        return parts
