"""Named sets: each schema of the hub, read from a local copy, gives the problems and golds that a
reader of the hub's rows would write down."""

import json

import pytest

from jgrpo.errors import InputError
from jgrpo.prompts.problems import read_row
from jgrpo.prompts.sets import SETS, read_set

ROWS = {  # a row with the columns of each set's card, and its gold answer
    "gsm8k": ({"question": "How?", "answer": "It is 9 * 2 = <<9*2=18>>18.\n#### 1,018"}, "1018"),
    "math500": (
        {"problem": "Find it.", "solution": "So $\\boxed{\\frac12}$.", "answer": "\\frac{1}{2}",
         "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"}, "\\frac{1}{2}",
    ),
    "aime24": ({"id": 60, "problem": "Find it.", "solution": "\\boxed{204}", "url": "u"}, "204"),
    "aime25": ({"problem": "Find it.", "answer": "70", "id": "0"}, "70"),
    "amc23": ({"id": 0, "answer": 27.0, "url": "u", "question": "Find it."}, "27.0"),
    "minerva": ({"question": "Find it.", "answer": "5.6e-7"}, "5.6e-7"),
    "olympiadbench": (
        {"id": 1, "question": "Find it.", "context": None, "solution": ["..."],
         "final_answer": ["$\\frac{1}{2 n+2}$"], "is_multiple_answer": False, "unit": None,
         "answer_type": "Expression", "error": None}, "$\\frac{1}{2 n+2}$",
    ),
}  # fmt: skip


def test_every_set_of_the_table_is_tried_here():
    assert ROWS.keys() == SETS.keys()


@pytest.mark.parametrize("name", SETS)
def test_a_row_of_the_hub_gives_its_problem_and_gold(name, tmp_path):
    row, gold = ROWS[name]
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    [read], line = read_set(name, tmp_path)
    problem = row.get("question") or row["problem"]
    assert read_row(read.fields) == (problem, gold)
    assert f"the set itself has {SETS[name].n_problems}" in line
    assert SETS[name].licence in line


@pytest.mark.parametrize("name", SETS)
def test_a_revision_is_a_whole_commit(name):
    assert len(SETS[name].revision) == 40
    assert set(SETS[name].revision) <= set("0123456789abcdef")


def test_several_answers_and_a_context(tmp_path):
    row = {"question": "Solve.", "context": "Let x > 0.", "final_answer": ["1", "2"]}
    (tmp_path / "olympiadbench.json").write_text(json.dumps([row]))
    [read], _ = read_set("olympiadbench", tmp_path)
    assert read_row(read.fields) == ("Let x > 0.\n\nSolve.", "1, 2")


def test_a_folder_of_splits_gives_the_set_s_own(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split, answer in (("train", "1"), ("test", "2")):
        row = {"question": "q", "answer": f"#### {answer}"}
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    [read], _ = read_set("gsm8k", tmp_path)
    assert read_row(read.fields) == ("q", "2")


def test_what_is_wrong_with_a_set_is_told(tmp_path):
    with pytest.raises(InputError, match="known: gsm8k, math500"):
        read_set("math501", tmp_path)
    with pytest.raises(InputError, match=r"none of aime25\.jsonl"):
        read_set("aime25", tmp_path)
    (tmp_path / "aime25.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    with pytest.raises(InputError, match="lacks the column 'problem'; it has 'question'"):
        read_set("aime25", tmp_path)


def test_without_the_hub_the_remedy_is_named():
    with pytest.raises(InputError, match="--eval_set_folder"):
        read_set("aime25")
