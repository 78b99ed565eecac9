r"""Multiple choice: a letter with what it stands for, `\textbf{(C)}\ 12`."""

import re

from jgrpo.answers.latex import MAX_CHARS
from jgrpo.answers.shape import depths

_DRESS = r"(?:\s|\{|\\(?:text|math|bold|bf|rm|it|sf|textrm)[a-z]*\s*\{?)*"
_CHOICE = re.compile(
    rf"(?P<dress>{_DRESS})(?:\({_DRESS}(?P<a>[A-Z])[\s}}]*\)|(?P<b>[A-Z])[\s}}]*[.):]"
    r"|(?P<c>[A-Z]) - (?=[A-Za-z]{2}))"
    r"(?P<gap>(?:\\[ ,;:!]|\\q?quad(?![A-Za-z])|\\hspace\*?\{[^{}]*\}|~|[}\s:.]|-(?=\s))*)"
    r"(?P<value>\S.*)",
    re.DOTALL,
)


def choice(s: str) -> tuple[str, str]:
    r"""`\textbf{(C)}\ 12` -> ("C", "12"); ("", s) if it is not a letter and what it stands for."""
    match = _CHOICE.fullmatch(s.strip().strip("$")) if len(s) <= MAX_CHARS else None
    if not match or not (match["dress"] or match["gap"] or match["c"]):
        return "", s
    value = match["value"]
    while depths(value)[0] < 0 and value.endswith("}"):  # \textbf{(C) 12}
        value = value.removesuffix("}")
    return (match["a"] or match["b"] or match["c"], value) if value.strip(" }\\") else ("", s)
