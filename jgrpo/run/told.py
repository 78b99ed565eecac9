"""Completions as lines for a terminal: what `show` prints, and a run's log shows now and then."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from jgrpo.errors import printable
from jgrpo.run.completions import facts

Row = Mapping[str, Any]


def completion_text(row: Row, characters: int, encoding: str) -> Text:
    """A line of figures and the completion, indented. Of more than `characters` (0: no limit) the
    middle is left out."""
    f = facts(row)
    mark, style = {True: ("right", "green"), False: ("wrong", "red"), None: ("not graded", "dim")}[
        f["right"]
    ]
    parts = f["reward_parts"]
    figures = [
        f"advantage {_signed(f['advantage'])}",
        f"reward {_signed(f['reward'])}"
        + (f" ({', '.join(f'{k} {v:.3g}' for k, v in parts.items())})" if len(parts) > 1 else ""),
        f"{f['n_tokens']} tokens",
        *(["truncated"] if f["truncated"] else []),
        *([] if f["answer"] is not None else ["no box"]),
    ]
    text = row["completion"]
    if characters and len(text) > characters:
        half = characters // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]}\n[... {left_out:,} characters ...]\n{text[len(text) - half :]}"
    whole = Text(f"{mark}", style=f"bold {style}").append(
        printable(f"  {' · '.join(figures)}", encoding), style="not bold dim"
    )
    for line in printable(text, encoding).split("\n"):
        whole.append("\n  ").append(line, style="not bold default")
    return whole


def lines_shown(console: Console, head: str, problem: str, *, gold: str) -> None:
    """What stands above a problem's completions."""
    safe = lambda text: printable(text, console.encoding)  # noqa: E731
    console.print(Text(f"\n{head}", style="bold"), Text(safe(f"  gold {gold}"), style="cyan"))
    console.print(Text(safe(problem), style="italic"))


def one_of_each(rows: Iterable[Row]) -> list[Row]:
    """One right and one wrong completion, of one group if there is one that has both, the first
    of their kind; fewer where there are none."""
    found: dict[str, dict[bool, Row]] = {}
    for row in rows:
        right = (row.get("reward_parts") or {}).get("outcome") == 1
        found.setdefault(row["problem"], {}).setdefault(right, row)
    groups = list(found.values())
    both = next((g for g in groups if len(g) == 2), None)
    if both is None:
        both = {k: next(g[k] for g in groups if k in g)
                for k in (True, False) if any(k in g for g in groups)}  # fmt: skip
    return [both[k] for k in (True, False) if k in both]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
