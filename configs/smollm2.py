"""A language model of 135 million parameters on two CPU cores: what number comes after 512?"""

from pathlib import Path

import jgrpo
from jgrpo.config import Config

PROBLEMS = Path(jgrpo.__file__).with_name("tiny") / "counting"  # `python -m jgrpo.tiny.counting`

config = Config(
    model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    dtype="float32",
    rollout="jax",
    dataset_path=str(PROBLEMS / "train.jsonl"),
    eval_dataset_path=str(PROBLEMS / "eval.jsonl"),
    system_prompt="Answer in \\boxed{}.",
    lr=3e-4,
    n_grpo_steps=12,
    n_prompts_per_step=8,
    group_size=8,
    micro_batch_size=16,
    max_prompt_tokens=64,
    max_tokens=12,
    n_eval_prompts=100,
    eval_every=4,
)
