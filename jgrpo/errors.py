"""The two ways a command ends badly, and the exit status of each.

Whatever a user can mend is raised as one of these, with the value and the remedy in the message;
anything else is a bug of ours and keeps its traceback.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Bad input (config, file, row, flag): exit status 2, before compute is spent."""


class RunError(RuntimeError):
    """A run that cannot go on (server gone, disk full): exit status 1."""


def printable(text: str, encoding: str = "utf-8") -> str:
    """The text with whatever could steer a terminal (or cannot be shown on it) as an escape."""
    safe = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def short(path: str | Path) -> str:
    """A path as one would type it: from here, or from home, where it lies within one of them."""
    whole, home = Path(path).absolute(), Path(os.path.expanduser("~"))  # "~" if there is none
    if whole.is_relative_to(Path.cwd()):
        return str(whole.relative_to(Path.cwd()))
    return str("~" / whole.relative_to(home)) if whole.is_relative_to(home) else str(whole)


READER_GONE = "whoever read the output went away (as `| head` does); to keep all of it: > FILE"
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGALRM
AGAIN_S = 3.0


def stop_at_once() -> None:
    """Until a command is at work, Ctrl-C ends the process on the spot: some of what is imported
    would catch it, and go on."""

    def stop(number: int, _: Any) -> None:
        os.write(2, b"stopped before anything was done\n")
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see cli.tune_allocator


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """Turn the errors above into one message on stderr and an exit status, without a traceback;
    Ctrl-C into 130, as a shell does."""
    try:
        with interruptible():
            yield
    except (InputError, RunError) as error:
        # A message quotes servers, files and rows.
        print(printable(f"error: {error}", sys.stderr.encoding or "utf-8"), file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains again at its end
        print(f"error: {READER_GONE}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        if not error.args:  # else what is to be said of it was said
            print("stopped", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, or SIGTERM, is a KeyboardInterrupt. One that is lost (raised in a callback of a
    library, it goes nowhere) is raised again every AGAIN_S seconds until it is heeded."""
    with _on_interrupt(_raise_until_heeded):
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0)


def _raise_until_heeded(number: int, _: Any) -> None:
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)  # SIGALRM, which comes here too
    raise KeyboardInterrupt


@contextlib.contextmanager
def no_more_interrupts() -> Iterator[None]:
    """A second Ctrl-C must not tear what is written after the first."""
    if signal.getsignal(signal.SIGALRM) is _raise_until_heeded:
        signal.setitimer(signal.ITIMER_REAL, 0)
    with _on_interrupt(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Ctrl-C, or SIGTERM, comes when what must not be torn is done."""
    came: list[int] = []
    with _on_interrupt(lambda number, _: came.append(number)):
        yield
    for number in came[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _on_interrupt(handler: Any) -> Iterator[None]:
    """Handle all three signals so, but for one that is ignored already."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals do not come here
        return
    before = {s: h for s in SIGNALS if (h := signal.getsignal(s)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
