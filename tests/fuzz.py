r"""Properties of whatever reads what we did not write, and inputs made to break them.

    python tests/fuzz.py --examples 100000      # minutes of one core; test_fuzz.py runs a part

Each property is a function of one drawn input; PROPERTIES gives its strategy and its share of the
examples. A reader may raise the error that its docstring names, and nothing else; a verdict is
compared with the value that the answer was written from (Fractions; mpmath for formulas).
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import fuzz_answers as a
import fuzz_files as f
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

PROPERTIES: dict[Callable[[Any], None], tuple[st.SearchStrategy, float]] = {
    a.boxes_are_found: (a.texts, 10),
    a.verdicts_are_sane: (st.tuples(a.texts, a.texts) | a.texts.map(lambda t: (t, t[::-1])), 18),
    a.numbers_are_equal_iff_their_values_are: (a.two_numbers, 16),
    a.a_percent_is_the_number_or_its_hundredth: (a.percents, 4),
    a.shapes_are_equal_iff_kind_and_values_are: (a.shapes(), 10),
    a.formulas_called_right_have_one_value: (a.formula_pairs, 1.0),
    a.surds_are_right_iff_equal: (a.simple_pairs, 1.0),
    a.any_pair_is_graded: (st.tuples(a.near_golds, a.golds), 3),
    f.a_config_is_made_or_refused: (f.options, 9),
    f.a_command_line_is_read_or_refused: (st.lists(f.words, max_size=5), 0.5),
    f.a_config_file_is_read_or_refused: (f.edits(st.sampled_from(f.HARMLESS)), 2),
    f.a_run_s_config_is_read_or_refused: (f.mutated_json, 3),
    f.a_reply_is_used_whole_or_refused: (
        st.tuples(f.changes_of_json, f.breaks, st.sampled_from((200, 200, 200, 400, 500))), 10,
    ),
    f.an_adapter_config_is_read_or_refused: (f.mutated_json, 4),
    f.adapter_weights_fit_or_are_refused: (f.weight_files, 4),
    f.metrics_are_read_or_refused: (f.run_files, 3),
    f.rollouts_are_read_or_refused: (f.run_files, 1.5),
}  # fmt: skip
"""Property -> strategy, and its share of the examples in percent."""


def run(check: Callable[[Any], None], n_examples: int, *, derandomize: bool = False) -> None:
    """Check one property on drawn inputs; a failure names the smallest that was found."""
    strategy, _ = PROPERTIES[check]

    @settings(
        max_examples=n_examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def holds(drawn: Any) -> None:
        check(drawn)

    holds()


def examples_of(check: Callable[[Any], None], n_examples: int) -> int:
    """Its part of `n_examples`."""
    shares = sum(share for _, share in PROPERTIES.values())
    return math.ceil(n_examples * PROPERTIES[check][1] / shares)


def told(error: Exception) -> str:
    """What failed, and for which input (in the notes)."""
    notes = "\n".join(getattr(error, "__notes__", []))
    return f"FAILED: {type(error).__name__}: {str(error)[:400]}\n{notes[:1500]}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--only", default="", help="properties whose name has this in it")
    options = parser.parse_args()
    failed = 0
    for check in (c for c in PROPERTIES if options.only in c.__name__):
        n, start_s = examples_of(check, options.examples), time.monotonic()
        try:
            run(check, n)
            verdict = "holds"
        except Exception as error:
            failed += 1
            found = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
            verdict = "".join(map(told, found))
        seconds = time.monotonic() - start_s
        print(f"{check.__name__:45s} {n:7d} inputs {seconds:6.1f} s  {verdict}", flush=True)
    a.grader().close()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
