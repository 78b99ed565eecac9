"""Completions and gold answers -> right or wrong, checked in processes that can be killed.

A worker is a plain `python -c` child that imports `answers` alone and talks in JSON lines. Not
multiprocessing (or pebble, which builds on it): fork is unsafe under JAX's threads, and spawn and
forkserver import the parent's __main__ again, that is, the whole trainer with JAX, once a worker.
"""

import contextlib
import json
import queue
import selectors
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jgrpo.answers import equal as answers
from jgrpo.errors import RunError

Outcome = Literal["right", "wrong", "error", "timeout"]
_REPLIES: dict[str | None, Outcome] = {"right": "right", "wrong": "wrong", "error": "error"}

WORKER_MEMORY_BYTES = 2 * 1024**3
START_LIMIT_S = 120.0
"""For a worker to import sympy; a worker that takes longer is taken for broken."""

# The alarm ends a worker whose parent was killed in mid-check; a live parent is faster. The checks
# before "ready" fill the parser's tables: the first ones take 0.1 s each, later ones 0.02 s. No
# text is ever handed to sympy's eval_expr (answers.py); without it, one that was would be an error.
_WORKER = r"""
import json, resource, signal, sys
path, memory_bytes, limit_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
try:
    sys.path.insert(0, path)
    from jgrpo.answers import equal as answers
    for a, b in [(r"\frac{3}{2\sqrt{3}}", r"\frac{\sqrt{3}}{2}"), ("(x+1)^2", "x^2+2x+1"),
                 (r"9-2\sqrt5+\pi", r"\pi-2\sqrt5+9"), ("y-2x=3", "y=2x+3"), ("3+2i", "2i+3")]:
        answers.same_symbolically(a, b)
    import sympy.parsing.sympy_parser
    sympy.parsing.sympy_parser.eval_expr = None
    print("ready", flush=True)
except BaseException as error:
    print("failed", type(error).__name__, *str(error).split(), flush=True)
    sys.exit(1)
for line in sys.stdin:
    answer, gold = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, limit_s + 5)
    try:
        outcome = "right" if answers.same_symbolically(answer, gold) else "wrong"
    except (Exception, RecursionError, MemoryError):
        outcome = "error"
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(outcome, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Grades:
    """`correct` is float32 [P, G], 1 or 0; `boxed` is bool [P, G]: there is a balanced box.

    `errors` and `timeouts` count completions of reward 0 whose answers could not be checked.
    """

    correct: np.ndarray
    boxed: np.ndarray
    errors: int
    timeouts: int


class Pair(NamedTuple):
    answer: str
    gold: str


class _Worker:
    """One process that checks one pair at a time; it starts again by itself when it had to die."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._start()

    def _start(self) -> None:
        arguments = [str(Path(answers.__file__).resolve().parents[2]), str(WORKER_MEMORY_BYTES)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, *arguments, str(self.timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer alone
        )
        self._ready = False

    def _read_line(self, limit_s: float) -> str | None:
        """Return the next line ("" if the process is gone), or None after `limit_s`."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                return None
        return self.process.stdout.readline().decode().strip()

    def _await_start(self) -> None:
        if self._ready:
            return
        line = self._read_line(START_LIMIT_S)
        if line != "ready":
            raise RunError(
                f"the grader's worker did not start ({line or 'no answer'}); try: "
                f"{sys.executable} -c 'import math_verify', and check the free memory"
            )
        self._ready = True

    def check(self, pair: Pair) -> Outcome:
        """Check one pair. The limit runs from when a ready worker is given the pair.

        Raises RunError if the worker cannot start.
        """
        self._await_start()
        if self.process.poll() is not None:  # killed between two checks
            self.stop()
            self._start()
            self._await_start()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")
            self.process.stdin.flush()
            line = self._read_line(self.timeout_s)
        except BrokenPipeError:
            line = ""
        if line in _REPLIES:
            return _REPLIES[line]
        self.stop()
        self._start()
        return "timeout" if line is None else "error"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Grader:
    """Grades completions; holds `max_workers` processes. Use it as a context manager.

    The workers import sympy (about 2 s) while the caller goes on; the first check waits for them.
    """

    def __init__(self, *, max_workers: int, timeout_s: float) -> None:
        if max_workers < 1 or not timeout_s > 0:
            raise ValueError(f"max_workers={max_workers}, timeout_s={timeout_s}: must be positive")
        self._workers = [_Worker(timeout_s) for _ in range(max_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max_workers, thread_name_prefix="grader")

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers, whatever they are at."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _check(self, pair: Pair) -> Outcome:
        worker = self._idle.get()
        try:
            return worker.check(pair)
        finally:
            self._idle.put(worker)

    def _outcomes(self, pairs: Sequence[Pair]) -> dict[Pair, Outcome]:
        """Return the outcome of each different pair: in this process if it is cheap."""
        outcomes: dict[Pair, Outcome] = {}
        undecided: list[Pair] = []
        for pair in dict.fromkeys(pairs):
            verdict = answers.quick_verdict(*pair)
            if verdict is None:
                undecided.append(pair)
            else:
                outcomes[pair] = "right" if verdict else "wrong"
        checked = self._threads.map(self._check, undecided)
        return outcomes | dict(zip(undecided, checked, strict=True))

    def grade(self, completions: Sequence[Sequence[str]], golds: Sequence[str]) -> Grades:
        """Return the Grades of `completions` [P][G] against the bare gold answers [P].

        Equal answers to one problem are checked once. Raises ValueError if the completions are
        ragged or not as many as the golds, RunError if no worker can be started.
        """
        n_completions = {len(group) for group in completions}
        if len(completions) != len(golds) or len(n_completions) != 1:
            raise ValueError(
                f"{len(completions)} groups of {sorted(n_completions)} completions for "
                f"{len(golds)} golds: needs [P][G] completions and [P] golds"
            )
        boxes = [[answers.last_boxed(text) for text in group] for group in completions]
        pairs = [
            [None if box is None else Pair(box, gold) for box in group]
            for group, gold in zip(boxes, golds, strict=True)
        ]
        outcomes = self._outcomes([pair for group in pairs for pair in group if pair])
        graded = [[outcomes[pair] if pair else "wrong" for pair in group] for group in pairs]
        flat = [outcome for group in graded for outcome in group]
        return Grades(
            correct=(np.array(graded) == "right").astype(np.float32),
            boxed=np.array([[box is not None for box in group] for group in boxes]),
            errors=flat.count("error"),
            timeouts=flat.count("timeout"),
        )

    def same_answers(self, completions: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """For each problem its different answers, each as the places of the completions that give
        it: equal ones by the rules of grading, the first taken for the gold one. Completions
        without a box are in none. RunError if no worker can be started.
        """
        boxes = [[answers.last_boxed(text) for text in group] for group in completions]
        left = [[i for i, box in enumerate(group) if box is not None] for group in boxes]
        found: list[list[list[int]]] = [[] for _ in boxes]
        while any(left):  # one different answer of every problem a round
            pairs = [
                [Pair(group[i] or "", group[places[0]] or "") for i in places]
                for group, places in zip(boxes, left, strict=True)
            ]
            outcomes = self._outcomes([pair for group in pairs for pair in group])
            for p, places in enumerate(left):
                if places:
                    same = {places[0]}  # also where it is empty, and so equal to nothing
                    same |= {i for i, q in zip(places, pairs[p], strict=True)
                             if outcomes[q] == "right"}  # fmt: skip
                    found[p].append(sorted(same))
                    left[p] = [i for i in places if i not in same]
        return found

    def self_test(self) -> None:
        """Grade answers whose verdicts are known; raises RunError if one comes out otherwise.

        A grader that is broken gives reward 0 to all, which looks like a model that learns nothing.
        """
        known: tuple[tuple[str, str, Outcome], ...] = (
            ("1,000", "1000", "right"),
            ("10", "1", "wrong"),
            (r"\dfrac12", "0.5", "right"),
            (r"\frac{3}{2\sqrt{3}}", r"\frac{\sqrt{3}}{2}", "right"),
            ("(x+1)^2", "x^2+2x+1", "right"),
            ("(x+1)^2", "x^2+2x+2", "wrong"),
        )
        outcomes = self._outcomes([Pair(answer, gold) for answer, gold, _ in known])
        for answer, gold, wanted in known:
            if (outcome := outcomes[Pair(answer, gold)]) != wanted:
                raise RunError(
                    f"the grader's self-test failed: {answer!r} against {gold!r} came out as "
                    f"{outcome}, not {wanted}. For a timeout raise grader_timeout_s; otherwise "
                    f"install the versions of math-verify and sympy that pyproject.toml names"
                )
