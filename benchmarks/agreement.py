"""Do jgrpo and the PyTorch baseline compute the same? For every technique that the two share: loss,
gradient norm, the adapter's gradient, and the adapter after 10 updates, on the same rollouts.

    python benchmarks/agreement.py [--run RUN] [--only clip] [--out FILE]

Both work in float32; the judge is the baseline in float64. What is off policy is measured off
policy: old_logprobs come from the adapter that sampled, the policy is a later adapter of the run.
The last line on stdout is one JSON document; the exit status is 1 if anything is further from the
judge than rounding explains. Takes ten minutes of two cores, most of it compilation.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from agreement_sides import (
    Arrays,
    Ours,
    Theirs,
    difference,
    norm_of,
    setting,
    variant_config,
    whole_rollout,
)

from jgrpo.config import Config
from jgrpo.errors import InputError, RunError, exit_status
from jgrpo.run.session import configure_jax

# float32 rounds to 6e-8. A loss is a mean of terms of size 1 (it is compared absolutely, since
# advantages cancel in it), each exp(logprob - old) with logprobs rounded to 1e-6; a gradient adds
# a backward pass whose sums cancel.
MAX_LOSS_ERROR = 1e-5
MAX_GRADIENT_ERROR = 1e-4
# Adam divides by sqrt(v), so that an entry whose gradient is nearly 0 moves by lr in the direction
# of its rounding error; and a token at the edge of a clip may fall on either side.
MAX_MOVEMENT_ERROR = 1e-2

NARROW = {"use_clip": True, "clip_eps": 0.02}
"""Ratios here are 1 % to 20 % from 1, so that 0.2 would clip next to nothing."""
KL = {"use_kl_penalty": True, "beta": 0.2}
BASE = KL | {"kl_to": "base"}
TOKENS = {"use_token_level_loss": True}
NO_STD = {"use_std_norm": False}
DR_GRPO = {"loss_type": "dr_grpo", **NO_STD}
GSPO = {"loss_type": "gspo", "use_clip": True, "clip_eps": 3e-3, "clip_eps_high": 4e-3}
CISPO = {"loss_type": "cispo", "cispo_max_ratio": 1.03}
RLOO = {"loss_type": "rloo", "use_leave_one_out": True, **NO_STD}
WEIGHTS = {"use_importance_weights": True, "importance_weight_cap": 1.1}
ENTROPY = {"entropy_coef": 0.05}
MASKED = {"mask_truncated_completions": True}
DUAL = NARROW | {"clip_delta": 1.05}
"""The lowest cap that binds for some of the tokens with A < 0."""
WEIGHTED = BASE | {"use_weighted_kl": True}
SAPO = {"loss_type": "sapo", "sapo_tau_positive": 3.0, "sapo_tau_negative": 5.0}
DPPO = {"loss_type": "dppo", "dppo_max_difference": 0.01}
SEQUENCE = WEIGHTS | {"importance_weight_mode": "sequence_truncate"}

VARIANTS: dict[str, dict[str, Any]] = {
    "grpo, one update a rollout": {"updates_per_epoch": 1},
    "grpo": {},
    "grpo, 2 epochs of 2 updates": {"updates_per_epoch": 2, "epochs_per_step": 2},
    "temperature 0.7": {"temperature": 0.7},
    "no std": NO_STD,
    "leave-one-out advantages": {"use_leave_one_out": True},
    "clip": NARROW,
    "clip-higher": NARROW | {"clip_eps_high": 0.05},
    "KL to old, k1": KL | {"kl_estimator": "k1"},
    "KL to old, k2": KL | {"kl_estimator": "k2"},
    "KL to old, k3": KL,
    "KL to base, k1": BASE | {"kl_estimator": "k1"},
    "KL to base, k2": BASE | {"kl_estimator": "k2"},
    "KL to base, k3": BASE,
    "token level": TOKENS,
    "token level + clip": TOKENS | NARROW,
    "Dr. GRPO": DR_GRPO,
    "Dr. GRPO + clip + KL to base": DR_GRPO | NARROW | BASE,
    "GSPO": GSPO,
    "GSPO + token level": GSPO | TOKENS,
    "CISPO": CISPO,
    "RLOO": RLOO,
    "RLOO + clip": RLOO | {"use_clip": True, "clip_eps": 0.1},
    "importance weights": WEIGHTS,
    "importance weights + clip + token level": WEIGHTS | NARROW | TOKENS,
    "CISPO + importance weights": CISPO | WEIGHTS,
    "clip + second upper clip (clip_delta)": DUAL,
    "Dr. GRPO + clip + second upper clip": DR_GRPO | DUAL,
    "KL to base, k1, weighted": WEIGHTED | {"kl_estimator": "k1"},
    "KL to base, k3, weighted": WEIGHTED,
    "SAPO": SAPO,
    "SAPO, its own temperatures": {"loss_type": "sapo"},
    "SAPO + token level": SAPO | TOKENS,
    "DPPO": DPPO,
    "DPPO + token level": DPPO | TOKENS,
    "importance weights of sequences": SEQUENCE,
    "importance weights of tokens, masked": WEIGHTS | {"importance_weight_mode": "token_mask"},
    "importance weights of sequences, masked": SEQUENCE
    | {"importance_weight_mode": "sequence_mask"},
    "SAPO + weights of sequences + weighted KL": SAPO | SEQUENCE | WEIGHTED,
    "entropy bonus": ENTROPY,
    "mask truncated": MASKED,
    "mask truncated + token level": MASKED | TOKENS,
    "DAPO: clip-higher + token level + mask": NARROW | {"clip_eps_high": 0.05} | TOKENS | MASKED,
    "clip + KL to base + entropy + weights": NARROW | BASE | ENTROPY | WEIGHTS,
}
"""What changes; four updates a rollout where nothing else is said."""


@dataclass
class Args:
    """Compare losses, gradients and adapters of jgrpo with those of the PyTorch baseline."""

    run: Path | None = None
    """Run folder of jgrpo.train, in float32, of 5 steps or more; without it a small run of
    configs/tiny.py is made, in a temporary folder."""
    only: str = ""
    """Compare the variants with this in their names alone."""
    updates: int = 10
    """Optimizer updates after which the adapters are compared; 0: gradients alone."""
    out: Path | None = None
    """File for the Markdown table; without it, stdout."""


@dataclass(frozen=True)
class Measured:
    """What one side says about one variant."""

    loss: float
    norm: float
    gradient: Arrays
    moved: Arrays


def measured(side: Ours | Theirs, config: Config, updates: int) -> Measured:
    """All of one side's figures on one variant; `updates` is rounded up to whole rollouts."""
    rollouts = [side.rollout(lines, config) for lines in side.setting.rollouts]
    of_one_update = side.gradient(whole_rollout(config), rollouts[0])
    n_rollouts = -(-updates // config.updates_per_rollout)
    enough = replace(config, n_grpo_steps=max(config.n_grpo_steps, n_rollouts))  # of learning rates
    return Measured(*of_one_update, side.moved(enough, islice(cycle(rollouts), n_rollouts)))


def relative_error(got: Arrays, expected: Arrays) -> float:
    """|got - expected| / |expected|, over all tensors."""
    assert got.keys() == expected.keys()
    return norm_of(difference(got, expected)) / max(norm_of(expected), 1e-30)


def cosine(a: Arrays, b: Arrays) -> float:
    dot = sum(float((a[k].astype(np.float64) * b[k]).sum()) for k in a)
    return dot / (norm_of(a) * norm_of(b))


@dataclass(frozen=True)
class Row:
    """One variant: the judge's figures, and how far the two float32 systems are from them (loss:
    absolutely; norm, gradient, movement: relatively)."""

    variant: str
    loss: float
    grad_norm: float
    effect: float
    """How far the judge's gradient is from that of plain grpo on the same rows, relatively."""
    loss_error: float
    loss_error_torch: float
    norm_error: float
    norm_error_torch: float
    gradient_error: float
    gradient_error_torch: float
    one_minus_cosine: float
    """Of jgrpo's gradient and float32 torch's."""
    movement_error: float
    movement_error_torch: float

    def problems(self) -> list[str]:
        limits = {"loss": MAX_LOSS_ERROR, "norm": MAX_GRADIENT_ERROR,
                  "gradient": MAX_GRADIENT_ERROR, "movement": MAX_MOVEMENT_ERROR}  # fmt: skip
        return [
            f"{self.variant}: {name}{side} is off by {error:.1e}, more than {limit:.0e}"
            for name, limit in limits.items()
            for side in ("_error", "_error_torch")
            if not (error := getattr(self, name + side)) <= limit
        ]


def compared(name: str, ours: Measured, theirs: Measured, judge: Measured, plain: Measured) -> Row:
    def errors(m: Measured) -> tuple[float, float, float, float]:
        return (
            abs(m.loss - judge.loss),
            abs(m.norm - judge.norm) / judge.norm,
            relative_error(m.gradient, judge.gradient),
            relative_error(m.moved, judge.moved),
        )

    pairs = [x for pair in zip(errors(ours), errors(theirs), strict=True) for x in pair]
    effect = relative_error(judge.gradient, plain.gradient)
    angle = 1 - cosine(ours.gradient, theirs.gradient)
    return Row(name, judge.loss, judge.norm, effect, *pairs[:6], angle, *pairs[6:])


HEADINGS = {
    "variant": "variant", "loss": "loss", "grad_norm": "gradient norm", "effect": "effect",
    "loss_error": "loss error", "loss_error_torch": "torch's",
    "norm_error": "norm error", "norm_error_torch": "torch's",
    "gradient_error": "gradient error", "gradient_error_torch": "torch's",
    "one_minus_cosine": "1 - cosine",
    "movement_error": "movement error", "movement_error_torch": "torch's",
}  # fmt: skip


def cells(row: Row) -> list[str]:
    formats = {"loss": "{:+.5f}", "grad_norm": "{:.4f}", "effect": "{:.2g}"}
    values = asdict(row)
    return [values.pop("variant")] + [
        formats.get(name, "{:.1e}").format(value) for name, value in values.items()
    ]


def markdown(rows: list[Row]) -> str:
    lines = [list(HEADINGS.values()), ["---"] * len(HEADINGS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: list[Row]) -> None:
    table = Table(title="distance from float64 torch: jgrpo's, and float32 torch's")
    for i, heading in enumerate(HEADINGS.values()):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*cells(row))
    Console(stderr=True, width=None if sys.stderr.isatty() else 200).print(table)


def compare(args: Args) -> list[Row]:
    """A row for each variant that is asked for; tables and the JSON document on the way."""
    names = [name for name in VARIANTS if args.only in name]
    if not names:
        raise InputError(f"--only {args.only}: none of {', '.join(VARIANTS)}")
    rows = []
    with setting(args.run) as given:
        ours, theirs = Ours(given), Theirs(given, torch.float32)
        judge = Theirs(given, torch.float64)
        spread = np.abs(judge.ratios() - 1)
        plain = measured(judge, variant_config(given.config, {}), 0)
        for name in names:
            config = variant_config(given.config, VARIANTS[name])
            results = (measured(side, config, args.updates) for side in (ours, theirs, judge))
            rows.append(compared(name, *results, plain))
            print(name, file=sys.stderr)
            jax.clear_caches()  # kept, those of 22 variants ended in "Cannot allocate memory"
    show(rows)
    if args.out:
        args.out.write_text(markdown(rows))
    else:
        print(markdown(rows))
    quantiles = {f"{q}": float(np.quantile(spread, q)) for q in (0.1, 0.5, 0.9, 0.99)}
    document = {
        "tokens": len(spread), "ratio_minus_1_quantiles": quantiles,
        "rows": [asdict(row) for row in rows], "problems": problems_of(rows),
    }  # fmt: skip
    print(json.dumps(document))
    return rows


def problems_of(rows: list[Row]) -> list[str]:
    return [problem for row in rows for problem in row.problems()]


def main() -> None:
    args = tyro.cli(Args)
    configure_jax()
    torch.set_num_threads(1)  # on products this small threads wait for each other most of the time
    with exit_status():
        if problems := problems_of(compare(args)):
            raise RunError("\n".join(problems))


if __name__ == "__main__":
    main()
