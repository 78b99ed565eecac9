r"""Answers, the gold that each is compared with, and why a mathematician would (not) take the one
for the other; answers that are made to break a grader; and rewrites that change no value."""

import re
from collections.abc import Iterator

SAME = [
    (r"\dfrac12", r"\frac{1}{2}", "fraction spellings"),
    (r"\tfrac 9{20}", r"\frac9{20}", "fraction spellings"),
    ("0.5", r"\frac12", "decimal and fraction"),
    ("1/2", "0.50", "decimal and fraction"),
    (".5", "0.5", "leading zero"),
    ("007", "7", "leading zeros"),
    ("1,000", "1000", "thousands"),
    (r"10\!,000", r"10,\!000", "thousands"),
    (r"10{,}000", "10 000", "thousands"),
    ("1000000", r"1,\! 000,\! 000", "thousands"),
    ("5 cm", "5", "a unit left out"),
    ("5", r"5\text{ cm}", "a unit left out"),
    (r"5\mathrm{cm}^2", r"5 \text{ square centimeters}", "one unit, two names"),
    ("65", r"65 \text{ children tickets }", "a unit in words"),
    ("5 million dollars", r"\$5,000,000", "a scale in words"),
    (r"2.5\text{ million}", "2500 thousand", "two scales"),
    ("26 dozen eggs", "312", "a dozen is 12"),
    ("26", "26 dozen", "how many dozen? it is left out like a unit"),
    ("5 hundredths", "0.05", "a scale below one"),
    ("3 millionaires", "3", "which are no millions"),
    ("x=5", "5", "the name left out"),
    ("V = 2+3 = 5", "5", "a chain ends in the value"),
    ("2x+3", "y = 2x + 3", "the name left out"),
    (r"k \in [46,\infty)", r"[46, \infty)", "the name left out"),
    (r"50\%", "50", "MATH drops percent signs"),
    (r"50\%", "0.5", "which is what percent means"),
    (r"90^\circ", "90", "degrees"),
    ("90", r"90^{\circ}", "degrees"),
    ("$5", r"\$5.00", "dollars"),
    ("-0.5", r"-\$0.50", "dollars"),
    ("2, 1", "1,2", "a list has no order"),
    (r"\{2,1\}", r"\left\{1,2\right\}", "nor has a set"),
    (r"(12,102)\cup(2,12)", r"(2,12) \cup (12,102)", "nor has a union"),
    (r"\left( 1, \frac12 \right)", "(1,0.5)", "a tuple by its elements"),
    (r"3\pm2\sqrt2", r"3-2\sqrt{2}, 3+2\sqrt{2}", "plus-minus is two"),
    ("7,-2,-5", r"7, -2, \text{ and } -5", "and is a comma"),
    (r"x=2 \text{ or } x=3", "2,3", "or is a comma"),
    (r"27^\circ or 63^\circ", r"27^\circ, 63^\circ", "after degrees as well"),
    ("x=1, y=2", "y=2, x=1", "named values in another order"),
    (r"\begin{bmatrix}1\\0.5\end{bmatrix}", r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}", "cells"),
    (r"6\frac{3}{4}", r"\frac{27}{4}", "mixed number"),
    ("6 3/4", "6.75", "mixed number"),
    ("(A)", r"\text{A}", "a choice"),
    (r"\textbf{(E)}", r"(\text{E})", "a choice"),
    ("east", r"\text{East}", "words"),
    ("4:30 PM", r"\text{4:30 p.m.}", "words"),
    ("A, F, C", r"\text{A,C,F}", "a list of choices"),
    ("5.", "5", "a full stop"),
    ("\N{MINUS SIGN} 5", "-5", "a Unicode minus"),
    (r"1112112_{3}", "1112112_3", "a base"),
    (r"1.5\times10^{3}", "1500", "a power of ten"),
    (r"0.\overline{3}", r"\frac13", "a period"),
    (r"2.1\bar6", r"\frac{13}{6}", "a period after other places"),
    ("70, 110", "70,110", "a list, with or without a space"),
    ("10, 000", "10,000", "no list: it would not have 000 for 0"),
    (r"5\text{ square units}", r"5\text{ units}^2", "a power of a unit, two ways"),
    (r"5\text{ square units}", "5", "MATH drops units"),
    (r"5\text{ square units}", r"5\text{ cm}^2", "a unit without a name"),
    (r"\varnothing", r"\{\}", "the empty set"),
    (r"x\in\mathbb{R}", r"(-\infty, \infty)", "all real numbers"),
    (r"(\dfrac{3}{4})", "0.75", "in brackets"),
    ("$2$", "2", "a formula's own marks"),
    (r"\mathbf{7}", "7", "a font"),
    # What the text cannot tell, decided as MATH's graders do:
    ("5 cm", "5", "a unit that the gold has not: the problem may have named it"),
    ("5", "5 cm", "a unit that the answer has not: the problem has named it"),
    (r"5\text{ apples}", r"5\text{ edges}", "words after a number are not compared"),
    ("58500", "58,500", "one group of three is a number: MATH has but one list so"),
    (
        "70110",
        "70,110",
        "which is this list, written without a space",
    ),
]
SAME_BY_ALGEBRA = [
    (r"\frac{3}{2\sqrt3}", r"\frac{\sqrt3}{2}", "a root in the denominator"),
    ("(x+1)^2", "x^2+2x+1", "expanded"),
    (r"\sqrt{4}", "2", "a root that is a number"),
    ("5+3i", "3i+5", "order of a sum"),
    ("x^2+y^2-13=0", "x^2 + y^2 = 13", "an equation by its two sides"),
    ("7x(x-2)(x-1)", "7x(x-1)(x-2)", "order of factors"),
    ("(1,\\sqrt{9})", "(1,3)", "inside a tuple"),
    ("2*3", "6", "an unfinished product"),
    ("2(3)", "6", "the same (latex2sympy: the mixed number 2 + 3)"),
    (r"3(\frac12)", "1.5", "a product with a fraction in brackets"),
    (r"2\frac13+\pi", r"\frac73+\pi", "a mixed number in a sum"),
    (r"\log_2 8", "3", "a logarithm to a base"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}", "a change of base"),
]
DIFFERENT = [
    ("1", "10", "a prefix"),
    ("2", "-2", "the sign"),
    ("1 2", "12", "two numbers"),
    ("63/4", r"6\frac34", "63/4 is 6 3/4 only without its space"),
    ("(1,2)", "[1,2]", "open and closed"),
    ("[0,1)", "[0,1]", "open and closed"),
    ("(1,2)", "1,2", "a point and a list (math-verify: the same)"),
    ("(2,1)", "(1,2)", "a point has an order"),
    ("(1,2,3)", "(1,2)", "one more"),
    ("1,1,2", "1,2,2", "how often"),
    ("115,00", "115,000", "a digit lost in the thousands"),
    ("", "5", "nothing"),
    ("5 million", "5 thousand", "other scales"),
    (r"5\text{ billion}", "5 million dollars", "other scales"),
    ("5 weeks", r"5\text{ years}", "other units"),
    ("", "", "nothing is no answer, whatever the gold"),
    ("{}", "5", "nothing"),
    ("west", r"\text{east}", "words"),
    ("seat", r"\text{east}", "as products of letters these are equal"),
    ("ACF", "A,C,F", "a word and a list"),
    ("B", "A", "choices"),
    ("X", "x", "two variables"),
    ("y=4", "x=4", "another unknown"),
    ("x=1,y=2", "2,1", "which is which"),
    ("x+1=5", "5", "an equation is not its right side"),
    ("5x", "5", "a variable more"),
    (r"5\text{ m}", r"5\text{ cm}", "another unit"),
    ("0.333333", r"\frac13", "an approximation"),
    ("52", "52_8", "another base"),
    (r"\frac10", "1", "no number"),
    ("x>3", "x<3", "direction"),
    (r"x\ge3", "x>3", "strictness"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", "row, column"),
    ("4:30", "4", "a time"),
    ("None", "5", "a word"),
    (r"\infty", "5", "infinity"),
    ("70110", "70, 110", "two numbers, when there is a space"),
    ("70110", r"70^\circ,110^\circ", "two numbers, when both have degrees"),
    ("70110", r"70\text{ and }110", "and is a comma between two"),
    (r"5\text{ units}^2", r"5\text{ units}", "an area and a length"),
    (r"5\text{}^2", "5", "this looks like a square"),
    (r"5\text{ units}^2", r"5\text{ units}^3", "another power of a unit that is not known"),
    (r"5\text{ cubic units}", r"5\text{ square units}", "the same in words"),
    ("5 cm", r"5\text{ square cm}", "a length and an area"),
    (r"0.\overline{3}", "0.3", "a period is not its first digit"),
    (r"1\overline{2}", "12", "no decimal"),
    ("x_1", "x_2", "indices"),
    (r"\mathbb{R}", r"[0,\infty)", "half of the line"),
]
DIFFERENT_BY_ALGEBRA = [
    ("2(3)", "5", "a product is no sum (math-verify: the same)"),
    ("(2)(1)-(1)", "1+1", "nor is it one between brackets"),
    (r"\frac{\sqrt3}{2}", r"\frac{\sqrt2}{2}", "another root"),
    ("4-3a", "4a-3", "other coefficients"),
    ("1.414214", r"\sqrt2", "an approximation (math-verify: the same to 6 decimals)"),
    (r"2^{2004}", r"2^{2005}", "a power"),
    ("9!", "9", "a factorial"),
    (r"\frac{1}{2^{2004}}", r"\frac{1}{2^{2005}}", "small numbers (math-verify: both are 0)"),
    (r"\sqrt2+10^{-20}", r"\sqrt2", "a small difference (math-verify: the same)"),
    (r"\sqrt2+10^{-100}", r"\sqrt2", "however small"),
    (r"x+10^{-20}", "x", "the same with a variable"),
    (r"\frac{1}{3^{40}\sqrt2}", r"\frac{1}{3^{41}\sqrt2}", "a third (math-verify: the same)"),
    (r"\log_2 3", r"\log_3 2", "base and argument"),
    (r"\sqrt{x^2}", "x", "false for negative x"),
]
# Each is wrong whatever the gold, and decided or given up on within the time limit.
HOSTILE = [
    # towers, and whatever else sympy would compute without end
    "9^{9^{9^9}}", "9^9^9^9", "10^{10^{10}}", "2^{100000000}", "(9^{99})^{99}", "x^{9^{9^9}}",
    "9^{99\\cdot99\\cdot99}", "1e999999999+1", "x+1e99999", "1e999999999", "e^{e^{e^{9}}}",
    "(((9!)!)!)!", "99999999!", "9!!", "((x+1)^{9})^{99}", "x^{99999}", "(1+x)^{100}(1-x)^{100}",
    r"\binom{10000000}{5000000}", r"\binom{\binom{99}{9}}{9}", r"\sqrt[99999]{2}", "2^{-99999999}",
    r"\sum_{i=1}^{10^9} i", r"\prod_{i=1}^{10^9} i", r"\int_0^1 e^{x^2} dx", r"\lim_{x\to0} x",
    r"\exp(\exp(\exp(9)))", r"\sin(\cos(\tan(\sin(\cos(x)))))", "0." + "0" * 38 + "1^{9999}",
    # size and depth
    "{" * 100_000 + "}" * 100_000, "{" * 100_000, "9" * 3_000_000, "0." + "3" * 3_000_000,
    "1," * 499,
    "[(" * 400, "(" * 490 + "1" + ")" * 490, r"\frac{" * 300, r"\frac{1}{" * 99 + "2" + "}" * 99,
    r"\frac{1}{" * 20_000 + "2" + "}" * 20_000, r"\sqrt" * 199, r"\pm" * 100, "^" * 900, "=" * 800,
    " " * 5_000_000, r"\boxed{" * 100_000, "\\" * 1_000_000, "x=" * 499 + "1", "-" * 999 + "1",
    # characters
    "\ud800", "5\ud800", "\x00", "5\x00", "\x00\x1b\x07", "\x1b[2J\x1b[31m", "\x1b]0;title\x07",
    "5\x1b[1A", "\x9b31m", "\u202e5", "5\u200f", "5\u200b", "\ufeff5", "x\n\n+1", '"', "\\", "\r",
    "\N{ARABIC-INDIC DIGIT FIVE}", "\N{FULLWIDTH DIGIT FIVE}", "\N{SUPERSCRIPT FIVE}",
    "\N{VULGAR FRACTION ONE HALF}", "\N{ROMAN NUMERAL FIVE}", "\N{CIRCLED DIGIT FIVE}",
    # programs
    "__import__('os').system('false')", "__import__('os')", "x.__class__", "exec('1')", "lambda: 5",
    "().__class__.__bases__[0]", "eval('5')", "{{5}}{% raw %}", "$(false)", "%s%n", r"\input{/x}",
    r"\immediate\write18{false}", r"\def\x{\x\x}\x", r"\csname x\endcsname", r"\catcode`\{=13",
    # nothing, no number, not closed
    "()", r"\{\}", "1/0", r"\frac{0}{0}", r"\frac{5}{0}", "nan", "inf", "None", "True", "null",
    "\\begin{matrix}", r"\begin{pmatrix}1", r"\left(5", r"5\right)", "5)", "(5", r"\frac{5}",
    r"\frac", r"\sqrt", "^", "_", "+", "-", "=", "5=", "=5=", "5+", "*5",
]  # fmt: skip


def rewrites(gold: str) -> Iterator[str]:
    """Yield `gold` as a model might write it; each is as right as `gold` itself."""
    yield from (gold, f" {gold} ", f"${gold}$", rf"\({gold}\)", f"{gold}.")
    yield rf"\displaystyle {gold}"
    for frac in ("dfrac", "tfrac", "frac"):
        yield re.sub(r"\\[dt]?frac(?![a-z])", rf"\\{frac}", gold)
    yield re.sub(r"\\frac\{([0-9])\}\{([0-9])\}", r"\\frac\1\2", gold)
    yield re.sub(r"\\([dt]?)frac ?([0-9]) ?([0-9])", r"\\\1frac{\2}{\3}", gold)
    yield re.sub(r"\\sqrt ?([0-9])", r"\\sqrt{\1}", gold)
    yield re.sub(r"\\sqrt\{([0-9])\}", r"\\sqrt\1", gold)
    yield re.sub(r"\\left|\\right", "", gold)
    yield re.sub(r"\^\{?\\circ\}?", "", gold)
    yield re.sub(r"\\text\{ ?([a-zA-Z]+)\}", r"\\mathrm{\1}", gold)
    yield re.sub(r"\\text\{([^{}]*)\}", r"\\textbf{\1}", gold)
    yield re.sub(r"(?<=[0-9}])\\[;,]? ?\\text\{[ a-z.]*\}(?:\^[23])?$", "", gold)
    yield re.sub(r",\\! ?|\{,\}", ",", gold)
    if r"\text" not in gold and not re.search(r"[0-9],[0-9]{3}|\\!|\{,\}", gold):
        yield re.sub(r"([-+=,])", r" \1 ", gold)
    if re.match(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]$", gold):
        yield re.sub(r"^(.)(.*)(.)$", r"\\left\1 \2 \\right\3", gold)
        yield rf"x \in {gold}"
    if re.fullmatch(r"[^()\[\]{}]+(, [^()\[\]{}]+)+", gold) and r"\text" not in gold:
        elements = gold.split(", ")
        yield ", ".join(reversed(elements))
        yield r"\{" + ",".join(elements) + r"\}"
        yield r"\text{ and }".join(elements)
        if any(c.isdigit() for c in gold):  # no choices: `B, C`
            yield " or ".join(f"x={element}" for element in elements)
    if r"\cup" in gold:
        yield r" \cup ".join(reversed(re.split(r" ?\\cup ?", gold)))
    if value := re.fullmatch(r"(-?)(?:([0-9]+)|\\[dt]?frac\{?([0-9]+?)\}?\{?([0-9]+)\}?)", gold):
        sign, n, d = value[1], int(value[2] or value[3]), int(value[4] or 1)
        yield from (f"x = {gold}", rf"\boxed{{{gold}}}", rf"\frac{{{sign}{3 * n}}}{{{3 * d}}}")
        yield f"{sign}{n}/{d}"
        if d == 1:
            yield from (f"{sign}{n:,}", f"{sign}{n}.00", rf"{gold}\text{{ cm}}", rf"{sign}\${n}")
        elif 10**6 * n % d == 0:
            yield sign + f"{n * 10**6 // d / 10**6:f}".rstrip("0")
