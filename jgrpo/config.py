"""Every option, once: name, default, meaning, unit. The command line is made from this file.

A config file is Python that defines `config = Config(...)`; a variant is `dataclasses.replace` of
another. It is executed, so treat one from a stranger as you would treat a program.
"""

import dataclasses
import difflib
import json
import os
import runpy
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jgrpo.checks import PROJECTIONS, VLLM_LORA_RANKS, problems_of
from jgrpo.errors import InputError

PATHS = ("model_id", "adapter", "prm_model_id", "dataset_path", "eval_dataset_path",
         "prompt_template", "pass_rate_file", "base_dir", "run_dir")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a run. Names and defaults are those of the PyTorch study where it has one."""

    # -- model and adapter
    model_id: str = "Qwen/Qwen3-1.7B"
    """Base model: a hub id, or a folder with config.json, *.safetensors and a tokenizer."""
    adapter: str = ""
    """Begin from this adapter (a PEFT folder, an SFT's say; a run folder is its last one's), whose
    rank, alpha and targets hold. Empty: a fresh one, which is the base."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Base weights and activations; norms, softmax, logsumexp, adapter and Adam stay float32.
    float16 rounds eight times finer than bfloat16, so that sampler and trainer agree better (Qi et
    al. 2025, arXiv 2510.26788), and ends at 65,504: a base that goes beyond is refused."""
    lora_r: int = 1
    """Rank of the adapter."""
    lora_alpha: float = 32
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] = PROJECTIONS
    """Which projections get an adapter."""

    # -- update
    lr: float = 9e-5
    """Adam's highest learning rate (betas 0.9, 0.999; eps 1e-8; global gradient norm <= 1)."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall so that it would be 0 after the run's last update. Counted
    are updates that are made: none where there is no gradient, or it is not finite."""
    warmup_steps: int = 0
    """Optimizer updates over which the learning rate rises linearly from 0."""
    n_grpo_steps: int = 50
    """Steps: one rollout of n_prompts_per_step x group_size completions each."""
    n_prompts_per_step: int = 32
    """Prompts sampled in a step."""
    group_size: int = 8
    """Completions of one prompt; advantages are relative to their group."""
    epochs_per_step: int = 1
    """Passes over each rollout (mu of the GRPO paper)."""
    updates_per_epoch: int = 1
    """Optimizer updates in a pass: the rollout is split into as many parts, by prompts. With more
    than one update on a rollout the ratio leaves 1, and clip and KL to the old policy matter."""
    micro_batch_size: int = 4
    """Bounds one forward and backward to as many tokens as this many completions have when they and
    their prompts are longest. A prompt is computed once for its completions, and short completions
    share rows. Changes memory and speed, not the gradient; --dry_run says what it takes."""
    attn_implementation: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention in training. cudnn is flash attention: on a GPU, with a dtype of 16 bits; its
    memory grows with the length, not with its square. auto: cudnn where it can be, else xla."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations: a fifth more
    time, for where --dry_run says that training would not fit."""
    fsdp: int = 1
    """Devices that share one copy of the base's layers, each holding a part of every kernel: for a
    base that does not fit on one. The devices there are form groups of so many; each device trains
    on micro-batches of its own (docs/scale.md)."""
    seed: int = 42
    """Seeds the adapter, the prompt order and the samples."""

    # -- loss and advantage
    loss_type: Literal["grpo", "dr_grpo", "gspo", "cispo", "rloo", "sapo", "dppo"] = "grpo"
    """grpo: a ratio a token, mean over completions of their token means (DeepSeekMath).
    dr_grpo: sum over tokens / (completions x max_tokens); take --no_std_norm with it.
    gspo: a ratio a completion, exp(mean log ratio). rloo: a ratio a completion, exp(sum log ratio).
    cispo: -stop_gradient(min(ratio, cispo_max_ratio)) A logprob, mean over tokens (MiniMax-M1).
    sapo: a soft gate in place of a clip. dppo: as grpo, without what has moved too far."""
    use_std_norm: bool = True
    """Divide a group's advantages by their standard deviation."""
    use_leave_one_out: bool = False
    """A = reward - mean of the others in the group (RLOO), in place of - mean of the group."""
    use_kl_penalty: bool = False
    """Add beta times a KL estimate, per token."""
    beta: float = 0.04
    """Weight of the KL penalty."""
    kl_to: Literal["old", "base", "start"] = "old"
    """KL to the policy at the start of the step (the study's), to the base model (adapter off), or
    to the adapter that the run began from (--adapter); the last two take a forward pass more."""
    use_weighted_kl: bool = False
    """Weigh the KL to base or start by the ratio, which makes k1 and k3 unbiased after the first
    update of a rollout too (DeepSeek-V3.2; TRL's default)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """k3 = e^d - d - 1, k1 = -d, k2 = d^2 / 2 (Schulman 2020), with d = log pi_other - log pi_of
    the samples; losses.py states the bias of each."""
    use_clip: bool = False
    """Clip the ratio to [1 - clip_eps, 1 + clip_eps_high] (PPO)."""
    clip_eps: float = 0.2
    """Lower width of the clip range."""
    clip_eps_high: float | None = None
    """Upper width of the clip range; None: clip_eps. Larger is DAPO's clip-higher."""
    clip_delta: float | None = None
    """Largest ratio where the advantage is negative, which the clip leaves unbounded (dual clip;
    TRL's delta); above 1 + clip_eps_high. None: no bound."""
    cispo_max_ratio: float = 5.0
    """Cap of CISPO's ratio, an absolute value (5: ScaleRL, Khatri et al. 2025)."""
    sapo_tau_positive: float = 1.0
    """SAPO's temperature where the advantage is positive."""
    sapo_tau_negative: float = 1.05
    """SAPO's temperature where it is not: higher fades sooner (1.0 and 1.05: Gao et al. 2025)."""
    dppo_max_difference: float = 0.15
    """How far a token's probability may move, the way that its advantage pushes, before DPPO trains
    it no more (0.15: Qi et al. 2026)."""
    use_token_level_loss: bool = False
    """Average over all tokens of the update (DAPO) instead of over completions."""
    use_importance_weights: bool | None = None
    """Weigh what is trained by pi_old / pi_sampler, for the gap between sampler and trainer, and
    for what an older policy has sampled. None: with rollouts_ahead, and not else."""
    importance_weight_cap: float = 2.0
    """Largest weight."""
    importance_weight_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"
    """A weight a token, or one a completion (of all its tokens together); what is above the cap is
    taken down to it (truncated importance sampling) or left out (masked)."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, per token (nats)."""
    mask_truncated_completions: bool = False
    """Do not train on completions that max_tokens cut off."""
    use_dynamic_sampling: bool = False
    """Replace prompts whose completions all got the same reward by others (DAPO)."""
    max_sampling_rounds: int = 4
    """Rollouts that dynamic sampling may spend on one step; then it takes what it has."""

    # -- reward
    use_length_penalty: bool = False
    """Add a penalty that falls to -1 as a completion nears expected_maximum_length (DAPO)."""
    expected_maximum_length: int = 1024
    """Completion tokens at which the length penalty reaches -1."""
    overlong_cache: int = 512
    """Tokens before expected_maximum_length at which the penalty starts."""
    use_prm: bool = False
    """Mix in the mean step score of a process reward model."""
    process_reward_weight: float = 0.5
    """w in reward = (1 - w) outcome + w process."""
    prm_model_id: str = "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B"
    """Process reward model: a hub id or folder of that layout (Qwen2.5 body, v_head.summary)."""
    prm_batch_size: int = 16
    """Completions that the process reward model scores at once."""
    reward_function: tuple[str, ...] = ()
    """Your own reward in place of the outcome, `file.py:function` or `module:function`; several
    are added up. Called as TRL calls its own, with what its signature takes of prompts,
    completions, completion_ids, gold, correct and the columns of the rows, a list each, it returns
    a number (or None: no reward of this kind) for each completion. It is code of yours and runs as
    such."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the reward functions, in their order; none: 1 each."""
    grader_timeout_s: float = 3.0
    """Seconds that checking one answer may take, counted from when its check starts."""
    grader_workers: int = 2
    """Processes that check answers."""

    # -- problems
    dataset_path: str = "qwedsacf/competition_math"
    """Hub id (`id:config` for one with configurations), .jsonl/.json/.parquet file, or folder; rows
    with problem+solution or question+answer."""
    problem_column: str = ""
    """Column of the problem: text, or a list of messages. Empty: problem, question, prompt or
    messages, whichever a row has."""
    answer_column: str = ""
    """Column of the answer; `a.b` is the field b of the column a. Empty: answer, the
    reward_model.ground_truth of verl, ground_truth, or a solution with a \\boxed{}."""
    dataset_split: str = ""
    """Training rows, as `train[:7500]`. Empty: all but the evaluation rows."""
    eval_dataset_path: str = ""
    """Evaluation problems; empty: taken from dataset_path."""
    eval_split: str = ""
    """Evaluation rows. Empty: a test split if there is one, else the last fifth of the rows (for
    competition_math the study's split: train[:7500] and train[-5000:])."""
    pass_rate: tuple[float, ...] = ()
    """Train on the problems that the base solves with a rate from the first to the second number,
    as 0.2 0.8; the rates are in pass_rate_file. None: on all."""
    pass_rate_file: str = "pass_rates.jsonl"
    """Pass rates of the training problems, written by jgrpo.filter."""
    prompt_template: str = "boxed.prompt"
    """File with {problem} in it; rows that are conversations are read without it."""
    system_prompt: str = ""
    """Text of a system turn before each problem, but for rows that bring one. Empty: none."""
    enable_thinking: bool = False
    """Passed to the chat template (Qwen3: let the model think between <think> tags)."""
    max_prompt_tokens: int = 1024
    """Problems with longer prompts are left out, and reported."""

    # -- sampling
    rollout: Literal["vllm", "jax"] = "vllm"
    """Sample from a vLLM server, or from the embedded sampler in this process."""
    vllm_url: str = "http://localhost:8000"
    """The server; several, comma-separated, share the prompts: the next one goes to the server with
    the fewest tokens outstanding."""
    vllm_timeout_s: float = 600.0
    """Seconds that one request may take, and for which a server that is away is waited for."""
    vllm_move_s: float = 60.0
    """Of several servers, one that has sent nothing for so many seconds is overtaken: its prompts
    go to the others too, with the same seeds, and the first answer is used, once."""
    rollouts_ahead: int = 0
    """Steps that sampling runs ahead: step k is sampled with adapter k - 1 - rollouts_ahead (or the
    first) while the steps before it are trained. 1 hides the shorter of the two times; the
    completions are then a step older, for which there are importance weights."""
    max_logprob_diff: float = 0.5
    """Largest |logprob of the server - logprob of the trainer| of one token that the probe before
    the first step accepts (float32: 1e-3 is normal; bfloat16: 0.1)."""
    max_mean_logprob_diff: float | None = None
    """Largest mean of that gap (nats) over the tokens that a step trains on; a step above it is
    not kept, and ends the run. None: 1e-3 in float32 (1e-6 is normal), 0.1 in bfloat16 (0.03),
    0.0125 in float16 (0.003)."""
    check_stale: bool = True
    """Tell the adapter that should have sampled from the one before it, on a group of each step, by
    a slope that 16-bit noise does not blur (`sampler/stale_slope`: 0 is right, 1 the one before);
    a server that stays behind ends the run."""
    max_tokens: int = 1024
    """Tokens of a completion at most."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""

    # -- run
    base_dir: str = "runs"
    """Runs are numbered folders in here."""
    run_dir: str = ""
    """This run's folder instead; must be new or empty."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl, one or several of tensorboard (a file in the run's
    folder), wandb and trackio (`pip install 'jgrpo[wandb]'`); none: to none."""
    show_every: int = 10
    """Steps between those of which the log shows a right and a wrong completion; 0: never."""
    project: str = "jgrpo"
    """The project of the run at wandb or trackio."""
    eval_every: int = 5
    """Steps between evaluations (also before the first and after the last); 0: never."""
    n_eval_prompts: int = 1000
    """Evaluation problems used."""
    eval_n_samples: int = 1
    """Completions of each evaluation problem; more than one need an eval_temperature, and give
    avg@n, pass@k and maj@k (estimators.py). Below 50 problems, 16 to 32 are the custom."""
    eval_temperature: float = 0.0
    """Sampling temperature of evaluations; 0: greedy."""
    eval_top_p: float = 1.0
    """Evaluations sample from the likeliest tokens alone that have this share of the probability
    (Qwen3's card: 0.6 and 0.95 where it thinks). Rollouts are always the policy's own."""
    checkpoint_every: int = 5
    """Steps between checkpoints (also before the first, at the end and on Ctrl-C)."""
    save_total_limit: int = 2
    """The last checkpoints that are kept."""
    checkpoint_keep_period: int = 0
    """Checkpoints of the steps that this divides are kept beside them, for good; 0: none."""

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, list):  # as JSON has it
            object.__setattr__(self, "lora_target_modules", tuple(self.lora_target_modules))
        for name in PATHS:  # a shell does not expand what follows a =
            if isinstance(value := getattr(self, name), str) and value.startswith("~"):
                object.__setattr__(self, name, os.path.expanduser(value))
        if isinstance(self.reward_function, str):  # one, or none
            one = (self.reward_function,) if self.reward_function else ()
            object.__setattr__(self, "reward_function", one)
        if self.report_to in ("none", ["none"], ("none",)):
            object.__setattr__(self, "report_to", ())
        if isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", (self.report_to,))
        for name in ("reward_function", "reward_weights", "report_to", "pass_rate"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if self.use_importance_weights is None and self.rollouts_ahead:
            object.__setattr__(self, "use_importance_weights", True)
        if problems := problems_of(self):
            raise InputError("bad config:\n" + "\n".join(f"  {p}" for p in problems))

    @property
    def n_completions_per_step(self) -> int:
        return self.n_prompts_per_step * self.group_size

    @property
    def updates_per_rollout(self) -> int:
        return self.epochs_per_step * self.updates_per_epoch

    @property
    def weights_of_rewards(self) -> tuple[float, ...]:
        return self.reward_weights or (1.0,) * len(self.reward_function)

    @property
    def n_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.n_grpo_steps * self.updates_per_rollout

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


SHIPPED = Path(__file__).with_name("configs")
"""The config files that come with the package: `--config tiny` finds them by name."""


def config_file(name: str | Path) -> Path:
    """A file as it is given, or the one of this name that comes with the package. A run folder is
    its config.json. InputError if there is neither."""
    file = Path(name).expanduser()
    if (file / "config.json").is_file() and (file / "metrics.jsonl").is_file():
        return file / "config.json"
    if file.is_file():
        return file
    known = sorted(f.stem for f in SHIPPED.glob("*.py"))
    if file.suffix in ("", ".py") and file.stem in known and file.parent.name in ("", "configs"):
        return SHIPPED / f"{file.stem}.py"
    near = difflib.get_close_matches(file.stem, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"--config {name}: no such file, and none of {', '.join(known)}{hint}")


def config_of_run(file: Path) -> Config:
    """The options in a run's config.json. InputError if it is not one of this version's."""
    own = "a config of your own is Python that defines `config = jgrpo.config.Config(...)`"
    try:
        saved = json.loads(file.read_text("utf-8"))["config"]
        odd = sorted(saved.keys() ^ {f.name for f in dataclasses.fields(Config)})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f'{file}: not the config.json of a run (no "config"): {error!r}; {own}'
        ) from error
    if odd:  # a field that is missing may have had another default
        raise InputError(f"{file} is of another version: it differs in {odd}; {own}")
    try:
        return Config(**saved)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def load_config(file: str | Path) -> Config:
    """The `config` of a config file (which is run), of one that comes with the package (by its
    name), or of a run's config.json. Raises InputError if there is none."""
    file = config_file(file)
    if file.suffix == ".json":
        return config_of_run(file)
    try:
        config = runpy.run_path(str(file)).get("config")
    except InputError as error:
        raise InputError(f"--config {file}: {error}") from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""
        raise InputError(f"--config {file}{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(f"--config {file}: must define `config = jgrpo.config.Config(...)`")
    return config
