"""What reaches TensorBoard, wandb and Trackio, read back from their own files with their own
readers: all tags, the options, completions, evaluations, adapters; also after a resume. And that
none of them can end a run."""

import importlib.metadata
import io
import json
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import curves, on_cards, read_lines

from jgrpo.config import Config
from jgrpo.errors import InputError
from jgrpo.run import trackers
from jgrpo.run.rundir import adapter_folder
from jgrpo.run.runlog import RunLog
from jgrpo.run.trackers import check_installed

OPTIONS = {"lr": 2e-3, "project": "tests", "use_clip": True, "lora_target_modules": ["q_proj"]}
CONFIG = Config(**OPTIONS)
HOSTILE = "<script>alert(1)</script> \x1b[2J **bold** | a\n\\boxed{7}"


def rows_of(step: int) -> list[dict]:
    """Two completions of a step, as a rollouts file has them."""
    return [
        {"problem": f"{step} + 1?", "completion": HOSTILE if right else "no", "gold": "7",
         "reward": float(right), "reward_parts": {"outcome": float(right)},
         "advantage": 0.7 if right else -0.7}
        for right in (True, False)
    ]  # fmt: skip


def log_steps(run: Path, first: int, last: int, report_to, resume_step=None) -> str:
    """Steps first to last, each with a loss that changes and one figure that does not -> what was
    told."""
    console = Console(file=io.StringIO(), width=200, highlight=False)
    config = replace(CONFIG, report_to=report_to)
    with RunLog(run, 9, config=config, resume_step=resume_step, console=console) as log:
        for step in range(first, last + 1):
            adapter_folder(run, step).mkdir(parents=True, exist_ok=True)
            log.log(step, {"train/loss": 1 / step, "train/lr": 0.5, "train/entropy": float("nan")},
                    rows_of(step))  # fmt: skip
            table = [{"accuracy": 1.0, "gold": "7", "problem": "p", "completion": f"eval {step}"}]
            log.log(step, {"eval/accuracy": step / 10}, table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def a_life_and_its_resume(run: Path, name: str) -> None:
    """Steps 1 to 4, and on after 2, as after a kill."""
    for given in ((1, 4), (3, 5, 2)):
        told = log_steps(run, *given[:2], (name,), *given[2:])
        assert "failed" not in told, told


def needs(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: pip install -e '.[{package}]'")


# -- TensorBoard ------------------------------------------------------------------------------


def test_a_tag_has_a_card_once_it_has_changed_and_then_all_its_points(tmp_path):
    with RunLog(tmp_path, 9, console=Console(file=io.StringIO())) as log:
        log.log(1, {"a": 1.0, "constant": 0.0, "late": 0.0})
        assert curves(tmp_path) == {}
        log.log(2, {"a": 2.0, "constant": 0.0, "late": 0.0, "once": 5.0})
        assert curves(tmp_path) == {("a", 1): [1.0], ("a", 2): [2.0]}
        log.log(3, {"a": 2.0, "constant": 0.0, "late": 1.0})
        shown = curves(tmp_path)
        assert {step for tag, step in shown if tag == "late"} == {1, 2, 3}
    assert curves(tmp_path) == on_cards(read_lines(tmp_path / "metrics.jsonl"))
    assert curves(tmp_path)["once", 2] == [5.0]
    assert "constant" not in {tag for tag, _ in curves(tmp_path)}


def test_a_resumed_run_s_file_holds_all_that_is_kept_once(tmp_path):
    """Also what the first life held back, and behind a record that a kill has torn."""
    with RunLog(tmp_path, 9, console=Console(file=io.StringIO())) as log:
        for step, late in ((1, 0.0), (2, 0.0), (3, 7.0)):
            log.log(step, {"a": float(step), "late": late})
    [file] = tmp_path.glob("events.*")
    file.write_bytes(file.read_bytes()[:-5])
    with RunLog(tmp_path, 9, resume_step=2, console=Console(file=io.StringIO())) as log:
        log.log(3, {"a": 3.0, "late": 0.0})
        log.log(4, {"a": 4.0, "late": 7.0})
    assert curves(tmp_path) == on_cards(read_lines(tmp_path / "metrics.jsonl"))
    assert [curves(tmp_path)["late", step] for step in (1, 2, 3, 4)] == [[0], [0], [0], [7]]


def test_tensorboard_itself_reads_curves_completions_options_and_charts(tmp_path):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    a_life_and_its_resume(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert sorted(tags["scalars"]) == ["eval/accuracy", "train/loss"]
    points = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert points == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 4, 5)]
    kinds = ("training", "evaluation")
    text = {kind: events.Tensors(f"completions/{kind}/text_summary") for kind in kinds}
    assert {e.step for e in text["training"]} == {1, 2, 3, 4, 5}
    shown = text["training"][-1].tensor_proto.string_val[0].decode()
    assert "    <script>" in shown  # a block, not markup
    assert "\x1b" not in shown
    assert "eval 5" in text["evaluation"][-1].tensor_proto.string_val[0].decode()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["lr"].number_value == 2e-3
    assert options["use_clip"].bool_value is True
    assert options["lora_target_modules"].string_value == "['q_proj']"
    assert "custom_scalars__config__" in tags["tensors"]


# -- wandb ------------------------------------------------------------------------------------


def wandb_records(file: Path) -> list:
    """The messages of a .wandb file: a header of 7 bytes, then LevelDB's log format: blocks of 32
    KiB, in them records of crc (4 bytes), length (2), type (1: whole; 2, 3, 4: first, middle and
    last part) and data."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):  # being written
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def whole(file: Path) -> list:
    """Its records, once the last is there: wandb's service may write it after `finish`."""
    end_s = time.monotonic() + 60
    while not (found := wandb_records(file)) or not found[-1].HasField("exit"):
        assert time.monotonic() < end_s, [r.WhichOneof("record_type") for r in found]
        time.sleep(0.1)
    return found


def history(records) -> list[dict]:
    items = [record.history.item for record in records if record.HasField("history")]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in x} for x in items]


def test_wandb_offline_has_all_tags_options_tables_and_one_run(tmp_path, monkeypatch):
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    run.mkdir()
    a_life_and_its_resume(run, "wandb")
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    lives = [whole(file) for file in files]
    ids = {r.run.run_id for life in lives for r in life if r.HasField("run")}
    assert ids == {(run / "tracker_id").read_text().strip()}
    config = {
        item.key: json.loads(item.value_json)
        for r in lives[0] if r.HasField("run") for item in r.run.config.update
    }  # fmt: skip
    assert {k: config[k] for k in OPTIONS} == OPTIONS
    rows = [row for life in lives for row in history(life)]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(k, 1 / k) for k in (1, 2, 3, 4, 3, 4, 5)]
    assert [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1] == 0.5
    assert all(row["train/lr"] == 0.5 for row in rows if "train/lr" in row)
    assert not any("train/entropy" in row for row in rows)  # NaN
    assert rows[0]["adapter"] == str(run / "adapters" / "step_000001")
    axes = {r.metric.glob_name or r.metric.name for x in lives for r in x if r.HasField("metric")}
    assert {"*", "step"} <= axes
    table = next(row for row in rows if "completions/training/path" in row)
    [file] = sorted(run.glob("wandb/offline-run-*/files"))[0].glob(
        table["completions/training/path"]
    )
    content = json.loads(file.read_text())
    assert content["columns"] == ["reward", "advantage", "gold", "problem", "completion"]
    assert [row[4] for row in content["data"]] == [HOSTILE, "no"]
    assert any("completions/evaluation/path" in row for row in rows)


# -- Trackio ----------------------------------------------------------------------------------


def test_trackio_has_all_tags_options_tables_and_one_run(tmp_path, monkeypatch):
    needs("trackio")
    import trackio.utils
    from trackio import sqlite_storage
    from trackio.sqlite_storage import SQLiteStorage

    for module in (trackio.utils, sqlite_storage):  # read when it is imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run = tmp_path / "run"
    run.mkdir()
    a_life_and_its_resume(run, "trackio")
    [record] = SQLiteStorage.get_run_records("tests")
    name = record["name"]
    assert name == f"{trackers.run_id(run)}-{(run / 'tracker_id').read_text().strip()}"
    rows = SQLiteStorage.get_logs("tests", name)
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert sorted(losses) == sorted((k, 1 / k) for k in (1, 2, 3, 4, 3, 4, 5))
    assert {row["eval/accuracy"] for row in rows if "eval/accuracy" in row} == {
        k / 10 for k in range(1, 6)
    }
    assert str(run / "adapters" / "step_000005") in {row.get("adapter") for row in rows}
    [table, *_] = [row["completions/training"] for row in rows if "completions/training" in row]
    assert [row["completion"] for row in table["_value"]] == [HOSTILE, "no"]
    config = SQLiteStorage.get_run_config("tests", name)
    assert {k: config[k] for k in OPTIONS} == OPTIONS


# -- what cannot be ---------------------------------------------------------------------------


class Broken:
    """Fails at its n-th call, as a service that goes away."""

    def __init__(self, fails_at: int):
        self.left = fails_at

    def call(self, *_):
        self.left -= 1
        if self.left <= 0:
            raise ConnectionError("the service is gone\nwith a long story")

    log = table = close = call


@pytest.mark.parametrize("fails_at", [1, 2, 9], ids=["at once", "later", "when it is closed"])
def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(tmp_path, monkeypatch, fails_at):
    monkeypatch.setitem(trackers.OPEN, "wandb", lambda *_: Broken(fails_at))
    told = log_steps(tmp_path, 1, 2, ("wandb", "tensorboard"))
    assert told.count("wandb failed") == 1
    assert "ConnectionError: the service is gone" in told
    assert "long story" not in told
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4
    assert ("train/loss", 2) in curves(tmp_path)


def test_a_tracker_that_cannot_be_opened_is_no_end_either(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no API key")

    monkeypatch.setitem(trackers.OPEN, "trackio", refuse)
    told = log_steps(tmp_path, 1, 1, ("trackio",))
    assert told.count("trackio failed") == 1
    assert not list(tmp_path.glob("events.*"))  # nobody asked for TensorBoard
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


def test_a_package_that_is_missing_is_told_with_the_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for name in ("wandb", "trackio"):
        with pytest.raises(InputError, match=rf"report_to={name}: .*pip install 'jgrpo\[{name}\]'"):
            check_installed(("tensorboard", name))
    check_installed(("tensorboard",))


@pytest.mark.parametrize("given", [("mlflow",), ("wandb", "wandb"), "tensorbord"])
def test_a_tracker_that_is_not_known_is_refused_with_all_names(given):
    with pytest.raises(InputError, match=r"report_to=.*tensorboard, wandb, trackio"):
        Config(report_to=given)


@pytest.mark.parametrize("none", ["none", ("none",), (), []])
def test_none_is_none(none):
    assert Config(report_to=none).report_to == ()
    assert Config(report_to="wandb").report_to == ("wandb",)
