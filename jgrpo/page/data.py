"""What the page says, as JSON: an overview of all runs, and on demand one step, one completion, one
problem. Nothing is kept but small summaries of the steps that were looked at.

A file is opened only if it belongs to one of the given runs; a number that comes from a browser
picks among what is there, and never becomes a path by itself.
"""

import base64
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from jgrpo.errors import InputError, short
from jgrpo.page.health import Series, health, where_time_went
from jgrpo.page.pieces import pieces, tokenizer_of
from jgrpo.run import completions as kept
from jgrpo.run.differences import WHERE, differences, run_names, saved_options, words
from jgrpo.run.rundir import read_metrics

PREVIEW = 240
"""Characters of a completion in a list."""
SUMMARIES = 64
"""Steps whose summaries are remembered: 256 completions are 0.2 MB."""
MOST_PROBLEMS = 2000
PICTURE = re.compile(r"\]\(([A-Za-z0-9_-]+\.png)\)")


@dataclass
class Runs:
    """The given runs by their place, and the reports beside them. `steps`: those whose completions
    are shown, where not all are (in a page that is sent)."""

    folders: Sequence[Path]
    reports: Sequence[Path] = ()
    steps: frozenset[int] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _metrics: dict[Path, tuple[tuple, dict[str, Series]]] = field(default_factory=dict)
    _summaries: OrderedDict[tuple, list[dict[str, Any]]] = field(default_factory=OrderedDict)

    def overview(self) -> dict[str, Any]:
        """Names, options, differences, metrics and health of every run, and who is whose seed."""
        names = run_names(self.folders) if self.folders else []
        options = dict(zip(names, map(saved_options, self.folders), strict=True))
        odd = differences(options)
        runs = []
        for folder, name in zip(self.folders, names, strict=True):
            metrics = self._columns(folder)
            runs.append({
                "name": name, "folder": short(folder), "options": options[name],
                "differs": odd[name], "metrics": metrics, "steps": self.shown_steps(folder),
                "health": health(options[name], metrics), "time": where_time_went(metrics),
            })  # fmt: skip
        return {
            "runs": runs, "groups": seed_groups(names, options, odd),
            "reports": [short(folder) for folder in self.reports], "whole": self.steps is None,
        }  # fmt: skip

    def shown_steps(self, folder: Path) -> list[int]:
        return [s for s in kept.steps_kept(folder) if self.steps is None or s in self.steps]

    def step(self, run: int, step: int) -> dict[str, Any]:
        """A step's completions, without their tokens, and only the beginning of each text."""
        rows = self._summary(self._folder(run), step)
        problems = list(dict.fromkeys(row["problem"] for row in rows))
        texts = [{"key": kept.key_of(p), "text": p[:PREVIEW]} for p in problems]
        place = {problem: i for i, problem in enumerate(problems)}
        return {"problems": texts, "rows": [r | {"problem": place[r["problem"]]} for r in rows]}

    def completion(self, run: int, step: int, row: int) -> dict[str, Any]:
        """Everything about one completion, token by token."""
        folder = self._folder(run)
        self._check(folder, step)
        line = next((x for n, x in kept.lines_of(folder, step) if n == row), None)
        if line is None:
            raise InputError(f"step {step} has no completion {row}")
        found = kept.parsed(line, f"step {step}, completion {row}")
        ids, text = found.get("token_ids") or [], found["completion"]
        tokenizer = tokenizer_of(str(saved_options(folder).get("model_id", "")))
        cut = pieces(tokenizer, ids, text) if tokenizer and ids else None
        why = "" if cut else "The model's tokenizer does not give this text back."
        if tokenizer is None:
            why = "The tokenizer of the run's model is not on this machine."
        return {
            **kept.facts(found), "problem": found["problem"], "key": kept.key_of(found["problem"]),
            "prompt": found["prompt"], "completion": text, "finish_reason": found["finish_reason"],
            "token_ids": ids, "pieces": cut, "no_pieces": why,
            "logprobs": found.get("sampler_logprobs"), "gaps": kept.gaps(found),
            "entropies": found.get("entropies"),
        }  # fmt: skip

    def problems(self) -> list[dict[str, Any]]:
        """The problems that the runs have met, those that came most often first."""
        count: dict[str, int] = {}
        for folder in self.folders:
            for step in self.shown_steps(folder):
                lines = (line for _, line in kept.lines_of(folder, step))
                for problem in dict.fromkeys(map(kept.problem_of, lines)):
                    count[problem] = count.get(problem, 0) + 1
        often = sorted(count.items(), key=lambda pair: -pair[1])[:MOST_PROBLEMS]
        return [{"key": kept.key_of(p), "text": p[:PREVIEW], "times": n} for p, n in often]

    def problem(self, key: str) -> dict[str, Any]:
        """One problem wherever it came: by run and step, its completions in short."""
        text, gold, found = "", "", []
        for run, folder in enumerate(self.folders):
            for step in self.shown_steps(folder):
                rows = []
                for n, line in kept.lines_of(folder, step):
                    if kept.key_of(kept.problem_of(line)) == key:
                        row = kept.parsed(line, f"step {step}, completion {n}")
                        text, gold = row["problem"], row["gold"]
                        rows.append(_brief(n, row))
                if rows:
                    found.append({"run": run, "step": step, "rows": rows})
        if not found:
            raise InputError(f"no run has met the problem {key}")
        return {"key": key, "text": text, "gold": gold, "met": found}

    def report(self, n: int) -> dict[str, str]:
        """An ablation's report as HTML, its pictures inside. Its text is no markup of its own."""
        if not 0 <= n < len(self.reports):
            raise InputError(f"there is no report {n}")
        folder = self.reports[n]
        text = (folder / "report.md").read_text("utf-8", "replace")

        def inside(match: re.Match) -> str:
            picture = folder / match[1]
            if picture.is_symlink() or not picture.is_file():
                return match[0]
            return f"](data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()})"

        reader = MarkdownIt("js-default", {"html": False, "linkify": False}).enable("table")
        return {"html": reader.render(PICTURE.sub(inside, text))}

    def _columns(self, folder: Path) -> dict[str, Series]:
        """A run's metrics by tag, read again only when they have grown."""
        state = (stat := (folder / "metrics.jsonl").stat()).st_mtime_ns, stat.st_size
        if self._metrics.get(folder, ((),))[0] != state:
            self._metrics[folder] = state, columns(read_metrics(folder))
        return self._metrics[folder][1]

    def _folder(self, run: int) -> Path:
        if not 0 <= run < len(self.folders):
            raise InputError(f"there is no run {run}")
        return self.folders[run]

    def _check(self, folder: Path, step: int) -> None:
        if self.steps is not None and step not in self.steps:
            raise InputError(f"step {step} is not in this page")

    def _summary(self, folder: Path, step: int) -> list[dict[str, Any]]:
        """A step's rows in brief; one step is parsed at a time, so that memory stays small."""
        self._check(folder, step)
        with self._lock:
            file = kept.rollouts_file(folder, step)
            state = file.stat() if file.is_file() else None
            key = folder, step, state and (state.st_mtime_ns, state.st_size)
            if key not in self._summaries:
                rows = []
                for n, line in kept.lines_of(folder, step):
                    row = kept.parsed(line, f"step {step}, completion {n}")
                    rows.append(_brief(n, row) | {"problem": row["problem"]})
                self._summaries[key] = rows
                for old in list(islice(self._summaries, max(0, len(self._summaries) - SUMMARIES))):
                    del self._summaries[old]
            self._summaries.move_to_end(key)
            return self._summaries[key]


def _brief(n: int, row: kept.Line) -> dict[str, Any]:
    answer = (brief := kept.facts(row))["answer"]
    short_answer = None if answer is None else answer[:PREVIEW]
    text = row["completion"]
    return brief | {"row": n, "answer": short_answer, "gold": brief["gold"][:PREVIEW],
                    "text": text[:PREVIEW], "characters": len(text)}  # fmt: skip


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """Metrics lines by tag: steps and values, in the order of the lines."""
    found: dict[str, Series] = {}
    for row in rows:
        for tag, value in row.items():
            if tag != "step" and (value is None or isinstance(value, int | float)):
                steps, values = found.setdefault(tag, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def seed_groups(
    names: Sequence[str], options: dict[str, dict], odd: dict[str, dict]
) -> list[dict[str, Any]]:
    """Runs that differ by nothing but their seed, together: {name, runs (by place)}."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        rest = {k: v for k, v in options[name].items() if k not in WHERE | {"seed"}}
        key = json.dumps(rest, sort_keys=True) if rest else name
        groups.setdefault(key, []).append(i)
    found = []
    for members in groups.values():
        first = names[members[0]]
        if len(members) == 1:
            found.append({"name": first, "runs": members})
            continue
        said = words({k: v for k, v in odd[first].items() if k != "seed"})
        found.append({"name": said or "all runs", "runs": members})
    return found
