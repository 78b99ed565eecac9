"""Scalars as what they are: exact numbers, products of letters and powers, words."""

import re
from collections import Counter
from fractions import Fraction

from jgrpo.answers.latex import MAX_CHARS

_DECIMAL = r"[0-9]+(?:\.[0-9]*)?"
_TEN = r"\)?(?:\\cdot ?\{?\(?\{?10\}?\^|\(10\^)"
_NUMBER = re.compile(
    rf"\(?(?P<sign>[-+]?)(?:(?P<whole>[0-9]*)\\frac\{{(?P<a>-?{_DECIMAL})\}}"
    rf"\{{(?P<b>-?{_DECIMAL})\}}|(?P<c>{_DECIMAL})(?:/(?P<d>{_DECIMAL})"
    rf"|(?:[eE]\+?|{_TEN})\{{?\(?(?P<e>-?[0-9]{{1,3}})\)?\}}?[)}}]?"
    r"|\\(?:overline|bar)\{?(?P<period>[0-9]+)\}?|(?P<goes_on>\\ldots))?)"
)
_FACTOR = re.compile(
    r"\\cdot ?|(?P<number>[0-9]+(?:\.[0-9]+)?)|\\frac\{(?P<a>[0-9]+)\}\{(?P<b>[0-9]+)\}"
    r"|(?P<letter>\\[a-z]+ ?|\\?[A-Za-z](?:_(?:[0-9a-z]|\{[0-9a-z]+\}))?)"
    r"(?:\^(?:(?P<n>[0-9])|\{(?P<m>[0-9]+)\}))?"
)
_COMMANDS = """frac sqrt sin cos tan sec csc cot log ln pm mp cup cap in le ge ne ldots infty to
    approx sim overline bar begin end"""
_NO_LETTERS = frozenset(_COMMANDS.split())


def number(s: str) -> Fraction | None:
    r"""The exact value of a plain number (also a/b, mixed, a.10^b, percent, with a period), else
    None."""
    match = _NUMBER.fullmatch(s.removesuffix("%")) if len(s) <= MAX_CHARS else None
    if not match or (match["period"] and "." not in match["c"]):
        return None
    if match[0].count("(") != match[0].count(")") or match[0].count("{") != match[0].count("}"):
        return None
    try:
        if match["c"]:
            value = Fraction(match["c"].rstrip(".")) / Fraction((match["d"] or "1").rstrip("."))
            value *= Fraction(10) ** int(match["e"] or 0)
            places = match["c"].partition(".")[2]
            if match["goes_on"]:
                if not (period := _period(places)):
                    return None
                value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(places))
            if match["period"]:
                nines = 10 ** len(match["period"]) - 1
                value += Fraction(int(match["period"]), nines * 10 ** len(places))
        else:
            value = Fraction(match["a"].rstrip(".")) / Fraction(match["b"].rstrip("."))
            value += int(match["whole"] or 0)
    except ZeroDivisionError:
        return None
    return -value if match["sign"] == "-" else value


def _period(places: str) -> str:
    """What repeats at the end of `places`: a digit three times, or several digits twice."""
    for n in range(1, len(places) // 2 + 1):
        if (places[-n:] * 3 if n == 1 else places[-n:] * 2) == places[-n * (3 if n == 1 else 2) :]:
            return places[-n:]
    return ""


Product = tuple[Fraction, Counter[str]]


def product(s: str) -> Product | None:
    r"""A product of numbers, letters and their powers, whatever the order of its factors; None if
    it is anything else, or may be a word. `2r\pi` and `\pi r*2` are one."""
    sign = -1 if s.startswith("-") else 1
    s = s.removeprefix("-")
    if not re.search(r"[A-Za-z]", s) or is_words(s):
        return None
    coefficient, powers, at, was_number = Fraction(sign), Counter[str](), 0, False
    while at < len(s):
        match = _FACTOR.match(s, at)
        if (
            not match
            or (letter := (match["letter"] or "").strip()).removeprefix("\\") in _NO_LETTERS
        ):
            return None
        at = match.end()
        if letter:
            powers[letter] += int(match["n"] or match["m"] or 1)
        elif match["number"] or match["a"]:
            if re.match(r"[0-9.^]", s[at:]):
                return None
            if match["a"] and was_number:
                return None  # a mixed number
            if match["b"] and not int(match["b"]):
                return None
            coefficient *= Fraction(match["number"] or Fraction(int(match["a"]), int(match["b"])))
        was_number = bool(match["number"])
    return coefficient, powers


def is_words(s: str) -> bool:
    """Text rather than a product of variables, in which `seat` would be `east`. Small letters that
    follow each other in the alphabet are a product, and three of them if no vowel is among them."""
    if '"' in s or s in ("on", "no"):
        return True
    for run in re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "-", s)):
        in_a_row = "".join(sorted(run)) in "abcdefghijklmnopqrstuvwxyz"
        if re.search("[A-Z]{2}", run) or (len(run) > 3 and not in_a_row):
            return True
        if len(run) == 3 and not in_a_row and set("aeiouAEIOU") & set(run):
            return True
    return False
