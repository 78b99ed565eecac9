r"""Are two scalars equal by algebra? math-verify decides, kept from evaluating text and from
running for ever.

sympy's `sympify` and `parse_expr` evaluate text as Python; math-verify calls them for its
`ExprExtractionConfig`, which is therefore never passed, and for the numbers in LaTeX, which are
therefore read here (`_read_number`). sympy is imported when it is first needed.
"""

import contextlib
import logging
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from jgrpo.answers.latex import GROUP
from jgrpo.answers.shape import depths

_UNSAFE = re.compile(  # long integers, factorials, 9^9^9, high roots, bases, binomials
    r"[0-9]{40}|[0-9]{3}!|[^0-9]!|!!|\^[^{]\^|\\sqrt\[[0-9]{3}|(?<!\\log)_"
    r"|[0-9][eE][-+]?[0-9]{3}|\\binom[^A-Za-z]*[0-9]{4}"
)
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "sec", "csc", "cot", "arcsin", "arccos", "arctan", "log", "ln")
)
_GREEK = frozenset(("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega"))
_COMMANDS = (
    _FUNCTIONS | _GREEK | {"frac", "sqrt", "pi", "cdot", "div", "infty", "le", "ge", "binom"}
)


class OutOfTime(BaseException):
    """No Exception, because sympy and math-verify swallow those."""


@contextlib.contextmanager
def deadline(limit_s: float) -> Iterator[None]:
    """Raise OutOfTime at the first Python call after `limit_s` of CPU time; in any thread, unlike a
    signal.

    Cannot interrupt one long operation inside C: `is_safe` keeps powers, the only such, small.
    """
    before = sys.getprofile()
    end_s = time.thread_time() + limit_s

    def check_clock(*_: object) -> None:
        if time.thread_time() > end_s:
            raise OutOfTime

    sys.setprofile(check_clock)
    try:
        yield
    finally:
        sys.setprofile(before)


def variables(s: str) -> set[str]:
    """Letters that stand for variables; e and i are constants."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", s))) - {"e", "i"}


def is_safe(s: str) -> bool:
    """Return whether sympy should be quick on `s`: known commands, small powers, no towers."""
    commands = re.findall(r"\\([A-Za-z]+)", s)
    functions = [c for c in commands if c in _FUNCTIONS]
    if (
        len(s) > 300
        or not re.fullmatch(r"[0-9A-Za-z+\-/^=<>().{}\[\]|! \\_]*", s)
        or not _COMMANDS.issuperset(commands)
        or len(functions) > 4
        or _UNSAFE.search(s)
    ):
        return False
    n_open, depth = depths(s)
    powers = [(s[: m.start()], m[1]) for m in re.finditer(rf"\^({GROUP}|[0-9])", s)]
    return n_open == 0 and depth <= 12 and _powers_are_small(powers)


def _powers_are_small(powers: list[tuple[str, str]]) -> bool:
    """Bound what expanding could cost: digits of numbers, and products of exponents on brackets."""
    product, n_digits_max = 1, 1
    for before, exponent in powers:
        if exponent.count("^") > 1 or ("^" in exponent and not variables(exponent)):
            return False
        size = 1
        for digits in re.findall(r"[0-9]+", exponent):
            size *= int(digits[:9]) or 1
        base = re.search(r"[0-9.]*$", before)
        n_digits = size * len(base[0]) if base else 0
        if n_digits > 10_000 or (not n_digits and size > 100):
            return False
        n_digits_max = max(n_digits_max, n_digits)
        if not before[-1:].isalnum():
            product *= size
    return product <= 200 and (product == 1 or product * n_digits_max <= 2000)


def _read_number(_: object, text: str) -> object:
    """Return the exact sympy number of `1,000`, `0.5` or `1e9`; the first argument is a parser."""
    import sympy

    value = Fraction(text.replace(",", ""))
    return sympy.Rational(value.numerator, value.denominator)


def _read_product(reader: Any, factors: Any, i: int = 0) -> Any:
    r"""Read factors that stand side by side, from the i-th on.

    latex2sympy takes any two numbers for a mixed one, `2(3)` for 2 + 3; here that is digits before
    a fraction alone: `2\frac13`.
    """
    texts = [factor.getText() for factor in factors[i : i + 2]]
    if len(texts) == 2 and not (texts[0].isdigit() and texts[1].startswith("\\frac")):
        first = reader.convert_postfix(factors[i])
        if getattr(first, "is_Integer", False):
            return reader.mul_flat(first, _read_product(reader, factors, i + 1))
    return _read_product.theirs(reader, factors, i)  # type: ignore[attr-defined]


def same_by_algebra(answer: str, gold: str) -> bool:
    """math-verify on two scalars, with its LaTeX reader alone and its time limits off."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no limit
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from math_verify import LatexExtractionConfig, parse, verify

    _Latex2Sympy.parse_number = _read_number  # theirs ends in eval(text)
    if _Latex2Sympy.convert_postfix_list is not _read_product:
        _read_product.theirs = _Latex2Sympy.convert_postfix_list  # type: ignore[attr-defined]
        _Latex2Sympy.convert_postfix_list = _read_product
    reader = [LatexExtractionConfig(boxed_match_priority=-1)]
    read_gold, read_answer = (
        parse(
            f"${s}$", reader, fallback_mode="no_fallback", parsing_timeout=None,
            raise_on_error=True,
        )
        for s in (gold, answer)
    )  # fmt: skip
    if not read_gold or not read_answer or _differ(read_gold[0], read_answer[0]):
        return False
    # By default floats (numbers in the answer are none, but f(3) may become one) have 6 decimals.
    return verify(
        read_gold, read_answer, float_rounding=12, timeout_seconds=None, raise_on_error=True
    )


def _differ(a: object, b: object) -> bool:
    """Whether two formulas certainly differ at a point where all variables are positive.

    math-verify takes any difference below 1e-15 for none, and is slow to find that there is one.
    """
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    letters = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {x: sympy.Rational(7319 + 1009 * i, 10_000) for i, x in enumerate(letters)}
    try:
        difference = (a - b).subs(point)
        if difference.has(sympy.Float):
            return False  # rounded already
        parts = difference.evalf(15, maxn=200).as_real_imag()
    except Exception:  # what has no value here is for math-verify to judge
        return False
    # A precision of one bit: sympy is not sure that it is not 0.
    return any(x.is_Float and x._prec > 1 and x != 0 for x in parts)
