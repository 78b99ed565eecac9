"""The grader's verdicts beside math-verify's own, on real answers; and what grading takes.

    python benchmarks/grader.py agreement     # every disagreement, from ../shared/data
    python benchmarks/grader.py spellings     # what people write, by kind: which says what
    python benchmarks/grader.py speed         # 256 completions, 70 % of which need algebra

Pairs: each answer with its rewrites (tests/answer_cases.py), and every two different answers. Of
the latter, two numbers that differ in 6 digits, or a number and what is none, are left out: 500,000
pairs are too many to simplify. math-verify runs with its defaults, on LaTeX alone.
"""

import itertools
import logging
import random
import statistics
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import math_verify
import sympy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from answer_cases import rewrites
from answer_spellings import KINDS
from fuzz_answers import real_golds

from jgrpo.answers.equal import last_boxed, quick_verdict
from jgrpo.answers.grader import Grader, Pair


@cache
def read(text: str) -> list[Any]:
    text = text.removeprefix(r"\(").removesuffix(r"\)").strip(" .$")  # marks of text, no value
    return math_verify.parse(f"${text}$", [math_verify.LatexExtractionConfig()])


@cache
def value(text: str) -> complex | None:
    """The number that math-verify reads, if it is one."""
    try:
        return complex(sympy.N(read(text)[0]))
    except (IndexError, TypeError, ValueError, OverflowError, AttributeError):
        return None


def far_apart(a: str, b: str) -> bool:
    x, y = value(a), value(b)
    if x is None or y is None:
        return x is not y
    return abs(x - y) > 1e-6 * max(abs(x), abs(y))


def agreement() -> None:
    golds = real_golds()
    kinds: dict[str, list[Pair]] = {
        "a rewrite and its answer": [
            Pair(last_boxed(rf"\boxed{{{answer}}}") or "", gold)
            for gold in golds
            for answer in dict.fromkeys(rewrites(gold))
        ],
        "two different answers": [
            Pair(a, b)
            for a, b in itertools.combinations(golds, 2)
            if not far_apart(a, b) or quick_verdict(a, b)
        ],
    }
    with Grader(max_workers=2, timeout_s=10) as grader:
        grader.self_test()
        for kind, pairs in kinds.items():
            counts: Counter[tuple[str, str]] = Counter()
            for pair, ours in grader._outcomes(pairs).items():
                theirs = math_verify.verify(read(pair.gold), read(pair.answer))
                counts[ours, "right" if theirs else "wrong"] += 1
                if (ours == "right") != theirs:
                    print(f"  ours {ours}: {pair.answer!r} for {pair.gold!r}", flush=True)
            print(f"{kind}: {sum(counts.values())} pairs")
            for (ours, theirs), n in counts.most_common():
                print(f"  ours {ours}, math-verify {theirs}: {n}", flush=True)


def spellings() -> None:
    """tests/answer_spellings.py, whose verdicts were decided by hand: how many each side has right,
    and every spelling that math-verify takes and ours does not."""
    counts: Counter[str] = Counter()
    with Grader(max_workers=2, timeout_s=10) as grader:
        for kind, rows in KINDS.items():
            for gold, right, wrong in rows:
                for answer, same in [(a, True) for a in right] + [(a, False) for a in wrong]:
                    pair = Pair(last_boxed(rf"\boxed{{{answer}}}") or "", gold)
                    ours = grader._outcomes([pair])[pair] == "right"
                    theirs = math_verify.verify(read(gold), read(answer))
                    said = "right" if same else "wrong"
                    counts[said] += 1
                    counts[f"{said}, ours agrees"] += ours == same
                    counts[f"{said}, math-verify agrees"] += theirs == same
                    if theirs and not ours and same:
                        print(f"  {kind}: math-verify alone takes {answer!r} for {gold!r}")
    for what, n in sorted(counts.items()):
        print(f"{what}: {n}")


def speed(n_runs: int = 7) -> None:
    """Seconds for 32 x 8 completions, 22 of 32 of which need algebra, no two runs of the same."""
    r = random.Random(0)
    with Grader(max_workers=2, timeout_s=10) as grader:
        grader.self_test()
        seconds = []
        for _ in range(n_runs):
            golds, completions = [], []
            for _ in range(32):
                a, b = r.randrange(2, 500), r.randrange(2, 500)
                root, other = rf"\sqrt{{{b}}}", rf"\sqrt{{{b + 1}}}"
                golds.append(f"{a}+{root}")
                answers = [f"{root}+{a}", f"0+{root}+{a}", f"{other}+{a}", f"{a + 1}+{root}",
                           rf"\frac{{{2 * a}+2{root}}}{{2}}", golds[-1], "5", "x"]  # fmt: skip
                if len(golds) % 2:
                    answers[-1] = rf"{a}-{root}"
                completions.append([rf"So \boxed{{{answer}}}." for answer in answers])
            start_s = time.perf_counter()
            grader.grade(completions, golds)
            seconds.append(time.perf_counter() - start_s)
    print(f"median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    modes = {"agreement": agreement, "spellings": spellings, "speed": speed}
    if len(sys.argv) != 2 or sys.argv[1] not in modes:
        sys.exit(__doc__)
    modes[sys.argv[1]]()
