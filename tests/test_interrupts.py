"""Ctrl-C at any moment: heeded, told in a line, and never lost in a library's callback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jgrpo import errors
from jgrpo.errors import exit_status, interrupts_later, no_more_interrupts

ROOT = Path(__file__).parent.parent


def interrupted(after_s: float, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """A command that gets SIGINT so long after its start (held back while Python starts)."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"GLIBC_TUNABLES": "", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}),
    )  # fmt: skip
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def check(done: subprocess.CompletedProcess) -> None:
    told = [line for line in (done.stdout + done.stderr).splitlines() if "stopped" in line]
    assert done.returncode == 130, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(told) == 1, (done.stdout, done.stderr)


@pytest.mark.parametrize("command", ["evaluate", "plot", "replay", "ablate", "serve"])
def test_ctrl_c_while_a_command_starts_ends_it_at_once(command, tmp_path):
    check(interrupted(0.05, tmp_path, f"jgrpo.{command}"))


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.7, 1.5, 2.5, 4, 6, 9, 13])
def test_ctrl_c_in_the_first_seconds_of_training(after_s, tmp_path):
    check(interrupted(after_s, tmp_path, "jgrpo.train", "--config", "tiny", "--eval_every", "0"))


class Loses:
    """As a library's callback: what is raised within goes nowhere."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_ctrl_c_comes_again(monkeypatch):
    monkeypatch.setattr(errors, "AGAIN_S", 0.05)

    @exit_status()
    def command():
        Loses()
        time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 130
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_it_does_not_tear_what_must_be_whole(monkeypatch):
    monkeypatch.setattr(errors, "AGAIN_S", 0.05)
    whole = []

    @exit_status()
    def command():
        try:
            with interrupts_later():
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.2)
                whole.append("later")
        finally:
            with no_more_interrupts():
                time.sleep(0.2)
                whole.append("none")

    with pytest.raises(SystemExit):
        command()
    assert whole == ["later", "none"]


@pytest.mark.parametrize("command", ["jgrpo", "jgrpo.runs"])
def test_a_reader_that_goes_away_is_told_without_a_traceback(command, tmp_path):
    """As with `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", command], cwd=tmp_path, stdout=pipe, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
