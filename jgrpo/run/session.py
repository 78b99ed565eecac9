"""What a config names, opened in the order in which bad input shows first; and what `train` and
`evaluate` both do with it: score the policy on the evaluation problems, and prove that the sampler
really samples from the adapter that it was given."""

import gc
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from jgrpo.answers.grader import Grader, Grades
from jgrpo.config import Config
from jgrpo.errors import InputError, RunError
from jgrpo.policy import adapter as adapters
from jgrpo.policy.adapter import AdapterConfig
from jgrpo.policy.batch import Rows, micro_batches
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.policy.lora import fresh_adapter, split
from jgrpo.policy.weights import (
    abstract_model,
    load_model,
    model_config,
    model_folder,
    read_hf_config,
    weights_fingerprint,
)
from jgrpo.prompts.problems import Problem, load_problems
from jgrpo.prompts.tokenizer import load_tokenizer, stop_token_ids
from jgrpo.rewards.parts import RewardFunction, load_function
from jgrpo.rewards.prm import ProcessRewards
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.rollout.protocol import Completion, Progress, Sampler, prompt_seeds
from jgrpo.rollout.vllm import VllmSampler

PROBE_PROMPTS, PROBE_TOKENS, PROBE_SHIFT_NATS, LEAST_SHIFT_NATS = 4, 16, 0.3, 0.01
PROBE_SHARE = {"float32": 0.01, "bfloat16": 0.5}
"""Largest part of the probe's effect by which the sampler may miss it. An adapter that is ignored
misses by all of it, one layer's projection that is left out by 0.08 and more; float32 rounding by
1e-6, bfloat16 by 0.1 or more where the model is sure of its tokens."""

LARGEST_MEAN_GAP = {"float32": 1e-3, "bfloat16": 0.2}
"""max_mean_logprob_diff where it is not given: several times what rounding explains (nats)."""


@dataclass(frozen=True)
class Problems:
    """The tokenizer, and what is asked."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    train: list[Problem]
    evaluation: list[Problem]
    report: list[str]

    @property
    def fingerprint(self) -> str:
        """Of all that is asked, and of the answers that it is graded by."""
        asked = [[p.prompt_ids, p.gold] for p in (*self.train, *self.evaluation)]
        return hashlib.sha256(json.dumps([*asked, self.stop_token_ids]).encode()).hexdigest()[:16]

    def text(self, completion: Completion) -> str:
        """A completion as text, without its end token. Special tokens within it stay: leaving them
        out would join what they part, and `\\boxed{1<|box_end|>2}` would count as 12."""
        n_tokens = len(completion.token_ids) - (completion.finish_reason == "stop")
        return str(self.tokenizer.decode(completion.token_ids[:n_tokens]))


@dataclass(frozen=True)
class Policy:
    """The model, split into structure, adapter and frozen base."""

    graph: nnx.GraphDef
    adapter: nnx.State
    base: nnx.State


def configure_jax() -> None:
    """Keep compiled programs on disk (JAX_COMPILATION_CACHE_DIR, else ~/.cache/jgrpo/xla); let
    float32 products be float32 on a GPU too (JAX's default there is TF32; bfloat16 is as it was);
    and let Python's collector run less often, in the whole process.
    """
    jax.config.update("jax_default_matmul_precision", "highest")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jgrpo" / "xla"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(default))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    gc.set_threshold(50_000)  # at 700, a tenth of the time that JAX traces is the collector's


def open_problems(config: Config) -> Problems:
    """Tokenizer and problems; the model's config is read too, so that all bad input shows."""
    folder = str(model_folder(config.model_id))
    model_config(Path(folder))
    n_positions = read_hf_config(Path(folder)).max_position_embeddings
    if config.max_model_len > n_positions:
        raise InputError(
            f"max_prompt_tokens={config.max_prompt_tokens} and max_tokens={config.max_tokens} are "
            f"more than the model's max_position_embeddings={n_positions}: lower one of them"
        )
    tokenizer = load_tokenizer(folder)
    train, evaluation, report = load_problems(
        tokenizer,
        dataset_path=config.dataset_path,
        dataset_split=config.dataset_split,
        eval_dataset_path=config.eval_dataset_path,
        eval_split=config.eval_split,
        prompt_template=config.prompt_template,
        enable_thinking=config.enable_thinking,
        max_prompt_tokens=config.max_prompt_tokens,
        n_eval_prompts=config.n_eval_prompts,
    )
    stops = stop_token_ids(tokenizer, folder)
    return Problems(tokenizer, stops, train, evaluation, report)


def open_policy(config: Config, *, abstract: bool = False) -> Policy:
    """The base model with a fresh adapter; `abstract`: shapes alone, for who only needs those."""
    if config.attn_implementation == "cudnn" and (found := jax.default_backend()) != "gpu":
        raise InputError(f"attn_implementation=cudnn needs a GPU, JAX has {found}; take xla")
    folder = model_folder(config.model_id)
    shape: dict[str, Any] = {
        "dtype": config.dtype,
        "rank": config.lora_r,
        "alpha": config.lora_alpha,
        "target_modules": config.lora_target_modules,
    }
    if abstract:
        return Policy(*split(abstract_model(folder, **shape)))
    return Policy(*split(load_model(folder, **shape, seed=config.seed)))


def fingerprints(config: Config, problems: Problems) -> dict[str, str]:
    """Of what a run is made from beside its options: a resumed one must find the same."""
    return {
        "model": weights_fingerprint(model_folder(config.model_id)),
        "problems": problems.fingerprint,
    }


def open_sampler(
    config: Config, policy: Policy, stops: Sequence[int], run_id: str, *, alone: bool = True
) -> Sampler:
    """The sampler that the config asks for; RunError if the server cannot be used. `alone`: what
    other runs have left on the server goes."""
    if config.rollout == "jax":
        return JaxSampler(
            policy.graph,
            policy.adapter,
            policy.base,
            stop_token_ids=stops,
            max_tokens=config.max_tokens,
            max_rows=config.n_completions_per_step,
        )
    flags = {"model_id": config.model_id, "lora_r": config.lora_r, "dtype": config.dtype,
             "max_prompt_tokens": config.max_prompt_tokens, "max_tokens": config.max_tokens,
             "vllm_url": config.vllm_urls[0]}  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return VllmSampler(
        config.vllm_urls,
        run_id=run_id,
        max_tokens=config.max_tokens,
        max_model_len=config.max_model_len,
        vocab_size=model_config(model_folder(config.model_id)).vocab_size,
        stop_token_ids=stops,
        timeout_s=config.vllm_timeout_s,
        start_command=shlex.join(["python", "-m", "jgrpo.serve", *words]),
        alone=alone,
    )


def open_grader(config: Config, stack: ExitStack) -> Grader:
    """A grader whose workers start in the background; call its self_test before the first step."""
    grader = Grader(max_workers=config.grader_workers, timeout_s=config.grader_timeout_s)
    return stack.enter_context(grader)


@dataclass(frozen=True)
class Scorers:
    """What scores completions beside the grader, where the config asks for it."""

    process: ProcessRewards | None
    custom: RewardFunction | None


def open_scorers(config: Config) -> Scorers:
    """The process reward model and the user's reward function. InputError if one cannot be used."""
    custom = load_function(config.reward_function) if config.reward_function else None
    process = None
    if config.use_prm:
        folder = model_folder(config.prm_model_id, "prm_model_id")
        process = ProcessRewards(folder, dtype=config.dtype, batch_size=config.prm_batch_size)
    return Scorers(process, custom)


def evaluate(
    sampler: Sampler, grader: Grader, problems: Problems, progress: Progress | None = None
) -> tuple[dict[str, float], list[Completion], Grades]:
    """Greedy accuracy on the evaluation problems -> metrics, completions, grades."""
    asked = problems.evaluation
    groups = sampler.sample(
        [p.prompt_ids for p in asked], seeds=[0] * len(asked), temperature=0.0, progress=progress
    )
    grades = grader.grade([[problems.text(c) for c in g] for g in groups], [p.gold for p in asked])
    completions = [group[0] for group in groups]
    correct = float(grades.correct.sum())
    metrics = {
        "eval/accuracy": correct / len(asked),
        "eval/correct": correct,
        "eval/total": float(len(asked)),
        "eval/boxed_fraction": float(grades.boxed.mean()),
        "eval/truncated_fraction": float(
            np.mean([c.finish_reason == "length" for c in completions])
        ),
        "eval/avg_gen_length": float(np.mean([len(c.token_ids) for c in completions])),
    }
    return metrics, completions, grades


# -- does the sampler use the adapter? --------------------------------------------------------


def check_sampler(
    config: Config, policy: Policy, sampler: Sampler, problems: Problems, folder: Path
) -> dict[str, float]:
    """Prove that adapters take effect: sample from a probe adapter that changes the policy visibly
    (PROBE_SHIFT_NATS a token), and compare the sampler's logprobs with the trainer's.

    Returns the gap to the probe and to the base. Raises RunError if the sampler does not follow
    the adapter (a fresh one, B = 0, would look right even if it were ignored).
    """
    prompts = [list(p.prompt_ids) for p in problems.train[:PROBE_PROMPTS]]
    probe = _probe_adapter(policy, prompts, config)
    shutil.rmtree(folder, ignore_errors=True)
    shape = AdapterConfig(config.lora_r, config.lora_alpha, config.lora_target_modules)
    adapters.save(probe, folder, shape, config.model_id)
    sampler.load(folder)
    completions = [
        group[0]
        for group in sampler.sample(
            prompts,
            seeds=prompt_seeds(config.seed, 0, len(prompts)),
            temperature=config.temperature,
            max_tokens=min(PROBE_TOKENS, config.max_tokens),
        )
    ]
    tokens = [c.token_ids for c in completions]
    reported = np.concatenate([c.logprobs for c in completions])
    to_probe = np.abs(reported - _logprobs(policy, probe, prompts, tokens, config.temperature))
    to_base = np.abs(
        reported - _logprobs(policy, policy.adapter, prompts, tokens, config.temperature)
    )
    gaps = {"probe/gap_mean": to_probe.mean(), "probe/gap_max": to_probe.max(),
            "probe/gap_to_base_mean": to_base.mean()}  # fmt: skip
    figures = (
        f"on {len(reported)} tokens sampled from a probe adapter, |logprob of the sampler - of the "
        f"trainer| is {to_probe.mean():.2g} on average and {to_probe.max():.2g} at most; to the "
        f"trainer without the adapter it is {to_base.mean():.2g} on average"
    )
    if to_probe.mean() > to_base.mean() * PROBE_SHARE[config.dtype]:
        raise RunError(
            f"the sampler does not follow the adapter: {figures}. Does the server hold the same "
            f"base model ({config.model_id}) in the same dtype, and the whole adapter? Are its "
            f"logprobs those after the temperature {config.temperature} (processed_logprobs)?"
        )
    if to_probe.max() > config.max_logprob_diff:
        raise RunError(
            f"the sampler's policy is not the trainer's: {figures}, above max_logprob_diff="
            f"{config.max_logprob_diff}. Same dtype? processed logprobs? (python -m jgrpo.serve "
            "starts the server as the trainer needs it)"
        )
    return {name: float(value) for name, value in gaps.items()}


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


def _probe_adapter(policy: Policy, prompts: list[list[int]], config: Config) -> nnx.State:
    """A random adapter with B as large as it takes to shift the prompts' logprobs visibly; on a
    model that is nearly uniform whatever its input, half as far as it can be shifted."""
    fresh = nnx.to_flat_state(fresh_adapter(policy.adapter, config.seed + 1))
    keys = jax.random.split(jax.random.key(config.seed + 1), len(fresh))
    heads, tails = [p[:1] for p in prompts], [p[1:] for p in prompts]
    before = _logprobs(policy, policy.adapter, heads, tails, 1.0)

    def scaled(power: int) -> nnx.State:
        return nnx.from_flat_state(
            (path, leaf.replace(2.0**power * jax.random.normal(key, leaf.shape)))
            if path[-1] == "lora_B"
            else (path, leaf)
            for key, (path, leaf) in zip(keys, fresh, strict=True)
        )

    shifts: dict[int, float] = {}
    for power in range(-13, 3):
        after = _logprobs(policy, scaled(power), heads, tails, 1.0)
        shifts[power] = float(np.abs(after - before).mean())
        if shifts[power] > PROBE_SHIFT_NATS:
            break
    if (largest := max(shifts.values())) < LEAST_SHIFT_NATS:
        raise RunError("no adapter changes this model's logprobs: are its weights all zero?")
    wanted = PROBE_SHIFT_NATS if largest > PROBE_SHIFT_NATS else largest / 2
    return scaled(next(power for power, shift in shifts.items() if shift > wanted))


def _logprobs(policy, adapter, prompts, completions, temperature) -> np.ndarray:
    """The trainer's logprobs of all completion tokens, one after another."""
    blank = [[0.0] * len(c) for c in completions]
    rows = Rows(prompts, completions, blank, np.zeros(len(prompts), np.float32))
    values = []
    for i in range(len(prompts)):
        limits = {"max_prompt_tokens": len(prompts[i]), "max_tokens": len(completions[i])}
        (batch,) = micro_batches(rows, np.array([i]), micro_batch_size=1, **limits)
        logprobs = _jitted_logprobs(policy.graph, adapter, policy.base, batch, temperature)
        values.append(np.asarray(logprobs)[batch.mask > 0])
    return np.concatenate(values)


@jax.jit(static_argnums=0)
def _jitted_logprobs(graph, adapter, base, batch, temperature):
    model = nnx.merge(graph, adapter, base)
    return token_logprobs(model, batch, temperature=temperature)[0]
