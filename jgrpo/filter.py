"""How hard is each training problem? python -m jgrpo.filter --config FILE [--k 8].

k completions of every training problem by the base (or the adapter that the config begins from), as
rollouts are sampled, graded, and counted: a file that `train --pass_rate 0.2 0.8` takes a part of.
It is written as it goes: the same command again goes on where one was stopped.
"""

from jgrpo.errors import exit_status, printable, stop_at_once

if __name__ == "__main__":
    stop_at_once()
from jgrpo import cli
from jgrpo.run.without_torch import leave_out_torch, torch_again

if __name__ == "__main__":  # before JAX is imported: help and mistakes are answered at once
    cli.tune_allocator()
    with exit_status():
        COMMAND = cli.parse(cli.Filter)
        leave_out_torch([COMMAND.options])

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jgrpo.errors import InputError
from jgrpo.rollout.protocol import prompt_seeds
from jgrpo.run.difficulty import add_rates, begin_rates, made_with
from jgrpo.run.policy import begun
from jgrpo.run.rundir import is_writable
from jgrpo.run.sampler import check_adapters, each_policy
from jgrpo.run.session import configure_jax, open_grader, open_problems

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
AT_ONCE = 2048
"""Completions that are sampled, graded and written before the next ones: at most so many are lost
where a filter is stopped. Twice what a vLLM server has at work."""


def measure(command: cli.Filter) -> np.ndarray:
    """Sample, grade and write the file -> the pass rates, float [P]."""
    configure_jax()
    config, out = begun(command.options), Path(command.options.pass_rate_file)
    if command.k < 1:
        raise InputError(f"--k {command.k}: must be positive")
    if not out.parent.is_dir() or out.is_dir() or not is_writable(out.parent):
        raise InputError(f"--pass_rate_file {out}: cannot be written; give a file in a folder")
    start = Path(config.adapter) if config.adapter else None
    with ExitStack() as stack:
        problems = open_problems(config)
        check_adapters(config, [start])
        rates = begin_rates(out, made_with(config, problems), command.k, config.seed)
        seeds = prompt_seeds(config.seed, 0, len(problems.train))
        left = [(p, seed) for p, seed in zip(problems.train, seeds, strict=True)
                if (p.problem, p.gold) not in rates]  # fmt: skip
        if n_there := len(problems.train) - len(left):
            problems.report.append(f"{n_there} problems were in {out} already")
        grader = open_grader(config, stack)
        grader.self_test()
        bars = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        total, size = len(left) * command.k, max(1, AT_ONCE // command.k)
        task = bars.add_task(f"{total} completions", total=total)
        for _, sampler in each_policy(config, [start], problems.stop_token_ids) if left else ():
            for first in range(0, len(left), size):
                asked, of_these = zip(*left[first : first + size], strict=True)
                sampled = sampler.sample(
                    [p.prompt_ids for p in asked],
                    seeds=of_these,
                    group_size=command.k,
                    temperature=config.temperature,
                    progress=lambda done, tokens: bars.advance(task, done),
                )
                texts = [[problems.text(completion) for completion in group] for group in sampled]
                correct = grader.grade(texts, [p.gold for p in asked]).correct
                rates |= add_rates(out, asked, correct)
    found = np.array([rates[p.problem, p.gold] for p in problems.train])
    for line in (*problems.report, *summary(found, command.k), f"pass rates: {out}"):
        print(printable(line))
    return found


def summary(rates: np.ndarray, k: int) -> list[str]:
    """How many problems have which pass rate: never, always, and between by fifths."""
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
    torch_again()
    with exit_status():
        measure(COMMAND)
