"""What n completions of each of P problems say: avg@k, pass@k, maj@k, and how sure one can be.

Each estimator gives one score in [0, 1] a problem; the interval is over problems, whose completions
are a cluster each, so that more samples of the same problems never make it too narrow.
"""

from collections.abc import Sequence
from math import comb, sqrt
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats would take a second to import

LEVEL = 0.95
"""Of every interval: as many of them hold the true mean, over draws of the problems."""


class Interval(NamedTuple):
    """An estimate, and the ends of its interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """The difference of two policies on the same problems, first less second."""

    difference: Interval
    rose: int
    """Problems on which the first scores higher."""
    fell: int
    p_value: float
    """Of the exact sign test: McNemar's where every problem has one completion."""


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [1 << i for i in range(n.bit_length())]


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """The chance that k of the n completions, drawn without replacement, hold a right one:
    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (Codex, eq. 1)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} completions: k must be from 1 to {n}")
    return 1 - comb(n - n_correct, k) / comb(n, k)


def maj_at_k(votes: Sequence[int], right: Sequence[float], n: int, k: int) -> float:
    """The chance that the most frequent answer among k of the n completions, drawn without
    replacement, is right; a tie is drawn from the leaders.

    `votes[i]` completions gave answer i, which is `right[i]`; the other n - sum(votes) gave none,
    and do not vote. Exact: for each answer and each number of votes j that it may win with, the
    ways in which the others stay below j, or tie with it, are counted.
    """
    if not 1 <= k <= n or sum(votes) > n:
        raise ValueError(f"maj@{k} of {n} completions with {sum(votes)} votes")
    silent, won = n - sum(votes), 0.0
    for i, mine in enumerate(votes):
        others = [v for j, v in enumerate(votes) if j != i]
        for j in range(1, min(mine, k) + 1) if right[i] else ():
            for n_tied, ways in enumerate(_ways(others, silent, k - j, j)):
                won += right[i] * comb(mine, j) * ways / (n_tied + 1)
    return won / comb(n, k)


def _ways(others: Sequence[int], silent: int, k: int, most: int) -> list[int]:
    """In how many ways k completions can be drawn from the others and the silent ones, so that no
    answer has more than `most`, by how many have just so many."""
    ways = {(0, 0): 1}  # (drawn, answers with `most`) -> ways
    for votes in others:
        grown: dict[tuple[int, int], int] = {}
        for (drawn, tied), count in ways.items():
            for take in range(min(votes, most, k - drawn) + 1):
                key = drawn + take, tied + (take == most)
                grown[key] = grown.get(key, 0) + count * comb(votes, take)
        ways = grown
    by_ties = [0] * (len(others) + 1)
    for (drawn, tied), count in ways.items():
        by_ties[tied] += count * comb(silent, k - drawn)
    return by_ties


def mean_interval(scores: np.ndarray) -> Interval:
    """The mean of `scores` [P] in [0, 1], and its interval over problems.

    Wilson's score interval at the effective number of problems p (1 - p) / var(mean), with
    Student's t (Wilson 1927; for clusters, Franco et al. 2019): it stays within [0, 1], and is no
    point where all scores are equal. The variance of scores within [0, 1] is at most p (1 - p),
    so the effective number is at least about P.
    """
    n, p = len(scores), float(np.mean(scores))
    if n < 2:
        return Interval(p, 0.0, 1.0)
    variance = float(np.var(scores, ddof=1)) / n
    n_effective = max(p * (1 - p) / variance, n - 1) if variance > 0 else n
    t2 = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) ** 2
    centre = (p + t2 / (2 * n_effective)) / (1 + t2 / n_effective)
    half = sqrt(t2 * (p * (1 - p) + t2 / (4 * n_effective)) / n_effective) / (1 + t2 / n_effective)
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def paired(first: np.ndarray, second: np.ndarray, n_samples: int = 1) -> Paired:
    """How the mean scores of two policies on the same problems [P] differ; `n_samples` completions
    a problem gave each score.

    Student's t on the differences, with half a problem added that rose and half a one that fell by
    one completion, and one that did not change: for one completion a problem the adjustment of
    Agresti and Min 2005, without which a few changes among many problems give too short an
    interval. The p-value is that of the exact binomial test that as many rise as fall.
    """
    d = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    n, unit = len(d) + 2, 1 / n_samples
    rose, fell = int((d > 0).sum()), int((d < 0).sum())
    mean = float(d.sum()) / n
    variance = (float(np.square(d).sum()) + unit**2) / n - mean**2
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * sqrt(variance / n)
    p_value = min(1.0, 2 * float(special.bdtr(min(rose, fell), rose + fell, 0.5)))
    value = float(d.mean())
    return Paired(
        Interval(value, max(-1.0, mean - half), min(1.0, mean + half)), rose, fell, p_value
    )
