"""Prompts -> sampled, graded and scored groups: what a step learns from.

With dynamic sampling (DAPO, Yu et al. 2025, section 3.2) groups whose rewards are all alike, and so
have nothing to teach, are replaced by others, in a bounded number of rounds. It is the whole reward
that counts, with every part that the config asks for: where a length penalty or a function of the
user's tells completions apart, a group that is all right teaches too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jgrpo.answers.grader import Grader
from jgrpo.config import Config
from jgrpo.prompts.problems import Problem, replacement_indices, step_indices
from jgrpo.rollout.protocol import Sampler, prompt_seeds
from jgrpo.run.groups import Group, Rollout, figures
from jgrpo.run.scoring import Scorers
from jgrpo.run.screen import Phases
from jgrpo.run.session import Problems


@dataclass
class Wanted:
    """What a member asks for in a step, and the groups that it has so far."""

    config: Config
    scorers: Scorers
    step: int
    mixed: list[Group] = field(default_factory=list)
    others: list[Group] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    counts: dict[str, float] = field(
        default_factory=lambda: {"reward/errors": 0.0, "reward/timeouts": 0.0}
    )

    def order(self, n_problems: int, sampling_round: int) -> list[int]:
        """The problems of a round; none if it has enough."""
        c = self.config
        if not sampling_round:
            chosen = step_indices(n_problems, c.n_prompts_per_step, c.seed, self.step)
        elif c.use_dynamic_sampling and sampling_round < c.max_sampling_rounds:
            missing = c.n_prompts_per_step - len(self.mixed)
            chosen = replacement_indices(
                n_problems, missing, c.seed, self.step, sampling_round, self.used
            )
        else:
            chosen = []
        self.used |= set(chosen)
        return chosen

    def add(self, groups: Sequence[Group], sampling_round: int) -> None:
        for group in groups:
            keep = group.mixed or not self.config.use_dynamic_sampling
            (self.mixed if keep else self.others).append(group)
        self.counts["train/sampling_rounds"] = sampling_round + 1.0

    def rollout(self) -> Rollout:
        """n_prompts_per_step groups, mixed ones first."""
        groups = [*self.mixed, *self.others]
        return Rollout(groups[: self.config.n_prompts_per_step], figures(groups) | self.counts)


class Collector:
    """Samples, grades and scores the groups of a step, those of all members at once; a function of
    (configs, step) and the policies."""

    def __init__(
        self,
        configs: Sequence[Config],
        problems: Problems,
        sampler: Sampler,
        grader: Grader,
        scorers: Sequence[Scorers] = (),
    ):
        self.configs, self.problems, self.sampler, self.grader = configs, problems, sampler, grader
        self.scorers = scorers or [Scorers()] * len(configs)

    def collect(
        self,
        step: int,
        screen: Phases,
        members: Sequence[int] | None = None,
        sampler: Sampler | None = None,
    ) -> dict[int, Rollout]:
        """The groups of step `step` of these members (None: all), from `sampler` in place of its
        own where one is given."""
        sampler = sampler or self.sampler
        n_problems = len(self.problems.train)
        wanted = {
            e: Wanted(self.configs[e], self.scorers[e], step)
            for e in (range(len(self.configs)) if members is None else members)
        }
        sampling_round = 0
        while orders := {
            e: order for e, w in wanted.items() if (order := w.order(n_problems, sampling_round))
        }:
            for e, groups in self._groups(
                orders, wanted, step, sampling_round, screen, sampler
            ).items():
                wanted[e].add(groups, sampling_round)
            sampling_round += 1
        return {e: w.rollout() for e, w in wanted.items()}

    def _groups(
        self, orders, wanted, step, sampling_round, screen, sampler
    ) -> dict[int, list[Group]]:
        shared = self.configs[0]
        asked: list[tuple[int, Problem]] = [
            (e, self.problems.train[i]) for e, order in orders.items() for i in order
        ]
        seeds = [
            seed
            for e, order in orders.items()
            for seed in prompt_seeds(self.configs[e].seed, step, len(order), sampling_round)
        ]
        with screen.phase("generation", len(asked) * shared.group_size) as progress:
            sampled = sampler.sample(
                [problem.prompt_ids for _, problem in asked],
                seeds=seeds,
                members=[e for e, _ in asked],
                group_size=shared.group_size,
                temperature=shared.temperature,
                progress=progress,
            )
        with screen.phase("reward"):
            return {
                e: self._graded(wanted[e], [
                    (problem, completions)
                    for (member, problem), completions in zip(asked, sampled, strict=True)
                    if member == e
                ])
                for e in orders
            }  # fmt: skip

    def _graded(self, wanted: Wanted, sampled) -> list[Group]:
        asked, completions = [problem for problem, _ in sampled], [group for _, group in sampled]
        texts = [[self.problems.text(completion) for completion in g] for g in completions]
        grades = self.grader.grade(texts, [p.gold for p in asked])
        rewards = wanted.scorers.rewards(wanted.config, asked, completions, texts, grades.correct)
        wanted.counts["reward/errors"] += grades.errors
        wanted.counts["reward/timeouts"] += grades.timeouts
        groups = zip(asked, completions, texts, grades.correct, grades.boxed, strict=True)
        return [
            Group(*group, {name: part[p] for name, part in rewards.parts.items()}, rewards.total[p])
            for p, group in enumerate(groups)
        ]
