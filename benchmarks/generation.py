"""The embedded sampler over a run's steps: useful tokens per second of this code and of another.

    python benchmarks/generation.py RUN --other CLONE [--steps 40] [--repeats 3]

RUN is a run folder of the embedded sampler with its adapters, CLONE a checkout of another version.
Each version is a process of its own, and both sample the run's steps with the run's adapters, in
turn, step by step; the first round compiles and is not counted. "equal": completions that are those
of the run, token by token. Seconds are of processor time (one core computes nearly all), so that a
busy machine tells little less than a quiet one. Last line: one JSON document.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from jgrpo.cli import tune_allocator

WORKER = """
import json, sys, time
from dataclasses import fields
from pathlib import Path
from jgrpo.config import Config
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.rollout.protocol import prompt_seeds
from jgrpo.run.policy import open_policy
from jgrpo.run.session import configure_jax
from jgrpo.prompts.tokenizer import load_tokenizer, stop_token_ids

configure_jax()
run = Path(sys.argv[1])
saved = json.loads((run / "config.json").read_text())
saved = saved.get("config", saved)
names = {f.name for f in fields(Config)}
tuples = {n: tuple(v) if isinstance(v, list) else v for n, v in saved.items() if n in names}
config = Config(**tuples)
policy = open_policy(config)
stops = stop_token_ids(load_tokenizer(config.model_id), config.model_id)
sampler = JaxSampler(
    policy.graph, policy.adapter, policy.base, stop_token_ids=stops,
    max_tokens=config.max_tokens, max_rows=config.n_completions_per_step,
)
for line in sys.stdin:
    step = int(line)
    rollout = [json.loads(x) for x in open(run / f"rollouts/step_{step:06}.jsonl")]
    prompts = [x["prompt_ids"] for x in rollout[:: config.group_size]]
    sampler.load(run / f"adapters/step_{step - 1:06}")
    seeds = prompt_seeds(config.seed, step, len(prompts))
    start = time.process_time()
    groups = sampler.sample(
        prompts, seeds=seeds, group_size=config.group_size, temperature=config.temperature
    )
    seconds = time.process_time() - start
    completions = [c for group in groups for c in group]
    equal = sum(c.token_ids == x["token_ids"] for c, x in zip(completions, rollout, strict=True))
    tokens = sum(len(c.token_ids) for c in completions)
    print(json.dumps([seconds, tokens, equal, len(completions)]), flush=True)
"""


@dataclass
class Args:
    """Time generation over the steps of a run, by two versions in turn."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    other: Path
    """Checkout of another version."""
    steps: int = 40
    """Steps of the run that are sampled, from its first."""
    repeats: int = 3
    """Rounds that are counted."""


def main() -> None:
    args = tyro.cli(Args)
    here = Path(__file__).parents[1]
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WORKER, str(args.run.resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=clone,
            env=os.environ | {"PYTHONPATH": str(clone.resolve())},
        )
        for name, clone in (("this", here), ("other", args.other))
    }  # fmt: skip
    steps, rounds = range(1, args.steps + 1), []
    for repeat in range(args.repeats + 1):
        found = [[ask(worker, step) for worker in workers.values()] for step in steps]
        for label, part in (("first ten", found[:10]), ("all", found)):
            both = [[sum(x) for x in zip(*side, strict=True)] for side in zip(*part, strict=True)]
            rates = {n: tokens / s for n, (s, tokens, *_) in zip(workers, both, strict=True)}
            equal = {n: f"{e} of {of}" for n, (*_, e, of) in zip(workers, both, strict=True)}
            rounds.append({"round": repeat, "steps": label, "tokens_per_s": rates, "equal": equal})
            print(json.dumps(rounds[-1]), flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    print("| steps | this | other | ratio |\n| --- | --- | --- | --- |")
    for label in ("first ten", "all"):
        rates = [r["tokens_per_s"] for r in rounds if r["steps"] == label and r["round"]]
        ratios = [r["this"] / r["other"] for r in rates]
        this, other = (statistics.median(r[name] for r in rates) for name in workers)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {label} | {this:,.0f} tokens/s | {other:,.0f} tokens/s | {spread} |")
    print(json.dumps(rounds))


def ask(worker: subprocess.Popen, step: int) -> list[float]:
    """Seconds, tokens, completions that equal the run's, and completions, of a step."""
    worker.stdin.write(f"{step}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


if __name__ == "__main__":
    tune_allocator()
    main()
