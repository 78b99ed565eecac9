"""The sampler that a config names, and one for several policies, each in its turn."""

import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from flax import nnx

from jgrpo.config import Config
from jgrpo.policy.adapter import load
from jgrpo.policy.lora import rank_of
from jgrpo.policy.mesh import make_mesh
from jgrpo.policy.weights import model_config, model_folder
from jgrpo.rollout.embedded import rows_that_fit
from jgrpo.rollout.protocol import Sampler
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run.device import free_memory
from jgrpo.run.policy import Policy, open_policy, shaped
from jgrpo.run.together import new_sampler


def sampled_at_once(config: Config, policy: Policy, free: int | None) -> int:
    """How many completions the embedded sampler decodes at once on each device, of `free` bytes:
    its share of those of a step of all members, or as many as fit."""
    c, n_groups = config, len(policy.scales) * config.n_prompts_per_step
    n_rows = -(-n_groups // make_mesh(c.fsdp).size) * c.group_size
    if free is None:
        return n_rows
    return rows_that_fit(
        nnx.merge(policy.graph, policy.adapter, policy.base).config, c.dtype, free,
        n_rows=n_rows, group_size=c.group_size, longest=c.max_prompt_tokens,
        max_tokens=c.max_tokens,
    )  # fmt: skip


def open_sampler(
    config: Config, policy: Policy, stops: Sequence[int], run_id: str, *, alone: bool = True
) -> Sampler:
    """The sampler that the config asks for, of one adapter or of those of several members;
    RunError if the server cannot be used. `alone`: what other runs have left on the server goes."""
    if config.rollout == "jax":
        return new_sampler(config, policy, stops, sampled_at_once(config, policy, free_memory()))
    flags = {"model_id": config.model_id, "lora_r": rank_of(policy.adapter), "dtype": config.dtype,
             "max_prompt_tokens": config.max_prompt_tokens, "max_tokens": config.max_tokens,
             "vllm_url": config.vllm_urls[0], "max_loras": len(policy.scales)}  # fmt: skip
    if config.rollouts_ahead:
        flags["rollouts_ahead"] = config.rollouts_ahead
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return VllmSampler(
        config.vllm_urls,
        run_id=run_id,
        max_tokens=config.max_tokens,
        max_model_len=config.max_model_len,
        vocab_size=model_config(model_folder(config.model_id)).vocab_size,
        stop_token_ids=stops,
        timeout_s=config.vllm_timeout_s,
        move_s=config.vllm_move_s,
        start_command=shlex.join(["python", "-m", "jgrpo.serve", *words]),
        alone=alone,
    )


def check_adapters(config: Config, adapters: Sequence[Path | None]) -> None:
    """InputError if one does not fit the model: a server would take it, and change nothing."""
    for adapter in adapters:
        if adapter is not None:
            load(adapter, open_policy(shaped(config, adapter), abstract=True).adapter)


def each_policy(
    config: Config, adapters: Sequence[Path | None], stops: Sequence[int]
) -> Iterator[tuple[Path | None, Sampler]]:
    """Each adapter (None: the base), and a sampler that samples from it until the next is taken.
    The base comes first; adapters of one shape that follow each other share a sampler."""
    ordered = sorted(adapters, key=lambda adapter: adapter is not None)
    first = next((a for a in ordered if a is not None), None)
    for own, group in groupby(ordered, lambda adapter: shaped(config, adapter or first)):
        policy = open_policy(own, abstract=own.rollout == "vllm")
        sampler = open_sampler(own, policy, stops, "evaluate", alone=False)
        try:
            for adapter in group:
                if adapter is not None:
                    sampler.load(adapter)
                yield adapter, sampler
        finally:
            sampler.close()
