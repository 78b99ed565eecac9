"""Where caches go when a process has no home, as in a container with a user id of its own."""

import os
import tempfile


def find_home() -> None:
    """Where ~ is nowhere, or takes no .cache, HOME becomes a folder of this user's among the
    temporary ones: libraries would make a folder that is called ~, or fail."""
    home = os.path.expanduser("~")  # "~" without HOME and without an entry in passwd
    if os.path.isabs(home):
        try:
            os.makedirs(os.path.join(home, ".cache"), exist_ok=True)
            return
        except OSError:
            pass
    folder = os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():  # someone else's: what is cached is executed
        folder = tempfile.mkdtemp(prefix="home-")
    os.environ["HOME"] = folder
