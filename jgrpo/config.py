"""Every option, once: name, default, meaning, unit. The command line is made from this file.

A config file is Python that defines `config = Config(...)`; a variant is `dataclasses.replace` of
another. It is executed, so treat one from a stranger as you would treat a program.
"""

import dataclasses
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jgrpo.errors import InputError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
POSITIVE = (
    *("lora_r", "lora_alpha", "lr", "n_grpo_steps", "n_prompts_per_step", "group_size"),
    *("epochs_per_step", "micro_batch_size", "expected_maximum_length", "grader_timeout_s"),
    *("grader_workers", "max_prompt_tokens", "vllm_timeout_s", "max_logprob_diff", "max_tokens"),
    *("temperature", "n_eval_prompts", "checkpoint_every"),
)
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a run. Names and defaults are those of the PyTorch study where it has one."""

    # -- model and adapter
    model_id: str = "Qwen/Qwen3-1.7B"
    """Base model: a hub id, or a folder with config.json, *.safetensors and a tokenizer."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Base weights and activations; norms, softmax, logsumexp, adapter and Adam stay float32."""
    lora_r: int = 1
    """Rank of the adapter."""
    lora_alpha: float = 32
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] = PROJECTIONS
    """Which projections get an adapter."""

    # -- the update
    lr: float = 9e-5
    """Adam's learning rate (constant; betas 0.9, 0.999; eps 1e-8; global gradient norm <= 1)."""
    n_grpo_steps: int = 50
    """Steps: one rollout of n_prompts_per_step x group_size completions each."""
    n_prompts_per_step: int = 32
    """Prompts sampled in a step."""
    group_size: int = 8
    """Completions of one prompt; advantages are relative to their group."""
    epochs_per_step: int = 1
    """Optimizer updates on each rollout (every one sees the whole rollout)."""
    micro_batch_size: int = 4
    """Completions in one forward and backward at the longest length bucket; shorter buckets hold
    as many more as give the same number of tokens. Changes memory and speed, not the gradient. A
    layer's attention takes micro_batch_size x heads x length^2 x 4 bytes a few times over."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass instead of keeping its activations."""
    seed: int = 42
    """Seeds the adapter, the prompt order and the samples."""

    # -- loss and advantage
    use_std_norm: bool = True
    """Divide a group's advantages by their standard deviation."""
    use_kl_penalty: bool = False
    """Add beta times the KL estimate to the old policy, per token."""
    beta: float = 0.04
    """Weight of the KL penalty."""
    use_clip: bool = False
    """Clip the ratio to [1 - clip_eps, 1 + clip_eps] (PPO)."""
    clip_eps: float = 0.2
    """Half-width of the clip range."""
    use_token_level_loss: bool = False
    """Average over all tokens of the update (DAPO) instead of over completions."""

    # -- reward
    use_length_penalty: bool = False
    """Add a penalty that falls to -1 as a completion nears expected_maximum_length (DAPO)."""
    expected_maximum_length: int = 1024
    """Completion tokens at which the length penalty reaches -1."""
    overlong_cache: int = 512
    """Tokens before expected_maximum_length at which the penalty starts."""
    grader_timeout_s: float = 3.0
    """Seconds that checking one answer may take, counted from when its check starts."""
    grader_workers: int = 2
    """Processes that check answers."""

    # -- problems
    dataset_path: str = "qwedsacf/competition_math"
    """Hub id (`id:config` for one with configurations), .jsonl/.json/.parquet file, or folder; rows
    with problem+solution or question+answer."""
    dataset_split: str = ""
    """Training rows, as `train[:7500]`. Empty: all but the evaluation rows."""
    eval_dataset_path: str = ""
    """Evaluation problems; empty: taken from dataset_path."""
    eval_split: str = ""
    """Evaluation rows. Empty: a test split if there is one, else the last fifth of the rows (for
    competition_math the study's split: train[:7500] and train[-5000:])."""
    prompt_template: str = "boxed.prompt"
    """File with {problem} in it."""
    enable_thinking: bool = False
    """Passed to the chat template (Qwen3: let the model think between <think> tags)."""
    max_prompt_tokens: int = 1024
    """Problems with longer prompts are left out, and reported."""

    # -- sampling
    rollout: Literal["vllm", "jax"] = "vllm"
    """Sample from a vLLM server, or from the embedded sampler in this process."""
    vllm_url: str = "http://localhost:8000"
    """The server; several, comma-separated, share the prompts."""
    vllm_timeout_s: float = 600.0
    """Seconds that one request may take, and for which a server that is away is waited for."""
    max_logprob_diff: float = 0.5
    """Largest |logprob of the server - logprob of the trainer| of one token that the probe before
    the first step accepts (float32: 1e-3 is normal; bfloat16: 0.1)."""
    max_tokens: int = 1024
    """Tokens of a completion at most."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts; evaluation is greedy."""

    # -- the run
    base_dir: str = "runs"
    """Runs are numbered folders in here."""
    run_dir: str = ""
    """This run's folder instead; must be new or empty."""
    eval_every: int = 5
    """Steps between evaluations (also before the first and after the last); 0: never."""
    n_eval_prompts: int = 1000
    """Evaluation problems used."""
    checkpoint_every: int = 5
    """Steps between checkpoints (also at the end and on Ctrl-C)."""

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, list):  # as JSON has it
            object.__setattr__(self, "lora_target_modules", tuple(self.lora_target_modules))
        if problems := list(_wrong_types(self)) or list(_wrong_values(self)):
            raise InputError("bad config:\n" + "\n".join(f"  {p}" for p in problems))

    @property
    def n_completions_per_step(self) -> int:
        return self.n_prompts_per_step * self.group_size

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return self.max_prompt_tokens + self.max_tokens

    @property
    def vllm_max_lora_rank(self) -> int:
        """The smallest rank vLLM admits for --max-lora-rank that holds lora_r."""
        return next(r for r in VLLM_LORA_RANKS if r >= self.lora_r)

    @property
    def vllm_urls(self) -> tuple[str, ...]:
        return tuple(url.strip().rstrip("/") for url in self.vllm_url.split(","))


def _wrong_types(c: Config) -> Iterator[str]:
    """Yield one line for each field that is of another type: field, value, requirement."""
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if get_origin(field.type) is Literal:
            choices = get_args(field.type)
            if value not in choices:
                yield f"{field.name}={value!r}: must be one of {', '.join(choices)}"
        elif not _is_a(value, field.type):
            yield f"{field.name}={value!r}: must be of type {getattr(field.type, '__name__', '')}"


def _wrong_values(c: Config) -> Iterator[str]:
    """Yield one line for each field whose value cannot work: field, value, requirement."""
    for name in POSITIVE:
        if not 0 < getattr(c, name) < float("inf"):
            yield f"{name}={getattr(c, name)!r}: must be positive"
    for name in ("seed", "eval_every", "beta", "overlong_cache"):
        if not 0 <= getattr(c, name) < 2**31:
            yield f"{name}={getattr(c, name)!r}: must not be negative, and below 2**31"
    if c.group_size == 1:
        yield "group_size=1: a group of one has no advantage; use 2 or more"
    if not 0 < c.clip_eps < 1:
        yield f"clip_eps={c.clip_eps}: must be between 0 and 1"
    if c.overlong_cache > c.expected_maximum_length:
        yield (
            f"overlong_cache={c.overlong_cache}: must not exceed "
            f"expected_maximum_length={c.expected_maximum_length}"
        )
    unknown = [m for m in c.lora_target_modules if m not in PROJECTIONS]
    if (
        unknown
        or not c.lora_target_modules
        or len(set(c.lora_target_modules)) < len(c.lora_target_modules)
    ):
        yield (
            f"lora_target_modules={c.lora_target_modules!r}: name each of "
            f"{', '.join(PROJECTIONS)} at most once, and at least one"
        )
    if c.rollout == "vllm":
        if c.lora_r > VLLM_LORA_RANKS[-1]:
            yield f"lora_r={c.lora_r}: vLLM admits at most {VLLM_LORA_RANKS[-1]}; or --rollout jax"
        for url in c.vllm_urls:
            if not url.startswith(("http://", "https://")):
                yield f"vllm_url={c.vllm_url!r}: {url!r} must start with http:// or https://"


def without_effect(c: Config) -> list[str]:
    """Warnings: techniques asked for that cannot change anything beside the other options."""
    warnings = []
    if c.epochs_per_step == 1 and (c.use_clip or c.use_kl_penalty):
        warnings.append(
            "use_clip and use_kl_penalty change nothing with epochs_per_step=1: the one update of "
            "a rollout starts from the policy that sampled it, so every ratio is 1, nothing is "
            "clipped, and the KL has no gradient"
        )
    if c.use_length_penalty and c.max_tokens <= c.expected_maximum_length - c.overlong_cache:
        warnings.append(
            f"use_length_penalty changes nothing: the penalty starts above "
            f"{c.expected_maximum_length - c.overlong_cache} tokens, and max_tokens={c.max_tokens}"
        )
    return warnings


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def load_config(file: str | Path) -> Config:
    """Run a config file and return its `config`. Raises InputError if it has none."""
    file = Path(file)
    if not file.is_file():
        raise InputError(f"--config {file}: no such file")
    try:
        config = runpy.run_path(str(file)).get("config")
    except InputError as error:
        raise InputError(f"--config {file}: {error}") from None
    except Exception as error:
        raise InputError(f"--config {file}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(f"--config {file}: must define `config = jgrpo.config.Config(...)`")
    return config
