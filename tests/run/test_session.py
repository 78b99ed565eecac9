"""jgrpo.run.session: what a run is made from, as its fingerprint knows it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from jgrpo.prompts.problems import Problem
from jgrpo.run.session import Problems

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
