"""Runs side by side, as a user starts them: what they may differ in, their folders, a stop and a
resume, one that ends early."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import (
    comparable,
    final_adapter,
    same_bits,
    tiny_config,
    write_config_file,
)

from jgrpo import cli
from jgrpo import train as train_module
from jgrpo.config import Config
from jgrpo.errors import InputError, RunError
from jgrpo.members import OWN, check_together, differing
from jgrpo.run.rundir import read_metrics
from jgrpo.train import train, train_together


def configs(root) -> list[Config]:
    plain = tiny_config(root)
    return [
        plain,
        replace(plain, lora_r=4, lr=3e-3, seed=7, epochs_per_step=2, use_clip=True),
        replace(plain, loss_type="dr_grpo", use_std_norm=False, use_dynamic_sampling=True),
    ]


@pytest.fixture(scope="module")
def runs(root):
    """Three runs side by side, and the first two of them alone."""
    company = train_together(configs(root))
    return company, [train(config) for config in configs(root)[:2]]


def completions(run: Path, step: int) -> list[str]:
    lines = (run / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line)["completion"] for line in lines]


@pytest.mark.slow
def test_each_has_the_folder_of_a_lone_run_and_the_same_results(runs):
    """The completions of all steps, the metrics and the adapter to rounding."""
    company, lone = runs
    for together, alone in zip(company, lone, strict=False):
        names = [
            sorted(
                f"{f.parent.name}/{f.name}"
                for f in (*run.glob("[ar]*/*"), *run.glob("checkpoints/*"))
            )
            for run in (together, alone)
        ]
        assert names[0] == names[1]
        ours, theirs = read_metrics(together), read_metrics(alone)
        assert [row.keys() for row in ours] == [row.keys() for row in theirs]
        for step in range(1, 5):
            assert completions(together, step) == completions(alone, step)
        for a, b in zip(ours, theirs, strict=True):
            for tag in ("train/loss", "train/grad_norm", "train/accuracy", "eval/accuracy"):
                if tag in a:
                    assert a[tag] == pytest.approx(b[tag], rel=1e-3, abs=1e-5), tag
        moved = [final_adapter(run) for run in (together, alone)]
        assert max(np.abs(moved[0][k] - moved[1][k]).max() for k in moved[0]) < 1e-4
    shape = json.loads((company[1] / "adapters/step_000004/adapter_config.json").read_text())
    assert (shape["r"], shape["lora_alpha"]) == (4, 32)


@pytest.mark.slow
def test_the_trainer_s_logprobs_are_kept_with_the_completions(runs):
    lines = (runs[0][1] / "rollouts/step_000002.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    known = [row for row in rows if row["trainer_logprobs"] is not None]
    assert known
    assert all(row["trainer_logprobs"] is not None for row in rows if row["advantage"])
    for row in known:
        np.testing.assert_allclose(row["trainer_logprobs"], row["sampler_logprobs"], atol=1e-4)


@pytest.mark.slow
def test_stopped_and_resumed_they_go_on_as_if_they_had_not_been(root, runs, monkeypatch, capsys):
    """To the bit: they are stopped between the second and the third member's lines of step 3; then
    the checkpoint of one is a step ahead."""
    real, calls = train_module.step_metrics, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(train_module, "step_metrics", interrupted)
    before = {f.name for f in (root / "runs").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        train_together(configs(root))
    monkeypatch.setattr(train_module, "step_metrics", real)
    new = {f.name for f in (root / "runs").iterdir()} - before
    stopped = sorted((root / "runs" / name for name in new), key=lambda f: int(f.name))
    told = " ".join(capsys.readouterr().out.split())
    assert "python -m jgrpo.train --resume " + " ".join(map(str, stopped)) in told
    command = cli.parse(cli.Train, ["--resume", *map(str, stopped)])
    train_together(command.members, command.resume)
    for again, whole in zip(stopped, runs[0], strict=True):
        assert comparable(read_metrics(again)) == comparable(read_metrics(whole))
        assert same_bits(final_adapter(again), final_adapter(whole))


@pytest.mark.slow
def test_one_member_goes_on_alone(root, runs):
    [first, *_] = [replace(c, n_grpo_steps=2) for c in configs(root)]
    others = [replace(c, n_grpo_steps=2) for c in configs(root)[1:]]
    company = train_together([first, *others])
    train(replace(first, n_grpo_steps=6), resume=company[0])
    assert [row["step"] for row in read_metrics(company[0])][-1] == 6
    with pytest.raises(InputError, match=r"cannot go on together.*resume those"):
        train_together([replace(c, n_grpo_steps=8) for c in configs(root)][:2], company[:2])


@pytest.mark.slow
def test_a_member_whose_updates_are_not_finite_ends_alone(root, monkeypatch):
    """Its rewards are infinite from step 2 on: three skipped updates end it at step 4 of 6, and the
    other goes on as it does alone."""
    plain = tiny_config(root, n_grpo_steps=6, eval_every=0)
    real, seen = train_module.Member.advantages, []

    def advantages(self, rollout):
        found = real(self, rollout)
        if self.config.seed == 7:
            seen.append(self)
            return found if len(seen) == 1 else found + np.float32(np.inf)
        return found

    monkeypatch.setattr(train_module.Member, "advantages", advantages)
    others = {f.name for f in (root / "runs").iterdir()}
    with pytest.raises(RunError, match=r"step 4: 1 update\(s\) skipped(?s:.*)3 in a row"):
        train_together([plain, replace(plain, seed=7)])
    first, second = sorted(
        (f for f in (root / "runs").iterdir() if f.name not in others), key=lambda f: int(f.name)
    )
    assert [row["step"] for row in read_metrics(first)] == [*range(1, 7)]
    assert [row["step"] for row in read_metrics(second)] == [*range(1, 5)]
    assert max(f.name for f in (second / "checkpoints").iterdir()) == "000004"
    monkeypatch.undo()
    alone = final_adapter(train(plain))
    together = final_adapter(first)
    assert max(np.abs(alone[k] - together[k]).max() for k in alone) < 1e-4


def test_what_they_must_share_is_told_by_name(root):
    plain = tiny_config(root)
    assert {f.name for f in dataclasses.fields(Config)} >= OWN
    assert differing(configs(root)) == []
    with pytest.raises(InputError, match=r"(?s)group_size: 8, 2.*Train them apart"):
        check_together([plain, replace(plain, group_size=2)])
    with pytest.raises(InputError, match="two runs cannot write into one folder"):
        check_together([replace(plain, run_dir="x")] * 2)


def test_the_command_line_names_several_configs_and_seeds(root, tmp_path):
    files = [str(write_config_file(tmp_path / f"{i}.py", c)) for i, c in enumerate(configs(root))]
    command = cli.parse(cli.Train, ["--config", *files, "--n_grpo_steps", "9"])
    assert [c.lora_r for c in command.members] == [1, 4, 1]
    assert [c.n_grpo_steps for c in command.members] == [9] * 3
    seeds = cli.parse(cli.Train, ["--config", files[1], "--seeds", "3", "4"]).members
    assert [(c.seed, c.lora_r) for c in seeds] == [(3, 4), (4, 4)]
    for words in (["--config"], ["--resume"]):
        with pytest.raises(InputError, match=words[0]):
            cli.parse(cli.Train, words)
