r"""Inequalities: which way round they are written does not matter, and in one letter they are the
intervals that they say: `-3 < x \le 5` is (-3,5]."""

import re

from jgrpo.answers.shape import split

_RELATION = r"<|>|\\le ?|\\ge ?"
_BETWEEN = re.compile(rf"(.+?)({_RELATION})([A-Za-z])({_RELATION})(.+)")
_BOUND = re.compile(rf"([A-Za-z])({_RELATION}|\\ne ?)(.+)")
_BOUND_BEFORE = re.compile(rf"(.+?)({_RELATION})([A-Za-z])")
_SIZE = re.compile(
    r"\|([A-Za-z])\|(<|>|\\le ?|\\ge ?)([0-9.]+|\\frac\{[0-9]+\}\{[0-9]+\}|\\sqrt\{[0-9]+\})"
)
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def as_interval(s: str) -> str:
    r"""A normalised inequality in one letter as an interval, several (`x<2,~x>5`) as their union;
    anything else as it is."""
    pieces = [_interval(piece) for piece in split(s, ",")]
    return s if "" in pieces else r"\cup ".join(pieces)


def relation(s: str) -> tuple[list[str], list[str]]:
    r"""`1 \ge x > 0` -> (["<", "\le"], ["0", "x", "1"]): what is related, the smallest first;
    ([], []) if it is no chain of one direction."""
    pieces = re.split(rf"({_RELATION}|\\ne ?)", s)
    signs, sides = [sign.strip() for sign in pieces[1::2]], pieces[::2]
    if not signs or "" in sides or len(set(sides)) < 2:
        return [], []
    if set(signs) <= {">", r"\ge"}:
        signs, sides = [_FLIPPED[sign] for sign in reversed(signs)], sides[::-1]
    one_way = set(signs) <= {"<", r"\le"} or signs == [r"\ne"]
    return (signs, sides) if one_way else ([], [])


def _interval(s: str) -> str:
    """An interval, or nothing."""
    if m := _SIZE.fullmatch(s):
        inside, bound = m[2].strip() in ("<", r"\le"), m[3]
        if inside:
            return _interval(f"-{bound}{m[2]}x{m[2]}{bound}")
        first, last = _interval(f"x{_FLIPPED[m[2].strip()]}-{bound}"), _interval(f"x{m[2]}{bound}")
        return rf"{first}\cup {last}"
    if m := _BETWEEN.fullmatch(s):
        low, left, right, high = m[1], m[2].strip(), m[4].strip(), m[5]
        if left in (">", r"\ge"):
            low, left, right, high = high, _FLIPPED[right], _FLIPPED[left], low
        if not {left, right} <= {"<", r"\le"} or re.search(rf"{_RELATION}|{m[3]}", low + high):
            return ""
        return f"{'(' if left == '<' else '['}{low},{high}{')' if right == '<' else ']'}"
    if m := _BOUND.fullmatch(s):
        letter, relation_, bound = m[1], m[2].strip(), m[3]
    elif m := _BOUND_BEFORE.fullmatch(s):
        letter, relation_, bound = m[3], _FLIPPED[m[2].strip()], m[1]
    else:
        return ""
    if re.search(rf"{_RELATION}|=|{letter}", re.sub(r"\\(?!le|ge)[A-Za-z]+", "", bound)):
        return ""
    return {
        "<": rf"(-\infty,{bound})",
        r"\le": rf"(-\infty,{bound}]",
        ">": rf"({bound},\infty)",
        r"\ge": rf"[{bound},\infty)",
        r"\ne": rf"(-\infty,{bound})\cup ({bound},\infty)",
    }[relation_]
