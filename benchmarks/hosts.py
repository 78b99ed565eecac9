"""Weak scaling: two processes of a core each, against one of one core with half as much to do.

    python benchmarks/hosts.py [--repeats 5]

A step of the 135 M shape, sampled and trained, random weights and advantages. Each side lives
through all turns and works when it is its turn; a process is bound to a core of its own (taskset),
and two find each other as those of a run do. Tokens a second by the clock, and by the processor
time of the process that took the most of it: that is what a busy machine changes little. Linux
only. Last line: one JSON document.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from loading import free_port, write
from speed import LLAMA_135M

WORKER = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
from jgrpo.config import Config
from jgrpo.policy.batch import Rows
from jgrpo.policy.lora import split, stacked_up
from jgrpo.policy.mesh import make_mesh
from jgrpo.policy.weights import load_model
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.run.hosts import join
from jgrpo.run.session import configure_jax
from jgrpo.update.learner import Learner

folder, address, n, i, prompts, tokens = sys.argv[1:]
n, tokens = int(n), int(tokens)
join(address, n, int(i)) if n > 1 else None
configure_jax()
config = Config(
    dtype="float32", rollout="jax", n_prompts_per_step=n * int(prompts), group_size=4,
    max_prompt_tokens=32, max_tokens=tokens, micro_batch_size=2, n_grpo_steps=1000,
)
model = load_model(
    Path(folder), rank=1, target_modules=config.lora_target_modules, mesh=make_mesh()
)
graph, adapter, base = split(model)
learner = Learner([config], graph, stacked_up([adapter]), base)
sampler = JaxSampler(
    graph, adapter, learner.base, stop_token_ids=[2**30], max_tokens=tokens,
    max_rows=4 * int(prompts),
)
rng = np.random.default_rng(0)
asked = rng.integers(5, 40000, (config.n_prompts_per_step, 32)).tolist()
for line in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    groups = sampler.sample(asked, seeds=range(len(asked)), group_size=4)
    middle, cpu_middle = time.perf_counter(), time.process_time()
    both = [(p, c) for p, g in zip(asked, groups) for c in g]
    rows = Rows(
        [p for p, _ in both], [c.token_ids for _, c in both], [c.logprobs for _, c in both],
        rng.normal(size=len(both)).astype(np.float32),
    )
    learner.learn({0: rows})
    end, cpu_end = time.perf_counter(), time.process_time()
    n_tokens = sum(len(c.token_ids) for _, c in both)
    print(json.dumps({"tokens": n_tokens, "sampling": [middle - start, cpu_middle - cpu],
                      "training": [end - middle, cpu_end - cpu_middle]}), flush=True)
"""


@dataclass
class Args:
    """Measure how two processes do twice the work of one."""

    repeats: int = 5
    """Turns that are counted, after one that compiles."""
    prompts: int = 2
    """Of four completions each, for each process."""
    tokens: int = 64
    """Of each completion."""


class Side:
    """One or two processes."""

    def __init__(self, folder: str, n: int, args: Args):
        address = f"127.0.0.1:{free_port()}"
        cores = sorted(os.sched_getaffinity(0))
        self.processes = [
            subprocess.Popen(
                ["taskset", "-c", str(cores[i]), sys.executable, "-c", WORKER, folder, address,
                 str(n), str(i), str(args.prompts), str(args.tokens)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for i in range(n)
        ]  # fmt: skip

    def turn(self) -> dict[str, list[float]]:
        """Tokens a second of each phase and of both: by the clock, and by processor time."""
        for process in self.processes:
            process.stdin.write("\n")
            process.stdin.flush()
        # Gloo writes to stdout too.
        lines = [
            next(line for line in process.stdout if line.startswith("{"))
            for process in self.processes
        ]
        found = [json.loads(line) for line in lines]
        seconds = {
            phase: [max(one[phase][k] for one in found) for k in (0, 1)]
            for phase in ("sampling", "training")
        }
        seconds["both"] = [sum(x) for x in zip(*seconds.values(), strict=True)]
        return {phase: [found[0]["tokens"] / s for s in both] for phase, both in seconds.items()}

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait()


def main() -> None:
    args = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), LLAMA_135M)
        one, two = (Side(folder, n, args) for n in (1, 2))
        turns = [(one.turn(), two.turn()) for _ in range(args.repeats + 1)][1:]
        for side in (one, two):
            side.close()
    print("| phase | by | one | two | two / one |\n|---|---|---|---|---|")
    for phase in ("sampling", "training", "both"):
        for k, by in enumerate(("the clock", "processor time")):
            rates = [[turn[phase][k] for turn in side] for side in zip(*turns, strict=True)]
            a, b = map(statistics.median, rates)
            ratio = statistics.median(y / x for x, y in zip(*rates, strict=True))
            print(f"| {phase} | {by} | {a:,.0f} tokens/s | {b:,.0f} tokens/s | {ratio:.2f} |")
    print(json.dumps({"arguments": vars(args), "turns": turns, "load": os.getloadavg()}))


if __name__ == "__main__":
    main()
