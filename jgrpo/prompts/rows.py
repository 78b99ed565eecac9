"""Where the rows come from, and which of them train: a hub id, file or folder -> two lists of rows.

A source is a dict of named splits; a single file is one split called `train`. Rows chosen for
evaluation are never rows chosen for training: where the user's own choices overlap, that is an
error; where the choice is ours, evaluation goes first.

`datasets` and pyarrow are imported where they are needed: a file of JSON needs neither.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jgrpo.errors import InputError, short

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
STUDY_SPLITS = {"qwedsacf/competition_math": ("train[:7500]", "train[-5000:]")}
"""Training and evaluation rows where the PyTorch study fixed them."""

Splits = Mapping[str, Sequence[dict[str, Any]]]


class Range(NamedTuple):
    """Rows start..stop-1 of a split."""

    split: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.split}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Row:
    """One row as the source has it, and where it stands there."""

    split: str
    index: int
    fields: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.split}[{self.index}]"


def select(sizes: Mapping[str, int], spec: str) -> list[Range]:
    """The rows a split expression names, in the syntax of `datasets`: `train[:7500]+test[5%:]`.

    Bounds beyond the last row are clamped, as there. Raises InputError for an unknown split.
    """
    if spec in sizes:
        return [Range(spec, 0, sizes[spec])]
    import datasets

    try:
        chosen = datasets.ReadInstruction.from_spec(spec).to_absolute(dict(sizes))
    except (ValueError, AssertionError) as error:
        has = ", ".join(f"{name} ({n} rows)" for name, n in sizes.items())
        raise InputError(f"split {spec!r}: {error}; the data set has {has}") from None
    return [Range(r.splitname, r.from_, max(r.from_, r.to)) for r in chosen]


def overlaps(a: Sequence[Range], b: Sequence[Range]) -> list[Range]:
    """The rows that are in both."""
    common = [
        Range(x.split, max(x.start, y.start), min(x.stop, y.stop))
        for x in a
        for y in b
        if x.split == y.split
    ]
    return [r for r in common if r.start < r.stop]


def subtract(ranges: Sequence[Range], holes: Sequence[Range]) -> list[Range]:
    """The rows of `ranges` that are in none of `holes`."""
    left = list(ranges)
    for hole in holes:
        left = [
            part
            for r in left
            for part in (
                (r,)
                if not overlaps([r], [hole])
                else (Range(r.split, r.start, hole.start), Range(r.split, hole.stop, r.stop))
            )
            if part.start < part.stop
        ]
    return left


def _main_split(sizes: Mapping[str, int]) -> str:
    if "train" in sizes:
        return "train"
    if len(sizes) == 1:
        return next(iter(sizes))
    raise InputError(
        f"the data set has the splits {', '.join(sizes)} and none called train: "
        "say which rows train with --dataset_split"
    )


def choose_ranges(
    sizes: Mapping[str, int], dataset_split: str, eval_split: str, study: tuple[str, str] | None
) -> tuple[list[Range], list[Range]]:
    """Training and evaluation rows of one source that gives both.

    Evaluation: `eval_split`, else the study's, else `test`, else `validation`, else the last fifth
    of the training split. Training: `dataset_split`, else the study's, else `train` or the only
    split, less the evaluation rows. Raises InputError if `dataset_split` overlaps the evaluation.
    """
    if not eval_split:
        eval_split = study[1] if study else _held_out(sizes)
    evaluation = select(sizes, eval_split)
    if not dataset_split:
        return subtract(select(sizes, _default_training(sizes, study)), evaluation), evaluation
    training = select(sizes, dataset_split)
    if common := overlaps(training, evaluation):
        raise InputError(
            f"dataset_split={dataset_split} (rows {_join(training)}) and eval_split={eval_split} "
            f"(rows {_join(evaluation)}) share {_join(common)}: evaluation problems must not be "
            "trained on; give --dataset_split and --eval_split that are apart, or leave "
            "--dataset_split empty for all but the evaluation rows"
        )
    return training, evaluation


def _default_training(sizes: Mapping[str, int], study: tuple[str, str] | None) -> str:
    return study[0] if study else _main_split(sizes)


def _held_out(sizes: Mapping[str, int]) -> str:
    """`test` or `validation` beside a training split; else the last fifth of the training split."""
    others = [name for name in ("test", "validation") if name in sizes and len(sizes) > 1]
    if others:
        return others[0]
    main = _main_split(sizes)
    return f"{main}[-{max(1, sizes[main] // 5)}:]"


def _join(ranges: Sequence[Range]) -> str:
    return " + ".join(map(str, ranges)) or "none"


def load_rows(
    *, dataset_path: str, dataset_split: str, eval_dataset_path: str, eval_split: str
) -> tuple[list[Row], list[Row], list[str]]:
    """Training rows, evaluation rows, and a line on each that says which they are.

    With an `eval_dataset_path` of its own, evaluation uses that source's `eval_split`, else its
    `test` or `validation` split beside others, else all its rows.
    """
    source = read_splits(dataset_path)
    sizes = {name: len(rows) for name, rows in source.items()}
    study = STUDY_SPLITS.get(dataset_path)
    if not eval_dataset_path or _same(dataset_path, eval_dataset_path):
        eval_source, eval_path, eval_sizes = source, dataset_path, sizes
        training, evaluation = choose_ranges(sizes, dataset_split, eval_split, study)
    else:
        training = select(sizes, dataset_split or _default_training(sizes, study))
        eval_source, eval_path = read_splits(eval_dataset_path), eval_dataset_path
        eval_sizes = {name: len(rows) for name, rows in eval_source.items()}
        if not eval_split and (eval_study := STUDY_SPLITS.get(eval_dataset_path)):
            eval_split = eval_study[1]
        elif not eval_split:
            held_out = _held_out(eval_sizes)
            eval_split = held_out if held_out in eval_sizes else _main_split(eval_sizes)
        evaluation = select(eval_sizes, eval_split)
    _check_some("dataset_split", dataset_split, dataset_path, training, sizes)
    _check_some("eval_split", eval_split, eval_path, evaluation, eval_sizes)
    report = [
        f"training rows: {_join(training)} of {short(dataset_path)}",
        f"evaluation rows: {_join(evaluation)} of {short(eval_path)}",
    ]
    return _take(source, training), _take(eval_source, evaluation), report


def _check_some(
    field: str, spec: str, path: str, ranges: Sequence[Range], sizes: Mapping[str, int]
) -> None:
    if not any(r.start < r.stop for r in ranges):
        has = ", ".join(f"{name} ({n} rows)" for name, n in sizes.items())
        raise InputError(
            f"{field}={spec!r} leaves no row of {path}, which has {has}; give other rows, more "
            "rows, or an --eval_dataset_path of its own"
        )


def _same(a: str, b: str) -> bool:
    return a == b or (Path(a).exists() and Path(b).exists() and Path(a).samefile(b))


def _take(source: Splits, ranges: Sequence[Range]) -> list[Row]:
    return [Row(r.split, i, source[r.split][i]) for r in ranges for i in range(r.start, r.stop)]


def read_splits(path: str) -> Splits:
    """Every split of a file, a folder (of files, or of `save_to_disk`) or a hub id.

    A hub data set with several configurations is named `id:configuration` (`openai/gsm8k:main`).
    Raises InputError that says what was wrong with the path, the file or the line.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return {"train": read_file(local)}
    import datasets

    if local.is_dir():
        saved = any((local / name).is_file() for name in ("dataset_dict.json", "state.json"))
        load = datasets.load_from_disk if saved else datasets.load_dataset
        advice = f"give a {', '.join(FILE_SUFFIXES)} file, or a folder of files of one kind"
        return _load(lambda: load(str(local)), path, f"folder {path}", advice)
    name, _, configuration = path.partition(":")
    if configuration and Path(name).is_dir():
        return _load(
            lambda: datasets.load_dataset(name, configuration),
            name,
            f"folder {name}, configuration {configuration}",
            "its README names the configurations",
        )
    if local.suffix in FILE_SUFFIXES or path.startswith((".", "/", "~")):
        raise InputError(f"data set {path}: no such file or folder")
    return _load(
        lambda: datasets.load_dataset(name, configuration or None),
        path,
        f"data set {path!r} of the Hugging Face hub",
        "if this machine is offline or the id is wrong, give a local "
        f"{', '.join(FILE_SUFFIXES)} file or folder as --dataset_path",
    )


def _load(load, path: str, what: str, advice: str) -> Splits:
    try:
        loaded = load()
    except Exception as error:  # every builder raises its own kinds; the cause is kept
        cause = error.__cause__ or error
        text = str(cause).strip()
        first_line = text.split("\n")[0]
        if "Config name is missing" in text:
            names = re.findall(r"'([^']+)'", text.split("`")[0]) or re.findall(r"'([^']+)'", text)
            advice = f"it has the configurations {', '.join(names)}; name one as {path}:{names[0]}"
            raise InputError(f"{what}: {advice}") from error
        raise InputError(f"{what}: {type(cause).__name__}: {first_line}; {advice}") from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    # Random access into Arrow costs 50 us a row; a list of dicts is built once.
    return {str(name): split.to_list() for name, split in splits.items()}


def read_file(file: Path) -> list[dict[str, Any]]:
    """The rows of one .jsonl, .json (a list of objects, or JSON lines) or .parquet file."""
    if file.suffix not in FILE_SUFFIXES:
        raise InputError(f"data set {file}: needs one of {', '.join(FILE_SUFFIXES)}")
    if file.suffix == ".parquet":
        return _read_parquet(file)
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data set {file}: {error}") from error
    items = _items(file, text) if file.suffix == ".json" else None
    if items is not None:
        rows = dict(enumerate(items, start=1))
        where = "item"
    else:
        # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
        lines = enumerate(text.split("\n"), start=1)
        rows = {n: _parse(f"{file}, line {n}", line) for n, line in lines if line.strip()}
        where = "line"
    if not rows:
        raise InputError(f"data set {file}: has no rows")
    for n, row in rows.items():
        if not isinstance(row, dict):
            raise InputError(f"data set {file}, {where} {n}: needs an object, got {row!r:.60}")
    return list(rows.values())


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"data set {file}: {error}") from error


def _items(file: Path, text: str) -> list[Any] | None:
    """The rows of a .json file that is one value: a list, `{"data": [...]}` (any one list of
    objects by its name), or lists by column. None for JSON lines."""
    start = text.lstrip()[:1]
    if start == "[":
        return list(_parse(str(file), text))
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, dict) or not whole:
        return None
    objects = [v for v in whole.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    is_conversation = objects and "role" in objects[0][0]
    if len(objects) == 1 and not is_conversation:
        return list(objects[0])
    if all(isinstance(v, list) for v in whole.values()):
        lengths = {name: len(v) for name, v in whole.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"data set {file}: lists by column of different lengths: {lengths}")
        return [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]
    return None


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"data set {where}: not JSON: nested too deeply") from None
    except ValueError as error:  # also a number of more digits than Python reads
        raise InputError(f"data set {where}: not JSON: {error}") from None
