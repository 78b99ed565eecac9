"""What only a GPU can tell, in one command of at most eight minutes; the most important first.

    python benchmarks/gpu.py --out FOLDER              # on the card
    python benchmarks/gpu.py --out FOLDER --shape tiny # anywhere: does every part run?

FOLDER gets `results.jsonl`, a line after each part, so that a command that is cut off still tells;
`autotune.pb`, which kernels the autotuner chose for the update; `profile.tar.gz`, one update, for
Perfetto or TensorBoard; and `log.txt`. A part is a process of its own (peaks of memory do not mix),
and one that fails or takes too long is told and leaves the others alone.

    agreement   cuDNN's attention in bfloat16, XLA's in bfloat16 and in float32: loss, gradient norm
                and cosine on the same completions; and twice the same, bit for bit
    update      the matmul peak on random data; one update: seconds, share of that peak on useful
                operations, peak memory beside what --dry_run states; with the defaults, then others
    quickstart  configs/tiny.py with the embedded sampler: accuracy and time
    decode      the embedded sampler on 32 x 8 rows: seconds a token at several lengths
    profile     one update of the defaults
    torch       the study's PyTorch loop on the same rollout (speed.py)

Random weights in the shape of Qwen3-1.7B in bfloat16, 256 completions of up to 1,024 tokens with
realistic lengths. "Useful" operations are those that the loss needs and no more: 4 x parameters a
trained token (forward, and backward to the activations; the base is frozen), and attention within
each completion and to its prompt; the prompt's own tokens, padding and recomputation do not count.

Needs JAX for the device, flax, optax, orbax, transformers, tyro; torch and peft for the last part;
nothing from the network.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from speed import SHAPES, Shape, config_of, make_lines
from speed import Args as SpeedArgs
from transformers import AutoConfig

from jgrpo.config import Config
from jgrpo.policy.batch import Rows
from jgrpo.policy.lora import fresh_adapter, split, stacked_up
from jgrpo.policy.model import Decoder, ModelConfig
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.rollout.protocol import prompt_seeds
from jgrpo.run.device import free_memory
from jgrpo.run.memory import training_memory
from jgrpo.run.policy import Policy
from jgrpo.run.rundir import read_metrics
from jgrpo.run.sampler import sampled_at_once
from jgrpo.run.session import configure_jax
from jgrpo.study.compare import saved_rows
from jgrpo.update.learner import Learner, batches_of

ROOT = Path(__file__).parents[1]
PARTS = {"agreement": 90, "update": 200, "quickstart": 120, "decode": 120, "profile": 60,
         "torch": 180}  # fmt: skip
"""Seconds that each may take."""
TINY = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
SHAPE_OF = SHAPES | {"tiny": Shape(32, 64, 4, 4, TINY)}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "micro-batch 8": {"micro_batch_size": 8},
    "micro-batch 8, recomputed": {"micro_batch_size": 8, "gradient_checkpointing": True},
    "xla attention": {"attn_implementation": "xla"},
}


@dataclass
class Args:
    """Measure on this machine's GPU what only a GPU can tell."""

    out: Path
    """Folder for the results."""
    shape: Literal["tiny", "1.7b"] = "1.7b"
    """tiny: to try the script itself, on any machine."""
    parts: tuple[str, ...] = tuple(PARTS)
    minutes: float = 8.0
    """For all parts together."""
    repeats: int = 3
    """Timed updates of each setting, after the first."""


# -- what is measured on ---------------------------------------------------------------------------


def rollout_of(args: Args, **changes: Any) -> tuple[Config, Rows]:
    """The benchmark's config and rollout."""
    speed = SpeedArgs(shape=args.shape, lengths="realistic")
    shape = SHAPE_OF[args.shape]
    config = replace(config_of(speed, shape, Path("none")), **changes)
    lines = make_lines(speed, config, AutoConfig.for_model(**shape.model).vocab_size)
    return config, saved_rows(config, lines)


def model_config(args: Args) -> ModelConfig:
    return ModelConfig.from_hf(AutoConfig.for_model(**SHAPE_OF[args.shape].model))


def policy_of(args: Args, config: Config) -> Policy:
    """Random weights, the same bfloat16 numbers whatever the dtype, and an adapter whose B is not
    zero."""
    model = Decoder(
        model_config(args),
        rngs=nnx.Rngs(0), dtype=jnp.bfloat16, rank=config.lora_r,
        alpha=config.lora_alpha, target_modules=config.lora_target_modules,
    )  # fmt: skip
    graph, adapter, base = split(model)
    base = jax.tree.map(lambda x: x.astype(config.dtype), base)
    adapter = jax.tree.map(lambda x: x + 1e-3, fresh_adapter(adapter, 1))
    return Policy(graph, stacked_up([adapter]), base)


def learner_of(config: Config, policy: Policy) -> Learner:
    return Learner([config], policy.graph, policy.adapter, policy.base)


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


def peak_flops(dtype: Any) -> float:
    """Operations per second of a large matmul of random numbers (zeros or ones draw less power, and
    clocks rise): the best of a few."""
    sizes = (8192, 16384) if jax.default_backend() == "gpu" else (512,)
    best = 0.0
    for n in sizes:
        a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
        product = jax.jit(lambda a, b: a @ b)
        product(a, b).block_until_ready()
        for _ in range(3):
            start = time.perf_counter()
            results = [product(a, b) for _ in range(10)]
            jax.block_until_ready(results)
            best = max(best, 10 * 2 * n**3 / (time.perf_counter() - start))
    return best


# -- parts: what each yields is a line of results.jsonl --------------------------------------------


def agreement(args: Args):
    on_gpu = jax.default_backend() == "gpu"
    settings = {"xla, float32": ("xla", "float32"), "xla, bfloat16": ("xla", "bfloat16")}
    settings |= {"cudnn, bfloat16": ("cudnn", "bfloat16")} if on_gpu else {}
    found: dict[str, Any] = {}
    gradients = {}
    for name, (attention, dtype) in settings.items():
        config, rows = rollout_of(args, attn_implementation=attention, dtype=dtype)
        policy = policy_of(args, config)
        learner = learner_of(config, policy)
        n = min(16, len(rows.completions))
        batches = batches_of(config, rows, np.flatnonzero(rows.advantages)[:n])
        twice = [
            jax.device_get(learner.update.gradient(learner.adapters, learner.base, batches, 1.0))
            for _ in range(2)
        ]
        flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in twice]
        logprobs = np.concatenate([
            x[b.mask > 0] for x, b in zip(
                learner.update.logprobs(learner.adapters, learner.base, batches), batches,
                strict=True)
        ])  # fmt: skip
        gradients[name] = flat[0], logprobs
        found[name] = {"grad_norm": float(np.linalg.norm(flat[0])),
                       "twice_the_same_bits": bool(np.array_equal(*flat))}  # fmt: skip
    reference, exact = gradients["xla, float32"]
    for name, (gradient, logprobs) in gradients.items():
        norms = np.linalg.norm(gradient) * np.linalg.norm(reference)
        found[name]["cosine"] = float(gradient @ reference / norms)
        found[name]["mean_logprob_gap"] = float(np.abs(logprobs - exact).mean())
    yield found


def update(args: Args):
    peak = peak_flops(jnp.dtype(SHAPE_OF[args.shape].dtype))
    yield {"matmul_peak_tflops": peak / 1e12}
    for name, changes in VARIANTS.items():
        config, rows = rollout_of(args, **changes)
        policy = policy_of(args, config)
        lengths = [len(p) for p in rows.prompts]
        stated = training_memory([config], policy, lengths)
        learner, seconds = learner_of(config, policy), []
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            metrics = learner.learn({0: rows})[0]
            seconds.append(time.perf_counter() - start)
        flops = useful_flops(model_config(args), rows)
        stats = jax.devices()[0].memory_stats() or {}
        yield {
            "setting": name, "seconds": seconds[1:], "first_s": seconds[0],
            "grad_norm": metrics["train/grad_norm"], "trained_tokens": metrics["tokens/trained"],
            "useful_tflop": flops / 1e12, "share_of_peak": flops / median(seconds[1:]) / peak,
            "peak_gib_so_far": stats.get("peak_bytes_in_use", 0) / 2**30,
            "dry_run_gib": stated.total / 2**30,
        }  # fmt: skip
        del learner, policy


def quickstart(args: Args):
    steps = ["--n_grpo_steps", "2"] if args.shape == "tiny" else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jgrpo.train", "--config", str(ROOT / "configs/tiny.py"),
                   "--run_dir", f"{folder}/run", *steps]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        lines = read_metrics(Path(folder, "run"))
    accuracy = {x["step"]: x["eval/accuracy"] for x in lines if "eval/accuracy" in x}
    steps_s = [x["time/step"] for x in lines if "time/step" in x]
    gap = max(x["sampler/logprob_diff_max"] for x in lines if "sampler/logprob_diff_max" in x)
    yield {"seconds": time.perf_counter() - start, "accuracy": accuracy, "largest_gap": gap,
           "median_step_s": median(steps_s)}  # fmt: skip


def decode(args: Args):
    config, _ = rollout_of(args)
    policy = policy_of(args, config)
    free = free_memory()
    at_once = sampled_at_once(config, policy, free)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 500, (config.n_prompts_per_step, config.max_prompt_tokens // 2))
    for tokens in (config.max_tokens // 16, config.max_tokens // 4, config.max_tokens):
        sampler = JaxSampler(
            policy.graph, policy.adapter, policy.base, stop_token_ids=(2**30,), max_tokens=tokens,
            max_rows=at_once,
        )  # fmt: skip
        seconds = []
        for repeat in range(2):
            start = time.perf_counter()
            sampler.sample(
                prompts.tolist(), seeds=prompt_seeds(repeat, 1, len(prompts)),
                group_size=config.group_size,
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
        stats = jax.devices()[0].memory_stats() or {}
        yield {
            "tokens": tokens, "rows": config.n_completions_per_step, "rows_at_once": at_once,
            "first_s": seconds[0], "seconds": seconds[1], "ms_a_token": 1e3 * seconds[1] / tokens,
            "tokens_per_s": tokens * config.n_completions_per_step / seconds[1],
            "peak_gib_so_far": stats.get("peak_bytes_in_use", 0) / 2**30,
        }  # fmt: skip


def profile(args: Args):
    config, rows = rollout_of(args)
    learner = learner_of(config, policy_of(args, config))
    learner.learn({0: rows})
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            learner.learn({0: rows})
        file = args.out / "profile.tar.gz"
        with tarfile.open(file, "w:gz") as archive:
            archive.add(folder, arcname="profile")
    yield {"bytes": file.stat().st_size}


def torch(args: Args):
    shape = "tiny" if args.shape == "tiny" else args.shape
    command = [sys.executable, str(Path(__file__).with_name("speed.py")), "--shape", shape,
               "--lengths", "realistic", "--repeats", "1"]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    yield json.loads(done.stdout.splitlines()[-1])


# -- one after another -----------------------------------------------------------------------------


def work(args: Args) -> None:
    """A part, in the process that is its own."""
    configure_jax()
    for line in globals()[args.parts[0]](args):
        write(args, line)


def write(args: Args, line: dict[str, Any]) -> None:
    text = json.dumps({"part": args.parts[0], **line})
    print(text, flush=True)
    with (args.out / "results.jsonl").open("a") as file:
        file.write(text + "\n")


def environment(args: Args, part: str) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    if part == "update" and jax.default_backend() == "gpu":
        flags += f" --xla_gpu_dump_autotune_results_to={args.out.absolute() / 'autotune.pb'}"
    return os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def run(args: Args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    device, end = jax.devices()[0], time.monotonic() + 60 * args.minutes
    write(replace(args, parts=("machine",)), {  # type: ignore[arg-type]
        "device": device.device_kind, "backend": jax.default_backend(), "jax": jax.__version__,
        "client": device.client.platform_version,
    })  # fmt: skip
    for part in args.parts:
        left = min(PARTS[part], end - time.monotonic())
        command = [sys.executable, __file__, "work", "--out", str(args.out), "--shape", args.shape,
                   "--parts", part, "--repeats", str(args.repeats)]  # fmt: skip
        start = time.monotonic()
        with (args.out / "log.txt").open("a") as log:
            log.write(f"== {part}\n")
            log.flush()
            try:
                subprocess.run(command, env=environment(args, part), stderr=log, check=True,
                               timeout=max(1, left))  # fmt: skip
                problem = None
            except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
                problem = str(error).split(" ", 3)[-1][-60:]
        took = {"seconds_of_part": round(time.monotonic() - start, 1)}
        write(replace(args, parts=(part,)), took | ({"problem": problem} if problem else {}))


def main() -> None:
    if sys.argv[1:2] == ["work"]:
        work(tyro.cli(Args, args=sys.argv[2:], use_underscores=True))
    else:
        run(tyro.cli(Args, use_underscores=True))


if __name__ == "__main__":
    main()
