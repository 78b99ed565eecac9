"""The study's experiments, flag by flag, on the tests' tiny model: each runs from the flags of the
command line, beside the others, and does to the numbers what it says and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import OWN_FUSIONS
from tiny_run import (
    final_adapter,
    read_lines,
    same_bits,
    tiny_config,
    write_base,
    write_config_file,
    write_prm,
    write_problems,
)

from jgrpo import cli
from jgrpo.run.rundir import read_metrics
from jgrpo.train import train_together

ROOT = Path(__file__).parents[2]
FLAGS = {
    "rank 4": "--lora_r 4",
    "no std": "--no_std_norm",
    "kl": "--use_kl_penalty --beta 0.04",
    "clip": "--use_clip --clip_eps 0.2",
    "token level": "--use_token_level_loss",
    "length penalty": "--use_length_penalty --expected_maximum_length 6 --overlong_cache 3",
    "prm": "--use_prm --process_reward_weight 0.5",
    "kl to the base": "--use_kl_penalty --kl_to base --beta 0.5",
    "dr grpo": "--loss_type dr_grpo --no_std_norm",
    "gspo": "--loss_type gspo --use_clip --clip_eps 3e-4 --updates_per_epoch 2",
    "cispo": "--loss_type cispo --updates_per_epoch 2",
    "rloo": "--loss_type rloo --use_leave_one_out --no_std_norm",
    "dapo": "--use_clip --clip_eps_high 0.28 --use_token_level_loss --use_dynamic_sampling",
    "the rest": "--use_importance_weights --entropy_coef 0.01 --mask_truncated_completions "
    "--lr_scheduler_type cosine --warmup_steps 1 --epochs_per_step 2",
    "custom": "--reward_function {root}/mine.py:reward",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_base(folder / "base")
    write_prm(folder / "prm")
    write_problems(folder)
    (folder / "mine.py").write_text(
        "def reward(completions, correct, **_):\n"
        "    return [2 * c - 0.1 * len(t) for c, t in zip(correct, completions)]\n"
    )
    options = {"n_grpo_steps": 2, "eval_every": 0, "prm_model_id": str(folder / "prm")}
    write_config_file(folder / "tiny.py", tiny_config(folder, **options))
    return folder


@pytest.fixture(scope="module")
def runs(root):
    """The folder of each experiment, trained from its flags; "" is the baseline. Side by side, so
    that they are compiled as one program."""
    lines = {"": "", **FLAGS}
    configs = [
        cli.parse(
            cli.Train, ["--config", str(root / "tiny.py"), *flags.format(root=root).split()]
        ).options
        for flags in lines.values()
    ]
    return dict(zip(lines, train_together(configs), strict=True))


def rollouts(run: Path, step: int) -> list[dict]:
    return read_lines(run / f"rollouts/step_{step:06d}.jsonl")


def last(run: Path) -> dict:
    return read_metrics(run)[-1]


@pytest.mark.parametrize("name", FLAGS)
def test_the_experiment_runs_and_all_that_it_logs_is_finite(runs, name):
    rows = [row for row in read_metrics(runs[name]) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(value) for row in rows for value in row.values())


def test_with_one_update_a_rollout_kl_and_clip_change_not_a_bit(root, tmp_path):
    """In a process of its own, whose programs are fused as a user's are."""
    lines = [
        ["--config", str(root / "tiny.py"), "--run_dir", str(tmp_path / name), *flags.split()]
        for name, flags in {"baseline": "", "kl": FLAGS["kl"], "clip": FLAGS["clip"]}.items()
    ]
    code = f"for line in {lines}: train(cli.parse(cli.Train, line).options)"
    subprocess.run(
        [sys.executable, "-c", f"from jgrpo import cli\nfrom jgrpo.train import train\n{code}"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": OWN_FUSIONS}, check=True,
    )  # fmt: skip
    baseline, kl, clip = (final_adapter(tmp_path / name) for name in ("baseline", "kl", "clip"))
    assert same_bits(kl, baseline)
    assert same_bits(clip, baseline)


@pytest.mark.parametrize("name", [n for n in FLAGS if n not in ("kl", "clip", "rank 4")])
def test_every_other_technique_changes_the_adapter(runs, name):
    assert not same_bits(final_adapter(runs[name]), final_adapter(runs[""]))


def test_rank_4_is_of_rank_4(runs):
    shapes = {k: v.shape for k, v in final_adapter(runs["rank 4"]).items()}
    assert all(4 in shape for shape in shapes.values())


def test_every_part_of_the_reward_is_logged_and_adds_up(runs):
    for name, part in (("length penalty", "length_penalty"), ("prm", "process")):
        for line in rollouts(runs[name], 1):
            parts = line["reward_parts"]
            assert parts.keys() == {"outcome", part}
            by_hand = {
                "prm": 0.5 * parts["outcome"] + 0.5 * parts.get("process", 0),
                "length penalty": parts["outcome"] + parts.get("length_penalty", 0),
            }[name]
            assert line["reward"] == pytest.approx(by_hand, abs=1e-6)
        values = [line["reward_parts"][part] for line in rollouts(runs[name], 2)]
        assert last(runs[name])[f"reward/{part}"] == pytest.approx(np.mean(values), abs=1e-6)
        assert np.std(values) > 1e-3  # a part that is the same for all would say nothing


def test_process_scores_are_probabilities_and_accuracy_stays_that_of_the_outcome(runs):
    lines = rollouts(runs["prm"], 2)
    assert all(0 < line["reward_parts"]["process"] < 1 for line in lines)
    outcomes = [line["reward_parts"]["outcome"] for line in lines]
    assert last(runs["prm"])["train/accuracy"] == pytest.approx(np.mean(outcomes))


def test_a_reward_of_one_s_own_takes_the_outcome_s_place(runs):
    for line in rollouts(runs["custom"], 1):
        by_hand = 2 * line["reward_parts"]["outcome"] - 0.1 * len(line["completion"])
        assert line["reward"] == pytest.approx(by_hand, abs=1e-5)


def test_several_updates_move_the_ratio_and_one_does_not(runs):
    assert last(runs[""])["train/approx_kl"] < 1e-9
    assert last(runs["cispo"])["train/approx_kl"] > 1e-7
    assert last(runs["gspo"])["train/clip_fraction"] > 0  # widths of 3e-4 bind soon


def test_dynamic_sampling_trains_on_mixed_groups_as_far_as_it_finds_them(runs):
    row = last(runs["dapo"])
    assert row["train/sampling_rounds"] >= 1
    plain, dynamic = (
        np.mean([row["train/zero_advantage_fraction"] for row in read_metrics(runs[name])])
        for name in ("", "dapo")
    )
    assert dynamic <= plain


def test_the_learning_rate_is_logged(runs):
    rows = read_metrics(runs["the rest"])
    assert [row["train/lr"] for row in rows] == pytest.approx([0.0, 2e-3 * 0.75])
