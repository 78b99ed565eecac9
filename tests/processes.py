"""A run of several processes, and one that is killed again and again.

    python tests/processes.py --kills 10

Either of two processes gets SIGKILL at a random moment; the other must end by itself. The run is
resumed with one process, which is killed too, and with two, in turn: is it in the end what one
process trains that nobody killed?
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from chaos import WATCHED, await_a_moment
from ports import free_port
from tiny_run import (
    arrays_of,
    comparable,
    tiny_config,
    write_base,
    write_config_file,
    write_problems,
)

from jgrpo.run.hosts import JOIN_S, TIMEOUT_S
from jgrpo.run.rundir import read_metrics

ROOT = Path(__file__).parent.parent


def start(argv: list[str], n: int) -> list[subprocess.Popen]:
    """The same command in n processes; one alone without the options of several."""
    address = f"127.0.0.1:{free_port()}"
    several = ["--coordinator_address", address, "--num_processes", str(n), "--process_id"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "jgrpo.train", *argv, *([*several, str(i)] if n > 1 else [])],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(n)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen]) -> list[str]:
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def same(one: Path, other: Path, step: int) -> None:
    """AssertionError if two runs have not learned the same, or left other kinds of files."""
    first, a, b = (
        arrays_of(run / "adapters" / f"step_{k:06d}")
        for run, k in ((one, 0), (one, step), (other, step))
    )
    for key in a:
        np.testing.assert_allclose(b[key], a[key], atol=1e-5, rtol=0, err_msg=key)
    assert max(np.abs(a[key] - first[key]).max() for key in a) > 1e-3
    for x, y in zip(comparable(read_metrics(one)), comparable(read_metrics(other)), strict=True):
        assert x.keys() == y.keys()
        if "train/accuracy" in x:
            assert (x["step"], x["train/accuracy"]) == (y["step"], y["train/accuracy"])
    kinds = [{path.name.split(".")[0] for path in run.iterdir()} for run in (one, other)]
    assert kinds[0] == kinds[1]


def killed_again_and_again(root: Path, kills: int, seed: int = 0) -> list[str]:
    """Whom each kill hit, in which phase, and how long the other took to end."""
    write_base(root / "base")
    write_problems(root)
    steps = 2 * kills + 4
    config = tiny_config(root, n_grpo_steps=steps, eval_every=steps, checkpoint_every=1)
    file, calm, run = write_config_file(root / "c.py", config), root / "calm", root / "killed"
    ended(start(["--config", str(file), "--run_dir", str(calm)], 1))
    rng, hits, lives = random.Random(seed), [], 0
    while len(hits) < kills:
        n, lives = 2 - lives % 2, lives + 1
        processes, victim = start(command(file, run), n), rng.randrange(n)
        aim = rng.choice(list(WATCHED))
        first = SimpleNamespace(is_alive=lambda of=processes: of[0].poll() is None)
        await_a_moment(run, first, rng, aim)
        processes[victim].kill()
        start_s = time.monotonic()
        said = [process.communicate(timeout=JOIN_S + 3 * TIMEOUT_S)[0] for process in processes]
        seconds, codes = time.monotonic() - start_s, [process.returncode for process in processes]
        if codes[victim] == 0:
            break  # it was over
        assert codes[victim] == -signal.SIGKILL, said
        assert 0 not in codes, said
        if n == 2:
            hits.append(f"process {victim}, near {aim}: the other ended in {seconds:.0f} s")
            print(hits[-1], flush=True)
    ended(start(command(file, run), 1 + len(hits) % 2))
    same(calm, run, steps)
    return hits


def command(file: Path, run: Path) -> list[str]:
    begun = (run / "config.json").exists()
    return ["--resume", str(run)] if begun else ["--config", str(file), "--run_dir", str(run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/xla")
        hits = killed_again_and_again(Path(folder), asked.kills, asked.seed)
    print(f"{len(hits)} kills survived: in the end within 1e-5 of the run that nobody killed")


if __name__ == "__main__":
    main()
