"""The text files of a run folder: claimed once, written whole, read back as written."""

import dataclasses
import json
import shlex
import sys
import threading

import numpy as np
import pytest

from jgrpo.errors import InputError, RunError
from jgrpo.run import rundir


def test_run_folders_count_up_and_are_never_shared(tmp_path):
    base = tmp_path / "runs"
    assert rundir.next_run_dir(base) == base / "1"
    (base / "7").mkdir()
    (base / "notes").mkdir()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(rundir.next_run_dir(base))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(f.name) for f in found) == list(range(8, 16))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"base_dir=.*file"):
        rundir.next_run_dir(tmp_path / "file")


def test_a_named_folder_must_be_new_or_empty(tmp_path):
    assert rundir.named_run_dir(tmp_path / "a" / "b").is_dir()
    rundir.named_run_dir(tmp_path / "a" / "b")
    with (
        pytest.raises(InputError, match="must be new or empty, has b; --resume"),
        rundir.claimed(tmp_path / "a", new=True),
    ):
        pass
    with rundir.claimed(tmp_path / "a" / "b", new=True):
        (tmp_path / "a" / "b" / "checkpoints").mkdir()
    assert not (tmp_path / "a" / "b").exists()  # nothing came of it: the command can be given again


def test_rollouts_come_back_as_written_and_replace_a_former_try(tmp_path):
    rundir.write_rollouts(tmp_path, 3, [{"prompt": "old"}] * 5)
    rows = [{"completion": "a\u2028\ud800\n", "token_ids": [1, 2], "reward": float("nan")}]
    file = rundir.write_rollouts(tmp_path, 3, rows)
    assert file == tmp_path / "rollouts" / "step_000003.jsonl"
    (line,) = file.read_text().splitlines()
    assert json.loads(line) == rows[0] | {"reward": None}
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def rows():
        yield {"a": 1}
        raise RuntimeError

    file = rundir.write_rollouts(tmp_path, 1, [{"a": 0}])
    with pytest.raises(RuntimeError):
        rundir.write_rollouts(tmp_path, 1, rows())
    assert json.loads(file.read_text()) == {"a": 0}


@dataclasses.dataclass(frozen=True)
class Options:
    seed: int = 42
    lora_target_modules: tuple[str, ...] = ("q_proj",)


def test_the_config_says_what_it_takes_to_repeat_the_run(tmp_path):
    rundir.write_config(tmp_path, Options(), {"devices": ["cpu:0"]})
    content = rundir.read_config(tmp_path)
    assert content["config"] == {"seed": 42, "lora_target_modules": ["q_proj"]}
    assert content["seed"] == 42
    assert content["devices"] == ["cpu:0"]
    assert content["versions"]["numpy"] == np.__version__
    assert content["command"] == shlex.join(sys.orig_argv)
    assert content["hardware"]["cpus"] > 0


def test_a_resume_is_noted_and_what_the_first_start_wrote_stays(tmp_path):
    rundir.write_config(tmp_path, Options(), {"devices": ["cpu:0"]})
    first = rundir.read_config(tmp_path)
    rundir.add_resume(tmp_path, Options(), 2, {"devices": ["cpu:1"]})
    rundir.add_resume(tmp_path, Options(seed=43), 4, {"devices": ["cpu:0"]})
    content = rundir.read_config(tmp_path)
    one, two = content.pop("resumes")
    assert (one["step"], one["changed"], one["devices"]) == (2, {}, ["cpu:1"])
    assert (two["step"], two["changed"]) == (4, {"seed": [42, 43]})
    assert one.keys() == {"step", "changed", *first} - {"config", "seed"}
    assert content == first | {"config": first["config"] | {"seed": 43}}


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    (tmp_path / ".config.json.77.tmp").write_text("{")  # the first one is writing it
    for new in (False, True):
        with (
            rundir.claimed(tmp_path),
            pytest.raises(InputError, match="another process is at work"),
            rundir.claimed(tmp_path, new=new),
        ):
            pass
        assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RunError, match=r"No space left"), rundir.claimed(tmp_path):
        raise OSError(28, "No space left on device")
    with rundir.claimed(tmp_path):
        pass


def test_what_a_kill_left_goes_and_what_is_whole_stays(tmp_path):
    adapters, rollouts = tmp_path / "adapters", tmp_path / "rollouts"
    for k in (1, 2, 3):
        (adapters / f"step_{k:06d}").mkdir(parents=True)
        rundir.write_rollouts(tmp_path, k, [{"a": k}])
    (adapters / ".step_000004.partial").mkdir()
    (rollouts / ".step_000004.jsonl.77.tmp").touch()
    (tmp_path / ".config.json.77.tmp").touch()
    rundir.remove_unfinished(tmp_path)
    assert not list(tmp_path.rglob(".*"))
    rundir.remove_later(tmp_path, 2)
    assert sorted(f.name for f in adapters.iterdir()) == ["step_000001", "step_000002"]
    assert sorted(f.stem for f in rollouts.iterdir()) == ["step_000001", "step_000002"]
    assert not list(tmp_path.rglob(".*"))


def test_a_start_that_was_killed_can_be_given_again(tmp_path):
    (tmp_path / ".config.json.77.tmp").write_text("{")
    (tmp_path / "checkpoints").mkdir()
    with rundir.claimed(tmp_path, new=True):
        assert not list(tmp_path.iterdir())
        (tmp_path / "config.json").write_text("{}")
    assert tmp_path.exists()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"not a run folder.*no config.json.*--config"):
        rundir.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        rundir.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match='has no "config"'):
        rundir.read_config(tmp_path)
