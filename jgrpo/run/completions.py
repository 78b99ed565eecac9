"""The completions that a run has kept, read a step at a time, for people to look at.

A line of `rollouts/step_000003.jsonl` becomes a row with what follows from it: right, boxed, cut
off, its gap. Files of older runs may lack the later fields; whatever is absent is None.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jgrpo.answers import last_boxed
from jgrpo.errors import InputError
from jgrpo.run.rundir import rollouts_file

Line = Mapping[str, Any]
FIRST = b'{"problem": '
"""How `write_rollouts` begins a line: the problem is read without the rest of it."""


def steps_kept(run: Path) -> list[int]:
    """The steps whose completions are there, in order."""
    names = (file.stem.removeprefix("step_") for file in run.glob("rollouts/step_*.jsonl"))
    return sorted(int(name) for name in names if name.isdecimal())


def lines_of(run: Path, step: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a step, numbered from 0, not parsed. InputError if there are none to read."""
    file = rollouts_file(run, step)
    if not file.resolve().is_relative_to(run.resolve()):
        raise InputError(f"{file}: leads out of the run folder; put the file itself there")
    try:
        with file.open("rb") as lines:
            yield from enumerate(line for line in lines if line.strip())
    except FileNotFoundError:
        kept = steps_kept(run)
        there = f"has those of steps {kept[0]} to {kept[-1]}" if kept else "has none yet"
        raise InputError(f"step {step}: {run} {there}") from None
    except OSError as error:
        raise InputError(f"{file}: {error}") from error


def parsed(line: bytes, where: str) -> dict[str, Any]:
    """A line as a row. InputError if it is not one."""
    try:
        row = json.loads(line)
        for field in ("problem", "prompt", "completion", "gold", "finish_reason"):
            if not isinstance(row[field], str):
                raise TypeError(f"{field} is no text")
        return row
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not a line of a rollouts file: {error!r:.200}") from None


def problem_of(line: bytes) -> str:
    """The problem of a line, without parsing what follows it, if it stands first as usual."""
    if line.startswith(FIRST):
        text = line[len(FIRST) :].decode("utf-8", "replace")
        try:
            return str(json.JSONDecoder().raw_decode(text)[0])
        except ValueError:
            pass
    return str(parsed(line, "rollouts")["problem"])


def key_of(problem: str) -> str:
    """A short name for a problem: the same in every run that has it."""
    return hashlib.sha256(problem.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_right(row: Line) -> bool | None:
    """Did the grader accept it? (The outcome, whatever else the reward is made of.)"""
    outcome = (row.get("reward_parts") or {}).get("outcome")
    return None if outcome is None else outcome == 1


def gaps(row: Line) -> list[float] | None:
    """Sampler's minus trainer's logprob of each token; None where the trainer's were not kept: it
    computes them of completions that it trains on alone."""
    ours, theirs = row.get("trainer_logprobs"), row.get("sampler_logprobs")
    if not ours or not theirs or len(ours) != len(theirs):
        return None
    return [(b or 0.0) - (a or 0.0) for a, b in zip(ours, theirs, strict=True)]


def facts(row: Line) -> dict[str, Any]:
    """What filters and sorting ask of a row, and what a person reads beside it."""
    gap, n_tokens = gaps(row), len(row.get("token_ids") or ())
    return {
        "gold": row["gold"],
        "answer": last_boxed(row["completion"]),
        "reward": row.get("reward"),
        "reward_parts": row.get("reward_parts") or {},
        "advantage": row.get("advantage"),
        "right": is_right(row),
        "truncated": row["finish_reason"] == "length",
        "n_tokens": n_tokens,
        "largest_gap": max(map(abs, gap)) if gap else None,
    }
