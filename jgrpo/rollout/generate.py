"""Completions of a few messages, without a run: to look at what a model or an adapter writes."""

from collections.abc import Sequence
from pathlib import Path

import jgrpo
from jgrpo.policy.lora import split
from jgrpo.policy.weights import model_folder
from jgrpo.prompts.tokenizer import load_tokenizer, refuse_ids_beyond, render, stop_token_ids
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.rollout.protocol import prompt_seeds


def generate(
    model_id: str,
    messages: Sequence[str],
    *,
    adapter: str | Path | None = None,
    group_size: int = 1,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
    enable_thinking: bool = False,
) -> list[list[str]]:
    """`group_size` completions of each message, a user's turn in the model's own chat template, as
    texts [P][G]. Temperature 0 is greedy; the same seed gives the same texts. The base model, or
    the adapter in a PEFT folder. InputError says what is wrong with either."""
    folder = str(model_folder(model_id))
    tokenizer = load_tokenizer(folder)
    stops = stop_token_ids(tokenizer, folder)
    _, prompts = render(tokenizer, messages, enable_thinking=enable_thinking)
    model = jgrpo.load_model(folder, lora_r=1, adapter=adapter, dtype=dtype)
    refuse_ids_beyond(model.config.vocab_size, tokenizer, prompts)
    n_rows = len(prompts) * group_size
    sampler = JaxSampler(
        *split(model), stop_token_ids=stops, max_tokens=max_tokens, max_rows=n_rows
    )
    groups = sampler.sample(
        prompts,
        seeds=prompt_seeds(seed, 0, len(prompts)),
        group_size=group_size,
        temperature=temperature,
    )
    return [
        [
            str(tokenizer.decode(c.token_ids[: len(c.token_ids) - (c.finish_reason == "stop")]))
            for c in g
        ]
        for g in groups
    ]
