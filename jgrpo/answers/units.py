r"""What stands behind a number: a scale (`5 million`), and a unit (`5 cm^2`, `60 km/h`), in any of
its spellings. A unit that one of two answers leaves out does not matter; two that differ do."""

import re
from fractions import Fraction

UNITS = {
    alias: unit
    for unit, aliases in {
        "mm": "mm millimeter millimeters", "cm": "cm centimeter centimeters",
        "m": "m meter meters metre metres", "km": "km kilometer kilometers",
        "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards",
        "mi": "mi mile miles", "g": "g gm gram grams", "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds", "oz": "oz ounce ounces", "s": "s sec second seconds",
        "min": "min minute minutes", "h": "h hr hrs hour hours", "day": "day days",
        "week": "week weeks", "month": "month months", "year": "year years yr yrs",
        "penny": "penny pennies", "nickel": "nickel nickels", "dime": "dime dimes",
        "mi/h": "mph", "km/h": "kph kmh", "cent": "cent cents", "dollar": "dollar dollars",
        "L": "liter liters litre litres L", "mL": "mL ml milliliter milliliters",
        "": "unit units",  # of whatever kind; but units are no square units
    }.items()
    for alias in aliases.split()
}  # fmt: skip
_SCALES: dict[str, Fraction | int] = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "tenth": Fraction(1, 10), "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000), "millionth": Fraction(1, 10**6),
}  # fmt: skip
_SCALE = re.compile(
    rf'(?P<value>.*[0-9}}]) ?(?P<quote>"?) ?(?P<scale>{"|".join(sorted(_SCALES, reverse=True))})s?'
    r"(?!aire)(?: of )? ?(?P<rest>.*)",
    re.IGNORECASE,
)
_UNIT = re.compile(
    r'(?P<value>.*[^"]) ?(?:"(?P<text>[^"]*)"|(?<=[0-9}%])(?P<bare>[A-Za-z]{2,}))'
    r"(?:\^\{?(?P<power>[23])\}?)?\.?"
)
_BOUND = re.compile(
    r"(?:or|and) ?(?:more|less|fewer|greater|larger|smaller|higher|lower|above|below|over|under)$"
)
"""`5 or more` is no 5 of something."""

_WORD = r"[A-Za-z]{1,12}"
_INVERSE = r"\^ ?\{? ?-1 ?\}?"
_RATES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf'\\frac ?\{{ ?"? ?({_WORD}) ?"? ?\}} ?\{{ ?"? ?({_WORD}) ?"? ?\}}', r"\1/\2"),
        (rf'" ?({_WORD}) ?" ?(?:/|"? ?per ?"?) ?" ?({_WORD}) ?"', r"\1/\2"),
        (rf'"? ?({_WORD}) ?(?:"? ?(?:\\cdot)? ?"?)({_WORD}) ?"? ?' + _INVERSE, r"\1/\2"),
        (rf"({_WORD}) ?(?:/|per ) ?({_WORD})", r"\1/\2"),
        (rf'(?:/|"? ?per ) ?"? ?({_WORD}) ?"?', r"/\1"),
    )
)
_POWER = re.compile(r"(.*?)(?: ?\^ ?\{? ?([23]) ?\}?)?\.?")
_RATE = re.compile(rf"((?:(?!{_INVERSE}).)*[0-9%)]\}}*)( ?)([^0-9]*(?:{_INVERSE})?)")


def with_rate(text: str) -> str:
    r"""A unit that is a rate, however it is written, in one pair of quotes at the end: `60 km/h`,
    `60\frac{"km"}{"h"}`, `60" km"/"h"` -> `60"km/h"`. Of quotes and \frac, before spaces go."""
    whole = _POWER.fullmatch(text)
    match = _RATE.fullmatch(whole[1]) if whole else None
    if not whole or not match or not match[3]:
        return text
    for pattern, replacement in _RATES:
        if not (found := pattern.fullmatch(match[3].strip())):
            continue
        over, _, under = found.expand(replacement).partition("/")
        known = under in UNITS and (not over or over in UNITS)
        letters = len(over) < 2 and len(under) < 2 and '"' not in match[3] and not match[2]
        if known and not letters:  # `3m/s` are letters
            power = f"^{whole[2]}" if whole[2] else ""
            return f'{match[1]}"{over}/{under}"{power}'
    return text


def scale(s: str) -> tuple[str, Fraction | int | None]:
    """`5 thousand cm` -> ("5cm", 1000); without such a word (s, None)."""
    if not (match := _SCALE.fullmatch(s)):
        return s, None
    rest = match["quote"] + match["rest"]
    return match["value"] + (rest if rest != '""' else ""), _SCALES[match["scale"].lower()]


def unit(s: str) -> tuple[str, str, str]:
    r"""`5 cm^2` -> ("5", "cm", "2"); of a unit that is no measure (`5 edges`) the name is dropped:
    ("5", "", "")."""
    match = _UNIT.fullmatch(s)
    if not match or not re.search(r"[0-9}]", match["value"]):
        return s, "", ""
    word = (match["text"] or match["bare"] or "").strip(" .")
    if _BOUND.search(word):
        return s, "", ""
    squared, cubed = re.subn(r"^(?:square|sq\.?) ?", "", word), re.subn(r"^cubic ?", "", word)
    power = match["power"] or ("2" if squared[1] else "3" if cubed[1] else "")
    known = _measure(squared[0] if squared[1] else cubed[0])
    if not word or (match["bare"] and known is None and len(word) < 4):
        return s, "", ""
    return match["value"].strip(), known or "", power or ("" if known is None else "1")


def _measure(word: str) -> str | None:
    """The one name of a measure, or of a rate; None if it is neither."""
    over, is_rate, under = re.sub(r" ?per ", "/", word).partition("/")
    names = [UNITS.get(w.strip(), UNITS.get(w.strip().lower())) for w in (over, under)]
    if not is_rate:
        return names[0]
    if names[1] is None or (over.strip() and names[0] is None):
        return None
    return f"{names[0]}/{names[1]}" if over.strip() else None
