r"""Answers: which box counts, and which answers are the same. Precision first: no wrong True.

Each pair carries the reason why a mathematician would (not) take the one for the other.
"""

import builtins
import subprocess
import sys
import time

import pytest
from answer_cases import (
    DIFFERENT,
    DIFFERENT_BY_ALGEBRA,
    HOSTILE,
    NO_SPELLINGS,
    SAME,
    SAME_BY_ALGEBRA,
    SPELLINGS,
)
from answer_spellings import KINDS

from jgrpo.answers.equal import (
    IN_PROCESS_LIMIT_S,
    is_correct,
    last_boxed,
    quick_verdict,
    same_symbolically,
    same_text,
)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} no, \boxed{2}", "2"),  # the last one
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),  # nested braces
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed 2$ and more", "2"),  # to the end of the formula
        (r"\(\boxed 2\) so", "2"),
        (r"\boxed\frac12$", r"\frac12"),
        (r"\boxed{3} and \boxed{\frac{1", "3"),  # cut off: the last balanced one
        (r"\boxed{3} and \boxed", "3"),
        (r"\boxed{3}, the \boxed answer", "3"),  # a word about boxes is no box
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),  # escaped braces do not count
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{a \boxed{b} c}", "b"),  # inner one: it starts last
        (r"{ { \boxed{2}", "2"),  # stray braces outside
        (r"} \boxed{2} }", "2"),
        (r"\\boxed{4}", "4"),  # escaped twice
        (r"\boxed{}", ""),
        (r"\boxed{5}, in \boxed{}.", "5"),  # an empty one is only mentioned
        (r"\boxed{5}, as `\boxed{answer}`.", "5"),
        (r"\boxed{5}. Put \boxed{\text{Your Answer}} or \boxed{<the final answer here>}", "5"),
        (r"\boxed{5} \boxed{answer 6}", "answer 6"),
        (r"\boxed{5}, in \boxed.", "5"),
        (r"\boxed{5}, in \boxed{...}", "5"),
        (r"\boxed{5}, in \boxed{\ldots}", "5"),
        (r"\boxed{5} print(f'\\boxed{{{x}}}')", "5"),  # a program's
        ("\\boxed{5}\n```python\nprint(r'\\boxed{6}')\n```\n", "5"),
        ("```\n\\boxed{6}\n```", "6"),  # but if there is no other
        (r"\boxed{ 2 }", "2"),
        (r"\boxed{5", None),
        (r"boxed{5}", None),
        (r"\boxedly{5}", None),
        ("", None),
    ],
)
def test_the_last_balanced_box(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(("answer", "gold", "why"), SAME)
def test_same_without_algebra(answer, gold, why):
    assert quick_verdict(answer, gold) is True, why
    assert is_correct(rf"Thus \boxed{{{answer}}}.", gold), why


@pytest.mark.parametrize(("answer", "gold", "why"), SAME_BY_ALGEBRA)
def test_same_by_algebra(answer, gold, why):
    assert quick_verdict(answer, gold) is None, "must need the last stage"
    assert is_correct(rf"\boxed{{{answer}}}", gold), why


@pytest.mark.parametrize(("answer", "gold", "why"), DIFFERENT + DIFFERENT_BY_ALGEBRA)
def test_different(answer, gold, why):
    assert not is_correct(rf"\boxed{{{answer}}}", gold), why
    assert not is_correct(rf"\boxed{{{gold}}}", answer), why


@pytest.mark.parametrize(("answer", "gold"), SPELLINGS)
def test_one_value_in_two_spellings(answer, gold):
    assert is_correct(rf"\boxed{{{answer}}}", gold)


@pytest.mark.parametrize(("answer", "gold"), NO_SPELLINGS)
def test_what_only_looks_like_a_spelling_is_another_value(answer, gold):
    assert not is_correct(rf"\boxed{{{answer}}}", gold)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_spellings(kind):
    for gold, right, wrong in KINDS[kind]:
        assert [a for a in (gold, *right) if not is_correct(rf"\boxed{{{a}}}", gold)] == []
        assert [a for a in wrong if is_correct(rf"\boxed{{{a}}}", gold)] == []


def test_no_box_is_wrong_even_if_the_answer_is_in_the_text():
    assert not is_correct("The answer is 5.", "5")


def test_text_stage_alone():
    assert same_text(r"\left( \dfrac12, \text{x} \right)", r"(\frac{1}{2},x)")
    assert not same_text("0.5", r"\frac12")  # that is for the numbers
    assert not same_text("", "")


def is_long(answer: str) -> bool:
    return len(answer) >= 1_000_000


@pytest.mark.parametrize(
    "answer",
    [pytest.param(a, marks=[pytest.mark.slow] if is_long(a) else []) for a in HOSTILE],
    ids=range(len(HOSTILE)),
)
def test_hostile_answers_are_wrong_soon(answer):
    started_s = time.monotonic()
    for gold in (r"\frac{\sqrt3}{2}", "x^2+1", "5", "(1,2)"):
        assert not is_correct(rf"\boxed{{{answer}}}", gold)
        assert not is_correct(answer, gold)
    assert time.monotonic() - started_s < 2 * IN_PROCESS_LIMIT_S


def test_sympy_without_end_is_stopped(monkeypatch):
    # Passes the guards; simplify goes on for minutes. The gold is not its value.
    monkeypatch.setattr("jgrpo.answers.equal.IN_PROCESS_LIMIT_S", 0.5)
    started_s = time.monotonic()
    assert quick_verdict(SLOW[0], SLOW[1]) is None
    assert not is_correct(rf"\boxed{{{SLOW[0]}}}", SLOW[1])
    assert time.monotonic() - started_s < 4
    assert sys.getprofile() is None


SLOW = (r"\tan((\sqrt{\pi }+x)^9+x)+2=x", r"\tan((\sqrt{\pi }+x)^9+x)+2=2x")


@pytest.mark.slow
def test_nothing_is_evaluated_as_python(monkeypatch):
    import math_verify.parser
    import sympy.parsing.sympy_parser as sympy_parser

    texts = []

    def refuse(source, *_, **__):
        texts.append(source)
        raise AssertionError(f"evaluated {source!r}")

    monkeypatch.setattr(sympy_parser, "eval_expr", refuse)
    monkeypatch.setattr(math_verify.parser, "parse_expr", refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    for answer, gold, _ in SAME_BY_ALGEBRA:
        assert same_symbolically(answer, gold)
    for answer in [*HOSTILE, *(a for a, *_ in DIFFERENT_BY_ALGEBRA)]:
        is_correct(rf"\boxed{{{answer}}}", "x^2+1")
        is_correct(rf"\boxed{{{answer}}}", r"\sqrt{7}")
    assert not texts


def test_the_module_alone_imports_no_sympy():
    code = "import sys, jgrpo.answers; sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
