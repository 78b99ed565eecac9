"""jgrpo.replay on real runs: what was logged comes out again, unless somebody changed the run."""

import json
import shutil
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_run import (
    comparable,
    final_adapter,
    same_bits,
    tiny_config,
)

from jgrpo import replay as module
from jgrpo.errors import InputError
from jgrpo.replay import difference, replay
from jgrpo.run.rundir import read_metrics
from jgrpo.train import train


@pytest.fixture(scope="module")
def run(root):
    return train(tiny_config(root, eval_every=0))


@pytest.mark.slow
def test_every_step_comes_out_to_the_bit(run):
    for row in read_metrics(run):
        figures = replay(run, row["step"])
        assert {"train/loss", "train/grad_norm", "train/entropy", "tokens/trained"} <= set(figures)
        assert all(logged == now for logged, now in figures.values())
        # Adam's state is in the checkpoints after steps 2 and 4 alone.
        assert ("adapter/largest_difference" in figures) == (row["step"] == 3)


@pytest.mark.slow
def test_several_updates_a_rollout_need_the_checkpoint_before_them(root):
    run = train(tiny_config(root, eval_every=0, epochs_per_step=2, use_clip=True))
    assert all(logged == now for logged, now in replay(run, 3).values())
    with pytest.raises(InputError, match="--step can be 3"):
        replay(run, 4)


@pytest.mark.slow
def test_several_updates_an_epoch_come_out_to_the_bit_and_a_resume_goes_on_with_them(root):
    """Two parts of a rollout, each an update: the parts are dealt alike in the run, in the run that
    was stopped after step 2, and in the replay. JAX_ENABLE_X64 changes none of it."""
    config = tiny_config(root, eval_every=0, updates_per_epoch=2, use_clip=True)
    whole, stopped = train(config), train(replace(config, n_grpo_steps=2))
    jax.config.update("jax_enable_x64", True)  # what the environment variable does
    try:
        train(config, resume=stopped)
        assert all(logged == now for logged, now in replay(stopped, 3).values())
    finally:
        jax.config.update("jax_enable_x64", False)
    assert same_bits(final_adapter(stopped), final_adapter(whole))
    assert comparable(read_metrics(stopped)) == comparable(read_metrics(whole))
    assert {x.dtype for x in final_adapter(stopped).values()} == {np.dtype("float32")}


@pytest.mark.parametrize("field", ["advantage", "token_ids"])
def test_another_rollout_is_not_what_was_logged(run, tmp_path, field, monkeypatch, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "rollouts" / "step_000002.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    chosen = next(line for line in lines if line["advantage"])
    chosen[field] = chosen[field] * 1.1 if field == "advantage" else chosen[field][::-1]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["replay", str(copy), "--step", "2"])
    with pytest.raises(SystemExit, match="1"):
        module.main()
    assert "not what was logged: " in capsys.readouterr().err


def test_the_command_confirms(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["replay", str(run), "--step", "1"])
    module.main()
    assert "\nconfirmed: loss and gradient" in (out := capsys.readouterr().out)
    assert out.endswith(", to the bit\n")


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"--step 5: .* has logged the steps 1 to 4"):
        replay(run, 5)
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "adapters" / "step_000001")
    with pytest.raises(InputError, match=r"there is no .*step_000001"):
        replay(copy, 2)


def test_nan_again_is_no_difference():
    assert difference(float("nan"), float("inf")) == 0
    assert difference(float("nan"), 1.0) == difference(1.0, float("inf")) == float("inf")
    assert difference(2.0, 1.0) == 0.5
