"""A part of the fuzz run of fuzz.py, the same inputs each time (a bare pytest: an eighth of them);
the whole one is a command."""

import fuzz
import fuzz_answers
import pytest
from conftest import is_short

from jgrpo.config import Config
from jgrpo.errors import InputError

N_EXAMPLES = 4000


@pytest.fixture(scope="module", autouse=True)
def one_grader():
    yield
    fuzz_answers.grader().close()
    fuzz_answers.grader.cache_clear()


def test_an_integer_too_large_for_a_float_is_refused():
    with pytest.raises(InputError, match=r"grader_timeout_s=10.*must be of type float"):
        Config(grader_timeout_s=10**400)


@pytest.mark.parametrize("check", fuzz.PROPERTIES, ids=lambda check: check.__name__)
def test_whatever_is_read(check, pytestconfig):
    n_examples = N_EXAMPLES // 8 if is_short(pytestconfig) else N_EXAMPLES
    fuzz.run(check, fuzz.examples_of(check, n_examples), derandomize=True)
