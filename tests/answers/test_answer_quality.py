"""The grader on the answers of real problems: each is itself, however written, and no other. A bare
pytest takes some 150 of them."""

import re

import pytest
from answer_cases import rewrites
from conftest import is_short
from fuzz_answers import real_golds

from jgrpo.answers.equal import last_boxed, quick_verdict
from jgrpo.answers.grader import Grader, Pair


@pytest.fixture
def golds(pytestconfig) -> list[str]:
    golds = real_golds()
    return golds[:: max(1, len(golds) // 150) if is_short(pytestconfig) else 1]


def test_every_real_gold_equals_itself_however_a_model_writes_it(golds):
    pairs = []
    for gold in golds:
        for answer in dict.fromkeys(rewrites(gold)):
            read = last_boxed(rf"Thus \boxed{{{answer}}}.")
            assert read is not None, answer
            pairs.append(Pair(read, gold))
    with Grader(max_workers=2, timeout_s=30) as grader:
        outcomes = grader._outcomes(pairs)
    assert [pair for pair, outcome in outcomes.items() if outcome != "right"] == []


def skeleton(gold: str) -> list[str]:
    """What is left of an answer when everything that may be written in two ways is gone."""
    gold = re.sub(r"\\text\{[^{}]*[a-z][^{}]*\}(\^2)?|\^\{?\\circ\}?|^[a-z] ?= ?", "", gold)
    return re.findall(r"[0-9A-Z.-]|\\sqrt|\\pi|frac", gold)


@pytest.mark.slow
def test_no_real_gold_is_taken_for_another_one(golds):
    """Pairs of other digits, looked at one by one: the same number."""
    equal_by_hand = {
        ("-\\$0.50", "-\\frac{1}{2}"), ("0.4", "\\frac{2}{5}"), ("0.75", "\\frac{3}{4}"),
        ("0.5", "\\frac{1}{2}"), ("1.8", "\\frac9{5}"), ("3.5", "\\frac{7}{2}"),
        ("7.5", "\\frac{15}{2}"), ("33\\%", "\\dfrac{33}{100}"), ("50\\%", "\\frac{1}{2}"),
        ("0,4", "0.4"),  # a decimal comma, where the gold is no list
    }  # fmt: skip
    golds = sorted(golds, key=lambda gold: ("".join(skeleton(gold)), gold))
    n_equal = 0
    for distance in range(1, 41):
        for answer, gold in zip(golds, golds[distance:], strict=False):
            if quick_verdict(answer, gold):
                n_equal += 1
                pair = tuple(sorted((answer, gold)))
                assert skeleton(answer) == skeleton(gold) or pair in equal_by_hand, pair
    assert n_equal > 0
