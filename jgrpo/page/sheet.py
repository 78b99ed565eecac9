"""The page as one file that can be sent: scripts, style and answers inside, nothing from outside.

What the page would ask the server for is written into it, so only the completions of a few steps
are in it.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from jgrpo.page.data import Runs
from jgrpo.page.server import SCRIPTS, asset, plotly_js, to_json


def default_steps(steps: Sequence[int]) -> frozenset[int]:
    """The first, the middle and the last."""
    return frozenset({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else frozenset()


def sheet(runs: Runs) -> str:
    """The HTML. Scripts run by their own hashes alone; a completion in it is never markup."""
    scripts = [plotly_js(), *map(asset, SCRIPTS)]
    scripts = [script.replace("</script", "<\\/script") for script in scripts]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    data = to_json(dict(_answers(runs))).replace("<", "\\u003c")
    tags = [f'<script type="application/json" id="answers">{data}</script>\n']
    tags += [f"<script>{script}</script>\n" for script in scripts]
    style = meta + f"<style>{asset('page.css')}</style>"
    html = asset("page.html").replace("<!--style-->", style)
    return html.replace("<!--scripts-->", "".join(tags))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _answers(runs: Runs) -> Iterator[tuple[str, Any]]:
    """What the page can ask for, by the address that it asks at."""
    yield "/api/runs", runs.overview()
    yield "/api/problems", (problems := runs.problems())
    for problem in problems:
        yield f"/api/problem?key={problem['key']}", runs.problem(problem["key"])
    for n in range(len(runs.reports)):
        yield f"/api/report?n={n}", runs.report(n)
    for run, folder in enumerate(runs.folders):
        for step in runs.shown_steps(folder):
            answer = runs.step(run, step)
            yield f"/api/step?run={run}&step={step}", answer
            for row in range(len(answer["rows"])):
                found = runs.completion(run, step, row)
                at = f"/api/completion?run={run}&step={step}&row={row}"
                yield at, found | {"logprobs": _rounded(found["logprobs"]),
                                   "gaps": _rounded(found["gaps"]),
                                   "entropies": _rounded(found["entropies"])}  # fmt: skip


def _rounded(values: Sequence[float | None] | None) -> Sequence[float | None] | None:
    """Three digits are enough for a colour, and halve the file."""
    return values if values is None else [v if v is None else float(f"{v:.3g}") for v in values]
