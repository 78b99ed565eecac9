"""What it takes to repeat a run, besides its options: command, commit, versions and hardware."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "datasets", "vllm")


def circumstances() -> dict[str, Any]:
    """Command, commit, versions and hardware of this process."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(sys.orig_argv),
        "git_commit": _git_commit(),
        "versions": versions,
        "hardware": {"platform": platform.platform(), "cpus": os.cpu_count(), "cpu": _cpu_name()},
    }


def _git_commit() -> str | None:
    """HEAD of the clone that this package runs from, `+changes` if edited; None without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changes else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, check=True, timeout=10, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
