"""An answer's shape (tuple, interval, set, list, union, matrix), taken apart into scalars."""

import re

_MATRIX = re.compile(r"\\begin\{([pbBvV]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)


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
    if s[:1] in ("(", "[") and closing(s) == len(s) - 1:
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
