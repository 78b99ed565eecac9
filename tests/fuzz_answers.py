r"""Answers made to break the grader, and answers whose value is known (see fuzz.py)."""

import json
import time
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import mpmath
from hypothesis import strategies as st

from jgrpo.answers import equal as answers
from jgrpo.answers.grader import Grader, Pair
from jgrpo.answers.latex import normalize

DATA = Path(__file__).parents[2] / "shared" / "data"
SOME_GOLDS = (
    r"\frac{1}{2}", r"3\sqrt{2}", "(-7, 3)", r"[46, \infty)", r"\{-1\} \cup [0,7)", "70,110",
    r"2 + \sqrt{6}, 2 - \sqrt{6}", r"\$16,\!386.16", r"5\text{ square centimeters}", "x^2+y^2=13",
    r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\text{B, E, G}", r"52_8", r"27^\circ, 63^\circ",
    r"6\frac{3}{4}", r"1.5 \times 10^{3}", r"3 \pm 2\sqrt2", r"50\%", "4:30", r"x \in [0,1)",
)  # fmt: skip


def real_golds() -> list[str]:
    """The answers of the shared data, or the few above where it is absent."""
    found: list[str | None] = list(SOME_GOLDS)
    for file in sorted(DATA.glob("*.jsonl")):
        rows = map(json.loads, file.read_text("utf-8").splitlines())
        found += [
            answers.last_boxed(r["solution"]) if "solution" in r else r["answer"].split("#### ")[1]
            for r in rows
        ]
    return sorted({gold for gold in found if gold})


# -- text ----------------------------------------------------------------------------------------

TOKENS = (
    *"0123456789xyabei+-*/^_=()[]{}|,.;:!%$&~'\" \n\t\\", "10", "000", "1,000", "0.5", "\\frac",
    "\\dfrac", "\\sqrt", "\\boxed{", "\\boxed ", "\\fbox{", "\\text{", "\\text{ cm}", "\\mathrm{",
    "\\left", "\\right", "\\{", "\\}", "\\pi", "\\pm", "\\cup", "\\infty", "\\le", "\\times",
    "\\cdot", "\\circ", "^\\circ", "\\%", "\\$", "\\!", "\\,", "\\\\", "\\begin{pmatrix}",
    "\\end{pmatrix}", "\\binom", "\\overline{", "\\sin", "\\log_", "x=", "x\\in", " and ", " or ",
    "cm", "square ", "9^{9^{9^9}}", "9!", "__import__('os')", "\x00", "\x1b[2J", "\x85", "\u2028",
    "\u202e", "\ud800", "\N{MINUS SIGN}", "\N{ARABIC-INDIC DIGIT THREE}", "\N{SUPERSCRIPT TWO}",
    "\N{FULLWIDTH DIGIT FIVE}", "\N{VULGAR FRACTION ONE HALF}", "\N{GREEK SMALL LETTER PI}",
    "{" * 50, "}" * 50, "9" * 50, "\\frac{" * 20,
)  # fmt: skip
FRAMES = (
    r"\frac{%s}{%s}", r"\dfrac%s%s", r"\sqrt{%s}%s", r"\sqrt[%s]{%s}", "%s^{%s}", "%s^%s",
    "%s_{%s}", "(%s,%s)", "[%s, %s)", r"\{%s,%s\}", r"\left( %s \right)%s", "%s,%s", "%s, %s",
    r"%s\cup%s", "%s+%s", "%s-%s", "%s=%s", r"%s\cdot %s", r"\text{%s}%s", r"%s\text{ %s}",
    r"\boxed{%s}%s", r"%s\\%s", r"%s\pm %s", r"\binom{%s}{%s}", "%s %s", "{%s}%s", "$%s$%s",
    r"\log_{%s}{%s}",
)  # fmt: skip

tokens = st.lists(st.sampled_from(TOKENS), max_size=12).map("".join)
latex = st.recursive(
    st.sampled_from(
        ("0", "1", "2", "12", "-3", "0.5", "1000", "x", "y", "e", "i", r"\pi", "", "cm")
    ),
    lambda inner: st.builds(
        lambda frame, a, b: (frame % (a, b))[:2000], st.sampled_from(FRAMES), inner, inner
    ),
    max_leaves=8,
)


def mutated(text: str, edits: list[tuple[int, int, str]]) -> str:
    """Each edit replaces some characters at a place by others."""
    for place, n_removed, new in edits:
        at = place % (len(text) + 1)
        text = text[:at] + new + text[at + n_removed :]
    return text


def edits(new: st.SearchStrategy[str], largest: int = 4) -> st.SearchStrategy[list]:
    one = st.tuples(st.integers(0, 2000), st.integers(0, 4), new)
    return st.lists(one, max_size=largest)


golds = st.sampled_from(real_golds())
near_golds = st.builds(mutated, golds, edits(st.sampled_from(TOKENS)))
texts = st.one_of(near_golds, latex, tokens, st.text(max_size=30))


def boxes_are_found(text: str) -> None:
    inside = answers.last_boxed(text)
    assert inside is None or (inside in text and inside == inside.strip())
    assert answers.last_boxed(text + "\n\\boxed{ 4\\frac12 }") == r"4\frac12"


def verdicts_are_sane(pair: tuple[str, str]) -> None:
    """A verdict for any two texts, in the other order no other (but for a comma, which may be an
    answer's decimal point, and never the gold's), and nothing is never something."""
    a, b = pair
    started_s = time.monotonic()
    verdict = answers.quick_verdict(a, b)
    assert verdict in (True, False, None)
    if ("," in a) == ("," in b):
        assert {verdict, answers.quick_verdict(b, a)} != {True, False}
    assert answers.same_text(a, b) <= (verdict is True)
    something = bool(normalize(a).replace('"', "").replace("%", ""))
    assert answers.quick_verdict(a, a) is something
    assert something or verdict is False
    assert time.monotonic() - started_s < 10  # ms on a free core


# -- numbers and shapes, written from their values ------------------------------------------------

fractions = st.one_of(
    st.integers(-30, 30).map(Fraction),
    st.fractions(-30, 30, max_denominator=24),
    st.builds(Fraction, st.integers(-(10**7), 10**7), st.sampled_from((1, 2, 4, 5, 10, 100, 1000))),
)
CHANGES: tuple[Callable[[Fraction], Fraction], ...] = (
    lambda v: v, lambda v: v, lambda v: v, lambda v: -v, lambda v: v * 10, lambda v: v + 1,
    lambda v: v + Fraction(1, 1000), lambda v: 1 / v if v else v, lambda v: v / 1000,
    lambda v: Fraction(v.denominator * 10 + v.numerator),
)  # fmt: skip
neighbours = st.tuples(fractions, st.sampled_from(CHANGES)).map(lambda t: (t[0], t[1](t[0])))


def decimal(v: Fraction) -> str | None:
    """The finite decimal of a value that is not negative, if it has one of up to 6 places."""
    scaled = v * 10**6
    if scaled.denominator != 1:
        return None
    whole, rest = divmod(scaled.numerator, 10**6)
    return f"{whole}.{rest:06d}".rstrip("0").rstrip(".")


def repeating(v: Fraction) -> str | None:
    """The decimal of a value that is not negative with a bar over its period of up to 12 places."""
    whole, rest = divmod(v.numerator, v.denominator)
    digits, seen = "", {}
    while rest not in seen:
        seen[rest] = len(digits)
        digit, rest = divmod(rest * 10, v.denominator)
        digits += str(digit)
        if len(digits) > 12:
            return None
    return rf"{whole}.{digits[: seen[rest]]}\overline{{{digits[seen[rest] :]}}}"


AROUND = (
    "%s", "%s", "%s", "$%s$", r"\(%s\)", " %s ", "%s.", "{%s}", "x=%s", r"x \in %s", r"%s\,",
    r"\$%s", r"%s\text{ cm}", r"%s^\circ", r"\displaystyle %s", r"\left(%s\right)",
)  # fmt: skip


@st.composite
def number(draw: Any, v: Fraction, alone: bool = True) -> str:
    """One of the ways in which a model writes a number; `alone`: outside a list, where a comma may
    separate thousands and text may stand around it."""
    sign, n, d = "-" if v < 0 else "", abs(v.numerator), v.denominator
    k = draw(st.integers(1, 6))
    n_text = str(n * k)
    forms = [f"{n_text}/{d * k}", rf"\frac{{{n_text}}}{{{d * k}}}"]
    forms += [rf"\dfrac {{{n_text}}} {{{d * k}}}"]
    if len(n_text) == len(str(d * k)) == 1:
        forms += [rf"\tfrac{n_text}{d * k}", rf"\frac {n_text} {d * k}"]
    if n > d > 1:
        forms += [rf"{n // d}\frac{{{n % d}}}{{{d}}}", rf"{n // d} {n % d}/{d}"]
    if (point := decimal(abs(v))) is not None:
        forms += [point, point, point, f"{point}0" if "." in point else f"{point}.0"]
        forms += [rf"{point} \times 10^{{0}}", rf"{point}\cdot 10^0", point.lstrip("0") or "0"]
        if alone:
            forms += [f"0{point}"]  # but `0, 010` is no list
        if "." not in point and alone:
            forms += [f"{n:,}".replace(",", mark) for mark in (",", "{,}", r",\!", " ")]
    elif period := repeating(abs(v)):
        forms += [period, period.replace("overline", "bar")]
    text = draw(st.sampled_from(("", "", "+") if not sign else ("-", "- ", "\N{MINUS SIGN}")))
    text += draw(st.sampled_from(forms))
    if alone:
        frame = draw(st.sampled_from(AROUND))
        text = text if "(" in frame and "," in text else frame % text  # (1,000) is a point
    return text


two_numbers = neighbours.flatmap(
    lambda t: st.tuples(st.just(t), st.tuples(number(t[0]), number(t[1])))
)
percents = neighbours.flatmap(
    lambda t: st.tuples(st.just(t), st.tuples(number(t[0], False), number(t[1], False)))
)


def numbers_are_equal_iff_their_values_are(drawn: tuple) -> None:
    (v, w), (a, b) = drawn
    assert answers.quick_verdict(a, b) is (v == w)


def a_percent_is_the_number_or_its_hundredth(drawn: tuple) -> None:
    (v, w), (a, b) = drawn
    assert answers.quick_verdict(rf"{a}\%", rf"{b}\%") is (v == w)
    assert answers.quick_verdict(rf"{a}\%", b) is (w in (v, v / 100))


KINDS = {  # how a shape is written -> kind; of one kind, order aside for sets, are equal
    "%s": "set", r"\{%s\}": "set", r"\left\{ %s \right\}": "set", "x = %s": "set",
    "(%s)": "()", r"\left( %s \right)": "()", "(x,y)=(%s)": "()", "[%s]": "[]", r"[%s)": "[)",
    r"\left(%s\right]": "(]", r"\begin{pmatrix} %s \end{pmatrix}": "column",
    r"\begin{bmatrix}%s\end{bmatrix}": "row", r"\begin{pmatrix}%s\end{pmatrix}": "row",
}  # fmt: skip


@st.composite
def shapes(draw: Any) -> tuple[bool, str, str]:
    """Two shapes of two or three numbers -> are they the same, and how each is written."""
    values = draw(st.lists(st.integers(-9, 9).map(Fraction) | fractions, min_size=2, max_size=3))
    others = draw(st.sampled_from((values, values, values[::-1], values[:-1] + [values[0]])))
    written = []
    for elements in (values, others):
        frame, kind = draw(st.sampled_from(sorted(KINDS.items())))
        between = {"column": r" \\ ", "row": " & "}.get(kind) or draw(
            st.sampled_from((", ", " , "))
        )
        inside = between.join(draw(number(v, False)) for v in elements)
        written.append((kind, sorted(elements) if kind == "set" else elements, frame % inside))
    (kind_a, values_a, a), (kind_b, values_b, b) = written
    return kind_a == kind_b and values_a == values_b, a, b


def shapes_are_equal_iff_kind_and_values_are(drawn: tuple[bool, str, str]) -> None:
    same, a, b = drawn
    assert answers.quick_verdict(a, b) is same


# -- algebra, in the grader's processes -----------------------------------------------------------

POINTS = (mpmath.mpf("0.7319"), mpmath.mpf("-1.2057"), mpmath.mpf("2.4142"))
Value = Callable[[mpmath.mpf], mpmath.mpc]
Formula = tuple[str, Value]


def _joined(kind: str, a: Formula, b: Formula) -> Formula:
    (s, f), (t, g) = a, b
    return {
        "+": (f"{s}+{t}", lambda x: f(x) + g(x)),
        "swap": (f"{t}+{s}", lambda x: f(x) + g(x)),
        "-": (f"{s}-({t})", lambda x: f(x) - g(x)),
        "*": (rf"({s})({t})", lambda x: f(x) * g(x)),
        "cdot": (rf"({s})\cdot({t})", lambda x: f(x) * g(x)),
        "/": (rf"\frac{{{s}}}{{{t}}}", lambda x: f(x) / g(x)),
        "sqrt": (rf"\sqrt{{{s}}}", lambda x: mpmath.sqrt(f(x))),
        "^2": (rf"({s})^2", lambda x: f(x) ** 2),
        "^3": (rf"({s})^{{3}}", lambda x: f(x) ** 3),
    }[kind]


formulas = st.recursive(
    st.one_of(
        st.integers(1, 12).map(lambda n: (str(n), lambda x: mpmath.mpc(n))),
        st.just(("x", mpmath.mpc)),
        st.just((r"\pi", lambda x: mpmath.mpc(mpmath.pi))),
    ),
    lambda inner: st.builds(
        _joined,
        st.sampled_from(["+", "swap", "-", "*", "cdot", "/", "sqrt", "^2", "^3"]),
        inner,
        inner,
    ),
    max_leaves=5,
)
REWRITES: tuple[Callable[[Formula, Formula], Formula], ...] = (
    lambda a, b: a,
    lambda a, b: b,
    lambda a, b: _joined("swap", a, b),
    lambda a, b: _joined("+", b, a),
    lambda a, b: (f"{a[0]}+1", lambda x: a[1](x) + 1),
    lambda a, b: (f"-({a[0]})", lambda x: -a[1](x)),
    lambda a, b: (rf"2({a[0]})-({a[0]})", a[1]),
    lambda a, b: (rf"\frac{{3({a[0]})}}{{3}}", a[1]),
)
formula_pairs = st.builds(
    lambda a, b, f, g: (f(a, b), g(a, b)),
    formulas, formulas, st.sampled_from(REWRITES), st.sampled_from(REWRITES),
)  # fmt: skip
simple_pairs = st.builds(
    lambda p, q, c, f: ((p, q, c), f),
    st.fractions(-9, 9, max_denominator=6), st.fractions(-9, 9, max_denominator=6),
    st.sampled_from((2, 3, 5, 6, 7)), st.integers(0, 5),
)  # fmt: skip


@cache
def grader() -> Grader:
    """One for the whole process, with its two workers; a new one for each example would be hundreds
    of processes."""
    return Grader(max_workers=2, timeout_s=5.0)


def checked(a: str, b: str) -> str:
    return grader()._outcomes([Pair(a, b)])[Pair(a, b)]


def formulas_called_right_have_one_value(pair: tuple[Formula, Formula]) -> None:
    (a, f), (b, g) = pair
    if checked(a, b) != "right":
        return
    with mpmath.workdps(40):
        for x in POINTS:
            try:
                y, z = f(x), g(x)
            except ZeroDivisionError:
                continue
            assert abs(y - z) <= mpmath.mpf(10) ** -25 * (1 + abs(y)), (a, b, x)


def frac(a: object, b: object) -> str:
    return rf"\frac{{{a}}}{{{b}}}"


def surds_are_right_iff_equal(drawn: tuple) -> None:
    """p + q sqrt(c), and the same (or a neighbour) written in another way."""
    (p, q, c), way = drawn
    (a, b), (m, n) = p.as_integer_ratio(), q.as_integer_ratio()
    root = rf"\sqrt{{{c}}}"
    plain = f"{frac(a, b)}+{frac(m, n)}{root}"
    same, other = (
        (True, frac(f"{m}{root}", n) + f"+{a}/{b}"),
        (True, f"{a}/{b}+{m}" + frac(rf"\sqrt{{{4 * c}}}", 2 * n)),
        (True, frac(f"{a * n}+{m * b}{root}", b * n)),
        (q == 0, f"{frac(a, b)}+{frac(-m, n)}{root}"),
        (False, f"{plain}+{frac(1, 1000)}"),
        (False, f"{float(p) + float(q) * c**0.5 + 1e-9:.12f}"),
    )[way]
    assert checked(plain, other) == ("right" if same else "wrong"), (plain, other)


def any_pair_is_graded(pair: tuple[str, str]) -> None:
    assert checked(*pair) in ("right", "wrong", "error", "timeout")
