"""The sampler that a config names, and those for several policies, some at a time."""

import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from flax import nnx

from jgrpo.config import Config
from jgrpo.policy.adapter import load
from jgrpo.policy.backend import backend
from jgrpo.policy.lora import rank_of
from jgrpo.policy.mesh import make_mesh
from jgrpo.policy.weights import model_config, model_folder
from jgrpo.rollout.embedded import rows_that_fit
from jgrpo.rollout.protocol import Sampler
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run.device import free_memory
from jgrpo.run.policy import Policy, open_policies, open_policy, shaped
from jgrpo.run.together import new_sampler

AT_ONCE = 8
"""Policies that are sampled side by side at most."""


def sampled_at_once(config: Config, policy: Policy, free: int | None) -> int:
    """How many completions the embedded sampler decodes at once on each device, of `free` bytes:
    its share of those of a step (`Backend.members_decoded_at_once`), or as many as fit."""
    c, n_members = config, len(policy.scales) if backend().members_decoded_at_once else 1
    n_groups = -(-n_members * c.n_prompts_per_step // make_mesh(c.fsdp).size)
    n_rows = n_groups * c.group_size
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
) -> Iterator[tuple[list[Path | None], Sampler]]:
    """The adapters (None: the base), some at a time, and a sampler whose members they are until the
    next are taken. The base comes first, alone; parts of the same shapes share a sampler."""
    for shapes, parts in groupby(_in_parts(config, adapters), lambda part: part[0]):
        policy = open_policies(shapes, abstract=config.rollout == "vllm")
        sampler = open_sampler(shapes[0], policy, stops, "evaluate", alone=False)
        try:
            for _, part in parts:
                folders = [adapter for adapter in part if adapter is not None]
                if folders:  # the last one again fills up a smaller part: the programs are the same
                    sampler.load(*folders, *folders[-1:] * (len(shapes) - len(folders)))
                yield part, sampler
        finally:
            sampler.close()


def _in_parts(
    config: Config, adapters: Sequence[Path | None]
) -> list[tuple[list[Config], list[Path | None]]]:
    """What is sampled side by side, parts as large as each other, and the members' shapes."""
    shapes = {adapter: shaped(config, adapter) for adapter in adapters if adapter is not None}
    key = lambda a: (shapes[a].lora_target_modules, shapes[a].lora_r, shapes[a].lora_alpha)  # noqa: E731
    found: list[tuple[list[Config], list[Path | None]]] = []
    if None in adapters:
        found.append(([next(iter(shapes.values()), shaped(config, None))], [None]))
    for _, group in groupby(sorted(shapes, key=key), lambda a: shapes[a].lora_target_modules):
        alike = [*group]
        size = -(-len(alike) // -(-len(alike) // AT_ONCE))
        for i in range(0, len(alike), size):
            part = alike[i : i + size]
            filled = [*part, *part[-1:] * (size - len(part))]
            found.append(([shapes[adapter] for adapter in filled], [*part]))
    return found
