"""Prompts -> sampled, graded and scored groups: what a step learns from.

With dynamic sampling (DAPO, Yu et al. 2025, section 3.2) groups whose rewards are all alike, and so
have nothing to teach, are replaced by others, in a bounded number of rounds. It is the whole reward
that counts, with every part that the config asks for: where a length penalty or a function of the
user's tells completions apart, a group that is all right teaches too.
"""

from jgrpo.answers.grader import Grader
from jgrpo.config import Config
from jgrpo.prompts.problems import replacement_indices, step_indices
from jgrpo.rollout.protocol import Sampler, prompt_seeds
from jgrpo.run.groups import Group, Rollout, figures
from jgrpo.run.runlog import RunLog
from jgrpo.run.scoring import Scorers
from jgrpo.run.session import Problems


class Collector:
    """Samples, grades and scores the groups of a step; a function of (config, step) and the
    policy."""

    def __init__(
        self,
        config: Config,
        problems: Problems,
        sampler: Sampler,
        grader: Grader,
        scorers: Scorers | None = None,
    ):
        self.config, self.problems, self.sampler, self.grader = config, problems, sampler, grader
        self.scorers = scorers or Scorers()

    def collect(self, step: int, log: RunLog) -> Rollout:
        """The groups of step `step`: n_prompts_per_step of them, mixed ones first."""
        c, n_problems = self.config, len(self.problems.train)
        order = step_indices(n_problems, c.n_prompts_per_step, c.seed, step)
        mixed: list[Group] = []
        others: list[Group] = []
        used: set[int] = set()
        counts = {"reward/errors": 0.0, "reward/timeouts": 0.0}
        for sampling_round in range(c.max_sampling_rounds if c.use_dynamic_sampling else 1):
            if sampling_round:
                missing = c.n_prompts_per_step - len(mixed)
                order = replacement_indices(n_problems, missing, c.seed, step, sampling_round, used)
            if not order:
                break
            used |= set(order)
            for group in self._groups(order, step, sampling_round, log, counts):
                (mixed if group.mixed or not c.use_dynamic_sampling else others).append(group)
            counts["train/sampling_rounds"] = sampling_round + 1.0
        metrics = figures([*mixed, *others]) | counts
        return Rollout([*mixed, *others][: c.n_prompts_per_step], metrics)

    def _groups(self, order, step, sampling_round, log, counts) -> list[Group]:
        c = self.config
        asked = [self.problems.train[i] for i in order]
        with log.phase("generation", len(asked) * c.group_size) as progress:
            sampled = self.sampler.sample(
                [p.prompt_ids for p in asked],
                seeds=prompt_seeds(c.seed, step, len(asked), sampling_round),
                group_size=c.group_size,
                temperature=c.temperature,
                progress=progress,
            )
        with log.phase("reward"):
            texts = [[self.problems.text(completion) for completion in g] for g in sampled]
            grades = self.grader.grade(texts, [p.gold for p in asked])
            rewards = self.scorers.rewards(c, asked, sampled, texts, grades.correct)
        counts["reward/errors"] += grades.errors
        counts["reward/timeouts"] += grades.timeouts
        groups = zip(asked, sampled, texts, grades.correct, grades.boxed, strict=True)
        return [
            Group(*group, {name: part[p] for name, part in rewards.parts.items()}, rewards.total[p])
            for p, group in enumerate(groups)
        ]
