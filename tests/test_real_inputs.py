"""What other tools and careless data bring, through a whole run: verl's parquet as it is, golds
that no completion can meet, a chat template that writes the date."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_run import (
    SUMS,
    arrays_of,
    read_lines,
    same_bits,
    tiny_config,
    write_base,
    write_problems,
)

from jgrpo import train as loop
from jgrpo.errors import RunError
from jgrpo.rollout.protocol import Completion
from jgrpo.run.rundir import read_metrics
from jgrpo.run.screen import _Console
from jgrpo.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    write_base(folder / "base")
    write_problems(folder, answer="9")  # which the base never writes
    return folder


@pytest.mark.slow
def test_a_verl_file_trains_as_it_is(root):
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {a} + {b}?\n"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"split": "train", "index": i},
        }
        for i, (a, b) in enumerate(SUMS)
    ]
    file = root / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    run = train(
        tiny_config(
            root,
            dataset_path=str(file),
            eval_dataset_path="",
            n_grpo_steps=2,
            max_prompt_tokens=20,
            n_eval_prompts=4,
        )
    )
    steps = [row for row in read_metrics(run) if "train/loss" in row]
    assert len(steps) == 2
    assert 0 < max(row["train/accuracy"] for row in steps) < 1
    assert max(row["train/grad_norm"] for row in steps) > 0
    golds = {row["problem"]: row["gold"] for row in read_lines(run / "rollouts/step_000002.jsonl")}
    assert all(eval(problem[8:-1]) == int(gold) for problem, gold in golds.items())


@pytest.mark.slow
def test_a_run_whose_rewards_are_all_alike_says_what_to_look_at(root, capsys):
    run = train(tiny_config(root, n_grpo_steps=4, eval_every=0))
    assert all(row["train/zero_advantage_fraction"] == 1 for row in read_metrics(run))
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("all completions of a problem got the same reward (mean 0)") == 1
    assert "step 3: in the last 3 steps" in told
    assert "look at the gold answers" in told


@pytest.mark.slow
def test_a_run_whose_template_writes_the_time_is_resumed_later_and_keeps_its_own(root, caplog):
    base = shutil.copytree(root / "base", root / "dated")
    file = base / "chat_template.jinja"
    file.write_text("{{ strftime_now('%H:%M:%S.%f') }}" + file.read_text())
    config = tiny_config(
        root, model_id=str(base), max_prompt_tokens=40, n_grpo_steps=1, eval_every=0
    )
    run = train(config)
    began = json.loads((run / "config.json").read_text())["date"]
    caplog.clear()
    train(dataclasses.replace(config, n_grpo_steps=2), run)
    assert f"the chat template writes the date: prompts have that of {began[:16]}" in caplog.text
    for step in (1, 2):
        prompts = [row["prompt"] for row in read_lines(run / f"rollouts/step_{step:06d}.jsonl")]
        assert all(prompt.startswith(began.split()[1]) for prompt in prompts)


@pytest.mark.slow
@pytest.mark.parametrize("n_lines", [0, 2])
def test_a_reader_that_goes_away_at_any_line_is_told_how_to_go_on(n_lines, root, monkeypatch):
    """As `| head` does, before the first line of a run and after its second."""
    printed = []

    def gone(self, *_, **__):
        printed.append(1)
        if len(printed) > n_lines:
            self.on_broken_pipe()

    config = tiny_config(root, n_grpo_steps=1, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(_Console, "print", gone)
        patch.setattr("rich.console.Console.on_broken_pipe", sys.exit)
        with pytest.raises(RunError, match=r"went away.*\n.*to go on: .* --resume") as told:
            train(config)
    run = Path(str(told.value).split()[-1])
    train(config, run)
    assert [row["step"] for row in read_metrics(run)] == [1]


class Emptied:
    """A sampler whose completions have no tokens, once it samples for a step."""

    def __init__(self, sampler):
        self.sampler, self.is_probe = sampler, True

    def __getattr__(self, name):
        return getattr(self.sampler, name)

    def held(self):
        held = Emptied(self.sampler.held())
        held.is_probe = self.is_probe
        return held

    def load(self, folder):
        self.is_probe = folder.name.startswith("probe")
        self.sampler.load(folder)

    def sample(self, *args, **options):
        groups = self.sampler.sample(*args, **options)
        if self.is_probe:
            return groups
        return [[Completion([], [], "stop") for _ in group] for group in groups]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["empty", "all cut off and masked"])
def test_a_run_goes_through_steps_that_have_nothing_to_train_on(kind, root, monkeypatch):
    options = {"n_grpo_steps": 2, "use_length_penalty": True, "use_token_level_loss": True}
    if kind == "empty":
        real = loop.open_sampler
        monkeypatch.setattr(loop, "open_sampler", lambda *a, **k: Emptied(real(*a, **k)))
    else:
        options |= {"max_tokens": 2, "mask_truncated_completions": True}
        options |= {"expected_maximum_length": 2, "overlong_cache": 1}
    run = train(tiny_config(root, **options))
    for row in read_metrics(run):
        assert all(value is not None for value in row.values())  # NaN would be null
        if "train/loss" in row:
            tags = "train/loss", "train/grad_norm", "tokens/trained", "train/skipped_updates"
            assert [row[tag] for tag in tags] == [0, 0, 0, 0]
    first, *_, last = sorted((run / "adapters").iterdir())
    assert same_bits(arrays_of(first), arrays_of(last))
