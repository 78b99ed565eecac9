"""The training phase on a GPU: share of the matmul peak, memory, flash attention; one command.

    python benchmarks/gpu.py [--shape 1.7b] [--micro_batch_sizes 2 4 8] [--profile FOLDER]

Random weights in the shape of Qwen3-1.7B in bfloat16, 256 completions of up to 1,024 tokens with
realistic lengths. "Useful" operations are those that the loss needs and no more: 4 x parameters a
trained token (forward, and backward to the activations; the base is frozen), and attention within
each completion and to its prompt; the prompt's own tokens, padding and recomputation do not count.
The peak is measured on this card, with the largest matmul of the model. Then `speed.py` compares
with PyTorch on the same card. Last line: one JSON document.

Needs a GPU, the device's JAX, torch and PEFT, and nothing from the network. Not run yet: no machine
of this project had a GPU when it was written.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes, one card

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from speed import SHAPES, config_of, make_lines
from speed import Args as SpeedArgs
from transformers import AutoConfig

from jgrpo.config import Config
from jgrpo.errors import InputError, exit_status
from jgrpo.policy.batch import Rows
from jgrpo.policy.lora import split, stacked_up
from jgrpo.policy.model import Decoder, ModelConfig
from jgrpo.run.session import configure_jax
from jgrpo.study.compare import saved_rows
from jgrpo.update.learner import Learner


@dataclass
class Args:
    """Measure the training phase on this machine's GPU."""

    shape: Literal["135m", "1.7b"] = "1.7b"
    """As in speed.py."""
    micro_batch_sizes: tuple[int, ...] = (2, 4, 8)
    """Each is measured; the fastest counts."""
    gradient_checkpointing: tuple[bool, ...] = (False, True)
    """Likewise."""
    attn_implementation: tuple[Literal["cudnn", "xla"], ...] = ("cudnn", "xla")
    """Likewise."""
    repeats: int = 3
    profile: Path | None = None
    """Folder for a trace of one update of the fastest (for TensorBoard or Perfetto)."""
    against_torch: bool = True
    """Run speed.py too."""


def peak_flops(dtype: Any) -> float:
    """Operations per second of a large matmul, the best of a few shapes, 10 in a row."""
    best = 0.0
    for n in (8192, 16384):
        a = jnp.ones((n, n), dtype)
        product = jax.jit(lambda a, b: a @ b)
        b = product(a, a).block_until_ready()
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(10):
                b = product(a, a)
            b.block_until_ready()
            best = max(best, 10 * 2 * n**3 / (time.perf_counter() - start))
    return best


def useful_flops(model: ModelConfig, rows: Rows) -> float:
    """Of one update, as the module says."""
    heads = model.n_heads * model.head_width
    total = 0.0
    for prompt, completion, advantage in zip(
        rows.prompts, rows.completions, rows.advantages, strict=True
    ):
        if advantage:
            n, p = len(completion), len(prompt)
            attention = 3 * 4 * heads * model.n_layers * (n * p + n * n / 2)
            total += 4 * model.n_params * n + attention
    return total


def random_model(config: Config, hf: dict[str, Any]) -> Decoder:
    return Decoder(
        ModelConfig.from_hf(AutoConfig.for_model(**hf)),
        rngs=nnx.Rngs(0),
        dtype=jnp.dtype(config.dtype),
        rank=config.lora_r,
        alpha=config.lora_alpha,
        target_modules=config.lora_target_modules,
    )


def learner_of(config: Config, model: Decoder) -> Learner:
    graph, adapter, base = split(model)
    return Learner([config], graph, stacked_up([adapter]), base)


def measure(args: Args, config: Config, hf: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Seconds and peak memory of one setting. The peak of a process only ever grows, so settings
    that take less memory must come first."""
    model = random_model(config, hf)
    flops = useful_flops(model.config, rows)
    learner = learner_of(config, model)
    seconds = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        metrics = learner.learn({0: rows})[0]
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(metrics["train/grad_norm"])
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "micro_batch_size": config.micro_batch_size,
        "gradient_checkpointing": config.gradient_checkpointing,
        "attn_implementation": config.attn_implementation,
        "seconds": seconds[1:], "first_s": seconds[0],
        "useful_flops_per_s": flops / median(seconds[1:]),
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "trained_tokens_per_s": metrics["tokens/trained"] / median(seconds[1:]),
    }  # fmt: skip


def work(args: Args) -> None:
    """One process a setting, so that peaks of memory do not mix; this is such a process."""
    configure_jax()
    shape = SHAPES[args.shape]
    speed = SpeedArgs(shape=args.shape, lengths="realistic")
    config = replace(
        config_of(speed, shape, Path("none")),
        micro_batch_size=args.micro_batch_sizes[0],
        gradient_checkpointing=args.gradient_checkpointing[0],
        attn_implementation=args.attn_implementation[0],
    )
    assert shape.model is not None
    rows = saved_rows(config, make_lines(speed, config, shape.model["vocab_size"]))
    found = measure(args, config, shape.model, rows)
    if args.profile is not None:
        learner = learner_of(config, random_model(config, shape.model))
        learner.learn({0: rows})
        with jax.profiler.trace(str(args.profile)):
            learner.learn({0: rows})
    print(json.dumps(found))


def setting(args: Args, attention: str, size: int, checkpointing: bool) -> list[str]:
    """The command of a process that measures one setting."""
    values = {
        "shape": args.shape, "repeats": args.repeats, "attn_implementation": attention,
        "micro_batch_sizes": size, "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    return [sys.executable, __file__, "work", *words]


def run(args: Args) -> None:
    if jax.default_backend() != "gpu":
        raise InputError(f"JAX sees {jax.default_backend()} devices alone; this needs a GPU")
    peak = peak_flops(jnp.dtype(SHAPES[args.shape].dtype))
    print(f"matmul peak: {peak / 1e12:.0f} TFLOP/s on {jax.devices()[0].device_kind}", flush=True)
    found = []
    settings = product(
        args.attn_implementation, args.micro_batch_sizes, args.gradient_checkpointing
    )
    for attention, size, checkpointing in settings:
        name = f"{attention}, micro_batch_size {size}, checkpointing {checkpointing}"
        command = setting(args, attention, size, checkpointing)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: failed (memory?)", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        found.append(row | {"share_of_peak": row["useful_flops_per_s"] / peak})
        print(f"{name}: {median(row['seconds']):.2f} s, {found[-1]['share_of_peak']:.1%} of the "
              f"peak, {(row['peak_bytes'] or 0) / 2**30:.1f} GiB", flush=True)  # fmt: skip
    if args.profile is not None and found:
        best = max(found, key=lambda row: row["share_of_peak"])
        wanted = ("attn_implementation", "micro_batch_size", "gradient_checkpointing")
        command = setting(args, *(best[name] for name in wanted))
        subprocess.run([*command, "--profile", str(args.profile)], stdout=subprocess.PIPE)
    if args.against_torch:
        command = [sys.executable, str(Path(__file__).with_name("speed.py")), "--shape", args.shape,
                   "--lengths", "realistic", "--repeats", str(args.repeats)]  # fmt: skip
        subprocess.run(command)
    print(json.dumps({"peak_flops_per_s": peak, "settings": found}))


def main() -> None:
    with exit_status():
        if sys.argv[1:2] == ["work"]:
            work(tyro.cli(Args, args=sys.argv[2:], use_underscores=True))
        else:
            run(tyro.cli(Args, use_underscores=True))


if __name__ == "__main__":
    main()
