"""What a step samples: groups, each a problem and its G completions; a rollout is P of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jgrpo.policy.batch import Rows
from jgrpo.prompts.problems import Problem
from jgrpo.rollout.protocol import Completion


@dataclass(frozen=True)
class Rewards:
    """float32 [P, G] each: the parts by name, and what they add up to. A part is NaN where a
    function of the user's left a completion out."""

    parts: dict[str, np.ndarray]
    total: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        there = {n: part[~np.isnan(part)] for n, part in self.parts.items()}
        parts = {f"reward/{n}": float(part.mean()) for n, part in there.items() if len(part)}
        return {"train/reward_mean": float(self.total.mean()), **parts}


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

    parts: dict[str, np.ndarray]
    """float32 [G] each: the parts of the reward"""
    reward: np.ndarray
    """float32 [G]: their sum"""

    @property
    def mixed(self) -> bool:
        """Do the rewards differ, so that there is something to learn?"""
        return bool(self.reward.min() != self.reward.max())


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
    def rewards(self) -> Rewards:
        parts = {
            name: np.stack([g.parts[name] for g in self.groups]) for name in self.groups[0].parts
        }
        return Rewards(parts, np.stack([g.reward for g in self.groups]))

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
        self, advantages: np.ndarray, logprobs: np.ndarray, policy_step: int
    ) -> Iterator[dict]:
        """One line a completion for the rollouts file; other programs rely on the fields.
        `logprobs` [N, longest] are the trainer's before the update, NaN where it computed none;
        `policy_step`: the adapter that sampled is that of this step."""
        for p, group in enumerate(self.groups):
            for g, completion in enumerate(group.completions):
                row = logprobs[p * len(group.completions) + g, : len(completion.token_ids)]
                known = len(row) > 0 and not np.isnan(row[0])
                yield {
                    "problem": group.problem.problem,
                    "prompt": group.problem.prompt,
                    "completion": group.texts[g],
                    "prompt_ids": group.problem.prompt_ids,
                    "token_ids": completion.token_ids,
                    "sampler_logprobs": completion.logprobs,
                    "trainer_logprobs": row.tolist() if known else None,
                    "gold": group.problem.gold,
                    "reward": group.reward[g],
                    "reward_parts": {
                        name: None if np.isnan(part[g]) else part[g]
                        for name, part in group.parts.items()
                    },
                    "advantage": advantages[p, g],
                    "finish_reason": completion.finish_reason,
                    "policy_step": policy_step,
                }


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
