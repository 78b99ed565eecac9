r"""Pure text: the last \boxed{} of a completion, and whether two answers are the same.

Three stages, the next only where the one before is undecided: normalised strings (as the MATH
benchmark does it: Hendrycks et al., 2021), exact rational numbers, and symbolic equality by
math-verify. The answer's shape (tuple, interval, set, list, union, matrix) is taken apart here, so
that the later stages see scalars only: math-verify holds `(1,2)` and `1,2` for the same.

Nothing evaluates text as Python. Left out on purpose: decimals that only approximate a gold answer,
conversion of units, degrees against radians.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from jgrpo.answers.algebra import OutOfTime, deadline, is_safe, same_by_algebra, variables
from jgrpo.answers.box import last_boxed
from jgrpo.answers.choice import choice
from jgrpo.answers.interval import as_interval, relation
from jgrpo.answers.latex import MAX_CHARS, normalize
from jgrpo.answers.names import named, same_name, values_in_order
from jgrpo.answers.scalar import is_words, number, product
from jgrpo.answers.shape import depths, parts, split
from jgrpo.answers.units import scale, unit

IN_PROCESS_LIMIT_S = 5.0
"""Seconds that `is_correct` may spend in sympy."""

MAX_DEPTH = 40
"""Answers with brackets nested deeper are compared as text alone."""

_THOUSANDS = re.compile(r"[^0-9,()\[\]{}]*[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])[^0-9,]*")
_ABOUT = re.compile(r" ?\\approx(?![A-Za-z]) ?")
_POINT = re.compile(
    r"(?<![0-9.])[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+|[0-9]+,[0-9]+"
    r"|(?<![0-9.])[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}(?![0-9])"
)
_THREE = re.compile(r"[1-9][0-9]{0,2},[0-9]{3}(?![0-9])")


def same_text(answer: str, gold: str) -> bool:
    """Return whether both normalise to one string, percent signs and quotes aside; empty never."""
    return _plain(normalize(answer)) == _plain(normalize(gold)) != ""


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Return True or False where strings and exact numbers decide, None where only
    `same_symbolically` can. Never slow, never raises."""
    return _compared(answer, gold, _same_scalar)


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
            return same_by_algebra(_plain(unit(a)[0]), _plain(unit(b)[0]))
        return verdict

    return bool(_compared(answer, gold, by_math_verify))


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
            _warm_up()
            with deadline(IN_PROCESS_LIMIT_S):
                verdict = same_symbolically(answer, gold)
        except (Exception, OutOfTime):  # what sympy cannot read or finish is not the gold answer
            verdict = False
    return verdict


@functools.cache
def _warm_up() -> None:
    """Import sympy and fill its tables, which takes seconds, outside of a deadline (one in
    mid-import would leave half a sympy)."""
    same_by_algebra("(x+1)^2", "x^2+2x+1")


_Leaf = Callable[[str, str], bool | None]


def _compared(answer: str, gold: str, leaf: _Leaf) -> bool | None:
    """Compare two answers as they were written. Of a choice with its value (`(C) 12`) either is
    right, unless the other one is wrong."""
    (letter, value), (gold_letter, gold_value) = choice(answer), choice(gold)
    if letter and gold_letter:
        same_value = _same(normalize(value), normalize(gold_value), leaf)
        return same_value if letter == gold_letter else False
    if letter:
        return _any(_compared(part, gold, leaf) for part in (letter, value))
    if gold_letter:
        return _any(_compared(answer, part, leaf) for part in (gold_letter, gold_value))
    a, b = normalize(answer), normalize(gold)
    verdict = _same(a, b, leaf)
    if not verdict and "," not in b and ", " not in answer and (point := _with_point(a)):
        return _any([verdict, _same(point, b, leaf)])
    if verdict is False and r"\cup" in b and re.search(r"(?<![A-Za-z])or(?![A-Za-z])", answer):
        return _same(a.replace(",~", r"\cup "), b, leaf)
    return verdict


def _with_point(s: str) -> str:
    """`3,5` -> `3.5`, `1.234,5` -> `1234.5`, `1.000.000` -> `1000000`; nothing where a comma may be
    another one."""
    found = _POINT.findall(s) if len(s) <= MAX_CHARS else []
    if len(found) != 1 or s.count(",") > 1 or _THREE.search(s):
        return ""
    if "," in found[0] and len(split(s, ",")) != 2:
        return ""  # within brackets
    return s.replace(found[0], found[0].replace(".", "").replace(",", "."))


def _same(a: str, b: str, leaf: _Leaf) -> bool | None:
    """Compare two normalised answers: take their shapes apart, then `leaf` on the scalars."""
    a, b = _exact(a), _exact(b)
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
        return _same_single(elements_a[0], elements_b[0], a, b, leaf)
    if 1 in (len(elements_a), len(elements_b)):  # x\in\{1,2\}
        value_a, value_b = (
            named(s)[1] if len(es) == 1 else s for s, es in ((a, elements_a), (b, elements_b))
        )
        if value_a.startswith("\\{") or value_b.startswith("\\{"):
            return _same_parts(value_a, value_b, leaf)
    named_a, named_b = ([named(e) for e in es] for es in (elements_a, elements_b))
    names_a, names_b = ({name for name, _ in es} - {""} for es in (named_a, named_b))
    if len(named_a) == len(named_b) and not _same_names(names_a, names_b):
        return False
    if point := _same_point(named_a, named_b):
        return _all(_same(x, y, leaf) for x, y in point)
    if names_a and names_b and names_a != names_b:
        if len(named_a) != len(named_b):
            return False
        a, b = (",".join(value for _, value in es) for es in (named_a, named_b))
    return _same_parts(a, b, leaf)


def _same_single(a: str, b: str, whole_a: str, whole_b: str, leaf: _Leaf) -> bool | None:
    """Compare two answers that are no lists, without the names of their values."""
    (name_a, value_a), (name_b, value_b) = named(a), named(b)
    if name_a and name_b and not same_name(name_a, name_b):
        return False
    if (name_a or name_b) and ("=" in value_a) == ("=" in value_b):
        return _same(value_a, value_b, leaf)
    (signs_a, sides_a), (signs_b, sides_b) = relation(a), relation(b)
    if signs_a and signs_b:
        if signs_a != signs_b or len(sides_a) != len(sides_b):
            return False
        ways = [sides_a, sides_a[::-1]] if signs_a == [r"\ne"] else [sides_a]
        return _any(
            _all(_same(x, y, leaf) for x, y in zip(way, sides_b, strict=True)) for way in ways
        )
    return _same_parts(whole_a, whole_b, leaf)


def _same_parts(a: str, b: str, leaf: _Leaf) -> bool | None:
    (kind_a, parts_a), (kind_b, parts_b) = parts(a), parts(b)
    if kind_a == kind_b == "":
        return leaf(parts_a[0], parts_b[0])
    if kind_a != kind_b:
        interval_a, interval_b = as_interval(a), as_interval(b)
        return _same(interval_a, interval_b, leaf) if (interval_a, interval_b) != (a, b) else False
    if len(parts_a) != len(parts_b):
        return False
    if kind_a in ("set", "union"):
        return _same_unordered(parts_a, parts_b, leaf)
    return _all(_same(x, y, leaf) for x, y in zip(parts_a, parts_b, strict=True))


def _same_names(names_a: set[str], names_b: set[str]) -> bool:
    """Whether two lists may name the same values; x_1 and x_2 are two values of x."""
    if names_a != names_b:
        names_a, names_b = (
            {re.sub(r"_(?:\{[^{}]*\}|.)$", "", n) for n in ns} for ns in (names_a, names_b)
        )
    return len(names_a | names_b) < 2 or names_a == names_b


def _same_point(a: list[tuple[str, str]], b: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """`x=1,y=2` beside `(1,2)`, each element with its name: what to compare with what; nothing if
    they are not these."""
    for these, those in ((a, b), (b, a)):
        values = values_in_order(these)
        name, value = those[0]
        kind, coordinates = parts(value) if len(those) == 1 else ("", [])
        if name and re.sub("[(),]", "", name) != "".join(each for each, _ in these):
            continue
        if values and kind == "()" and len(coordinates) == len(values):
            pairs = list(zip(values, coordinates, strict=True))
            return pairs if these is a else [(y, x) for x, y in pairs]
    return []


def _exact(s: str) -> str:
    r"""`8\sqrt2\approx11.3` -> `8\sqrt2`; `x\approx11.3` -> `11.3`."""
    said = [part for part in _ABOUT.split(s) if part] if "\\" in s else [s]
    if len(said) > 1 and re.fullmatch(r"[A-Za-z]{1,2}(?:_\w)?", said[0]):
        return said[1]
    return said[0] if said else s


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    """Three-valued or: True beats undecided, undecided beats False."""
    undecided = False
    for verdict in verdicts:
        if verdict:
            return True
        undecided |= verdict is None
    return None if undecided else False


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
    (a, scale_a), (b, scale_b) = scale(a), scale(b)
    (value_a, *unit_a), (value_b, *unit_b) = unit(a), unit(b)
    if any(x and y and x != y for x, y in zip(unit_a, unit_b, strict=True)):
        return False
    may_be_left_out = not (scale_a and scale_b)
    if _plain(value_a) == _plain(value_b) != "" and (may_be_left_out or scale_a == scale_b):
        return True
    number_a, number_b = number(value_a), number(value_b)
    if number_a is not None and number_b is not None:
        # The MATH benchmark drops percent signs; 0.5 and 50% are equal all the same.
        factor_a = scale_a or (Fraction(1, 100) if value_a.endswith("%") else 1)
        factor_b = scale_b or (Fraction(1, 100) if value_b.endswith("%") else 1)
        if may_be_left_out and number_a == number_b:
            return True
        return number_a * factor_a == number_b * factor_b
    if _same_product(value_a, value_b):
        return True
    if is_words(value_a) or is_words(value_b):
        words_a, words_b = (re.sub(r'[".()\s]', "", s) for s in (value_a, value_b))
        letters = len(words_a) < 3 and words_a.casefold() not in ("no", "am", "pm")
        if not letters or '"' in value_a + value_b:  # but x is not X
            words_a, words_b = words_a.casefold(), words_b.casefold()
        return words_a == words_b != ""
    if variables(value_a) != variables(value_b) or not (is_safe(value_a) and is_safe(value_b)):
        return False
    return None


def _same_product(a: str, b: str) -> bool:
    r"""`a\cdot b` says of the other one that its letters are a product, too, and no word."""
    if r"\cdot" in a + b and re.fullmatch(r"[A-Za-z]+|(?:[A-Za-z]\\cdot ?)+[A-Za-z]", a):
        a, b = (re.sub(r"(?<=[A-Za-z])(?=[A-Za-z])", r"\\cdot ", s) if s.isalpha() else s
                for s in (a, b))  # fmt: skip
    product_a = product(a)
    return product_a is not None and product_a == product(b)
