"""How hard is each training problem? python -m jgrpo.filter --config FILE [--k 8].

k completions of every training problem by the base (or the adapter that the config begins from), as
rollouts are sampled, graded, and counted: a file that `train --pass_rate 0.2 0.8` takes a part of.
"""

from jgrpo.errors import exit_status, printable, stop_at_once

if __name__ == "__main__":
    stop_at_once()
from jgrpo import cli

if __name__ == "__main__":  # before JAX is imported: help and mistakes are answered at once
    cli.tune_allocator()
    with exit_status():
        COMMAND = cli.parse(cli.Filter)

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jgrpo.errors import InputError
from jgrpo.rollout.protocol import prompt_seeds
from jgrpo.run.difficulty import made_with, write_rates
from jgrpo.run.policies import check_adapters, each_policy
from jgrpo.run.rundir import is_writable
from jgrpo.run.session import begun, configure_jax, open_grader, open_problems

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def measure(command: cli.Filter) -> np.ndarray:
    """Sample, grade and write the file -> correct, float32 [P, k]."""
    configure_jax()
    config, out = begun(command.options), Path(command.options.pass_rate_file)
    if command.k < 1:
        raise InputError(f"--k {command.k}: must be positive")
    if not out.parent.is_dir() or out.is_dir() or not is_writable(out.parent):
        raise InputError(f"--pass_rate_file {out}: cannot be written; give a file in a folder")
    start = Path(config.adapter) if config.adapter else None
    with ExitStack() as stack:
        problems = open_problems(config)
        asked, made = problems.train, made_with(config, problems)
        check_adapters(config, [start])
        grader = open_grader(config, stack)
        grader.self_test()
        bars = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        total = len(asked) * command.k
        task = bars.add_task(f"{total} completions", total=total)
        for _, sampler in each_policy(config, [start], problems.stop_token_ids):
            sampled = sampler.sample(
                [p.prompt_ids for p in asked],
                seeds=prompt_seeds(config.seed, 0, len(asked)),
                group_size=command.k,
                temperature=config.temperature,
                progress=lambda done, tokens: bars.advance(task, done),
            )
        texts = [[problems.text(completion) for completion in group] for group in sampled]
        correct = grader.grade(texts, [p.gold for p in asked]).correct
    write_rates(out, asked, correct, made)
    for line in (*problems.report, *summary(correct), f"pass rates: {out}"):
        print(printable(line))
    return correct


def summary(correct: np.ndarray) -> list[str]:
    """How many problems have which pass rate: never, always, and between by fifths."""
    rates, k = correct.mean(axis=1), correct.shape[1]
    inside = rates[(rates > 0) & (rates < 1)]
    counts = [("0", (rates == 0).sum())]
    counts += [
        (f"{low:g} to {high:g}", ((inside > low) & (inside <= high)).sum())
        for low, high in pairwise(EDGES)
    ]
    counts += [("1", (rates == 1).sum())]
    lines = [f"  {name:>10}  {n:6}  {n / len(rates):4.0%}" for name, n in counts]
    return [f"pass rate of {len(rates)} problems, {k} completions each:", *lines]


if __name__ == "__main__":
    with exit_status():
        measure(COMMAND)
