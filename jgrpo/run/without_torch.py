"""torch is left out of commands that have no use for it."""

import sys
from collections.abc import Iterable

from jgrpo.config import Config


def leave_out_torch(configs: Iterable[Config]) -> None:
    """Say to this process that torch is not installed. To be called before transformers is
    imported, which would import it: that takes as long as all else that a command imports.

    Not where a reward function is given: it may be torch's.
    """
    if "torch" not in sys.modules and not any(config.reward_function for config in configs):
        sys.modules["torch"] = None  # type: ignore[assignment]  # as the import system has it
