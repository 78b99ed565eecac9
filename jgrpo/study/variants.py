"""Variants of a config, by name: what a file changes of rank1.py, applied to any base. The files
are those beside the base, and the ones that come with the package.

`clip` is what configs/clip.py changes, `four_updates+clip` both changes, `lora_r=2` the change
itself, `rank1` none.
"""

import ast
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jgrpo.config import SHIPPED, Config, load_config
from jgrpo.errors import InputError

BASELINE = "rank1"


@dataclass(frozen=True)
class Variant:
    """A name, and the fields that it changes."""

    name: str
    changes: dict[str, Any]
    about: str

    def apply(self, config: Config) -> Config:
        """The config with the changes; InputError names the variant if they do not go together."""
        try:
            return replace(config, **self.changes)
        except InputError as error:
            raise InputError(f"variant {self.name}: {error}") from None

    @property
    def reference(self) -> str:
        """What it is compared with: the variant without its last part."""
        return "+".join(parts_of(self.name)[:-1]) or BASELINE


def parts_of(name: str) -> list[str]:
    """`four_updates+clip` -> both; the plus of a number, as in lr=1e+0, parts nothing."""
    return re.split(r"(?<![\d.][eE])\+|\+(?!\d)", name)


def with_references(names: Sequence[str]) -> tuple[str, ...]:
    """The names, and before them what they are to be compared with: each without its last part, and
    so down to the baseline."""
    needed = [BASELINE]
    for parts in map(parts_of, names):
        needed += ["+".join(parts[:n]) for n in range(1, len(parts))]
    return *(name for name in dict.fromkeys(needed) if name not in names), *names


def read_variants(names: Sequence[str], folder: Path) -> list[Variant]:
    """The variants of these names; their files are in `folder`, or come with the package.
    InputError for one that is not there."""
    if len(set(names)) < len(names):
        raise InputError(f"a variant is given twice: {' '.join(names)}")
    variants = []
    for name in names:
        changes: dict[str, Any] = {}
        about = []
        for part in parts_of(name):
            new, text = _part(part, folder)
            if twice := sorted(k for k in changes.keys() & new.keys() if changes[k] != new[k]):
                raise InputError(f"variant {name}: two of its parts set {', '.join(twice)}")
            changes |= new
            about.append(text)
        variants.append(Variant(name, changes, "; ".join(about)))
    return variants


def _part(part: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What one part changes, and a word on it."""
    if part == BASELINE:
        return {}, "the config as it is"
    field, equals, value = part.partition("=")
    if equals:
        if field not in {f.name for f in dataclasses.fields(Config)}:
            raise InputError(f"variant {part}: Config has no field {field}")
        try:
            return {field: ast.literal_eval(value)}, part
        except (ValueError, SyntaxError):
            return {field: value}, part
    found = {f.stem: f for where in (SHIPPED, folder) for f in sorted(where.glob("*.py"))}
    if part not in found:
        known = ", ".join(sorted(found))
        raise InputError(
            f"variant {part}: there is no {folder / part}.py; there are {known}, or FIELD=VALUE"
        )
    file = found[part]
    before, after = load_config(found[BASELINE]), load_config(file)
    fields = (f.name for f in dataclasses.fields(Config))
    changes = {n: getattr(after, n) for n in fields if getattr(after, n) != getattr(before, n)}
    return changes, (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").rstrip(".")
