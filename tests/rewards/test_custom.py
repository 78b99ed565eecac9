"""Reward functions of the user's own: found, called as TRL calls them, and checked."""

import sys

import numpy as np
import pytest

from jgrpo.errors import InputError, RunError
from jgrpo.rewards.custom import arguments, custom_rewards, load_function, load_functions

OURS = {
    "prompts": ["p0", "p0", "p1", "p1"],
    "completions": ["a", "bb", "ccc", ""],
    "completion_ids": [[1], [1, 2], [1, 2, 3], []],
    "gold": ["g0", "g0", "g1", "g1"],
    "correct": [1.0, 0.0, 0.0, 1.0],
}


@pytest.fixture(autouse=True)
def same_path(monkeypatch):
    """A reward file's folder stays on sys.path; not beyond a test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


def write(folder, body: str, name="mine.py") -> str:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(body)
    return f"{folder}/{name}:reward"


def call(*specs: str, weights=None, columns=({}, {})) -> dict[str, list]:
    functions = load_functions(specs)
    given = arguments(columns, 2, OURS)
    parts = custom_rewards(functions, weights or [1.0] * len(functions), given)
    assert all(part.dtype == np.float32 for part in parts.values())
    return {name: part.tolist() for name, part in parts.items()}


def test_a_function_sees_flat_lists_and_its_values_come_back_in_place(tmp_path):
    spec = write(
        tmp_path,
        "def reward(prompts, completions, completion_ids, gold, correct):\n"
        "    assert prompts == ['p0', 'p0', 'p1', 'p1'] and gold == ['g0', 'g0', 'g1', 'g1']\n"
        "    assert [len(i) for i in completion_ids] == [len(c) for c in completions]\n"
        "    return [10 * c + len(t) for c, t in zip(correct, completions)]\n",
    )
    assert call(spec) == {"custom": [11, 2, 3, 10]}


def test_a_function_gets_what_its_signature_takes_and_the_columns_of_the_rows(tmp_path):
    """A TRL reward function as TRL's documentation has it: columns by name, the rest in kwargs."""
    spec = write(
        tmp_path,
        "def reward(completions, level, **kwargs):\n"
        "    assert {'prompts', 'completion_ids', 'source'} <= kwargs.keys()\n"
        "    assert kwargs['source'] == ['x', 'x', None, None]\n"
        "    return [n * len(c) for n, c in zip(level, completions)]\n",
    )
    columns = {"level": 2, "source": "x"}, {"level": 5}
    assert call(spec, columns=columns) == {"custom": [2, 4, 15, 0]}
    few = write(tmp_path, "def reward(gold):\n    return [len(g) for g in gold]\n", "few.py")
    assert call(few) == {"custom": [2, 2, 2, 2]}
    assert call(few, columns=({"gold": "a"}, {"gold": "abc"})) == {"custom": [1, 1, 3, 3]}
    assert call(few, columns=({"prompts": 1, "completions": 2},) * 2) == {"custom": [2] * 4}


def test_a_column_that_is_not_there_is_told_before_anything_runs(tmp_path):
    spec = write(tmp_path, "def reward(completions, level, other=3): pass")
    with pytest.raises(InputError, match=r"needs level, .*completions.*, problem, answer;"):
        load_functions([spec], ["problem", "answer"])
    load_functions([spec], ["problem", "level"])


def test_a_file_finds_the_modules_beside_it_and_not_those_of_another_folder(tmp_path):
    body = "import helpers_of_a_test as h\ndef reward(completions):\n    return [h.S] * 4\n"
    one, two = (write(tmp_path / name, body) for name in ("one", "two"))
    for name, score in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name / "helpers_of_a_test.py").write_text(f"S = {score}\n")
    parts = call(one, two)
    assert parts == {"custom": [3.0] * 4, "custom/mine.reward.1": [1] * 4,
                     "custom/mine.reward.2": [2] * 4}  # fmt: skip


def test_a_module_beside_the_file_may_be_imported_when_the_function_is_called(tmp_path):
    (tmp_path / "late_of_a_test.py").write_text("S = 7.0\n")
    late = "def reward(completions):\n    import late_of_a_test as h\n    return [h.S] * 4\n"
    assert call(write(tmp_path, late)) == {"custom": [7.0] * 4}


def test_several_functions_are_weighed_and_each_is_a_part(tmp_path):
    body = "def one(correct):\n    return correct\ndef long(completions):\n"
    body += "    return [len(c) for c in completions]\n"
    (tmp_path / "mine.py").write_text(body)
    specs = [f"{tmp_path}/mine.py:one", f"{tmp_path}/mine.py:long"]
    assert call(*specs, weights=(2.0, 0.5)) == {
        "custom": [2.5, 1.0, 1.5, 2.0],
        "custom/one": [1, 0, 0, 1],
        "custom/long": [1, 2, 3, 0],
    }


def test_none_leaves_a_completion_out_of_that_reward(tmp_path):
    none = write(tmp_path, "def reward(correct):\n    return [None, 5, None, 5]\n", "none.py")
    some = write(tmp_path, "def reward(correct):\n    return correct\n", "some.py")
    parts = call(none, some)
    assert parts["custom"] == [1, 5, 0, 6]
    np.testing.assert_array_equal(parts["custom/none.reward"], [np.nan, 5, np.nan, 5])
    assert call(none) == {"custom": [0, 5, 0, 5]}


def test_a_function_of_a_module_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("def reward(correct, **_):\n    return correct\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert call("my_module:reward") == {"custom": OURS["correct"]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(): pass", "defines no reward"),
        ("import no_such_module", "No module named"),
        ("def reward(:", "SyntaxError"),
        ("reward = 3", "takes the keywords"),
        ("x = {}['reward']", "line 1"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        load_function(write(tmp_path, body))


def test_missing_files_and_modules_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_function(f"{tmp_path}/none.py:reward")
    with pytest.raises(InputError, match="No module named 'nowhere'"):
        load_function("nowhere:reward")


@pytest.mark.parametrize(
    "values",
    [
        "[1, 0, 1, 1]",
        "(1, 0, 1, 1)",
        "iter([1, 0, 1, 1])",
        "(x for x in [1, 0, 1, 1])",
        "np.array([1, 0, 1, 1])",
        "[True, False, True, True]",
        "list(np.ones(4) * [1, 0, 1, 1])",
    ],
)
def test_numbers_of_all_kinds_are_taken(tmp_path, values):
    body = f"import numpy as np\ndef reward(completions):\n    return {values}\n"
    if values.startswith("iter"):
        with pytest.raises(RunError, match="list_iterator"):
            call(write(tmp_path, body))
    else:
        assert call(write(tmp_path, body)) == {"custom": [1, 0, 1, 1]}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("[1.0] * 3", "returned 3 values for 4 completions"),
        ("[1.0] * 5", "returned 5 values for 4 completions"),
        ("[]", "returned 0 values for 4"),
        ("[0, float('inf'), 0, 0]", "inf (float) for completion 1"),
        ("[0, 0, -float('inf'), 0]", "-inf (float) for completion 2"),
        ("[float('nan'), 0, 0, 0]", "nan (float) for completion 0"),
        ("[0, 0, 0, 1e39]", "1e+39 (float) for completion 3"),  # infinite in float32
        ("{0: 1, 1: 1, 2: 1, 3: 1}", "(dict)"),
        ("{1, 2, 3, 4}", "(set)"),
        ("'1011'", "'1011' (str)"),
        ("['1', '0', '1', '1']", "'1' (str) for completion 0"),
        ("1.0", "1.0 (float)"),
        ("None", "None (NoneType)"),
        ("[[1], [0], [1], [1]]", "[1] (list) for completion 0"),
        ("[1, {}, 1, 1]", "{} (dict) for completion 1"),
    ],
)
def test_what_is_not_a_number_for_each_completion_is_told_as_what_it_is(tmp_path, values, says):
    spec = write(tmp_path, f"def reward(completions):\n    return {values}\n")
    with pytest.raises(RunError) as error:
        call(spec)
    assert says in str(error.value)
    assert spec in str(error.value)


def test_an_error_of_the_user_s_shows_its_traceback_from_their_file_on(tmp_path):
    body = (
        "def inner(x):\n    return x['missing']\ndef reward(completions):\n    return inner({})\n"
    )
    with pytest.raises(RunError) as error:
        call(write(tmp_path, body))
    first, title, *frames = str(error.value).splitlines()
    assert "raised KeyError: 'missing'" in first
    assert title.startswith("Traceback")
    assert "mine.py" in frames[0]
    assert "line 4" in frames[0]
    assert "custom.py" not in str(error.value)
