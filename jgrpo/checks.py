"""What the values of a Config must satisfy, alone and together: an error for what cannot be, a
warning for what cannot change anything."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from types import UnionType
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
POSITIVE = (
    *("lora_r", "lora_alpha", "lr", "n_grpo_steps", "n_prompts_per_step", "group_size"),
    *("epochs_per_step", "micro_batch_size", "fsdp", "expected_maximum_length", "grader_timeout_s"),
    *(
        "grader_workers",
        "max_prompt_tokens",
        "vllm_timeout_s",
        "vllm_move_s",
        "max_logprob_diff",
        "max_tokens",
    ),
    *(
        "temperature",
        "n_eval_prompts",
        "eval_n_samples",
        "checkpoint_every",
        "save_total_limit",
        "updates_per_epoch",
    ),
    *("cispo_max_ratio", "importance_weight_cap", "max_sampling_rounds", "prm_batch_size"),
    *("sapo_tau_positive", "sapo_tau_negative", "dppo_max_difference"),
)
TRACKERS = ("tensorboard", "wandb", "trackio")
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_GRADER_WORKERS = 256
INSTEAD_OF_A_CLIP = {
    "cispo": "CISPO caps its ratio by cispo_max_ratio",
    "sapo": "SAPO has a soft gate, sapo_tau_positive and sapo_tau_negative",
    "dppo": "DPPO bounds how far a probability moves, dppo_max_difference",
}

Condition = tuple[Callable[[Any], bool], str]
_CLIP: Condition = lambda c: c.use_clip, "with --use_clip"
_KL: Condition = lambda c: c.use_kl_penalty and c.beta > 0, "with --use_kl_penalty and beta > 0"
_TO_REF: Condition = (
    lambda c: c.use_kl_penalty and c.beta > 0 and c.kl_to != "old",
    "with --use_kl_penalty, beta > 0 and --kl_to base or start",
)
_WEIGHTS: Condition = lambda c: bool(c.use_importance_weights), "with --use_importance_weights"
_LENGTH: Condition = lambda c: c.use_length_penalty, "with --use_length_penalty"
_PRM: Condition = lambda c: c.use_prm, "with --use_prm"
_VLLM: Condition = lambda c: c.rollout == "vllm", "with --rollout vllm"
_SAPO: Condition = lambda c: c.loss_type == "sapo", "with --loss_type sapo"
READ_WHERE: dict[str, Condition] = {
    "beta": (lambda c: c.use_kl_penalty, "with --use_kl_penalty"),
    "kl_to": _KL,
    "kl_estimator": _KL,
    "use_weighted_kl": _TO_REF,
    "clip_eps": _CLIP,
    "clip_eps_high": _CLIP,
    "clip_delta": _CLIP,
    "cispo_max_ratio": (lambda c: c.loss_type == "cispo", "with --loss_type cispo"),
    "sapo_tau_positive": _SAPO,
    "sapo_tau_negative": _SAPO,
    "dppo_max_difference": (lambda c: c.loss_type == "dppo", "with --loss_type dppo"),
    "use_token_level_loss": (
        lambda c: c.loss_type != "cispo",
        "without --loss_type cispo, which averages over tokens by itself",
    ),
    "importance_weight_cap": _WEIGHTS,
    "importance_weight_mode": _WEIGHTS,
    "max_sampling_rounds": (lambda c: c.use_dynamic_sampling, "with --use_dynamic_sampling"),
    "expected_maximum_length": _LENGTH,
    "overlong_cache": _LENGTH,
    "process_reward_weight": _PRM,
    "prm_model_id": _PRM,
    "prm_batch_size": _PRM,
    "reward_weights": (lambda c: bool(c.reward_function), "with --reward_function"),
    "vllm_url": _VLLM,
    "vllm_timeout_s": _VLLM,
    "check_stale": _VLLM,
    "vllm_move_s": (
        lambda c: c.rollout == "vllm" and len(c.vllm_urls) > 1,
        "with several servers in --vllm_url",
    ),
    "pass_rate_file": (lambda c: bool(c.pass_rate), "with --pass_rate, and by jgrpo.filter"),
    "project": (
        lambda c: bool({"wandb", "trackio"} & {*c.report_to}),
        "with --report_to wandb or trackio",
    ),
    "base_dir": (lambda c: not c.run_dir, "without --run_dir"),
}
"""Option -> when something reads it, and that in words; all others are read by every training."""
ASKED_BY_EVALUATION = frozenset(
    {"model_id", "dtype", "rollout", "max_tokens", "max_prompt_tokens", "dataset_path",
     "dataset_split", "eval_dataset_path", "eval_split", "n_eval_prompts", "prompt_template",
     "enable_thinking", "eval_n_samples", "eval_temperature", "eval_top_p"}
)  # fmt: skip
"""What is asked, and how: policies that are compared must have it in common."""
READ_BY_EVALUATION = ASKED_BY_EVALUATION | {
    "lora_r", "lora_alpha", "lora_target_modules", "attn_implementation", "seed", "vllm_url",
    "vllm_timeout_s", "vllm_move_s", "grader_timeout_s", "grader_workers", "n_prompts_per_step",
    "group_size",
}  # fmt: skip


def problems_of(c: Any) -> list[str]:
    """All that is wrong with a Config, a line each; types first, since values rely on them."""
    return list(_wrong_types(c)) or list(_wrong_values(c))


def _wrong_types(c: Any) -> Iterator[str]:
    """Yield one line for each field that is of another type: field, value, requirement."""
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if get_origin(field.type) is Literal:
            choices = get_args(field.type)
            if value not in choices:
                yield f"{field.name}={value!r}: must be one of {', '.join(choices)}"
        elif not _is_a(value, field.type):
            kind = getattr(field.type, "__name__", None) or field.type
            yield f"{field.name}={value!r}: must be of type {kind}"


def _wrong_values(c: Any) -> Iterator[str]:
    """Yield one line for each field whose value cannot work: field, value, requirement."""
    for kind in (
        _out_of_range, _wrong_in_the_loss, _wrong_in_the_rewards, _wrong_in_the_update,
        _without_meaning, _wrong_in_the_data, _wrong_at_the_server,
    ):  # fmt: skip
        yield from kind(c)


def _out_of_range(c: Any) -> Iterator[str]:
    for name in POSITIVE:
        if not 0 < (value := getattr(c, name)) < float("inf"):
            yield f"{name}={value!r}: must be {'finite' if value > 0 else 'positive'}"
        elif isinstance(value, int) and value >= 2**31:
            yield f"{name}={value!r}: must be below 2**31"
    for name in ("seed", "eval_every", "beta", "overlong_cache", "warmup_steps", "entropy_coef",
                 "checkpoint_keep_period", "show_every", "rollouts_ahead"):  # fmt: skip
        if not 0 <= getattr(c, name) < 2**31:
            yield f"{name}={getattr(c, name)!r}: must not be negative, and below 2**31"
    for field in dataclasses.fields(c):
        if isinstance(value := getattr(c, field.name), str) and "\0" in value:
            yield f"{field.name}={value!r}: must not hold a NUL"
    for name in ("model_id", "prm_model_id", "dataset_path", "prompt_template", "base_dir",
                 "project", "pass_rate_file"):  # fmt: skip
        if not getattr(c, name).strip():
            yield f"{name}={getattr(c, name)!r}: must not be empty (default: {_default(c, name)})"


def _wrong_in_the_loss(c: Any) -> Iterator[str]:
    if not 0 < c.clip_eps < 1:
        yield f"clip_eps={c.clip_eps}: must be between 0 and 1"
    if c.clip_eps_high is not None and not 0 < c.clip_eps_high < float("inf"):
        yield f"clip_eps_high={c.clip_eps_high}: must be positive, or None for clip_eps"
    upper = 1 + (c.clip_eps if c.clip_eps_high is None else c.clip_eps_high)
    if c.clip_delta is not None and not upper < c.clip_delta < float("inf"):
        yield f"clip_delta={c.clip_delta}: must be above 1 + clip_eps_high = {upper:g}, or None"


def _wrong_in_the_rewards(c: Any) -> Iterator[str]:
    if c.grader_workers > MAX_GRADER_WORKERS:
        yield f"grader_workers={c.grader_workers}: must be at most {MAX_GRADER_WORKERS} (processes)"
    if c.group_size == 1:
        yield "group_size=1: a group of one has no advantage; use 2 or more"
    if not 0 <= c.process_reward_weight <= 1:
        yield f"process_reward_weight={c.process_reward_weight}: must be between 0 and 1"
    for spec in c.reward_function:
        if not all(spec.rpartition(":")[::2]):
            yield f"reward_function={spec!r}: must be file.py:function or module:function"
    if c.reward_function and len(c.weights_of_rewards) != len(c.reward_function):
        yield (
            f"reward_weights={c.reward_weights}: {len(c.reward_weights)} for "
            f"{len(c.reward_function)} in reward_function; give one for each"
        )
    if not all(math.isfinite(w) for w in c.reward_weights):
        yield f"reward_weights={c.reward_weights}: must be finite"
    if c.overlong_cache > c.expected_maximum_length:
        yield (
            f"overlong_cache={c.overlong_cache}: must not exceed "
            f"expected_maximum_length={c.expected_maximum_length}"
        )


def _wrong_in_the_update(c: Any) -> Iterator[str]:
    if c.updates_per_epoch > 0 and c.n_prompts_per_step % c.updates_per_epoch:
        yield (
            f"updates_per_epoch={c.updates_per_epoch}: must divide "
            f"n_prompts_per_step={c.n_prompts_per_step}"
        )
    if c.warmup_steps >= c.n_updates > 0:
        yield f"warmup_steps={c.warmup_steps}: must be below the {c.n_updates} updates of the run"
    if c.attn_implementation == "cudnn" and c.dtype == "float32":
        yield "attn_implementation=cudnn: needs dtype=bfloat16 or float16, not float32"
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


def _wrong_in_the_data(c: Any) -> Iterator[str]:
    """Problems, evaluation, and where results go."""
    if not 0 <= c.eval_temperature < float("inf"):
        yield f"eval_temperature={c.eval_temperature}: must be 0 (greedy) or positive"
    if not 0 < c.eval_top_p <= 1:
        yield f"eval_top_p={c.eval_top_p}: must be above 0 and at most 1"
    if c.eval_n_samples > 1 and c.eval_temperature == 0:
        yield (
            f"eval_n_samples={c.eval_n_samples} with eval_temperature=0: greedy completions are "
            "all the same; give an eval_temperature (0.6, say)"
        )
    if c.pass_rate and not (len(c.pass_rate) == 2 and 0 <= c.pass_rate[0] <= c.pass_rate[1] <= 1):
        yield f"pass_rate={c.pass_rate!r}: must be two numbers between 0 and 1, the lower one first"
    if {*c.report_to} - {*TRACKERS} or len({*c.report_to}) < len(c.report_to):
        yield f"report_to={c.report_to!r}: name each of {', '.join(TRACKERS)} at most once, or none"


def _wrong_at_the_server(c: Any) -> Iterator[str]:
    if c.max_mean_logprob_diff is not None and not 0 < c.max_mean_logprob_diff < float("inf"):
        yield f"max_mean_logprob_diff={c.max_mean_logprob_diff}: must be positive, or None"
    if "@" in c.vllm_url:  # not shown: what stands before it is a secret
        yield (
            "vllm_url: must not hold a user or password, which config.json and logs would keep; "
            "give the server's API key as VLLM_API_KEY in the environment"
        )
    if c.rollout == "vllm":
        if c.lora_r > VLLM_LORA_RANKS[-1]:
            yield f"lora_r={c.lora_r}: vLLM admits at most {VLLM_LORA_RANKS[-1]}; or --rollout jax"
        for url in c.vllm_urls:
            if not _is_address(url) and "@" not in c.vllm_url:
                yield (
                    f"vllm_url={c.vllm_url!r}: {url!r} must be http://HOST:PORT or https://..., "
                    "without /v1"
                )


def _without_meaning(c: Any) -> Iterator[str]:
    """Yield one line for each pair of techniques that contradict each other."""
    if c.use_clip and c.loss_type in INSTEAD_OF_A_CLIP:
        yield f"use_clip with loss_type={c.loss_type}: {INSTEAD_OF_A_CLIP[c.loss_type]} instead"
    if c.loss_type in ("dr_grpo", "rloo") and c.use_token_level_loss:
        divisor = "a constant" if c.loss_type == "dr_grpo" else "the number of completions"
        yield (
            f"use_token_level_loss with loss_type={c.loss_type}: it divides by {divisor}, not by "
            "the number of tokens; take one of the two"
        )
    by_token = c.use_importance_weights and c.importance_weight_mode.startswith("token")
    if c.loss_type in ("gspo", "rloo") and by_token:
        yield (
            f"use_importance_weights with loss_type={c.loss_type}: the weights are per token, and "
            "it has one ratio a completion; take importance_weight_mode=sequence_truncate"
        )
    if c.rollouts_ahead and c.use_importance_weights is False:
        yield (
            f"rollouts_ahead={c.rollouts_ahead} with use_importance_weights=False: the completions "
            "are an older policy's, and without the weights its gradient would be taken for that "
            "of the policy that is trained; leave use_importance_weights away"
        )
    if c.rollouts_ahead > 0 and c.rollout == "jax" and c.fsdp > 1:
        yield (
            f"rollouts_ahead={c.rollouts_ahead} with rollout=jax and fsdp={c.fsdp}: sampling and "
            "training gather kernels at the same time, and could wait for each other for ever; "
            "take --rollout vllm"
        )
    if 0 < c.n_grpo_steps <= c.rollouts_ahead:
        yield (
            f"rollouts_ahead={c.rollouts_ahead}: must be below n_grpo_steps={c.n_grpo_steps}, or "
            "all is sampled from the first adapter"
        )


def without_effect(c: Any) -> list[str]:
    """Warnings: techniques asked for that cannot change anything beside the other options."""
    warnings = []
    if c.updates_per_rollout == 1:
        inert = ["use_clip"] * c.use_clip
        old_kl = c.use_kl_penalty and c.kl_to == "old" and c.kl_estimator != "k1"
        inert += ["use_kl_penalty (kl_to=old)"] * old_kl
        cap_binds_at_1 = c.cispo_max_ratio < 1
        inert += ["loss_type=cispo's cap"] * (c.loss_type == "cispo" and not cap_binds_at_1)
        inert += [f"loss_type={c.loss_type}'s bound"] * (c.loss_type in ("sapo", "dppo"))
        if inert:
            warnings.append(
                f"{' and '.join(inert)} cannot change anything with one update a rollout "
                "(epochs_per_step=1, updates_per_epoch=1): the update starts from the old "
                "policy, so every ratio is 1, nothing is clipped, and the KL has no gradient"
            )
    if c.rollouts_ahead and c.rollout == "jax":
        warnings.append(
            f"rollouts_ahead={c.rollouts_ahead} with rollout=jax gains little: sampling and "
            "training share the device and its memory; it is for --rollout vllm"
        )
    if c.eval_top_p < 1 and c.eval_temperature == 0:
        warnings.append(
            f"eval_top_p={c.eval_top_p} changes nothing with eval_temperature=0 (greedy)"
        )
    if _TO_REF[0](c) and c.kl_to == "start" and not c.adapter:
        warnings.append("kl_to=start is kl_to=base without an --adapter to begin from")
    if c.use_kl_penalty and c.beta == 0:
        warnings.append("use_kl_penalty changes nothing with beta=0")
    if c.use_kl_penalty and c.kl_estimator == "k1":
        if c.kl_to != "old" and not c.use_weighted_kl:
            when = "" if c.updates_per_rollout == 1 else ", at the first update of a rollout,"
            warnings.append(
                f"kl_estimator=k1 to the {c.kl_to} has{when} a gradient whose expectation is zero: "
                "it adds noise and pulls nowhere; k2 is unbiased there, and so is k1 with "
                "--use_weighted_kl"
            )
        elif c.kl_to == "old" and c.updates_per_rollout == 1:
            warnings.append(
                "kl_estimator=k1 to the old policy has, with one update a rollout, a gradient "
                "whose expectation is zero: it only adds noise"
            )
    if c.loss_type == "dr_grpo" and c.use_std_norm:
        warnings.append("loss_type=dr_grpo is without std in its paper: --no_std_norm")
    if c.loss_type == "rloo" and (c.use_std_norm or not c.use_leave_one_out):
        warnings.append(
            "loss_type=rloo is REINFORCE with the group's mean as it stands; RLOO is "
            "--use_leave_one_out --no_std_norm"
        )
    if c.use_length_penalty and c.max_tokens <= c.expected_maximum_length - c.overlong_cache:
        warnings.append(
            f"use_length_penalty changes nothing: the penalty starts above "
            f"{c.expected_maximum_length - c.overlong_cache} tokens, and max_tokens={c.max_tokens}"
        )
    return warnings + unread(c)


def unread(c: Any) -> list[str]:
    """Warnings: options that differ from their default, and that nothing reads beside the others;
    one line for all that wait for the same."""
    idle: dict[str, list[str]] = {}
    for name, (is_read, remedy) in READ_WHERE.items():
        if str(getattr(c, name)) != _default(c, name) and not is_read(c):
            idle.setdefault(remedy, []).append(name)
    return [f"{', '.join(names)}: read only {remedy}" for remedy, names in idle.items()]


def unread_by_evaluation(given: Iterable[str]) -> list[str]:
    """Of the options given to `evaluate`, those that only training reads, as a warning."""
    idle = [name for name in given if name not in READ_BY_EVALUATION]
    return [f"{', '.join(idle)}: evaluation does not read it; training does"] if idle else []


def _default(c: Any, name: str) -> str:
    return str(next(f.default for f in dataclasses.fields(c) if f.name == name))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # of the port, or of brackets
        return False
    return known and bool(parts.hostname) and not parts.path.rstrip("/").endswith("/v1")


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is_a(value, k) for k in get_args(kind))
    if kind is float:
        return isinstance(value, float) or (_is_a(value, int) and abs(value) < 2**1023)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, get_args(kind)[0]) for v in value)
    return isinstance(value, get_origin(kind) or kind)
