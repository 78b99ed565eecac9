"""Several processes, one run: what they are told arrives whole, and two train what one does."""

import jax
import numpy as np
import pytest
from processes import ended, same, start
from tiny_run import tiny_config, write_config_file

from jgrpo.errors import InputError
from jgrpo.policy.batch import Rows
from jgrpo.run.hosts import join
from jgrpo.run.together import as_arrays, as_rows, leaves, of_leaves, part, under


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
