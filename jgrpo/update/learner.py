"""The policies that are trained: adapters and optimizer states, and how one rollout changes them.

Members stand side by side (`step`); a lone run is a population of one. How many updates a rollout
makes, of which completions, is each member's own: the n-th update of all is one program's.

Old and reference logprobs are computed where a technique needs them, and only there: with one
update a rollout the policy is the old one, and without a KL to base or start nobody asks for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jgrpo.config import Config
from jgrpo.losses import LOSSES
from jgrpo.policy.attention import chosen
from jgrpo.policy.batch import MicroBatch, Rows, completion_mask, micro_batches, with_signal
from jgrpo.policy.lora import nth, stacked_up, switched_off, with_nth, with_rank
from jgrpo.policy.mesh import here, make_mesh, placed
from jgrpo.update.optimizer import adam, learning_rate
from jgrpo.update.programs import Loss, Objective, Tree
from jgrpo.update.step import Arrays, Update, loss_denominator

SKIPPED = "train/skipped_updates"


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
    return _bound(c.loss_type, tuple(options.items()))


@cache
def _bound(name: str, options: tuple) -> Loss:
    """The same object for the same options: members that share it are computed as one."""
    return partial(LOSSES[name], **dict(options))


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
    """The completions of one optimizer update of a member, by their place in its rollout: those
    that can have a gradient; and the loss's denominator for all."""

    index: np.ndarray
    denominator: float


def parts_of(config: Config, rows: Rows) -> list[Part]:
    """A rollout cut into the completions of each update of an epoch, whole groups together; what
    can have no gradient is left out, but not of the denominators.

    Groups are dealt out in turn: dynamic sampling puts those with a signal first, and a part of
    others alone would have nothing to learn."""
    c, mask = config, completion_mask(rows)
    pull = np.ones(len(mask)) if pulls_without_advantage(c) else rows.advantages.copy()
    pull[~mask.any(axis=1)] = 0.0
    turn = np.arange(len(mask)) // c.group_size % c.updates_per_epoch
    parts = []
    for part in range(c.updates_per_epoch):
        index = np.flatnonzero(turn == part)
        denominator = loss_denominator(loss_of(c), mask[index])
        parts.append(Part(index[with_signal(pull[index])], denominator))
    return parts


def batches_of(
    config: Config, rows: Rows, index: np.ndarray, n_devices: int = 1
) -> list[MicroBatch]:
    """Some completions of a rollout, as a config cuts them."""
    c = config
    return micro_batches(
        rows, index, micro_batch_size=c.micro_batch_size,
        max_prompt_tokens=c.max_prompt_tokens, max_tokens=c.max_tokens, n_devices=n_devices,
    )  # fmt: skip


Turn = tuple[tuple[int, int], ...]
"""What one update trains: (member, part of its rollout), for each member that has one."""


class Logprobs:
    """Of a rollout's completions, under their places in it, float32 [N, longest]; NaN until known.
    What is known stays."""

    def __init__(self, rows: Rows) -> None:
        longest = max(map(len, rows.completions), default=0)
        self.values = np.full((len(rows.completions), longest), np.nan, np.float32)

    def add(self, batches: Sequence[MicroBatch], arrays: Arrays) -> None:
        """What `Update` gave for these micro-batches."""
        for batch, values in zip(batches, arrays, strict=True):
            for i, row, n in zip(batch.completions, values, lengths(batch), strict=True):
                if n and np.isnan(self.values[i, 0]):
                    self.values[i, :n] = row[:n]

    def of(self, batches: Sequence[MicroBatch]) -> Arrays | None:
        """As `Update` takes them; None if none is known."""
        found = [np.full(batch.mask.shape, np.nan, np.float32) for batch in batches]
        for values, batch in zip(found, batches, strict=True):
            for row, i, n in zip(values, batch.completions, lengths(batch), strict=True):
                row[:n] = self.values[i, :n] if n else 0
        return None if all(np.isnan(values).all() for values in found) else found


class Learner:
    """Holds the members' `adapters` and `opt_states`, [E, ...] each, smaller ranks filled up with
    zeros, and changes them a rollout at a time; `skipped_in_a_row` [E] counts the last updates that
    were not finite. `starts` are the adapters that the runs began from, where those are not
    `adapters` themselves; `scales` as in `Update`. It computes on `mesh`, else on all devices."""

    def __init__(
        self,
        configs: Sequence[Config],
        graph: nnx.GraphDef,
        adapters: nnx.State,
        base: nnx.State,
        *,
        starts: nnx.State | None = None,
        scales: Sequence[float] | None = None,
        mesh: Mesh | None = None,
    ):
        self.configs = list(configs)
        self.mesh = make_mesh(self.configs[0].fsdp) if mesh is None else mesh
        self.base, self.adapters = (
            placed(self.mesh, base, "base"),
            placed(self.mesh, adapters, "all"),
        )
        self.starts = self.adapters if starts is None else starts
        self.rates = learning_rates(self.configs)
        self.update = update_of(self.configs, graph, adapters, base, scales, self.mesh)
        self.opt_states = self.update.init(adapters)
        self.skipped_in_a_row = [0] * len(self.configs)

    def state(self, e: int) -> tuple[nnx.State, Tree]:
        """A member's adapter, of its own rank, and its optimizer's state."""
        mine = here((self.adapters, self.opt_states))
        return with_rank(nth(mine, e), self.configs[e].lora_r)

    def set_state(self, e: int, state: tuple[nnx.State, Tree]) -> None:
        """Go on from what `state` gave."""
        rank = max(c.lora_r for c in self.configs)
        now = self.adapters, self.opt_states
        state = with_rank(jax.device_get(state), rank)
        self.adapters, self.opt_states = with_nth(now, e, state)

    @cached_property
    def ref(self) -> nnx.State:
        """What the members' KL is to; made once, before the first update."""
        each = [ref_adapter(c, nth(self.starts, e)) for e, c in enumerate(self.configs)]
        return stacked_up(each)

    def rehearse(self, batch: MicroBatch) -> None:
        """Train on a micro-batch, and forget it."""
        jax.block_until_ready(self.update.gradient(self.adapters, self.base, [batch], 1.0))

    def logprobs_by(self, adapters: nnx.State, rows: Rows, index: np.ndarray) -> np.ndarray:
        """By other adapters [E, ...], of some completions of a rollout: [N, longest], else NaN."""
        batches, known = batches_of(self.configs[0], rows, index, self.mesh.size), Logprobs(rows)
        known.add(batches, self.update.logprobs(adapters, self.base, batches))
        return known.values

    def learn(self, rows: Mapping[int, Rows]) -> dict[int, dict[str, float]]:
        """All optimizer updates on a rollout of each member that takes part -> its metrics, means
        over its updates (tokens/trained, train/skipped_updates: their sum) without those that were
        skipped. `logprobs` are then the trainer's of what was trained, before the first update, by
        member: [N, longest], NaN elsewhere."""
        rollout = together(rows)
        parts = {e: parts_of(self.configs[e], r) for e, r in rows.items()}
        ends = np.cumsum([len(r.completions) for r in rows.values()])
        first = dict(zip(rows, [0, *ends.tolist()], strict=False))

        @cache
        def batches(turn: Turn) -> list[MicroBatch]:
            index = np.concatenate([first[e] + parts[e][p].index for e, p in turn])
            return batches_of(self.configs[0], rollout, index, self.mesh.size)

        old, ref = Logprobs(rollout), Logprobs(rollout)
        for turn in part_by_part(parts, [e for e in parts if len(parts[e]) > 1]):
            of_turn = batches(turn)  # of a single part they come with its first update
            old.add(of_turn, self.update.logprobs(self.adapters, self.base, of_turn))
        for turn in part_by_part(parts, [e for e in parts if needs_ref(self.configs[e])]):
            of_turn = batches(turn)
            ref.add(of_turn, self.update.logprobs(self.ref, self.base, of_turn))

        (_, n_before), *_ = jax.device_get(optax.tree.get_all_with_path(self.opt_states, "count"))
        history: dict[int, list[dict[str, float]]] = {e: [] for e in rows}
        n_updates = {e: self.configs[e].updates_per_rollout for e in rows}
        for j in range(max(n_updates.values())):
            turn = tuple((e, j % len(parts[e])) for e in rows if j < n_updates[e])
            for e, metrics in self._update(turn, parts, batches, old, ref).items():
                history[e].append(metrics)
        self.logprobs = dict(zip(rows, np.split(old.values, ends[:-1]), strict=True))
        return {e: self._summary(e, h, int(n_before[e])) for e, h in history.items()}

    def _update(self, turn: Turn, parts, batches, old: Logprobs, ref: Logprobs):
        """One update of each member of the turn -> its metrics."""
        of_turn = batches(turn)
        denominators = np.ones(len(self.configs), np.float32)
        for e, p in turn:
            denominators[e] = parts[e][p].denominator
        self.adapters, self.opt_states, metrics, logprobs = self.update(
            self.adapters, self.opt_states, self.base, of_turn, denominators, self.rates,
            old.of(of_turn), ref.of(of_turn),
        )  # fmt: skip
        old.add(of_turn, logprobs)
        metrics = jax.device_get(metrics)
        found = {e: {tag: float(x[e]) for tag, x in metrics.items()} for e, _ in turn}
        skipped = [pair for pair in turn if found[pair[0]][SKIPPED]] if len(turn) > 1 else []
        for pair in skipped:  # what is not finite reaches the others' sums: again, each alone
            found |= self._update((pair,), parts, batches, old, ref)
        return found

    def _summary(self, e: int, history: list[dict[str, float]], n_before: int) -> dict[str, float]:
        gap, tokens = "sampler/logprob_diff_max", "tokens/trained"
        for m in history:
            self.skipped_in_a_row[e] = self.skipped_in_a_row[e] + 1 if m[SKIPPED] else 0
        made = [m for m in history if not m[SKIPPED]] or history
        return {tag: float(np.mean([m[tag] for m in made])) for tag in self.update.tags(e)} | {
            gap: max(m[gap] for m in made),
            tokens: sum(m[tokens] for m in history),
            SKIPPED: sum(m[SKIPPED] for m in history),
            "train/lr": float(self.rates[e][n_before]),
            "train/compilations": self.update.n_compilations,
        }


def update_of(
    configs: Sequence[Config],
    graph: nnx.GraphDef,
    adapters: nnx.State,
    base: nnx.State,
    scales: Sequence[float] | None = None,
    mesh: Mesh | None = None,
) -> Update:
    """The update that members ask for; of the arrays only the shapes count."""
    shared, head_width = configs[0], nnx.merge(graph, adapters, base).config.head_width
    return Update(
        graph,
        [Objective(loss_of(c), needs_ref(c)) for c in configs],
        adam(),
        scales=scales,
        ranks=[c.lora_r for c in configs],
        temperature=shared.temperature,
        checkpoint=shared.gradient_checkpointing,
        entropy_gradient=any(c.entropy_coef > 0 for c in configs),
        attn_implementation=chosen(shared.attn_implementation, shared.dtype, head_width),
        mesh=make_mesh(shared.fsdp) if mesh is None else mesh,
    )


def learning_rates(configs: Sequence[Config]) -> np.ndarray:
    """[E, n_updates]: by the count of updates made; the last one where there are fewer."""
    longest = max(c.n_updates for c in configs)
    rates = np.zeros((len(configs), longest))
    for e, c in enumerate(configs):
        rate: Any = learning_rate(c.lr_scheduler_type, c.lr, c.n_updates, c.warmup_steps)
        count = np.minimum(np.arange(longest), c.n_updates - 1)
        rates[e] = rate(count) if callable(rate) else rate
    return rates


def part_by_part(parts: dict[int, list[Part]], members: Sequence[int]) -> list[Turn]:
    """Each part of these members' rollouts, those of one number together."""
    n = max((len(parts[e]) for e in members), default=0)
    return [tuple((e, p) for e in members if p < len(parts[e])) for p in range(n)]


def together(rows: Mapping[int, Rows]) -> Rows:
    """The members' rollouts, one after another."""
    all_of = lambda r: np.ones(len(r.completions), bool)  # noqa: E731
    each = list(rows.values())
    return Rows(
        [x for r in each for x in r.prompts],
        [x for r in each for x in r.completions],
        [x for r in each for x in r.sampler_logprobs],
        np.concatenate([r.advantages for r in each]),
        np.concatenate([all_of(r) if r.trained is None else r.trained for r in each]),
        np.concatenate([np.full(len(r.completions), e) for e, r in rows.items()]),
    )


def lengths(batch: MicroBatch) -> np.ndarray:
    """int [N]: trained tokens of each completion."""
    return batch.mask.sum(axis=1).astype(int)
