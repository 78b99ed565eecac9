"""Rewards of a group of completions -> how much better than its group each completion is."""

import numpy as np


def group_advantages(rewards: np.ndarray, std_norm: bool = True) -> np.ndarray:
    """Return the group-relative advantages, float32 [P, G], of `rewards` [P, G].

    (r - mean) / (std + 1e-4), std with ddof 1, over the G of a prompt: the outcome supervision of
    GRPO (Shao et al., 2024, DeepSeekMath, section 4.1.2; the 1e-4 is the study's). Without
    `std_norm`: r - mean, as in Dr. GRPO (Liu et al., 2025). Computed in float64.
    A group whose rewards are all equal gets exact zeros: its rounded mean can differ from its
    rewards, and the division would blow that up.
    Raises ValueError for a shape other than [P, G >= 2], and for a reward that is not finite.
    """
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 2 or r.shape[1] < 2:
        raise ValueError(f"rewards has shape {r.shape}: needs [P, G] with G >= 2")
    if not np.isfinite(r).all():
        p, g = np.argwhere(~np.isfinite(r))[0]
        raise ValueError(f"rewards[{p}, {g}]={r[p, g]}: must be finite")
    advantages = r - r.mean(axis=1, keepdims=True)
    if std_norm:
        advantages /= r.std(axis=1, ddof=1, keepdims=True) + 1e-4
    advantages[(r == r[:, :1]).all(axis=1)] = 0.0
    return advantages.astype(np.float32)


def leave_one_out(rewards: np.ndarray, std_norm: bool = False) -> np.ndarray:
    """Return r - mean of the others in the group, float32 [P, G], of `rewards` [P, G] (RLOO:
    Ahmadian et al., 2024, eq. 8; Kool et al., 2019): G / (G - 1) times r - mean.

    `std_norm` divides by std + 1e-4 as in `group_advantages`, whose errors it shares.
    """
    n = np.shape(rewards)[-1]
    return (group_advantages(rewards, std_norm) * np.float64(n / (n - 1))).astype(np.float32)
