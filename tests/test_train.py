"""jgrpo.train as a whole, on a model of 70 thousand parameters with the embedded sampler: what a
run leaves behind, that it repeats itself to the bit (resumed or not), and that it learns."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny_run import (
    arrays_of,
    comparable,
    curves,
    final_adapter,
    peft_logprobs,
    read_lines,
    same_bits,
    tiny_config,
    write_config_file,
    write_problems,
)

from jgrpo import train as train_module
from jgrpo.errors import InputError, RunError
from jgrpo.run import member
from jgrpo.run.rundir import claimed, read_config, read_metrics
from jgrpo.tiny.recipe import END, make_tokenizer
from jgrpo.train import Loop, train

ROOT = Path(__file__).parent.parent
STEP_TAGS = {
    "train/accuracy", "train/reward_mean", "train/loss", "train/approx_kl", "train/grad_norm",
    "train/entropy", "train/clip_fraction", "train/avg_gen_length", "train/zero_advantage_fraction",
    "train/truncated_fraction", "train/boxed_fraction", "sampler/logprob_diff_mean",
    "sampler/logprob_diff_max", "sampler/kl", "time/step", "time/generation", "time/reward",
    "time/training", "time/export", "time/reload", "tokens/trained", "tokens/generated",
}  # fmt: skip
EVAL_TAGS = {"eval/accuracy", "eval/correct", "eval/total"}
ROLLOUT_FIELDS = {
    "prompt", "completion", "token_ids", "sampler_logprobs", "gold", "reward", "advantage",
    "finish_reason",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(root):
    """Four steps, from the beginning to the end."""
    return train(tiny_config(root))


def steps_of(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if "train/loss" in row]


def rollouts(run: Path, step: int) -> list[dict]:
    return read_lines(run / "rollouts" / f"step_{step:06d}.jsonl")


# -- what a run leaves behind -----------------------------------------------------------------


def test_a_run_leaves_the_files_that_others_rely_on(run, root):
    assert run == root / "runs" / "1"
    adapters = sorted(f.name for f in (run / "adapters").iterdir())
    assert adapters == [f"step_{k:06d}" for k in range(5)]  # and no probe
    for name in adapters:
        files = {f.name for f in (run / "adapters" / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert sorted(f.name for f in (run / "rollouts").iterdir()) == [
        f"step_{k:06d}.jsonl" for k in range(1, 5)
    ]
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["000002", "000004"]
    assert list(run.glob("events.out.tfevents*"))
    assert (run / "curves.png").stat().st_size > 1000
    saved = read_config(run)
    assert saved["config"]["lr"] == 2e-3
    assert saved["seed"] == 42
    assert saved["devices"]


def test_every_step_and_every_evaluation_is_a_line_with_all_tags(run):
    rows = read_metrics(run)
    assert [(row["step"], "eval/total" in row) for row in rows] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True),
    ]  # fmt: skip
    for row in rows:
        wanted = EVAL_TAGS if "eval/total" in row else STEP_TAGS
        assert wanted <= row.keys()
        assert all(isinstance(row[tag], float | int) for tag in wanted)  # no null: all finite
    assert all(row["sampler/logprob_diff_max"] < 1e-4 for row in steps_of(run))


def test_rollouts_say_what_was_sampled_and_what_it_was_worth(run):
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END)
    for step in (1, 4):
        rows = rollouts(run, step)
        assert len(rows) == 32
        for row in rows:
            assert row.keys() >= ROLLOUT_FIELDS
            assert row["prompt"].endswith("<|im_start|>assistant\n")
            assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
            *ids, last = row["token_ids"]
            assert (last == end) == (row["finish_reason"] == "stop")
            assert end not in ids
            assert tokenizer.decode(ids if last == end else [*ids, last]) == row["completion"]
            assert len(row["sampler_logprobs"]) == len(row["token_ids"]) <= 6
            a, b = map(int, re.findall(r"\d", row["prompt"]))
            assert row["gold"] == str(a + b)
            digits = re.findall(r"\\boxed\{(.*?)\}", row["completion"])
            assert row["reward"] == float(digits[-1:] == [row["gold"]])


def test_advantages_follow_the_formula_within_each_group(run):
    mixed = 0
    for step in range(1, 5):
        rows = rollouts(run, step)
        for p in range(4):
            group = rows[8 * p : 8 * p + 8]
            assert len({row["prompt"] for row in group}) == 1
            r = np.array([row["reward"] for row in group])
            equal = r.min() == r.max()
            expected = np.zeros(8) if equal else (r - r.mean()) / (r.std(ddof=1) + 1e-4)
            np.testing.assert_allclose([x["advantage"] for x in group], expected, rtol=1e-5)
            mixed += not equal
    assert mixed >= 8  # otherwise this, and all tests of equal adapters below, would say little


def test_metrics_are_those_of_the_rollouts(run):
    for row in steps_of(run):
        rows = rollouts(run, row["step"])
        lengths = np.array([len(x["token_ids"]) for x in rows])
        advantages = np.array([x["advantage"] for x in rows])
        assert row["train/accuracy"] == row["train/reward_mean"]
        assert row["train/reward_mean"] == pytest.approx(np.mean([x["reward"] for x in rows]))
        assert row["train/avg_gen_length"] == pytest.approx(lengths.mean())
        assert row["tokens/generated"] == lengths.sum()
        assert row["tokens/trained"] == lengths[advantages != 0].sum()
        assert row["train/zero_advantage_fraction"] == (advantages == 0).mean()
        truncated = np.mean([x["finish_reason"] == "length" for x in rows])
        assert row["train/truncated_fraction"] == pytest.approx(truncated)
        boxed = np.mean(["\\boxed{" in x["completion"] for x in rows])
        assert row["train/boxed_fraction"] == pytest.approx(boxed, abs=0.04)  # one may be cut


def test_rollouts_of_a_step_come_from_the_adapter_before_it(run, root):
    """By transformers and PEFT; off by one step would be off by what an update changes."""
    rows = rollouts(run, 4)[:8]
    reported = np.concatenate([row["sampler_logprobs"] for row in rows])
    gaps = {
        k: np.abs(reported - peft_logprobs(root / "base", run / f"adapters/step_{k:06d}", rows, 1))
        for k in (0, 2, 3, 4)
    }
    assert gaps[3].max() < 1e-5
    assert min(gaps[k].max() for k in (0, 2, 4)) > 1e-3


def test_the_first_adapter_is_fresh_and_each_step_changes_every_part_of_it(run):
    files = sorted((run / "adapters").iterdir())
    adapters = [arrays_of(f) for f in files]
    assert all(not adapters[0][k].any() for k in adapters[0] if "lora_B" in k)
    assert all(adapters[0][k].any() for k in adapters[0] if "lora_A" in k)
    assert len(adapters[0]) == 2 * 7 * 2  # A and B, seven projections, two layers
    for before, after in pairwise(adapters[1:]):
        assert all(not np.array_equal(before[key], after[key]) for key in before)


# -- repeating, stopping, going on ------------------------------------------------------------


@pytest.mark.slow
def test_the_same_config_gives_the_same_run_to_the_bit(run, root):
    again = train(tiny_config(root))
    assert again.name == "2"
    assert comparable(read_metrics(again)) == comparable(read_metrics(run))
    assert same_bits(final_adapter(again), final_adapter(run))
    for file in (run / "rollouts").iterdir():
        assert (again / "rollouts" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_another_seed_gives_another_run(run, root):
    other = train(tiny_config(root, seed=43, n_grpo_steps=1, eval_every=0))
    assert not same_bits(arrays_of(other / "adapters/step_000000"),
                         arrays_of(run / "adapters/step_000000"))  # fmt: skip
    assert [r["token_ids"] for r in rollouts(other, 1)] != [
        r["token_ids"] for r in rollouts(run, 1)
    ]


@pytest.mark.slow
def test_a_run_that_is_made_longer_is_the_longer_run(run, root):
    config = tiny_config(root, n_grpo_steps=2)
    short = train(config)
    train(dataclasses.replace(config, n_grpo_steps=4), resume=short)
    assert comparable(read_metrics(short)) == comparable(read_metrics(run))
    assert same_bits(final_adapter(short), final_adapter(run))
    saved = read_config(short)
    assert saved["config"]["n_grpo_steps"] == 4
    [resume] = saved["resumes"]
    assert (resume["step"], resume["changed"]) == (2, {"n_grpo_steps": [2, 4]})
    assert resume.keys() > {"command", "git_commit", "versions", "hardware", "devices"}


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_three_in_a_row_end_the_run(
    root, monkeypatch, capsys
):
    """Steps 2, and 4 to 6."""
    real, steps = member.group_advantages, []

    def huge(rewards, std_norm):
        steps.append(len(steps) + 1)
        bad = np.full(rewards.shape, 3e38, np.float32)
        return bad if steps[-1] in (2, 4, 5, 6) else real(rewards, std_norm)

    monkeypatch.setattr(member, "group_advantages", huge)
    with pytest.raises(RunError, match=r"step 6.*not finite(?s:.*)3 in a row(?s:.*)--resume"):
        train(tiny_config(root, n_grpo_steps=8, eval_every=0))
    assert "step 2: 1 update(s) skipped" in capsys.readouterr().out.replace("\n", " ")
    stopped = max((root / "runs").iterdir(), key=lambda f: int(f.name))
    rows = read_metrics(stopped)
    assert [row["train/skipped_updates"] for row in rows] == [0, 1, 0, 1, 1, 1]
    counts = [train_module.skipped_at_the_end(rows[:k], 1) for k in range(7)]
    assert counts == [0, 0, 1, 0, 1, 2, 3]  # what a resumed run begins with
    assert [row["train/loss"] is None for row in rows] == [False, True, False, True, True, True]
    adapters = [arrays_of(stopped / f"adapters/step_00000{k}") for k in range(7)]
    unchanged = [same_bits(*pair) for pair in pairwise(adapters)]
    assert unchanged == [False, True, False, True, True, True]
    assert max(f.name for f in (stopped / "checkpoints").iterdir()) == "000006"
    assert len(rollouts(stopped, 6)) == 32  # to look at


PLACES = [
    pytest.param("check_sampler", 1, KeyboardInterrupt(), marks=pytest.mark.slow),
    pytest.param("group_advantages", 1, KeyboardInterrupt(), marks=pytest.mark.slow),
    pytest.param("evaluate_members", 2, RunError("the server is gone"), marks=pytest.mark.slow),
    ("step_metrics", 4, KeyboardInterrupt()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("function", "call", "error"), PLACES, ids=lambda x: str(x))
def test_wherever_a_run_is_stopped_it_goes_on_as_if_it_had_not_been(
    function, call, error, run, root, monkeypatch, capsys
):
    """In the probe; in the first step; in the evaluation after step 2; and after adapter 4 was
    written, but before its step was logged."""
    module = member if function == "group_advantages" else train_module
    real, calls = getattr(module, function), []

    def interrupted(*args, **kwargs):
        calls.append(function)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, function, interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(type(error)) as raised:
        train(tiny_config(root))
    assert signal.getsignal(signal.SIGINT) is before
    stopped = max((root / "runs").iterdir(), key=lambda f: int(f.name))
    told = str(raised.value) if isinstance(error, RunError) else capsys.readouterr().out
    assert f"to go on: python -m jgrpo.train --resume {stopped}" in told
    assert str(error) in told
    monkeypatch.setattr(module, function, real)
    train(tiny_config(root), resume=stopped)
    assert comparable(read_metrics(stopped)) == comparable(read_metrics(run))
    assert same_bits(final_adapter(stopped), final_adapter(run))
    assert sorted(f.name for f in (stopped / "adapters").iterdir())[-1] == "step_000004"


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jgrpo.train", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("shared_compilation_cache")
def test_ctrl_c_ends_with_130_and_the_command_that_goes_on(root, tmp_path):
    folder = tmp_path / "run"
    config = tiny_config(root, n_grpo_steps=100_000, eval_every=0, run_dir=str(folder))
    process = start("--config", str(write_config_file(tmp_path / "c.py", config)))
    deadline = time.monotonic() + 120
    while not list((folder / "rollouts").glob("step_000003.jsonl")):
        running = process.poll() is None and time.monotonic() < deadline
        assert running, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"python -m jgrpo.train --resume {folder}" in out
    assert "Traceback" not in err
    last = int(re.findall(r"stopped after step (\d+)", out)[0])
    assert last >= 2
    assert read_metrics(folder)[-1]["step"] == last
    go_on = start("--resume", str(folder), "--n_grpo_steps", str(last + 2))
    out, err = go_on.communicate(timeout=120)
    assert go_on.returncode == 0, err
    straight = train(tiny_config(root, n_grpo_steps=last + 2, eval_every=0))
    assert same_bits(final_adapter(folder), final_adapter(straight))
    assert comparable(read_metrics(folder)) == comparable(read_metrics(straight))


# -- what cannot be begun or gone on with ------------------------------------------------------


def test_a_run_folder_in_use_is_never_written_to(run, root):
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=r"must be new or empty.*--resume"):
        train(tiny_config(root, run_dir=str(run)))
    assert sorted(run.rglob("*")) == before


def test_without_a_server_the_run_fails_and_leaves_no_folder(root, tmp_path):
    config = tiny_config(
        root, rollout="vllm", vllm_url="http://127.0.0.1:9", vllm_timeout_s=0.5,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(RunError, match=r"python -m jgrpo\.serve"):
        train(config)
    assert not (tmp_path / "run").exists()  # so that the same command works once the server is up


def test_a_run_whose_checkpoints_are_gone_cannot_be_resumed(run, root, tmp_path):
    """It would begin anew, over what it has trained."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(InputError, match=r"holds no checkpoint .*, though the run has trained"):
        train(tiny_config(root), resume=tmp_path / "run")
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == 5
    assert len(read_metrics(tmp_path / "run")) == 7


def test_a_run_at_work_is_not_resumed_by_another_process(run, root):
    with claimed(run), pytest.raises(InputError, match="another process is at work in it"):
        train(tiny_config(root), resume=run)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(run, root, tmp_path):
    """With config.json, the fresh adapter, half an evaluation line, and half an adapter there."""
    folder = tmp_path / "run"
    (folder / "adapters" / ".probe.partial").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    shutil.copytree(run / "adapters" / "step_000000", folder / "adapters" / "step_000000")
    shutil.copy(run / "config.json", folder)
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/accu')
    train(tiny_config(root), resume=folder)
    assert comparable(read_metrics(folder)) == comparable(read_metrics(run))
    assert same_bits(final_adapter(folder), final_adapter(run))
    assert not list(folder.rglob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 1.2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room_bytes", [4_096, 45_056, 147_456])
@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(
    room_bytes, run, root, small_disk, monkeypatch
):
    """The disk fills up after step 2 and its checkpoint, but for some room: so that a write of
    rollouts fails, of an adapter, of a checkpoint."""
    folder, ballast = small_disk / "run", small_disk / "ballast"
    real = Loop.step

    def step(loop, k):
        if k == 3:
            disk = os.statvfs(small_disk)
            ballast.write_bytes(b"x" * (disk.f_bavail * disk.f_frsize - room_bytes))
        real(loop, k)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "step", step)
        with pytest.raises(RunError, match=r"(?is)no space left.*stopped after step.*--resume"):
            train(tiny_config(root, run_dir=str(folder)))
    with ballast.open("ab") as file, contextlib.suppress(OSError):
        file.write(b"x" * room_bytes)
    with pytest.raises(RunError, match=r"(?i)no space left"):  # still full
        train(tiny_config(root, run_dir=str(folder)), resume=folder)
    ballast.unlink()
    train(tiny_config(root, run_dir=str(folder)), resume=folder)
    assert comparable(read_metrics(folder)) == comparable(read_metrics(run))
    assert same_bits(final_adapter(folder), final_adapter(run))
    assert sorted(curves(folder)) == sorted(curves(run))
    assert not [f for f in folder.rglob("*") if f.name.startswith(".") or "tmp" in f.name]


# -- options that change the update -----------------------------------------------------------


@pytest.fixture(scope="module")
def two_epochs(root):
    return train(tiny_config(root, epochs_per_step=2, n_grpo_steps=2, eval_every=0))


def test_with_one_update_a_rollout_the_ratio_is_one(run):
    for row in steps_of(run):
        assert row["train/approx_kl"] == row["train/clip_fraction"] == 0.0


@pytest.mark.slow
def test_a_second_update_moves_the_ratio_and_the_clip_and_the_penalty_bind(root, two_epochs):
    assert all(row["train/approx_kl"] > 0 for row in steps_of(two_epochs))
    config = tiny_config(root, epochs_per_step=2, n_grpo_steps=2, eval_every=0)
    clipped = train(dataclasses.replace(config, use_clip=True, clip_eps=1e-3))
    penalised = train(dataclasses.replace(config, use_kl_penalty=True, beta=10.0))
    assert 0 < steps_of(clipped)[0]["train/clip_fraction"] <= 0.5  # never in the first update
    finals = [final_adapter(folder) for folder in (two_epochs, clipped, penalised)]
    assert not any(same_bits(a, b) for a, b in [finals[:2], finals[1:], finals[::2]])


@pytest.mark.slow
def test_the_other_options_of_the_loss_change_the_adapter(run, root):
    for option in ({"use_std_norm": False}, {"use_token_level_loss": True}):
        other = train(tiny_config(root, n_grpo_steps=1, eval_every=0, **option))
        moved = arrays_of(other / "adapters/step_000001")
        assert not same_bits(moved, arrays_of(run / "adapters/step_000001"))
        for p in range(4):
            group = rollouts(other, 1)[8 * p : 8 * p + 8]
            r = np.array([row["reward"] for row in group])
            if "use_std_norm" in option:
                np.testing.assert_allclose([x["advantage"] for x in group], r - r.mean(), atol=1e-6)


@pytest.mark.slow
def test_the_length_penalty_is_added_to_the_reward(root):
    config = tiny_config(root, use_length_penalty=True, expected_maximum_length=6,
                         overlong_cache=4, n_grpo_steps=1, eval_every=0)  # fmt: skip
    folder = train(config)
    rows = rollouts(folder, 1)
    by_hand = {1: 0.0, 2: 0.0, 3: -0.25, 4: -0.5, 5: -0.75, 6: -1.0}
    correct = [f"\\boxed{{{row['gold']}}}" in row["completion"] for row in rows]
    assert [row["reward"] for row in rows] == [
        right + by_hand[len(row["token_ids"])] for right, row in zip(correct, rows, strict=True)
    ]
    [metrics] = steps_of(folder)
    assert metrics["train/accuracy"] == np.mean(correct)  # the penalty is no part of accuracy
    assert metrics["train/reward_mean"] == pytest.approx(np.mean([r["reward"] for r in rows]))


# -- learning ---------------------------------------------------------------------------------


def test_it_learns_what_is_rewarded(root, tmp_path):
    """Every answer is 7, which the base gives one time in three. Three seeds gave 0.71 to 0.84 on
    average over the last five of 25 steps; a wrong sign gives 0."""
    write_problems(tmp_path, answer="7")
    config = tiny_config(
        tmp_path, model_id=str(root / "base"), n_grpo_steps=25, lr=3e-3, eval_every=25,
        checkpoint_every=25,
    )  # fmt: skip
    rows = read_metrics(train(config))
    accuracy = [row["train/accuracy"] for row in rows if "train/accuracy" in row]
    assert np.mean(accuracy[:2]) < 0.5
    assert np.mean(accuracy[-5:]) > 0.6
