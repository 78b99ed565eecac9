"""Rows are read whole from every kind of source, and evaluation rows never train."""

import json

import datasets
import huggingface_hub
import pytest

from jgrpo.errors import InputError
from jgrpo.prompts.rows import STUDY_SPLITS, Range, choose_ranges, load_rows, read_splits, subtract

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
STUDY = STUDY_SPLITS["qwedsacf/competition_math"]


def chosen(sizes, dataset_split="", eval_split="", study=None):
    training, evaluation = choose_ranges(sizes, dataset_split, eval_split, study)
    return [str(r) for r in training], [str(r) for r in evaluation]


@pytest.mark.parametrize(
    ("sizes", "splits", "training", "evaluation"),
    [
        ({"train": 10}, ("", ""), ["train[0:8]"], ["train[8:10]"]),
        ({"train": 3}, ("", ""), ["train[0:2]"], ["train[2:3]"]),
        ({"test": 10}, ("", ""), ["test[0:8]"], ["test[8:10]"]),
        ({"train": 9, "test": 4}, ("", ""), ["train[0:9]"], ["test[0:4]"]),
        ({"train": 9, "validation": 4}, ("", ""), ["train[0:9]"], ["validation[0:4]"]),
        ({"train": 9, "validation": 4, "test": 3}, ("", ""), ["train[0:9]"], ["test[0:3]"]),
        ({"train": 9}, ("", "train[2:4]"), ["train[0:2]", "train[4:9]"], ["train[2:4]"]),
        ({"train": 9}, ("train[:4]", "train[4:]"), ["train[0:4]"], ["train[4:9]"]),
        ({"a": 9, "b": 2}, ("a", "b"), ["a[0:9]"], ["b[0:2]"]),
    ],
)
def test_which_rows_train_and_which_evaluate(sizes, splits, training, evaluation):
    assert chosen(sizes, *splits) == (training, evaluation)


def test_the_study_s_split_of_competition_math():
    expected = (["train[0:7500]"], ["train[7500:12500]"])
    assert chosen({"train": 12500}, study=STUDY) == expected
    training, _ = chosen({"train": 12500}, eval_split="train[:100]", study=STUDY)
    assert training == ["train[100:7500]"]


def test_an_overlap_names_the_rows_and_the_remedy():
    with pytest.raises(InputError) as error:
        chosen({"train": 10}, "train[:6]", "train[4:]")
    for part in ("train[0:6]", "train[4:10]", "share train[4:6]", "--dataset_split empty"):
        assert part in str(error.value)
    with pytest.raises(InputError, match=r"share train\[8:10\]"):  # with the default evaluation
        chosen({"train": 10}, "train")


def test_unknown_or_undecided_splits_are_named():
    with pytest.raises(InputError, match=r"'nope'.*train \(10 rows\)"):
        chosen({"train": 10}, "nope")
    with pytest.raises(InputError, match="splits easy, hard and none called train"):
        chosen({"easy": 1, "hard": 2})


def test_subtract_leaves_exactly_the_other_rows():
    ranges = [Range("a", 0, 10), Range("b", 0, 3)]
    holes = [Range("a", 2, 4), Range("a", 8, 20), Range("c", 0, 9), Range("b", 0, 3)]
    assert subtract(ranges, holes) == [Range("a", 0, 2), Range("a", 4, 8)]


def test_an_evaluation_file_of_its_own_is_used_whole(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    load = {"dataset_path": a, "dataset_split": "", "eval_split": ""}
    training, evaluation, report = load_rows(eval_dataset_path=b, **load)
    assert (len(training), len(evaluation)) == (10, 10)
    assert report[1] == f"evaluation rows: train[0:10] of {b}"
    same = str(tmp_path / "." / "a.jsonl")
    training, evaluation, _ = load_rows(eval_dataset_path=same, **load)
    assert [r.index for r in training + evaluation] == list(range(10))
    assert len(evaluation) == 2


def test_every_format_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "c.json").write_text("\ufeff" + lines, "utf-8")
    whole = datasets.Dataset.from_list(ROWS)
    whole.to_parquet(str(tmp_path / "d.parquet"))
    whole.save_to_disk(str(tmp_path / "e"))
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet", "e"):
        assert read_splits(str(tmp_path / name)) == {"train": ROWS}, name
    pair = {"train": whole, "test": whole.select(range(3))}
    datasets.DatasetDict(pair).save_to_disk(str(tmp_path / "f"))
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "train.jsonl").write_text(lines)
    (tmp_path / "g" / "test.jsonl").write_text("\n".join(lines.split("\n")[:3]))
    for name in ("f", "g"):
        assert read_splits(str(tmp_path / name)) == {"train": ROWS, "test": ROWS[:3]}, name


def test_a_line_separator_inside_a_string_does_not_cut_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "a\u2028b\x85c"}\n', "utf-8")
    assert read_splits(str(tmp_path / "a.jsonl"))["train"] == [{"question": "a\u2028b\x85c"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"a": 1}\n\n[2]\n', r"a.jsonl, line 3: needs an object, got \[2\]"),
        ("a.json", '[{"a": 1}, 2]', "a.json, item 2: needs an object, got 2"),
        ("a.json", '[{"a": 1}', "a.json: not JSON"),
        ("a.parquet", "not parquet", "a.parquet"),
        ("a.csv", "a,b", "a.csv: needs one of .jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_splits(str(tmp_path / name))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    for path in (str(tmp_path / "no"), "no.jsonl", "./no"):
        with pytest.raises(InputError, match="no such file or folder"):
            read_splits(path)


def test_a_hub_id_that_cannot_be_reached_says_to_give_a_local_file(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"'no-such/data-set'.*give a local .jsonl"):
        read_splits("no-such/data-set")


def test_a_hub_id_can_name_its_configuration(monkeypatch):
    calls = []

    def load_dataset(*arguments):
        calls.append(arguments)
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_splits("openai/gsm8k:main") == {"test": ROWS}
    assert read_splits("some/id") == {"test": ROWS}
    assert calls == [("openai/gsm8k", "main"), ("some/id", None)]
