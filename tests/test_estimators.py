"""The estimators of an evaluation, against closed forms, against all subsets one by one, and, for
the intervals, against how often they hold the truth."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
import scipy.stats

from jgrpo.estimators import maj_at_k, mean_interval, paired, pass_at_k, powers_of_two


def test_powers_of_two_up_to_n():
    assert [powers_of_two(n) for n in (1, 2, 3, 16)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8, 16]]


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_pass_at_k_is_unbiased():
    """Its mean over binomial counts is 1 - (1 - p)^k; the plug-in 1 - (1 - c/n)^k falls short."""
    n, k, p = 8, 4, 0.2
    weights = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert plug_in < mean - 0.02


def by_all_subsets(votes, right, n, k) -> float:
    answers = [i for i, v in enumerate(votes) for _ in range(v)] + [None] * (n - sum(votes))
    won = Fraction(0)
    for subset in combinations(answers, k):
        counts = {a: subset.count(a) for a in subset if a is not None}
        leaders = [a for a, count in counts.items() if count == max(counts.values())]
        won += Fraction(sum(right[a] for a in leaders), len(leaders)) if leaders else 0
    return float(won / comb(n, k))


@pytest.mark.parametrize(
    ("votes", "right"),
    [
        ([3, 2, 1], [1, 0, 0]),
        ([3, 2, 1], [0, 1, 0]),
        ([2, 2, 2], [0, 0, 1]),
        ([1, 1, 1, 1], [1, 0, 0, 0]),
        ([5, 1], [1, 1]),
        ([4], [0]),
        ([], []),
    ],
)
def test_maj_at_k_is_the_share_of_subsets_whose_vote_is_right(votes, right):
    n = 8 if sum(votes) < 6 else sum(votes) + 1  # some completions have no answer
    for k in range(1, n + 1):
        wanted = by_all_subsets(votes, right, n, k)
        assert maj_at_k(votes, right, n, k) == pytest.approx(wanted, abs=1e-12), k


def test_one_vote_or_two_are_the_mean():
    votes, right, n = [3, 4, 2], [1, 0, 0], 12
    assert maj_at_k(votes, right, n, 1) == pytest.approx(3 / 12)
    # With two, a tie is drawn, and a completion without an answer leaves the vote to the other.
    assert maj_at_k(votes, right, n, 2) == pytest.approx(by_all_subsets(votes, right, n, 2))


@pytest.mark.parametrize("call", [lambda: pass_at_k(4, 1, 5), lambda: maj_at_k([3], [1], 2, 1)])
def test_what_cannot_be_drawn_is_an_error(call):
    with pytest.raises(ValueError, match="@"):
        call()


def test_of_right_and_wrong_alone_the_interval_is_wilsons():
    """With many problems t is z, and the effective number is P - 1."""
    scores = np.repeat([1.0, 0.0], [300, 700])
    interval, z2, n, p = mean_interval(scores), 1.959964**2, 999, 0.3
    half = (z2 * (p * (1 - p) + z2 / (4 * n)) / n) ** 0.5 / (1 + z2 / n)
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    assert interval.value == pytest.approx(0.3)
    assert interval.low == pytest.approx(centre - half, abs=1e-4)
    assert interval.high == pytest.approx(centre + half, abs=1e-4)


def test_an_interval_is_no_point_and_stays_within_0_and_1():
    low = mean_interval(np.ones(30)).low
    assert 0.8 < low < 0.95
    assert mean_interval(np.ones(30)).high == 1
    assert mean_interval(np.zeros(30)).low == 0
    assert mean_interval(np.array([1.0])) == (1.0, 0.0, 1.0)
    flat = mean_interval(np.full(30, 0.5))
    assert flat.low < 0.4
    assert flat.high > 0.6


DRAWS = 2000


@pytest.mark.parametrize(
    ("n_problems", "n_samples", "a", "b"),
    [(30, 1, 2, 2), (30, 16, 1, 3), (30, 16, 0.3, 0.3), (100, 4, 0.5, 2), (500, 1, 1, 9)],
)
def test_95_of_100_intervals_hold_the_mean(n_problems, n_samples, a, b):
    """Problems are Beta(a, b) hard: mean a / (a + b)."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(DRAWS):
        chances = rng.beta(a, b, n_problems)
        interval = mean_interval(rng.binomial(n_samples, chances) / n_samples)
        hits += interval.low <= a / (a + b) <= interval.high
    assert abs(hits / DRAWS - 0.95) <= 0.015


@pytest.mark.parametrize(
    ("n_problems", "n_samples", "gain"),
    [
        (30, 16, 0.05),
        pytest.param(100, 1, 0.05, marks=pytest.mark.slow),
        pytest.param(200, 1, 0.0, marks=pytest.mark.slow),
    ],
)
def test_95_of_100_paired_intervals_hold_the_difference(n_problems, n_samples, gain):
    rng, hits = np.random.default_rng(1), 0
    for _ in range(DRAWS):
        chances = rng.beta(2, 2, n_problems) * (1 - gain)
        first = rng.binomial(n_samples, chances + gain) / n_samples
        second = rng.binomial(n_samples, chances) / n_samples
        difference = paired(first, second, n_samples).difference
        hits += difference.low <= gain <= difference.high
    assert abs(hits / DRAWS - 0.95) <= 0.015


def test_with_one_completion_a_problem_the_p_value_is_mcnemars():
    first = np.repeat([1.0, 0.0, 1.0, 0.0], [9, 2, 20, 5])
    second = np.repeat([0.0, 1.0, 1.0, 0.0], [9, 2, 20, 5])
    result = paired(first, second)
    assert (result.rose, result.fell) == (9, 2)
    assert result.p_value == pytest.approx(2 * scipy.stats.binom.cdf(2, 11, 0.5))
    assert result.difference.value == pytest.approx(7 / 36)


def test_of_right_and_wrong_alone_the_paired_interval_is_agresti_and_mins():
    """Half a problem more in each cell of the 2 x 2 table; t for z."""
    b, c, n = 40.5, 10.5, 1002
    first = np.repeat([1.0, 0.0, 0.0], [40, 10, 950])
    second = np.repeat([0.0, 1.0, 0.0], [40, 10, 950])
    half = 1.959964 * ((b + c - (b - c) ** 2 / n) / n**2) ** 0.5
    difference = paired(first, second).difference
    assert difference.low == pytest.approx((b - c) / n - half, abs=1e-4)
    assert difference.high == pytest.approx((b - c) / n + half, abs=1e-4)


def test_equal_policies_differ_by_nothing_with_an_interval():
    same = np.array([1.0, 0.0] * 20)
    result = paired(same, same)
    assert (result.rose, result.fell, result.p_value) == (0, 0, 1.0)
    assert result.difference.low < 0 < result.difference.high
