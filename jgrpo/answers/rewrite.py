"""Tables of patterns and of what takes their place; a text goes through one from top to bottom."""

import re
from collections.abc import Callable

Rules = tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]


def rules(*pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> Rules:
    """Pairs of a pattern and its replacement, as `re.sub` takes them."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def rewritten(text: str, table: Rules) -> str:
    for pattern, replacement in table:
        text = pattern.sub(replacement, text)
    return text
