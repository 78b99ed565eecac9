"""An event loop in a thread of its own, for calls from any thread: several may be under way at
once. A call that is given up, by Ctrl-C or by `cancel`, has ended before its caller goes on.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
END_S = 5.0
"""Seconds that a call has to end once it is cancelled."""


class Background:
    """Runs until `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], calls: set[Future]) -> T:
        """What comes of `work`; until then it is among the `calls`."""
        ended = threading.Event()

        async def whole() -> T:
            try:
                return await work
            finally:
                ended.set()

        call = asyncio.run_coroutine_threadsafe(whole(), self._loop)
        calls.add(call)
        try:
            return call.result()
        finally:
            calls.discard(call)
            if call.cancel() or call.cancelled():
                ended.wait(END_S)

    def stop(self) -> None:
        """End the thread. Nothing may be under way."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        if not self._thread.is_alive():
            self._loop.close()
