"""Train: python -m jgrpo.train --config configs/rank1.py [--FIELD VALUE ...], or --resume RUN.

`Loop.step` is the flow: prompts -> rollout -> rewards -> advantages -> update -> adapter -> the
sampler loads it. Step k samples with adapter k - 1, or an older one where rollouts run ahead
(`run/ahead.py`), and gives adapter k.
"""

from jgrpo.errors import RunError, exit_status, no_more_interrupts, stop_at_once

if __name__ == "__main__":
    stop_at_once()
from jgrpo import cli
from jgrpo.run.without_torch import leave_out_torch, torch_again

if __name__ == "__main__":  # before JAX is imported: help and mistakes are answered at once
    cli.tune_allocator()
    with exit_status():
        COMMAND = cli.parse(cli.Train)
        leave_out_torch(COMMAND.members)

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jgrpo.config import Config
from jgrpo.policy import adapter as adapters
from jgrpo.policy.batch import Rows
from jgrpo.rollout import Sampler
from jgrpo.run import memory
from jgrpo.run.ahead import Ahead
from jgrpo.run.collect import Collector
from jgrpo.run.dry_run import dry_run
from jgrpo.run.evaluation import evaluate_members
from jgrpo.run.groups import Rollout
from jgrpo.run.hosts import is_first, join, leading
from jgrpo.run.member import Member, member_names
from jgrpo.run.mix_up import check_members
from jgrpo.run.policy import begun
from jgrpo.run.probe import check_sampler, gap_problem, gaps_to, of_a_stale_policy
from jgrpo.run.record import Record, common_step, skipped_at_the_end, stop, where_it_went
from jgrpo.run.rundir import adapter_folder, read_metrics, run_id, write_rollouts
from jgrpo.run.sampler import open_sampler
from jgrpo.run.screen import Screen
from jgrpo.run.session import Session, configure_jax, open_session
from jgrpo.run.stale import Watch
from jgrpo.run.timing import StepClock, rates
from jgrpo.run.together import SharedLearner, follow, new_learner


@dataclass
class Loop:
    """What the runs read, change and leave behind, and the steps over it."""

    session: Session
    learner: SharedLearner
    sampler: Sampler
    members: list[Member]
    screen: Screen

    def __post_init__(self) -> None:
        s, shared = self.session, self.session.shared
        self.ahead = Ahead(
            Collector(s.configs, s.problems, self.sampler, s.grader, s.scorers),
            self.sampler, self.folders, self.screen, n_ahead=shared.rollouts_ahead,
            first=self.members[0].record.first, last=shared.n_grpo_steps,
        )  # fmt: skip
        watched = shared.rollout == "vllm" and shared.check_stale
        self.watch = Watch(s.configs, s.policy) if watched else None
        self.rounding = 0.0  # the sampler's mean gap to the probe

    def step(self, step: int) -> None:
        """Learn from the rollouts of a step, publish adapters `step`, log."""
        screen, members, clock = self.screen, self.members, StepClock(self.ahead, self.screen)
        rollouts = self.ahead.collect(step, self.running)
        with screen.phase("reward"):
            advantages = {e: members[e].advantages(rollout) for e, rollout in rollouts.items()}
        with screen.phase("training"):
            rows = {e: members[e].rows(r, advantages[e]) for e, r in rollouts.items()}
            metrics = self.learner.learn(rows)
        self.check_policies(step, rows, metrics)
        with screen.phase("export"):
            policy_step = self.ahead.policy_of(step)
            lines = {e: [*r.lines(advantages[e], self.learner.logprobs[e], policy_step)]
                     for e, r in rollouts.items()}  # fmt: skip
            for e in lines:
                write_rollouts(members[e].record.run_dir, step, lines[e])
        self.publish(step)
        seconds = clock.seconds()
        for e, rollout in rollouts.items():
            metrics[e] |= step_metrics(rollout, advantages[e]) | seconds | rates(rollout, seconds)
            self.tell(step, e, metrics[e], lines[e])

    def run(self) -> None:
        """All steps that are left, each with what is due after it."""
        shared = self.session.shared
        self.start()
        for step in range(self.members[0].record.first + 1, shared.n_grpo_steps + 1):
            self.step(step)
            self.evaluate_if_due(step)
            if step % shared.checkpoint_every == 0 or step == shared.n_grpo_steps:
                for e in self.running:
                    self.members[e].record.save()
        shares = where_it_went(self.screen.shares(), shared)
        self.screen.info(f"{self.screen.summary()}\n{shares}")
        for member in self.members:
            member.record.finish(member.log)
        if ended := [member.ended for member in self.members if member.ended]:
            raise RunError("\n".join(ended))

    @property
    def running(self) -> list[int]:
        """The members that take part."""
        return [e for e, member in enumerate(self.members) if not member.ended]

    def start(self) -> None:
        """Everything before the next step: self-tests, the probe, the adapters, their evaluation
        (if the run was not stopped after it), the first checkpoint."""
        session, records = self.session, [member.record for member in self.members]
        first = records[0].first
        for member in self.members:
            member.record.tell(member.log)
        session.grader.self_test()
        if not memory.is_small(session.policy):
            self.rehearse()
        probes = [record.run_dir / "adapters" / "probe" for record in records]
        with self.screen.phase("probe"):
            gaps = check_sampler(
                session.configs, session.policy, self.sampler, session.problems, probes
            )
        self.screen.info(
            "the sampler follows the adapter: gap {probe/gap_mean:.1e} mean, {probe/gap_max:.1e} "
            "max (to the base: {probe/gap_to_base_mean:.1e})".format(**gaps)
        )
        self.rounding = gaps["probe/rounding"]
        self.publish(first)
        for probe in probes:
            shutil.rmtree(probe)  # only now: a server dies if a loaded adapter's folder goes
        self.screen.take_seconds()
        evaluated = []
        for e, record in enumerate(records):
            rows = read_metrics(record.run_dir)
            n_updates = session.configs[e].updates_per_rollout
            self.learner.skipped_in_a_row[e] = skipped_at_the_end(rows, n_updates)
            evaluated.append(any(r["step"] == first and "eval/accuracy" in r for r in rows))
        if not all(evaluated):
            self.evaluate_if_due(first)
        for record in records:
            record.save()

    def rehearse(self) -> None:
        """Train on the largest micro-batch that can come, and forget it: what does not fit into
        memory shows before anything is sampled."""
        lengths = [len(problem.prompt_ids) for problem in self.session.problems.train]
        batch = memory.largest_micro_batch(self.session.shared, lengths)
        with self.screen.phase("rehearsal"):
            self.learner.rehearse(batch)

    def check_policies(
        self, step: int, rows: dict[int, Rows], metrics: dict[int, dict[str, float]]
    ) -> None:
        """RunError if the completions of a step were not sampled from the adapters that they should
        be from. Where those are older than the ones that were trained, the logprobs that training
        saw say how far the policy has moved since, and are named so."""
        policy_step = self.ahead.policy_of(step)
        for of_member in metrics.values():
            of_member["staleness/steps"] = step - 1.0 - policy_step
        if policy_step < step - 1:
            sampled = adapters.load_all(self.folders(policy_step), self.learner.adapters)
            for e, gaps in gaps_to(sampled, self.learner, rows).items():
                metrics[e] = of_a_stale_policy(metrics[e]) | gaps
        for e, of_member in metrics.items():
            member, problem = self.members[e], None
            if self.watch and policy_step > 0:
                right, before = (self.folders(s)[e] for s in (policy_step, policy_step - 1))
                of_member |= self.watch.look(e, step, rows[e], right, before)
                problem = self.watch.problem(e)
            if problem := gap_problem(of_member, member.config) or problem:
                raise RunError(f"{member.of}step {step}: {problem}")

    def tell(self, step: int, e: int, metrics: dict[str, float], lines: list[dict]) -> None:
        """Log a member's step, which is whole now; end it if too many of its updates were skipped.
        RunError if it is the last."""
        member, skipped = self.members[e], self.learner.skipped_in_a_row[e]
        if not (problem := member.tell(step, metrics, lines, skipped)):
            return
        if len(self.running) == 1:
            raise RunError(problem)
        member.end(problem)

    def publish(self, step: int) -> None:
        """Write adapters `step` where they are not there, and have the sampler load them."""
        with self.screen.phase("export"):
            for e in self.running:
                member, c = self.members[e], self.members[e].config
                member.state = jax.device_get(self.learner.state(e))
                member.folder = adapter_folder(member.record.run_dir, step)
                shape = adapters.AdapterConfig(c.lora_r, c.lora_alpha, c.lora_target_modules)
                if not member.folder.exists():
                    adapters.save(member.state[0], member.folder, shape, c.model_id)
        with self.screen.phase("reload"):
            self.ahead.load(step)
            self.check_loaded(step)

    def check_loaded(self, step: int) -> None:
        """RunError if a server takes one member's adapter for another's."""
        session = self.session
        if len(self.members) == 1 or session.shared.rollout != "vllm":
            return
        check_members(
            session.configs, session.policy, self.sampler, session.problems,
            {e: self.members[e].state[0] for e in self.running},
            names=[member.log.name.strip() for member in self.members],
            rounding=self.rounding, seed=step,
        )  # fmt: skip

    def folders(self, step: int) -> list[Path]:
        """The adapters of a step; of a member that has ended its last one."""
        return [m.folder if m.ended else adapter_folder(m.record.run_dir, step)
                for m in self.members]  # fmt: skip

    def evaluate_if_due(self, step: int) -> None:
        """Ask the evaluation problems after every so many steps, and after the last."""
        session, c = self.session, self.session.shared
        if not c.eval_every or (step % c.eval_every and step != c.n_grpo_steps):
            return
        n_completions = len(session.problems.evaluation) * c.eval_n_samples
        with self.screen.phase("evaluation", n_completions * len(self.running)) as progress:
            self.ahead.settle()
            results = evaluate_members(
                session.configs, self.running, self.sampler, session.grader, session.problems,
                progress,
            )  # fmt: skip
        seconds = self.screen.take_seconds()
        for e, result in zip(self.running, results, strict=True):
            self.members[e].log.log(step, result.metrics | seconds, result.table())


def train(config: Config, resume: Path | None = None) -> Path:
    """Run all steps -> the run folder. Raises InputError before compute is spent, RunError later.

    Whatever ends it leaves a checkpoint of the last whole step behind, if the disk takes it.
    """
    return train_together([config], [resume])[0]


def train_together(
    configs: Sequence[Config], resumes: Sequence[Path | None] | None = None
) -> list[Path]:
    """`train` of several configs side by side over one base (`members` says what they share) ->
    their run folders. One that ends early leaves the others alone; RunError at the end."""
    configure_jax()
    resumes = [*resumes] if resumes else [None] * len(configs)
    pairs = list(zip(configs, resumes, strict=True))
    configs = [begun(config) if resume is None else config for config, resume in pairs]
    with leading(), ExitStack() as stack:
        session = open_session(configs, stack, resumes[0])
        records = [Record(session, e, resume, stack) for e, resume in enumerate(resumes)]
        learner, first = new_learner(session.configs, session.policy), common_step(records)
        for e, record in enumerate(records):
            learner.set_state(e, record.restore(first, learner.state(e)))
        stops, name = session.problems.stop_token_ids, run_id(records[0].run_dir)
        sampler = open_sampler(session.shared, session.policy, stops, name)
        stack.callback(sampler.close)
        screen = stack.enter_context(Screen(session.shared.n_grpo_steps, done=first))
        stack.enter_context(screen.warnings())
        names = member_names([record.run_dir for record in records])
        members = [
            Member(config, record, record.begin(stack, screen, member_name))
            for config, record, member_name in zip(configs, records, names, strict=True)
        ]
        try:
            loop = Loop(session, learner, sampler, members, screen)
            stack.callback(loop.ahead.close)
            loop.run()
        except BaseException as error:
            with no_more_interrupts():
                message = stop([member.record for member in members if not member.ended])
            if memory.ran_out(error):
                error = RunError(f"out of memory: {memory.KNOBS}. {str(error).splitlines()[0]}")
            if isinstance(error, KeyboardInterrupt):
                error.args = (message,)
            if isinstance(error, RunError | OSError):
                raise RunError(f"{error}\n{message}") from error
            screen.info(message)
            raise
    return [record.run_dir for record in records]


def step_metrics(rollout: Rollout, advantages: np.ndarray) -> dict[str, float]:
    """Figures of all that was sampled, and of the rewards that were trained on, part by part."""
    zero = float((advantages == 0).mean())
    return rollout.metrics | rollout.rewards.metrics | {"train/zero_advantage_fraction": zero}


def main() -> None:
    torch_again()
    with exit_status():
        configs = COMMAND.members
        join(COMMAND.coordinator_address, COMMAND.num_processes, COMMAND.process_id)
        if COMMAND.dry_run:
            dry_run(configs)
        elif not is_first():
            configure_jax()
            follow(configs)
        else:
            train_together(configs, COMMAND.resume)


if __name__ == "__main__":
    main()
