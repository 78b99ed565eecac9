"""The parts of a reward -> rewards [P, G]: outcome, process, length, or functions of the user's.

reward = (1 - w) outcome + w process + length penalty; parts that are not asked for are absent, and
the weighted sum of the user's functions takes the outcome's place.
"""

from collections.abc import Mapping

import numpy as np


def combine(parts: Mapping[str, np.ndarray], process_reward_weight: float) -> np.ndarray:
    """The reward, float32 [P, G], of its `parts` [P, G]: outcome, and where asked for process,
    length_penalty, and custom, which takes the outcome's place."""
    reward = np.asarray(parts.get("custom", parts["outcome"]), np.float64)
    if "process" in parts:
        w = process_reward_weight
        reward = (1 - w) * reward + w * parts["process"]
    return (reward + parts.get("length_penalty", 0)).astype(np.float32)


def length_penalty(n_tokens: np.ndarray, maximum_tokens: int, cache_tokens: int) -> np.ndarray:
    """Return what is added to the reward for lengths `n_tokens` (any shape), float32 in [-1, 0].

    0 up to L_max - L_cache; (L_max - L_cache - n) / L_cache up to L_max; -1 beyond: DAPO's soft
    overlong punishment (Yu et al., 2025, eq. 13). L_cache = 0 is a step just above L_max.
    Raises ValueError unless 0 <= cache_tokens <= maximum_tokens.
    """
    if not 0 <= cache_tokens <= maximum_tokens:
        raise ValueError(
            f"cache_tokens={cache_tokens}: must be between 0 and maximum_tokens={maximum_tokens}"
        )
    over_tokens = np.asarray(n_tokens, np.float64) - (maximum_tokens - cache_tokens)
    return -np.clip(over_tokens / max(cache_tokens, np.finfo(float).tiny), 0, 1).astype(np.float32)
