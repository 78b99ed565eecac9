"""jgrpo.prompts.columns: rows as other tools write them, and what they say."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from prompts.test_problems import OPTIONS, byte_tokenizer

from jgrpo.errors import InputError
from jgrpo.prompts.columns import read_columns
from jgrpo.prompts.problems import load_problems
from jgrpo.prompts.rows import read_file, read_splits

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1?"}


@pytest.mark.parametrize(
    ("fields", "gold"),
    [
        ({"problem": "p", "answer": "7"}, "7"),
        ({"problem": "p", "solution": "", "answer": "7"}, "7"),
        ({"problem": "p", "solution": None, "answer": 7}, "7"),
        ({"problem": "p", "solution": r"So \boxed{7}.", "answer": ""}, "7"),
        ({"prompt": "p", "answer": "7"}, "7"),
        ({"prompt": "p", "solution": "34"}, "34"),  # DAPO, as a reader of its rows writes them
        ({"prompt": [USER], "solution": 34}, "34"),
        ({"prompt": "p", "solution": r"-\frac{1}{2}"}, r"-\frac{1}{2}"),
        ({"prompt": "p", "solution": "$1,000$"}, "$1,000$"),
        ({"question": "q", "answer": 0.00001}, "0.00001"),
        ({"question": "q", "answer": 1e16}, "10000000000000000"),
        ({"question": "q", "answer": 2.5e-7}, "0.00000025"),
        ({"question": "q", "answer": 204.0}, "204.0"),
        ({"question": "q", "answer": -0.5}, "-0.5"),
        ({"question": "q", "answer": ["7"]}, "7"),
        ({"question": "q", "answer": ["1", 2]}, "1, 2"),
        ({"question": "q", "answer": '["34"]'}, "34"),
        ({"question": "q", "answer": "[1, 2]"}, "[1, 2]"),
        ({"prompt": [SYSTEM, USER], "reward_model": {"ground_truth": "2", "style": "rule"}}, "2"),
        ({"messages": [USER, {"role": "assistant", "content": r"It is \boxed{2}."}]}, "2"),
    ],
)
def test_the_answer_of_each_kind_of_row(fields, gold):
    assert read_columns(fields).gold == gold


@pytest.mark.parametrize("solution", ["So it is 5.", "2+3=5", "2+3\n5", "x" + "+1" * 40, " "])
def test_a_solution_in_words_or_steps_needs_a_box(solution):
    with pytest.raises(ValueError, match=r"no \\boxed\{\} with something in it"):
        read_columns({"prompt": "p", "solution": solution})


def test_a_conversation_keeps_its_turns_up_to_the_last_of_the_user():
    reply = {"role": "assistant", "content": "2"}
    assert read_columns({"messages": [SYSTEM, USER, reply]}) == ("1+1?", "2", (SYSTEM, USER))
    shots = [USER, reply, {"role": "user", "content": "2+2?"}]
    read = read_columns({"prompt": shots, "answer": "4"})
    assert read == ("2+2?", "4", tuple(shots))


def test_any_other_column_is_named():
    row = {"text": "q", "meta": {"result": 5}, "answer": "no"}
    assert read_columns(row, "text", "meta.result")[:2] == ("q", "5")
    with pytest.raises(ValueError, match=r"no txet"):
        read_columns(row, "txet", "answer")


def load(tmp_path, rows, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems(byte_tokenizer(), dataset_path=str(file), **{**OPTIONS, **options})


def test_rows_without_known_columns_say_how_they_are_named(tmp_path):
    rows = [{"text": f"{i}?", "result": str(i)} for i in range(10)]
    with pytest.raises(InputError, match=r"'text', 'result'.*--problem_column and --answer_column"):
        load(tmp_path, rows)
    train, _, _ = load(tmp_path, rows, problem_column="text", answer_column="result")
    assert train[0].gold == "0"
    assert train[0].columns == rows[0]


def test_the_hold_out_is_of_problems_where_rows_repeat(tmp_path):
    rows = [{"question": f"{i}?", "answer": i} for _ in range(20) for i in range(10)]
    train, evaluation, _ = load(tmp_path, rows)
    assert (len(train), len(evaluation)) == (8, 2)
    assert not {p.problem for p in train} & {p.problem for p in evaluation}


@pytest.mark.parametrize(
    ("gold", "is_sentence"),
    [
        ("The answer is {}.", True),
        ("She has {} apples left", True),
        ("{}", False),
        (r"{} \text{{ square meters per hour}}", False),
        ("{} square meters", False),
        (r"\frac{{{}}}{{2}}", False),
    ],
)
def test_golds_that_are_sentences_are_told(tmp_path, gold, is_sentence):
    rows = [{"question": f"{i}?", "answer": gold.format(i)} for i in range(10)]
    assert ("are sentences" in " ".join(load(tmp_path, rows)[2])) == is_sentence


def test_a_verl_file_is_read_as_it_is(tmp_path):
    rows = [
        {
            "data_source": "made",
            "prompt": [SYSTEM, {"role": "user", "content": f"{i}+1?"}],
            "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
            "extra_info": {"index": i},
        }
        for i in range(10)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "verl.parquet")
    train, _, _ = load_problems(
        byte_tokenizer(), dataset_path=str(tmp_path / "verl.parquet"), **OPTIONS
    )
    assert [p.gold for p in train] == [str(i + 1) for i in range(8)]
    assert train[3].problem == "3+1?"
    assert "3+1?" in train[3].prompt
    assert train[3].columns["extra_info"] == {"index": 3}


@pytest.mark.parametrize(
    "whole",
    [
        {"data": [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]},
        {
            "version": 1,
            "rows": [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}],
        },
        {"question": ["a", "b"], "answer": ["1", "2"]},
        [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}],
    ],
)
def test_json_of_each_shape_has_the_same_rows(tmp_path, whole):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(whole))
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]
    assert read_file(file) == rows


def test_columns_of_different_lengths_are_told(tmp_path):
    (tmp_path / "rows.json").write_text('{"question": ["a"], "answer": ["1", "2"]}')
    with pytest.raises(InputError, match=r"different lengths.*'answer': 2"):
        read_file(tmp_path / "rows.json")


def test_configurations_are_listed_and_named(tmp_path):
    parts = ""
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(f'{{"question": "{name}", "answer": "2"}}\n')
        parts += f"- config_name: {name}\n  data_files: {name}/train.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    with pytest.raises(InputError, match=r"main, socratic; name one as .*:main"):
        read_splits(str(tmp_path))
    assert read_splits(f"{tmp_path}:socratic")["train"][0]["question"] == "socratic"


def test_a_system_prompt_goes_before_rows_that_bring_none(tmp_path):
    rows = [{"question": f"{i}?", "answer": i} for i in range(10)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _, _ = load_problems(
        byte_tokenizer(None), dataset_path=str(file), system_prompt="Be brief.", **OPTIONS
    )
    assert train[0].prompt.startswith("Be brief.\n\n")
