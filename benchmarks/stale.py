"""Is a stale adapter seen in 16 bits, where no mean of gaps shows it? Against a real vLLM.

    python benchmarks/stale.py [--model FOLDER] [--steps 12] [--size 0.02]

vLLM as `jgrpo.serve --head_dtype float32` starts it, in bfloat16, and adapters that differ from one
another by a random step, as those of a run do. At each step completions are sampled from the right
adapter, from the one before, from none, from the right one without one of its projections, and half
of them from the right one and half from the one before (two servers of which one lags). One JSON
line each: what a step moves a token's logprob by, the mean gap to the trainer, and the slope of
`run/stale.py` with its error, and whether a run would have been ended by it or by the mean.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from sampler import TINY_BASE, vllm_server

from jgrpo.cli import tune_allocator
from jgrpo.config import Config
from jgrpo.policy import model_config
from jgrpo.policy.adapter import AdapterConfig, save
from jgrpo.policy.batch import Rows
from jgrpo.policy.lora import switched_off
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run.policy import open_policies
from jgrpo.run.probe import _probe_adapter, gap_problem
from jgrpo.run.stale import Slope, of_group

GROUP = 8
SAMPLED_BY = ("right", "before", "base", "projection missing", "half before")


@dataclass
class Args:
    """Sample from the right adapter and from wrong ones: what do the slope and the mean say?"""

    model: Path = TINY_BASE
    """Model folder."""
    steps: int = 12
    size: float = 0.02
    """Of a step, as a share of the adapter's largest entries."""
    groups: int = 2
    """Of 8 completions, a step."""
    tokens: int = 64
    """Of each completion at most."""
    prompt_tokens: int = 24
    """Random ids, so that the model is unsure of what follows."""
    projection: str = "down_proj"
    """The one that is left out."""


def moved(adapter: nnx.State, size: float, seed: int) -> nnx.State:
    """The adapter after a random step, as large for all entries of an array."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [x + size * jnp.abs(x).max() * jax.random.normal(k, x.shape, x.dtype)
           for k, x in zip(keys, leaves, strict=True)]  # fmt: skip
    return tree.unflatten(new)


def without(adapter: nnx.State, projection: str) -> nnx.State:
    flat = nnx.to_flat_state(adapter)
    return nnx.from_flat_state(
        (path, leaf.replace(leaf[...] * (projection not in path))) for path, leaf in flat
    )


class Server:
    """Samples from an adapter, which it is given."""

    def __init__(self, args: Args, config: Config, url: str, folder: Path) -> None:
        self.folder, self.config, self.n = folder, config, 0
        self.sampler = VllmSampler(
            [url], run_id="stale", max_tokens=args.tokens, max_model_len=config.max_model_len,
            vocab_size=model_config(args.model).vocab_size, stop_token_ids=[], timeout_s=600,
            start_command="",
        )  # fmt: skip

    def sample(self, adapter: nnx.State, prompts: list[list[int]]) -> Rows:
        c, self.n = self.config, self.n + 1
        shape = AdapterConfig(c.lora_r, c.lora_alpha, c.lora_target_modules)
        save(adapter, self.folder / str(self.n), shape, c.model_id)
        self.sampler.load(self.folder / str(self.n))
        seeds = range(self.n * len(prompts), (self.n + 1) * len(prompts))
        groups = self.sampler.sample(prompts, seeds=seeds, group_size=GROUP)
        each = [x for group in groups for x in group]
        return Rows(
            [p for p in prompts for _ in range(GROUP)],
            [x.token_ids for x in each],
            [x.logprobs for x in each],
            np.ones(len(each), np.float32),
        )


def main() -> None:
    args = tyro.cli(Args)
    config = Config(
        model_id=str(args.model), dtype="bfloat16", max_tokens=args.tokens, rollout="vllm",
        max_prompt_tokens=args.prompt_tokens, group_size=GROUP, micro_batch_size=GROUP,
    )  # fmt: skip
    policy, rng = open_policies([config]), np.random.default_rng(0)
    n_ids, half = model_config(args.model).vocab_size, args.groups // 2
    slopes = {name: Slope() for name in SAMPLED_BY}
    gaps: dict[str, list[np.ndarray]] = {name: [] for name in SAMPLED_BY}
    steps: list[np.ndarray] = []
    fields = {"max_tokens": args.tokens, "max_prompt_tokens": args.prompt_tokens}
    with (
        tempfile.TemporaryDirectory() as name,
        vllm_server(
            args.model, Path(name, "log"), head_dtype="float32", dtype="bfloat16", **fields
        ) as url,
    ):
        server = Server(args, config, url, Path(name))
        prompts = rng.integers(0, n_ids, (args.groups, args.prompt_tokens)).tolist()
        before = _probe_adapter(policy, 0, prompts, config)
        for step in range(args.steps):
            right = moved(before, args.size, step)
            prompts = rng.integers(0, n_ids, (args.groups, args.prompt_tokens)).tolist()
            rows = {
                "right": [server.sample(right, prompts)],
                "before": [server.sample(before, prompts)],
                "base": [server.sample(switched_off(right), prompts)],
                "projection missing": [server.sample(without(right, args.projection), prompts)],
                "half before": [server.sample(right, prompts[half:]),
                                server.sample(before, prompts[:half])],
            }  # fmt: skip
            for sampled_by, of_step in rows.items():
                found = [of_group(policy, 0, right, before, part, config) for part in of_step]
                x, y = ([a for part in found for a in part[k]] for k in range(2))
                slopes[sampled_by].add(x, y)
                gaps[sampled_by] += y
                steps += x if sampled_by == "right" else []
            before = right
    for sampled_by in SAMPLED_BY:
        slope, gap = slopes[sampled_by], np.abs(np.concatenate(gaps[sampled_by]))
        mean = {"sampler/logprob_diff_mean": float(gap.mean()),
                "sampler/logprob_diff_max": float(gap.max())}  # fmt: skip
        print(json.dumps({
            "sampled by": sampled_by, "tokens": len(gap), "mean gap": float(gap.mean()),
            "a step moves": float(np.abs(np.concatenate(steps)).mean()),
            "slope": slope.value, "error": slope.error, "ended by the slope": slope.is_stale,
            "ended by the mean": gap_problem(mean, config) is not None,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    tune_allocator()
    main()
