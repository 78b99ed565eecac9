"""Which columns of a row hold the problem and its answer, and what the two are.

Rows are read as the tools of this field write them: the problem as text (`problem`, `question`,
`prompt`) or as a conversation (`prompt` or `messages`), the answer as `answer` or a
name of its kind, worked out in a `solution`, or in verl's `reward_model.ground_truth`. Whatever
else a data set calls them, --problem_column and --answer_column name them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from jgrpo.answers.equal import last_boxed

PROBLEM_COLUMNS = ("problem", "question", "prompt", "messages")
ANSWER_COLUMNS = (
    "answer", "reward_model.ground_truth", "ground_truth", "final_answer", "expected_answer",
    "solution",
)  # fmt: skip
"""In the order in which they are tried; the first that holds an answer is taken. A `solution` is
worked out: the answer is in its last \\boxed{}, unless it is the answer alone."""
MAX_BARE_CHARS = 60
THOUSANDS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?")

Messages = tuple[Mapping[str, str], ...]
"""A conversation: each message has a `role` and a `content`."""


class Read(NamedTuple):
    """What a row says. `messages` is empty where the problem is plain text."""

    problem: str
    gold: str
    messages: Messages = ()


def read_columns(
    fields: Mapping[str, Any], problem_column: str = "", answer_column: str = ""
) -> Read:
    """The problem and its gold answer. Raises ValueError with the reason if there is none.

    The answer in a text: what follows the last `####` (thousands commas are dropped), else the last
    \\boxed{}, else the whole if it is one line (a `solution` must have one of the first
    two, or be one formula without words).
    """
    problem, messages = _problem(fields, problem_column)
    gold = _gold(fields, answer_column, messages)
    if any("\ud800" <= char <= "\udfff" for char in problem + gold):
        raise ValueError("half a surrogate pair, which is no text, in the problem or its answer")
    turns = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return Read(problem, gold, messages[: turns[-1] + 1] if turns else ())


def has_columns(fields: Mapping[str, Any], problem_column: str, answer_column: str) -> bool:
    """Whether the row has a column for each, whatever is in it."""
    problems = (problem_column,) if problem_column else PROBLEM_COLUMNS
    answers = (answer_column,) if answer_column else ANSWER_COLUMNS
    has_answer = any(_at(fields, name) is not None for name in answers) or "messages" in fields
    return has_answer and any(_at(fields, name) is not None for name in problems)


def _at(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a column; `a.b` is the field b of the column a. None if there is none."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _problem(fields: Mapping[str, Any], column: str) -> tuple[str, Messages]:
    names = [n for n in ((column,) if column else PROBLEM_COLUMNS) if _at(fields, n) is not None]
    if not names:
        raise ValueError(f"no {column}" if column else "no column with a problem")
    value = _at(fields, names[0])
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        messages = _messages(value)
        users = [m["content"] for m in messages if m["role"] == "user"]
        if users and users[-1].strip():
            return users[-1].strip(), messages
        raise ValueError(f"no message of a user with text in {names[0]}")
    if not isinstance(value, str) or not value.strip():
        raise ValueError("the problem is empty or not text")
    return value.strip(), ()


def _messages(value: Sequence[Any]) -> Messages:
    for m in value:
        if not isinstance(m, Mapping) or not all(
            isinstance(m.get(key), str) for key in ("role", "content")
        ):
            raise ValueError("a message needs a role and a content that is text")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _gold(fields: Mapping[str, Any], column: str, messages: Messages) -> str:
    names = (column,) if column else ANSWER_COLUMNS
    if not column and {"problem", "solution", "question", "answer"} <= fields.keys():
        names = ("solution", *names)  # the answer is the question's
    found = [name for name in names if name in fields or _at(fields, name) is not None]
    for name in found:
        text = _text(_at(fields, name))
        if gold := _answer(text, is_worked_out=name == "solution" and not column).strip():
            return gold
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    if not found and replies and (gold := _answer(replies[-1], is_worked_out=False)):
        return gold
    if not found and not replies:
        raise ValueError(f"no {column}" if column else "no column with an answer")
    if "solution" in found:
        raise ValueError("no \\boxed{} with something in it in the solution")
    raise ValueError("no answer after ####, in \\boxed{}, or as the only line")


def _text(value: Any) -> str:
    """Text of an answer: a number as one writes it (0.00001, not 1e-05), a list's items joined by
    commas, the JSON of a list as the list. Else empty."""
    if isinstance(value, str):
        return ", ".join(items) if (items := _listed(value)) is not None else value
    if isinstance(value, list | tuple):
        items = [_text(item).strip() for item in value]
        return ", ".join(items) if all(items) else ""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not is_number or value != value or abs(value) == float("inf"):
        return ""
    text = str(value)
    return format(Decimal(text), "f") if "e" in text.lower() else text


def _listed(text: str) -> list[str] | None:
    """`["7"]`, a list of texts as JSON (DAPO, MATH-lighteval); [1, 2] may be an interval: kept."""
    if not text.lstrip().startswith('["'):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return items if items and all(isinstance(item, str) for item in items) else None


def _is_bare(solution: str) -> bool:
    """Is a solution nothing but its answer, as DAPO's `34` is: one formula, without words?"""
    words = re.search(r"[A-Za-z]{2}|[=\n]", re.sub(r"\\[A-Za-z]+", "", solution))
    return not words and len(solution) <= MAX_BARE_CHARS


def _answer(answer: str, *, is_worked_out: bool) -> str:
    _, mark, final = answer.rpartition("####")
    final = final.strip()
    if mark:
        return final.replace(",", "") if THOUSANDS.fullmatch(final) else final
    boxed = last_boxed(answer)
    if boxed is not None or (is_worked_out and not _is_bare(final)):
        return boxed or ""
    return "" if "\n" in final else final
