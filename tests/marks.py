"""Which cases of a test a bare pytest leaves to `pytest --all`."""

from collections.abc import Sequence
from typing import Any

import pytest


def mostly_slow(cases: Sequence[Any], short: int = 1) -> list[Any]:
    """The cases, all but the first `short` of them marked slow."""
    return [*cases[:short], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[short:])]
