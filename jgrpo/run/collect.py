"""Prompts -> sampled and graded groups: what a step learns from.

With dynamic sampling (DAPO, Yu et al. 2025, section 3.2) groups that are all right or all wrong,
and so have nothing to teach, are replaced by others, in a bounded number of rounds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jgrpo.answers.grader import Grader
from jgrpo.config import Config
from jgrpo.policy.batch import Rows
from jgrpo.prompts.problems import Problem, replacement_indices, step_indices
from jgrpo.rollout.protocol import Completion, Sampler, prompt_seeds
from jgrpo.run.runlog import RunLog
from jgrpo.run.session import Problems


@dataclass(frozen=True)
class Group:
    """A problem and its G completions."""

    problem: Problem
    completions: list[Completion]
    texts: list[str]
    correct: np.ndarray
    """float32 [G]: 1 or 0"""
    boxed: np.ndarray
    """bool [G]"""

    @property
    def mixed(self) -> bool:
        return bool(self.correct.min() != self.correct.max())


@dataclass(frozen=True)
class Rollout:
    """The groups that are trained on, P of them, and figures of all that were sampled."""

    groups: list[Group]
    metrics: dict[str, float]

    @property
    def correct(self) -> np.ndarray:
        """float32 [P, G]"""
        return np.stack([g.correct for g in self.groups])

    @property
    def n_tokens(self) -> np.ndarray:
        """int [P, G]"""
        return np.array([[len(c.token_ids) for c in g.completions] for g in self.groups])

    @property
    def truncated(self) -> np.ndarray:
        """bool [P, G]: cut off by max_tokens"""
        return np.array([[c.finish_reason == "length" for c in g.completions] for g in self.groups])

    def rows(self, advantages: np.ndarray, mask_truncated: bool) -> Rows:
        """As the learner takes it: N = P * G rows, groups together. advantages: float32 [P, G]."""
        completions = [completion for g in self.groups for completion in g.completions]
        return Rows(
            [g.problem.prompt_ids for g in self.groups for _ in g.completions],
            [completion.token_ids for completion in completions],
            [completion.logprobs for completion in completions],
            advantages.reshape(-1),
            ~self.truncated.reshape(-1) if mask_truncated else None,
        )

    def lines(
        self, parts: dict[str, np.ndarray], rewards: np.ndarray, advantages: np.ndarray
    ) -> Iterator[dict]:
        """One line a completion for the rollouts file; other programs rely on the fields."""
        for p, group in enumerate(self.groups):
            for g, completion in enumerate(group.completions):
                yield {
                    "problem": group.problem.problem,
                    "prompt": group.problem.prompt,
                    "completion": group.texts[g],
                    "prompt_ids": group.problem.prompt_ids,
                    "token_ids": completion.token_ids,
                    "sampler_logprobs": completion.logprobs,
                    "gold": group.problem.gold,
                    "reward": rewards[p, g],
                    "reward_parts": {name: part[p, g] for name, part in parts.items()},
                    "advantage": advantages[p, g],
                    "finish_reason": completion.finish_reason,
                }


class Collector:
    """Samples and grades the groups of a step; a function of (config, step) and the policy."""

    def __init__(self, config: Config, problems: Problems, sampler: Sampler, grader: Grader):
        self.config, self.problems, self.sampler, self.grader = config, problems, sampler, grader

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
        counts["reward/errors"] += grades.errors
        counts["reward/timeouts"] += grades.timeouts
        parts = zip(asked, sampled, texts, grades.correct, grades.boxed, strict=True)
        return [Group(*part) for part in parts]


def figures(groups: Sequence[Group]) -> dict[str, float]:
    """What a step's completions show, before any training on them."""
    flat = [completion for g in groups for completion in g.completions]
    lengths = np.array([len(completion.token_ids) for completion in flat])
    return {
        "train/accuracy": float(np.mean([g.correct for g in groups])),
        "train/boxed_fraction": float(np.mean([g.boxed for g in groups])),
        "train/avg_gen_length": float(lengths.mean()),
        "train/truncated_fraction": float(np.mean([x.finish_reason == "length" for x in flat])),
        "tokens/generated": float(lengths.sum()),
    }
