"""Rows -> prompts: what the model reads, the answer it is checked against, and in which order.

A row is `problem` + `solution` (the gold answer is the solution's last \\boxed{}) or `question` +
`answer` (the gold answer follows `#### `). Nothing leaves quietly: each row that cannot be used
is counted in the report, by reason, with examples.
"""

import functools
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jgrpo.answers.equal import last_boxed
from jgrpo.errors import InputError
from jgrpo.prompts.rows import Row, load_rows
from jgrpo.prompts.tokenizer import render

SLOT = "{problem}"
SCHEMAS = ({"problem", "solution"}, {"question", "answer"})
THOUSANDS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?")

Read = tuple[Row, str, str]
"""A row, its problem and its gold answer."""
LeftOut = dict[str, list[Row]]
"""Reason -> the rows left out for it."""


@dataclass(frozen=True)
class Problem:
    """One prompt with its answer. `prompt_ids` is what the model reads; `prompt` the same as text;
    `index` is the row's place in its split, `columns` what the row holds, by name."""

    prompt_ids: tuple[int, ...]
    prompt: str
    problem: str
    gold: str
    index: int
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)


def step_indices(n_problems: int, n_prompts_per_step: int, seed: int, step: int) -> list[int]:
    """The problems of one step, counted from 1: a pure function, so that a resumed run goes on.

    An endless sequence of permutations, one an epoch, drawn from (seed, epoch), is cut into steps.
    An epoch visits every problem once, and may end within a step; a step that spans two epochs can
    therefore hold a problem twice.
    """
    if n_problems < 1 or n_prompts_per_step < 1 or step < 1:
        raise ValueError(f"{n_problems=}, {n_prompts_per_step=} and {step=} must be positive")
    first = (step - 1) * n_prompts_per_step
    positions = np.arange(first, first + n_prompts_per_step)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(n_problems)
        for epoch in np.unique(positions // n_problems).tolist()
    }
    return [int(orders[p // n_problems][p % n_problems]) for p in positions.tolist()]


def replacement_indices(
    n_problems: int, n: int, seed: int, step: int, sampling_round: int, used: Set[int]
) -> list[int]:
    """At most n problems that the step has not `used` yet, for prompts that had nothing to teach:
    the first ones of a permutation drawn from (seed, step, round)."""
    order = np.random.default_rng((seed, step, sampling_round)).permutation(n_problems).tolist()
    return [i for i in order if i not in used][:n]


def read_row(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The problem's text and its gold answer.

    In `answer`: what follows the last `####` (thousands commas are dropped), else the last
    \\boxed{}, else the whole if it is one line. Raises ValueError with the reason if there is none.
    """
    if SCHEMAS[0] <= fields.keys():
        problem, gold = _text(fields["problem"]), last_boxed(_text(fields["solution"])) or ""
        reason = "no \\boxed{} with something in it in the solution"
    elif SCHEMAS[1] <= fields.keys():
        problem, gold = _text(fields["question"]), _answer(_text(fields["answer"]))
        reason = "no answer after ####, in \\boxed{}, or as the only line"
    else:
        raise ValueError("neither problem and solution, nor question and answer")
    if not problem.strip():
        raise ValueError("the problem is empty or not text")
    if not gold.strip():
        raise ValueError(reason)
    if any("\ud800" <= char <= "\udfff" for char in problem + gold):
        raise ValueError("half a surrogate pair, which is no text, in the problem or its answer")
    return problem.strip(), gold.strip()


def _text(value: Any) -> str:
    """Text of a field; numbers are read too, since `"answer": 18` is common. Else empty."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return value if isinstance(value, str) else str(value) if is_number else ""


def _answer(answer: str) -> str:
    _, mark, final = answer.rpartition("####")
    final = final.strip()
    if mark:
        return final.replace(",", "") if THOUSANDS.fullmatch(final) else final
    boxed = last_boxed(answer)
    return boxed if boxed is not None else "" if "\n" in final else final


def load_template(name: str) -> str:
    """The template's text: the path as given, else a bare name beside this package.

    Blanks at both ends are dropped. Raises InputError if it has no {problem} in it.
    """
    package = Path(__file__).parents[1]
    places = [Path(name)]
    if Path(name).name == name:
        places += [package / name, package.parent / name]  # a wheel; a clone
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        tried = ", ".join(str(place) for place in places)
        raise InputError(f"prompt_template={name}: no such file (tried {tried})")
    try:
        template = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt_template={file}: {error}; it must be text in UTF-8") from error
    if SLOT not in template:
        raise InputError(f"prompt_template={file}: must contain {SLOT}, where the problem goes")
    return template


def load_problems(
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset_path: str,
    dataset_split: str,
    eval_dataset_path: str,
    eval_split: str,
    prompt_template: str,
    enable_thinking: bool,
    max_prompt_tokens: int,
    n_eval_prompts: int,
) -> tuple[list[Problem], list[Problem], list[str]]:
    """Training problems, evaluation problems, and the report: lines for the user to read.

    The evaluation takes `n_eval_prompts` evenly spaced, whatever the seed. A training row that
    repeats an earlier one, or any evaluation problem (blanks aside), is left out. Raises InputError
    if either list would be empty.
    """
    template = load_template(prompt_template)
    train_rows, eval_rows, report = load_rows(
        dataset_path=dataset_path,
        dataset_split=dataset_split,
        eval_dataset_path=eval_dataset_path,
        eval_split=eval_split,
    )
    left_out: LeftOut = {}
    evaluation = _read_rows(eval_rows, "evaluation", left_out)
    training = _read_rows(train_rows, "training", left_out)
    training = _without_repeats(training, {_key(problem) for _, problem, _ in evaluation}, left_out)
    make = functools.partial(
        _make_problems,
        tokenizer,
        left_out,
        template=template,
        enable_thinking=enable_thinking,
        max_prompt_tokens=max_prompt_tokens,
    )
    train, candidates = make(training, "training"), make(evaluation, "evaluation")
    n_eval = min(n_eval_prompts, len(candidates))
    eval_ = [candidates[i * len(candidates) // n_eval] for i in range(n_eval)]
    report += _describe_left_out(left_out)
    for name, problems in (("training", train), ("evaluation", eval_)):
        if not problems:
            raise InputError(f"no {name} problem is left:\n  " + "\n  ".join(report))
    report += _describe_prompts(tokenizer, template, enable_thinking)
    n_ids = [len(p.prompt_ids) for p in train]
    report.append(f"{len(train)} training problems, prompts of {min(n_ids)} to {max(n_ids)} tokens")
    report.append(f"{len(eval_)} of {len(candidates)} evaluation problems, evenly spaced")
    return train, eval_, report


def make_evaluation(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    prompt_template: str,
    enable_thinking: bool,
    max_prompt_tokens: int,
) -> tuple[list[Problem], list[str]]:
    """Evaluation problems of all `rows`, and lines on rows left out. InputError if none is left."""
    left_out: LeftOut = {}
    problems = _make_problems(
        tokenizer,
        left_out,
        _read_rows(rows, "evaluation", left_out),
        "evaluation",
        template=load_template(prompt_template),
        enable_thinking=enable_thinking,
        max_prompt_tokens=max_prompt_tokens,
    )
    report = _describe_left_out(left_out)
    if not problems:
        raise InputError("no evaluation problem is left:\n  " + "\n  ".join(report))
    return problems, report


def overlap(problems: Sequence[Problem], training: Sequence[Problem]) -> int:
    """How many of the problems are training problems too (blanks aside)."""
    keys = {_key(p.problem) for p in training}
    return sum(_key(p.problem) in keys for p in problems)


def _key(problem: str) -> str:
    return " ".join(problem.split())


def _read_rows(rows: Sequence[Row], purpose: str, left_out: LeftOut) -> list[Read]:
    if rows and not any(keys <= row.fields.keys() for row in rows for keys in SCHEMAS):
        raise InputError(
            f"{purpose} rows have the columns {', '.join(map(repr, rows[0].fields))}; "
            "they need 'problem' and 'solution' (answer in the solution's last \\boxed{}), "
            "or 'question' and 'answer' (answer after ####)"
        )
    read: list[Read] = []
    for row in rows:
        try:
            read.append((row, *read_row(row.fields)))
        except ValueError as reason:
            left_out.setdefault(f"{purpose}: {reason}", []).append(row)
    return read


def _without_repeats(training: list[Read], held_out: set[str], left_out: LeftOut) -> list[Read]:
    kept: list[Read] = []
    seen: set[str] = set()
    for row, problem, gold in training:
        key = _key(problem)
        if key in held_out:
            left_out.setdefault("training: also an evaluation problem", []).append(row)
        elif key in seen:
            left_out.setdefault("training: repeats an earlier problem", []).append(row)
        else:
            seen.add(key)
            kept.append((row, problem, gold))
    return kept


def _make_problems(
    tokenizer: PreTrainedTokenizerBase,
    left_out: LeftOut,
    read: list[Read],
    purpose: str,
    *,
    template: str,
    enable_thinking: bool,
    max_prompt_tokens: int,
) -> list[Problem]:
    texts = [template.replace(SLOT, problem) for _, problem, _ in read]
    prompts, prompt_ids = render(tokenizer, texts, enable_thinking=enable_thinking)
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    problems = []
    for (row, problem, gold), prompt, ids in zip(read, prompts, prompt_ids, strict=True):
        if any(token in problem for token in special):
            reason = f"{purpose}: a special token of the tokenizer is in the problem"
            left_out.setdefault(reason, []).append(row)
        elif len(ids) > max_prompt_tokens:
            reason = f"{purpose}: prompt longer than max_prompt_tokens={max_prompt_tokens}"
            left_out.setdefault(reason, []).append(row)
        else:
            problems.append(Problem(ids, prompt, problem, gold, row.index, row.fields))
    return problems


def _describe_left_out(left_out: LeftOut) -> list[str]:
    lines = []
    for reason, rows in left_out.items():
        examples = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
        lines.append(f"left out of {reason}: {len(rows)} rows ({examples})")
    return lines


def _describe_prompts(
    tokenizer: PreTrainedTokenizerBase, template: str, enable_thinking: bool
) -> list[str]:
    if tokenizer.chat_template is None:
        return ["the tokenizer has no chat template: prompts are the prompt template as plain text"]
    on, off = (render(tokenizer, [template], enable_thinking=flag)[0] for flag in (True, False))
    if enable_thinking and on == off:
        return ["enable_thinking=True changes nothing: the chat template does not know it"]
    return []
