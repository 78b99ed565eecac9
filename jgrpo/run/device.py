"""What the device has left."""

import re
from pathlib import Path

import jax


def free_memory() -> int | None:
    """Bytes free on the first device (on the CPU: what the system could give), if it says so."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    return int(available[1]) * 1024 if available and jax.default_backend() == "cpu" else None
