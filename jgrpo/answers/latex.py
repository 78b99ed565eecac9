r"""LaTeX answers as text: one spelling for each (as the MATH benchmark does it: Hendrycks et al.,
2021), and their shape (tuple, interval, set, list, union, matrix) taken apart into scalars."""

import re
import unicodedata

from jgrpo.answers.units import with_rate

MAX_CHARS = 1000
"""Longer answers are compared as they stand, without normalisation."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_UNICODE = str.maketrans(
    {
        "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{NO-BREAK SPACE}": " ", '"': "",
        "\N{MULTIPLICATION SIGN}": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/",
        "π": r"\pi ", "√": r"\sqrt ", "\N{UNION}": r"\cup ", "∞": r"\infty ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∈": r"\in ", "∅": r"\{\}",
        "…": r"\ldots ", "°": r"^\circ ",
        **{c: rf"\frac{{{n}}}{{{d}}}" for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
           for n, d in [unicodedata.normalize("NFKC", c).split("\N{FRACTION SLASH}")]},
    }
)  # fmt: skip
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_DEGREES = r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])"
_FONT = re.compile(
    r"\\(?P<math>boldsymbol|bm|pmb|underline)?(?(math)|(?:emph|math(?:rm|bf|it|sf|tt|normal)"
    rf"|text(?:bf|it|rm|sf|tt)?)) ?(?P<inside>{GROUP})"
)
_TO_QUOTES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\*\*((?:(?!\*\*).)+)\*\*|^`([^`]*)`$", r"\1\2"),  # Markdown
        (r"\\(?:text)?color(?:box)? ?\{[^{}]*\}", ""),
        (r"\\(?:bf|it|rm|sf|tt|small|large|Large|LARGE|huge|Huge)(?![A-Za-z])", ""),
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
    )
)
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"(?:{_DEGREES}) ?, ?(?=[0-9])", ",~"),  # this comma separates, as those below
        (_DEGREES, ""),
        (r'" ?,? ?(?:and|or) ?"|(?<=[^A-Za-z"]) (?:and|or) ', ",~"),
        (r'"([^"]*,[^"]*)"', r"\1"),
        (r", ?,", ","),
        (r"\\%| ?\b[pP]ercent\b", "%"),
        (r"(?<![A-Za-z\\])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"\\sqrt ?([0-9A-Za-z]|\\pi)", r"\\sqrt{\1}"),
        (r"\\frac ?([0-9A-Za-z]|\\pi)", r"\\frac{\1}"),
        (rf"\\frac({GROUP}) ?([0-9A-Za-z]|\\pi)", r"\\frac\1{\2}"),
        (r"\\(?:emptyset|varnothing)(?![A-Za-z])", r"\\{\\}"),
        (r"\\mathbb ?(?:\{R\}|R)", r"(-\\infty,\\infty)"),
        (r"(\\log ?_ ?(?:[0-9A-Za-z]|\{[^{}]*\})) +(?=[0-9])", r"\1"),
        (r"\\times(?![A-Za-z])|\*", r"\\cdot "),
        (
            r"^\\\{ ?[A-Za-z] ?(?::|\||\\(?:mid|vert|colon)(?![A-Za-z])) ?(.+)\\\}$",
            r"\1",
        ),  # the set of all x with ...
        (r"\\bigcup(?![A-Za-z])", r"\\cup "),
        (r"\\(?:[lc]?dots[cbm]?)(?![A-Za-z])|\.\.\.", r"\\ldots "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\not ?=|\\neq?(?![A-Za-z])", r"\\ne "),
        (r"\\le(?:q|qslant)?(?![A-Za-z])", r"\\le "),
        (r"\\ge(?:q|qslant)?(?![A-Za-z])", r"\\ge "),
        # `6 3/4` is a mixed number; without its space it would be 63/4.
        (r"(?<![0-9.] )(?<![0-9.])([0-9]+) +([0-9]+) ?/ ?([0-9]+)", r"\1\\frac{\2}{\3}"),
        (r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<=[0-9]), (?=[1-9][0-9]{2}(?![0-9]))", ",~"),  # `70, 110` is two numbers
        (r"(?<=[0-9]) (?=[0-9])", "~"),  # `1 2` is not 12
        (r'(\\[A-Za-z]+) +(?=[A-Za-z])|(?<![A-Za-z]) +| +(?![A-Za-z])|(?<=") +', r"\1 "),
        (r"([\^_])\{([0-9A-Za-z])\}", r"\1\2"),
        (r"(?<![0-9])\.(?=[0-9])", "0."),
    )
)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_KEPT_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z]))| +")

_NAME = re.compile(
    r"((?:m?\\angle ?)?[A-Za-z](?:[A-Z]{1,2})?'?(?:_(?:\{\w+\}|\w))?"
    r"(?:\([a-z](?:,[a-z])*\)|\([^()=<>]{1,30}\))?"
    r"|\|[A-Z]{1,3}\||\[[A-Z]{3,5}\]|\\(?:overline|overrightarrow) ?\{?[A-Z]{2}\}?"
    r'|\\(?:angle|triangle) ?[A-Z]{1,3}|\\[a-z]+|"[^"]*"|\([a-z](?:,[a-z])+\))'
    r"(?:=|\\in(?![a-z])) ?"
)
_MATRIX = re.compile(r"\\begin\{([pbBvV]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)


def normalize(answer: str) -> str:
    r"""Return `answer` with one spelling for what MATH's graders take as one answer.

    \dfrac \frac12 \sqrt2 .5 10,\!000 90^\circ \$5 \left( x^{2} and spaces; \text{east} becomes
    "east" (in quotes) and percent stays as %: whether they count depends on where they stand.
    Trap: `1,000` stays as it is, for it may be a list. Longer than MAX_CHARS: only stripped.
    """
    if len(answer) > MAX_CHARS:
        return answer.strip()
    text = answer if answer.isascii() else "".join(map(_ascii, answer))
    text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = _semicolons(text.translate(_UNICODE))
    for pattern, replacement in _TO_QUOTES:
        text = _FONT.sub(_without_font, pattern.sub(replacement, text))
    text = with_rate(text.strip())
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _KEPT_SPACE.sub(lambda match: match[1] or "", text).strip(" \n")
    text = re.sub(r"[.,;:]+$", "", re.sub(r"^(?:=(?!=)|\++)", "", text))
    while text.startswith("{") and closing(text) == len(text) - 1:
        text = text[1:-1]
    return text


def _ascii(c: str) -> str:
    """A full-width character, or one of Unicode's own fonts, as the plain one that it is."""
    known = unicodedata.decomposition(c).startswith(("<wide>", "<font>"))
    return unicodedata.normalize("NFKC", c) if known else c


def _without_font(match: re.Match[str]) -> str:
    """What is set in a font, if that is more than text: text may be a unit."""
    inside = match["inside"][1:-1]
    return inside if match["math"] or re.search(r"[{}]|\\[A-Za-z]", inside) else match[0]


def _semicolons(text: str) -> str:
    """`(3; 4)` as (3,4), and `(3,5; 4)` as (3.5,4): a comma beside a semicolon, in the same
    brackets, is a decimal point or parts thousands."""
    ends = text.rstrip(" .;:,")
    places = [m.start() for m in re.finditer(r"(?<!\\);", ends)]
    if not places:
        return text
    open_at = lambda place: depths(ends[:place])[0]  # noqa: E731
    deep = {open_at(place) for place in places}
    pieces = list(ends)
    for m in re.finditer(r"(?<=[0-9]),(?=[0-9]+)", ends):
        if open_at(m.start()) in deep:
            thousands = re.match(r",[0-9]{3}(?![0-9])", ends[m.start() :])
            pieces[m.start()] = "" if thousands else "."
    for place in places:
        pieces[place] = ", "
    return "".join(pieces)


def parts(s: str) -> tuple[str, list[str]]:
    """Return (kind, parts): "set" (also a bare list), "union", brackets, "matrix"; scalar: ""."""
    elements = split(s, ",")
    expanded = [e for element in elements for e in plus_minus(element)]
    if len(expanded) > 1:
        return "set", expanded
    if len(sets := split(s, r"\cup")) > 1:
        return "union", sets
    if matrix := _MATRIX.fullmatch(s):
        rows = [row.split("&") for row in matrix[2].strip("\n").split("\n")]
        kind = "determinant" if matrix[1] in ("v", "V") else "matrix"
        return f"{kind} {[len(row) for row in rows]}", [cell for row in rows for cell in row]
    if s.startswith(r"\{") and s.endswith(r"\}") and closing(s) == len(s) - 1:
        inside = split(s[2:-2], ",")
        return parts(inside[0]) if len(inside) == 1 and inside[0] else ("set", inside)
    if s[0] in "([" and closing(s) == len(s) - 1:
        inside = split(s[1:-1], ",")
        if len(inside) > 1:
            return s[0] + s[-1], inside
        if s[0] + s[-1] == "()":
            return parts(inside[0]) if inside[0] else ("", [s])
    return "", [s]


def split(s: str, separator: str) -> list[str]:
    """Split at the separators that stand outside all brackets."""
    pieces, depth, start = [], 0, 0
    for match in re.finditer(r"\\cup(?![A-Za-z])|[{(\[]|[})\]]|,", s):
        token = match[0]
        depth += (token in "{([") - (token in "})]")
        if token == separator and depth == 0:
            pieces.append(s[start : match.start()].strip(" ~"))
            start = match.end()
    return [*pieces, s[start:].strip(" ~")]


def depths(s: str) -> tuple[int, int]:
    """Return how many brackets are left open at the end, and how many are at most."""
    n_open = n_most = 0
    for match in re.finditer(r"[{(\[]|[})\]]", s):
        n_open += 1 if match[0] in "{([" else -1
        n_most = max(n_most, n_open)
    return n_open, n_most


def closing(s: str) -> int:
    """Return the index of the bracket that closes the first one in `s`, or -1."""
    depth = 0
    for match in re.finditer(r"[{(\[]|[})\]]", s):
        depth += 1 if match[0] in "{([" else -1
        if depth == 0:
            return match.start()
    return -1


def plus_minus(s: str) -> list[str]:
    r"""`3\pm2` -> [`3+2`, `3-2`]; anything else alone."""
    if s.count(r"\pm") != 1 or r"\mp" in s:
        return [s]
    return [re.sub(r"\\pm ?", sign, s).lstrip("+") for sign in "+-"]


def named(s: str) -> tuple[str, str]:
    r"""`x=5` and `x\in5` -> ("x", "5"); `V=2+3=5` -> ("V", "5"); no plain name: ("", s)."""
    match = _NAME.match(s)
    return (match[1], s[match.end() :].rsplit("=", 1)[-1]) if match else ("", s)
