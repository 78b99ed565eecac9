"""Variants x seeds as runs: one folder each, several at a time, done ones left alone.

A worker is a process that imports once and then trains one run after another, or one group of runs
side by side (`members`); each has its share of the cores. Ctrl-C or a crash loses nothing that is
done: the same command goes on.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jgrpo.config import Config
from jgrpo.errors import InputError, RunError, interruptible, no_more_interrupts, printable
from jgrpo.members import shared_options
from jgrpo.run.rundir import jsonable, read_config, read_metrics, write_whole
from jgrpo.run.without_torch import leave_out_torch, torch_again
from jgrpo.study.fit import what_fits
from jgrpo.study.variants import Variant

Train = Callable[[Sequence[Config], Sequence[Path | None]], object]
"""train.train_together: run configs in their run_dirs, or go on with the folders."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    variant: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def done(self) -> bool:
        """Is there a final evaluation?"""
        try:
            rows = read_metrics(self.folder)
        except InputError:
            return False
        last = self.config.n_grpo_steps
        return any(row["step"] == last and "eval/accuracy" in row for row in rows)


def plan(base: Config, variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> list[Job]:
    """All runs, seed by seed, so that an early stop leaves every variant with as many seeds.

    InputError if a variant cannot be, or if a run that is there has another config.
    """
    jobs = []
    for seed in seeds:
        for variant in variants:
            folder = out / variant.name / f"seed_{seed}"
            config = replace(variant.apply(base), seed=seed, run_dir=str(folder))
            if not config.eval_every:
                raise InputError("eval_every=0: a sweep compares evaluations; give 1 or more")
            if (folder / "config.json").is_file():
                _check_same(folder, config)
            jobs.append(Job(variant.name, seed, config))
    return jobs


def _check_same(folder: Path, config: Config) -> None:
    there = read_config(folder)["config"]
    wanted = jsonable(vars(config))
    odd = sorted(k for k in there.keys() | wanted.keys() if there.get(k) != wanted.get(k))
    if odd:
        raise InputError(
            f"{folder} is of a run with another {', '.join(odd)}; give another --out, or remove it"
        )


def groups_of(jobs: Sequence[Job], most: int, n_workers: int = 1) -> list[list[Job]]:
    """Runs that can be trained side by side, `most` at a time at the most."""
    return [group for those in alike(jobs) for group in _cut(those, most, n_workers)]


def alike(jobs: Sequence[Job]) -> list[list[Job]]:
    """Those that share what members must, and are as far."""
    found: dict[tuple, list[Job]] = {}
    for job in jobs:
        shared = shared_options(job.config).values()
        found.setdefault((*shared, _last_checkpoint(job.folder)), []).append(job)
    return [*found.values()]


def _cut(jobs: Sequence[Job], most: int, n_workers: int) -> list[list[Job]]:
    """Whole seeds at a time, or else each seed in parts as large as each other: groups of the same
    variants have the same programs, and the compiler's work is done once. Of what may be, the
    largest that keeps the workers busy to the end."""
    n = len({job.variant for job in jobs})

    def cut(size: int) -> list[list[Job]]:
        seeds = groupby(jobs, lambda job: job.seed)
        runs = [jobs] if size >= n else [[*of_seed] for _, of_seed in seeds]
        return [list(run[i : i + size]) for run in runs for i in range(0, len(run), size)]

    def duration(size: int) -> int:
        """In runs, of the busiest; a group's own beginning costs about as much as one."""
        costs = [len(group) + 1 for group in cut(size)]
        return max(sum(costs[worker::n_workers]) for worker in range(n_workers))

    sizes = {*range(n, most + 1, n), *(-(-n // parts) for parts in range(1, n + 1))}
    return cut(min((size for size in sizes if size <= most), key=lambda s: (duration(s), -s)))


def _last_checkpoint(folder: Path) -> str:
    """Its name; empty where the run has none."""
    names = (f.name for f in (folder / "checkpoints").glob("*") if f.name.isdecimal())
    return max(names, default="")


def run_all(
    jobs: Sequence[Job],
    train: Train,
    n_workers: int | None,
    console: Console,
    together: int | None = 1,
) -> None:
    """Train what is not done, in so many processes, so many runs together in each (None: as many as
    fit). RunError, after all others have ended, if a run failed. Ctrl-C, or SIGTERM, ends them all
    with a checkpoint each."""
    left = [job for job in jobs if not job.done]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them done already")
    if not left:
        return
    context = multiprocessing.get_context("spawn")
    if n_workers is None or together is None:
        with ProcessPoolExecutor(1, context) as pool:  # this process must not take a GPU's memory
            asked = [[job.config for job in those] for those in alike(left)]
            n_workers, together, why = pool.submit(what_fits, asked, n_workers, together).result()
        console.print(printable(why), markup=False)
    groups = groups_of(left, together, n_workers)
    if together > 1:
        console.print(f"{len(left)} runs in {len(groups)} groups side by side")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    failed: dict[str, str] = {}
    workers, ending, configs = context.Value("i", 0), context.Event(), [job.config for job in left]
    with (
        Progress(*columns, console=console, speed_estimate_period=3600) as bar,
        ProcessPoolExecutor(
            n_workers, context, _start_worker, (workers, n_workers, ending, configs)
        ) as pool,
    ):
        task = bar.add_task("runs", total=len(left))
        futures = {pool.submit(_run, train, group): group for group in groups}
        try:
            for future in as_completed(futures):
                group, problem = futures[future], future.result()
                for job in group if problem else ():
                    if job.done:  # beside one that failed
                        continue
                    failed[f"{job.variant}, seed {job.seed}"] = problem
                    bar.console.print(printable(f"failed: {job.folder}: {problem}"), markup=False)
                bar.advance(task, len(group))
        except BaseException:
            with no_more_interrupts():
                bar.console.print("stopping: what runs leaves a checkpoint")
                ending.set()  # some groups are in the workers' queue, where none can cancel them
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    child.terminate()
                pool.shutdown()
            raise
    if failed:
        names = "; ".join(failed)
        raise RunError(f"{len(failed)} of {len(left)} runs failed ({names}); the logs say why")


_ending: Any = None
"""An event: no group is to be begun."""


def _start_worker(counter: Any, n_workers: int, ending: Any, configs: list[Config]) -> None:
    """Give this worker its share of the cores; XLA makes as many threads as it may use cores. A
    terminal's Ctrl-C comes to all processes: the first one alone heeds it, and ends the others."""
    global _ending
    _ending = ending
    leave_out_torch(configs)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[index % n_workers :: n_workers]
        os.sched_setaffinity(0, mine or cores)


def _run(train: Train, group: Sequence[Job]) -> str:
    """Train the runs of a group, their output in a log beside the first one's folder -> what went
    wrong, or nothing."""
    torch_again()
    if _ending is not None and _ending.is_set():
        return "not begun"
    gc.collect()  # arrays of the group before lie in cycles, and the collector comes seldom
    for job in group:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
    begun = [job.folder if (job.folder / "config.json").is_file() else None for job in group]
    with (
        group[0].folder.with_suffix(".log").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            with interruptible():
                train([job.config for job in group], begun)
        except (InputError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            return str(error)
        except KeyboardInterrupt:
            return "interrupted"
    return ""


def write_manifest(out: Path, base: Config, variants: Sequence[Variant], command: str) -> None:
    """ablation.json: the command, the base config and what each variant changes of it."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "base": vars(base),
        "variants": {v.name: {"about": v.about, "changes": v.changes} for v in variants},
    }
    write_whole(out / "ablation.json", json.dumps(jsonable(content), indent=2) + "\n")
