"""Embedded sampler against vLLM: tokens per second of both, in turn, on the same machine and model.

    python benchmarks/sampler.py [--model FOLDER] [--completions 128] [--tokens 64] [--repeats 5]

Both sample the same prompts at temperature 1 from the same rank-1 adapter and never stop early, so
that the token counts are equal. vLLM runs as `jgrpo.serve` starts it. Last line: one JSON document.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

import jgrpo
from jgrpo.cli import tune_allocator
from jgrpo.config import load_config
from jgrpo.policy.adapter import AdapterConfig, save
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run.policy import Policy, open_policy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from vllm_server import SMALL, vllm_server

ROOT = Path(__file__).parents[1]
TINY_BASE = Path(jgrpo.__file__).with_name("tiny") / "base"


@dataclass
class Args:
    """Compare the embedded sampler with vLLM."""

    model: Path = TINY_BASE
    """Model folder."""
    completions: int = 128
    """Completions a call (groups of 8)."""
    tokens: int = 64
    """Tokens of each."""
    prompt_tokens: int = 24
    """Tokens of each prompt (random ids)."""
    repeats: int = 5
    """Timed calls of each, after one that is not counted."""


def samplers(args: Args, policy: Policy, url: str) -> dict:
    return {
        "jax": JaxSampler(
            policy.graph,
            policy.adapter,
            policy.base,
            stop_token_ids=[-1],
            max_tokens=args.tokens,
            max_rows=args.completions,
        ),
        "vllm": VllmSampler(
            [url],
            run_id="benchmark",
            max_tokens=args.tokens,
            max_model_len=args.prompt_tokens + args.tokens,
            vocab_size=2**31,
            stop_token_ids=[],
            timeout_s=600,
            start_command="",
        ),
    }


def main() -> None:
    args = tyro.cli(Args)
    os.environ.pop("GLIBC_TUNABLES", None)  # it has done its work here; vLLM runs as it comes
    config = replace(
        load_config(ROOT / "configs" / "tiny.py"),
        model_id=str(args.model),
        max_tokens=args.tokens,
        max_prompt_tokens=args.prompt_tokens,
    )
    policy = open_policy(config)
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, 45, (args.completions // 8, args.prompt_tokens)).tolist()
    seconds: dict[str, list[float]] = {"jax": [], "vllm": []}
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        save(policy.adapter, adapter, AdapterConfig(1, 32, config.lora_target_modules), "")
        fields = {"max_tokens": args.tokens, "max_prompt_tokens": args.prompt_tokens}
        # As many threads as `jgrpo.serve` gives it, not the one of tests.
        environ = {name: value for name, value in SMALL.items() if name != "OMP_NUM_THREADS"}
        with vllm_server(
            args.model, Path(folder) / "log", dtype="float32", environ=environ, **fields
        ) as url:
            both = samplers(args, policy, url)
            for sampler in both.values():
                sampler.load(adapter)
            for repeat in range(args.repeats + 1):
                for name, sampler in both.items():
                    start = time.perf_counter()
                    groups = sampler.sample(prompts, seeds=range(len(prompts)), group_size=8)
                    elapsed = time.perf_counter() - start
                    assert all(len(c.token_ids) == args.tokens for g in groups for c in g)
                    if repeat:
                        seconds[name].append(elapsed)
    n = args.completions * args.tokens
    rates = {name: [n / s for s in times] for name, times in seconds.items()}
    ratios = [v / j for j, v in zip(seconds["jax"], seconds["vllm"], strict=True)]
    for name, rate in rates.items():
        print(f"{name:5} {statistics.median(rate):9.0f} tokens/s (median of {args.repeats})")
    print(f"ratio {statistics.median(ratios):9.2f}")
    print(json.dumps({"tokens_a_call": n, "tokens_per_s": rates, "ratio_jax_to_vllm": ratios}))


if __name__ == "__main__":
    tune_allocator()
    main()
