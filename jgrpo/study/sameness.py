"""Rows of a sweep that differ by rounding alone: clip and KL to the old policy, and GSPO, where a
rollout has one update. Such a row says nothing about its technique.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from jgrpo.run.rundir import adapter_folder, rollouts_file

ROUNDING = 1e-3
"""Runs whose adapters stay closer than this share of their way differ by rounding alone: after six
steps of the quick start GSPO is 3e-6 from GRPO, and what does change something 0.1 or more."""
FEWEST_STEPS = 2
"""Steps that must show it: in the first the adapter is fresh, and a KL to the base still zero."""


def sameness(a: Mapping[int, Path], b: Mapping[int, Path]) -> str:
    """`to the bit` or `to rounding` if each seed's two run folders have the same adapters so, as
    long as they saw the same completions; else nothing.

    Where runs differ by rounding, a token that was as good as a draw can fall otherwise; from then
    on they are two samples of one thing.
    """
    if a.keys() != b.keys():
        return ""
    largest, parted = 0.0, 0
    for seed in a:
        gaps = []
        for gap in _gaps(a[seed], b[seed]):
            if gap >= ROUNDING:
                return ""
            gaps.append(gap)
        if len(gaps) < FEWEST_STEPS:
            return ""
        largest = max(largest, *gaps)
        parted += _adapter_file(a[seed], len(gaps) + 1).is_file()
    if parted:
        return f"to rounding, until a token fell otherwise (in {parted} of {len(a)} seeds)"
    return "to rounding" if largest else "to the bit"


def _gaps(a: Path, b: Path) -> Iterator[float]:
    """How far apart two run folders' adapters are after each step that has seen the same
    completions, as a share of how far training has taken the second; inf for another shape."""
    fresh, step = _adapter(b, 0), 1
    while rollouts_file(a, step).is_file() and rollouts_file(b, step).is_file():
        if _completions(a, step) != _completions(b, step):
            return
        yield _distance(_adapter(a, step), _adapter(b, step), fresh)
        step += 1


def _adapter(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(_adapter_file(run_dir, step))


def _adapter_file(run_dir: Path, step: int) -> Path:
    return adapter_folder(run_dir, step) / "adapter_model.safetensors"


def _completions(run_dir: Path, step: int) -> list[list[int]]:
    lines = rollouts_file(run_dir, step).read_text("utf-8").splitlines()
    return [json.loads(line)["token_ids"] for line in lines]


def _distance(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]
) -> float:
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in b):
        return math.inf
    norm = lambda x, y: math.hypot(*(float(np.linalg.norm(x[k] - y[k])) for k in y))  # noqa: E731
    apart, moved = norm(a, b), norm(b, fresh)
    return apart / moved if moved else math.inf if apart else 0.0
