"""Reward functions of the user's own: loaded, called as TRL calls its own, and checked.

functions = load_functions(("my_rewards.py:accuracy", "my_rewards.py:style"))
custom_rewards(functions, (1.0, 0.5), given)   # {"custom": [N], "custom/accuracy": [N], ...}
"""

import importlib
import inspect
import math
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jgrpo.errors import InputError, RunError

ARGUMENTS = ("prompts", "completions", "completion_ids", "gold", "correct")
"""What a function may ask for beside the columns of the rows. A row's own `gold` or `correct` is
what it gets under that name, as from TRL."""
OURS_ALWAYS = ARGUMENTS[:3]
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RewardFunction:
    """A function as the config names it, and under which name its rewards are logged."""

    spec: str
    name: str
    call: Callable[..., Any]

    @property
    def takes(self) -> set[str] | None:
        """The keywords in its signature; None: any."""
        parameters = inspect.signature(self.call).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        return {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}

    @property
    def needs(self) -> list[str]:
        """The keywords that it cannot do without."""
        parameters = inspect.signature(self.call).parameters.values()
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def load_functions(
    specs: Sequence[str], columns: Iterable[str] | None = None
) -> tuple[RewardFunction, ...]:
    """The functions that `file.py:name` or `module:name` name. InputError if there is none, or one
    needs what is neither in ARGUMENTS nor, where they are known, a column of the rows."""
    names = [spec.rpartition(":")[2] for spec in specs]
    if len(set(names)) < len(names):
        names = [
            f"{Path(s.rpartition(':')[0]).stem}.{n}" for s, n in zip(specs, names, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [f"{name}.{i}" for i, name in enumerate(names, 1)]
    functions, hidden = [], dict[str, Any]()
    for spec, name in zip(specs, names, strict=True):
        function = RewardFunction(spec, name, load_function(spec, hidden))
        _check_signature(function, columns)
        functions.append(function)
    return tuple(functions)


def load_function(spec: str, beside: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The function that `file.py:name` or `module:name` names. InputError if there is none.

    A file finds the modules that lie beside it, as `python file.py` would; `beside` collects those,
    so that the next file finds its own of the same name.
    """
    where, _, name = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            function = _run_file(spec, Path(where).expanduser(), {} if beside is None else beside)[
                name
            ]
        else:
            function = getattr(importlib.import_module(where), name)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        missing = isinstance(error, KeyError | AttributeError) and error.args and name in str(error)
        if missing and not their_traceback(error):
            raise InputError(f"reward_function={spec!r}: {where} defines no {name}") from error
        raise InputError(
            f"reward_function={spec!r}: {type(error).__name__}: {error}{their_traceback(error)}"
        ) from error
    if not callable(function):
        raise InputError(
            f"reward_function={spec!r}: is {function!r}; it needs a function that takes the "
            f"keywords {', '.join(ARGUMENTS)} (or some of them), or **kwargs"
        )
    return function


def _run_file(spec: str, file: Path, beside: dict[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"reward_function={spec!r}: no such file: {file}")
    folder = str(file.parent.absolute())
    for name, module in beside.items():  # of another file: this one may have its own
        if sys.modules.get(name) is module and not _lies_in(module, folder):
            del sys.modules[name]
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)  # it stays: a function may import when it is called
    before = set(sys.modules)
    importlib.invalidate_caches()
    found = runpy.run_path(str(file))
    new = {name: sys.modules[name] for name in sys.modules.keys() - before}
    beside |= {name: module for name, module in new.items() if _lies_in(module, folder)}
    return found


def _lies_in(module: Any, folder: str) -> bool:
    file = vars(module).get("__file__")
    return bool(file) and Path(file).absolute().is_relative_to(folder)


def _check_signature(function: RewardFunction, columns: Iterable[str] | None) -> None:
    try:
        needs = function.needs
    except (TypeError, ValueError) as error:
        raise InputError(f"reward_function={function.spec!r}: no signature: {error}") from error
    if columns is None:
        return
    given = [*ARGUMENTS, *(c for c in columns if c not in ARGUMENTS)]
    if odd := [name for name in needs if name not in given]:
        raise InputError(
            f"reward_function={function.spec!r}: it needs {', '.join(odd)}, but it is given the "
            f"keywords {', '.join(given)}; the last are the columns of the rows"
        )


# -- what the functions give -------------------------------------------------------------------


def custom_rewards(
    functions: Sequence[RewardFunction], weights: Sequence[float], given: Mapping[str, list]
) -> dict[str, np.ndarray]:
    """Rewards float32 [N]: `custom`, the weighted sum (of those that did not return None; 0 where
    all did), and of several functions each as `custom/NAME`, NaN for None.

    `given` has a list of N under each keyword; a function gets those in its signature.
    """
    n = len(given["completions"])
    each = [_call(function, given, n) for function in functions]
    total = np.nansum([w * r for w, r in zip(weights, each, strict=True)], axis=0)
    parts = {"custom": total.astype(np.float32)}
    if len(functions) > 1:
        named = zip(functions, each, strict=True)
        parts |= {f"custom/{f.name}": r.astype(np.float32) for f, r in named}
    return parts


def arguments(
    columns: Sequence[Mapping[str, Any]], size: int, ours: Mapping[str, list]
) -> dict[str, list]:
    """Keyword -> list of N = P * size: the columns of P rows (None where a row lacks one), and
    `ours`, which are as long already."""
    names = dict.fromkeys(name for row in columns for name in row if name not in OURS_ALWAYS)
    theirs = {name: [row.get(name) for row in columns for _ in range(size)] for name in names}
    return {**ours, **theirs}


def _call(function: RewardFunction, given: Mapping[str, list], n: int) -> np.ndarray:
    takes = function.takes
    wanted = {k: list(v) for k, v in given.items() if takes is None or k in takes}
    try:
        values = function.call(**wanted)
        if hasattr(values, "tolist"):  # an array of numpy, torch or JAX
            values = values.tolist()
        elif inspect.isgenerator(values) or isinstance(values, map | zip | filter):
            values = list(values)
    except Exception as error:  # the user's code may raise anything
        raise RunError(
            f"reward_function={function.spec!r} raised {type(error).__name__}: {error}"
            f"{their_traceback(error)}"
        ) from error
    return as_rewards(values, n, f"reward_function={function.spec!r}")


def as_rewards(values: Any, n: int, who: str) -> np.ndarray:
    """float64 [N], NaN for None. RunError that says what came back in place of N numbers."""
    needs = f"it needs a list of {n}, a finite number (or None) for each completion"
    if isinstance(values, str | bytes | Mapping | set | frozenset) or not isinstance(
        values, Sequence
    ):
        raise RunError(f"{who} returned {_shown(values)}; {needs}")
    if len(values) != n:
        raise RunError(f"{who} returned {len(values)} values for {n} completions; {needs}")
    rewards = np.full(n, math.nan)
    for i, value in enumerate(values):
        if value is None:
            continue
        number = None if isinstance(value, str | bytes) or np.ndim(value) else _number(value)
        if number is None or not abs(number) <= LARGEST:
            raise RunError(f"{who} returned {_shown(value)} for completion {i}; {needs}")
        rewards[i] = number
    return rewards


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def their_traceback(error: BaseException) -> str:
    """The traceback from the first frame that is the user's on, with a newline before it; empty if
    there is none."""
    frame: TracebackType | None = error.__traceback__
    while frame is not None and _is_ours(frame.tb_frame.f_code.co_filename):
        frame = frame.tb_next
    if frame is None:
        return ""
    return "\n" + "".join(traceback.format_exception(type(error), error, frame)).rstrip()


def _is_ours(file: str) -> bool:
    """Of this module, or of the machinery that imports another."""
    return file in (__file__, runpy.__file__, importlib.__file__) or file.startswith("<frozen ")
