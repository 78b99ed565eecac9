"""A part of the fuzz run of fuzz.py, the same inputs each time; the whole one is a command."""

import fuzz
import fuzz_answers
import pytest

N_EXAMPLES = 4000


@pytest.fixture(scope="module", autouse=True)
def one_grader():
    yield
    fuzz_answers.grader().close()
    fuzz_answers.grader.cache_clear()


@pytest.mark.parametrize("check", fuzz.PROPERTIES, ids=lambda check: check.__name__)
def test_whatever_is_read(check):
    fuzz.run(check, fuzz.examples_of(check, N_EXAMPLES), derandomize=True)
