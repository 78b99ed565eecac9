r"""What stands behind a number: a scale (`5 million`), and a unit (`5 cm^2`, `60 km/h`), in any of
its spellings. A unit that one of two answers leaves out does not matter; two that differ do."""

import re
from fractions import Fraction

from jgrpo.answers.rewrite import rewritten, rules

UNITS = {
    alias: unit
    for unit, aliases in {
        "mm": "mm millimeter millimeters", "cm": "cm centimeter centimeters",
        "m": "m meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres",
        "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards",
        "mi": "mi mile miles", "g": "g gm gram grams", "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds", "oz": "oz ounce ounces", "s": "s sec second seconds",
        "min": "min minute minutes", "h": "h hr hrs hour hours", "day": "day days",
        "week": "week weeks", "month": "month months", "year": "year years yr yrs",
        "penny": "penny pennies", "nickel": "nickel nickels", "dime": "dime dimes",
        "cent": "cent cents", "dollar": "dollar dollars", "N": "N newton newtons",
        "J": "J joule joules", "W": "W watt watts", "rad": "rad radian radians",
        "rev": "rev revolution revolutions", "gal": "gal gallon gallons",
        "L": "liter liters litre litres L", "mL": "mL ml milliliter milliliters",
        "": "unit units",  # of whatever kind; but units are no square units
    }.items()
    for alias in aliases.split()
}  # fmt: skip
_ONE_WORD = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "mps": "m/s",
             "fps": "ft/s", "rpm": "rev/min", "mpg": "mi/gal"}  # fmt: skip
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
_NO_UNIT = re.compile(
    r"[0-9]|^(?:or|and|to|through|thru|mod|modulo|plus|minus|squared|cubed|factorial|below|up"
    r"|upwards?|is|are|was|does|do|not|base|if|when|unless|except)\b"
    r"|\b(?:than|excluded|incorrect|wrong|least|most|max|maximum|minimum)\b"
    r"|\b(?:of|times|by) [a-z]$"
    r"|\b(?:or|and) (?:more|less|fewer|above|below|over|under|up|so|[a-z]+er)$",
    re.IGNORECASE,
)
_BEHIND = re.compile(r'(.*[0-9}%]) ?("?) ?([A-Za-z]{2}[A-Za-z0-9 ]*?) ?("?)\.?')

_NAME = r"[A-Za-z]{1,14}\.?"
_SAYS_RATE = re.compile(r"/|\\[dtc]?frac|\^|per|each|every|(?<![A-Za-z])an?(?![A-Za-z])")
_POWERED = rf"{_NAME}(?:\^[1-3])?"
_RATE = re.compile(rf"(?:({_POWERED})\s*)?/\s*({_POWERED})(?:\s*/\s*({_NAME}))?")
_VALUE = re.compile(
    r"(.*[0-9%)]\}*)( ?)(?=[^A-Za-z]*[A-Za-z])((?:[^0-9]|(?<=\^)[1-3]|(?<=[{-])[1-3](?=\}))+)"
)
_WRITTEN = rules(
    (r'"|\\(?:cdot|big)(?![A-Za-z]) ?|\\,|~', " "),
    (r"^\s*[\[(]|[\])]\s*$", ""),
    (r"\\[dtc]?frac ?\{([^{}]*(?:\{[0-9]\})?)\} ?\{([^{}]*(?:\{[0-9]\})?)\}", r" \1/\2"),
    (r"\{|\}", ""),
    (r"\b(?:square|sq\.?)\s+([A-Za-z]+)|([A-Za-z]+)\s+squared\b", r"\1\2^2"),
    (r"\b(?:cubic)\s+([A-Za-z]+)|([A-Za-z]+)\s+cubed\b", r"\1\2^3"),
    (r"\b([A-Za-z]+) ?\^ ?-([1-3])", r"/\1^\2"),
    (r"(?:^|(?<=[a-z]))\s*\b(?:per|an?|each|every)\s+(?=[A-Za-z])", "/"),
    (r" ?\^ ?1\b", ""),
    (r" ?\^ ?", "^"),
)
_POWERS = ((re.compile(r"^(?:square|sq\.?) ?| ?squared$"), "2"),
           (re.compile(r"^cubic ?| ?cubed$"), "3"))  # fmt: skip
_DOLLARS_AN_HOUR = re.compile(r"^( ?\\?\$[-0-9.,{}! \\]+)/ ?h$")


def with_words(text: str) -> str:
    """`5 or more` -> `5"_or_more"`: words behind a number that are no unit, kept as they are. It is
    not 5 of something, nor is `5 squared`."""
    match = _BEHIND.fullmatch(text)
    if not match or match[2] != match[4] or not _NO_UNIT.search(match[3]):
        return text
    if re.match(r"(?:or|and|to)(?: [0-9]| .$|$)", match[3]):  # 5 or 6
        return text
    return f'{match[1]}"_{match[3].replace(" ", "_")}"'


def with_rate(text: str) -> str:
    r"""A unit that is a rate, however it is written, in one pair of quotes at the end: `60 km/h`,
    `60\frac{"km"}{"h"}`, `60" km" "h"^{-1}` -> `60"km/h"`. Of quotes and \frac, before spaces go.
    """
    match = _VALUE.fullmatch(text.rstrip(". "))
    if not match or not _SAYS_RATE.search(match[3]):
        return text
    rate = match[3]
    rate = rewritten(rate, _WRITTEN)
    if not (found := _RATE.fullmatch(rate.strip())):
        return text
    over, under, again = (name or "" for name in found.groups())
    if again and UNITS.get(again, again) != UNITS.get(under, under):
        return text
    quoted, names = '"' in match[3], (over, under)
    bases = [name.partition("^")[0].strip(".") for name in names]
    if not quoted:  # `3m/s` and `5/h` are letters; `60 m/s` and `18/hour` are not
        if all(len(base) < 2 for base in bases) and not (match[2] and over):
            return text
        if any(base and base not in UNITS and len(base) < 4 for base in bases):
            return text
    return f'{match[1]}"{over}/{under}{"^2" if again else ""}"'


def dollars_an_hour(text: str) -> str:
    r"""`\$18/h` -> `\$18/hour`, while the dollar sign is there to tell it from letters."""
    return _DOLLARS_AN_HOUR.sub(r"\1/hour", text)


def scale(s: str) -> tuple[str, Fraction | int | None]:
    """`5 thousand cm` -> ("5cm", 1000); without such a word (s, None)."""
    if not (match := _SCALE.fullmatch(s)):
        return s, None
    rest = match["quote"] + match["rest"]
    return match["value"] + (rest if rest != '""' else ""), _SCALES[match["scale"].lower()]


def unit(s: str) -> tuple[str, str, str, str]:
    r"""`5 cm^2` -> ("5", "cm", "2", "-"), `60 km/h` -> ("60", "km", "1", "h"): value, name, power,
    and per what. What is not known is empty: of `5 edges` the word is dropped."""
    match = _UNIT.fullmatch(s)
    if not match or not re.search(r"[0-9}]", match["value"]):
        return s, "", "", ""
    word = (match["text"] or match["bare"] or "").strip(" .")
    word = _ONE_WORD.get(word.lower(), word)
    if "_" in word:
        return s, "", "", ""
    over, is_rate, under = word.partition("/")
    name, power = _measure(over)
    power = power or match["power"] or ""
    if not word or (match["bare"] and not is_rate and name is None and len(word) < 4):
        return s, "", "", ""
    value = match["value"].strip()
    if is_rate:
        per, per_power = _measure(under)
        per_power = per_power or match["power"] or "1"
        return value, name or "", power if name else "", f"{per}^{per_power}" if per else ""
    return value, name or "", power or ("" if name is None else "1"), "" if name is None else "-"


def _measure(word: str) -> tuple[str | None, str]:
    """The one name of a measure, None if it is not known, and its power, if it is said."""
    word, _, power = word.strip(" .").partition("^")
    for said, number in _POWERS:
        rest = said.sub("", word)
        if rest != word:
            word, power = rest.strip(" ."), number
    return UNITS.get(word, UNITS.get(word.lower())), power
