"""Runs are found, put in order, named and told apart by what differs in their configs."""

import dataclasses
import json
from pathlib import Path

import pytest

from jgrpo.config import Config
from jgrpo.errors import InputError, short
from jgrpo.run.differences import (
    briefly,
    differences,
    natural,
    run_folders,
    run_names,
    saved_options,
    shown,
    words,
)
from jgrpo.run.rundir import write_config


def make_run(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True)
    write_config(folder, Config(run_dir=str(folder), **changes), {})
    (folder / "metrics.jsonl").touch()
    return folder


def test_runs_differ_in_their_options_and_not_in_where_they_are(tmp_path):
    plain = make_run(tmp_path / "1")
    clip = make_run(tmp_path / "2", use_clip=True, lora_r=4, vllm_url="http://other:8000")
    configs = {folder.name: saved_options(folder) for folder in (plain, clip)}
    assert differences(configs) == {
        "1": {"lora_r": 1, "use_clip": False},
        "2": {"lora_r": 4, "use_clip": True},
    }
    assert list(differences(configs)["2"]) == ["lora_r", "use_clip"]  # the order of config.py
    assert differences({"1": configs["1"]}) == {"1": {}}
    assert differences({}) == {}


def test_a_config_as_objects_and_as_json_are_alike():
    options = dataclasses.asdict(Config())
    assert differences({"a": options, "b": json.loads(json.dumps(options))}) == {"a": {}, "b": {}}


def test_an_option_that_an_older_run_lacks_has_its_default():
    now = dataclasses.asdict(Config(lora_r=2))
    older = {k: v for k, v in now.items() if k != "kl_to"} | {"gone": 3}
    assert differences({"now": now, "older": older}) == {"now": {}, "older": {"gone": 3}}
    base = now | {"kl_to": "base"}
    assert differences({"now": base, "older": older})["older"] == {"kl_to": "old", "gone": 3}


def test_a_run_without_a_config_has_no_differences_and_makes_none():
    a, b = dataclasses.asdict(Config()), dataclasses.asdict(Config(seed=1))
    assert differences({"a": a, "none": {}}) == {"a": {}, "none": {}}
    assert differences({"a": a, "none": {}, "b": b}) == {
        "a": {"seed": 42}, "none": {}, "b": {"seed": 1},
    }  # fmt: skip


def test_values_are_shown_as_one_types_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = {"lr": 0.002, "use_clip": True, "lora_target_modules": ["q_proj", "v_proj"],
               "clip_eps_high": None, "model_id": "Qwen/Qwen3-1.7B",
               "dataset_path": str(tmp_path / "data/train.jsonl")}  # fmt: skip
    assert words(options) == (
        "lr=0.002 use_clip=True lora_target_modules=q_proj,v_proj clip_eps_high=None "
        "model_id=Qwen/Qwen3-1.7B dataset_path=data/train.jsonl"
    )
    assert shown(1e-5) == "1e-05"


def test_of_many_options_a_label_has_what_is_not_common():
    plain = {"lr": 0.1, "use_clip": False, "loss_type": "grpo"}
    options = {"a": plain, "b": plain | {"use_clip": True}, "c": plain | {"loss_type": "gspo"}}
    assert briefly(options) == {"a": {}, "b": {"use_clip": True}, "c": {"loss_type": "gspo"}}
    two = {"a": plain, "b": {"lr": 0.2, "use_clip": True, "loss_type": "rloo"}}
    assert briefly(two) == two  # none is more common


def test_numbers_in_names_sort_by_value():
    names = ["runs/10", "runs/9", "runs/b", "runs/1", "runs/a2", "runs/a10", "runs/2"]
    assert sorted(names, key=natural) == [
        "runs/1", "runs/2", "runs/9", "runs/10", "runs/a2", "runs/a10", "runs/b",
    ]  # fmt: skip


def test_all_runs_below_a_folder_are_found_in_order(tmp_path):
    for name in ("10", "2", "1", "clip/seed_11", "clip/seed_2"):
        make_run(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "1" / "adapters").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [str(f.relative_to(tmp_path)) for f in run_folders(tmp_path)]
    assert found == ["1", "2", "10", "clip/seed_2", "clip/seed_11"]
    assert run_folders(tmp_path / "2") == [tmp_path / "2"]


def test_a_folder_without_a_run_is_said_to_be_none(tmp_path):
    with pytest.raises(InputError, match=r"it has no metrics.jsonl, nor a run in it"):
        run_folders(tmp_path)
    with pytest.raises(InputError, match=r"missing: not a run folder"):
        run_folders(tmp_path / "missing")


def test_names_are_what_tells_folders_apart(tmp_path):
    at = lambda *names: [tmp_path / name for name in names]  # noqa: E731
    assert run_names(at("runs/1", "runs/2")) == ["1", "2"]
    assert run_names(at("a/1", "b/1")) == ["a/1", "b/1"]
    assert run_names(at("runs/1")) == ["1"]
    assert run_names(at("1", "1/again")) == ["1", "1/again"]


def test_a_path_is_shown_from_here_or_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "me" / "here")
    assert short(tmp_path / "me/here/runs/1") == "runs/1"
    assert short("runs/1") == "runs/1"
    assert short(tmp_path / "me/other") == "~/other"
    assert short(tmp_path / "elsewhere") == str(tmp_path / "elsewhere")
