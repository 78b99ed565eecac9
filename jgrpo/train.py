"""Train: python -m jgrpo.train --config configs/rank1.py [--FIELD VALUE ...], or --resume RUN.

The flow, as in the order of this file: prompts -> rollout -> rewards -> advantages -> update ->
adapter -> the sampler loads it. Step k samples with adapter k - 1 and gives adapter k.
"""

from jgrpo import cli
from jgrpo.errors import RunError, exit_status, no_more_interrupts

if __name__ == "__main__":  # before JAX is imported: help and mistakes are answered at once
    cli.tune_allocator()
    with exit_status():
        COMMAND = cli.parse(cli.Train)

import shutil
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jgrpo import adapter as adapters
from jgrpo.advantages import group_advantages
from jgrpo.batch import Rows, completion_mask, micro_batches, with_signal
from jgrpo.checkpoint import Checkpoints
from jgrpo.config import Config, without_effect
from jgrpo.losses import LOSSES
from jgrpo.plot import draw
from jgrpo.prompts import Problem, step_indices
from jgrpo.rewards import Grader, Grades, length_penalty
from jgrpo.rollout import Completion, Sampler, prompt_seeds
from jgrpo.rundir import (
    named_run_dir,
    next_run_dir,
    read_metrics,
    remove_if_empty,
    run_id,
    write_config,
    write_rollouts,
)
from jgrpo.runlog import RunLog
from jgrpo.session import (
    Policy,
    Problems,
    check_sampler,
    configure_jax,
    evaluate,
    open_grader,
    open_policy,
    open_problems,
    open_sampler,
)
from jgrpo.update import Update, adam, loss_denominator


def train(config: Config, resume: Path | None = None) -> Path:
    """Run all steps -> the run folder. Raises InputError before compute is spent, RunError later.

    Whatever ends it leaves a checkpoint of the last whole step behind, if the disk takes it.
    """
    configure_jax()
    with ExitStack() as stack:
        problems = open_problems(config)
        grader = open_grader(config, stack)
        policy = open_policy(config)
        run_dir = resume or new_run_dir(config)
        stack.callback(remove_if_empty, run_dir)
        sampler = open_sampler(config, policy, problems.stop_token_ids, run_id(run_dir))
        stack.callback(sampler.close)
        checkpoints = Checkpoints(run_dir)
        stack.callback(checkpoints.close)
        first = checkpoints.latest_step() if resume else 0
        log = stack.enter_context(
            RunLog(run_dir, config.n_grpo_steps, resume_step=first if resume else None)
        )
        stack.enter_context(log.warnings())
        for line in (*problems.report, describe(config, policy, run_dir)):
            log.info(line)
        for line in without_effect(config):
            log.info(line, style="yellow")
        write_config(run_dir, config, {"devices": [str(d) for d in jax.devices()]})
        loop = Loop(config, run_dir, problems, policy, sampler, grader, log, checkpoints)
        if resume:
            loop.restore(first)
        try:
            loop.start(first)
            loop.run(first)
        except BaseException as error:
            with no_more_interrupts():
                checkpoints.save(*loop.whole)
            message = f"stopped after step {loop.whole[0]}; to go on: "
            message += f"python -m jgrpo.train --resume {run_dir}"
            if isinstance(error, RunError | OSError):
                raise RunError(f"{error}\n{message}") from error
            log.info(message)
            raise
        finish(run_dir, log)
    return run_dir


class Loop:
    """One run's parts, and the steps over them."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        problems: Problems,
        policy: Policy,
        sampler: Sampler,
        grader: Grader,
        log: RunLog,
        checkpoints: Checkpoints,
    ):
        self.config, self.run_dir, self.problems, self.policy = config, run_dir, problems, policy
        self.sampler, self.grader, self.log, self.checkpoints = sampler, grader, log, checkpoints
        self.loss = partial(
            LOSSES["grpo"],
            clip_eps=config.clip_eps if config.use_clip else None,
            beta=config.beta if config.use_kl_penalty else 0.0,
            token_level=config.use_token_level_loss,
        )
        optimizer = adam(config.lr)
        self.update = Update(
            policy.graph,
            self.loss,
            optimizer,
            temperature=config.temperature,
            checkpoint=config.gradient_checkpointing,
        )
        self.state = policy.adapter, optimizer.init(policy.adapter)
        self.whole = 0, jax.device_get(self.state)  # the last whole step, safe from donation

    def restore(self, first: int) -> None:
        """The state after step `first`, and nothing of the later ones, which come again."""
        self.state = self.checkpoints.restore(first, self.state)
        self.whole = first, jax.device_get(self.state)
        for folder in (self.run_dir / "adapters").glob("step_*"):
            if int(folder.name.removeprefix("step_")) > first:
                shutil.rmtree(folder)

    def start(self, first: int) -> None:
        """Everything before the next step: self-tests, the probe, the adapter, its evaluation (if
        the run was not stopped after it)."""
        self.grader.self_test()
        probe = self.run_dir / "adapters" / "probe"
        with self.log.phase("probe"):
            gaps = check_sampler(self.config, self.policy, self.sampler, self.problems, probe)
        self.log.info(
            "the sampler follows the adapter: gap {probe/gap_mean:.1e} mean, {probe/gap_max:.1e} "
            "max (to the base: {probe/gap_to_base_mean:.1e})".format(**gaps)
        )
        if self.adapter_folder(first).exists():
            self.sampler.load(self.adapter_folder(first))
        else:
            self.publish(first)
        shutil.rmtree(probe)  # only now: a server dies if a loaded adapter's folder goes
        self.log.take_seconds()
        rows = read_metrics(self.run_dir)
        if not any(row["step"] == first and "eval/accuracy" in row for row in rows):
            self.evaluate_if_due(first)

    def run(self, first: int) -> None:
        for step in range(first + 1, self.config.n_grpo_steps + 1):
            self.step(step)
            self.evaluate_if_due(step)
            if step % self.config.checkpoint_every == 0 or step == self.config.n_grpo_steps:
                self.checkpoints.save(*self.whole)

    def step(self, step: int) -> None:
        """Sample with adapter step - 1, learn from it, publish adapter `step`, log."""
        c, log, start_s = self.config, self.log, time.perf_counter()
        order = step_indices(len(self.problems.train), c.n_prompts_per_step, c.seed, step)
        asked = [self.problems.train[i] for i in order]
        with log.phase("generation", c.n_completions_per_step) as progress:
            groups = self.sampler.sample(
                [p.prompt_ids for p in asked],
                seeds=prompt_seeds(c.seed, step, len(asked)),
                group_size=c.group_size,
                temperature=c.temperature,
                progress=progress,
            )
        with log.phase("reward"):
            texts = [[self.problems.text(completion) for completion in g] for g in groups]
            grades = self.grader.grade(texts, [p.gold for p in asked])
            rewards = self.rewards(grades, groups)
            advantages = group_advantages(rewards, std_norm=c.use_std_norm)
        with log.phase("training"):
            metrics = self.train_on(asked, groups, advantages)
        with log.phase("export"):
            self.write_rollouts(step, asked, groups, texts, rewards, advantages)
        self.publish(step)
        metrics |= rollout_metrics(grades, groups, rewards, advantages)
        metrics["train/compilations"] = self.update.n_compilations
        metrics |= log.take_seconds() | {"time/step": time.perf_counter() - start_s}
        log.log(step, metrics)
        self.whole = step, jax.device_get(self.state)

    def rewards(self, grades: Grades, groups: list[list[Completion]]) -> np.ndarray:
        """Outcome, plus the length penalty if it is asked for -> float32 [P, G]."""
        c = self.config
        if not c.use_length_penalty:
            return grades.correct
        n_tokens = np.array([[len(completion.token_ids) for completion in g] for g in groups])
        return grades.correct + length_penalty(
            n_tokens, c.expected_maximum_length, c.overlong_cache
        )

    def train_on(
        self, asked: list[Problem], groups: list[list[Completion]], advantages: np.ndarray
    ) -> dict[str, float]:
        """`epochs_per_step` optimizer updates on one rollout -> metrics, means over the updates."""
        c = self.config
        rows = Rows(
            [p.prompt_ids for p in asked for _ in range(c.group_size)],
            [completion.token_ids for g in groups for completion in g],
            [completion.logprobs for g in groups for completion in g],
            advantages.reshape(-1),
        )
        # A zero advantage means a zero gradient, unless a KL term pulls in a later epoch.
        skip = not (c.use_kl_penalty and c.epochs_per_step > 1)
        index = with_signal(rows.advantages) if skip else np.arange(len(rows.advantages))
        batches = micro_batches(
            rows, index, micro_batch_size=c.micro_batch_size, max_model_len=c.max_model_len
        )
        denominator = loss_denominator(self.loss, completion_mask(rows))
        old_logprobs, history = None, []
        for _ in range(c.epochs_per_step):
            *state, metrics, logprobs = self.update(
                *self.state, self.policy.base, batches, denominator, old_logprobs
            )
            self.state = tuple(state)
            old_logprobs = old_logprobs or logprobs
            history.append(metrics)
        values = jax.device_get(history)
        if not all(np.isfinite([m["train/loss"], m["train/grad_norm"]]).all() for m in values):
            raise RunError(
                f"the loss or its gradient is not finite: {values[-1]}. A lower lr may help"
            )
        means = {tag: float(np.mean([m[tag] for m in values])) for tag in values[0]}
        gap = {tag: float(x) for tag, x in values[0].items() if tag.startswith("sampler/")}
        return means | gap  # the sampler's policy is the one before the first update

    def publish(self, step: int) -> None:
        """Write adapter `step` and have the sampler load it."""
        c, folder = self.config, self.adapter_folder(step)
        shape = adapters.AdapterConfig(c.lora_r, c.lora_alpha, c.lora_target_modules)
        with self.log.phase("export"):
            adapters.save(self.state[0], folder, shape, c.model_id)
        with self.log.phase("reload"):
            self.sampler.load(folder)

    def adapter_folder(self, step: int) -> Path:
        return self.run_dir / "adapters" / f"step_{step:06d}"

    def evaluate_if_due(self, step: int) -> None:
        every = self.config.eval_every
        if not every or (step % every and step != self.config.n_grpo_steps):
            return
        with self.log.phase("evaluation", len(self.problems.evaluation)) as progress:
            metrics, _, _ = evaluate(self.sampler, self.grader, self.problems, progress)
        self.log.log(step, metrics | self.log.take_seconds())

    def write_rollouts(self, step, asked, groups, texts, rewards, advantages) -> None:
        """One line a completion; other programs rely on the fields."""
        lines = (
            {
                "prompt": problem.prompt,
                "completion": texts[p][g],
                "prompt_ids": problem.prompt_ids,
                "token_ids": completion.token_ids,
                "sampler_logprobs": completion.logprobs,
                "gold": problem.gold,
                "reward": rewards[p, g],
                "advantage": advantages[p, g],
                "finish_reason": completion.finish_reason,
            }
            for p, problem in enumerate(asked)
            for g, completion in enumerate(groups[p])
        )
        write_rollouts(self.run_dir, step, lines)


def rollout_metrics(grades, groups, rewards, advantages) -> dict[str, float]:
    """What a step's completions show, before any training on them."""
    flat = [completion for group in groups for completion in group]
    lengths = np.array([len(completion.token_ids) for completion in flat])
    return {
        "train/accuracy": float(grades.correct.mean()),
        "train/reward_mean": float(rewards.mean()),
        "train/boxed_fraction": float(grades.boxed.mean()),
        "train/avg_gen_length": float(lengths.mean()),
        "train/truncated_fraction": float(np.mean([x.finish_reason == "length" for x in flat])),
        "train/zero_advantage_fraction": float((advantages == 0).mean()),
        "tokens/generated": float(lengths.sum()),
        "reward/errors": float(grades.errors),
        "reward/timeouts": float(grades.timeouts),
    }


def new_run_dir(config: Config) -> Path:
    return named_run_dir(config.run_dir) if config.run_dir else next_run_dir(config.base_dir)


def describe(config: Config, policy: Policy, run_dir: Path) -> str:
    base, adapter = (
        sum(x.size for x in jax.tree.leaves(state)) for state in (policy.base, policy.adapter)
    )
    return (
        f"{config.model_id}: {base:,} parameters ({config.dtype}); rank-{config.lora_r} adapter: "
        f"{adapter:,} ({adapter / base:.2%}) on {jax.devices()[0].device_kind}; run: {run_dir}"
    )


def finish(run_dir: Path, log: RunLog) -> None:
    """The learning curve, and where everything is."""
    picture = run_dir / "curves.png"
    draw({run_dir.name: read_metrics(run_dir)}).savefig(picture)
    log.info(f"learning curve: {picture}\nadapter: {sorted((run_dir / 'adapters').iterdir())[-1]}")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with exit_status():
        train(COMMAND.options, COMMAND.resume)


if __name__ == "__main__":
    main()
