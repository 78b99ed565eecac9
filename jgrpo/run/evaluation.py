"""A policy on the evaluation problems: n completions of each, graded, and what they say.

Greedy, one completion a problem, unless the config asks for more; the loop and the command share
this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jgrpo.answers.grader import Grader, Grades
from jgrpo.config import Config
from jgrpo.estimators import Interval, maj_at_k, mean_interval, pass_at_k, powers_of_two
from jgrpo.prompts.problems import Problem
from jgrpo.rollout.protocol import Completion, Progress, Sampler, prompt_seeds
from jgrpo.run.session import Problems

TABLE_ROWS = 50
"""Problems of an evaluation that trackers get."""


@dataclass(frozen=True)
class Evaluation:
    """P problems, n completions of each, and a score in [0, 1] for each problem by estimator."""

    asked: list[Problem]
    completions: list[list[Completion]]
    texts: list[list[str]]
    grades: Grades
    scores: dict[str, np.ndarray]
    """float64 [P]: accuracy (the mean over its completions, avg@n); of several completions
    pass@k and maj@k too, for the powers of two up to n"""

    @property
    def n_samples(self) -> int:
        return len(self.completions[0])

    @property
    def intervals(self) -> dict[str, Interval]:
        """The mean of each score over the problems, as a tag, with its interval."""
        return {f"eval/{name}": mean_interval(scores) for name, scores in self.scores.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that a run logs. `eval/correct` and `eval/total` count completions."""
        flat = [c for group in self.completions for c in group]
        return {
            **{f"eval/{name}": float(scores.mean()) for name, scores in self.scores.items()},
            "eval/correct": float(self.grades.correct.sum()),
            "eval/total": float(len(flat)),
            "eval/boxed_fraction": float(self.grades.boxed.mean()),
            "eval/truncated_fraction": float(np.mean([c.finish_reason == "length" for c in flat])),
            "eval/avg_gen_length": float(np.mean([len(c.token_ids) for c in flat])),
        }

    def table(self) -> list[dict[str, Any]]:
        """The first problems, a row each, with the first completion: for trackers."""
        parts = zip(self.asked, self.texts, self.scores["accuracy"].tolist(), strict=True)
        return [
            {"accuracy": score, "gold": p.gold, "problem": p.problem, "completion": texts[0]}
            for p, texts, score in [*parts][:TABLE_ROWS]
        ]


def evaluate(
    config: Config,
    sampler: Sampler,
    grader: Grader,
    problems: Problems,
    progress: Progress | None = None,
) -> Evaluation:
    """Ask the evaluation problems. Every policy is asked with the same seeds."""
    return evaluate_members([config], [0], sampler, grader, problems, progress)[0]


def evaluate_members(
    configs: Sequence[Config],
    members: Sequence[int],
    sampler: Sampler,
    grader: Grader,
    problems: Problems,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """The same of some members of a population at once."""
    asked, shared = problems.evaluation, configs[0]
    n, n_samples = len(asked), shared.eval_n_samples
    of_all = sampler.sample(
        [p.prompt_ids for p in asked] * len(members),
        # steps count from 1
        seeds=[seed for e in members for seed in prompt_seeds(configs[e].seed, 0, n)],
        members=[e for e in members for _ in asked],
        group_size=n_samples,
        temperature=shared.eval_temperature,
        top_p=shared.eval_top_p,
        progress=progress,
    )
    found = []
    for i in range(len(members)):
        completions = of_all[i * n : (i + 1) * n]
        texts = [[problems.text(c) for c in group] for group in completions]
        grades = grader.grade(texts, [p.gold for p in asked])
        scores = {"accuracy": grades.correct.mean(axis=1, dtype=np.float64)}
        if n_samples > 1:
            scores |= _scores_of_several(grades.correct, grader.same_answers(texts))
        found.append(Evaluation(list(asked), completions, texts, grades, scores))
    return found


def _scores_of_several(
    correct: np.ndarray, answers: list[list[list[int]]]
) -> dict[str, np.ndarray]:
    """pass@k and maj@k of each problem, from correct [P, n] and its different answers, each as the
    completions that give it. (An answer is as right as its completions are: equality of answers
    and equality with the gold one may part where the grader is in doubt.)"""
    n = correct.shape[1]
    votes = [[len(places) for places in problem] for problem in answers]
    right = [
        [float(row[places].mean()) for places in problem]
        for row, problem in zip(correct, answers, strict=True)
    ]
    scores = {}
    for k in powers_of_two(n)[1:]:
        n_correct = correct.sum(axis=1).astype(int).tolist()
        scores[f"pass@{k}"] = np.array([pass_at_k(n, c, k) for c in n_correct])
        ballots = zip(votes, right, strict=True)
        scores[f"maj@{k}"] = np.array([maj_at_k(v, r, n, k) for v, r in ballots])
    return scores
