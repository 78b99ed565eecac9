"""jgrpo.run.record: what a run says of itself at its end."""

import time

from jgrpo.config import Config
from jgrpo.run.record import where_it_went
from jgrpo.run.runlog import RunLog


def test_where_the_time_went_is_told_the_largest_first_and_who_was_waited_for():
    shares = {"generation": 0.71, "training": 0.2, "reward": 0.004, "reload": 0.05}
    line = where_it_went(shares, Config(rollout="vllm"))
    assert line.startswith("where it went: 71% generation, 20% training, 5% reload; ")
    assert "another server would help most" in line
    assert "another server" not in where_it_went(shares, Config(rollout="jax"))
    both = {"training": 0.6, "generation": 0.4}
    assert "another server" not in where_it_went(both, Config())
    assert where_it_went(both, Config()).endswith(
        "for 40% of the time the trainer waited for completions: with --rollouts_ahead 1 they "
        "would be sampled while it trains"
    )
    ahead = Config(rollouts_ahead=1)
    assert where_it_went({"waiting": 0.71, "training": 0.2}, ahead).endswith(
        "; 71% of the time the trainer waited for completions: another server would help most"
    )
    assert "sampler kept up" in where_it_went({"training": 0.8, "waiting": 0.1}, ahead)


def test_the_shares_are_of_the_whole_run_whoever_takes_the_seconds_between(tmp_path):
    with RunLog(tmp_path, 1, live=False) as log:
        for name, seconds in (("reward", 0.02), ("training", 0.06), ("reward", 0.02)):
            with log.screen.phase(name):
                time.sleep(seconds)
            log.screen.take_seconds()
        shares = log.screen.shares()
    assert [*shares] == ["training", "reward"]
    assert 0 < sum(shares.values()) <= 1
