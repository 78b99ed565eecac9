r"""What an answer calls its value: `x=5`, `P(A)=\frac12`, `|AB|=5`, `x\in[0,1)`."""

import re

from jgrpo.answers.shape import depths

_INDEX = r"(?:_(?:\\?\w|[-+]|\{[^{}]*\}|\\[a-z]+))?"
_ARGUMENT = r"(?:\([^=<>()]*(?:\([^()]*\))?[^()]*\)|\[[^\[\]]*\])"
_SEGMENT = r"(?:[A-Z]'?){1,3}"
_LINE = (
    rf"(?:\\(?:overline|overrightarrow|vec|bar|widehat) ?\{{?\"?{_SEGMENT}\"?\}}?|\"?{_SEGMENT}\"?)"
)
_LETTER = (
    r"(?:\\(?:bar|vec|hat|tilde|overline|mathbb|mathcal) ?\{?[A-Za-z]\}?|\\[a-zA-Z]+ ?|[A-Za-z])"
)
_NAME = re.compile(
    rf"m?(?:\\angle|\\triangle|\\Delta)? ?{_LETTER}'*{_INDEX}(?:\^\{{?-1\}}?)?'*{_ARGUMENT}?"
    rf"|{_LETTER}(?:[A-Z]{{1,2}}){_INDEX}"
    rf"|m?(?:\\angle|\\triangle) ?{_SEGMENT}|m?{_LINE}"
    rf"|(?:\||\\[lr]?vert ?|\\mid ?|\\\|){_LINE}(?:\||\\[lr]?vert ?|\\mid ?|\\\|)|\[[A-Z]{{3,5}}\]"
    rf'|"[^"]*"(?:[A-Z]{{1,5}}|{_LINE}|{_ARGUMENT})?'
    rf"|\\(?:sin|cos|tan|cot|sec|csc|log|ln|det|gcd|Pr|max|min){_INDEX}\^?[0-9]? ?"
    rf"(?:\\?[A-Za-z]+|{_ARGUMENT})"
    rf"|[A-Z][a-z]{{1,5}}{_ARGUMENT}"
    r"|\([a-z](?:,[a-z])+\)|\([a-zA-Z]\\circ [a-zA-Z]\)\([^()]*\)"
    r"|\\sigma\^2|\\frac\{d[a-z]?\}\{d[a-z]\}|d[a-z]/d[a-z]|\\(?:lim|int)_.*"
)
_FORMULA = re.compile(
    r"\\(?:frac|sqrt|pi|infty|pm|cdot|begin|end|ln|log|sin|cos|tan)(?![a-zA-Z]) ?"
)
_LENGTH = re.compile(
    r"\||\\[lr]?vert|\\mid|\\overline|\\overrightarrow|\\vec|\\bar|[{}\" ]|^m(?=\\)|\\\|"
    r"|^\"?[lL]ength ?(?:of)? ?\"?"
)


def named(s: str) -> tuple[str, str]:
    r"""`x=5` and `x\in5` -> ("x", "5"); `V=2+3=5` -> ("V", "5"); no plain name: ("", s)."""
    for match in re.finditer(r"=|\\in(?![a-zA-Z]) ?", s):
        left = s[: match.start()].strip()
        if depths(left)[0] != 0 or re.sub(r"\([^()]*\)", "", left).count("|") % 2:
            continue  # within brackets: P(X=2)
        if not left or not _NAME.fullmatch(left) or _FORMULA.fullmatch(left + " "):
            break
        return _one_name(left), _last(s[match.end() :]).strip()
    return "", s


def _one_name(name: str) -> str:
    r"""Of `|AB|`, `\overline{AB}` and `AB` one."""
    length = _LENGTH.sub("", name)
    return length if re.fullmatch(_SEGMENT, length) and len(length) > 1 else name.replace(" ", "")


def _last(chain: str) -> str:
    """`2+3=5` -> `5`; an `=` within brackets parts nothing."""
    end = 0
    for match in re.finditer("=", chain):
        if depths(chain[: match.start()])[0] == 0:
            end = match.end()
    return chain[end:]


def same_name(a: str, b: str) -> bool:
    """Whether two may be one: `f(x)` may be called y."""
    return a == b or bool(re.search(r"\([a-z]", a + b))


def values_in_order(elements: list[tuple[str, str]]) -> list[str]:
    """The values of `x=1,y=2`, if the names are single letters that follow each other so; else
    none. They are then the point (1,2)."""
    names = "".join(name for name, _ in elements)
    follow = len(names) > 1 and names in "abcdefghijklmnopqrstuvwxyz"
    return [value for _, value in elements] if follow else []
