"""The problems of configs/smollm2.py: shipped as the recipe makes them, asked as turns."""

from dataclasses import replace
from pathlib import Path

import jgrpo
from jgrpo.answers.equal import is_correct
from jgrpo.config import load_config
from jgrpo.run.session import open_problems
from jgrpo.tiny import counting

FOLDER = Path(jgrpo.__file__).with_name("tiny")


def test_the_shipped_problems_are_those_of_the_recipe(tmp_path):
    counting.main(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (FOLDER / "counting" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_every_number_of_three_digits_is_asked_once_and_the_one_shown_never():
    train, held_out = counting.problem_sets()
    asked = [int(row["answer"]) - 1 for row in (*train, *held_out)]
    assert sorted([*asked, 354]) == list(range(100, 999))
    assert len(held_out) == 200


def test_the_config_asks_in_turns():
    """By the quick start's model, whose chat template is that of SmolLM2 with a system turn."""
    config = load_config("smollm2")
    tiny = replace(config, model_id=str(FOLDER / "base"), max_prompt_tokens=200)
    problems = open_problems(tiny)
    assert (len(problems.train), len(problems.evaluation)) == (698, config.n_eval_prompts)
    (problem,) = (p for p in problems.train if p.gold == "513")
    assert problem.prompt == (
        "<|im_start|>system\nAnswer in \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat number comes after 354?<|im_end|>\n"
        "<|im_start|>assistant\n\\boxed{355}<|im_end|>\n"
        "<|im_start|>user\nWhat number comes after 512?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert is_correct("\\boxed{513}", problem.gold)
    assert not is_correct("\\boxed{355}", problem.gold)
