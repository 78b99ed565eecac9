"""The evaluation sets that people name: where each lies on the hub, at which revision, what its
columns hold, and how many problems it has.

Grading is that of training, for all of them: a gold number is met exactly, without the tolerance
that some harnesses allow on minerva and olympiadbench, so figures there are on the strict side.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jgrpo.errors import InputError
from jgrpo.prompts.rows import FILE_SUFFIXES, Row, read_splits

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class NamedSet:
    """One row of the table. `read` turns a row into one of the schemas of problems.py."""

    hub_id: str
    revision: str
    split: str
    columns: tuple[str, ...]
    """What `read` needs."""
    n_problems: int
    licence: str
    """As its card states it."""
    read: Callable[[Fields], dict[str, Any]]
    configuration: str = ""


def _answered(problem: str, answer: str) -> Callable[[Fields], dict[str, Any]]:
    """A column with the problem, and one with the bare answer (or what follows ####)."""
    return lambda row: {"question": row[problem], "answer": row[answer]}


def _solved(row: Fields) -> dict[str, Any]:
    """The answer is in the solution's last box."""
    return {"problem": row["problem"], "solution": row["solution"]}


def _olympiad(row: Fields) -> dict[str, Any]:
    """`final_answer` is a list, mostly of one; `context`, where there is one, comes first."""
    answer = row["final_answer"]
    answer = ", ".join(map(str, answer)) if isinstance(answer, list) else answer
    context = row.get("context")
    question = f"{context}\n\n{row['question']}" if context else row["question"]
    return {"question": question, "answer": answer}


SETS = {
    "gsm8k": NamedSet(
        "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "test",
        ("question", "answer"), 1319, "MIT", _answered("question", "answer"), "main",
    ),
    "math500": NamedSet(
        "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test",
        ("problem", "answer"), 500, "none stated (MATH: MIT)", _answered("problem", "answer"),
    ),
    "aime24": NamedSet(
        "math-ai/aime24", "83a7f387baaa524a8bda0022eac0541582297103", "test",
        ("problem", "solution"), 30, "Apache-2.0", _solved,
    ),
    "aime25": NamedSet(
        "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "test",
        ("problem", "answer"), 30, "none stated", _answered("problem", "answer"),
    ),
    "amc23": NamedSet(
        "math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", "test",
        ("question", "answer"), 40, "none stated", _answered("question", "answer"),
    ),
    "minerva": NamedSet(
        "math-ai/minervamath", "ee46ddc498933b1977577953250ca5c66be64f96", "test",
        ("question", "answer"), 272, "none stated", _answered("question", "answer"),
    ),
    "olympiadbench": NamedSet(
        "Hothan/OlympiadBench", "91184b52131e7fc9455fef848035173aea8cc01a", "train",
        ("question", "final_answer"), 674, "Apache-2.0", _olympiad, "OE_TO_maths_en_COMP",
    ),
}  # fmt: skip


def read_set(name: str, folder: Path | None = None) -> tuple[list[Row], str]:
    """All rows of a named set, in a schema of problems.py, and a line that says whence they are.

    `folder` holds stand-ins, for where the hub is out of reach: NAME.jsonl, .json, .parquet or a
    folder NAME, with the columns that the set has on the hub. InputError if the name is none, or
    the rows have not those columns.
    """
    if name not in SETS:
        raise InputError(f"--eval_set {name}: there is no such set; known: {', '.join(SETS)}")
    wanted = SETS[name]
    rows, where = _of_hub(wanted) if folder is None else _of_folder(name, wanted, folder)
    if missing := [c for c in wanted.columns if any(c not in row for row in rows)]:
        has = ", ".join(map(repr, rows[0])) if rows else "no rows"
        raise InputError(
            f"--eval_set {name}: {where} lacks the column {missing[0]!r}; it has {has}"
        )
    line = f"{name}: {len(rows)} problems of {where} (licence: {wanted.licence})"
    if len(rows) != wanted.n_problems:
        line += f"; the set itself has {wanted.n_problems}: figures are not comparable"
    return [Row(name, i, wanted.read(row)) for i, row in enumerate(rows)], line


def _of_hub(wanted: NamedSet) -> tuple[list[Fields], str]:
    import datasets

    try:
        loaded = datasets.load_dataset(
            wanted.hub_id,
            wanted.configuration or None,
            split=wanted.split,
            revision=wanted.revision,
        )
    except Exception as error:  # every builder raises its own kinds; the cause is kept
        first_line = str(error).strip().split("\n")[0]
        raise InputError(
            f"{wanted.hub_id} of the Hugging Face hub: {type(error).__name__}: {first_line}; if "
            "this machine is offline, give a folder of local copies as --eval_set_folder"
        ) from error
    return loaded.to_list(), f"{wanted.hub_id}@{wanted.revision[:7]}"


def _of_folder(name: str, wanted: NamedSet, folder: Path) -> tuple[list[Fields], str]:
    places = [folder / f"{name}{suffix}" for suffix in (*FILE_SUFFIXES, "")]
    place = next((p for p in places if p.exists()), None)
    if place is None:
        tried = ", ".join(p.name for p in places)
        raise InputError(f"--eval_set_folder {folder}: has none of {tried} for --eval_set {name}")
    splits = read_splits(str(place))
    if wanted.split in splits:
        return list(splits[wanted.split]), str(place)
    if len(splits) > 1:
        raise InputError(f"{place}: has the splits {', '.join(splits)}, and not {wanted.split!r}")
    return list(next(iter(splits.values()))), str(place)
