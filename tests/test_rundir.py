"""The text files of a run folder: claimed once, written whole, read back as written."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from jgrpo import rundir
from jgrpo.errors import InputError


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
    with pytest.raises(InputError, match="must be new or empty, has b; --resume"):
        rundir.named_run_dir(tmp_path / "a")


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
    assert "pytest" in content["command"]
    assert content["hardware"]["cpus"] > 0


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        rundir.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        rundir.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match='has no "config"'):
        rundir.read_config(tmp_path)
