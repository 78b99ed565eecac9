r"""Pure text: the last \boxed{} of a completion, and whether two answers are the same.

Three stages, the next only where the one before is undecided: normalised strings (as the MATH
benchmark does it: Hendrycks et al., 2021), exact rational numbers, and symbolic equality by
math-verify. The answer's shape (tuple, interval, set, list, union, matrix) is taken apart here, so
that the later stages see scalars only: math-verify holds `(1,2)` and `1,2` for the same.

Nothing here evaluates text as Python. sympy's `sympify` and `parse_expr` would; math-verify calls
them for its `ExprExtractionConfig`, which is therefore never passed, and for the numbers in LaTeX,
which are therefore read here (`_read_number`). Left out on purpose: decimals that only approximate
a gold answer, conversion of units, degrees against radians.
"""

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction

MAX_CHARS = 1000
"""Longer answers are compared as they stand, without normalisation."""
IN_PROCESS_LIMIT_S = 5.0
"""Seconds that `is_correct` may spend in sympy."""

_BOX = re.compile(
    r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])"
    r"(?:(\s*\{)|([ \t]*)(?=[-+.0-9(\[]|\\[^)\]]|[A-Za-z](?![A-Za-z])))|\\.|[{}]",
    re.DOTALL,
)
_BARE_BOX_END = re.compile(r"\$|\n|\\\)|\\\]|$")

_UNICODE = str.maketrans(
    {
        "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{NO-BREAK SPACE}": " ", '"': "",
        "\N{MULTIPLICATION SIGN}": r"\cdot ", "·": r"\cdot ", "π": r"\pi ", "√": r"\sqrt ",
        "\N{UNION}": r"\cup ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "°": r"^\circ ",
        "²": "^2", "³": "^3",
    }
)  # fmt: skip
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\\\(?=[a-z]{2})", r"\\"),  # doubled escapes: \\frac
        (r"\\\\", "\n"),  # a matrix row, from here on
        (r"\\\$|\$|\\[()\[\]]", ""),
        (r"\\(?:left|right|[bB]ig+[lr]?|displaystyle|textstyle)(?![A-Za-z])\.?", ""),
        (r"(?<=[0-9])(?:\{,\}|, ?\\! ?|\\! ?, ?)(?=[0-9]{3}(?![0-9]))", ""),
        (r"\\!", ""),
        (r"(?: |~|\\[,;:> ]|\\q?quad(?![A-Za-z]))+", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (
            r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname) ?"
            r"\{([^{}]*)\}",
            r'"\1"',  # in quotes from here on: may be a unit
        ),
        (r'" ?,? ?(?:and|or) ?"|(?<=[^A-Za-z"]) (?:and|or) ', ","),
        (r'"([^"]*,[^"]*)"', r"\1"),
        (r", ?,", ","),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", ""),
        (r"\\%| ?\b[pP]ercent\b", "%"),
        (r"(?<![A-Za-z\\])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"\\sqrt ?([0-9A-Za-z]|\\pi)", r"\\sqrt{\1}"),
        (r"\\frac ?([0-9A-Za-z]|\\pi)", r"\\frac{\1}"),
        (rf"\\frac({_GROUP}) ?([0-9A-Za-z]|\\pi)", r"\\frac\1{\2}"),
        (r"\\times(?![A-Za-z])|\*", r"\\cdot "),
        (r"\\le(?:q|qslant)?(?![A-Za-z])", r"\\le "),
        (r"\\ge(?:q|qslant)?(?![A-Za-z])", r"\\ge "),
        # `6 3/4` is a mixed number; without its space it would be 63/4.
        (r"(?<![0-9.] )(?<![0-9.])([0-9]+) +([0-9]+) ?/ ?([0-9]+)", r"\1\\frac{\2}{\3}"),
        (r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<=[0-9]) (?=[0-9])", "~"),  # `1 2` is not 12
        (r'(\\[A-Za-z]+) +(?=[A-Za-z])|(?<![A-Za-z]) +| +(?![A-Za-z])|(?<=") +', r"\1 "),
        (r"([\^_])\{([0-9A-Za-z])\}", r"\1\2"),
        (r"(?<![0-9])\.(?=[0-9])", "0."),
    )
)
_KEPT_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z]))| +")

_DECIMAL = r"[0-9]+(?:\.[0-9]*)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>[0-9]*)\\frac\{{(?P<a>-?{_DECIMAL})\}}\{{(?P<b>-?{_DECIMAL})\}}"
    rf"|(?P<c>{_DECIMAL})(?:/(?P<d>{_DECIMAL})|\\cdot10\^\{{?(?P<e>-?[0-9]{{1,3}})\}}?)?)"
)
_THOUSANDS = re.compile(r"[^0-9,()\[\]{}]*[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])[^0-9,]*")
_NAME = re.compile(
    r"((?:m?\\angle ?)?[A-Za-z](?:[A-Z]{1,2})?'?(?:_(?:\{\w+\}|\w))?(?:\([a-z](?:,[a-z])*\))?"
    r'|\\[a-z]+|"[^"]*"|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-z])) ?'
)
_MATRIX = re.compile(r"\\begin\{([pbBvV]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_UNITS = {
    alias: unit
    for unit, aliases in {
        "mm": "mm millimeter millimeters", "cm": "cm centimeter centimeters",
        "m": "m meter meters metre metres", "km": "km kilometer kilometers",
        "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards",
        "mi": "mi mile miles", "g": "g gm gram grams", "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds", "oz": "oz ounce ounces", "s": "s sec second seconds",
        "min": "min minute minutes", "h": "h hr hrs hour hours", "day": "day days",
        "mph": "mph", "cent": "cent cents", "dollar": "dollar dollars",
        "L": "liter liters L", "mL": "mL ml milliliter milliliters",
    }.items()
    for alias in aliases.split()
}  # fmt: skip
_UNIT = re.compile(
    r'(?P<value>.*[^"]) ?(?:"(?P<text>[^"]*)"|(?<=[0-9}%])(?P<bare>[A-Za-z]{2,}))'
    r"(?:\^\{?(?P<power>[23])\}?)?\.?"
)
_UNSAFE = re.compile(  # long integers, factorials, 9^9^9, high roots, bases, binomials
    r"[0-9]{40}|[0-9]{3}!|[^0-9]!|!!|\^[^{]\^|\\sqrt\[[0-9]{3}|[0-9]_"
    r"|[0-9][eE][-+]?[0-9]{3}|\\binom[^A-Za-z]*[0-9]{4}"
)
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "sec", "csc", "cot", "arcsin", "arccos", "arctan", "log", "ln")
)
_GREEK = frozenset(("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega"))
_COMMANDS = (
    _FUNCTIONS | _GREEK | {"frac", "sqrt", "pi", "cdot", "div", "infty", "le", "ge", "binom"}
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


def normalize(answer: str) -> str:
    r"""Return `answer` with one spelling for what MATH's graders take as one answer.

    \dfrac \frac12 \sqrt2 .5 10,\!000 90^\circ \$5 \left( x^{2} and spaces; \text{east} becomes
    "east" (in quotes) and percent stays as %: whether they count depends on where they stand.
    Trap: `1,000` stays as it is, for it may be a list. Longer than MAX_CHARS: only stripped.
    """
    if len(answer) > MAX_CHARS:
        return answer.strip()
    text = answer.translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _KEPT_SPACE.sub(lambda match: match[1] or "", text).strip(" \n")
    text = re.sub(r"[.,;:]+$", "", text.lstrip("+"))
    while text.startswith("{") and _closing(text) == len(text) - 1:
        text = text[1:-1]
    return text


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
    slips through the guards of `quick_verdict`; `jgrpo.rewards.Grader` runs it where it can be
    killed. Raises whatever sympy raises.
    """

    def by_math_verify(a: str, b: str) -> bool:
        verdict = _same_scalar(a, b)
        return _verify(a, b) if verdict is None else verdict

    return bool(_same(normalize(answer), normalize(gold), by_math_verify))


def is_correct(completion: str, gold: str) -> bool:
    r"""Return whether the last box of `completion` holds the bare answer `gold`.

    No box, an empty box, or an answer on which sympy fails or takes over IN_PROCESS_LIMIT_S is
    False; never raises. In training use `jgrpo.rewards.Grader`, which counts those apart.
    """
    answer = last_boxed(completion)
    if answer is None:
        return False
    verdict = quick_verdict(answer, gold)
    if verdict is None:
        try:
            import math_verify  # noqa: F401  (a deadline in mid-import would leave half a sympy)

            with _deadline(IN_PROCESS_LIMIT_S):
                verdict = same_symbolically(answer, gold)
        except (Exception, _OutOfTime):  # what sympy cannot read or finish is not the gold answer
            verdict = False
    return verdict


class _OutOfTime(BaseException):
    """No Exception, because sympy and math-verify swallow those."""


@contextlib.contextmanager
def _deadline(limit_s: float) -> Iterator[None]:
    """Raise _OutOfTime at the first Python call after `limit_s`; in any thread, unlike a signal.

    Cannot interrupt one long operation inside C: `_is_safe` keeps powers, the only such, small.
    """
    before = sys.getprofile()
    end_s = time.monotonic() + limit_s

    def check_clock(*_: object) -> None:
        if time.monotonic() > end_s:
            raise _OutOfTime

    sys.setprofile(check_clock)
    try:
        yield
    finally:
        sys.setprofile(before)


_Leaf = Callable[[str, str], bool | None]


def _same(a: str, b: str, leaf: _Leaf) -> bool | None:
    """Compare two normalised answers: take their shapes apart, then `leaf` on the scalars."""
    if not _plain(a) or not _plain(b):
        return False
    if _plain(a) == _plain(b):
        return True
    if max(len(a), len(b)) > MAX_CHARS:
        return False
    # `1,000` is a number or a list of two; either reading may be the one that agrees.
    joined_a, joined_b = (s.replace(",", "") if _THOUSANDS.fullmatch(s) else s for s in (a, b))
    if (joined_a, joined_b) != (a, b):
        if ",0" in a + b:  # a list would not write 0 as 000
            return _same(joined_a, joined_b, leaf)
        if _same(joined_a, joined_b, leaf):
            return True
    elements_a, elements_b = _split(a, ","), _split(b, ",")
    if len(elements_a) == len(elements_b) == 1:
        (name_a, value_a), (name_b, value_b) = _named(elements_a[0]), _named(elements_b[0])
        if name_a and name_b and name_a != name_b and "(" not in name_a + name_b:
            return False
        rests_equal_sided = ("=" in value_a) == ("=" in value_b)
        if (name_a or name_b) and rests_equal_sided:
            return _same(value_a, value_b, leaf)
        kind_a, parts_a = _parts(elements_a[0])
        kind_b, parts_b = _parts(elements_b[0])
    else:
        names_a, names_b = ({_named(e)[0] for e in es} - {""} for es in (elements_a, elements_b))
        if len(names_a | names_b) > 1 and names_a != names_b:
            return False
        kind_a, parts_a = _parts(a)
        kind_b, parts_b = _parts(b)
    if kind_a == kind_b == "":
        return leaf(a, b)
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


def _parts(s: str) -> tuple[str, list[str]]:
    """Return (kind, parts): "set" (also a bare list), "union", brackets, "matrix"; scalar: ""."""
    elements = _split(s, ",")
    expanded = [e for element in elements for e in _plus_minus(element)]
    if len(expanded) > 1:
        return "set", expanded
    if len(sets := _split(s, r"\cup")) > 1:
        return "union", sets
    if matrix := _MATRIX.fullmatch(s):
        rows = [row.split("&") for row in matrix[2].strip("\n").split("\n")]
        kind = "determinant" if matrix[1] in ("v", "V") else "matrix"
        return f"{kind} {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    if s.startswith(r"\{") and s.endswith(r"\}") and _closing(s) == len(s) - 1:
        inside = _split(s[2:-2], ",")
        return _parts(inside[0]) if len(inside) == 1 and inside[0] else ("set", inside)
    if s[0] in "([" and _closing(s) == len(s) - 1:
        inside = _split(s[1:-1], ",")
        if len(inside) > 1:
            return s[0] + s[-1], inside
        if s[0] + s[-1] == "()":
            return _parts(inside[0]) if inside[0] else ("", [s])
    return "", [s]


def _split(s: str, separator: str) -> list[str]:
    """Split at the separators that stand outside all brackets."""
    pieces, depth, start = [], 0, 0
    for match in re.finditer(r"\\cup(?![A-Za-z])|[{(\[]|[})\]]|,", s):
        token = match[0]
        depth += (token in "{([") - (token in "})]")
        if token == separator and depth == 0:
            pieces.append(s[start : match.start()].strip())
            start = match.end()
    return [*pieces, s[start:].strip()]


def _closing(s: str) -> int:
    """Return the index of the bracket that closes the first one in `s`, or -1."""
    depth = 0
    for match in re.finditer(r"[{(\[]|[})\]]", s):
        depth += 1 if match[0] in "{([" else -1
        if depth == 0:
            return match.start()
    return -1


def _plus_minus(s: str) -> list[str]:
    r"""`3\pm2` -> [`3+2`, `3-2`]; anything else alone."""
    if s.count(r"\pm") != 1 or r"\mp" in s:
        return [s]
    return [re.sub(r"\\pm ?", sign, s).lstrip("+") for sign in "+-"]


def _named(s: str) -> tuple[str, str]:
    r"""`x=5` and `x\in5` -> ("x", "5"); `V=2+3=5` -> ("V", "5"); no plain name: ("", s)."""
    match = _NAME.match(s)
    return (match[1], s[match.end() :].rsplit("=", 1)[-1]) if match else ("", s)


def _plain(s: str) -> str:
    return s.replace('"', "").replace("%", "")


def _same_scalar(a: str, b: str) -> bool | None:
    """Compare two scalars as strings, numbers, words; None: needs algebra, and is safe for it."""
    (value_a, unit_a), (value_b, unit_b) = _unit(a), _unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    if _plain(value_a) == _plain(value_b) != "":
        return True
    number_a, number_b = _number(value_a), _number(value_b)
    if number_a is not None and number_b is not None:
        # The MATH benchmark drops percent signs; 0.5 and 50% are equal all the same.
        factor_a = Fraction(1, 100) if value_a.endswith("%") else 1
        factor_b = Fraction(1, 100) if value_b.endswith("%") else 1
        return number_a == number_b or number_a * factor_a == number_b * factor_b
    if _is_words(value_a) or _is_words(value_b):
        words_a, words_b = (re.sub(r'[".()\s]', "", s) for s in (value_a, value_b))
        if len(words_a) > 1 or '"' in value_a + value_b:  # but x is not X
            words_a, words_b = words_a.casefold(), words_b.casefold()
        return words_a == words_b != ""
    if _variables(value_a) != _variables(value_b) or not (_is_safe(value_a) and _is_safe(value_b)):
        return False
    return None


def _unit(s: str) -> tuple[str, str]:
    r"""`5 cm` -> ("5", "cm"); a unit that is no measure (`5 edges`) is dropped: ("5", "")."""
    match = _UNIT.fullmatch(s)
    if not match or not re.search(r"[0-9}]", match["value"]):
        return s, ""
    word = (match["text"] or match["bare"] or "").strip(" .").lower()
    squared, cubed = re.subn(r"^(?:square|sq\.?) ?", "", word), re.subn(r"^cubic ?", "", word)
    power = match["power"] or ("2" if squared[1] else "3" if cubed[1] else "")
    known = _UNITS.get(squared[0] if squared[1] else cubed[0])
    if match["bare"] and not known and len(word) < 4:
        return s, ""
    return match["value"].strip(), f"{known}^{power}" if known else ""


def _number(s: str) -> Fraction | None:
    """Return the exact value of a plain number (also a/b, mixed, a.10^b, percent), else None."""
    match = _NUMBER.fullmatch(s.removesuffix("%")) if len(s) <= MAX_CHARS else None
    if not match:
        return None
    try:
        if match["c"]:
            value = Fraction(match["c"].rstrip(".")) / Fraction((match["d"] or "1").rstrip("."))
            value *= Fraction(10) ** int(match["e"] or 0)
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


def _variables(s: str) -> set[str]:
    """Letters that stand for variables; e and i are constants."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", s))) - {"e", "i"}


def _is_safe(s: str) -> bool:
    """Return whether sympy should be quick on `s`: known commands, small powers, no towers."""
    commands = re.findall(r"\\([A-Za-z]+)", s)
    functions = [c for c in commands if c in _FUNCTIONS]
    if (
        len(s) > 300
        or not re.fullmatch(r"[0-9A-Za-z+\-/^=<>().{}\[\]|! \\]*", s)
        or not _COMMANDS.issuperset(commands)
        or len(functions) > 4
        or _UNSAFE.search(s)
    ):
        return False
    depth = depth_max = 0
    for c in s:
        depth += (c in "{([") - (c in "})]")
        depth_max = max(depth_max, depth)
    powers = [(s[: m.start()], m[1]) for m in re.finditer(rf"\^({_GROUP}|[0-9])", s)]
    return depth == 0 and depth_max <= 12 and _powers_are_small(powers)


def _powers_are_small(powers: list[tuple[str, str]]) -> bool:
    """Bound what expanding could cost: numeric exponents, and products of those on brackets."""
    product = 1
    for before, exponent in powers:
        if exponent.count("^") > 1 or ("^" in exponent and not _variables(exponent)):
            return False
        size = 1
        for digits in re.findall(r"[0-9]+", exponent):
            size *= int(digits[:9]) or 1
        if size > (10_000 if before[-1:].isdigit() else 100):
            return False
        if not before[-1:].isalnum():
            product *= size
    return product <= 200


def _read_number(_: object, text: str) -> object:
    """Return the exact sympy number of `1,000`, `0.5` or `1e9`; the first argument is a parser."""
    import sympy

    value = Fraction(text.replace(",", ""))
    return sympy.Rational(value.numerator, value.denominator)


def _verify(answer: str, gold: str) -> bool:
    """math-verify on two scalars, with its LaTeX reader alone and its time limits off."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no limit
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from math_verify import LatexExtractionConfig, parse, verify

    _Latex2Sympy.parse_number = _read_number  # theirs ends in eval(text)
    reader = [LatexExtractionConfig(boxed_match_priority=-1)]
    read_gold, read_answer = (
        parse(
            f"${_plain(_unit(s)[0])}$", reader, fallback_mode="no_fallback", parsing_timeout=None,
            raise_on_error=True,
        )
        for s in (gold, answer)
    )  # fmt: skip
    # By default floats (numbers in the answer are none, but f(3) may become one) have 6 decimals.
    return bool(read_gold and read_answer) and verify(
        read_gold, read_answer, float_rounding=12, timeout_seconds=None, raise_on_error=True
    )
