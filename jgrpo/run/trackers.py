"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, or several.

A tracker never ends a run: one that fails is told of once and left alone. A resumed run goes on
with the same run of each; a step that is made again is there twice, with the same values.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from jgrpo.config import Config
from jgrpo.errors import InputError
from jgrpo.run.rundir import adapter_folder, jsonable, run_id, write_whole
from jgrpo.run.tensorboard import TensorBoard

Row = Mapping[str, Any]
NEEDS_A_PACKAGE = ("wandb", "trackio")


class Tracker(Protocol):
    """One of them, open."""

    def log(self, step: int, metrics: Row) -> None:
        """Metrics of a step by tag, None where a value is not finite; and `adapter`, a path."""

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """Rows with the same fields, to read."""

    def close(self) -> None:
        """Everything is handed over."""


class Wandb:
    """Weights & Biases: online or offline as WANDB_MODE has it. The step is a metric of its own,
    since wandb drops what comes after a later step, as a resumed run's first ones may."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=config.project,
            id=tracker_id(run_dir),
            name=run_id(run_dir),
            dir=run_dir,
            config=jsonable(asdict(config)),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Row) -> None:
        self._run.log({"step": step, **{k: v for k, v in metrics.items() if v is not None}})

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        cells = [list(row.values()) for row in rows]
        self._run.log({"step": step, name: self._table(columns=list(rows[0]), data=cells)})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio: a local database (TRACKIO_DIR), or a Space that TRACKIO_SPACE_ID names."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import trackio

        self._table = trackio.Table
        self._run = trackio.init(
            project=config.project,
            name=f"{run_id(run_dir)}-{tracker_id(run_dir)}",
            config=jsonable(asdict(config)),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, metrics: Row) -> None:
        self._run.log({k: v for k, v in metrics.items() if v is not None}, step=step)

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        cells = [list(row.values()) for row in rows]
        self._run.log({name: self._table(columns=list(rows[0]), data=cells)}, step=step)

    def close(self) -> None:
        self._run.finish()


OPEN: dict[str, Callable[[Config, Path, Sequence[Row] | None], Tracker]] = {
    "tensorboard": lambda c, folder, rows: TensorBoard(folder, jsonable(asdict(c)), rows),
    "wandb": lambda c, folder, rows: Wandb(c, folder),
    "trackio": lambda c, folder, rows: Trackio(c, folder),
}
"""How to open each; `rows`: the metrics of a resumed run so far."""


class Trackers:
    """Hands what it is given to each that is asked for, as long as that one works."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        rows: Sequence[Row] | None,
        tell: Callable[[str], None],
    ) -> None:
        self._run_dir, self._tell = run_dir, tell
        self._open: dict[str, Tracker] = {}
        for name in config.report_to:
            try:
                self._open[name] = OPEN[name](config, run_dir, rows)
            except Exception as error:  # whatever it is: see above
                self._failed(name, error)

    def log(self, step: int, metrics: Row) -> None:
        """Metrics, and where the step's adapter is."""
        adapter = adapter_folder(self._run_dir, step).absolute()
        where = {"adapter": str(adapter)} if adapter.is_dir() else {}
        self._each(lambda t: t.log(step, {**metrics, **where}))

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """Nothing, if there are no rows."""
        if rows:
            self._each(lambda t: t.table(name, step, rows))

    def close(self) -> None:
        self._each(lambda t: t.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._open.items()]:
            try:
                call(tracker)
            except Exception as error:
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        first = str(error).strip().split("\n")[0]
        self._tell(
            f"{name} failed, and gets nothing more of this run, which goes on: "
            f"{type(error).__name__}: {first}"
        )


def check_installed(names: Sequence[str]) -> None:
    """InputError, with the command, for a tracker whose package is not there."""
    for name in names:
        if name in NEEDS_A_PACKAGE:
            try:
                metadata.version(name)  # not its import: a folder ./wandb would do for that
            except metadata.PackageNotFoundError:
                raise InputError(
                    f"report_to={name}: {name} is not installed: pip install 'jgrpo[{name}]', or "
                    f"pip install {name}"
                ) from None


def tracker_id(run_dir: Path) -> str:
    """The run's name at the trackers: made once, kept in its folder."""
    file = run_dir / "tracker_id"
    if not file.is_file():
        write_whole(file, secrets.token_hex(4) + "\n")
    return file.read_text("utf-8").strip()
