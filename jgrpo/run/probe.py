"""Does the sampler follow the adapter? Proved before the first step, watched at every step.

A fresh adapter (B = 0) is the base model, so a sampler that ignores its adapter looks right at
first. The probe is an adapter that changes the policy visibly; the guard compares each step's
logprobs.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jgrpo.config import Config
from jgrpo.errors import RunError
from jgrpo.policy import adapter as adapters
from jgrpo.policy.adapter import AdapterConfig
from jgrpo.policy.batch import Rows, micro_batches
from jgrpo.policy.lora import fresh_adapter, nth, switched_off, with_rank
from jgrpo.rollout.protocol import Completion, Sampler, prompt_seeds
from jgrpo.run.policy import Policy
from jgrpo.run.session import Problems
from jgrpo.update.learner import Learner, together

PROBE_PROMPTS, PROBE_TOKENS, PROBE_SHIFT_NATS, LEAST_SHIFT_NATS = 4, 16, 0.3, 0.01
PROBE_SHARE = {"float32": 0.01, "float16": 0.25, "bfloat16": 0.5}
"""Largest part of the probe's effect by which the sampler may miss it. An adapter that is ignored
misses by all of it, one layer's projection that is left out by 0.08 and more; float32 rounding by
1e-6, bfloat16 by 0.1 or more where the model is sure of its tokens."""

PROBE_SIZES = 1, 2, 4, 8, 16, 32, 64
"""How many times as large a probe is taken while it moves what is sampled by no more than 16 bits
round: a model that is sure of what it writes is moved by 0.002 nats, and rounding is 0.001."""

OF_THE_SAMPLER = ("sampler/logprob_diff_mean", "sampler/logprob_diff_max", "sampler/kl")
GUARD_TOKENS = 4096
"""Of so many tokens the mean gap is known well enough, whichever they are."""

LARGEST_MEAN_GAP = {"float32": 1e-3, "float16": 0.0125, "bfloat16": 0.1}
"""max_mean_logprob_diff where it is not given (nats): five times what rounding explains in 16 bits
(benchmarks/gap.py: 0.021 in bfloat16, 0.0024 in float16)."""


def check_sampler(
    configs: Sequence[Config],
    policy: Policy,
    sampler: Sampler,
    problems: Problems,
    folders: Sequence[Path],
) -> dict[str, float]:
    """Prove that adapters take effect: sample from a probe adapter that changes the policy visibly
    (PROBE_SHIFT_NATS a token), and compare the sampler's logprobs with the trainer's. Each member
    has another one, so that two that are mixed up are found.

    Returns the gap to the probe and to the base, of the member that is worst, and the largest mean
    gap to a probe that was not made larger, which is rounding. Raises RunError if the sampler does
    not follow an adapter (a fresh one, B = 0, would look right even if it were ignored). The
    adapters stay in the folders: the last is still loaded.
    """
    prompts = probe_prompts(problems)
    probes = [_probe_adapter(policy, e, prompts, config) for e, config in enumerate(configs)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    tried = []
    for size in PROBE_SIZES:
        tried.append(_probed(configs, policy, sampler, prompts, probes, folders, size))
        moved = [np.abs(to_base - to_probe).mean() for to_probe, to_base in tried[-1]]
        if all(x > LARGEST_MEAN_GAP[c.dtype] for x, c in zip(moved, configs, strict=True)):
            break
    first, last = tried[0], tried[-1]
    found = [_verdict(c, e, policy, first[e][0], *last[e]) for e, c in enumerate(configs)]
    rounding = max(float(np.abs(to_probe).mean()) for to_probe, _ in first)
    return max(found, key=lambda gap: gap["probe/gap_mean"]) | {"probe/rounding": rounding}


def _probed(
    configs, policy, sampler, prompts, probes, folders, size: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The sampler's gaps to the trainer with a probe of this size, and to that without one, on
    tokens sampled from the probe: float [tokens] both, of each member."""
    probes = [_times(size, probe) for probe in probes]
    folders = [folder / f"probe_{size}" for folder in folders]
    for config, folder, probe in zip(configs, folders, probes, strict=True):
        shape = AdapterConfig(config.lora_r, config.lora_alpha, config.lora_target_modules)
        adapters.save(probe, folder, shape, config.model_id)
    sampler.load(*folders)
    completions = short_completions(configs, range(len(configs)), sampler, prompts, 0)

    def gaps(e: int, adapter: nnx.State) -> np.ndarray:
        return gaps_of(policy, e, adapter, prompts, completions[e], configs[e].temperature)

    return [(gaps(e, probe), gaps(e, switched_off(probe))) for e, probe in enumerate(probes)]


def probe_prompts(problems: Problems) -> list[list[int]]:
    return [list(p.prompt_ids) for p in problems.train[:PROBE_PROMPTS]]


def short_completions(
    configs: Sequence[Config],
    members: Sequence[int],
    sampler: Sampler,
    prompts: list[list[int]],
    step: int,
) -> dict[int, list[Completion]]:
    """One of each prompt, by what is loaded of each of these members; `step` counts as a seed."""
    shared, n = configs[0], len(prompts)
    groups = sampler.sample(
        prompts * len(members),
        seeds=[seed for e in members for seed in prompt_seeds(configs[e].seed, step, n)],
        members=[e for e in members for _ in prompts],
        temperature=shared.temperature,
        max_tokens=min(PROBE_TOKENS, shared.max_tokens),
    )
    return {e: [g[0] for g in groups[i * n : (i + 1) * n]] for i, e in enumerate(members)}


def _verdict(
    config: Config, e: int, policy: Policy, to_first: np.ndarray, to_probe: np.ndarray, to_base
) -> dict[str, float]:
    """A member's figures. RunError as above; of one token the gap to the first probe counts, since
    16 bits round more where a larger one moves it far."""
    to_probe, to_base = np.abs(to_probe), np.abs(to_base)
    of_member = f"member {e}: " if len(policy.scales) > 1 else ""
    figures = (
        f"on {len(to_probe)} tokens sampled from a probe adapter, |logprob of the sampler - of the "
        f"trainer| is {to_probe.mean():.2g} on average and {to_probe.max():.2g} at most; to the "
        f"trainer without the adapter it is {to_base.mean():.2g} on average"
    )
    if to_probe.mean() > to_base.mean() * PROBE_SHARE[config.dtype]:
        raise RunError(
            f"{of_member}the sampler does not follow the adapter: {figures}. Does the server hold "
            f"the same base model ({config.model_id}) in the same dtype, and the whole adapter? "
            f"Are its logprobs those after the temperature {config.temperature} "
            "(processed_logprobs)?"
        )
    if (largest := np.abs(to_first).max()) > config.max_logprob_diff:
        raise RunError(
            f"{of_member}the sampler's policy is not the trainer's: {figures}; "
            f"{largest:.2g} is above max_logprob_diff={config.max_logprob_diff}. Same dtype? "
            "processed_logprobs? (python -m jgrpo.serve starts the server as the trainer needs it)"
        )
    gaps = {"probe/gap_mean": to_probe.mean(), "probe/gap_max": to_probe.max(),
            "probe/gap_to_base_mean": to_base.mean()}  # fmt: skip
    return {name: float(value) for name, value in gaps.items()}


def gaps_to(
    adapters: nnx.State, learner: Learner, rows: Mapping[int, Rows]
) -> dict[int, dict[str, float]]:
    """What a step's `sampler/` metrics are where it was sampled from older adapters [E, ...] than
    those that the learner started from: the gap of the sampler's logprobs to theirs, by member, on
    its first completions, of GUARD_TOKENS tokens or more."""
    all_rows = together({e: replace(r, trained=None) for e, r in rows.items()})
    index: dict[int, np.ndarray] = {}
    start = 0
    for e, r in rows.items():
        enough = np.searchsorted(np.cumsum([len(c) for c in r.completions]), GUARD_TOKENS) + 1
        index[e] = np.arange(start, start + min(int(enough), len(r.completions)))
        start += len(r.completions)
    known = learner.logprobs_by(adapters, all_rows, np.concatenate([*index.values()]))
    found = {}
    for e, of_member in index.items():
        gap = np.concatenate([
            known[i, : len(reported)] - np.array(reported, np.float32)
            for i in of_member for reported in [all_rows.sampler_logprobs[i]]
        ])  # fmt: skip
        figures = np.abs(gap).mean(), np.abs(gap).max(initial=0), (np.expm1(gap) - gap).mean()
        found[e] = {tag: float(x) for tag, x in zip(OF_THE_SAMPLER, figures, strict=True)}
    return found


def of_a_stale_policy(metrics: Mapping[str, float]) -> dict[str, float]:
    """A member's metrics of an update on what an older policy has sampled: what they call the
    sampler's gap is how far the policy has moved since."""
    return {
        tag.replace("sampler/", "staleness/") if tag in OF_THE_SAMPLER else tag: value
        for tag, value in metrics.items()
    }


def gap_problem(metrics: Mapping[str, float], config: Config) -> str | None:
    """What is wrong if the sampler's logprobs of a step's tokens are further from the trainer's
    than the dtype explains; None if nothing is (NaN is the trainer's own, the learner's to tell).

    A gap that one update makes is too small for this: vllm.py tells adapters apart by name.
    """
    mean, largest = (metrics[f"sampler/logprob_diff_{name}"] for name in ("mean", "max"))
    limit = config.max_mean_logprob_diff or LARGEST_MEAN_GAP[config.dtype]
    if not mean > limit:
        return None
    return (
        f"the completions are not the policy's: |logprob of the sampler - of the trainer| is "
        f"{mean:.2g} on average and {largest:.2g} at most, above {limit} on average "
        f"(max_mean_logprob_diff, {config.dtype}). Does the sampler hold another base model than "
        f"{config.model_id}, another dtype, a stale or partial adapter, or give logprobs before "
        "the temperature? (python -m jgrpo.serve starts the server as the trainer needs it.) If "
        "that gap is normal for this model, raise --max_mean_logprob_diff"
    )


def _probe_adapter(policy: Policy, e: int, prompts: list[list[int]], config: Config) -> nnx.State:
    """A random adapter with B as large as it takes to shift the prompts' logprobs visibly; on a
    model that is nearly uniform whatever its input, half as far as it can be shifted."""
    like, seed = with_rank(nth(policy.adapter, e), config.lora_r), config.seed + 1 + 1000 * e
    fresh, rng = nnx.to_flat_state(fresh_adapter(like, seed)), np.random.default_rng(seed)
    noise = [rng.standard_normal(leaf.shape, np.float32) for _, leaf in fresh]
    heads, tails = [p[:1] for p in prompts], [p[1:] for p in prompts]
    before = _logprobs(policy, e, switched_off(like), heads, tails, 1.0)

    normal = nnx.from_flat_state(
        (path, leaf.replace(jnp.asarray(x)) if path[-1] == "lora_B" else leaf)
        for x, (path, leaf) in zip(noise, fresh, strict=True)
    )
    shifts: dict[int, float] = {}
    for power in range(-13, 3):
        after = _logprobs(policy, e, _times(2.0**power, normal), heads, tails, 1.0)
        shifts[power] = float(np.abs(after - before).mean())
        if shifts[power] > PROBE_SHIFT_NATS:
            break
    if (largest := max(shifts.values())) < LEAST_SHIFT_NATS:
        raise RunError("no adapter changes this model's logprobs: are its weights all zero?")
    wanted = PROBE_SHIFT_NATS if largest > PROBE_SHIFT_NATS else largest / 2
    return _times(2.0 ** next(p for p, shift in shifts.items() if shift > wanted), normal)


def _times(size: float, adapter: nnx.State) -> nnx.State:
    """The adapter with B's so many times as large."""
    return nnx.from_flat_state(
        (path, leaf.replace(size * leaf[...]) if path[-1] == "lora_B" else leaf)
        for path, leaf in nnx.to_flat_state(adapter)
    )


def gaps_of(policy: Policy, e, adapter, prompts, completions: Sequence[Completion], temperature):
    """float [all tokens]: logprob of the sampler - of the trainer, by an adapter of member e's
    shape."""
    tokens = [c.token_ids for c in completions]
    reported = np.concatenate([c.logprobs for c in completions])
    return reported - _logprobs(policy, e, adapter, prompts, tokens, temperature)


def _logprobs(policy, e, adapter, prompts, completions, temperature) -> np.ndarray:
    """The trainer's logprobs of all completion tokens, one after another, by an adapter of member
    e's shape."""
    # One limit for all, and each prompt alone (many begin with the same token, which would make
    # them a group), so that most have the same shape: each is a compilation.
    limits = {"max_prompt_tokens": max(map(len, prompts)), "max_tokens": max(map(len, completions))}
    values = []
    for prompt, completion in zip(prompts, completions, strict=True):
        rows = Rows([prompt], [completion], [[0.0] * len(completion)], np.zeros(1, np.float32))
        (batch,) = micro_batches(rows, np.array([0]), micro_batch_size=1, **limits)
        values.append(policy.logprobs(e, adapter, batch, temperature)[batch.mask > 0])
    return np.concatenate(values)
