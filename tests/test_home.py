"""Without a home, or with one that takes nothing: a run works, and nothing is called ~."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jgrpo.home import find_home

ROOT = Path(__file__).parent.parent
NOBODY = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]


def can_be_nobody() -> bool:
    try:
        return subprocess.run([*NOBODY, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("home", ["unset", "/dev/null"])
def test_a_dry_run_reads_a_folder_and_caches_among_the_temporary_files(home, tmp_path):
    """`datasets` caches what it reads from a folder; no entry in passwd names a home either."""
    if home == "unset" and not can_be_nobody():
        pytest.skip("no user namespace (unshare) in which this user is nobody")
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "JAX_COMPILATION_CACHE_DIR")
           and not k.startswith(("XDG_", "HF_"))}  # fmt: skip
    temporary, data = tmp_path / "tmp", tmp_path / "data"
    for folder in (temporary, data):
        folder.mkdir()
    table = {"question": [f"{i} + {i}?" for i in range(20)], "answer": list(map(str, range(20)))}
    pyarrow.parquet.write_table(pyarrow.table(table), data / "train.parquet")
    env |= {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    env |= {} if home == "unset" else {"HOME": home}
    done = subprocess.run(
        [*(NOBODY if home == "unset" else []), sys.executable, "-m", "jgrpo.train",
         "--config", str(ROOT / "configs/tiny.py"), "--dataset_path", "data", "--dry_run"],
        env=env, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training problems" in done.stdout
    assert sorted(f.name for f in tmp_path.iterdir()) == ["data", "tmp"]
    mine = temporary / f"home-{54321 if home == 'unset' else os.getuid()}"
    assert (mine / ".cache/huggingface/datasets").is_dir()
    assert mine.stat().st_mode & 0o77 == 0
    assert "matplotlib" not in done.stderr.lower()  # it has its home too


def test_a_home_that_takes_a_cache_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    find_home()
    assert os.environ["HOME"] == str(tmp_path)


def test_a_folder_that_someone_else_put_there_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr("jgrpo.home.tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("jgrpo.home.os.getuid", lambda: 54321)
    theirs = tmp_path / "home-54321"
    theirs.mkdir()
    find_home()
    assert Path(os.environ["HOME"]).is_relative_to(tmp_path)
    assert os.environ["HOME"] != str(theirs)
    shutil.rmtree(os.environ["HOME"])
