"""Orbax checkpoints: adapter, optimizer state and step; enough to go on as if nothing had happened.

Everything else that a step depends on (prompt order, seeds) is a function of the config and the
step. Arrays are stored under readable names, so that no class of ours has to be unpickled.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jgrpo.errors import InputError, RunError, interrupts_later

Tree = Any


@contextlib.contextmanager
def _without_echoes() -> Iterator[None]:
    """One array's error is raised; Orbax's tasks for the others report theirs too, each with a
    traceback: TensorStore's threads a closed event loop, asyncio an error that nobody awaited."""
    before = sys.unraisablehook

    def hook(report: Any) -> None:
        if "Event loop is closed" not in str(report.exc_value):
            before(report)

    def heard(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(heard)
    yield
    sys.unraisablehook = before  # not after an error: they come late, and the command ends
    logging.getLogger("asyncio").removeFilter(heard)


@contextlib.contextmanager
def _without_orbax_s_log() -> Iterator[None]:
    """Orbax's threads log a traceback of each error that `save` raises anyway."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class Checkpoints:
    """The checkpoints of a run folder: the last `keep`, and those of the steps that `keep_period`
    divides (0: none). Each appears whole or not at all. `read_only`: nothing is made or removed."""

    def __init__(
        self, run_dir: Path, *, keep: int = 2, keep_period: int = 0, read_only: bool = False
    ):
        self.folder = (Path(run_dir) / "checkpoints").absolute()
        self._keep, self._keep_period = keep, keep_period
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        # Of several processes this one writes alone, and waits for no other.
        alone = {"primary_host": jax.process_index(), "active_processes": {jax.process_index()}}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_period or None,
            enable_async_checkpointing=False,
            step_format_fixed_length=6,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**alone),
        )
        handler = ocp.StandardCheckpointHandler(
            multiprocessing_options=ocp.options.MultiprocessingOptions(**alone)
        )
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handler, options=options)

    def save(self, step: int, state: Tree) -> None:
        """Write the state after `step`, unless it is there already; Ctrl-C waits for it. RunError
        if the disk does not take it; the former ones stay."""
        if step in self.steps():
            return
        try:
            with interrupts_later(), _without_orbax_s_log():
                self._manager.save(step, args=ocp.args.StandardSave(_by_name(state)))
        except (OSError, ValueError) as error:  # TensorStore says so that the disk is full
            self._remove_unfinished()
            raise RunError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {error}"
            ) from error

    def steps(self) -> list[int]:
        """The steps that are saved, in order."""
        return sorted(self._manager.all_steps())

    def tidy(self, last: int) -> None:
        """Remove what a killed run left: half-written ones, old ones that were to go, and those
        after step `last`, which come again."""
        self._remove_unfinished()
        period, kept = self._keep_period, [step for step in self.steps() if step <= last]
        old = {step for step in kept[: -self._keep] if not period or step % period}
        for step in self.steps():
            if step in old or step > last:
                shutil.rmtree(self.folder / f"{step:06d}")  # it may be half removed already
        self._manager.reload()

    @_without_echoes()
    def restore(self, step: int, like: Tree) -> Tree:
        """The state after `step`, in the structure of `like`. InputError if it does not fit."""
        wanted = _by_name(like)
        abstract = {name: ocp.utils.to_shape_dtype_struct(x) for name, x in wanted.items()}
        try:
            stored = _shapes(dict(self._manager.item_metadata(step)))
            if odd := sorted(name for name, _ in stored.items() ^ _shapes(wanted).items()):
                raise ValueError(f"other arrays or shapes, as {odd[0]}")
            saved = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError, OSError) as error:
            what = str(error).split(" [tensorstore_spec=")[0]  # a page
            raise InputError(
                f"checkpoint {step} in {self.folder} does not fit this run: {what}\n"
                "If it is damaged, remove its folder: the run goes on from the one before"
            ) from error
        # By way of the host, as at a start: orbax's arrays are bound to a device, and for such ones
        # JAX compiles every program again.
        leaves = [jnp.array(np.asarray(saved[name])) for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        self._manager.close()

    def _remove_unfinished(self) -> None:
        for folder in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(folder)


def _shapes(arrays: dict[str, Any]) -> dict[str, tuple]:
    return {name: (tuple(x.shape), str(x.dtype)) for name, x in arrays.items()}


def _by_name(tree: Tree) -> dict[str, np.ndarray | jax.Array]:
    paths, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}
