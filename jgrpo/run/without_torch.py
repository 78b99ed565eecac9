"""torch is left out of commands that have no use for it."""

import sys
from collections.abc import Iterable

from jgrpo.config import Config


def leave_out_torch(configs: Iterable[Config]) -> None:
    """Say to this process that torch is not installed, until `torch_again`: transformers, which is
    imported in between, would import it, and that takes as long as all else that a command imports.

    Not where a reward function is given: it may be torch's.
    """
    if "torch" not in sys.modules and not any(config.reward_function for config in configs):
        sys.modules["torch"] = None  # type: ignore[assignment]  # as the import system has it


def torch_again() -> None:
    """Who asks from now on finds it. transformers does not ask again."""
    if "torch" in sys.modules and sys.modules["torch"] is None:
        del sys.modules["torch"]
