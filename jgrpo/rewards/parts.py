"""The parts of a reward -> rewards [P, G]: outcome, process, length, or a function of the user's.

reward = (1 - w) outcome + w process + length penalty; parts that are not asked for are absent, and
a function of the user's takes the outcome's place.
"""

import importlib
import inspect
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jgrpo.errors import InputError, RunError

RewardFunction = Callable[..., Sequence[float]]
ARGUMENTS = ("prompts", "completions", "completion_ids", "gold", "correct")


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


def load_function(spec: str) -> RewardFunction:
    """The function that `file.py:name` or `module:name` names. InputError if there is none, or if
    it cannot be called with ARGUMENTS as keywords."""
    where, _, name = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            if not Path(where).is_file():
                raise InputError(f"reward_function={spec!r}: no such file: {where}")
            function = runpy.run_path(where)[name]
        else:
            function = getattr(importlib.import_module(where), name)
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS))
    except InputError:
        raise
    except (KeyError, AttributeError) as error:
        raise InputError(f"reward_function={spec!r}: {where} defines no {name}") from error
    except Exception as error:  # the user's module may raise anything
        raise InputError(
            f"reward_function={spec!r}: {type(error).__name__}: {error}. It needs a function that "
            f"takes the keywords {', '.join(ARGUMENTS)} (or **kwargs)"
        ) from error
    return function


def custom_rewards(
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    gold: Sequence[str],
    correct: np.ndarray,
) -> np.ndarray:
    """What the user's function gives to completions [P][G], float32 [P, G].

    It sees flat lists of P * G, as TRL's reward functions do: a prompt and a gold answer for each
    completion. RunError if it raises, or does not return a finite number for each.
    """
    size = correct.shape[1]
    try:
        values = function(
            prompts=[p for p in prompts for _ in range(size)],
            completions=[text for group in completions for text in group],
            completion_ids=[ids for group in completion_ids for ids in group],
            gold=[g for g in gold for _ in range(size)],
            correct=correct.reshape(-1).tolist(),
        )
        rewards = np.asarray(list(values), np.float32)
    except Exception as error:  # the user's code may raise anything
        raise RunError(f"reward_function raised {type(error).__name__}: {error}") from error
    if rewards.shape != (correct.size,) or not np.isfinite(rewards).all():
        raise RunError(
            f"reward_function returned {rewards.shape} values, {int(np.isnan(rewards).sum())} of "
            f"them NaN: it needs one finite number for each of the {correct.size} completions"
        )
    return rewards.reshape(correct.shape)
