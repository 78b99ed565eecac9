r"""LaTeX answers as text: one spelling for each (as the MATH benchmark does it: Hendrycks et al.,
2021), and their shape (tuple, interval, set, list, union, matrix) taken apart into scalars."""

import re

MAX_CHARS = 1000
"""Longer answers are compared as they stand, without normalisation."""

_UNICODE = str.maketrans(
    {
        "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{NO-BREAK SPACE}": " ", '"': "",
        "\N{MULTIPLICATION SIGN}": r"\cdot ", "·": r"\cdot ", "π": r"\pi ", "√": r"\sqrt ",
        "\N{UNION}": r"\cup ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "°": r"^\circ ",
        "²": "^2", "³": "^3",
    }
)  # fmt: skip
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_DEGREES = r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])"
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
_KEPT_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z]))| +")

_NAME = re.compile(
    r"((?:m?\\angle ?)?[A-Za-z](?:[A-Z]{1,2})?'?(?:_(?:\{\w+\}|\w))?(?:\([a-z](?:,[a-z])*\))?"
    r'|\\[a-z]+|"[^"]*"|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-z])) ?'
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
    text = answer.translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _KEPT_SPACE.sub(lambda match: match[1] or "", text).strip(" \n")
    text = re.sub(r"[.,;:]+$", "", text.lstrip("+"))
    while text.startswith("{") and closing(text) == len(text) - 1:
        text = text[1:-1]
    return text


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
