"""What JAX compiles, told as it happens: JAX calls listeners when it begins and when it ends to
trace, to lower and to compile a program. It is the trainer's own thread that is listened to.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from jax import monitoring

from jgrpo.policy.tracing import PROGRAM

PARTS = "/jax/core/compile/"
COMPILED = "/jax/core/compile/backend_compile_duration"
FROM_DISK = "/jax/compilation_cache/cache_hits"
SHORT_S, SLOW_S, NAMELESS_S = 0.3, 1.0, 5.0
"""What has taken longer is shown while it lasts, and when it is done; what is none of our programs,
but a step on the way to one (an addition, say), only where it has taken very long."""


class Compilations:
    """Listens until `close`. `seconds` are those of all programs so far; `tell` is called with a
    line for each slow one when it is done."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.seconds = 0.0
        self._tell = tell
        self._thread = threading.get_ident()
        self._depth = 0  # a function that is traced may call others that are
        self._at_work, self._since_s = "", 0.0
        self._own_s, self._from_disk, self._label = 0.0, False, ""
        monitoring.register_scalar_listener(self._begin)
        monitoring.register_event_duration_secs_listener(self._end)
        monitoring.register_event_listener(self._event)

    def close(self) -> None:
        monitoring.unregister_scalar_listener(self._begin)
        monitoring.unregister_event_duration_listener(self._end)
        monitoring.unregister_event_listener(self._event)

    @property
    def now(self) -> str:
        """The program at work, if it has been for a moment."""
        lasts = time.perf_counter() - self._since_s > SHORT_S
        return self._at_work if lasts else ""

    def _begin(self, event: str, value: float, **about: Any) -> None:
        if not self._is_ours(event, PARTS):
            return
        self._depth += 1
        if self._depth == 1:
            self._at_work = self._label or plain(about.get("fun_name", ""))
            self._since_s = time.perf_counter()

    def _end(self, event: str, duration_secs: float, **about: Any) -> None:
        if not self._is_ours(event, PARTS):
            return
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        self.seconds += duration_secs
        self._own_s += duration_secs
        if event == COMPILED:
            name = self._label or plain(about.get("fun_name", ""))
            if self._own_s >= (SLOW_S if self._label else NAMELESS_S):
                verb = "loaded" if self._from_disk else "compiled"
                self._tell(f"{verb} {name}: {self._own_s:.1f} s")
            self._own_s, self._from_disk, self._label = 0.0, False, ""
        self._at_work = ""

    def _event(self, event: str, **about: Any) -> None:
        if self._is_ours(event, FROM_DISK):
            self._from_disk = True
        elif self._is_ours(event, PROGRAM):
            self._at_work = self._label = f"{about['name']} ({about['shape']})"

    def _is_ours(self, event: str, kind: str) -> bool:
        return event.startswith(kind) and threading.get_ident() == self._thread


def plain(fun_name: str) -> str:
    """`jit(_decode)` -> `decode`"""
    return fun_name.removeprefix("jit(").removesuffix(")").strip("_<>")
