"""The problems of configs/smollm2.py: `python -m jgrpo.tiny.counting FOLDER`.

"What number comes after 512?", for the numbers of three digits that another such one follows. A row
is a conversation in which one question is answered already: shown so, a language model of 135
million parameters answers in a box and is sometimes right; asked in words alone it does neither.
"""

import json
import random
from pathlib import Path
from typing import Annotated

import tyro

SHOWN = 354  # in every conversation, and therefore no problem
N_EVAL = 200


def question(number: int) -> str:
    return f"What number comes after {number}?"


def row(number: int) -> dict:
    turns = [
        ("user", question(SHOWN)),
        ("assistant", f"\\boxed{{{SHOWN + 1}}}"),
        ("user", question(number)),
    ]
    prompt = [{"role": role, "content": content} for role, content in turns]
    return {"prompt": prompt, "answer": str(number + 1)}


def problem_sets() -> tuple[list[dict], list[dict]]:
    """Rows for training and for evaluation; no number is in both."""
    numbers = [number for number in range(100, 999) if number != SHOWN]
    random.Random(0).shuffle(numbers)
    return [row(n) for n in numbers[N_EVAL:]], [row(n) for n in numbers[:N_EVAL]]


def main(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write train.jsonl and eval.jsonl to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), problem_sets(), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m jgrpo.tiny.counting")
