"""Several processes, one run: the same command in each, on one machine or on many.

Their devices are one mesh, and all compute each update. All else the first process does alone: it
reads the problems, samples, grades, logs and writes; what the others need to follow it is told
them, as bytes (`follow` in run/together.py).
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jgrpo.errors import InputError, RunError

JOIN_S, TIMEOUT_S = 300, 60
"""So long processes wait for each other at the start; after so long one that dies later ends the
others."""
SMALLEST_BYTES = 2**12
HINTS = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
"""Where a launcher says that it has started a process, and of how many."""


def join(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Find the other processes of this run: those that Slurm's srun, Open MPI's mpirun, an indexed
    Kubernetes job or a TPU pod has started (JAX looks), or as the options say. Alone, without
    either. To be called before JAX opens a device. InputError for options that do not fit."""
    given = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    if any(given) and not all(given):
        raise InputError(
            "coordinator_address, num_processes and process_id go together (or all stay away, "
            "where Slurm, Open MPI, Kubernetes or a TPU pod says who is there)"
        )
    if all(given) and (process_id >= num_processes or ":" not in coordinator_address):
        raise InputError(
            f"coordinator_address={coordinator_address} num_processes={num_processes} "
            f"process_id={process_id}: give host:port of the first process, and ids from 0 to "
            f"{num_processes - 1}"
        )
    if not any(given) and not _launched():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM for itself
    try:
        jax.distributed.initialize(
            coordinator_address or None,
            num_processes if all(given) else None,
            process_id if all(given) else None,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=TIMEOUT_S,
            shutdown_timeout_seconds=TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the processes of this run do not find each other: {str(error).splitlines()[0]}; "
            "give --coordinator_address HOST:PORT --num_processes N --process_id I"
        ) from error


def _launched() -> bool:
    """Is this one of several processes?"""
    env = os.environ
    sizes = [env.get(size, "1") for started, size in HINTS.items() if started in env]
    in_pod = "," in env.get("TPU_WORKER_HOSTNAMES", "")
    in_indexed_job = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    return any(size != "1" for size in sizes) or in_pod or in_indexed_job


def is_first() -> bool:
    """Is this the process that does all else? (To ask JAX of one alone would open its device.)"""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


class _Line:
    """Between the first process and the others."""

    busy = False
    """Are all at what they were told of last? Then nobody listens."""


@contextlib.contextmanager
def told(what: str, arrays: Mapping[str, np.ndarray] | None = None) -> Iterator[None]:
    """For the first process: while this is open, the others do the same as it."""
    if not jax.distributed.is_initialized():
        yield
        return
    message = io.BytesIO()
    named: Any = {"what": np.array(what), **(arrays or {})}
    np.savez(message, **named)
    data = np.frombuffer(message.getvalue(), np.uint8)
    size = SMALLEST_BYTES  # few sizes: each is a program
    while size < len(data):
        size *= 2
    _Line.busy = True
    multihost_utils.broadcast_one_to_all(np.array([len(data), size]))
    multihost_utils.broadcast_one_to_all(np.pad(data, (0, size - len(data))))
    yield
    _Line.busy = False


def heard() -> tuple[str, dict[str, np.ndarray]]:
    """For the others: waits for what the first one tells."""
    n, size = multihost_utils.broadcast_one_to_all(np.zeros(2, int))
    data = multihost_utils.broadcast_one_to_all(np.zeros(size, np.uint8))
    arrays = dict(np.load(io.BytesIO(np.asarray(data)[:n].tobytes()), allow_pickle=False))
    return str(arrays.pop("what")), arrays


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """For the first process: the others end when this ends, in whatever way."""
    end = "failed"
    try:
        yield
        end = "done"
    finally:
        if not _Line.busy:  # else they have failed too, or end within TIMEOUT_S
            with told(end):
                pass
