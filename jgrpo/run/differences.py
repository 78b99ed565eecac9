"""Several runs beside each other: which folders, in which order, under which names, and in what
their configs differ. `plot` and `runs` tell runs apart by this."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jgrpo.config import Config
from jgrpo.errors import InputError, short
from jgrpo.run.rundir import jsonable, read_config

WHERE = {"base_dir", "run_dir", "vllm_url"}
"""Options that say where a run is, not what it does."""
DEFAULTS = {f.name: jsonable(f.default) for f in fields(Config)}


def run_folders(folder: Path) -> list[Path]:
    """The folder, if it is a run's, else all run folders in it (links are not followed), in natural
    order. InputError if there is none."""
    try:
        found = _runs_below(folder)
    except OSError as error:
        raise InputError(f"{folder}: not a run folder: {error}") from error
    if not found:
        raise InputError(f"{folder}: not a run folder: it has no metrics.jsonl, nor a run in it")
    return found


def _runs_below(folder: Path) -> list[Path]:
    if (folder / "metrics.jsonl").is_file():
        return [folder]
    inside = sorted((d for d in folder.iterdir() if d.is_dir()), key=natural)
    return [
        run for d in inside
        if not d.is_symlink() or (d / "metrics.jsonl").is_file()
        for run in _runs_below(d)
    ]  # fmt: skip


def natural(path: str | Path) -> list[tuple[int, str]]:
    """A key that sorts numbers within names by their value: 1, 2, 10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def run_names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths below the innermost folder that holds them all."""
    parts = [folder.resolve().parts for folder in folders]
    n_common = 0
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        n_common += 1
    n_common = min(n_common, *(len(p) - 1 for p in parts))
    return ["/".join(p[n_common:]) for p in parts]


def saved_options(folder: Path) -> dict[str, Any]:
    """The options in a run's config.json; none where there is no such file."""
    return read_config(folder)["config"] if (folder / "config.json").is_file() else {}


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options of runs by name -> for each the options in which the runs differ, in the order of
    config.py: the same ones for all, but for what a run of another version does not know.

    An option that an older run lacks counts as today's default, which is what it did then. A run
    without any options is not compared.
    """
    known = {name: DEFAULTS | jsonable(options) for name, options in configs.items() if options}
    every = dict.fromkeys(option for options in known.values() for option in options)
    odd = [o for o in every if o not in WHERE and not _alike([c.get(o) for c in known.values()])]
    return {name: {o: known[name][o] for o in odd if o in known.get(name, ())} for name in configs}


def _alike(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def briefly(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The differences; where they are more than two, without the values that most runs share."""
    every = list(options.values())
    if max(map(len, every), default=0) <= 2:
        return {name: dict(own) for name, own in options.items()}
    share = lambda k, v: sum(own.get(k) == v for own in every) / len(every)  # noqa: E731
    return {
        name: {k: v for k, v in own.items() if share(k, v) <= 0.5} for name, own in options.items()
    }


def words(options: Mapping[str, Any]) -> str:
    """Options as one line: `lora_r=4 lr=0.002 use_clip=True`."""
    return " ".join(f"{name}={shown(value)}" for name, value in options.items())


def shown(value: Any) -> str:
    """An option's value as a person would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value))
    if isinstance(value, str):
        return short(value) if Path(value).is_absolute() else value
    return str(value)
