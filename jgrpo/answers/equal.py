r"""Pure text: the last \boxed{} of a completion, and whether two answers are the same.

Three stages, the next only where the one before is undecided: normalised strings (as the MATH
benchmark does it: Hendrycks et al., 2021), exact rational numbers, and symbolic equality by
math-verify. The answer's shape (tuple, interval, set, list, union, matrix) is taken apart here, so
that the later stages see scalars only: math-verify holds `(1,2)` and `1,2` for the same.

Nothing evaluates text as Python. Left out on purpose: decimals that only approximate a gold answer,
conversion of units, degrees against radians.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from jgrpo.answers.algebra import OutOfTime, deadline, is_safe, same_by_algebra, variables
from jgrpo.answers.latex import MAX_CHARS, depths, named, normalize, parts, split

IN_PROCESS_LIMIT_S = 5.0
"""Seconds that `is_correct` may spend in sympy."""

MAX_DEPTH = 40
"""Answers with brackets nested deeper are compared as text alone."""

_BOX = re.compile(
    r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])"
    r"(?:(\s*\{)|([ \t]*)(?=[-+.0-9(\[]|\\[^)\]]|[A-Za-z](?![A-Za-z])))|\\.|[{}]",
    re.DOTALL,
)
_BARE_BOX_END = re.compile(r"\$|\n|\\\)|\\\]|$")

_DECIMAL = r"[0-9]+(?:\.[0-9]*)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>[0-9]*)\\frac\{{(?P<a>-?{_DECIMAL})\}}\{{(?P<b>-?{_DECIMAL})\}}"
    rf"|(?P<c>{_DECIMAL})(?:/(?P<d>{_DECIMAL})|\\cdot10\^\{{?(?P<e>-?[0-9]{{1,3}})\}}?"
    r"|\\(?:overline|bar)\{?(?P<period>[0-9]+)\}?)?)"
)
_THOUSANDS = re.compile(r"[^0-9,()\[\]{}]*[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])[^0-9,]*")
_UNITS = {
    alias: unit
    for unit, aliases in {
        "mm": "mm millimeter millimeters", "cm": "cm centimeter centimeters",
        "m": "m meter meters metre metres", "km": "km kilometer kilometers",
        "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards",
        "mi": "mi mile miles", "g": "g gm gram grams", "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds", "oz": "oz ounce ounces", "s": "s sec second seconds",
        "min": "min minute minutes", "h": "h hr hrs hour hours", "day": "day days",
        "week": "week weeks", "month": "month months", "year": "year years yr yrs",
        "penny": "penny pennies", "nickel": "nickel nickels", "dime": "dime dimes",
        "mph": "mph", "cent": "cent cents", "dollar": "dollar dollars",
        "L": "liter liters L", "mL": "mL ml milliliter milliliters",
        "": "unit units",  # of whatever kind; but units are no square units
    }.items()
    for alias in aliases.split()
}  # fmt: skip
_SCALES: dict[str, Fraction | int] = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "tenth": Fraction(1, 10), "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000), "millionth": Fraction(1, 10**6),
}  # fmt: skip
_SCALE = re.compile(
    rf'(?P<value>.*[0-9}}]) ?(?P<quote>"?) ?(?P<scale>{"|".join(sorted(_SCALES, reverse=True))})s?'
    r"(?!aire)(?: of )? ?(?P<rest>.*)",
    re.IGNORECASE,
)
_UNIT = re.compile(
    r'(?P<value>.*[^"]) ?(?:"(?P<text>[^"]*)"|(?<=[0-9}%])(?P<bare>[A-Za-z]{2,}))'
    r"(?:\^\{?(?P<power>[23])\}?)?\.?"
)


def last_boxed(text: str) -> str | None:
    r"""Return what is inside the last balanced \boxed{} or \fbox{} of `text`, or None.

    Last is by where it starts, so of nested boxes it is the inner one. A box that is never closed
    (a completion cut off at its token limit) is passed over for an earlier balanced one.
    `\boxed 2` reaches to the next $, \), \] or line end. Linear in len(text).
    """
    best_start, best_end = -1, -1
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
                best_start, best_end = start, match.start()
    if best_start < 0:
        return None
    if best_end < 0:
        end = _BARE_BOX_END.search(text, best_start)
        best_end = end.start() if end else len(text)
    return text[best_start:best_end].strip()


def same_text(answer: str, gold: str) -> bool:
    """Return whether both normalise to one string, percent signs and quotes aside; empty never."""
    return _plain(normalize(answer)) == _plain(normalize(gold)) != ""


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Return True or False where strings and exact numbers decide, None where only
    `same_symbolically` can. Never slow, never raises."""
    return _same(normalize(answer), normalize(gold), _same_scalar)


def same_symbolically(answer: str, gold: str) -> bool:
    """Return whether the two are the same, math-verify deciding the scalars that are left.

    math-verify's own time limits are off: they need signal.alarm, hence the main thread, and its
    except clauses turn their failure into "wrong". So this may take for ever on an answer that
    slips through the guards of `quick_verdict`; `grader.Grader` runs it where it can be killed.
    Raises whatever sympy raises.
    """

    def by_math_verify(a: str, b: str) -> bool:
        verdict = _same_scalar(a, b)
        if verdict is None:
            return same_by_algebra(_plain(_unit(a)[0]), _plain(_unit(b)[0]))
        return verdict

    return bool(_same(normalize(answer), normalize(gold), by_math_verify))


def is_correct(completion: str, gold: str) -> bool:
    r"""Return whether the last box of `completion` holds the bare answer `gold`.

    No box, an empty box, or an answer on which sympy fails or takes over IN_PROCESS_LIMIT_S is
    False; never raises. In training use `jgrpo.answers.grader.Grader`, which counts those apart.
    """
    answer = last_boxed(completion)
    if answer is None:
        return False
    verdict = quick_verdict(answer, gold)
    if verdict is None:
        try:
            import math_verify  # noqa: F401  (a deadline in mid-import would leave half a sympy)

            with deadline(IN_PROCESS_LIMIT_S):
                verdict = same_symbolically(answer, gold)
        except (Exception, OutOfTime):  # what sympy cannot read or finish is not the gold answer
            verdict = False
    return verdict


_Leaf = Callable[[str, str], bool | None]


def _same(a: str, b: str, leaf: _Leaf) -> bool | None:
    """Compare two normalised answers: take their shapes apart, then `leaf` on the scalars."""
    if not _plain(a) or not _plain(b):
        return False
    if _plain(a) == _plain(b):
        return True
    if max(len(a), len(b)) > MAX_CHARS or max(depths(a)[1], depths(b)[1]) > MAX_DEPTH:
        return False
    # `1,000` is a number or a list of two; either reading may be the one that agrees.
    joined_a, joined_b = (s.replace(",", "") if _THOUSANDS.fullmatch(s) else s for s in (a, b))
    if (joined_a, joined_b) != (a, b):
        if ",0" in a + b:  # a list would not write 0 as 000
            return _same(joined_a, joined_b, leaf)
        if _same(joined_a, joined_b, leaf):
            return True
    elements_a, elements_b = split(a, ","), split(b, ",")
    if len(elements_a) == len(elements_b) == 1:
        (name_a, value_a), (name_b, value_b) = named(elements_a[0]), named(elements_b[0])
        if name_a and name_b and name_a != name_b and "(" not in name_a + name_b:
            return False
        rests_equal_sided = ("=" in value_a) == ("=" in value_b)
        if (name_a or name_b) and rests_equal_sided:
            return _same(value_a, value_b, leaf)
        kind_a, parts_a = parts(elements_a[0])
        kind_b, parts_b = parts(elements_b[0])
    else:
        names_a, names_b = ({named(e)[0] for e in es} - {""} for es in (elements_a, elements_b))
        if len(names_a | names_b) > 1 and names_a != names_b:
            return False
        kind_a, parts_a = parts(a)
        kind_b, parts_b = parts(b)
    if kind_a == kind_b == "":
        return leaf(parts_a[0], parts_b[0])
    if kind_a != kind_b or len(parts_a) != len(parts_b):
        return False
    if kind_a in ("set", "union"):
        return _same_unordered(parts_a, parts_b, leaf)
    return _all(_same(x, y, leaf) for x, y in zip(parts_a, parts_b, strict=True))


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """Three-valued and: False beats undecided, undecided beats True."""
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True


def _same_unordered(a: Sequence[str], b: Sequence[str], leaf: _Leaf) -> bool | None:
    """Pair off equal elements, first come first served (sameness is transitive)."""
    left = list(b)
    undecided = False
    for x in a:
        verdicts = [_same(x, y, leaf) for y in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _plain(s: str) -> str:
    return s.replace('"', "").replace("%", "").replace(",~", ",")


def _same_scalar(a: str, b: str) -> bool | None:
    """Compare two scalars as strings, numbers, words; None: needs algebra, and is safe for it."""
    (a, scale_a), (b, scale_b) = _scale(a), _scale(b)
    (value_a, *unit_a), (value_b, *unit_b) = _unit(a), _unit(b)
    if any(x and y and x != y for x, y in zip(unit_a, unit_b, strict=True)):
        return False
    may_be_left_out = not (scale_a and scale_b)
    if _plain(value_a) == _plain(value_b) != "" and (may_be_left_out or scale_a == scale_b):
        return True
    number_a, number_b = _number(value_a), _number(value_b)
    if number_a is not None and number_b is not None:
        # The MATH benchmark drops percent signs; 0.5 and 50% are equal all the same.
        factor_a = scale_a or (Fraction(1, 100) if value_a.endswith("%") else 1)
        factor_b = scale_b or (Fraction(1, 100) if value_b.endswith("%") else 1)
        if may_be_left_out and number_a == number_b:
            return True
        return number_a * factor_a == number_b * factor_b
    if _is_words(value_a) or _is_words(value_b):
        words_a, words_b = (re.sub(r'[".()\s]', "", s) for s in (value_a, value_b))
        if len(words_a) > 1 or '"' in value_a + value_b:  # but x is not X
            words_a, words_b = words_a.casefold(), words_b.casefold()
        return words_a == words_b != ""
    if variables(value_a) != variables(value_b) or not (is_safe(value_a) and is_safe(value_b)):
        return False
    return None


def _scale(s: str) -> tuple[str, Fraction | int | None]:
    """`5 thousand cm` -> ("5cm", 1000); without such a word (s, None)."""
    if not (match := _SCALE.fullmatch(s)):
        return s, None
    rest = match["quote"] + match["rest"]
    return match["value"] + (rest if rest != '""' else ""), _SCALES[match["scale"].lower()]


def _unit(s: str) -> tuple[str, str, str]:
    r"""`5 cm^2` -> ("5", "cm", "2"); of a unit that is no measure (`5 edges`) the name is dropped:
    ("5", "", "")."""
    match = _UNIT.fullmatch(s)
    if not match or not re.search(r"[0-9}]", match["value"]):
        return s, "", ""
    word = (match["text"] or match["bare"] or "").strip(" .").lower()
    squared, cubed = re.subn(r"^(?:square|sq\.?) ?", "", word), re.subn(r"^cubic ?", "", word)
    power = match["power"] or ("2" if squared[1] else "3" if cubed[1] else "")
    known = _UNITS.get(squared[0] if squared[1] else cubed[0])
    if not word or (match["bare"] and known is None and len(word) < 4):
        return s, "", ""
    return match["value"].strip(), known or "", power or ("" if known is None else "1")


def _number(s: str) -> Fraction | None:
    """Return the exact value of a plain number (also a/b, mixed, a.10^b, percent, with a period),
    else None."""
    match = _NUMBER.fullmatch(s.removesuffix("%")) if len(s) <= MAX_CHARS else None
    if not match or (match["period"] and "." not in match["c"]):
        return None
    try:
        if match["c"]:
            value = Fraction(match["c"].rstrip(".")) / Fraction((match["d"] or "1").rstrip("."))
            value *= Fraction(10) ** int(match["e"] or 0)
            if match["period"]:
                n_places = len(match["c"].partition(".")[2])
                nines = 10 ** len(match["period"]) - 1
                value += Fraction(int(match["period"]), nines * 10**n_places)
        else:
            value = Fraction(match["a"].rstrip(".")) / Fraction(match["b"].rstrip("."))
            value += int(match["whole"] or 0)
    except ZeroDivisionError:
        return None
    return -value if match["sign"] == "-" else value


def _is_words(s: str) -> bool:
    """Text rather than a product of variables, in which `seat` would be `east`."""
    bare = re.sub(r"\\[A-Za-z]+", "", s)
    return '"' in s or bool(re.search(r"[A-Za-z]{3}|[A-Z]{2}", bare)) or bare.isalpha()
