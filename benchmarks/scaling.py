"""How the cost of the training phase grows: tokens/s against length, batch, rank and depth.

    python benchmarks/scaling.py [--repeats 3] [--out FOLDER]

Each point is one update of a random Llama-shaped model on random rollouts (all advantages non-zero,
all completions equally long), in one process, all points in turn. "predicted" is arithmetic alone:
the floating-point operations of each point at the rate that the first point reached. Last line: one
JSON document; --out gets scaling.md and scaling.png.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import jax
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure
from transformers import LlamaConfig

from jgrpo.cli import tune_allocator
from jgrpo.config import Config
from jgrpo.policy.batch import Rows
from jgrpo.policy.lora import split, stacked_up
from jgrpo.policy.model import Decoder, ModelConfig
from jgrpo.run.curves import COLOURS, GRID, INK
from jgrpo.run.session import configure_jax
from jgrpo.update.learner import Learner

GROUP_SIZE = 4


@dataclass(frozen=True)
class Point:
    """One measurement."""

    completion_tokens: int = 256
    n_completions: int = 8
    rank: int = 1
    n_layers: int = 4
    prompt_tokens: int = 64


SWEEPS = {
    "completion_tokens": (256, 512, 1024, 2048, 4096),
    "n_completions": (4, 8, 16, 32, 64),
    "rank": (1, 4, 16, 64),
    "n_layers": (2, 4, 8, 16),
}


@dataclass
class Args:
    """Measure how the training phase's cost grows."""

    repeats: int = 3
    """Timed turns of each point, after the first."""
    width: int = 384
    """Of the model; heads are of 64, the feed-forward width is 8/3 of it."""
    vocab_size: int = 8192
    out: Path | None = None
    """Folder for scaling.md and scaling.png."""


def model_config(args: Args, point: Point) -> ModelConfig:
    return ModelConfig.from_hf(LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.width, intermediate_size=args.width * 8 // 3,
        num_hidden_layers=point.n_layers, num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64, head_dim=64, tie_word_embeddings=True,
    ))  # fmt: skip


class Trainer:
    """One point's model and rollout; `learn` is one update."""

    def __init__(self, args: Args, point: Point):
        self.point, self.seconds = point, []
        config = Config(
            lora_r=point.rank, dtype="float32", gradient_checkpointing=True, max_prompt_tokens=64,
            max_tokens=point.completion_tokens, group_size=GROUP_SIZE,
            n_prompts_per_step=point.n_completions // GROUP_SIZE, micro_batch_size=4,
        )  # fmt: skip
        model = Decoder(
            model_config(args, point), rngs=nnx.Rngs(0), rank=point.rank, alpha=config.lora_alpha,
            target_modules=config.lora_target_modules,
        )  # fmt: skip
        graph, adapter, base = split(model)
        self.learner = Learner([config], graph, stacked_up([adapter]), base)
        rng = np.random.default_rng(0)
        ids = lambda n: rng.integers(args.vocab_size, size=n).tolist()  # noqa: E731
        n = point.n_completions
        prompts = [ids(point.prompt_tokens) for _ in range(n // GROUP_SIZE)]
        lengths = [point.completion_tokens] * n
        self.rows = Rows(
            [prompts[i // GROUP_SIZE] for i in range(n)],
            [ids(length) for length in lengths],
            [[0.0] * length for length in lengths],
            rng.normal(size=n).astype(np.float32),
        )

    def learn(self) -> None:
        start = time.perf_counter()
        self.learner.learn({0: self.rows})
        self.seconds.append(time.perf_counter() - start)

    @property
    def tokens(self) -> int:
        return self.point.n_completions * self.point.completion_tokens


def operations(args: Args, point: Point) -> float:
    """Floating-point operations of one update: each layer forward, forward again (recomputed) and
    backward to the activations; the adapter's own; attention over all that a row could see; the
    head on completion tokens, forward and backward."""
    d, f, layers, n = args.width, args.width * 8 // 3, point.n_layers, point.n_completions
    completion = n * point.completion_tokens
    tokens = completion + n // GROUP_SIZE * point.prompt_tokens
    matrices = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    dense = 3 * 2 * sum(a * b for a, b in matrices) * layers * tokens
    adapter = 4 * 2 * point.rank * sum(a + b for a, b in matrices) * layers * tokens
    sees = point.prompt_tokens + point.completion_tokens
    attention = 4 * 4 * d * layers * completion * sees
    head = 2 * 2 * d * args.vocab_size * completion
    return dense + adapter + attention + head


def measure(args: Args) -> dict[str, list[dict]]:
    """Every sweep's points: tokens/s, and those that arithmetic predicts."""
    base = Point()
    points = {base} | {
        replace(base, **{axis: value}) for axis, values in SWEEPS.items() for value in values
    }
    trainers = {point: Trainer(args, point) for point in sorted(points, key=repr)}
    for turn in range(args.repeats + 1):
        for trainer in trainers.values():
            trainer.learn()
        print(f"turn {turn} of {args.repeats} is over", flush=True)
    speed = {p: t.tokens / median(t.seconds[1:]) for p, t in trainers.items()}
    rate = operations(args, base) * speed[base] / trainers[base].tokens
    return {
        axis: [
            {
                axis: value,
                "tokens_per_s": speed[p],
                "predicted_tokens_per_s": rate * trainers[p].tokens / operations(args, p),
                "first_turn_s": trainers[p].seconds[0],
            }
            for value in values
            for p in [replace(base, **{axis: value})]
        ]
        for axis, values in SWEEPS.items()
    } | {"flops_per_s": rate}  # fmt: skip


def table(found: dict) -> str:
    lines = ["| what | value | tokens/s | predicted | measured / predicted |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for axis in SWEEPS:
        for row in found[axis]:
            measured, predicted = row["tokens_per_s"], row["predicted_tokens_per_s"]
            lines.append(f"| {axis} | {row[axis]} | {measured:,.0f} | {predicted:,.0f} "
                         f"| {measured / predicted:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(found: dict) -> Figure:
    figure = Figure(figsize=(11, 2.9), dpi=150, layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(SWEEPS)), SWEEPS, strict=True):
        x = [row[axis] for row in found[axis]]
        measured = [row["tokens_per_s"] for row in found[axis]]
        predicted = [row["predicted_tokens_per_s"] for row in found[axis]]
        axes.plot(x, predicted, color=INK, linewidth=1, linestyle=":", label="arithmetic")
        axes.plot(x, measured, color=COLOURS[0], marker="o", markersize=4, label="measured")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.15 * max(measured + predicted))
        axes.set_xticks(x, map(str, x))
        axes.set_title(axis.replace("_", " "), fontsize=9.5, color=INK, loc="left")
        axes.tick_params(labelsize=8, colors=INK, length=0)
        axes.grid(color=GRID, linewidth=0.7)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    figure.axes[0].set_ylabel("completion tokens/s", fontsize=9, color=INK)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    tune_allocator()
    args = tyro.cli(Args)
    configure_jax()
    found = measure(args)
    print(table(found))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "scaling.md").write_text(table(found))
        draw(found).savefig(args.out / "scaling.png")
    arguments = {k: str(v) for k, v in vars(args).items()}
    print(json.dumps(found | {"arguments": arguments, "device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    main()
