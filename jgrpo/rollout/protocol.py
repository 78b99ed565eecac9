"""What a sampler gives to the loop: the one interface that vLLM and the embedded sampler both fill.

A policy is a PEFT folder. The loop writes the folder, tells the sampler to load it, and asks for
completions; where they are computed is the sampler's business. Runs side by side are members 0, 1,
2, ..., each with a folder of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

Progress = Callable[[int, int], None]
"""Called with (completions, tokens) that have newly arrived."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer: exactly the tokens that were sampled, the end token included.

    `logprobs[t]` is the sampler's own log-probability of `token_ids[t]`, at the temperature of the
    request (processed logprobs, in vLLM's words).
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class Sampler(Protocol):
    """A place where completions are sampled from the base model plus a loaded adapter."""

    def load(self, *folders: Path) -> None:
        """Sample from the adapters in these PEFT folders from now on, one a member. What is in a
        folder never changes."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        members: Sequence[int] | None = None,
        group_size: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Sample `group_size` completions of each prompt (token ids) -> [P][G], each by the adapter
        of its member (None: all by the first).

        `seeds` has one integer in [0, 2**31) a prompt, see `prompt_seeds`; equal seeds and adapters
        give equal completions. Temperature 0 is greedy. `top_p` below 1: from the
        likeliest tokens alone that have that much of the probability; the loop never trains on
        such samples, which are not the policy's. `max_tokens`: fewer than the sampler's own.
        """

    def held(self) -> "Sampler":
        """A sampler of the adapters that are loaded now, for another thread: what is loaded later
        changes nothing of it, and its adapters stay until it is closed."""

    def close(self) -> None:
        """Give back what the sampler holds (connections, loaded adapters); what it is at in another
        thread ends there with an error."""


def prompt_seeds(seed: int, step: int, n: int, sampling_round: int = 0) -> list[int]:
    """A seed in [0, 2**31) for each of a step's n prompts: a hash of (seed, step, round, place), so
    that they lie far apart (vLLM gives completion g of a prompt the prompt's seed + g)."""
    key = (seed, step, sampling_round) if sampling_round else (seed, step)
    state = np.random.SeedSequence(key).generate_state(n)
    return (state >> 1).tolist()
