"""tiny.py on sums of four digits, of which its base has 2 % greedily and 23 % at temperature 1."""

from dataclasses import replace
from pathlib import Path

from jgrpo.config import load_config

config = load_config(Path(__file__).with_name("tiny.py"))
BASE = Path(config.model_id).with_name("long")  # jgrpo/tiny/recipe.py says how

config = replace(
    config,
    model_id=str(BASE),
    dataset_path=str(BASE / "train.jsonl"),
    eval_dataset_path=str(BASE / "eval.jsonl"),
    prompt_template=str(BASE / "tiny.prompt"),
    expected_maximum_length=64,
)
