"""The quick start: a million parameters, arithmetic, no server, no GPU, no download."""

from pathlib import Path

import jgrpo
from jgrpo.config import Config

BASE = Path(jgrpo.__file__).with_name("tiny") / "base"  # made by `python -m jgrpo.tiny`

config = Config(
    model_id=str(BASE),
    dtype="float32",
    rollout="jax",
    dataset_path=str(BASE / "train.jsonl"),
    eval_dataset_path=str(BASE / "eval.jsonl"),
    prompt_template=str(BASE / "tiny.prompt"),
    lr=1e-3,
    n_grpo_steps=40,
    n_prompts_per_step=16,
    group_size=8,
    max_prompt_tokens=64,
    max_tokens=64,
    expected_maximum_length=48,  # of the length penalty, where it is asked for
    overlong_cache=24,
    prm_model_id=str(BASE / "prm"),  # made by `python -m jgrpo.tiny.prm`
    n_eval_prompts=200,
    eval_every=5,
)
