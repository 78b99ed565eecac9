"""Train: python -m jgrpo.train --config configs/rank1.py [--FIELD VALUE ...], or --resume RUN.

`Loop.step` is the flow: prompts -> rollout -> rewards -> advantages -> update -> adapter -> the
sampler loads it. Step k samples with adapter k - 1 and gives adapter k.
"""

from jgrpo.errors import RunError, exit_status, no_more_interrupts, printable, stop_at_once

if __name__ == "__main__":
    stop_at_once()
from jgrpo import cli

if __name__ == "__main__":  # before JAX is imported: help and mistakes are answered at once
    cli.tune_allocator()
    with exit_status():
        COMMAND = cli.parse(cli.Train)

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax

from jgrpo.advantages import group_advantages, leave_one_out
from jgrpo.checks import without_effect
from jgrpo.config import Config
from jgrpo.policy import adapter as adapters
from jgrpo.rewards import load_functions
from jgrpo.rollout import Sampler
from jgrpo.run import memory
from jgrpo.run.alike import Alike
from jgrpo.run.collect import Collector
from jgrpo.run.difficulty import of_this_difficulty
from jgrpo.run.evaluation import evaluate
from jgrpo.run.probe import check_sampler, gap_problem
from jgrpo.run.record import Record, skipped_at_the_end
from jgrpo.run.rundir import adapter_folder, read_metrics, run_id, write_rollouts
from jgrpo.run.runlog import RunLog
from jgrpo.run.session import (
    Session,
    begun,
    columns_of,
    configure_jax,
    open_policy,
    open_problems,
    open_sampler,
    open_session,
)
from jgrpo.update import Learner

MOST_SKIPPED = 3
"""Updates in a row that may be skipped because they are not finite, before the run ends."""


@dataclass
class Loop:
    """What a run reads, changes and leaves behind, and the steps over it."""

    session: Session
    learner: Learner
    sampler: Sampler
    record: Record
    log: RunLog

    def step(self, step: int) -> None:
        """Sample with adapter step - 1, learn from it, publish adapter `step`, log."""
        c, log, start_s = self.session.config, self.log, time.perf_counter()
        rollout = self.collector.collect(step, log)
        with log.phase("reward"):
            rewards = rollout.rewards
            advantages_of = leave_one_out if c.use_leave_one_out else group_advantages
            advantages = advantages_of(rewards.total, c.use_std_norm)
        with log.phase("training"):
            metrics = self.learner.learn(rollout.rows(advantages, c.mask_truncated_completions))
        self.check_policy(step, metrics)
        with log.phase("export"):
            lines = [*rollout.lines(advantages)]
            write_rollouts(self.record.run_dir, step, lines)
        self.publish(step)
        metrics |= step_metrics(rollout, rewards, advantages) | log.take_seconds()
        log.log(step, metrics | {"time/step": time.perf_counter() - start_s}, lines)
        self.record.keep(step, self.learner.state)
        self.check_updates(step, metrics)
        if message := self.alike.after(step, metrics):
            log.info(message, style="yellow")

    def run(self) -> None:
        """All steps that are left, each with what is due after it."""
        c = self.session.config
        self.start()
        for step in range(self.record.first + 1, c.n_grpo_steps + 1):
            self.step(step)
            self.evaluate_if_due(step)
            if step % c.checkpoint_every == 0 or step == c.n_grpo_steps:
                self.record.save()
        self.record.finish(self.log)

    def start(self) -> None:
        """Everything before the next step: self-tests, the probe, the adapter, its evaluation (if
        the run was not stopped after it), the first checkpoint."""
        session, first, run_dir = self.session, self.record.first, self.record.run_dir
        self.record.tell(self.log)
        self.alike = Alike(session.config, str(run_dir))
        self.collector = Collector(
            session.config, session.problems, self.sampler, session.grader, session.scorers
        )
        session.grader.self_test()
        if not memory.is_small(session.policy):
            self.rehearse()
        probe = run_dir / "adapters" / "probe"
        with self.log.phase("probe"):
            gaps = check_sampler(
                session.config, session.policy, self.sampler, session.problems, probe
            )
        self.log.info(
            "the sampler follows the adapter: gap {probe/gap_mean:.1e} mean, {probe/gap_max:.1e} "
            "max (to the base: {probe/gap_to_base_mean:.1e})".format(**gaps)
        )
        if (folder := adapter_folder(run_dir, first)).exists():
            self.sampler.load(folder)
        else:
            self.publish(first)
        shutil.rmtree(probe)  # only now: a server dies if a loaded adapter's folder goes
        self.log.take_seconds()
        rows = read_metrics(run_dir)
        self.learner.skipped_in_a_row = skipped_at_the_end(rows, session.config.updates_per_rollout)
        if not any(row["step"] == first and "eval/accuracy" in row for row in rows):
            self.evaluate_if_due(first)
        self.record.save()

    def rehearse(self) -> None:
        """Train on the largest micro-batch that can come, and forget it: what does not fit into
        memory shows before anything is sampled."""
        lengths = [len(problem.prompt_ids) for problem in self.session.problems.train]
        batch = memory.largest_micro_batch(self.session.config, lengths)
        with self.log.phase("rehearsal"):
            learner, (adapter, _) = self.learner, self.learner.state
            jax.block_until_ready(learner.update.gradient(adapter, learner.base, [batch], 1.0))

    def check_policy(self, step: int, metrics: dict[str, float]) -> None:
        """RunError if the completions of a step were not sampled from its adapter."""
        if problem := gap_problem(metrics, self.session.config):
            raise RunError(f"step {step}: {problem}")

    def check_updates(self, step: int, metrics: dict[str, float]) -> None:
        """Warn of updates that were skipped; RunError for too many of them in a row."""
        if not metrics["train/skipped_updates"]:
            return
        message = (
            f"step {step}: {metrics['train/skipped_updates']:.0f} update(s) skipped, the loss or "
            f"its gradient is not finite: loss {metrics['train/loss']}, gradient norm "
            f"{metrics['train/grad_norm']}. To see it again: python -m jgrpo.replay "
            f"{self.record.run_dir} --step {step}"
        )
        if self.learner.skipped_in_a_row >= MOST_SKIPPED:
            raise RunError(f"{message}\n{MOST_SKIPPED} in a row: start a run with a lower lr")
        self.log.info(message, style="yellow")

    def publish(self, step: int) -> None:
        """Write adapter `step` and have the sampler load it."""
        c, folder = self.session.config, adapter_folder(self.record.run_dir, step)
        shape = adapters.AdapterConfig(c.lora_r, c.lora_alpha, c.lora_target_modules)
        with self.log.phase("export"):
            adapters.save(self.learner.state[0], folder, shape, c.model_id)
        with self.log.phase("reload"):
            self.sampler.load(folder)

    def evaluate_if_due(self, step: int) -> None:
        session, every = self.session, self.session.config.eval_every
        if not every or (step % every and step != session.config.n_grpo_steps):
            return
        c, problems = session.config, session.problems
        n_completions = len(problems.evaluation) * c.eval_n_samples
        with self.log.phase("evaluation", n_completions) as progress:
            result = evaluate(c, self.sampler, session.grader, problems, progress)
        self.log.log(step, result.metrics | self.log.take_seconds(), result.table())


def train(config: Config, resume: Path | None = None) -> Path:
    """Run all steps -> the run folder. Raises InputError before compute is spent, RunError later.

    Whatever ends it leaves a checkpoint of the last whole step behind, if the disk takes it.
    """
    configure_jax()
    config = begun(config) if resume is None else config
    with ExitStack() as stack:
        session = open_session(config, stack, resume)
        record = Record(session, resume, stack)
        policy = session.policy
        learner = Learner(config, policy.graph, policy.adapter, policy.base)
        learner.state = record.restore(learner.state)
        stops, name = session.problems.stop_token_ids, run_id(record.run_dir)
        sampler = open_sampler(config, policy, stops, name)
        stack.callback(sampler.close)
        log = record.begin(stack)
        try:
            Loop(session, learner, sampler, record, log).run()
        except BaseException as error:
            with no_more_interrupts():
                message = record.stop()
            if memory.ran_out(error):
                error = RunError(f"out of memory: {memory.KNOBS}. {str(error).splitlines()[0]}")
            if isinstance(error, KeyboardInterrupt):
                error.args = (message,)
            if isinstance(error, RunError | OSError):
                raise RunError(f"{error}\n{message}") from error
            log.info(message)
            raise
    return record.run_dir


def step_metrics(rollout, rewards, advantages) -> dict[str, float]:
    """Figures of all that was sampled, and of the rewards that were trained on, part by part."""
    zero = float((advantages == 0).mean())
    return rollout.metrics | rewards.metrics | {"train/zero_advantage_fraction": zero}


def dry_run(config: Config) -> None:
    """Read all input but the weights, and print what training will take of the memory."""
    configure_jax()
    config = begun(config)
    problems = of_this_difficulty(config, open_problems(config))
    load_functions(config.reward_function, columns_of(problems.train))
    policy = open_policy(config, abstract=True)
    lengths = [len(problem.prompt_ids) for problem in problems.train]
    free = memory.free_memory()
    told = [memory.training_memory(config, policy, lengths).table(free)]
    if config.rollout == "jax":
        told.append(memory.of_sampling(config, policy, free))
    for line in (*problems.report, *without_effect(config), *told):
        print(printable(line))


def main() -> None:
    with exit_status():
        if COMMAND.dry_run:
            dry_run(COMMAND.options)
        else:
            train(COMMAND.options, COMMAND.resume)


if __name__ == "__main__":
    main()
