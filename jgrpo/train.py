"""Train: python -m jgrpo.train --config configs/rank1.py [--FIELD VALUE ...], or --resume RUN.

The flow, as in the order of this file: prompts -> rollout -> rewards -> advantages -> update ->
adapter -> the sampler loads it. Step k samples with adapter k - 1 and gives adapter k.
"""

from jgrpo import cli
from jgrpo.errors import InputError, RunError, exit_status, no_more_interrupts, printable

if __name__ == "__main__":  # before JAX is imported: help and mistakes are answered at once
    cli.tune_allocator()
    with exit_status():
        COMMAND = cli.parse(cli.Train)

import shutil
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jgrpo.advantages import group_advantages, leave_one_out
from jgrpo.answers.grader import Grader
from jgrpo.checks import without_effect
from jgrpo.config import Config
from jgrpo.plot import draw
from jgrpo.policy import adapter as adapters
from jgrpo.rewards.parts import combine, custom_rewards, length_penalty
from jgrpo.rollout.protocol import Sampler
from jgrpo.run.checkpoint import Checkpoints
from jgrpo.run.collect import Collector, Rollout
from jgrpo.run.memory import (
    KNOBS,
    free_memory,
    is_small,
    largest_micro_batch,
    ran_out,
    training_memory,
)
from jgrpo.run.rundir import (
    adapter_folder,
    add_resume,
    check_inputs,
    claimed,
    named_run_dir,
    next_run_dir,
    read_metrics,
    remove_later,
    run_id,
    write_config,
    write_rollouts,
)
from jgrpo.run.runlog import RunLog
from jgrpo.run.session import (
    Policy,
    Problems,
    Scorers,
    check_sampler,
    configure_jax,
    evaluate,
    fingerprints,
    gap_problem,
    open_grader,
    open_policy,
    open_problems,
    open_sampler,
    open_scorers,
)
from jgrpo.update.learner import Learner

MOST_SKIPPED = 3
"""Updates in a row that may be skipped because they are not finite, before the run ends."""


def train(config: Config, resume: Path | None = None) -> Path:
    """Run all steps -> the run folder. Raises InputError before compute is spent, RunError later.

    Whatever ends it leaves a checkpoint of the last whole step behind, if the disk takes it.
    """
    configure_jax()
    with ExitStack() as stack:
        problems = open_problems(config)
        grader = open_grader(config, stack)
        scorers = open_scorers(config)
        policy = open_policy(config)
        run_dir = resume or new_run_dir(config)
        stack.enter_context(claimed(run_dir, new=not resume))
        checkpoints = Checkpoints(
            run_dir, keep=config.save_total_limit, keep_period=config.checkpoint_keep_period
        )
        stack.callback(checkpoints.close)
        learner, first = Learner(config, policy.graph, policy.adapter, policy.base), 0
        inputs = fingerprints(config, problems)
        if resume:  # before anything of the run, or on the server, is changed
            check_inputs(run_dir, inputs)
            first = restore(config, run_dir, checkpoints, learner)
        sampler = open_sampler(config, policy, problems.stop_token_ids, run_id(run_dir))
        stack.callback(sampler.close)
        devices = {"devices": [str(d) for d in jax.devices()]}
        if not resume:
            write_config(run_dir, config, {"inputs": inputs, **devices})
        log = stack.enter_context(
            RunLog(run_dir, config.n_grpo_steps, resume_step=first if resume else None)
        )
        stack.enter_context(log.warnings())
        if resume:
            add_resume(run_dir, config, first, devices)
            remove_later(run_dir, first)
            checkpoints.tidy()
        for line in (*problems.report, describe(config, policy, run_dir)):
            log.info(line)
        for line in without_effect(config):
            log.info(line, style="yellow")
        parts = learner, sampler, grader, scorers, log, checkpoints
        loop = Loop(config, run_dir, problems, policy, *parts, first)
        try:
            loop.start()
            loop.run()
            finish(run_dir, log)
        except BaseException as error:
            with no_more_interrupts():
                message = loop.stop()
            if ran_out(error):
                error = RunError(f"out of memory: {KNOBS}. {str(error).splitlines()[0]}")
            if isinstance(error, RunError | OSError):
                raise RunError(f"{error}\n{message}") from error
            log.info(message)
            raise
    return run_dir


def restore(config: Config, run_dir: Path, checkpoints: Checkpoints, learner: Learner) -> int:
    """Give the learner the last checkpoint's state -> its step; 0 for a run that was killed before
    its first checkpoint, which begins anew. InputError if the run cannot go on."""
    if not (saved := checkpoints.steps()):
        if sorted((run_dir / "adapters").glob("step_*"))[1:]:
            raise InputError(
                f"{checkpoints.folder} holds no checkpoint to resume from, though the run has "
                "trained: bring the folder back, or start a new run with --config"
            )
        return 0
    if (first := saved[-1]) > config.n_grpo_steps:
        raise InputError(
            f"n_grpo_steps={config.n_grpo_steps}: the run has done {first} steps; ask for more"
        )
    learner.state = checkpoints.restore(first, learner.state)
    return first


def dry_run(config: Config) -> None:
    """Read all input but the weights, and print what training will take of the memory."""
    configure_jax()
    problems, policy = open_problems(config), open_policy(config, abstract=True)
    lengths = [len(problem.prompt_ids) for problem in problems.train]
    memory = training_memory(config, policy, lengths)
    for line in (*problems.report, *without_effect(config), memory.table(free_memory())):
        print(printable(line))


@dataclass
class Loop:
    """One run's parts, and the steps over them."""

    config: Config
    run_dir: Path
    problems: Problems
    policy: Policy
    learner: Learner
    sampler: Sampler
    grader: Grader
    scorers: Scorers
    log: RunLog
    checkpoints: Checkpoints
    first: int
    """The step that the learner's state is of: the run goes on after it."""

    def __post_init__(self) -> None:
        self.collector = Collector(self.config, self.problems, self.sampler, self.grader)
        self.keep(self.first)

    def keep(self, step: int) -> None:
        """Remember the state after `step`, which is whole, safe from donation."""
        self.whole = step, jax.device_get(self.learner.state)

    def stop(self) -> str:
        """Save the last whole step, and say from where the run can go on."""
        step, again = self.whole[0], f"python -m jgrpo.train --resume {self.run_dir}"
        try:
            self.checkpoints.save(*self.whole)
        except Exception as error:  # whatever it is, it must not hide why the run ends
            last = max(self.checkpoints.steps(), default=0)
            return f"stopped after step {step}; {error}\nto go on after step {last}: {again}"
        return f"stopped after step {step}; to go on: {again}"

    def start(self) -> None:
        """Everything before the next step: self-tests, the probe, the adapter, its evaluation (if
        the run was not stopped after it), the first checkpoint."""
        self.grader.self_test()
        if not is_small(self.policy):
            self.rehearse()
        probe = self.run_dir / "adapters" / "probe"
        with self.log.phase("probe"):
            gaps = check_sampler(self.config, self.policy, self.sampler, self.problems, probe)
        self.log.info(
            "the sampler follows the adapter: gap {probe/gap_mean:.1e} mean, {probe/gap_max:.1e} "
            "max (to the base: {probe/gap_to_base_mean:.1e})".format(**gaps)
        )
        if adapter_folder(self.run_dir, self.first).exists():
            self.sampler.load(adapter_folder(self.run_dir, self.first))
        else:
            self.publish(self.first)
        shutil.rmtree(probe)  # only now: a server dies if a loaded adapter's folder goes
        self.log.take_seconds()
        rows = read_metrics(self.run_dir)
        self.learner.skipped_in_a_row = skipped_at_the_end(rows, self.config.updates_per_rollout)
        if not any(row["step"] == self.first and "eval/accuracy" in row for row in rows):
            self.evaluate_if_due(self.first)
        self.checkpoints.save(*self.whole)

    def rehearse(self) -> None:
        """Train on the largest micro-batch that can come, and forget it: what does not fit into
        memory shows before anything is sampled."""
        lengths = [len(problem.prompt_ids) for problem in self.problems.train]
        batch = largest_micro_batch(self.config, lengths)
        with self.log.phase("rehearsal"):
            learner, (adapter, _) = self.learner, self.learner.state
            jax.block_until_ready(learner.update.gradient(adapter, learner.base, [batch], 1.0))

    def run(self) -> None:
        for step in range(self.first + 1, self.config.n_grpo_steps + 1):
            self.step(step)
            self.evaluate_if_due(step)
            if step % self.config.checkpoint_every == 0 or step == self.config.n_grpo_steps:
                self.checkpoints.save(*self.whole)

    def step(self, step: int) -> None:
        """Sample with adapter step - 1, learn from it, publish adapter `step`, log."""
        c, log, start_s = self.config, self.log, time.perf_counter()
        rollout = self.collector.collect(step, log)
        with log.phase("reward"):
            parts = self.reward_parts(rollout)
            rewards = combine(parts, c.process_reward_weight)
            advantages_of = leave_one_out if c.use_leave_one_out else group_advantages
            advantages = advantages_of(rewards, c.use_std_norm)
        with log.phase("training"):
            rows = rollout.rows(advantages, c.mask_truncated_completions)
            metrics = self.learner.learn(rows)
        if problem := gap_problem(metrics, c):
            raise RunError(f"step {step}: {problem}")
        with log.phase("export"):
            write_rollouts(self.run_dir, step, rollout.lines(parts, rewards, advantages))
        self.publish(step)
        metrics |= step_metrics(rollout, parts, rewards, advantages)
        metrics |= log.take_seconds() | {"time/step": time.perf_counter() - start_s}
        log.log(step, metrics)
        self.keep(step)
        self.check_updates(step, metrics)

    def check_updates(self, step: int, metrics: dict[str, float]) -> None:
        """Warn of updates that were skipped; RunError for too many of them in a row."""
        if not metrics["train/skipped_updates"]:
            return
        message = (
            f"step {step}: {metrics['train/skipped_updates']:.0f} update(s) skipped, the loss or "
            f"its gradient is not finite: loss {metrics['train/loss']}, gradient norm "
            f"{metrics['train/grad_norm']}. To see it again: python -m jgrpo.replay {self.run_dir} "
            f"--step {step}"
        )
        if self.learner.skipped_in_a_row >= MOST_SKIPPED:
            raise RunError(f"{message}\n{MOST_SKIPPED} in a row: start a run with a lower lr")
        self.log.info(message, style="yellow")

    def reward_parts(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """Each part of the reward that the config asks for, float32 [P, G]."""
        c, groups = self.config, rollout.groups
        texts = [g.texts for g in groups]
        parts = {"outcome": rollout.correct}
        if self.scorers.custom is not None:
            ids = [[completion.token_ids for completion in g.completions] for g in groups]
            prompts, golds = [g.problem.prompt for g in groups], [g.problem.gold for g in groups]
            parts["custom"] = custom_rewards(
                self.scorers.custom, prompts, texts, ids, golds, rollout.correct
            )
        if self.scorers.process is not None:
            parts["process"] = self.scorers.process([g.problem.problem for g in groups], texts)
        if c.use_length_penalty:
            limits = c.expected_maximum_length, c.overlong_cache
            parts["length_penalty"] = length_penalty(rollout.n_tokens, *limits)
        return parts

    def publish(self, step: int) -> None:
        """Write adapter `step` and have the sampler load it."""
        c, folder = self.config, adapter_folder(self.run_dir, step)
        shape = adapters.AdapterConfig(c.lora_r, c.lora_alpha, c.lora_target_modules)
        with self.log.phase("export"):
            adapters.save(self.learner.state[0], folder, shape, c.model_id)
        with self.log.phase("reload"):
            self.sampler.load(folder)

    def evaluate_if_due(self, step: int) -> None:
        every = self.config.eval_every
        if not every or (step % every and step != self.config.n_grpo_steps):
            return
        with self.log.phase("evaluation", len(self.problems.evaluation)) as progress:
            metrics, _, _ = evaluate(self.sampler, self.grader, self.problems, progress)
        self.log.log(step, metrics | self.log.take_seconds())


def step_metrics(rollout: Rollout, parts, rewards, advantages) -> dict[str, float]:
    """Figures of all that was sampled, and of the rewards that were trained on, part by part."""
    return rollout.metrics | {
        "train/reward_mean": float(rewards.mean()),
        "train/zero_advantage_fraction": float((advantages == 0).mean()),
        **{f"reward/{name}": float(part.mean()) for name, part in parts.items()},
    }


def skipped_at_the_end(rows: list[dict], updates_per_rollout: int) -> int:
    """The updates in a row that were skipped when a run stopped, from its metrics."""
    found = 0
    for row in reversed([row for row in rows if "train/skipped_updates" in row]):
        found += int(row["train/skipped_updates"])
        if row["train/skipped_updates"] < updates_per_rollout:
            break
    return found


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
    unfinished = run_dir / ".curves.png.tmp"
    draw({run_dir.name: read_metrics(run_dir)}).savefig(unfinished, format="png")
    unfinished.replace(picture)
    log.info(f"learning curve: {picture}\nadapter: {sorted((run_dir / 'adapters').iterdir())[-1]}")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with exit_status():
        if COMMAND.dry_run:
            dry_run(COMMAND.options)
        else:
            train(COMMAND.options, COMMAND.resume)


if __name__ == "__main__":
    main()
