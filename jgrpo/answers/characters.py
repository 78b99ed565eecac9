r"""Characters that stand for LaTeX (½ ⁴ ± ≤ √ π), in full width or in Unicode's fonts, as it."""

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma
    tau upsilon phi chi psi omega"""
_COMMANDS = {
    "×": "cdot", "·": "cdot", "⋅": "cdot", "•": "cdot", "∙": "cdot", "∗": "cdot", "∪": "cup",
    "⋃": "cup", "∩": "cap", "∞": "infty", "≤": "le", "⩽": "le", "≦": "le", "≥": "ge", "⩾": "ge",
    "≧": "ge", "≠": "ne", "≈": "approx", "∼": "sim", "±": "pm", "∓": "mp", "∈": "in", "…": "ldots",
    "⋯": "ldots", "∠": "angle", "△": "triangle", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil",
    "⌉": "rceil", "≡": "equiv", "∴": "therefore", "⇒": "Rightarrow", "→": "to", "∧": "land",
    "∨": "lor", "∖": "setminus",
    **dict(zip("αβγδεζηθικλμνξπρστυφχψω", _GREEK.split(), strict=True)),
}  # fmt: skip
_UNICODE = str.maketrans(
    {c: rf"\{name} " for c, name in _COMMANDS.items()}
    | dict.fromkeys("−–‐‒﹣", "-")
    | {
        "\N{NO-BREAK SPACE}": " ", '"': "", "“": "", "”": "", "″": "''", "′": "'", "’": "'",
        "÷": "/", "∕": "/", "∶": ":", "∅": r"\{\}", "Ø": r"\{\}", "°": r"^\circ ",
        "º": r"^\circ ", "ℝ": r"\mathbb{R}", "€": "", "£": "", "¥": "", "￥": "", "¢": "",
    }
    | {c: rf"\frac{{{n}}}{{{d}}}" for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
       for n, d in [unicodedata.normalize("NFKC", c).split("\N{FRACTION SLASH}")]}
)  # fmt: skip
_ESCAPED = (("&lt;", "<"), ("&gt;", ">"), ("{;}", ";"))
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_SLASHED = re.compile("([0-9]+|[⁰¹²³⁴⁵⁶⁷⁸⁹]+)\N{FRACTION SLASH}([0-9]+|[₀₁₂₃₄₅₆₇₈₉]+)")
_ROOT = re.compile("([√∛∜]) ?(?:([0-9]+|[A-Za-z])|\\(([^()]*)\\))?")
_DEGREE = {"√": "", "∛": "[3]", "∜": "[4]"}


def as_latex(text: str) -> str:
    """`2√15` -> `2\\sqrt{15}`, `x⁴` -> `x^{4}`, `５` -> `5`."""
    if not text.isascii():
        text = "".join(map(_ascii, text))
        text = _SLASHED.sub(
            lambda m: f"{m[1].translate(_SUPERSCRIPTS)}/{m[2].translate(_SUBSCRIPTS)}", text
        )
        text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
        text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
        text = _ROOT.sub(_root, text)
    for said, meant in _ESCAPED:
        text = text.replace(said, meant)
    return text.translate(_UNICODE)


def _ascii(c: str) -> str:
    """A full-width character, or one of Unicode's own fonts, as the plain one that it is."""
    if c == "ℝ":
        return c
    known = unicodedata.decomposition(c).startswith(("<wide>", "<font>"))
    return unicodedata.normalize("NFKC", c) if known else c


def _root(match: re.Match[str]) -> str:
    command, inside = rf"\sqrt{_DEGREE[match[1]]}", match[2] or match[3]
    return f"{command}{{{inside}}}" if inside else command + " "
