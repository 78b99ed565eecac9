"""Pass rates in a file, and the part of the training problems that a run takes by them: exactly
that part, and never by a file of another model, prompt or set."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_config, write_base, write_problems

from jgrpo.config import Config
from jgrpo.errors import InputError
from jgrpo.prompts.problems import Problem
from jgrpo.run import difficulty
from jgrpo.run.difficulty import (
    add_rates,
    begin_rates,
    made_with,
    of_this_difficulty,
    read_rates,
)
from jgrpo.run.session import Problems

TOKENIZER: Any = SimpleNamespace()
ASKED = [Problem((1,), "p", f"{i} + 1", str(i + 1), i) for i in range(5)]
CORRECT = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("difficulty") / "base")


@pytest.fixture
def config(base, tmp_path):
    file = tmp_path / "rates.jsonl"
    return Config(model_id=str(base), pass_rate=(0.25, 0.75), pass_rate_file=str(file))


@pytest.fixture
def problems(config, tmp_path):
    asked = Problems(TOKENIZER, (7,), ASKED, ASKED[:1], ["a report"], ("{problem}", "chat"))
    begin_rates(tmp_path / "rates.jsonl", made_with(config, asked), 4, 42)
    add_rates(tmp_path / "rates.jsonl", ASKED, CORRECT)
    return asked


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ((0.25, 0.75), [1, 2, 3]),
        ((0.0, 0.0), [0]),
        ((0.3, 1.0), [2, 3, 4]),
        ((0, 1), [0, 1, 2, 3, 4]),
    ],
)
def test_the_part_has_the_rates_that_were_asked_for_ends_included(config, problems, limits, left):
    part = of_this_difficulty(replace(config, pass_rate=limits), problems)
    assert [p.index for p in part.train] == left
    assert part.evaluation == problems.evaluation
    assert part.report[-1].endswith(f": {len(left)} of 5 training problems")
    assert (part.fingerprint == problems.fingerprint) == (len(left) == 5)  # what a resume compares


def test_without_limits_no_file_is_read(config, problems):
    gone = replace(config, pass_rate=(), pass_rate_file="nowhere.jsonl")
    assert of_this_difficulty(gone, problems) is problems


def test_a_part_of_the_measured_problems_is_fine_and_other_problems_are_not(config, problems):
    some = replace(problems, train=ASKED[1:3])
    assert of_this_difficulty(config, some).train == ASKED[1:3]
    for other in (replace(ASKED[0], problem="9 + 9"), replace(ASKED[0], gold="another")):
        with pytest.raises(
            InputError, match=r"of other problems, or not fin.*: 1 of 6 .*jgrpo\.filter"
        ):
            of_this_difficulty(config, replace(problems, train=[*ASKED, other]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.7}, "temperature 1.0, now 0.7"),
        ({"max_tokens": 8}, "max_tokens 1024, now 8"),
        ({"system_prompt": "Think."}, "system_prompt '', now 'Think.'"),
        ({"enable_thinking": True}, "enable_thinking False, now True"),
    ],
)
def test_a_file_of_another_sampling_is_stale(config, problems, change, named):
    with pytest.raises(InputError) as error:
        of_this_difficulty(replace(config, **change), problems)
    assert f"was made with another {named}; make it again" in str(error.value)


def test_a_file_of_another_model_template_or_adapter_is_stale(
    config, problems, monkeypatch, tmp_path
):
    with pytest.raises(InputError, match="another templates"):
        of_this_difficulty(config, replace(problems, templates=("{problem}!", "chat")))
    monkeypatch.setattr(difficulty, "weights_fingerprint", lambda folder: "other")
    with pytest.raises(InputError, match=r"another model .* now 'other'"):
        of_this_difficulty(config, problems)
    monkeypatch.undo()
    monkeypatch.setattr(difficulty.adapters, "fingerprint", lambda folder: "sft")
    with pytest.raises(InputError, match="another adapter None, now 'sft'"):
        of_this_difficulty(replace(config, adapter=str(tmp_path)), problems)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json\n",
        "[]\n",
        '{"made_with": 3}\n',
        '{"made_with": {}}\n{"problem": "a"}\n',
        '{"made_with": {}}\n{"problem": "a", "gold": "1", "n_correct": 1, "n_samples": 0}\n',
        '{"made_with": {}}\n{"problem": "a", "gold": "1", "n_correct": 9, "n_samples": 8}\n',
        '{"made_with": {}}\n{"problem": "a", "gold": "1", "n_correct": "1", "n_samples": 8}\n',
        '{"problem": "a", "gold": "1", "n_correct": 1, "n_samples": 8}\n',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_one_clear_error(config, problems, content, tmp_path):
    (tmp_path / "rates.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"rates\.jsonl: not written by jgrpo\.filter.*make it"):
        of_this_difficulty(config, problems)


def test_a_file_that_is_missing_or_no_text_is_one_clear_error(config, problems, tmp_path):
    (tmp_path / "rates.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"not written by jgrpo\.filter"):
        of_this_difficulty(config, problems)
    (tmp_path / "rates.jsonl").unlink()
    with pytest.raises(InputError, match=r"there is none: python -m jgrpo\.filter"):
        of_this_difficulty(config, problems)


def test_where_none_is_left_it_is_said(config, problems):
    with pytest.raises(InputError, match=r"pass_rate=0\.1 0\.2: none of 5 problems .* widen it"):
        of_this_difficulty(replace(config, pass_rate=(0.1, 0.2)), problems)


@pytest.mark.parametrize("limits", [(0.2,), (0.8, 0.2), (-0.1, 0.5), (0.5, 1.1), (0.1, 0.2, 0.3)])
def test_limits_that_cannot_be_are_refused(limits):
    with pytest.raises(InputError, match=r"pass_rate=.*two numbers between 0 and 1"):
        Config(pass_rate=limits)


# -- written as it is measured ---------------------------------------------------------------------

MADE = {"model": "m", "adapter": None}


def test_what_was_measured_is_kept_to_the_last_whole_line(tmp_path):
    file = tmp_path / "rates.jsonl"
    assert begin_rates(file, MADE, 4, 42) == {}
    first = add_rates(file, ASKED[:2], CORRECT[:2])
    assert first == {("0 + 1", "1"): 0, ("1 + 1", "2"): 0.25}
    second = add_rates(file, ASKED[2:3], CORRECT[2:3])
    whole = file.read_text()
    for n_torn in range(1, 30):  # killed in the middle of the third
        file.write_text(whole[:-n_torn])
        kept = begin_rates(file, MADE, 4, 42)
        assert kept == (first | second if n_torn == 1 else first)
    assert add_rates(file, ASKED[2:3], CORRECT[2:3]) == second
    assert file.read_text() == whole
    assert read_rates(file) == (MADE, first | second)


@pytest.mark.parametrize(
    "other", [({"model": "other", "adapter": None}, 4, 42), (MADE, 8, 42), (MADE, 4, 7)], ids=str
)
def test_what_was_measured_otherwise_is_measured_anew(other, tmp_path):
    file = tmp_path / "rates.jsonl"
    begin_rates(file, MADE, 4, 42)
    add_rates(file, ASKED, CORRECT)
    assert begin_rates(file, *other) == {}
    assert len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[]\n", "\x00", '{"made_with": {}}\n{"problem": 1}\n'])
def test_a_file_of_something_else_is_begun_anew(content, tmp_path):
    file = tmp_path / "rates.jsonl"
    file.write_text(content)
    assert begin_rates(file, MADE, 4, 42) == {}
    add_rates(file, ASKED, CORRECT)
    assert len(read_rates(file)[1]) == 5


@pytest.mark.slow
def test_filter_counts_what_it_samples_and_train_takes_the_part(
    tmp_path, base, monkeypatch, capsys
):
    """The command itself, on the tests' model: every count is one of k, half-right problems are
    there, and the run's first step asks only those of the part."""
    from jgrpo import cli
    from jgrpo.filter import measure
    from jgrpo.train import train

    (tmp_path / "base").symlink_to(base)
    write_problems(tmp_path)
    file = tmp_path / "rates.jsonl"
    config = tiny_config(tmp_path, pass_rate_file=str(file), n_grpo_steps=1, eval_every=0)
    measured = measure(cli.Filter(options=config, k=8))
    assert len(measured) == len((tmp_path / "train.jsonl").read_text().splitlines())
    made, rates = read_rates(file)
    assert made["max_tokens"] == 6
    assert sorted(rates.values()) == sorted(measured.tolist())
    assert 0 < measured.mean() < 1

    # Stopped after five problems and asked again, in parts of two: the same as at once.
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:6]))
    monkeypatch.setattr("jgrpo.filter.AT_ONCE", 16)
    np.testing.assert_array_equal(measure(cli.Filter(options=config, k=8)), measured)
    assert file.read_text() == whole
    assert f"5 problems were in {file} already" in capsys.readouterr().out
    run = train(replace(config, pass_rate=(0.125, 0.25)))
    lines = (run / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows
    assert all(0.125 <= rates[row["problem"], row["gold"]] <= 0.25 for row in rows)
