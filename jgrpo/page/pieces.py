"""A completion's text cut into its tokens, so that each can be coloured.

The rollouts files keep the ids; the text of each comes from the tokenizer.json of the run's model,
which is read where it lies (a folder, or the hub's cache): nothing is downloaded.
"""

import functools
from pathlib import Path
from typing import Any

import huggingface_hub
from tokenizers import Tokenizer

WINDOW = 6
"""Tokens before a token that its text can depend on."""
BROKEN = "\N{REPLACEMENT CHARACTER}"


@functools.lru_cache(maxsize=4)
def tokenizer_of(model_id: str) -> Tokenizer | None:
    """The tokenizer of a hub id or folder; None where it is not on this machine."""
    file: Any = Path(model_id) / "tokenizer.json"
    if not file.is_file():
        try:
            file = huggingface_hub.try_to_load_from_cache(model_id, "tokenizer.json")
        except ValueError:  # not an id of the hub: a folder that is gone
            return None
    if not isinstance(file, str | Path):
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises Exception itself; without one there are no colours
        return None


def pieces(tokenizer: Tokenizer, token_ids: list[int], text: str) -> list[str] | None:
    """The text of each token, "" for one that only begins a character or ends the completion; None
    if they do not add up to `text`, that is, if the tokenizer is another than the run's."""
    found, start, shown = [], 0, 0  # of the window, and up to where it has been handed out
    for end in range(1, len(token_ids) + 1):
        before = _decode(tokenizer, token_ids[start:shown])
        with_it = _decode(tokenizer, token_ids[start:end])
        if with_it.endswith(BROKEN) and end - shown < WINDOW and end < len(token_ids):
            found.append("")
            continue
        found.append(with_it[len(before) :])
        start, shown = max(0, end - WINDOW), end
    whole = "".join(found)
    if whole != text and found and whole == text + found[-1]:  # the end token is not of the text
        whole, found[-1] = text, ""
    return found if whole == text else None


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))
