"""How long the page takes for a large run, and what memory: 50 steps x 256 completions x 1,024
tokens.

    python benchmarks/page.py [--steps 50] [--completions 256] [--tokens 1024] [--repeats 5]

The run is written by hand into a temporary folder (600 MB), with texts of the quick start's
tokens. `python -m jgrpo.view` serves it, and each request is timed: opening (page, plotly, the
overview of the runs), a step that was not looked at yet, one of its completions with all tokens.
Last line: medians in seconds, and the largest memory of the server's process.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from page_runs import a_run

from jgrpo.run.rundir import rollouts_file, write_rollouts
from jgrpo.tiny.recipe import make_tokenizer

ROOT = Path(__file__).parents[1]


@dataclass
class Args:
    """Time the page."""

    steps: int = 50
    completions: int = 256
    """A step, in groups of 8."""
    tokens: int = 1024
    """Of each."""
    repeats: int = 5
    """Of each request, on other steps."""


def write_run(folder: Path, args: Args) -> None:
    a_run(folder, n_steps=args.steps)
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    for step in range(1, args.steps + 1):
        rows = []
        for n in range(args.completions):
            ids = rng.integers(5, 40, args.tokens).tolist()
            logprobs = rng.normal(-1, 1, args.tokens)
            rows.append({
                "problem": f"What is {n // 8} + {step}?", "prompt": f"What is {n // 8} + {step}?\n",
                "completion": tokenizer.decode(ids), "prompt_ids": [1, 2], "token_ids": ids,
                "sampler_logprobs": logprobs.tolist(),
                "trainer_logprobs": (logprobs + 1e-6).tolist(), "gold": "7", "reward": n % 2,
                "reward_parts": {"outcome": n % 2}, "advantage": 1.0 - 2 * (n % 2),
                "finish_reason": "length",
            })  # fmt: skip
        rollouts_file(folder, step).unlink(missing_ok=True)
        write_rollouts(folder, step, rows)


def megabytes(pid: int) -> float:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024


def measure(folder: Path, args: Args) -> dict:
    command = [sys.executable, "-m", "jgrpo.view", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        url = next(u for line in server.stdout for u in re.findall(r"http://[\d.:]+/", line))
        seconds: dict[str, list[float]] = {"open": [], "step": [], "completion": []}
        with httpx.Client(trust_env=False, base_url=url, timeout=60) as client:
            for step in range(1, args.repeats + 1):
                asked = {
                    "open": ["/", "/page.css", "/plotly.js", "/api/runs"],
                    "step": [f"/api/step?run=0&step={step}"],
                    "completion": [f"/api/completion?run=0&step={step}&row={args.completions - 1}"],
                }
                for name, paths in asked.items():
                    start = time.perf_counter()
                    for path in paths:
                        client.get(path).raise_for_status()
                    seconds[name].append(time.perf_counter() - start)
        return {
            **{name: statistics.median(s) for name, s in seconds.items()},
            "first_open": seconds["open"][0], "memory_mb": megabytes(server.pid),
        }  # fmt: skip
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    args = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "1"
        write_run(folder, args)
        size = sum(f.stat().st_size for f in folder.rglob("*")) / 1e6
        print(json.dumps({"run_mb": size, **measure(folder, args)}))


if __name__ == "__main__":
    main()
