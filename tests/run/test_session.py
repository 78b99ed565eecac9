"""jgrpo.run.session: what a run is made from, as its fingerprint knows it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jgrpo.config import Config
from jgrpo.errors import InputError
from jgrpo.prompts.problems import Problem
from jgrpo.run.session import Problems, refuse_two_at_a_time

ROOT = Path(__file__).parents[2]
TOKENIZER: Any = SimpleNamespace()


def problems(*asked: Problem, templates=("{problem}", "chat")) -> Problems:
    return Problems(TOKENIZER, (7,), list(asked), [], [], templates)


def test_a_fingerprint_is_of_problems_answers_and_templates_and_not_of_the_day():
    one = Problem((1, 2), "26 Nov: 1+1", "1+1", "2", 0)
    tomorrow = replace(one, prompt_ids=(1, 3), prompt="27 Nov: 1+1")
    known = problems(one).fingerprint
    assert problems(tomorrow).fingerprint == known
    others = [
        problems(replace(one, problem="1+2")),
        problems(replace(one, gold="3")),
        problems(one, one),
        problems(one, templates=("{problem}!", "chat")),
        problems(one, templates=("{problem}", "another chat")),
        replace(problems(one), stop_token_ids=(7, 8)),
    ]
    assert known not in {other.fingerprint for other in others}


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["nonsense", "rocm"])
def test_a_device_that_is_not_there_is_told_before_anything_is_read(platform, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jgrpo.train", "--model_id", str(tmp_path / "nothing")],
        env=os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"error: JAX_PLATFORMS={platform}: JAX finds no such device" in done.stderr
    assert "or JAX_PLATFORMS=cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert "nothing" not in done.stderr


def test_sampling_and_training_never_exchange_between_devices_at_the_same_time():
    ahead = Config(rollouts_ahead=1, rollout="jax", n_grpo_steps=3)
    with pytest.raises(InputError, match=r"rollouts_ahead=1 with rollout=jax on 8 devices.*vllm"):
        refuse_two_at_a_time(ahead, 8)
    refuse_two_at_a_time(ahead, 1)
    refuse_two_at_a_time(replace(ahead, rollout="vllm"), 8)
