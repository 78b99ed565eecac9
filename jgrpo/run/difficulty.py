"""How often a policy solves each training problem: kept in a file, of which a run takes a part.

A problem that is always or never solved has nothing to teach: its group's rewards are all alike.
The file is JSON lines: what it was made with, then a problem a line, written as they are measured.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jgrpo.config import Config
from jgrpo.errors import InputError, short
from jgrpo.policy import adapter as adapters
from jgrpo.policy.weights import model_folder, weights_fingerprint
from jgrpo.prompts.problems import Problem
from jgrpo.run.rundir import json_line, write_whole

if TYPE_CHECKING:
    from jgrpo.run.session import Problems

REMEDY = "make it again: python -m jgrpo.filter, with the same config"
Key = tuple[str, str]
"""A problem and its gold answer."""


def made_with(config: Config, problems: "Problems") -> dict[str, Any]:
    """What pass rates depend on, beside the problem: model, adapter, templates and sampling."""
    start = Path(config.adapter) if config.adapter else None
    return {
        "model": weights_fingerprint(model_folder(config.model_id)),
        "adapter": adapters.fingerprint(start) if start else None,
        "templates": replace(problems, train=[], evaluation=[]).fingerprint,
        "system_prompt": config.system_prompt,
        "enable_thinking": config.enable_thinking,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }


def begin_rates(file: Path, made: Mapping[str, Any], k: int, seed: int) -> dict[Key, float]:
    """Make the file ready for `add_rates` -> the rates that it holds already: what was measured
    with the same k and seed, and made with the same, is kept, without a line that was torn."""
    head, lines = {"made_with": made, "k": k, "seed": seed}, list[dict[str, Any]]()
    rates: dict[Key, float] = {}
    try:
        first, *rest = file.read_text("utf-8").splitlines()
        for text in rest if json.loads(first) == json.loads(json_line(head)) else ():
            line = json.loads(text)
            rates[line["problem"], line["gold"]] = line["n_correct"] / k
            lines.append(line)
    except (OSError, ValueError, LookupError, TypeError):
        pass  # there is none, it is something else, or the last line is torn
    write_whole(file, "".join(map(json_line, (head, *lines))))
    return rates


def add_rates(file: Path, asked: Sequence[Problem], correct: np.ndarray) -> dict[Key, float]:
    """Append a line a problem, onto the disk -> their rates. correct: [P, k], 1 or 0."""
    counts = [int(row.sum()) for row in correct]
    rows = [
        {"problem": p.problem, "gold": p.gold, "n_correct": n, "n_samples": correct.shape[1]}
        for p, n in zip(asked, counts, strict=True)
    ]
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(map(json_line, rows)))
        out.flush()
        os.fsync(out.fileno())
    shares = (n / correct.shape[1] for n in counts)
    return {(p.problem, p.gold): share for p, share in zip(asked, shares, strict=True)}


def read_rates(file: Path) -> tuple[dict[str, Any], dict[Key, float]]:
    """What the rates were made with, and the share of right completions of each problem.
    InputError if the file is missing or damaged."""
    try:
        head, *lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        rates = {
            (str(line["problem"]), str(line["gold"])): line["n_correct"] / line["n_samples"]
            for line in lines
        }
        if not all(0 <= rate <= 1 for rate in rates.values()):
            raise ValueError("a rate is not between 0 and 1")
        return dict(head["made_with"]), rates
    except FileNotFoundError:
        raise InputError(f"pass_rate_file={file}: there is none: python -m jgrpo.filter") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"pass_rate_file={file}: not written by jgrpo.filter: {error!r:.200}; {REMEDY}"
        ) from None


def of_this_difficulty(config: Config, problems: "Problems") -> "Problems":
    """The problems whose training part has pass rates within config.pass_rate; all, without it.
    InputError if the file is of another model, prompt or sampling, lacks a problem, or if none is
    left."""
    if not config.pass_rate:
        return problems
    file, (low, high) = Path(config.pass_rate_file), config.pass_rate
    made, rates = read_rates(file)
    now = made_with(config, problems)
    if odd := [f"{k} {made.get(k)!r}, now {v!r}" for k, v in now.items() if made.get(k) != v]:
        raise InputError(f"pass_rate_file={file} was made with another {'; '.join(odd)}; {REMEDY}")
    if unknown := [p for p in problems.train if (p.problem, p.gold) not in rates]:
        raise InputError(
            f"pass_rate_file={file} is of other problems, or not finished: {len(unknown)} of "
            f"{len(problems.train)} are not in it, as {unknown[0].problem!r:.80}; {REMEDY}, which "
            "goes on where it was stopped"
        )
    kept = [p for p in problems.train if low <= rates[p.problem, p.gold] <= high]
    if not kept:
        raise InputError(
            f"pass_rate={low:g} {high:g}: none of {len(problems.train)} problems has such a rate"
            f" in {file}; widen it"
        )
    line = f"pass rate {low:g} to {high:g} ({short(file)}): {len(kept)} of {len(problems.train)}"
    return replace(problems, train=kept, report=[*problems.report, f"{line} training problems"])
