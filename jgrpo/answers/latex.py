r"""LaTeX answers as text: one spelling for each (as the MATH benchmark does it: Hendrycks et al.,
2021)."""

import re

from jgrpo.answers.characters import as_latex
from jgrpo.answers.dress import bare, undressed
from jgrpo.answers.rewrite import rewritten, rules
from jgrpo.answers.shape import closing, depths
from jgrpo.answers.units import dollars_an_hour, with_rate, with_words

MAX_CHARS = 1000
"""Longer answers are compared as they stand, without normalisation."""

GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_DEGREES = r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])"
_TO_QUOTES = rules(
    (r"\s+", " "),
    (r"\\\\(?=[a-z]{2})", r"\\"),  # doubled escapes: \\frac
    (r"\\\\", "\n"),  # a matrix row, from here on
    (r"\\\$|\$|\\[()\[\]]|\\textdollar(?![A-Za-z])", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
    (r"(?<=[0-9])(?:\{, ?\}(?:\\!)?|, ?\\! ?|\\! ?, ?)(?=[0-9]{3}(?![0-9]))", "{,}"),
    (
        r"(?<![0-9])([1-9][0-9]{0,2})((?:\{,\}[0-9]{3})+)(?![0-9])",
        lambda m: m[1] + m[2].replace("{,}", ""),
    ),
    (r"(?<=[0-9])\{, ?\}(?:\\!)?(?=[0-9])", "."),  # 3{,}5
    (r"(?<=[0-9])['_](?=[0-9]{3}(?![0-9]))", ""),
    (r"\\!", ""),
    (r"(?<![,;\s]) *\\q?quad(?![A-Za-z]) *(?=[A-Za-z](?:_\S{1,5})? ?=)", ", "),
    (r"\\(?:land|wedge)(?![A-Za-z])", '" and "'),
    (r"\\(?:lor|vee)(?![A-Za-z])", '" or "'),
)
_RELATIONS = (
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (
        r"\\not ?=|=\\not(?![A-Za-z])|\\neq?(?![A-Za-z])|<>|(?<=[A-Za-z])!=|\" ?is not equal to ?\""
        r"|\" ?not equal to ?\"",
        r"\\ne ",
    ),
    (r"<=|\\leq(?:q|slant|qslant)?(?![A-Za-z])|\\le(?![A-Za-z])", r"\\le "),
    (r">=|\\geq(?:q|slant|qslant)?(?![A-Za-z])|\\ge(?![A-Za-z])", r"\\ge "),
    (r"(<|>|\\(?:le|ge|ne)) *\{([^{}]*|\\frac[^<>]*)\}$", r"\1 \2"),
)
_SETS = (
    (r"\\(?:emptyset|varnothing)(?![A-Za-z])", r"\\{\\}"),
    (r"\\mathbb ?(?:\{R\}|R)", r"(-\\infty,\\infty)"),
    (r'^"?(?:all )?real(?: number)?s"?$', r"(-\\infty,\\infty)"),
    (r"\\(?:cup|bigcup|sqcup|uplus)(?![A-Za-z])", r"\\cup "),
    (r'(?<=[\])}]) *"? *(?:U|union) *"? *(?=[\[(]|\\\{)', r"\\cup "),
    (r"\(-\\infty,\\infty\) ?(?:\\setminus|\\backslash|-) ?\\\{([^{},]+)\\\}",
     r"(-\\infty,\1)\\cup (\1,\\infty)"),
    (r"(?<![\w)}])\]([^\[\]()]*,[^\[\]()]*)([\[\]])",
     lambda m: f"({m[1]}{')' if m[2] == '[' else ']'}"),  # ]1,2[
    (r"\[([^\[\]()]*,[^\[\]()]*)\[", r"[\1)"),
    (r"^\\\{ ?[A-Za-z] ?(?:\\in ?\(-\\infty,\\infty\) ?)?"
     r"(?::|\||\\(?:mid|vert|colon)(?![A-Za-z])) ?(.+)\\\}$", r"\1"),  # the set of all x with ...
    (r"^([A-Za-z]) ?\\in ?\(-\\infty,\\infty\) ?, ?(?=.*\1)", ""),
    (r'^" ?all(?: real)?(?: numbers)? ?" ?(?=[^"]*(?:[<>]|\\[lgn]e(?![a-z])))', ""),
    (r'(<|>|\\le |\\ge ) ?([A-Za-z]) ?" ?and ?" ?\2 ?(?=\1)', r"\1\2"),  # 1<x and x<2
    (r'([A-Za-z]) ?(>|\\ge )([^<>,=]+?)" ?and ?" ?\1 ?(<|\\le )([^<>,=]+)',
     lambda m: f"{m[3]}{'<' if m[2] == '>' else m[2].replace('g', 'l')}{m[1]}{m[4]}{m[5]}"),
    (r'([A-Za-z]) ?(<|\\le )([^<>,=]+?)" ?and ?" ?\1 ?(>|\\ge )([^<>,=]+)',
     lambda m: f"{m[5]}{'<' if m[4] == '>' else m[4].replace('g', 'l')}{m[1]}{m[2]}{m[3]}"),
)  # fmt: skip
_ABOUT = (
    (r"\\(?:thickapprox|thicksim|simeq|doteq|cong|approxeq|sim(?= ?-?[0-9]+\.[0-9]))(?![A-Za-z])"
     r"(?= ?[-0-9])|^\\sim(?= ?[-0-9])", r"\\approx "),
    (r'"? ?\(? ?"? ?(?<![\\A-Za-z])(?:or |which is )?'
     r'(?:approximately|approx\.?|about|roughly|around|nearly) ?"? ?(?=[-0-9.])', r"\\approx "),
    (r'"? ?\bor ?"? ?(?=\\approx)', ""),
    (r'\( ?(\\approx[^()]*?)"? ?\) ?"?$', r"\1"),
    (r'(\\approx [-0-9.]+) ?" ?\) ?"$', r"\1"),
)  # fmt: skip
_POWERS_OF_TEN = (
    (r'(?<=[0-9])(?: ?" ?([eE]) ?" ?|([eE]) ?)\{?([-+]?[0-9]+)\}?(?![0-9A-Za-z])', r"\1\2\3"),
    (r'(?<=[0-9)]) ?(?:x|" ?x ?") ?(?=\{?10\}?\^)', r"\\cdot "),
    (r"\^\((-?[0-9]+)\)", r"^{\1}"),
)
_SPELLINGS = rules(
    (r"(?<![\\_^])\{\}", " "),
    (r"(?<![A-Za-z^_])\{ *(\\(?:cup|times|cdot|[lc]?dots|l[te]q?|g[te]q?|neq?)) *\}", r"\1 "),
    (r'(?<![A-Za-z\]}^_])\{ *("[^"]*") *\}', r"\1 "),  # {"km"}
    (r'"([^"]*)"', lambda m: m[0] if re.search("[A-Za-z]", m[1]) else m[1]),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\times(?![A-Za-z])|\\ast(?![A-Za-z])|\*", r"\\cdot "),
    *_POWERS_OF_TEN,
    *_RELATIONS,
    *_ABOUT,
    *_SETS,
    (rf"(?:{_DEGREES}) ?, ?(?=[0-9])", ",~"),  # this comma separates, as those below
    (_DEGREES, ""),
    (r'" ?,? ?(?:and|or) ?"|(?<=[^A-Za-z"]) (?:and|or) (?![A-Za-z]{3})', ",~"),
    (r'"([^"]*)"', lambda m: m[1] if "," in m[1] else m[0]),
    (r", ?,", ","),
    (r"\\%| ?\b[pP]ercent\b", "%"),
    (r"(?<![A-Za-z\\])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![A-Za-z\\\"])(log|ln|sin|cos|tan)(?=[_( ])", r"\\\1"),
    (r"\\sqrt ?([0-9A-Za-z]|\\pi)", r"\\sqrt{\1}"),
    (r"\\frac ?([0-9A-Za-z]|\\pi)", r"\\frac{\1}"),
    (rf"\\frac({GROUP}) ?([0-9A-Za-z]|\\pi)", r"\\frac\1{\2}"),
    (r"(\\log ?_ ?(?:[0-9A-Za-z]|\{[^{}]*\})) +(?=[0-9])", r"\1"),
    (r"\\[dt]?binom ?([0-9A-Za-z]) ?([0-9A-Za-z])(?![A-Za-z])", r"\\binom{\1}{\2}"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\{ ?([0-9A-Za-z]+) ?\\choose(?![A-Za-z]) ?([0-9A-Za-z]+) ?\}", r"\\binom{\1}{\2}"),
    (r"(?<=[.0-9])\\dot ?(?:\{ ?([0-9]) ?\}|([0-9]))$", r"\\overline{\1\2}"),  # 0.1\dot{6}
    (r"\\(?:[lch]?dots[cbm]?|mathellipsis|textellipsis|ldotp\\ldotp\\ldotp)(?![A-Za-z])"
     r"|\. ?\. ?\.", r"\\ldots "),
    # `6 3/4` is a mixed number; without its space it would be 63/4.
    (r"(?<![0-9.] )(?<![0-9.])([0-9]+) +([0-9]+) ?/ ?([0-9]+)", r"\1\\frac{\2}{\3}"),
    (r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", ""),
    (r"(?<=[0-9]), (?=[1-9][0-9]{2}(?![0-9]))", ",~"),  # `70, 110` is two numbers
    (r"(?<=[0-9]) (?=[0-9])", "~"),  # `1 2` is not 12
    (r'(\\[A-Za-z]+) +(?=[A-Za-z])|(?<![A-Za-z]) +| +(?![A-Za-z])|(?<=") +', r"\1 "),
    (r"([\^_])\{([0-9A-Za-z])\}", r"\1\2"),
    (r"(?<![0-9])\.(?=[0-9])", "0."),
)  # fmt: skip
_KEPT_SPACE = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z]))| +")


def normalize(answer: str) -> str:
    r"""Return `answer` with one spelling for what MATH's graders take as one answer.

    \dfrac \frac12 \sqrt2 .5 10,\!000 90^\circ \$5 \left( x^{2} and spaces; \text{east} becomes
    "east" (in quotes) and percent stays as %: whether they count depends on where they stand.
    Trap: `1,000` stays as it is, for it may be a list. Longer than MAX_CHARS: only stripped.
    """
    if len(answer) > MAX_CHARS:
        return answer.strip()
    text = dollars_an_hour(_semicolons(as_latex(answer)))
    text = rewritten(text, _TO_QUOTES)
    text = bare(undressed(text).strip()).strip()
    text = with_rate(with_words(text))
    text = rewritten(text, _SPELLINGS)
    text = _KEPT_SPACE.sub(lambda match: match[1] or "", text).strip(" \n")
    text = re.sub(r"[.,;:]+$|(?<=^[A-Z])\)$", "", text)
    while text.startswith("{") and closing(text) == len(text) - 1:
        text = text[1:-1]
    return text


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
