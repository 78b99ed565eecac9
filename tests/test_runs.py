"""The table of runs has what their files say, and tells them apart."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jgrpo.config import Config
from jgrpo.run.differences import run_folders
from jgrpo.run.rundir import write_config
from jgrpo.runs import figures, table

ROWS = [
    {"step": 0, "eval/accuracy": 0.25, "time/evaluation": 2.0},
    {"step": 1, "train/accuracy": 0.5, "time/step": 60.0, "time/generation": 50.0},
    {"step": 2, "train/accuracy": 0.5, "time/step": 60.0},
    {"step": 2, "eval/accuracy": 0.75, "time/evaluation": 3.0},
    {"step": 4, "eval/accuracy": 0.75},
    {"step": 6, "eval/accuracy": 0.5},
    {"step": 8, "eval/accuracy": None},
]


def make_run(folder: Path, **changes) -> None:
    folder.mkdir(parents=True)
    write_config(folder, Config(n_grpo_steps=8, run_dir=str(folder), **changes), {})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def shown(folder: Path, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(run_folders(folder), width))
    return console.file.getvalue().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def test_figures_by_hand():
    assert figures(ROWS, 8) == ["8/8", "0.500", "0.750 at 2", "2:05"]
    assert figures(ROWS[:1], None) == ["0", "0.250", "0.250 at 0", "0:02"]
    assert figures([], 8) == ["0/8", "-", "-", "0:00"]


def test_each_option_that_differs_has_a_column(tmp_path):
    for name, changes in (("10", {"lora_r": 4}), ("9", {}), ("1", {"lr": 0.5})):
        make_run(tmp_path / name, **changes)
    lines = [cells(line) for line in shown(tmp_path, 80) if "│" in line or "┃" in line]
    assert lines == [
        ["run", "step", "accuracy", "best", "time", "lora_r", "lr"],
        ["1", "8/8", "0.500", "0.750 at 2", "2:05", "1", "0.5"],
        ["9", "8/8", "0.500", "0.750 at 2", "2:05", "1", "9e-05"],
        ["10", "8/8", "0.500", "0.750 at 2", "2:05", "4", "9e-05"],
    ]


def test_options_that_do_not_fit_share_a_column_and_nothing_is_cut(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", use_importance_weights=True, mask_truncated_completions=True, lr=0.5)
    lines = shown(tmp_path, 80)
    assert max(map(len, lines)) <= 80
    text = "".join(cells(line)[-1] for line in lines if line.count("│") == 7)
    for words in ("use_importance_weights=True", "mask_truncated_completions=True", "lr=0.5"):
        assert words in text


@pytest.mark.slow
def test_the_command_finds_runs_or_says_that_there_are_none(tmp_path):
    make_run(tmp_path / "runs" / "1")
    run = lambda *args: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "jgrpo.runs", *args], capture_output=True, text=True
    )
    done = run(tmp_path / "runs")
    assert done.returncode == 0
    assert "0.750 at 2" in done.stdout
    failed = run(tmp_path / "none")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
