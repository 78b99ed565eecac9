"""A run that is killed (SIGKILL) at random moments is the run that nobody killed: four times here,
and a hundred by tests/chaos.py as a command."""

import pytest
from chaos import chaos


@pytest.mark.slow
@pytest.mark.usefixtures("shared_compilation_cache")
@pytest.mark.parametrize(("members", "rollouts_ahead"), [(1, 0), (2, 1)])
def test_a_run_that_is_killed_again_and_again_is_the_run_that_nobody_killed(
    members, rollouts_ahead, tmp_path
):
    hits = chaos(tmp_path, kills=4, members=members, rollouts_ahead=rollouts_ahead)
    print(hits)
    assert hits.total() == 4
    assert len(hits) >= 2, hits  # not all in one place
