"""What a run says of a step, and keeps of it."""

import signal
from types import SimpleNamespace

import pytest

from jgrpo.config import Config
from jgrpo.errors import interruptible
from jgrpo.run.member import Member


def test_ctrl_c_while_a_step_is_logged_comes_when_it_is_kept(tmp_path):
    """Else the last step that is logged is not the last one that is saved."""
    logged, kept = [], []

    def log(*line):
        signal.raise_signal(signal.SIGINT)
        logged.append(line)

    record = SimpleNamespace(run_dir=tmp_path, keep=lambda *state: kept.append(state))
    member = Member(Config(), record, SimpleNamespace(name="", log=log), state="of step 3")
    with pytest.raises(KeyboardInterrupt), interruptible():
        member.tell(3, {"train/skipped_updates": 0.0}, [], 0)
    assert len(logged) == 1
    assert kept == [(3, "of step 3")]
