"""Does the probe before the first step judge right? Through a real vLLM, by seed.

    python benchmarks/probe.py [--dtype bfloat16] [--seeds 20]

A server as `jgrpo.serve` starts it is asked for the probe of each seed, as a run would. Then it
keeps the adapter that it has, whatever it is told to load. With the first size of probe alone, and
with the larger ones. One JSON line each: how many seeds were refused (none of the first should be,
all of the second).
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import tyro
from sampler import vllm_server

from jgrpo.cli import tune_allocator
from jgrpo.config import Config, load_config
from jgrpo.errors import RunError
from jgrpo.rollout.vllm import VllmSampler
from jgrpo.run import probe
from jgrpo.run.policy import open_policies
from jgrpo.run.sampler import open_sampler
from jgrpo.run.session import configure_jax, open_problems

QUICK_START = Path(probe.__file__).parents[1] / "configs" / "tiny.py"


@dataclass
class Args:
    """Count what the probe refuses."""

    dtype: str = "bfloat16"
    """Of server and trainer."""
    seeds: int = 20
    """Runs' seeds, from 0."""


def refused(configs: Sequence[Config], *given) -> int:
    """How many of the configs' probes are."""
    n = 0
    for config in configs:
        folder = Path(tempfile.mkdtemp()) / "probe"  # stays: a server needs what it has loaded
        try:
            probe.check_sampler([config], *given, [folder])
        except RunError:
            n += 1
    return n


def main(args: Args) -> None:
    configure_jax()
    config = replace(load_config(QUICK_START), dtype=args.dtype, rollout="vllm", max_tokens=48)
    with tempfile.TemporaryDirectory() as folder, vllm_server(
        Path(config.model_id), Path(folder) / "log", dtype=config.dtype,
        max_tokens=config.max_tokens, max_prompt_tokens=config.max_prompt_tokens,
    ) as url:  # fmt: skip
        config = replace(config, vllm_url=url)
        policy, problems = open_policies([config]), open_problems(config)
        sampler = open_sampler(config, policy, problems.stop_token_ids, "probe")
        configs = [replace(config, seed=seed) for seed in range(args.seeds)]
        for sizes in (probe.PROBE_SIZES[:1], probe.PROBE_SIZES):
            for server, load in (("right", VllmSampler.load), ("deaf", lambda *_: None)):
                ours = patch.object(probe, "PROBE_SIZES", sizes)
                with ours, patch.object(VllmSampler, "load", load):
                    n = refused(configs, policy, sampler, problems)
                print(json.dumps({"server": server, "largest": sizes[-1], "refused": n,
                                  "of": args.seeds}), flush=True)  # fmt: skip
        sampler.close()


if __name__ == "__main__":
    tune_allocator()
    main(tyro.cli(Args))
