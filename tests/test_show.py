"""Completions in the terminal."""

import io
import re

import pytest
from page_runs import HOSTILE, a_run, completion
from rich.console import Console

from jgrpo.errors import InputError
from jgrpo.run.rundir import write_rollouts
from jgrpo.run.told import one_of_each
from jgrpo.show import Options, show


@pytest.fixture
def run(tmp_path):
    return a_run(tmp_path / "a")


def shown(options, *, terminal=False):
    file = io.StringIO()
    n = show(options, Console(file=file, force_terminal=terminal, highlight=False, width=100))
    return n, file.getvalue()


def test_a_step_is_shown_problem_by_problem(run):
    n, text = shown(Options(run, step=2))
    assert n == 6
    assert re.findall(r"step \d, problem \d", text) == ["step 2, problem 1", "step 2, problem 2"]
    assert "What is 1 + 6?\nright  advantage +1.00 · reward +1.00 · 11 tokens · truncated\n" in text
    assert "\n  1+6=7. \\boxed{7}\n" in text
    assert "\x1b" not in text


def test_one_problem_and_one_kind_can_be_asked_for(run):
    n, text = shown(Options(run, problem=2, which=("wrong", "unboxed")))
    assert n == 1
    assert "step 4, problem 2" in text
    assert "What is 2 + 5?" in text
    assert "no box\n  7.\n" in text


def test_colours_are_ours_and_a_completion_s_own_are_text(run):
    write_rollouts(run, 2, [completion(HOSTILE, HOSTILE, right=False, advantage=0.0)])
    _, text = shown(Options(run, step=2), terminal=True)
    assert "\x1b[1;31mwrong" in text
    assert "\x1b[31mred" not in text
    assert r"\x1b[31mred" in text
    assert r"\u202eabc" in text
    assert "[31mred" in text


def test_of_a_long_completion_the_middle_is_left_out_and_that_is_said(run):
    text = "a" * 600 + "b" * 4000 + "c" * 600
    write_rollouts(run, 2, [completion("p", text, right=False, advantage=0.0)])
    _, found = shown(Options(run, step=2, characters=1000))
    assert "[... 4,200 characters ...]" in found
    assert (found.count("a" * 500), found.count("c" * 500)) == (1, 1)
    assert text in shown(Options(run, step=2, characters=0))[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": 9}, "step 9: .* has those of steps 1 to 4"),
        ({"problem": 3}, "--problem 3: step 4 has problems 1 to 2"),
        ({"problem": 0}, "--problem 0"),
        ({"which": ("good",)}, "--which good: give right, wrong"),
    ],
)
def test_what_is_not_there_is_said(run, options, said):
    with pytest.raises(InputError, match=said):
        shown(Options(run, **options))


def test_one_right_and_one_wrong_come_from_one_group_if_one_has_both():
    rows = [completion(p, t, right=r, advantage=0.0) for p, t, r in
            (("p", "1", False), ("q", "2", True), ("q", "3", False), ("q", "4", True))]  # fmt: skip
    assert [row["completion"] for row in one_of_each(rows)] == ["2", "3"]
    assert [row["completion"] for row in one_of_each(rows[:2])] == ["2", "1"]
    assert [row["completion"] for row in one_of_each(rows[:1])] == ["1"]
