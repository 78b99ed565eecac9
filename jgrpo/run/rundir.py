"""The files of a run folder that are text: config.json, metrics.jsonl, rollouts/.

A file that is written whole goes to a temporary name first and is renamed, so that a reader, or a
run that is killed, never sees half of one.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jgrpo.errors import InputError, RunError
from jgrpo.run.provenance import circumstances

OF_THE_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM)
}
"""Errors of the disk and its permissions, which a user can mend; others are ours."""


def next_run_dir(base_dir: str | Path) -> Path:
    """Create and return `base_dir/N`, N one above the largest there.

    Two runs that start at once get two folders: creating it is the claim.
    """
    base = Path(base_dir)
    try:
        base.mkdir(parents=True, exist_ok=True)
        n = max((int(d.name) for d in base.iterdir() if d.name.isdecimal()), default=0) + 1
        while True:
            try:
                (base / str(n)).mkdir()
                return base / str(n)
            except FileExistsError:
                n += 1
    except OSError as error:
        raise InputError(f"base_dir={base_dir}: {error}; give a folder to write to") from error


def named_run_dir(run_dir: str | Path) -> Path:
    """Create and return `run_dir`, which may be there; `claimed` looks into it."""
    folder = Path(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir={run_dir}: {error}; give a folder to write to") from error
    return folder


def is_writable(folder: Path) -> bool:
    """May this process write into the folder?"""
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


@contextlib.contextmanager
def claimed(run_dir: Path, *, new: bool = False) -> Iterator[None]:
    """Hold a run folder for this process, until it ends in whatever way; a new one that is then
    still empty is removed, so that the same command can be given again.

    InputError if it may not write there, another process is at work in it, or it should be `new`
    and holds something; RunError for what the disk refuses meanwhile. (Where the file system knows
    no locks, nothing is held.)
    """
    if not is_writable(run_dir):
        raise InputError(f"{run_dir}: Permission denied; go on as the run's owner")
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise InputError(f"{run_dir}: another process is at work in it; end that one") from None
    except OSError:
        pass
    try:
        if new:
            _check_empty(run_dir)
        yield
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise RunError(f"{run_dir}: {error}") from error
        raise
    finally:
        for empty in (run_dir / "checkpoints", run_dir) if new else ():
            with contextlib.suppress(OSError):  # it is not
                empty.rmdir()
        os.close(folder)


def _check_empty(run_dir: Path) -> None:
    """InputError if there is more than what a start that was killed may have left."""
    remove_unfinished(run_dir)
    with contextlib.suppress(OSError):
        (run_dir / "checkpoints").rmdir()
    if used := sorted(f.name for f in run_dir.iterdir()):
        raise InputError(
            f"run_dir={run_dir}: must be new or empty, has {', '.join(used[:4])}; "
            f"--resume {run_dir} goes on with it"
        )


def adapter_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "adapters" / f"step_{step:06d}"


def existing_adapter(run_dir: Path, step: int) -> Path:
    """The folder of a step's adapter. InputError if it is gone."""
    folder = adapter_folder(run_dir, step)
    if not folder.is_dir():
        raise InputError(f"there is no {folder}; give a step of which the run has the adapter")
    return folder


def as_begun(config: Any, run_dir: Path) -> Any:
    """The config of a run that began from an adapter, which the run has a copy of: its step 0."""
    if not config.adapter:
        return config
    return dataclasses.replace(config, adapter=str(existing_adapter(run_dir, 0)))


def kept_adapters(run_dir: Path) -> dict[int, Path]:
    """The adapters that a run folder holds, by step, first to last."""
    folders = sorted((run_dir / "adapters").glob("step_*"))
    return {int(f.name.removeprefix("step_")): f for f in folders if f.name[5:].isdecimal()}


def last_adapter(run_dir: Path) -> Path:
    """The adapter of the last step. InputError if the run has none."""
    if not (kept := kept_adapters(run_dir)):
        raise InputError(f"{run_dir}: the run has no adapter yet, in {run_dir / 'adapters'}")
    return kept[max(kept)]


def adapter_of(run_dir: Path, step: int | None) -> Path:
    """The adapter of a step, or (None) of the last. InputError if it is not there."""
    return last_adapter(run_dir) if step is None else existing_adapter(run_dir, step)


def run_of_adapter(folder: Path | None) -> Path | None:
    """The run whose adapter this folder is, or the folder itself if it is a run; else None."""
    if folder is None:
        return None
    if (folder / "adapters").is_dir() and (folder / "config.json").is_file():
        return folder
    run = folder.parent.parent
    inside = folder.parent.name == "adapters" and (run / "config.json").is_file()
    return run if inside else None


def rollouts_file(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step_{step:06d}.jsonl"


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a killed process has left half-written under temporary names."""
    for folder in (run_dir, run_dir / "rollouts", run_dir / "adapters"):
        for file in folder.glob(".*.tmp"):
            file.unlink()
        for partial in folder.glob(".*.partial"):
            shutil.rmtree(partial)


def remove_later(run_dir: Path, last_step: int) -> None:
    """Remove adapters and rollouts of steps after `last_step`, which are about to come again, and
    what is half-written."""
    remove_unfinished(run_dir)
    for entry in (*run_dir.glob("adapters/step_*"), *run_dir.glob("rollouts/step_*.jsonl")):
        number = entry.stem.removeprefix("step_")
        if not number.isdecimal() or int(number) <= last_step:
            continue
        if entry.is_dir():  # renamed first: a folder is whole or absent
            shutil.rmtree(entry.rename(entry.with_name(f".{entry.name}.partial")))
        else:
            entry.unlink()


def run_id(run_dir: Path) -> str:
    """A name for this run's adapters on the server: letters, digits, - and _ of the folder."""
    name = "-".join(run_dir.absolute().parts[-2:])
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)


def jsonable(value: Any) -> Any:
    """The value as JSON can hold it: arrays as lists, NaN and inf as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, float):
        return jsonable(value.tolist())  # numpy and jax: scalars and arrays alike
    return value if math.isfinite(value) else None


def json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(row), allow_nan=False) + "\n"


def write_whole(file: Path, text: str) -> None:
    """Write a file under a temporary name beside it, then rename it over `file`."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_rollouts(run_dir: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a step's completions, a line each -> `rollouts/step_000003.jsonl`."""
    file = rollouts_file(run_dir, step)
    file.parent.mkdir(exist_ok=True)
    write_whole(file, "".join(map(json_line, rows)))
    return file


def write_config(run_dir: Path, config: Any, extra: Mapping[str, Any]) -> Path:
    """Write config.json: the options under "config", and what else it takes to repeat the run.

    `config` is a dataclass instance; `extra` adds keys at the top (devices, data report, ...).
    """
    options = dataclasses.asdict(config)
    content = {"config": options, "seed": options.get("seed"), **circumstances(), **extra}
    write_whole(run_dir / "config.json", json.dumps(jsonable(content), indent=2) + "\n")
    return run_dir / "config.json"


def add_resume(run_dir: Path, config: Any, step: int, extra: Mapping[str, Any]) -> None:
    """Note in config.json under "resumes" that the run went on after `step`: command, versions,
    hardware, and the options that changed, as {name: [before, now]}. Those of the first start stay;
    "config" holds the options of now."""
    content = read_config(run_dir)
    before, now = content["config"], jsonable(dataclasses.asdict(config))
    changed = {k: [before.get(k), v] for k, v in now.items() if before.get(k) != v}
    resume = {"step": step, **circumstances(), **extra, "changed": changed}
    content |= {"config": now, "resumes": [*content.get("resumes", []), jsonable(resume)]}
    write_whole(run_dir / "config.json", json.dumps(content, indent=2) + "\n")


def check_inputs(run_dir: Path, inputs: Mapping[str, str]) -> None:
    """InputError if the fingerprints are not those that the run was started with."""
    saved = read_config(run_dir).get("inputs", inputs)
    if other := [name for name in inputs if saved.get(name) != inputs[name]]:
        raise InputError(
            f"{run_dir}: its {' and '.join(other)} changed since the run was started: bring back "
            "what was there, or start a new run"
        )


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """What `write_config` wrote; the options are under "config"."""
    file = Path(run_dir) / "config.json"
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{run_dir}: not a run folder: it has no config.json (a run that was stopped before it "
            "wrote one has nothing to go on from: start it again with --config)"
        ) from None
    except OSError as error:
        raise InputError(f"{run_dir}: not a run folder: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise InputError(f'{file}: has no "config": not written by jgrpo.train')
    return content


def date_of(run_dir: Path) -> datetime | None:
    """What the prompts of a run take for now; None where it noted none. InputError if it is not a
    date."""
    date = read_config(run_dir).get("date")
    try:
        return date and datetime.fromisoformat(date)
    except (ValueError, TypeError):
        raise InputError(f"{run_dir}/config.json: date={date!r}: is not a date") from None


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order. A last line that was cut off in mid-write is skipped.

    Raises InputError if there is no such file, or another line is not a metrics line.
    """
    file = Path(run_dir) / "metrics.jsonl"
    if not file.is_file():
        raise InputError(f"{run_dir}: not a run folder: it has no metrics.jsonl")
    lines = file.read_text("utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise TypeError
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.strip() and n < len(lines):
                raise InputError(
                    f"{file}, line {n}: not a metrics line: {line!r:.80}; remove it"
                ) from None
    return rows


def truncate_metrics(run_dir: Path, last_step: int) -> list[dict[str, Any]]:
    """Keep the lines of steps up to `last_step`, and return them; the rest is about to be computed
    again."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return []
    kept = [row for row in read_metrics(run_dir) if row["step"] <= last_step]
    write_whole(file, "".join(map(json_line, kept)))
    return kept
