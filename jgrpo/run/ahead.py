"""Rollouts that run ahead: while a step is trained, those of the next steps are sampled.

With `rollouts_ahead` K, step k is sampled with adapter k - 1 - K (or the first), in a thread, one
step after another. A rollout is a function of its step and its adapter, so that a run which is
resumed samples what was in flight again, and gets the same. With K = 0 nothing is in flight: a step
is sampled when it is asked for, in the thread that asks.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path

from jgrpo.rollout.protocol import Sampler
from jgrpo.run.collect import Collector
from jgrpo.run.groups import Rollout
from jgrpo.run.screen import Screen

Rollouts = dict[int, Rollout]
"""Of a step, by member."""


class Here(Executor):
    """Does at once, in the caller's thread, what it is given."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Ahead:
    """The rollouts of the steps after `first`, up to `last`, `n_ahead` steps ahead of the one that
    is asked for. `folders` of a step are its adapters, one a member."""

    def __init__(
        self,
        collector: Collector,
        sampler: Sampler,
        folders: Callable[[int], Sequence[Path]],
        screen: Screen,
        *,
        n_ahead: int,
        first: int,
        last: int,
    ) -> None:
        self._collector, self._sampler, self._folders = collector, sampler, folders
        self._n_ahead, self._next, self._last = n_ahead, first + 1, last
        self._loaded: int | None = None
        self._in_flight: dict[int, tuple[Sampler, Future]] = {}
        self._screen = screen
        self.sampling_s: dict[str, float] = {}
        """Of the step that was collected last, by phase; `waited_s`: what its caller waited."""
        self.waited_s = 0.0
        self._phases = screen.beside() if n_ahead else screen
        self._worker: Executor = ThreadPoolExecutor(1, "rollouts") if n_ahead else Here()

    def policy_of(self, step: int) -> int:
        """The step whose adapters sample this step."""
        return max(0, step - 1 - self._n_ahead)

    def load(self, step: int) -> None:
        """Have the sampler sample from the adapters of a step, which are written, from now on."""
        if self._loaded != step:
            self._sampler.load(*self._folders(step))
            self._loaded = step

    def collect(self, step: int, members: Sequence[int]) -> Rollouts:
        """Start the steps that may be in flight now, and wait for this one's rollouts, of these
        members; an error in sampling them is raised here. The steps are asked for in order."""
        start_s = time.perf_counter()
        while self._next <= min(step + self._n_ahead, self._last):
            self._start(self._next, members)
            self._next += 1
        with self._screen.phase("waiting"):
            rollouts, self.sampling_s = self._in_flight.pop(step)[1].result()
        self.waited_s = time.perf_counter() - start_s
        return {e: rollout for e, rollout in rollouts.items() if e in members}

    def settle(self) -> None:
        """Wait until the sampler is at nothing: it is wanted for something else."""
        wait([future for _, future in self._in_flight.values()])

    @property
    def busy_s(self) -> float:
        """Seconds that the sampler has sampled rollouts so far."""
        return self._phases.spent("generation")

    def close(self) -> None:
        """End what is in flight. Nothing of it is kept, and a resumed run samples it again."""
        for sampler, _ in self._in_flight.values():
            sampler.close()
        self._worker.shutdown(cancel_futures=True)

    def _start(self, step: int, members: Sequence[int]) -> None:
        self.load(self.policy_of(step))  # it is, but for what was in flight when a run stopped
        sampler = self._sampler.held()
        self._in_flight[step] = sampler, self._worker.submit(self._collect, step, members, sampler)

    def _collect(
        self, step: int, members: Sequence[int], sampler: Sampler
    ) -> tuple[Rollouts, dict[str, float]]:
        """In the worker: a step's rollouts, and the seconds of their phases."""
        try:
            rollouts = self._collector.collect(step, self._phases, members, sampler)
        finally:
            sampler.close()
        return rollouts, self._phases.take_seconds()
