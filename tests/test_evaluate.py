"""jgrpo.evaluate: the same figures as the run's own, for the base and for an adapter."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import read_lines, tiny_config, write_base, write_config_file, write_problems

from jgrpo import cli, evaluate
from jgrpo.errors import InputError
from jgrpo.run.rundir import read_metrics
from jgrpo.train import train

pytestmark = pytest.mark.usefixtures("shared_compilation_cache")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_base(folder / "base")
    write_problems(folder, answer="5")  # which the base does not prefer, and learns to
    return folder


@pytest.fixture(scope="module")
def config(root):
    return tiny_config(root, lr=3e-3, n_grpo_steps=16, eval_every=16, lora_r=1)


@pytest.fixture(scope="module")
def run(config):
    return train(config)


def of_step(run: Path, step: int) -> dict:
    rows = (row for row in read_metrics(run) if row["step"] == step and "eval/total" in row)
    return {tag: value for tag, value in next(rows).items() if tag.startswith("eval/")}


def test_base_and_adapter_score_as_in_the_run(run, config, root, tmp_path, capsys):
    first, last = of_step(run, 0), of_step(run, 16)
    assert first != last  # otherwise it would not matter whether the adapter is loaded
    base = evaluate.run(config, None, None)
    assert base == first
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"adapter": None, **first}
    folder, out = run / "adapters" / "step_000016", tmp_path / "completions.jsonl"
    # the adapter's own rank and alpha hold, not the config's
    other = dataclasses.replace(config, lora_r=2, lora_alpha=1)
    assert evaluate.run(other, folder, out) == last
    rows = read_lines(out)
    assert len(rows) == last["eval/total"] == 8
    assert sum(row["correct"] for row in rows) == last["eval/correct"]
    for row in rows:
        assert row["correct"] == (f"\\boxed{{{row['gold']}}}" in row["completion"])
        assert row["problem"].startswith("What is ")
        assert row["finish_reason"] in ("stop", "length")


def test_the_command_prints_the_figures_last(run, config, tmp_path):
    file = write_config_file(tmp_path / "c.py", config)
    adapter = str(run / "adapters" / "step_000016")
    done = subprocess.run(
        [sys.executable, "-m", "jgrpo.evaluate", "--config", str(file), "--adapter", adapter],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"adapter": adapter, **of_step(run, 16)}


def test_a_run_brings_its_config_and_its_adapters(run):
    last, first = run / "adapters" / "step_000016", run / "adapters" / "step_000000"
    for argv, adapter in (
        (["--run", str(run)], last),
        (["--run", str(run), "--step", "0"], first),
        (["--adapter", str(run)], last),
        (["--adapter", str(first)], first),
    ):
        command = cli.parse(cli.Evaluate, argv)
        assert command.options == cli.resumed_config(run), argv
        assert command.adapter == adapter, argv
    command = cli.parse(cli.Evaluate, ["--run", str(run), "--n_eval_prompts", "3"])
    assert command.options == dataclasses.replace(cli.resumed_config(run), n_eval_prompts=3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "3"], "--run RUN"),
        (["--run", "RUN", "--config", "FILE"], "leave --config away"),
        (["--run", "RUN", "--adapter", "RUN"], "leave --adapter away"),
        (["--run", "RUN", "--step", "77"], "step_000077"),
        (["--run", "nowhere"], "nowhere: not a run folder"),
    ],
)
def test_a_run_that_does_not_fit_is_told(run, config, tmp_path, argv, message):
    names = {"RUN": str(run), "FILE": str(write_config_file(tmp_path / "c.py", config))}
    with pytest.raises(InputError, match=message):
        cli.parse(cli.Evaluate, [names.get(a, a) for a in argv])


def test_a_run_without_an_adapter_is_told(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "adapters").mkdir()
    with pytest.raises(InputError, match="no adapter yet"):
        cli.parse(cli.Evaluate, ["--run", str(tmp_path)])


def test_what_cannot_be_evaluated_is_told_before_anything_is_computed(config, tmp_path):
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        evaluate.run(config, tmp_path, None)
    with pytest.raises(InputError, match="there is no folder"):
        evaluate.run(config, None, tmp_path / "nowhere" / "out.jsonl")


def test_an_adapter_of_another_model_is_refused(run, config, tmp_path):
    from safetensors.numpy import load_file, save_file

    source, folder = run / "adapters" / "step_000016", tmp_path / "other"
    folder.mkdir()
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    arrays = load_file(source / "adapter_model.safetensors")
    renamed = {key.replace("layers.1.", "layers.7."): x for key, x in arrays.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\..* is missing"):
        evaluate.run(config, folder, None)
