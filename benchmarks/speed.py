"""Speed and peak memory of the training phase, jgrpo against its peers, same rollout.

    python benchmarks/speed.py [--shape 135m] [--lengths realistic] [--peers torch trl] [--out FILE]

Each side is a process of its own that lives through all repeats and works when it is its turn, so
that neither thread pools nor memory are shared; the ratio is of neighbouring turns. The first turn
(compilation, first touch of memory) is reported apart. A peer runs in several environments, and its
fastest counts. Last line: one JSON document. Memory on the CPU is read from /proc: Linux only.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import tyro

from jgrpo.cli import KEEP_FREED_MEMORY
from jgrpo.config import Config, load_config
from jgrpo.errors import InputError, RunError, exit_status

ROOT = Path(__file__).parents[1]
SIDES = Path(__file__).with_name("speed_sides.py")
SIGNAL_FRACTION = 0.6
"""Groups with a signal in realistic rollouts."""
LOG_LENGTH_STD = 0.55
"""Of realistic completions: the mean is then about 0.4 of the longest of some dozens."""
SAME_WORK = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest relative difference of the gradient norms of the first turn."""


@dataclass(frozen=True)
class Shape:
    """A model, and the rollout that it is trained on."""

    prompt_tokens: int
    completion_tokens: int
    n_prompts: int
    group_size: int
    model: dict[str, Any] | None = None
    """Fields of a transformers config, for random weights; None: the shipped quick-start model."""
    dtype: str = "float32"
    needs_gpu: bool = False


LLAMA_135M = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "tie_word_embeddings": True, "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
QWEN3_1_7B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
SHAPES = {
    "tiny": Shape(64, 64, 16, 8),
    "135m": Shape(64, 192, 4, 4, LLAMA_135M),
    "1.7b": Shape(256, 1024, 32, 8, QWEN3_1_7B, "bfloat16", needs_gpu=True),
}
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
KEPT = {"GLIBC_TUNABLES": KEEP_FREED_MEMORY}
TORCH_ENVIRONMENTS = {
    "as it comes": {},
    "passive": PASSIVE,
    "passive, memory kept": PASSIVE | KEPT,
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""OpenMP's threads spin while they wait for each other, which costs a factor where other processes
want the cores too; the allocator's setting is the one that jgrpo starts itself with."""


@dataclass
class Args:
    """Time jgrpo and its peers in turn, on one update from the same rollout."""

    shape: Literal["tiny", "135m", "1.7b"] = "tiny"
    """tiny: configs/tiny.py, 128 completions. 135m: random weights in SmolLM2-135M's shape, 16
    completions. 1.7b: in Qwen3-1.7B's, bfloat16, 256 completions; wants a GPU."""
    lengths: Literal["full", "realistic"] = "full"
    """full: all rows equally long, all with a signal (the worst case for jgrpo). realistic:
    log-normal completions, prompts of half to full length, 40 % of the groups without a signal."""
    repeats: int = 5
    """Timed turns of each, after the first."""
    n_prompts: int = 0
    """Prompts of the rollout; 0: the shape's."""
    group_size: int = 0
    """Completions of a prompt; 0: the shape's."""
    micro_batch_size: int = 0
    """jgrpo's; 0: the config's."""
    gradient_checkpointing: bool | None = None
    """jgrpo's; None: the config's."""
    compilation_cache: Path | None = None
    """jgrpo's; None: a new one, so that its first turn and its peak memory include compilation."""
    peers: tuple[Literal["torch", "trl", "trl-defaults", "tunix", "tunix-defaults"], ...] = (
        "torch",
    )
    """torch: the study's loop (torch_baseline.py). trl: TRL's GRPOTrainer, version 1.16.0;
    trl-defaults: with its own micro-batch of 8 and gradient checkpointing. tunix: Tunix's
    rl.Trainer, version 0.1.7, for --shape 135m; tunix-defaults: the whole rollout at once."""
    torch_micro_batch_size: int = 2
    """The peers'; 2 is the study's, and the fastest for both on a CPU."""
    torch_environments: tuple[str, ...] = tuple(TORCH_ENVIRONMENTS)
    """Environments in which the peers are tried, on a machine without a GPU."""
    seed: int = 0
    """Of weights and rollout."""
    out: Path | None = None
    """File for a Markdown table; without it, stdout."""


# -- what is trained on ----------------------------------------------------------------------------


def config_of(args: Args, shape: Shape, model: Path) -> Config:
    """As a user would have it: configs/tiny.py, or the defaults with this model and these sizes."""
    base = load_config(ROOT / "configs" / "tiny.py") if shape.model is None else Config()
    changes: dict[str, Any] = {
        "model_id": base.model_id if shape.model is None else str(model),
        "dtype": shape.dtype,
        "max_prompt_tokens": shape.prompt_tokens,
        "max_tokens": shape.completion_tokens,
        "n_prompts_per_step": args.n_prompts or shape.n_prompts,
        "group_size": args.group_size or shape.group_size,
    }
    if args.micro_batch_size:
        changes["micro_batch_size"] = args.micro_batch_size
    if args.gradient_checkpointing is not None:
        changes["gradient_checkpointing"] = args.gradient_checkpointing
    return dataclasses.replace(base, **changes)


def random_model(config: Config, shape: Shape) -> tuple[Any, Any, Any]:
    """Structure, adapter and base of the shape's model, made here and not read from a folder."""
    from flax import nnx
    from transformers import AutoConfig

    from jgrpo.policy.lora import split
    from jgrpo.policy.model import Decoder, ModelConfig

    return split(Decoder(
        ModelConfig.from_hf(AutoConfig.for_model(**shape.model)), rngs=nnx.Rngs(0),
        rank=config.lora_r, alpha=config.lora_alpha, target_modules=config.lora_target_modules,
    ))  # fmt: skip


def make_lines(args: Args, config: Config, vocab_size: int) -> list[dict]:
    """A random rollout, as the lines of a rollouts file."""
    rng = np.random.default_rng(args.seed)
    n_groups, g, longest = config.n_prompts_per_step, config.group_size, config.max_tokens
    advantages = rng.normal(size=(n_groups, g))
    prompts = np.full(n_groups, config.max_prompt_tokens)
    lengths = np.full((n_groups, g), longest)
    if args.lengths == "realistic":
        prompts = rng.integers(config.max_prompt_tokens // 2, config.max_prompt_tokens, n_groups)
        lognormal = rng.lognormal(sigma=LOG_LENGTH_STD, size=(n_groups, g))
        lengths = np.ceil(lognormal / lognormal.max() * longest).astype(int)
        advantages[rng.permutation(n_groups)[round(SIGNAL_FRACTION * n_groups) :]] = 0
    lines = []
    for p in range(n_groups):
        prompt = rng.integers(5, vocab_size, prompts[p]).tolist()
        for i in range(g):
            lines.append({
                "prompt_ids": prompt,
                "token_ids": rng.integers(5, vocab_size, lengths[p, i]).tolist(),
                "sampler_logprobs": [-float(np.log(vocab_size))] * int(lengths[p, i]),
                "advantage": float(advantages[p, i]),
                "finish_reason": "length" if lengths[p, i] == longest else "stop",
            })  # fmt: skip
    return lines


def prepare(folder: Path, args: Args) -> list[dict]:
    """Write model/, adapter/, config.json and rollout.jsonl into `folder` -> the rollout."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape, model_folder = SHAPES[args.shape], folder / "model"
    config = config_of(args, shape, model_folder)
    torch.manual_seed(args.seed)
    if shape.model is None:
        model = AutoModelForCausalLM.from_pretrained(config.model_id)
    else:
        hf = AutoConfig.for_model(**shape.model)
        model = AutoModelForCausalLM.from_config(hf, dtype=getattr(torch, shape.dtype))
        model.save_pretrained(model_folder)
    vocab_size = model.config.vocab_size
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    lines = make_lines(args, config, vocab_size)
    (folder / "rollout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


# -- the sides, each in its own process ---------------------------------------------------------


class Side:
    """A process of one side; `turn` has it learn once, and waits."""

    def __init__(self, name: str, environment: dict[str, str], *arguments: str):
        inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        self.process = subprocess.Popen(
            [sys.executable, str(SIDES), name.split(",")[0], *arguments],
            env=inherited | environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.name, self.turns = name, []
        self.before_bytes = self.answer()["before_bytes"]

    def answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise RunError(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def turn(self) -> None:
        self.process.stdin.write("learn\n")
        self.process.stdin.flush()
        self.turns.append(self.answer())

    @property
    def seconds(self) -> list[float]:
        """Without the first turn."""
        return [turn["seconds"] for turn in self.turns[1:]]

    @property
    def peak_bytes(self) -> float:
        return max(turn["peak_bytes"] for turn in self.turns)

    def summary(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds, "first_turn_s": self.turns[0]["seconds"],
            "before_bytes": self.before_bytes, "peak_bytes": self.peak_bytes,
            "grad_norms": [turn["grad_norm"] for turn in self.turns],
        }  # fmt: skip

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# -- the comparison --------------------------------------------------------------------------------


def environments(args: Args, has_gpu: bool, folder: Path) -> dict[str, dict[str, str]]:
    """The sides, and what each finds in its environment."""
    ours = {"JAX_COMPILATION_CACHE_DIR": str(args.compilation_cache or folder / "xla")}
    if has_gpu:  # the other side needs memory too
        ours["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        return {"jgrpo": ours} | {peer: {} for peer in args.peers}
    kinds = args.torch_environments
    theirs = {f"{peer}, {kind}": TORCH_ENVIRONMENTS[kind] for peer in args.peers for kind in kinds}
    return {"jgrpo": KEPT | ours, **theirs}


def take_turns(sides: list[Side], repeats: int) -> None:
    for i in range(repeats + 1):
        for side in sides[i % len(sides) :] + sides[: i % len(sides)]:
            side.turn()
            print(f"{side.name}: {side.turns[-1]['seconds']:.2f} s", file=sys.stderr)


def ratios_to(ours: Side, side: Side) -> list[float]:
    """A side's time over ours, turn by turn."""
    return [t / j for j, t in zip(ours.seconds, side.seconds, strict=True)]


def markdown(args: Args, lines: list[dict], sides: list[Side], fastest: list[Side]) -> str:
    lengths = [len(line["prompt_ids"]) + len(line["token_ids"]) for line in lines]
    signal = np.mean([line["advantage"] != 0 for line in lines])
    rows = [
        f"{args.shape}, {args.lengths}: {len(lines)} completions, {sum(lengths)} tokens (longest "
        f"{max(lengths)}, mean {np.mean(lengths):.0f}), {signal:.0%} with a signal; "
        f"medians of {args.repeats}",
        "",
        "| side | time | first turn | time / jgrpo's | peak memory | of it training |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ours = sides[0]
    for side in sides:
        ratios = ratios_to(ours, side)
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        mark = " (its fastest)" if side in fastest else ""
        rows.append(
            f"| {side.name}{mark} | {median(side.seconds):.2f} s "
            f"| {side.turns[0]['seconds']:.1f} s | {ratio if side is not ours else '1'} "
            f"| {side.peak_bytes / 2**20:.0f} MiB "
            f"| {(side.peak_bytes - side.before_bytes) / 2**20:.0f} MiB |"
        )
    return "\n".join(rows) + "\n"


def compare(args: Args) -> bool:
    """Run it all; did all sides do the same work?"""
    shape, has_gpu = SHAPES[args.shape], any(Path("/dev").glob("nvidia[0-9]*"))
    if shape.needs_gpu and not has_gpu:
        raise InputError(f"--shape {args.shape} needs a GPU, and there is none; take 135m")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lines = prepare(folder, args)
        load = [os.getloadavg()[0]]
        arguments = str(folder), str(args.torch_micro_batch_size)
        found = environments(args, has_gpu, folder)
        sides = [Side(name, environment, *arguments) for name, environment in found.items()]
        for side in sides:
            stack.callback(side.close)
        take_turns(sides, args.repeats)
        load.append(os.getloadavg()[0])
    of_peers = [[side for side in sides if side.name.split(",")[0] == peer] for peer in args.peers]
    fastest = [min(kinds, key=lambda side: median(side.seconds)) for kinds in of_peers]
    ratios = {side.name: ratios_to(sides[0], side) for side in fastest}
    norms = [side.turns[0]["grad_norm"] for side in sides]
    same = max(abs(n / norms[0] - 1) for n in norms) < SAME_WORK[shape.dtype]
    table = markdown(args, lines, sides, fastest)
    if args.out:
        args.out.write_text(table)
    print(table)
    document = {
        "arguments": {k: str(v) for k, v in vars(args).items()}, "same_work": same,
        "n_cpus": os.cpu_count(), "load_before_after": load,
        "ratios": ratios, "ratio_medians": {name: median(r) for name, r in ratios.items()},
        "sides": {side.name: side.summary() for side in sides},
    }  # fmt: skip
    print(json.dumps(document))
    return same


def main() -> None:
    with exit_status():
        if not compare(tyro.cli(Args)):
            raise RunError("the gradient norms of the first turn differ: it was not the same work")


if __name__ == "__main__":
    main()
