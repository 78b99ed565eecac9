r"""Where a completion states its answer: the last \boxed{} that holds one."""

import re

_BOX = re.compile(
    r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])"
    r"(?:(\s*\{)|([ \t]*)(?=[-+]?\.?[0-9]|[(\[][-+.0-9\\]|\\[^)\]]|[A-Za-z](?![A-Za-z])))"
    r"|\\.|[{}]",
    re.DOTALL,
)
_BARE_BOX_END = re.compile(r"\$|\n|\\\)|\\\]|$")
_CODE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
_NOTHING = re.compile(
    r"(?:\\(?:[lc]?dots|q?quad|[,;:!> ])|[.\s~?_…□]|\{\{?\w*\}\}?)*"
    r"(?:(?:\\text\{ ?)?[<\[]?(?i:(?:(?:your|the|my|final) )*answer(?: here)?)[>\]]?\}?)?"
)
"""What stands in a box that is only mentioned: "put your answer in \boxed{...}"."""


def last_boxed(text: str) -> str | None:
    r"""Return what is inside the last balanced \boxed{} or \fbox{} of `text`, or None.

    Last is by where it starts, so of nested boxes it is the inner one. Passed over for an earlier
    one: a box that is never closed (a completion cut off at its token limit), one with nothing in
    it, and one in a block of code, which prints a box rather than being one. `\boxed 2` reaches to
    the next $, \), \] or line end. Linear in len(text).
    """
    found = _last(_CODE.sub("", text)) if "```" in text or "~~~" in text else None
    return found if found else _last(text)


def _last(text: str) -> str | None:
    best_start, best_end = -1, -1
    empty = None
    open_starts: list[int] = []
    for match in _BOX.finditer(text):
        token = match[0]
        if match[1] is not None:
            open_starts.append(match.end())
        elif match[2] is not None:
            best_start, best_end = match.end(), -1
        elif token == "{":
            open_starts.append(-1)
        elif token == "}" and open_starts:
            start = open_starts.pop()
            if start > best_start:
                if _NOTHING.fullmatch(text, start, match.start()):
                    empty = text[start : match.start()].strip()
                else:
                    best_start, best_end = start, match.start()
    if best_start < 0:
        return empty
    if best_end < 0:
        end = _BARE_BOX_END.search(text, best_start)
        best_end = end.start() if end else len(text)
    return text[best_start:best_end].strip()
