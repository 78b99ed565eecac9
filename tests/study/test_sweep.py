"""Runs of a study one after another, in one process."""

import weakref

from jgrpo.config import Config
from jgrpo.study.sweep import Job, _run


def test_what_one_group_held_is_gone_when_the_next_one_begins(tmp_path):
    class Held:
        """As a run's parts hold one another."""

        def __init__(self):
            self.me = self

    held, alive = [], []

    def train(configs, begun):
        alive.append(sum(there() is not None for there in held))
        held.append(weakref.ref(Held()))

    for name in ("a", "b", "c"):
        config = Config(run_dir=str(tmp_path / name / "seed_0"))
        assert _run(train, [Job(name, 0, config)]) == ""
    assert alive == [0, 0, 0]
