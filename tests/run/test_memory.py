"""What `--dry_run` says of memory: counted by hand, compiled, and before weights are read."""

import re

import jax
import numpy as np
import pytest
from conftest import as_main
from jax.errors import JaxRuntimeError
from tiny_run import (
    comparable,
    final_adapter,
    same_bits,
    tiny_config,
    write_base,
    write_config_file,
)

from jgrpo import train as train_module
from jgrpo.errors import InputError, RunError
from jgrpo.policy.adapter import adapter_arrays
from jgrpo.policy.backend import CPU, GPU
from jgrpo.policy.batch import SLOT_COST, Rows, micro_batches
from jgrpo.run import memory as memory_module
from jgrpo.run import sampler
from jgrpo.run.memory import free_memory, largest_micro_batch, ran_out, training_memory
from jgrpo.run.policy import open_policies
from jgrpo.run.rundir import read_metrics
from jgrpo.run.sampler import sampled_at_once
from jgrpo.train import dry_run, train
from jgrpo.update.step import Update


def test_the_largest_micro_batch_has_completions_as_long_as_they_may_be(root):
    config = tiny_config(root, micro_batch_size=8, max_tokens=20)
    batch = largest_micro_batch(config, [3, 18, 5, 7, 2, 18])
    # At most 8 x bucket(38) = 384 tokens: in 3 + 8 rows of 64, which is more slots than a prompt
    # and 5 rows, all of it computed. Eight completions are three to a row.
    assert (batch.prompts.shape, batch.rows.shape, batch.n_tokens) == ((3, 64), (8, 64), 384)
    assert batch.mask.sum() == 16 * 20  # two groups
    assert batch.mask.sum(axis=1).max() == 20


def test_no_rollout_has_a_larger_micro_batch(root):
    config, rng = tiny_config(root, max_tokens=100), np.random.default_rng(0)
    computed = lambda b: b.n_tokens + SLOT_COST * (b.prompts.size + b.rows.size)  # noqa: E731
    largest = computed(largest_micro_batch(config, [18] * 8))
    limits = {"micro_batch_size": 8, "max_prompt_tokens": 18, "max_tokens": 100}
    for mean in (5, 20, 50, 100):
        completions = [[0] * n for n in np.minimum(100, 1 + rng.poisson(mean, 32))]
        prompts = [[i // 8] * 18 for i in range(32)]
        rows = Rows(prompts, completions, completions, np.ones(32, np.float32))
        batch = micro_batches(rows, np.arange(32), **limits)[0]
        assert computed(batch) <= 1.02 * largest  # rows are rounded up


def test_weights_are_counted_and_activations_are_the_compiler_s(root):
    config = tiny_config(root)
    policy = open_policies([config], abstract=True)
    real = open_policies([config])
    memory = training_memory([config], policy, [18] * 8)
    assert memory.base == sum(x.nbytes for x in jax.tree.leaves(real.base))
    weights = sum(x.nbytes for x in adapter_arrays(real.adapter).values())
    assert 4 * weights <= memory.adapter <= 4 * weights + 64  # and Adam's counters
    assert memory.total == memory.base + memory.adapter + memory.activations
    # One layer's activations at the very least: seven products and the attention's weights.
    assert memory.activations > 4 * memory.batch.n_tokens * (4 * 64 + 3 * 96)


@pytest.mark.slow
def test_more_tokens_at_once_take_more(root):
    policy = open_policies([tiny_config(root)], abstract=True)
    sizes = [
        training_memory([tiny_config(root, micro_batch_size=n)], policy, [18] * 8).activations
        for n in (8, 32)
    ]
    assert 1.5 < sizes[1] / sizes[0] < 6


def test_a_dry_run_reads_no_weights_and_leaves_nothing(root, tmp_path, monkeypatch, capsys):
    write_base(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    config = tiny_config(root, model_id=str(tmp_path / "base"), base_dir=str(tmp_path / "runs"))
    file = write_config_file(tmp_path / "c.py", config)
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or else the process starts itself again
    as_main("train", "--config", str(file), "--dry_run")
    said = capsys.readouterr().out
    assert re.search(r"training phase at its peak +0\.\d{3} GiB", said)
    assert "the embedded sampler decodes 32 of 32 completions at once" in said
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_finds_bad_input(root):
    with pytest.raises(InputError, match="no training problem is left"):
        dry_run([tiny_config(root, max_prompt_tokens=2)])


def test_what_does_not_fit_is_said_with_the_knobs(root):
    policy = open_policies([tiny_config(root)], abstract=True)
    memory = training_memory([tiny_config(root)], policy, [18] * 8)
    assert "does not fit" not in memory.table(memory.total)
    text = memory.table(memory.total - 1)
    assert "This does not fit: a smaller --micro_batch_size or --gradient_checkpointing" in text
    assert "free now" not in memory.table(None)


def test_the_sampler_decodes_as_many_rows_as_fit(root):
    # Two layers with one head of 32 for keys and one for values: 512 bytes a token. Of 6 completion
    # tokens, 6 more in a stage before and 18 / 8 of the prompt; and four rows of logits.
    config = tiny_config(root)  # 4 x 8 completions
    policy = open_policies([config], abstract=True)
    n_vocab = policy.base["lm_head"]["kernel"].shape[-1]
    a_row = 512 * (6 + 6 + 18 / 8) + 16 * n_vocab
    for free, n in (
        (None, 32), (32 * a_row, 32), (32 * a_row - 1, 16), (8 * a_row, 8), (0, 8), (-5, 8),
    ):  # fmt: skip
        assert sampled_at_once(config, policy, free) == n


def test_members_are_decoded_together_where_that_suits_the_device(root, monkeypatch):
    policy = open_policies([tiny_config(root, seed=seed) for seed in range(3)], abstract=True)
    for backend, n in ((CPU, 32), (GPU, 96)):
        monkeypatch.setattr(sampler, "backend", lambda backend=backend: backend)
        assert sampled_at_once(tiny_config(root), policy, None) == n


def test_free_memory_is_less_than_the_machine_s():
    free = free_memory()
    assert free is None or 2**26 < free < 2**50


@pytest.mark.slow
def test_running_out_of_memory_ends_the_run_with_the_knobs_and_a_checkpoint(root, monkeypatch):
    real, calls = train_module.SharedLearner.learn, []

    def learn(self, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")
        return real(self, rows)

    monkeypatch.setattr(train_module.SharedLearner, "learn", learn)
    with pytest.raises(RunError) as error:
        train(tiny_config(root))
    assert re.match(r"out of memory: a smaller --micro_batch_size.*RESOURCE_EXHAUSTED",
                    str(error.value))  # fmt: skip
    assert "stopped after step 1; to go on: python -m jgrpo.train --resume" in str(error.value)


@pytest.mark.slow
def test_a_model_that_is_not_small_tries_its_largest_micro_batch_before_it_samples(
    root, monkeypatch
):
    """And forgets it: the run is the one without."""
    plain = train(tiny_config(root, eval_every=0))
    monkeypatch.setattr(memory_module, "free_memory", lambda: 10**6)
    seen, probe, gradient = [], train_module.check_sampler, Update.gradient

    def probed(*args):
        seen.append("probe")
        return probe(*args)

    def rehearsed(*args):
        seen.append(args[3])
        return gradient(*args)

    monkeypatch.setattr(train_module, "check_sampler", probed)
    monkeypatch.setattr(Update, "gradient", rehearsed)
    run = train(tiny_config(root, eval_every=0))
    [batch], last = seen
    assert last == "probe"
    longest = largest_micro_batch(tiny_config(root), [18] * 4)
    assert [x.shape for x in batch] == [x.shape for x in longest]
    assert same_bits(final_adapter(run), final_adapter(plain))
    assert comparable(read_metrics(run)) == comparable(read_metrics(plain))


def test_a_micro_batch_that_does_not_fit_ends_the_run_before_anything_is_sampled(root, monkeypatch):
    monkeypatch.setattr(memory_module, "free_memory", lambda: 10**6)

    def gradient(*_):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    monkeypatch.setattr(Update, "gradient", gradient)
    monkeypatch.setattr(train_module, "check_sampler", None)  # nobody comes so far
    with pytest.raises(RunError, match="out of memory: a smaller --micro_batch_size"):
        train(tiny_config(root))


def test_only_that_is_out_of_memory():
    assert not ran_out(JaxRuntimeError("INTERNAL: no"))
    assert not ran_out(MemoryError())
