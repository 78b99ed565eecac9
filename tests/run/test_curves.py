"""The curves show what the metrics say, and bad run folders end in one clear message."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from jgrpo.errors import InputError
from jgrpo.plot import save
from jgrpo.run.curves import COLOURS, draw, run_names, series

ROWS = [
    {"step": 0, "eval/accuracy": 0.25},
    {"step": 1, "train/accuracy": 0.5, "train/reward_mean": 0.25, "sampler/logprob_diff_mean": 0.0},
    {"step": 2, "train/accuracy": None, "train/reward_mean": 0.75},
    {"step": 2, "eval/accuracy": 0.75},
]


def write_run(folder: Path, rows: list[dict], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + end)
    return folder


def curves(figure, panel: int) -> list[tuple[str, list, list]]:
    lines = figure.axes[panel].lines
    return [(x.get_color(), list(x.get_xdata()), list(x.get_ydata())) for x in lines]


def test_a_series_has_only_the_steps_that_log_it_and_a_null_is_a_gap():
    steps, values = series(ROWS, "train/accuracy")
    assert steps == [1, 2]
    assert values[0] == 0.5
    assert math.isnan(values[1])
    assert series(ROWS, "eval/accuracy") == ([0, 2], [0.25, 0.75])
    assert series(ROWS, "nothing") == ([], [])


def test_each_panel_shows_its_own_tag():
    figure = draw({"a": ROWS})
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Accuracy",
        "Reward",
        "Completion length",
        "Sampler gap",
    ]
    training, evaluation = curves(figure, 0)
    assert evaluation[1:] == ([0, 2], [0.25, 0.75])
    assert training[1] == [1, 2]
    assert curves(figure, 1) == [(COLOURS[0], [1, 2], [0.25, 0.75])]
    assert curves(figure, 2) == []  # never logged


def test_the_gap_is_on_a_log_axis_unless_it_is_exactly_zero():
    tag = "sampler/logprob_diff_mean"
    assert draw({"a": [{"step": 1, tag: 0.0}]}).axes[3].get_yscale() == "linear"
    rows = [{"step": 1, tag: 0.0}, {"step": 2, tag: 1e-6}]
    assert draw({"a": rows}).axes[3].get_yscale() == "log"


def test_a_run_has_one_colour_in_every_panel_and_runs_differ():
    figure = draw({"a": ROWS, "b": ROWS})
    assert [colour for colour, _, _ in curves(figure, 1)] == list(COLOURS[:2])
    assert [colour for colour, _, _ in curves(figure, 0)] == [COLOURS[0]] * 2 + [COLOURS[1]] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_one_point_is_visible_although_a_line_needs_two():
    (line,) = draw({"a": [{"step": 1, "train/reward_mean": 0.5}]}).axes[1].lines
    assert line.get_marker() == "o"


def test_names_tell_runs_apart(tmp_path):
    assert run_names([tmp_path / "a" / "1", tmp_path / "a" / "2"]) == ["1", "2"]
    same = [tmp_path / "a" / "1", tmp_path / "b" / "1"]
    assert run_names(same) == [str(folder) for folder in same]


def test_the_picture_goes_to_the_run_or_here(tmp_path, monkeypatch):
    a, b = write_run(tmp_path / "a", ROWS), write_run(tmp_path / "b", ROWS, end='{"step": 3, "tr')
    assert save([a]) == a / "curves.png"
    assert (a / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    assert save([a, b]) == Path("curves.png")
    assert (tmp_path / "curves.png").is_file()


def test_bad_runs_name_the_folder_and_the_reason(tmp_path):
    run = write_run(tmp_path / "run", ROWS)
    broken = write_run(tmp_path / "broken", ROWS, end='{"step": 3, "tr\n{"step": 4}\n')
    with pytest.raises(InputError, match=r"broken/metrics.jsonl, line 5: not a metrics line"):
        save([run, broken])
    with pytest.raises(InputError, match="missing: not a run folder"):
        save([tmp_path / "missing"])
    with pytest.raises(InputError, match=r"empty: metrics.jsonl has no line"):
        save([write_run(tmp_path / "empty", [])])
    with pytest.raises(InputError, match="twice"):
        save([run, tmp_path / "." / "run"])
    with pytest.raises(InputError, match=r"--out .*nowhere"):
        save([run], tmp_path / "nowhere" / "x.png")


def test_the_command_prints_the_path_or_one_line_and_status_2(tmp_path):
    run = write_run(tmp_path / "run", ROWS)
    command = [sys.executable, "-m", "jgrpo.plot"]
    root = Path(__file__).parent.parent
    done = subprocess.run([*command, run], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "curves.png"))
    failed = subprocess.run([*command, tmp_path / "no"], cwd=root, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
