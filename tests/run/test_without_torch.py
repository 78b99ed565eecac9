"""A command does not import torch, which transformers would; a reward function may."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REWARD = """
import torch
from transformers import AutoModelForCausalLM

def reward(completions, **_):
    AutoModelForCausalLM.from_pretrained  # where torch is missing, an ImportError
    return torch.zeros(len(completions)).tolist()
"""


def imported(cwd: Path, *words: str) -> set[str]:
    """The packages that a command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines}


def test_torch_is_not_imported(tmp_path):
    names = imported(tmp_path, "jgrpo.train", "--config", "tiny", "--dry_run")
    assert {"jax", "transformers"} <= names
    assert "torch.nn" not in names  # tensorboardX tries "torch", and goes on without


@pytest.mark.slow
def test_a_reward_function_has_torch(tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    asked = "jgrpo.train", "--config", "tiny", "--dry_run", "--reward_function", "mine.py:reward"
    assert "torch.nn" in imported(tmp_path, *asked)
