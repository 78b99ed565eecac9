"""The two sides of agreement.py, jgrpo and PyTorch, and what both are given: rollouts of a run, the
adapter that sampled them, and a later one."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import PeftModel
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from torch_baseline import Baseline, adapter_weights, advantages_of, load_adapter, open_model

from jgrpo.advantages import group_advantages, leave_one_out
from jgrpo.cli import resumed_config
from jgrpo.config import Config, load_config
from jgrpo.errors import InputError
from jgrpo.policy import adapter as adapters
from jgrpo.policy.batch import Rows
from jgrpo.policy.lora import stacked_up
from jgrpo.run.policy import Policy, open_policy
from jgrpo.study.compare import saved_rows
from jgrpo.train import train
from jgrpo.update.learner import Learner, batches_of, needs_ref, parts_of

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
TINY_RUN = {
    "n_grpo_steps": 6, "n_prompts_per_step": 4, "eval_every": 0, "micro_batch_size": 16,
    "max_tokens": 28, "temperature": 3.0, "use_length_penalty": True,
    "expected_maximum_length": 28, "overlong_cache": 20,
}  # fmt: skip
"""The base is sure of most tokens: sampled hot, more of them have ratios that are not 1. Some
completions are cut off, and a reward by length leaves few groups without signal."""
MICRO_BATCH_SIZE = 16
"""Of the baseline here: it changes time alone, and 2, the study's, takes six times as long."""
GAP_NATS = 0.1
"""Noise on the sampler's logprobs: the embedded sampler's equal the trainer's, and importance
weights of 1 would compare nothing."""

Lines = list[dict]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """What both sides are given: rollouts, the adapter that sampled the first, and a later one."""

    config: Config
    rollouts: list[Lines]
    old: Path
    policy: Path


# -- the setting ---------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(run: Path | None) -> Iterator[Setting]:
    """A run's, or that of a small run made now."""
    if run is not None:
        yield read_setting(run)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = replace(load_config(TINY), run_dir=str(Path(folder) / "run"), **TINY_RUN)
        with contextlib.redirect_stdout(sys.stderr):
            yield read_setting(train(config))


def read_setting(run: Path) -> Setting:
    """The policy is the run's last adapter; the first rollout is that of two steps before, so that
    old and new are three adapters apart; the other rollouts are all the run's, in turn."""
    config = resumed_config(run)
    if config.dtype != "float32":
        raise InputError(f"{run} is in {config.dtype}; only a run in float32 can be compared")
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    if len(files) < 5:
        raise InputError(f"{run} has {len(files)} rollouts; 5 are needed")
    rng = np.random.default_rng(0)
    rollouts = [[with_noise(json.loads(line), rng) for line in file.open()] for file in files]
    rollouts = [without_signal(lines, config.group_size) for lines in rollouts]
    first = len(files) - 3
    folder = run / "adapters"
    return Setting(
        config,
        rollouts[first:] + rollouts[:first],
        folder / f"step_{first:06d}",
        folder / f"step_{len(files):06d}",
    )


def with_noise(line: dict, rng: np.random.Generator) -> dict:
    noise = rng.normal(0, GAP_NATS, len(line["token_ids"]))
    return line | {"sampler_logprobs": (np.array(line["sampler_logprobs"]) + noise).tolist()}


def without_signal(lines: Lines, group_size: int) -> Lines:
    """The first group with equal rewards: jgrpo leaves such rows out, the study does not."""
    return [line | {"reward": 0.0} for line in lines[:group_size]] + lines[group_size:]


def with_advantages(lines: Lines, advantages: np.ndarray) -> Lines:
    return [line | {"advantage": float(a)} for line, a in zip(lines, advantages.flat, strict=True)]


def rewards_of(lines: Lines, config: Config) -> np.ndarray:
    """float32 [P, G]"""
    rewards = np.array([line["reward"] for line in lines], np.float32)
    return rewards.reshape(-1, config.group_size)


def variant_config(config: Config, changes: dict[str, Any]) -> Config:
    return replace(config, **{"updates_per_epoch": 4, **changes})


def whole_rollout(config: Config) -> Config:
    """The config with all rows in one update; two epochs, where it makes several updates, since
    that is how jgrpo knows that ratios will leave 1."""
    off_policy = config.updates_per_rollout > 1
    return replace(config, updates_per_epoch=1, epochs_per_step=2 if off_policy else 1)


def difference(a: Arrays, b: Arrays) -> Arrays:
    return {name: a[name] - b[name] for name in a}


def norm_of(arrays: Arrays) -> float:
    return float(np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in arrays.values())))


# -- jgrpo ---------------------------------------------------------------------------------------


class Ours:
    """jgrpo in float32."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.model: Policy = open_policy(setting.config)

    def rollout(self, lines: Lines, config: Config) -> Rows:
        of = leave_one_out if config.use_leave_one_out else group_advantages
        advantages = of(rewards_of(lines, config), config.use_std_norm)
        return saved_rows(config, with_advantages(lines, advantages))

    def moved(self, config: Config, rollouts: Iterable[Rows]) -> Arrays:
        """How far learning from the rollouts moves the adapter."""
        start = self.adapter(self.setting.policy)
        before = adapters.adapter_arrays(start)
        stack = stacked_up([start])
        learner = Learner([config], self.model.graph, stack, self.model.base)
        for rows in rollouts:
            learner.learn({0: rows})
        return difference(adapters.adapter_arrays(learner.state(0)[0]), before)

    def gradient(self, config: Config, rows: Rows) -> tuple[float, float, Arrays]:
        """Loss, norm and gradient of one update on the whole rollout."""
        policy, base = self.adapter(self.setting.policy), self.model.base
        learner = Learner([config], self.model.graph, stacked_up([policy]), base)
        update, [part] = learner.update, parts_of(config, rows)
        batches, given = batches_of(config, rows, part.index), np.array([part.denominator])
        old = ref = None
        if config.updates_per_rollout > 1:
            old = update.logprobs(self.adapter(self.setting.old), base, batches)
        if needs_ref(config):
            ref = update.logprobs(jax.tree.map(jnp.zeros_like, policy), base, batches)
        total, _ = update._sum(learner.adapters, base, batches, old, ref)
        gradient = jax.tree.map(lambda g: g[0] / part.denominator, total.gradient)
        state = learner.adapters, learner.opt_states
        *_, metrics = update.programs.apply(*state, total, given, learner.rates)
        loss, norm = (float(metrics[f"train/{name}"][0]) for name in ("loss", "grad_norm"))
        return loss, norm, adapters.adapter_arrays(gradient)

    def adapter(self, folder: Path):
        """A new copy each time: an update consumes its adapter."""
        return adapters.load(folder, self.model.adapter)


# -- torch -----------------------------------------------------------------------------------------


class Theirs:
    """The baseline in float32, or in float64 as the judge."""

    def __init__(self, setting: Setting, dtype: torch.dtype):
        self.setting = setting
        judge = dtype == torch.float64
        self.model = open_judge(setting) if judge else open_model(setting.config, setting.policy)

    def rollout(self, lines: Lines, config: Config) -> Lines:
        rewards = torch.tensor(rewards_of(lines, config), dtype=torch.float64)
        return with_advantages(lines, advantages_of(rewards, config).numpy())

    def moved(self, config: Config, rollouts: Iterable[Lines]) -> Arrays:
        """How far learning from the rollouts moves the adapter."""
        baseline = self.baseline(config, self.setting.policy)
        before = arrays_of(baseline.weights)
        for lines in rollouts:
            baseline.learn(lines)
        return difference(arrays_of(baseline.weights), before)

    def gradient(self, config: Config, lines: Lines) -> tuple[float, float, Arrays]:
        """Loss, norm and gradient of one update on the whole rollout."""
        off_policy = config.updates_per_rollout > 1
        before = self.setting.old if off_policy else self.setting.policy
        baseline = self.baseline(config, before)
        batch = baseline.with_others(baseline.batch(lines))
        load_adapter(self.model, self.setting.policy)
        loss = baseline.backward(batch)
        gradient = arrays_of(baseline.gradient())
        return loss, norm_of(gradient), gradient

    def baseline(self, config: Config, adapter: Path) -> Baseline:
        load_adapter(self.model, adapter)
        return Baseline(config, self.model, MICRO_BATCH_SIZE)

    def ratios(self) -> np.ndarray:
        """exp(logprob - old) of the first rollout's tokens."""
        baseline = self.baseline(self.setting.config, self.setting.old)
        batch = baseline.with_others(baseline.batch(self.setting.rollouts[0]))
        load_adapter(self.model, self.setting.policy)
        return (baseline.all_logprobs(batch) - batch.old).exp()[batch.mask > 0].numpy()


def arrays_of(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: t.detach().cpu().double().numpy().copy() for name, t in tensors.items()}


def open_judge(setting: Setting) -> PeftModel:
    """The baseline's model with everything in float64."""
    model = open_model(setting.config, setting.policy, torch.float64)
    in_float64(model)
    assert all(w.dtype == torch.float64 for w in adapter_weights(model).values())
    return model


def in_float64(model: nn.Module) -> None:
    """All in float64, also norms and rotary angles, which transformers computes in float32 whatever
    the model's type; with them as they are the model could not judge float32."""

    def norm(module, x):
        scale = (x.square().mean(dim=-1, keepdim=True) + module.variance_epsilon).rsqrt()
        return module.weight * x * scale

    def rotary(module, x, position_ids):
        angles = (position_ids[..., None] * module.inv_freq).repeat(1, 1, 2)
        return tuple(f(angles) * module.attention_scaling for f in (torch.cos, torch.sin))

    model.double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = norm.__get__(module)
        elif hasattr(module, "inv_freq"):
            if module.rope_type == "default":  # the others come out of float32 code as they are
                width = 2 * len(module.inv_freq)
                powers = torch.arange(0, width, 2, dtype=torch.float64) / width
                module.inv_freq = module.config.rope_parameters["rope_theta"] ** -powers
            module.forward = rotary.__get__(module)
