"""The curves show what the metrics say, and bad run folders end in one clear message."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from jgrpo.config import Config
from jgrpo.errors import InputError
from jgrpo.plot import labelled, save
from jgrpo.run.curves import COLOURS, draw, series
from jgrpo.run.differences import run_folders
from jgrpo.run.rundir import write_config

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


def test_the_gap_is_on_a_log_axis_and_has_no_holes():
    """Exact agreement, and a step that trains on nothing, have no place on it: lines go on."""
    tag = "sampler/logprob_diff_mean"
    assert draw({"a": [{"step": 1, tag: 0.0}]}).axes[3].get_yscale() == "linear"
    values = [3e-7, 0.0, None, 1e-6]
    figure = draw({"a": [{"step": i, tag: value} for i, value in enumerate(values)]})
    assert figure.axes[3].get_yscale() == "log"
    assert curves(figure, 3) == [(COLOURS[0], [0, 3], [3e-7, 1e-6])]


def test_the_gap_is_small_and_the_accuracy_large():
    figure = draw({"a": ROWS})
    figure.draw_without_rendering()
    area = {axes.get_title(loc="left"): axes.bbox.width * axes.bbox.height for axes in figure.axes}
    assert area["Sampler gap"] < area["Completion length"] < area["Accuracy"] / 2


def test_a_reward_that_is_the_accuracy_has_no_panel_of_its_own():
    rows = [{"step": i, "train/accuracy": x, "train/reward_mean": x} for i, x in enumerate((0, 1))]
    titles = lambda **runs: [axes.get_title(loc="left") for axes in draw(runs).axes]  # noqa: E731
    assert titles(a=rows) == ["Accuracy", "Completion length", "Sampler gap"]
    assert "Reward" in titles(a=rows, b=ROWS)


def test_twenty_runs_are_told_apart_and_their_names_are_whole():
    names = [f"clip/seed_{i}  lr=0.00{i} use_clip=True" for i in range(20)]
    figure = draw(dict.fromkeys(names, ROWS))
    figure.draw_without_rendering()
    lines = figure.axes[1].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 20
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == names
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert box.y0 >= max(axes.bbox.y1 for axes in figure.axes)


def test_a_run_has_one_colour_in_every_panel_and_runs_differ():
    figure = draw({"a": ROWS, "b": ROWS})
    assert [colour for colour, _, _ in curves(figure, 1)] == list(COLOURS[:2])
    assert [colour for colour, _, _ in curves(figure, 0)] == [COLOURS[0]] * 2 + [COLOURS[1]] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_one_point_is_visible_although_a_line_needs_two():
    (line,) = draw({"a": [{"step": 1, "train/reward_mean": 0.5}]}).axes[1].lines
    assert line.get_marker() == "o"


def test_labels_say_what_differs_in_natural_order(tmp_path):
    runs = [write_run(tmp_path / "runs" / name, ROWS) for name in ("10", "2", "1")]
    for folder, lr in zip(runs, (0.1, 0.002, 0.1), strict=True):
        write_config(folder, Config(lr=lr, run_dir=str(folder)), {})
    assert list(labelled(run_folders(tmp_path / "runs"))) == [
        "1  lr=0.1", "2  lr=0.002", "10  lr=0.1",
    ]  # fmt: skip
    assert list(labelled(runs[:1])) == ["10"]


def test_a_folder_of_runs_is_drawn_whole_and_a_run_without_steps_is_told_of(
    tmp_path, monkeypatch, capsys
):
    for name in ("2", "10"):
        write_run(tmp_path / "runs" / name, ROWS)
    monkeypatch.chdir(tmp_path)
    assert save([Path("runs")]) == Path("curves.png")
    assert capsys.readouterr().err == ""
    write_run(tmp_path / "runs" / "11", [])
    assert len(labelled(run_folders(Path("runs")))) == 2
    assert capsys.readouterr().err == "left out, no step is done yet: runs/11\n"


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
