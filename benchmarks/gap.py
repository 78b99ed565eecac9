"""How near vLLM and the trainer are in 16 bits: mean |logprob of one - logprob of the other|.

    python benchmarks/gap.py [--model FOLDER] [--completions 128] [--tokens 64]

For each dtype, vLLM as `jgrpo.serve` starts it, with the head in the base's dtype and in float32,
samples from a probe adapter at temperature 1; the trainer computes the same tokens. One JSON line
each: the mean gap in nats, its 99.9 % quantile and the largest, of so many tokens.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from sampler import TINY_BASE, vllm_server

from jgrpo.cli import tune_allocator
from jgrpo.config import Config
from jgrpo.policy import model_config
from jgrpo.policy.adapter import AdapterConfig, save
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run.policy import open_policies
from jgrpo.run.probe import _probe_adapter, gaps_of

SIDES = [("float32", ""), ("bfloat16", ""), ("bfloat16", "float32"), ("float16", ""),
         ("float16", "float32")]  # fmt: skip
GROUP = 8


@dataclass
class Args:
    """Measure the gap between vLLM and the trainer."""

    model: Path = TINY_BASE
    """Model folder."""
    completions: int = 128
    """In groups of 8, one at a time through the trainer."""
    tokens: int = 64
    """Most of each."""
    prompt_tokens: int = 24
    """Random ids, so that the model is unsure of what follows."""


def gap(args: Args, dtype: str, head_dtype: str, folder: Path) -> dict:
    config = Config(
        model_id=str(args.model), dtype=dtype, max_tokens=args.tokens,
        max_prompt_tokens=args.prompt_tokens,
    )  # fmt: skip
    policy, rng = open_policies([config]), np.random.default_rng(0)
    size = (args.completions // GROUP, args.prompt_tokens)
    n_ids = model_config(args.model).vocab_size
    prompts = rng.integers(0, n_ids, size).tolist()
    probe = _probe_adapter(policy, 0, prompts[:4], config)
    shape = AdapterConfig(config.lora_r, config.lora_alpha, config.lora_target_modules)
    save(probe, folder / "adapter", shape, config.model_id)
    fields = {"max_tokens": args.tokens, "max_prompt_tokens": args.prompt_tokens}
    with vllm_server(
        args.model, folder / "log", head_dtype=head_dtype, dtype=dtype, **fields
    ) as url:
        sampler = VllmSampler(
            [url], run_id="gap", max_tokens=args.tokens, max_model_len=config.max_model_len,
            vocab_size=n_ids, stop_token_ids=[], timeout_s=600, start_command="",
        )  # fmt: skip
        sampler.load(folder / "adapter")
        groups = sampler.sample(prompts, seeds=range(len(prompts)), group_size=GROUP)
    found = []
    for prompt, group in zip(prompts, groups, strict=True):
        found.append(gaps_of(policy, 0, probe, [prompt] * GROUP, group, 1.0))
    gaps = np.abs(np.concatenate(found))
    return {
        "dtype": dtype, "head": head_dtype or dtype, "tokens": len(gaps),
        "mean": float(gaps.mean()), "q999": float(np.quantile(gaps, 0.999)),
        "max": float(gaps.max()), "group_means": float(max(np.abs(f).mean() for f in found)),
    }  # fmt: skip


def main() -> None:
    args = tyro.cli(Args)
    for dtype, head_dtype in SIDES:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(gap(args, dtype, head_dtype, Path(folder))), flush=True)


if __name__ == "__main__":
    tune_allocator()
    main()
