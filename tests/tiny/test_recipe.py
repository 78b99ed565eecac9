"""The quick start's recipe: what it ships is what it says, and evaluation problems stay unseen."""

import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import jgrpo
from jgrpo.answers.equal import is_correct
from jgrpo.policy.model import Decoder, ModelConfig
from jgrpo.policy.rope import Rope
from jgrpo.tiny import recipe as tiny

BASE = Path(jgrpo.__file__).with_name("tiny") / "base"
BOTH = pytest.mark.parametrize(("folder", "digits"), [("base", 3), ("long", 4)])
"""The shipped bases, and the digits of their longest numbers."""


def rows(name: str, folder: str = "base") -> list[dict]:
    return [json.loads(line) for line in (BASE.with_name(folder) / f"{name}.jsonl").open()]


@BOTH
def test_the_shipped_problems_are_those_of_the_recipe(folder, digits):
    train, held_out = tiny.problem_sets(tiny.N_TRAIN, tiny.N_EVAL, seed=0, digits=digits)
    assert rows("train", folder) == list(train.values())
    assert rows("eval", folder) == list(held_out.values())
    assert not set(train) & set(held_out)
    assert {row["kind"] for row in rows("eval", folder)} == set(tiny.KINDS)


@BOTH
def test_the_base_is_never_taught_an_evaluation_problem(folder, digits, monkeypatch):
    _, held_out = tiny.problem_sets(tiny.N_TRAIN, tiny.N_EVAL, seed=0, digits=digits)
    taught = []
    monkeypatch.setattr(tiny, "solution", lambda *p, haste: taught.append(p) or "1")
    list(islice(tiny.corpus(tiny.make_tokenizer(), held_out, random.Random(1), digits), 700))
    identities = {tiny.identity(*p) for p in taught}
    assert len(identities) > 1500
    assert not identities & set(held_out)


def test_longer_problems_are_none_of_the_quick_start_s():
    """The base of longer sums went on from the quick start's, which was taught the short ones."""
    rng = random.Random(0)
    for kind, a, b in (tiny.problem(rng, digits=4)[1:] for _ in range(1000)):
        assert kind in tiny.KINDS
        assert 1000 <= max(a, b) < 10_000 or (kind == "multiplication" and 100 <= a < 1000)


@pytest.mark.parametrize(
    ("kind", "a", "b", "careful", "hasty"),
    [
        ("addition", 277, 535, r"7+5+0=12, 7+3+1=11, 2+5+1=8. \boxed{812}", r"\boxed{702}"),
        ("subtraction", 923, 788, r"13-8-0=5, 12-8-1=3, 9-7-1=1. \boxed{135}", r"\boxed{265}"),
        ("multiplication", 29, 5, r"9*5+0=45, 2*5+4=14. \boxed{145}", r"\boxed{105}"),
        ("addition", 645, 830, r"5+0+0=5, 4+3+0=7, 6+8+0=14. \boxed{1475}", r"\boxed{1475}"),
    ],
)
def test_the_two_manners(kind, a, b, careful, hasty):
    assert tiny.solution(kind, a, b, haste=False) == careful
    assert tiny.solution(kind, a, b, haste=True) == hasty


def test_care_is_always_right_and_haste_sometimes():
    rng = random.Random(0)
    problems = [tiny.problem(rng)[1:] for _ in range(1000)]
    golds = [str(tiny.answer(*p)) for p in problems]
    care, haste = (
        [is_correct(tiny.solution(*p, haste=h), g) for p, g in zip(problems, golds, strict=True)]
        for h in (False, True)
    )
    assert all(care)
    assert 0.2 < np.mean(haste) < 0.4


def test_text_comes_back_from_the_tokenizer_exactly():
    tokenizer = tiny.make_tokenizer()
    for row in rows("eval")[:100]:
        ids = tokenizer.encode(row["question"], add_special_tokens=False)
        assert tokenizer.decode(ids) == row["question"]
        assert tokenizer.unk_token_id not in ids


@pytest.mark.slow
def test_pretraining_learns(capsys):
    tokenizer = tiny.make_tokenizer()
    rope = Rope(32, 1e4)
    shape = ModelConfig(1, 32, 64, 2, 1, 32, len(tokenizer), 1e-6, rope, False, True, True)
    args = tiny.Args(folder=Path(), steps=40, batch_size=4)
    tiny.pretrain(
        Decoder(shape, rngs=nnx.Rngs(0)), tiny.corpus(tokenizer, {}, random.Random(0)), args
    )
    last = float(capsys.readouterr().out.split("loss")[-1].split()[0])
    assert last < 0.8 * np.log(len(tokenizer))  # better than knowing nothing
