r"""Inequalities as the intervals that they say: `-3 < x \le 5` is (-3,5]."""

import re

from jgrpo.answers.latex import split

_RELATION = r"<|>|\\le ?|\\ge ?"
_BETWEEN = re.compile(rf"(.+?)({_RELATION})([A-Za-z])({_RELATION})(.+)")
_BOUND = re.compile(rf"([A-Za-z])({_RELATION}|\\ne ?)(.+)")
_BOUND_BEFORE = re.compile(rf"(.+?)({_RELATION})([A-Za-z])")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def as_interval(s: str) -> str:
    r"""A normalised inequality in one letter as an interval, several (`x<2,~x>5`) as their union;
    anything else as it is."""
    pieces = [_interval(piece) for piece in split(s, ",")]
    return s if "" in pieces else r"\cup ".join(pieces)


def _interval(s: str) -> str:
    """An interval, or nothing."""
    if m := _BETWEEN.fullmatch(s):
        low, left, right, high = m[1], m[2].strip(), m[4].strip(), m[5]
        if left in (">", r"\ge"):
            low, left, right, high = high, _FLIPPED[right], _FLIPPED[left], low
        if not {left, right} <= {"<", r"\le"} or re.search(rf"{_RELATION}|{m[3]}", low + high):
            return ""
        return f"{'(' if left == '<' else '['}{low},{high}{')' if right == '<' else ']'}"
    if m := _BOUND.fullmatch(s):
        letter, relation, bound = m[1], m[2].strip(), m[3]
    elif m := _BOUND_BEFORE.fullmatch(s):
        letter, relation, bound = m[3], _FLIPPED[m[2].strip()], m[1]
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
    }[relation]
