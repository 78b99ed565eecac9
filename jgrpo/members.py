"""Runs side by side: what the members of a population share, and what is each one's own.

Members are trained over one base, in one process, from the same loop; a lone run is a population of
one. Each is a Config of its own.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jgrpo.config import Config
from jgrpo.errors import InputError

OWN = frozenset(
    {
        *("seed", "lr", "lr_scheduler_type", "warmup_steps", "lora_r", "lora_alpha", "adapter"),
        # the loss, and which completions it sees how often
        *("loss_type", "use_std_norm", "use_leave_one_out", "use_kl_penalty", "beta", "kl_to"),
        *("use_weighted_kl", "kl_estimator", "use_clip", "clip_eps", "clip_eps_high", "clip_delta"),
        *("cispo_max_ratio", "sapo_tau_positive", "sapo_tau_negative", "dppo_max_difference"),
        *("use_token_level_loss", "use_importance_weights", "importance_weight_cap"),
        *("importance_weight_mode", "entropy_coef", "mask_truncated_completions"),
        *("epochs_per_step", "updates_per_epoch", "use_dynamic_sampling", "max_sampling_rounds"),
        # the rewards
        *("use_length_penalty", "expected_maximum_length", "overlong_cache", "use_prm"),
        *("process_reward_weight", "prm_model_id", "prm_batch_size"),
        *("reward_function", "reward_weights"),
        # where it is written, and what is told of it
        *("base_dir", "run_dir", "report_to", "project", "show_every"),
        *("checkpoint_keep_period", "max_mean_logprob_diff"),
    }
)
"""Options in which members may differ. All others they share: the base, its dtype and targets; the
problems, prompts and group size of a step; lengths, temperature, steps, evaluations, the sampler.
"""


def shared_options(config: Config) -> dict[str, Any]:
    """What a config says of all that members share, in the order of config.py."""
    return {f.name: getattr(config, f.name) for f in fields(Config) if f.name not in OWN}


def differing(configs: Sequence[Config]) -> list[str]:
    """The options that members must share and do not."""
    first, *others = map(shared_options, configs)
    return [name for name, value in first.items() if any(c[name] != value for c in others)]


def check_together(configs: Sequence[Config]) -> None:
    """InputError if these cannot be trained side by side."""
    if odd := differing(configs):
        values = [
            f"{name}: {', '.join(dict.fromkeys(repr(getattr(c, name)) for c in configs))}"
            for name in odd
        ]
        raise InputError(
            "these runs cannot be trained side by side, they differ in what they must share:\n  "
            + "\n  ".join(values)
            + "\nTrain them apart, or give them the same"
        )
    named = [c.run_dir for c in configs if c.run_dir]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise InputError(f"run_dir={twice[0]}: two runs cannot write into one folder")
