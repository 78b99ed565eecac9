"""How far a step of Adam may go at each rank: the picture and table of docs/study.md.

    python benchmarks/step_size.py SWEEP docs/study/step_size.png

SWEEP is the folder of an `ablate runs` whose variants differ in rank and learning rate. Accuracy is
greedy, on the evaluation problems, after the last step. With two seeds or more a band is Student's
t, 95 %. The second table has how far the first update moves the weights: B is zero before, so all
learning rates of a rank give the same figure.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from jgrpo.run.curves import COLOURS, GRID, INK
from jgrpo.run.rundir import adapter_folder, read_config, read_metrics
from jgrpo.study.report import Interval, table

Point = tuple[int, float, int]
"""rank, learning rate, alpha"""


def read_sweep(sweep: Path) -> dict[Point, list[float]]:
    """The final accuracy of each seed's run; runs without one are left out, and told."""
    found = defaultdict(list)
    for folder in sorted(f.parent for f in sweep.glob("*/seed_*/config.json")):
        c = read_config(folder)["config"]
        last = [row for row in read_metrics(folder) if row["step"] == c["n_grpo_steps"]]
        accuracy = [row["eval/accuracy"] for row in last if "eval/accuracy" in row]
        if accuracy:
            found[c["lora_r"], c["lr"], c["lora_alpha"]].append(accuracy[0])
        else:
            print(f"left out, not finished: {folder}", file=sys.stderr)
    return dict(found)


def first_movement(sweep: Path) -> dict[int, float]:
    """rank -> Frobenius norm of alpha / r x B A after step 1, over lr x alpha; mean of the runs."""
    found = defaultdict(list)
    for folder in sorted(f.parent for f in sweep.glob("*/seed_*/config.json")):
        c = read_config(folder)["config"]
        file = adapter_folder(folder, 1) / "adapter_model.safetensors"
        if file.is_file():
            arrays = load_file(file)
            pairs = [(arrays[k.replace("lora_A", "lora_B")], arrays[k]) for k in arrays
                     if "lora_A" in k]  # fmt: skip
            moved = math.hypot(*(float(np.linalg.norm(b @ a)) for b, a in pairs))
            found[c["lora_r"]].append(moved / c["lora_r"] / c["lr"])
    return {rank: float(np.mean(values)) for rank, values in sorted(found.items())}


def draw(found: dict[Point, list[float]]) -> Figure:
    """Accuracy against lr, and against lr x alpha / r: a line a rank."""
    figure = Figure(figsize=(8.4, 3.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axis = {"lr x alpha": lambda r, lr, alpha: lr * alpha,
            "lr x alpha / r": lambda r, lr, alpha: lr * alpha / r}  # fmt: skip
    for axes, (label, of) in zip(panels, axis.items(), strict=True):
        for colour, rank in zip(COLOURS, sorted({p[0] for p in found}), strict=False):
            points = sorted(p for p in found if p[0] == rank)
            x = [of(*p) for p in points]
            at = [Interval.of(found[p]) for p in points]
            mean, half = np.array([a.mean for a in at]), np.nan_to_num([a.half for a in at])
            axes.plot(x, mean, "o-", color=colour, linewidth=1.6, markersize=3.5,
                      label=f"rank {rank}")  # fmt: skip
            low, high = np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel(label, fontsize=9, color=INK)
        axes.tick_params(labelsize=8, colors=INK, length=0)
        axes.grid(color=GRID, linewidth=0.7)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    panels[0].set_ylabel("accuracy after the last step", fontsize=9, color=INK)
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    sweep, picture = map(Path, sys.argv[1:])
    found = read_sweep(sweep)
    draw(found).savefig(picture)
    ranks = sorted({p[0] for p in found})
    seeds = sorted({len(v) for v in found.values()})
    print(f"seeds: {' to '.join(map(str, {seeds[0], seeds[-1]}))}\n")
    rows = []
    for lr, alpha in sorted({p[1:] for p in found}):
        at = [found.get((r, lr, alpha)) for r in ranks]
        rows.append([f"{lr:g}", *(Interval.of(a) if a else "" for a in at)])
    print(table(["lr", *(f"rank {r}, %" for r in ranks)], rows))
    moved = first_movement(sweep)
    print(table([f"rank {r}" for r in moved], [[f"{v:.1f}" for v in moved.values()]]))


if __name__ == "__main__":
    main()
