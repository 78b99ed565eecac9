"""The grader: what the workers do with answers that need algebra, hang, or kill them."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from answer_cases import HOSTILE

from jgrpo.answers import grader as module
from jgrpo.answers.grader import Grader, Pair
from jgrpo.errors import RunError

# Passes every guard; sympy's simplify goes on for minutes.
SLOW = Pair(r"\tan((\sqrt{\pi }+x)^9+x)+2=x", r"\tan((\sqrt{\pi }+x)^9+x)+2=2x")
ROOT = Pair(r"\frac{3}{2\sqrt{3}}", r"\frac{\sqrt{3}}{2}")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def grader():
    with Grader(max_workers=2, timeout_s=1.0) as grader:
        grader.self_test()
        yield grader


def boxed(*answers):
    return [rf"so \boxed{{{answer}}}." for answer in answers]


def test_equal_answers_are_one_answer_whatever_they_look_like(grader):
    texts = [
        [*boxed("0.5", "2", r"\frac12"), "no box", *boxed(r"\frac{1}{2}", "2.0", "3")],
        [*boxed("x+1", "1+x", ROOT.answer, ROOT.gold), "none", "none", "none"],
        ["none"] * 7,
        boxed("", "", "1", "1", "1", "1", "1"),
    ]
    assert grader.same_answers(texts) == [
        [[0, 2, 4], [1, 5], [6]],
        [[0, 1], [2, 3]],
        [],
        [[0], [1], [2, 3, 4, 5, 6]],  # an empty answer equals nothing
    ]


def test_grades_have_the_shape_of_the_completions(grader):
    grades = grader.grade(
        [boxed("5", "6", ROOT.answer), [*boxed("0.5"), "5", r"\boxed{1"]], ["5", r"\frac12"]
    )
    np.testing.assert_array_equal(grades.correct, [[1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(grades.boxed, [[True, True, True], [True, False, False]])
    assert grades.correct.dtype == np.float32
    assert grades.boxed.dtype == bool
    assert grades.errors == grades.timeouts == 0


def test_workers_decide_what_needs_algebra(grader):
    grades = grader.grade([boxed(ROOT.answer, r"\frac{3}{3\sqrt{3}}")], [ROOT.gold])
    np.testing.assert_array_equal(grades.correct, [[1, 0]])


def test_an_endless_check_is_killed_counted_and_hurts_no_other(grader):
    started_s = time.monotonic()
    grades = grader.grade(
        [boxed(SLOW.answer, SLOW.gold, "x", SLOW.answer), boxed(ROOT.answer, "1", "2", "3")],
        [SLOW.gold, ROOT.gold],
    )
    # Twice in the group, checked once, counted as two completions that could not be checked.
    assert (grades.timeouts, grades.errors) == (2, 0)
    np.testing.assert_array_equal(grades.correct, [[0, 1, 0, 0], [1, 0, 0, 0]])
    assert time.monotonic() - started_s < 4
    assert grader.grade([boxed(ROOT.answer)], [ROOT.gold]).correct.all()  # the worker is back


@pytest.mark.slow
def test_the_limit_counts_from_the_start_of_the_check(grader):
    # Eight checks of 1 s each in two workers: the last starts after 3 s. A limit that counted from
    # submission would make time-outs of all but the first; here 1 s is for each.
    slow = [Pair(SLOW.answer, SLOW.gold + f"+{i}") for i in range(4)]
    quick = [Pair(f"{i}+" + ROOT.answer, f"{i}+" + ROOT.gold) for i in range(2, 8)]
    outcomes = grader._outcomes(slow + quick)
    assert [outcomes[pair] for pair in slow] == ["timeout"] * 4
    assert [outcomes[pair] for pair in quick] == ["right"] * 6


def test_a_worker_that_dies_is_an_error_not_a_wrong_answer():
    with Grader(max_workers=1, timeout_s=30) as grader:
        grader.self_test()
        threading.Timer(0.3, os.kill, (grader._workers[0].process.pid, signal.SIGKILL)).start()
        grades = grader.grade([boxed(SLOW.answer, SLOW.gold)], [SLOW.gold])
        assert (grades.errors, grades.timeouts) == (1, 0)
        np.testing.assert_array_equal(grades.correct, [[0, 1]])
        grader.self_test()


def test_equal_pairs_are_checked_once(grader, monkeypatch):
    checked = []
    monkeypatch.setattr(grader, "_check", lambda pair: checked.append(pair) or "right")
    assert grader.grade([boxed(*[ROOT.answer] * 8)] * 2, [ROOT.gold] * 2).correct.all()
    assert checked == [ROOT]


@pytest.mark.slow
def test_hostile_answers_are_wrong_and_hurt_no_worker(grader):
    golds = ["x^2+y", "5", r"\frac{\sqrt3}{2}"]
    pids = [worker.process.pid for worker in grader._workers]
    grades = grader.grade([[*boxed(*HOSTILE), *HOSTILE]] * len(golds), golds)
    assert not grades.correct.any()
    # Each of these is a worker that had to be killed, 1 s into its check: the guards let few pass.
    assert grades.timeouts <= 3
    assert len(set(pids) - {worker.process.pid for worker in grader._workers}) <= grades.timeouts
    assert grader.grade([boxed(ROOT.answer)], [ROOT.gold]).correct.all()


def test_a_worker_that_wants_too_much_memory_gets_none(monkeypatch):
    greedy = (
        "answers.same_symbolically = lambda *_: bytearray(memory_bytes)\nfor line in sys.stdin:"
    )
    monkeypatch.setattr(module, "_WORKER", module._WORKER.replace("for line in sys.stdin:", greedy))
    with Grader(max_workers=1, timeout_s=30) as grader:
        pid = grader._workers[0].process.pid
        for _ in range(2):
            assert grader.grade([boxed(ROOT.answer)], [ROOT.gold]).errors == 1
        assert grader._workers[0].process.pid == pid  # a MemoryError inside, and it goes on


def test_a_worker_killed_between_two_checks_costs_no_answer(grader):
    for worker in grader._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    grades = grader.grade([boxed(ROOT.answer, "0+" + ROOT.answer)], [ROOT.gold])
    assert grades.correct.all()
    assert grades.errors == grades.timeouts == 0


@pytest.mark.parametrize(
    ("completions", "golds"), [([["a"], ["b"]], ["1"]), ([["a"], ["b", "c"]], ["1", "2"]), ([], [])]
)
def test_a_shape_that_is_no_rollout_is_refused(grader, completions, golds):
    with pytest.raises(ValueError, match="needs"):
        grader.grade(completions, golds)


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    failure = "print('failed ModuleNotFoundError No module named math_verify')"
    monkeypatch.setattr(module, "_WORKER", failure)
    with (
        Grader(max_workers=1, timeout_s=1) as grader,
        pytest.raises(RunError, match=r"did not start .*No module named math_verify"),
    ):
        grader.self_test()


def test_the_self_test_finds_a_grader_that_calls_everything_wrong(monkeypatch):
    # math-verify with its signal-based limits on, outside a main thread, does exactly this.
    with Grader(max_workers=1, timeout_s=1) as grader:
        monkeypatch.setattr(grader, "_check", lambda _: "wrong")
        with pytest.raises(RunError, match=r"came out as wrong, not right"):
            grader.self_test()


def test_workers_have_neither_jax_nor_the_trainer(grader):
    maps = Path(f"/proc/{grader._workers[0].process.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc: the workers' libraries cannot be listed")
    assert "jaxlib" not in maps.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("as_module", [False, True])
def test_a_main_without_a_guard_runs_once(tmp_path, as_module):
    # multiprocessing's spawn and forkserver would run this file again in each worker.
    (tmp_path / "program.py").write_text(
        "from jgrpo.answers.grader import Grader\n"
        "print('main', flush=True)\n"
        "with Grader(max_workers=2, timeout_s=5) as grader:\n"
        "    grader.self_test()\n"
    )
    result = subprocess.run(
        [sys.executable, *(["-m", "program"] if as_module else ["program.py"])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == "main\n"


def test_a_rollout_of_256_is_graded_in_about_a_second(grader):
    # Half of the completions need algebra. 5 s leaves room for a machine that is busy.
    r = random.Random(0)
    golds, completions = [], []
    for _ in range(32):
        a, b = r.randrange(2, 50), r.randrange(2, 50)
        golds.append(rf"{a}+\sqrt{{{b}}}")
        same, other = rf"\sqrt{{{b}}}+{a}", rf"\sqrt{{{b + 1}}}+{a}"
        completions.append(boxed(golds[-1], same, rf"0+{same}", other, rf"1+{other}", "5", "x", ""))
    started_s = time.monotonic()
    grades = grader.grade(completions, golds)
    assert time.monotonic() - started_s < 5
    assert grades.correct.sum(axis=0).tolist() == [32, 32, 32, 0, 0, 0, 0, 0]
