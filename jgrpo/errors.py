"""The two ways a command ends badly, and the exit status of each.

Whatever a user can mend is raised as one of these, with the value and the remedy in the message;
anything else is a bug of ours and keeps its traceback.
"""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input (config, file, row, flag): exit status 2, before compute is spent."""


class RunError(RuntimeError):
    """A run that cannot go on (server gone, disk full): exit status 1."""


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """Turn the errors above into one message on stderr and an exit status, without a traceback;
    Ctrl-C into 130, as a shell does."""
    try:
        yield
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
