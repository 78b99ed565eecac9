r"""What an answer is dressed in, taken off: fonts, colours, sizes, boxes, spaces, Markdown, and the
words "the answer is". Text that is left stands in quotes: it may be a unit."""

import re

from jgrpo.answers.rewrite import rewritten, rules

_SPACES = re.compile(r"(?: |~|\\[,;:> ]|\\q?quad(?![A-Za-z])|\\[hv]space\*? ?\{[^{}]*\})+")
_NAMES = {
    "no argument": """bf rm it sf tt em bfseries itshape rmfamily sffamily ttfamily upshape mdseries
        normalfont boldmath displaystyle textstyle scriptstyle scriptscriptstyle tiny scriptsize
        footnotesize small normalsize large Large LARGE huge Huge mathstrut strut limits nolimits
        noindent centering""",
    "dropped": "color phantom hphantom vphantom label tag",
    "text": """text textbf textit textrm textsf texttt textnormal textup textmd textsl textsc mbox
        hbox emph mathrm operatorname si unit""",
    "math": "mathbf mathit mathsf mathtt mathnormal bold",
    "kept": """boldsymbol bm pmb underline uline underbar ensuremath mathord mathbin mathrel mathop
        mathinner boxed fbox framebox bbox num""",
}
_NO_ARGUMENT, _DROPPED, _TEXT, _MATH = (
    frozenset(_NAMES[kind].split()) for kind in ("no argument", "dropped", "text", "math")
)
_KEPT = dict.fromkeys(_NAMES["kept"].split(), 0) | {
    "textcolor": 1, "colorbox": 1, "enclose": 1, "style": 1, "class": 1, "fcolorbox": 2,
}  # fmt: skip
"""Whose last argument is what it shows -> the arguments before it."""

_COMMAND = re.compile(
    r"\\(" + "|".join(
        sorted(_NO_ARGUMENT | _DROPPED | _TEXT | _MATH | set(_KEPT) | {"SI", "qty"},
               key=len, reverse=True)
    ) + r")(?![A-Za-z])\*?"
)  # fmt: skip
_WORDS = re.compile(r"(?=.*[A-Za-z])(?:[A-Za-z\s.,;:'!?/()\[\]-]|\^\{?-?[0-9]\}?)*")
_LETTERS = re.compile(r"[A-Za-z\s.]+")
_MARKS = rules(
    (r"</?(?:b|i|u|em|strong|code|mark)>", ""),
    (r"\\\*\\\*", "**"),
    (r"(?<![0-9A-Za-z)}*])\*\*((?:(?!\*\*).)+)\*\*", r"\1"),
    (r"(?<=[0-9A-Za-z)}])\*\*(-?[0-9]+|[A-Za-z])", r"^{\1}"),  # 2**3 is a power
    (r"^(__|==|``|[*_`'])((?:(?!\1).)+)\1$", r"\2"),
)
_SAYS = re.compile(
    r'^(?:"? ?(?:the |my |final |correct )*answer(?: is)?(?:" ?| ?: ?"?|(?<=is) )[: ]*'
    r"|=(?!=)|:(?!=)|[&+ ~]|\{\}|\\(?:Rightarrow|longrightarrow|rightarrow|implies"
    r"|therefore|to)(?![A-Za-z]))+",
    re.IGNORECASE,
)
_ENVIRONMENT = re.compile(
    r"\\(?:begin|end) ?\{(?:aligned|align|equation|gathered|gather|split|math|displaymath|center)"
    r"\*?\}"
)


def undressed(text: str) -> str:
    r"""`\textbf{\color{red} 5}` -> `5`; `\text{ cm}` -> `" cm"`."""
    text = _SPACES.sub(" ", _ENVIRONMENT.sub("", text)).strip()
    at = 0
    while match := _COMMAND.search(text, at):
        at = match.start()
        inside, end = _shown(text, match)
        before, after = text[:at], text[end:]
        if re.search(r"\\[A-Za-z]+$", before) and inside[:1].isalpha():
            inside = " " + inside
        if re.search(r"\\[A-Za-z]+$", inside) and after[:1].isalpha():
            inside += " "
        text = before + inside + after
    return rewritten(text, _MARKS)


def bare(text: str) -> str:
    """Without what only announces an answer: `= 5`, `The answer is 5`."""
    return text[match.end() :] if (match := _SAYS.match(text)) else text


def _shown(text: str, match: re.Match[str]) -> tuple[str, int]:
    """What a command shows of its arguments, and where they end."""
    name, end = match[1], match.end()
    if name in _NO_ARGUMENT:
        before = text[: match.start()].rstrip()
        if not before.endswith("{") or before.endswith(r"\{"):
            return " ", end
        rest, stop = _group("{" + text[end:])  # {\rm km} ends with its brace
        return (_quoted(rest, _WORDS) if name == "rm" else rest), end + max(stop - 2, 0)
    if text[end : end + 1] == "[" and "]" in text[end:]:
        end = text.index("]", end) + 1
    wanted = 1 if name in _DROPPED else 2 if name in ("SI", "qty") else _KEPT.get(name, 0) + 1
    groups: list[str] = []
    while len(groups) < wanted:
        end += len(text[end:]) - len(text[end:].lstrip())
        inside, stop = _group(text[end:])
        if not stop:  # \mathbf 5, or a brace that is never closed
            return " ", end
        groups.append(inside)
        end += stop
    if name == "color":
        inside, stop = _group(text[end:])
        return inside, end + stop
    if name in _DROPPED:
        return " ", end
    if name in ("SI", "qty"):
        return groups[0] + _quoted(groups[1], _WORDS), end
    known = _WORDS if name in _TEXT else _LETTERS if name in _MATH else None
    return (_quoted(groups[-1], known) if known else groups[-1]), end


def _quoted(inside: str, known: re.Pattern[str]) -> str:
    return f'"{inside}"' if known.fullmatch(inside) else inside


def _group(text: str) -> tuple[str, int]:
    """What stands in the braces that `text` begins with, and where they end; ("", 0) if it does
    not."""
    if not text.startswith("{"):
        return "", 0
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0 and match[0] == "}":
            return text[1 : match.start()], match.end()
    return "", 0
