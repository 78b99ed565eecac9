"""jgrpo.evaluate: the same figures as the run's own, for the base and for an adapter."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
from tiny_run import read_lines, tiny_config, write_base, write_config_file, write_problems

import jgrpo
from jgrpo import cli, evaluate
from jgrpo.answers import last_boxed
from jgrpo.errors import InputError
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.run.rundir import kept_adapters, read_metrics
from jgrpo.run.sampler import each_policy
from jgrpo.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_base(folder / "base")
    write_problems(folder, answer="5")  # which the base does not prefer, and learns to
    return folder


@pytest.fixture(scope="module")
def config(root):
    return tiny_config(root, lr=6e-3, n_grpo_steps=8, eval_every=8, lora_r=1)


@pytest.fixture(scope="module")
def run(config):
    return train(config)


def of_step(run: Path, step: int) -> dict:
    rows = (row for row in read_metrics(run) if row["step"] == step and "eval/total" in row)
    return {tag: value for tag, value in next(rows).items() if tag.startswith("eval/")}


def test_base_and_adapter_score_as_in_the_run(run, config, root, tmp_path, capsys):
    first, last = of_step(run, 0), of_step(run, 8)
    assert first != last  # otherwise it would not matter whether the adapter is loaded
    base = evaluate.run(cli.Evaluate(options=config))
    intervals = base.pop("intervals")
    assert base == {"adapter": None, **first}
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"adapter": None, **first, "intervals": intervals}
    low, high = intervals["eval/accuracy"]
    assert 0 <= low <= first["eval/accuracy"] <= high <= 1
    folder, out = run / "adapters" / "step_000008", tmp_path / "completions.jsonl"
    # the adapter's own rank and alpha hold, not the config's
    other = dataclasses.replace(config, lora_r=2, lora_alpha=1)
    figures = evaluate.run(cli.Evaluate(options=other, adapter=folder, out=out))
    assert figures.items() >= {"adapter": str(folder), "step": 8, **last}.items()
    rows = read_lines(out)
    assert len(rows) == last["eval/total"] == 8
    assert sum(row["correct"] for row in rows) == last["eval/correct"]
    for row in rows:
        assert row["correct"] == (f"\\boxed{{{row['gold']}}}" in row["completion"])
        assert row["problem"].startswith("What is ")
        assert row["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_the_command_prints_the_figures_last(run, config, tmp_path):
    file = write_config_file(tmp_path / "c.py", config)
    adapter = str(run / "adapters" / "step_000008")
    done = subprocess.run(
        [sys.executable, "-m", "jgrpo.evaluate", "--config", str(file), "--adapter", adapter],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    wanted = {"adapter": adapter, "step": 8, **of_step(run, 8)}
    assert json.loads(line).items() >= wanted.items()
    assert "accuracy" in done.stderr  # the table
    assert len(read_lines(run / "eval.jsonl")) == 8


def test_a_run_brings_its_config_and_its_adapters(run):
    last, first = run / "adapters" / "step_000008", run / "adapters" / "step_000000"
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


@pytest.mark.slow
def test_several_runs_are_evaluated_side_by_side_each_as_alone(run, config, monkeypatch):
    """Of two ranks; and as each run has evaluated itself."""
    other = train(dataclasses.replace(config, lora_r=2, seed=1, n_grpo_steps=2, eval_every=2))
    real, loaded = JaxSampler.load, []

    def load(self, *folders):
        loaded.append(folders)
        real(self, *folders)

    monkeypatch.setattr(JaxSampler, "load", load)
    command = cli.parse(cli.Evaluate, ["--run", str(run), str(other)])
    first, second = evaluate.run(command)["results"]
    assert first.items() >= {"step": 8, **of_step(run, 8)}.items()
    assert second.items() >= {"step": 2, **of_step(other, 2)}.items()
    assert [len(folders) for folders in loaded] == [2]
    for folder in (run, other):
        rows = read_lines(folder / "eval.jsonl")
        assert len(rows) == 8
        assert {Path(row["adapter"]).parent.parent for row in rows} == {folder}


def test_adapters_are_sampled_in_parts_as_large_as_each_other(run, config):
    """Nine in two parts of five: the last one fills up the second."""
    adapters = [None, *kept_adapters(run).values()]
    assert len(adapters) == 10
    found = [
        (part, jax.tree.leaves(sampler.adapter)[0].shape[0])
        for part, sampler in each_policy(config, adapters, ())
    ]
    assert [(len(part), n) for part, n in found] == [(1, 1), (5, 5), (4, 5)]
    assert [adapter for part, _ in found for adapter in part] == adapters


def test_runs_that_are_asked_otherwise_are_not_evaluated_together(run, tmp_path):
    saved = json.loads((run / "config.json").read_text())
    saved["config"] |= {"n_eval_prompts": 5, "lr": 0.5}
    for name in ("config.json", "adapters"):
        (tmp_path / name).symlink_to(run / name)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(saved))
    argv = ["--run", str(run), str(tmp_path)]
    with pytest.raises(InputError, match=r"evaluate otherwise.*\(n_eval_prompts: 8, 5\)"):
        cli.parse(cli.Evaluate, argv)
    assert len(cli.parse(cli.Evaluate, [*argv, "--n_eval_prompts", "3"]).run) == 2
    with pytest.raises(InputError, match="a run is given twice"):
        cli.parse(cli.Evaluate, ["--run", str(run), str(run)])


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
        evaluate.run(cli.Evaluate(options=config, adapter=tmp_path))
    with pytest.raises(InputError, match="there is no folder"):
        evaluate.run(cli.Evaluate(options=config, out=tmp_path / "nowhere" / "out.jsonl"))


def test_an_adapter_of_another_model_is_refused(run, config, tmp_path):
    from safetensors.numpy import load_file, save_file

    source, folder = run / "adapters" / "step_000008", tmp_path / "other"
    folder.mkdir()
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    arrays = load_file(source / "adapter_model.safetensors")
    renamed = {key.replace("layers.1.", "layers.7."): x for key, x in arrays.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\..* is missing"):
        evaluate.run(cli.Evaluate(options=config, adapter=folder))


def test_several_completions_a_problem(run, tmp_path):
    """The figures are recomputed here from the completions alone."""
    out = tmp_path / "eval.jsonl"
    argv = ["--run", str(run), "--step", "1", "--n_samples", "4", "--eval_temperature", "1.0"]
    figures = evaluate.run(cli.parse(cli.Evaluate, [*argv, "--out", str(out)]))
    rows = read_lines(out)
    assert len(rows) == figures["eval/total"] == 8 * 4
    groups = [[r for r in rows if r["index"] == i] for i in range(8)]
    assert [[r["sample"] for r in g] for g in groups] == [[0, 1, 2, 3]] * 8
    assert len({r["completion"] for r in rows}) > 2
    right = np.array([[r["correct"] for r in g] for g in groups])
    assert 0 < right.mean() < 1
    assert figures["eval/accuracy"] == pytest.approx(right.mean())
    assert figures["eval/pass@4"] == pytest.approx(right.any(axis=1).mean())
    pairs = [g[list(p)].any() for g in right for p in combinations(range(4), 2)]
    assert figures["eval/pass@2"] == pytest.approx(np.mean(pairs))
    boxed = [[last_boxed(r["completion"]) for r in g] for g in groups]
    won = []
    for answers in boxed:  # the answers are digits: as text they are equal or not
        counts = Counter(a for a in answers if a)
        leaders = [a for a, n in counts.items() if n == max(counts.values())]
        won.append(leaders.count("5") / len(leaders) if leaders else 0)
    assert figures["eval/maj@4"] == pytest.approx(np.mean(won))
    assert {"eval/accuracy", "eval/pass@2", "eval/maj@2", "eval/pass@4", "eval/maj@4"} == set(
        figures["intervals"]
    )


@pytest.mark.slow
def test_the_loop_evaluates_with_several_completions_too(root, run):
    config = tiny_config(root, n_grpo_steps=1, eval_n_samples=2, eval_temperature=1.0)
    last = of_step(train(config), 1)
    assert last["eval/total"] == 16
    assert last["eval/pass@2"] >= last["eval/accuracy"]


@pytest.mark.slow
def test_every_step_of_a_run_against_the_base(run, tmp_path, capsys):
    argv = ["--run", str(run), "--all_steps", "--against", "base"]
    command = cli.parse(cli.Evaluate, [*argv, "--out", str(tmp_path / "all.jsonl")])
    figures = evaluate.run(command)
    base, *steps = figures["results"]
    assert base["adapter"] is None
    assert [r["step"] for r in steps] == list(range(9))
    assert steps[0]["eval/accuracy"] == base["eval/accuracy"]  # a fresh adapter changes nothing
    for row in (of_step(run, 0), of_step(run, 8)):
        assert row in [{k: r[k] for k in row} for r in steps]
    last = figures["comparisons"][-1]
    gain = steps[-1]["eval/accuracy"] - base["eval/accuracy"]
    assert last["difference"] == pytest.approx(gain)
    assert len(last["rose"]) - len(last["fell"]) == round(8 * gain) > 0
    n = len(last["rose"]) + len(last["fell"])
    tail = scipy.stats.binom.cdf(len(last["fell"]), n, 0.5)
    assert last["p_value"] == pytest.approx(min(1, 2 * tail))
    told = capsys.readouterr().err
    assert "McNemar" in told
    assert f"rose: [{last['rose'][0]}] What is" in told
    assert (tmp_path / "eval_curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_adapters_of_different_rank_are_compared(root, run, tmp_path):
    fresh = jgrpo.load_model(str(root / "base"), lora_r=2)  # B = 0: it is the base
    jgrpo.save_adapter(fresh, tmp_path / "fresh")
    argv = ["--run", str(run), "--out", str(tmp_path / "eval.jsonl"), "--against"]
    figures = evaluate.run(cli.parse(cli.Evaluate, [*argv, str(tmp_path / "fresh")]))
    first, second = figures["results"]
    assert {k: first[k] for k in of_step(run, 0)} == of_step(run, 0)
    assert {k: second[k] for k in of_step(run, 8)} == of_step(run, 8)
    with pytest.raises(InputError, match="is what is evaluated"):
        evaluate.run(cli.parse(cli.Evaluate, [*argv, str(run)]))


def test_a_named_set_by_its_local_copy_and_what_it_shares_with_training(
    run, root, tmp_path, capsys
):
    trained = read_lines(root / "train.jsonl")[:2]
    new = [{"question": f"What is {a} - 1?", "answer": "so\n#### 5"} for a in (6, 7, 8)]
    text = "".join(json.dumps(row) + "\n" for row in [*trained, *new])
    (tmp_path / "gsm8k.jsonl").write_text(text)
    amc = [{"id": i, "question": f"What is {i} + 1?", "answer": 5.0} for i in range(3)]
    (tmp_path / "amc23.json").write_text(json.dumps(amc))
    argv = ["--run", str(run), "--eval_set", "gsm8k", "amc23", "--eval_set_folder", str(tmp_path)]
    figures = evaluate.run(cli.parse(cli.Evaluate, argv))
    assert [r["eval_set"] for r in figures["results"]] == ["gsm8k", "amc23"]
    assert [r["eval/total"] for r in figures["results"]] == [5, 3]
    assert [r["eval/accuracy"] for r in figures["results"]] == [1, 1]  # it has learned to say 5
    told = " ".join(capsys.readouterr().err.split())
    assert "gsm8k: 2 of 5 problems are training problems too" in told
    assert "amc23: 0 of" not in told
    assert "the set itself has 1319" in told


def test_options_that_do_not_fit_are_told(run, config):
    with pytest.raises(InputError, match="take one of the two"):
        cli.parse(cli.Evaluate, ["--run", str(run), "--all_steps", "--step", "1"])
    with pytest.raises(InputError, match="eval_n_samples=4 with eval_temperature=0"):
        dataclasses.replace(config, eval_n_samples=4)
    with pytest.raises(InputError, match=r"eval_top_p=0\.0: must be above 0"):
        dataclasses.replace(config, eval_top_p=0.0)
