"""Kill a run again and again, resume it each time: is it in the end the run that nobody killed?

    python tests/chaos.py --kills 100 [--members 3] [--rollouts_ahead 1]

Each life of the run is a process of its own that gets SIGKILL: some while they start, the others
a random moment after a file of a random phase appeared in the run folder. Lives are forked from a
process that has imported everything and computed nothing, so that one takes seconds. With several
members, a life trains that many runs side by side.
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from tiny_run import (
    arrays_of,
    comparable,
    curves,
    on_cards,
    same_bits,
    tiny_config,
    write_base,
    write_problems,
)

from jgrpo.config import Config
from jgrpo.run.rundir import read_config, read_metrics

WATCHED = {
    "a start": "",
    "the probe": "adapters/probe",
    "the rollouts": "rollouts/step_*",
    "an export": "adapters/.step_*.partial",
    "an adapter": "adapters/step_*",
    "a checkpoint": "checkpoints/*tmp",
    "the end of a checkpoint": "checkpoints/0*",
}
"""What a kill is aimed at -> the file whose appearing tells that it is near."""
START_S, PHASE_S = 4.0, 0.05
"""A kill comes within this time of a life's start, or of the file (then mostly at once)."""


def chaos(
    root: Path, *, kills: int, seed: int = 0, members: int = 1, rollouts_ahead: int = 0
) -> Counter[str]:
    """Two runs of one config in `root`, one of them killed `kills` times -> where the kills hit (by
    the first of several members).

    AssertionError if the runs differ in anything but the clock, or the killed one left a trace.
    """
    write_base(root / "base")
    write_problems(root)
    options = {"n_grpo_steps": 2 * kills + 8, "eval_every": 5, "checkpoint_keep_period": 10,
               "rollouts_ahead": rollouts_ahead}  # fmt: skip
    calm, killed = (
        [tiny_config(root, **options, seed=e, run_dir=str(root / f"{name}{e}"))
         for e in range(members)]
        for name in ("calm", "killed")
    )  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jgrpo.train"])

    def start(configs: list[Config], log: Path) -> multiprocessing.Process:
        process = context.Process(target=live, args=(configs, dict(os.environ), str(log)))
        process.start()
        return process

    process = start(calm, root / "calm.log")
    process.join()
    assert process.exitcode == 0, (root / "calm.log").read_text()
    rng, hits, log = random.Random(seed), Counter(), root / "killed.log"
    while True:
        process = start(killed, log)
        if hits.total() < kills:
            run = root / f"killed{rng.randrange(members)}"
            await_a_moment(run, process, rng, rng.choice(list(WATCHED)))
            process.kill()
        process.join()
        if process.exitcode == 0 and hits.total() >= kills:
            break
        assert process.exitcode in (0, -9), log.read_text()
        if process.exitcode:
            hits[where(root / "killed0")] += 1
    for e in range(members):
        check_equal(root / f"calm{e}", root / f"killed{e}")
    return hits


def live(configs: list[Config], environment: dict[str, str], log: str) -> None:
    """One life, in a process of its own: the first command, or --resume of what has begun."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    from jgrpo import train

    real = train.configure_jax

    def configure_jax() -> None:
        """A life compiles nothing that an earlier one has."""
        real()
        train.jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    train.configure_jax = configure_jax
    runs = [Path(config.run_dir) for config in configs]
    begun = [run if (run / "config.json").exists() else None for run in runs]
    train.train_together(configs, begun)


def await_a_moment(run: Path, process, rng: random.Random, aim: str) -> None:
    """Wait until what the kill is aimed at is near (or the life has ended), and a little longer.
    The first, second or third time in a life, so that the run gets on."""
    pattern = WATCHED[aim]
    if not pattern:
        time.sleep(rng.uniform(0, START_S))
        return
    for _ in range(1 if aim == "the probe" else rng.randint(1, 3)):
        there = set(run.glob(pattern))
        while process.is_alive() and not (now := set(run.glob(pattern))) - there:
            there = now
            time.sleep(0.0005)
    time.sleep(PHASE_S * rng.random() ** 3)


def where(run: Path) -> str:
    """What a killed run was doing, by what it left behind."""
    if not (run / "config.json").exists():
        return "before config.json"
    if list(run.glob("checkpoints/*tmp*")):
        return "in a checkpoint"
    if list(run.glob("adapters/.*.partial")):
        return "in an export"
    if list(run.glob("rollouts/.*.tmp")):
        return "in the rollouts"
    steps = [int(f.name) for f in run.glob("checkpoints/0*")]
    if not steps:
        return "before the first checkpoint"
    metrics = (run / "metrics.jsonl").read_text()
    if metrics and not metrics.endswith("\n"):
        return "in a line of metrics"
    logged = max((json.loads(line)["step"] for line in metrics.splitlines()), default=0)
    made = max(int(f.name.removeprefix("step_")) for f in run.glob("adapters/step_*"))
    if (run / "adapters" / "probe").exists():
        return "in a start"
    if made == logged == max(steps):
        return "in a start, or in a step before its rollouts"
    sampled = max(int(f.stem.removeprefix("step_")) for f in run.glob("rollouts/step_*"))
    if sampled > made:
        return "between rollouts and adapter"
    return "between adapter and metrics" if made > logged else "between metrics and checkpoint"


def check_equal(calm: Path, killed: Path) -> None:
    """AssertionError if anything differs but the clock, or what belongs to no run lies about."""
    rows = read_metrics(killed)
    assert comparable(rows) == comparable(read_metrics(calm))
    assert (killed / "metrics.jsonl").read_text().count("\n") == len(rows)
    assert curves(killed) == on_cards(rows)
    for folder in ("adapters", "rollouts", "checkpoints"):
        names = [sorted(f.name for f in (run / folder).iterdir()) for run in (calm, killed)]
        assert names[0] == names[1]
    for adapter in (calm / "adapters").iterdir():
        assert same_bits(arrays_of(adapter), arrays_of(killed / "adapters" / adapter.name))
    for file in (calm / "rollouts").iterdir():
        assert file.read_bytes() == (killed / "rollouts" / file.name).read_bytes()
    unfinished = [f for f in killed.rglob("*") if f.name.startswith(".") or "tmp" in f.name]
    assert not unfinished
    first, again = read_config(calm), read_config(killed)
    assert again["command"] == first["command"]
    assert again["config"] == first["config"] | {"run_dir": str(killed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--rollouts_ahead", type=int, default=0)
    asked = parser.parse_args()
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/xla")
        hits = chaos(Path(folder), **vars(asked))
    for place, n in hits.most_common():
        print(f"{n:4} {place}")
    print(f"{hits.total()} kills survived, {time.monotonic() - start_s:.0f} s: to the bit the same")


if __name__ == "__main__":
    main()
