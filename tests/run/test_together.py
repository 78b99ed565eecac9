"""Several processes, one run: what they are told arrives whole, and two train what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import comparable, tiny_config, write_config_file

from jgrpo.errors import InputError
from jgrpo.policy.batch import Rows
from jgrpo.run.hosts import join
from jgrpo.run.rundir import read_metrics
from jgrpo.run.together import as_arrays, as_rows, leaves, of_leaves, part, under

ROOT = Path(__file__).parent.parent.parent


def test_a_rollout_is_told_as_it_is():
    rows = Rows(
        [[1, 2], [1, 2], [3]], [[5], [], [7, 8]], [[-0.1], [], [-1 / 3, -2.0]],
        np.array([0.5, -0.5, 1 / 3], np.float32), np.array([True, False, True]),
    )  # fmt: skip
    got = as_rows(part(under("1", as_arrays(rows)), "1"))
    assert (got.prompts, got.completions) == (rows.prompts, rows.completions)
    assert got.sampler_logprobs == rows.sampler_logprobs
    np.testing.assert_array_equal(got.advantages, rows.advantages)
    np.testing.assert_array_equal(got.trained, rows.trained)
    assert got.members is None


def test_a_state_is_told_as_it_is():
    state = {"b": (np.arange(3.0),), "a": np.ones((2, 2), np.float32)}
    got = of_leaves(jax.tree.map(np.zeros_like, state), leaves(state))
    assert jax.tree.all(jax.tree.map(np.array_equal, got, state))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 0, -1), "go together"),
        (("", 2, 0), "go together"),
        (("host:1", 2, 2), "ids from 0 to 1"),
        (("host", 2, 0), "host:port"),
    ],
)
def test_options_that_do_not_fit_are_bad_input(given, message):
    with pytest.raises(InputError, match=message):
        join(*given)


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_NTASKS": "4"},  # a batch script, before srun
        {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"},
        {"OMPI_MCA_orte_hnp_uri": "1;tcp://host:1", "OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_process_alone_looks_for_no_other(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # it would fail
    join("", 0, -1)


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"},
        {"OMPI_MCA_orte_hnp_uri": "1;tcp://host:1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
        {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"},
    ],
)
def test_one_of_several_asks_jax_who_is_there(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: asked.append(given))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    join("", 0, -1)
    assert asked == [(None, None, None)]


def start(argv: list[str], n: int) -> list[subprocess.Popen]:
    """The same command in n processes; one alone without the options of several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
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


def adapter(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / "adapters" / f"step_{step:06d}" / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_either_number_goes_on(root, tmp_path):
    """Three steps of four updates each with one process and with two, each of which has a half of
    the base; then two more, resumed with the other number, by whole bases."""
    config = tiny_config(
        root, n_grpo_steps=3, eval_every=3, n_prompts_per_step=6, epochs_per_step=2,
        updates_per_epoch=2, use_clip=True, entropy_coef=0.01, micro_batch_size=4,
    )  # fmt: skip
    file = write_config_file(tmp_path / "config.py", config)
    runs = {n: tmp_path / f"run{n}" for n in (1, 2)}
    for n, run in runs.items():
        said = ended(start(["--config", str(file), "--run_dir", str(run), "--fsdp", str(n)], n))
        assert "step_000003" in said[0]
        assert all("step" not in of_another for of_another in said[1:])  # one of them writes
    same(*runs.values(), step=3)
    for n, run in runs.items():
        ended(start(["--resume", str(run), "--n_grpo_steps", "5", "--fsdp", "1"], 3 - n))
    same(*runs.values(), step=5)


def same(one: Path, other: Path, step: int) -> None:
    first, a, b = adapter(one, 0), adapter(one, step), adapter(other, step)
    for key in a:
        np.testing.assert_allclose(b[key], a[key], atol=1e-5, rtol=0, err_msg=key)
    assert max(np.abs(a[key] - first[key]).max() for key in a) > 1e-3
    for x, y in zip(comparable(read_metrics(one)), comparable(read_metrics(other)), strict=True):
        assert x.keys() == y.keys()
        if "train/accuracy" in x:
            assert (x["step"], x["train/accuracy"]) == (y["step"], y["train/accuracy"])
    kinds = [{path.name.split(".")[0] for path in run.iterdir()} for run in (one, other)]
    assert kinds[0] == kinds[1]
