"""Rows -> prompts: what the model reads, the answer it is checked against, and in which order.

columns.py says which columns of a row hold the problem and its answer. Nothing leaves quietly: each
row that cannot be used is counted in the report, by reason, with examples.
"""

import functools
import logging
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jgrpo.errors import InputError
from jgrpo.prompts.columns import Read, has_columns, read_columns
from jgrpo.prompts.rows import Row, load_rows
from jgrpo.prompts.tokenizer import render, writes_the_date

SLOT = "{problem}"
log = logging.getLogger(__name__)

RowRead = tuple[Row, Read]
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
    """The problem's text and its gold answer. ValueError with the reason if there is none."""
    return read_columns(fields)[:2]


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
        template = file.read_text("utf-8-sig").strip()
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
    problem_column: str = "",
    answer_column: str = "",
    system_prompt: str = "",
    now: datetime | None = None,
) -> tuple[list[Problem], list[Problem], list[str]]:
    """Training problems, evaluation problems, and the report: lines for the user to read.

    The evaluation takes `n_eval_prompts` evenly spaced, whatever the seed. A training row that
    repeats an earlier one, or any evaluation problem (blanks aside), is left out. A chat template
    that writes the date writes that of `now`, and a warning says so. Raises InputError if either
    list would be empty.
    """
    template, now = load_template(prompt_template), now or datetime.now()
    train_rows, eval_rows, report = load_rows(
        dataset_path=dataset_path,
        dataset_split=dataset_split,
        eval_dataset_path=eval_dataset_path,
        eval_split=eval_split,
    )
    left_out: LeftOut = {}
    named = problem_column, answer_column
    evaluation = _read_rows(eval_rows, "evaluation", left_out, *named)
    evaluation = _without_repeats(evaluation, set(), left_out, "evaluation")
    training = _read_rows(train_rows, "training", left_out, *named)
    training, evaluation = _apart(training, evaluation, fixed=bool(eval_split or eval_dataset_path))
    held_out = {_key(read.problem) for _, read in evaluation}
    training = _without_repeats(training, held_out, left_out, "training")
    make = functools.partial(
        _make_problems,
        tokenizer,
        left_out,
        template=template,
        enable_thinking=enable_thinking,
        max_prompt_tokens=max_prompt_tokens,
        system_prompt=system_prompt,
        now=now,
    )
    train, candidates = make(training, "training"), make(evaluation, "evaluation")
    n_eval = min(n_eval_prompts, len(candidates))
    eval_ = [candidates[i * len(candidates) // n_eval] for i in range(n_eval)]
    report += _describe_left_out(left_out)
    for name, problems in (("training", train), ("evaluation", eval_)):
        if not problems:
            raise InputError(f"no {name} problem is left:\n  " + "\n  ".join(report))
    if sentences := [p.gold for p in train if _is_sentence(p.gold)]:
        report.append(
            f"{len(sentences)} of {len(train)} gold answers are sentences ({sentences[0]!r:.60}), "
            "which hardly any completion matches: look at the answer column, and name the one that "
            "holds the bare answer with --answer_column"
        )
    if any(read.messages for _, read in training):
        report.append("rows that are conversations are read as they are, without prompt_template")
    report += _describe_prompts(tokenizer, template, enable_thinking)
    if writes_the_date(tokenizer):
        log.warning("the chat template writes the date: prompts have that of %s, and a run that is "
                    "resumed keeps that of its start", f"{now:%Y-%m-%d %H:%M}")  # fmt: skip
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
    problem_column: str = "",
    answer_column: str = "",
    system_prompt: str = "",
) -> tuple[list[Problem], list[str]]:
    """Evaluation problems of all `rows`, and lines on rows left out. InputError if none is left."""
    left_out: LeftOut = {}
    problems = _make_problems(
        tokenizer,
        left_out,
        _read_rows(rows, "evaluation", left_out, problem_column, answer_column),
        "evaluation",
        template=load_template(prompt_template),
        enable_thinking=enable_thinking,
        max_prompt_tokens=max_prompt_tokens,
        system_prompt=system_prompt,
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


def _read_rows(
    rows: Sequence[Row], purpose: str, left_out: LeftOut, problem_column: str, answer_column: str
) -> list[RowRead]:
    if rows and not any(has_columns(row.fields, problem_column, answer_column) for row in rows):
        raise InputError(
            f"{purpose} rows have the columns {', '.join(map(repr, rows[0].fields))}; they need "
            "'problem' and 'solution' (answer in the solution's last \\boxed{}), 'question' and "
            "'answer' (answer after ####), 'prompt' and 'answer' or reward_model.ground_truth, or "
            "'messages'; else name yours with --problem_column and --answer_column"
        )
    read: list[RowRead] = []
    for row in rows:
        try:
            read.append((row, read_columns(row.fields, problem_column, answer_column)))
        except ValueError as reason:
            left_out.setdefault(f"{purpose}: {reason}", []).append(row)
    return read


def _apart(
    training: list[RowRead], evaluation: list[RowRead], *, fixed: bool
) -> tuple[list[RowRead], list[RowRead]]:
    """A hold-out of our own choice is of problems, not rows: where rows repeat so that it would
    leave nothing to train on, the last fifth of the problems is held out instead."""
    held_out = {_key(read.problem) for _, read in evaluation}
    if fixed or any(_key(read.problem) not in held_out for _, read in training):
        return training, evaluation
    first: dict[str, RowRead] = {}
    for row, read in (*training, *evaluation):
        first.setdefault(_key(read.problem), (row, read))
    if len(first) < 2:
        return training, evaluation
    problems = sorted(first.values(), key=lambda pair: (pair[0].split, pair[0].index))
    n_held_out = max(1, len(problems) // 5)
    return problems[:-n_held_out], problems[-n_held_out:]


def _without_repeats(
    rows: list[RowRead], held_out: set[str], left_out: LeftOut, purpose: str
) -> list[RowRead]:
    kept: list[RowRead] = []
    seen: set[str] = set()
    for row, read in rows:
        key = _key(read.problem)
        if key in held_out:
            left_out.setdefault(f"{purpose}: also an evaluation problem", []).append(row)
        elif key in seen:
            left_out.setdefault(f"{purpose}: repeats an earlier problem", []).append(row)
        else:
            seen.add(key)
            kept.append((row, read))
    return kept


def _make_problems(
    tokenizer: PreTrainedTokenizerBase,
    left_out: LeftOut,
    read: list[RowRead],
    purpose: str,
    *,
    template: str,
    enable_thinking: bool,
    max_prompt_tokens: int,
    system_prompt: str,
    now: datetime | None = None,
) -> list[Problem]:
    chats = [r.messages or template.replace(SLOT, r.problem) for _, r in read]
    prompts, prompt_ids = render(
        tokenizer, chats, enable_thinking=enable_thinking, system_prompt=system_prompt, now=now
    )
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    problems = []
    for (row, said), prompt, ids in zip(read, prompts, prompt_ids, strict=True):
        if any(token in said.problem for token in special):
            reason = f"{purpose}: a special token of the tokenizer is in the problem"
            left_out.setdefault(reason, []).append(row)
        elif len(ids) > max_prompt_tokens:
            reason = f"{purpose}: prompt longer than max_prompt_tokens={max_prompt_tokens}"
            left_out.setdefault(reason, []).append(row)
        else:
            problems.append(Problem(ids, prompt, said.problem, said.gold, row.index, row.fields))
    return problems


def _is_sentence(gold: str) -> bool:
    """Three words or more in plain text: nobody boxes that."""
    plain = re.sub(r"\\[a-zA-Z]+\s*(\{[^{}]*\})?|\$[^$]*\$", " ", gold)
    return len(re.findall(r"(?<![^\s(])[A-Za-z]{2,}(?=[\s.,:;!?)]|$)", plain)) >= 3


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
