"""--adapter: a run that begins from an adapter that PEFT made. What it takes from it, where the KL
is to it, and that such a run resumes and replays like any other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, get_peft_model
from test_replay import replay
from tiny_run import (
    arrays_of,
    comparable,
    final_adapter,
    peft_logprobs,
    read_lines,
    same_bits,
    tiny_config,
    write_base,
    write_config_file,
    write_problems,
)
from transformers import Qwen3ForCausalLM

from jgrpo import cli, serve
from jgrpo import train as train_module
from jgrpo.checks import without_effect
from jgrpo.config import Config
from jgrpo.errors import InputError
from jgrpo.run import memory
from jgrpo.run.policy import begun, open_policy
from jgrpo.run.rundir import read_config, read_metrics
from jgrpo.train import dry_run, train
from jgrpo.update.learner import ref_adapter

TARGETS = ("q_proj", "v_proj", "down_proj")


def write_start(base: Path, folder: Path, *, seed: int = 0, **options) -> Path:
    """An adapter with B that shows, in bfloat16, made and saved by PEFT."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)} | options
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begin")
    write_base(folder / "base")
    write_problems(folder)
    write_start(folder / "base", folder / "start")
    return folder


def begun_config(root: Path, **changes) -> Config:
    kl = {"use_kl_penalty": True, "beta": 0.5, "kl_to": "start", "lr": 2e-2}
    return tiny_config(root, **({"adapter": str(root / "start")} | kl | changes))


@pytest.fixture(scope="module")
def run(root):
    return train(begun_config(root))


def rollouts(run: Path, step: int) -> list[dict]:
    return read_lines(run / "rollouts" / f"step_{step:06d}.jsonl")


# -- what it takes from the adapter -----------------------------------------------------------


@pytest.mark.slow
def test_the_first_adapter_is_the_one_begun_from(run, root):
    start = arrays_of(root / "start")
    first = arrays_of(run / "adapters" / "step_000000")
    assert first.keys() == start.keys()
    assert all(np.array_equal(first[k], start[k].astype(np.float32)) for k in start)
    assert read_config(run)["config"]["lora_r"] == 4
    assert read_config(run)["inputs"].keys() == {"model", "problems", "adapter"}


@pytest.mark.slow
def test_the_first_completions_are_sampled_from_it(run, root):
    rows = rollouts(run, 1)[:8]
    reported = np.concatenate([row["sampler_logprobs"] for row in rows])
    other = write_start(root / "base", root / "other", seed=1)
    gap = lambda a: np.abs(reported - peft_logprobs(root / "base", a, rows, 1)).max()  # noqa: E731
    assert gap(root / "start") < 1e-4
    assert gap(other) > 1e-2


def test_rank_alpha_and_targets_come_from_it(root):
    config = begun(Config(adapter=str(root / "start")))
    assert (config.lora_r, config.lora_alpha, config.lora_target_modules) == (4, 8, TARGETS)
    same = Config(adapter=str(root / "start"), lora_r=4, lora_target_modules=TARGETS[::-1])
    assert begun(same) == config


@pytest.mark.parametrize(
    ("field", "value", "flag", "has"),
    [
        ("lora_r", 16, "--lora_r 16", "4"),
        ("lora_alpha", 16, "--lora_alpha 16", "8"),
        ("lora_target_modules", ("q_proj",), "--lora_target_modules q_proj", "'v_proj'"),
    ],
)
def test_an_option_that_contradicts_it_is_an_error_that_names_both(root, field, value, flag, has):
    start = str(root / "start")
    for ask in (
        lambda: begun(Config(adapter=start, **{field: value})),
        lambda: cli.parse(cli.Train, ["--adapter", start, *flag.split()]),
    ):
        with pytest.raises(InputError) as error:
            ask()
        for part in (start, field, f"{value!r}", has):
            assert part in str(error.value)


@pytest.mark.parametrize(
    ("named", "is_told"),
    [("Qwen/Qwen3-1.7B", True), ("/elsewhere/base", False), ("some/base", False), (None, False)],
)
def test_an_adapter_of_another_base_is_told(named, is_told, root, tmp_path, caplog):
    folder = shutil.copytree(root / "start", tmp_path / "start")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
    open_policy(begun(tiny_config(root, adapter=str(folder))), abstract=True)
    assert ("was made for the base Qwen/Qwen3-1.7B, and model_id is" in caplog.text) == is_told


def test_a_flag_that_repeats_the_default_is_asked_for_too(root):
    """A file's lora_r=1 cannot be told from none; a flag can."""
    start = ["--adapter", str(root / "start")]
    assert cli.parse(cli.Train, start).options.lora_r == 4
    assert cli.parse(cli.Train, [*start, "--lora-r=4"]).options.lora_r == 4
    for flag in (["--lora_r", "1"], ["--lora_alpha=32"]):
        with pytest.raises(InputError, match="and the adapter has"):
            cli.parse(cli.Train, [*start, *flag])


def test_the_server_is_started_for_its_rank(root):
    options = cli.parse(cli.Serve, ["--adapter", str(root / "start")]).options
    words = serve.command(options, cpu=True)
    assert words[words.index("--max-lora-rank") + 1] == "8"  # the smallest that holds 4


def test_rank_stabilised_scaling_is_kept(root, tmp_path):
    start = write_start(root / "base", tmp_path / "rs", use_rslora=True)
    config = begun(Config(adapter=str(start)))
    assert config.lora_alpha / config.lora_r == 8 / 4**0.5  # PEFT: alpha / sqrt(r)


@pytest.mark.slow
def test_a_run_folder_is_its_last_adapter(run):
    config = begun(Config(adapter=str(run)))
    assert config.adapter == str(run / "adapters" / "step_000004")
    assert config.lora_r == 4


def test_what_is_no_adapter_or_of_another_model_is_told_before_anything_is_spent(root, tmp_path):
    with pytest.raises(InputError, match=r"is no PEFT adapter"):
        train(tiny_config(root, adapter=str(tmp_path / "nothing")))
    other = shutil.copytree(root / "start", tmp_path / "other")
    arrays = arrays_of(other)
    from safetensors.numpy import save_file

    save_file({k: v[..., :-1] for k, v in arrays.items()}, other / "adapter_model.safetensors")
    config = tiny_config(root, adapter=str(other), base_dir=str(tmp_path / "runs"))
    for start in (train, lambda config: dry_run([config])):
        with pytest.raises(InputError, match="does not fit the model"):
            start(config)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_its_rank(root, monkeypatch, capsys):
    real, found = memory.training_memory, []
    monkeypatch.setattr(memory, "training_memory", lambda *x: found.append(real(*x)) or found[0])
    dry_run([begun_config(root)])
    n_floats = sum(x.size for x in arrays_of(root / "start").values())
    assert found[0].adapter - 4 * 4 * n_floats in range(64)  # it, its gradient, two moments
    assert "adapter, Adam's moments, gradient" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_of_such_a_run_still_knows_the_base(run):
    """--adapter of evaluate is its own; the run's does not stand in for the base."""
    command = cli.parse(cli.Evaluate, ["--run", str(run), "--against", "base"])
    assert command.adapter == run / "adapters" / "step_000004"
    from jgrpo.run.sampler import each_policy

    policies = [None, run / "adapters" / "step_000000"]
    asked = [rollouts(run, 1)[0]["prompt_ids"]]
    found = {}
    for [adapter], sampler in each_policy(command.options, policies, ()):
        [[one]] = sampler.sample(asked, seeds=[1], temperature=1.0)
        row = {"prompt_ids": asked[0], "token_ids": one.token_ids}
        found[adapter] = np.array(one.logprobs), row
    base, root = found[None], run.parent.parent
    model = Qwen3ForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    with torch.no_grad():
        ids = base[1]["prompt_ids"] + base[1]["token_ids"]
        table = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    n = len(base[1]["token_ids"])
    wanted = table[range(len(ids) - n - 1, len(ids) - 1), ids[-n:]].numpy()
    assert np.abs(base[0] - wanted).max() < 1e-4


# -- KL to it ---------------------------------------------------------------------------------


def k3_of_the_step(run: Path, step: int, other: Path) -> float:
    """mean over completions of their token means of exp(d) - d - 1, d = log other - log policy,
    by transformers and PEFT."""
    root, rows = run.parent.parent, rollouts(run, step)
    policy = run / "adapters" / f"step_{step - 1:06d}"
    ref, own = (np.array(peft_logprobs(root / "base", a, rows, 1)) for a in (other, policy))
    ends = np.cumsum([len(row["token_ids"]) for row in rows])[:-1]
    k3 = np.split(np.expm1(ref - own) - (ref - own), ends)
    return float(np.mean([x.mean() for x in k3]))


@pytest.mark.slow
def test_the_penalty_is_the_kl_to_the_adapter_begun_from(run):
    """With one update a rollout the ratio is 1, so that loss = mean of (beta k3 - A)."""
    start, last = (run / "adapters" / f"step_{k:06d}" for k in (0, 2))
    logged = {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}
    advantage = np.mean([row["advantage"] for row in rollouts(run, 3)])
    k3 = k3_of_the_step(run, 3, start)
    assert (logged[3] + advantage) / 0.5 == pytest.approx(k3, abs=2e-5)
    assert k3 > 5e-4  # else zero would have passed
    assert abs(k3_of_the_step(run, 3, last)) < 1e-6  # it is not to the policy that sampled


def test_without_an_adapter_start_is_the_base_and_is_said_to_be(root):
    to_start, to_base = (begun_config(root, adapter="", kl_to=to) for to in ("start", "base"))
    fresh = open_policy(to_start).adapter
    of_b = [
        [leaf for path, leaf in nnx.to_flat_state(ref_adapter(c, fresh)) if path[-1] == "lora_B"]
        for c in (to_start, to_base)
    ]
    assert not any(np.any(leaf[...]) for leaves in of_b for leaf in leaves)
    assert "kl_to=start is kl_to=base" in without_effect(to_start)[0]
    assert without_effect(to_base) == without_effect(begun_config(root)) == []


# -- going on ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(run, root, monkeypatch):
    real, calls = train_module.step_metrics, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    folder = root / "stopped"
    monkeypatch.setattr(train_module, "step_metrics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(begun_config(root, run_dir=str(folder)))
    monkeypatch.setattr(train_module, "step_metrics", real)
    command = cli.parse(cli.Train, ["--resume", str(folder)])
    train(command.options, resume=folder)
    assert comparable(read_metrics(folder)) == comparable(read_metrics(run))
    assert same_bits(final_adapter(folder), final_adapter(run))


@pytest.mark.slow
def test_a_start_that_changed_refuses_a_resume(run, root, tmp_path):
    folder, start = shutil.copytree(run, tmp_path / "run"), tmp_path / "start"
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.replace(str(root / "start"), str(start)))
    go_on = ["--resume", str(folder), "--n_grpo_steps", "5"]
    with pytest.raises(InputError, match=r"start"):  # it is gone
        train(cli.parse(cli.Train, go_on).options, resume=folder)
    write_start(root / "base", start, seed=1)
    with pytest.raises(InputError, match=r"its adapter changed since the run was started"):
        train(cli.parse(cli.Train, go_on).options, resume=folder)
    with pytest.raises(InputError, match=r"adapter: .* -> "):
        cli.parse(cli.Train, [*go_on, "--adapter", "another"])
    shutil.rmtree(start)
    shutil.copytree(root / "start", start)
    train(cli.parse(cli.Train, go_on).options, resume=folder)
    assert (folder / "adapters" / "step_000005").is_dir()


@pytest.mark.slow
def test_every_step_replays_to_the_bit_also_where_the_start_is_gone(run, root, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.replace(str(root / "start"), "gone"))
    for step in (1, 3):
        assert all(logged == now for logged, now in replay(folder, step).values())


def test_a_config_file_may_name_it(root, tmp_path):
    file = write_config_file(tmp_path / "c.py", begun_config(root))
    assert cli.parse(cli.Train, ["--config", str(file)]).options == begun(begun_config(root))
    assert replace(begun(begun_config(root)), adapter="").lora_r == 4
