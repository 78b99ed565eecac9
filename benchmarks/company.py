"""Generation of eight members through one vLLM server beside eight lone ones, one after another.

    python benchmarks/company.py [--members 8] [--completions 128] [--repeats 3]

The quick start's model, problems and stop tokens; an adapter each. Both sides load their adapters
and sample the same completions from the same server, in turn; the first turn is left out. Processor
time is the server's and ours, and says more where the machine is shared. Last line: one JSON
document.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import jax
import psutil
import tyro
from sampler import ROOT, vllm_server

from jgrpo.cli import tune_allocator
from jgrpo.config import load_config
from jgrpo.policy.adapter import AdapterConfig, save
from jgrpo.policy.lora import fresh_adapter
from jgrpo.rollout.protocol import prompt_seeds
from jgrpo.run.policy import open_policies
from jgrpo.run.sampler import open_sampler
from jgrpo.run.session import open_problems


@dataclass
class Args:
    """Compare members side by side with lone ones."""

    members: int = 8
    completions: int = 128
    """Of each member (groups of 8)."""
    repeats: int = 3
    """Timed turns of each side, after one that is not counted."""


def processor_s() -> float:
    """Of this process and its children so far."""
    here = psutil.Process()
    each = [p.cpu_times() for p in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in each)


def main() -> None:
    args = tyro.cli(Args)
    os.environ.pop("GLIBC_TUNABLES", None)  # it has done its work here; vLLM runs as it comes
    n, config = args.members, load_config(ROOT / "configs" / "tiny.py")
    config = replace(config, rollout="vllm")
    policy, problems = open_policies([config] * n, abstract=True), open_problems(config)
    shape = AdapterConfig(config.lora_r, config.lora_alpha, config.lora_target_modules)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), policy.adapter)
    n_prompts = args.completions // config.group_size
    prompts = [list(p.prompt_ids) for p in problems.train[: n * n_prompts]]
    seeds = prompt_seeds(0, 1, len(prompts))
    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_server(
            Path(config.model_id), Path(folder) / "log", max_tokens=config.max_tokens,
            max_prompt_tokens=config.max_prompt_tokens, max_loras=n,
        ) as url,
    ):  # fmt: skip
        folders = [Path(folder) / f"member_{e}" for e in range(n)]
        for e, file in enumerate(folders):
            adapter = fresh_adapter(like, e)
            moved = jax.tree.map(lambda x, e=e: x + 1e-3 * (e + 1), adapter)
            save(moved, file, shape, "")
        config = replace(config, vllm_url=url)
        sampler = open_sampler(config, policy, problems.stop_token_ids, "benchmark")
        part = lambda x, e: x[e * n_prompts : (e + 1) * n_prompts]  # noqa: E731

        def alone():
            found = []
            for e in range(n):
                sampler.load(folders[e])
                found += sampler.sample(
                    part(prompts, e), seeds=part(seeds, e), group_size=config.group_size
                )
            return found

        def together():
            sampler.load(*folders)
            members = [e for e in range(n) for _ in range(n_prompts)]
            return sampler.sample(
                prompts, seeds=seeds, members=members, group_size=config.group_size
            )

        sides = {"alone": alone, "together": together}
        turns: list[dict[str, tuple[float, float]]] = []
        for turn in range(args.repeats + 1):
            sampled, turns = {}, [*turns, {}]
            for name, side in sides.items():
                start = time.perf_counter(), processor_s()
                sampled[name] = [c for group in side() for c in group]
                turns[-1][name] = time.perf_counter() - start[0], processor_s() - start[1]
            tokens = [sum(len(c.token_ids) for c in cs) for cs in sampled.values()]
            same = [a.token_ids == b.token_ids for a, b in zip(*sampled.values(), strict=True)]
            took = (f"{name} {s:.2f} s ({cpu:.2f} s of processor time)"
                    for name, (s, cpu) in turns[-1].items())  # fmt: skip
            print(f"turn {turn}: {', '.join(took)}; {tokens} tokens, {sum(same)} of {len(same)} "
                  "completions the same", flush=True)  # fmt: skip
        sampler.close()
    ratios = [
        median(turn["together"][i] / turn["alone"][i] for turn in turns[1:]) for i in range(2)
    ]
    print(f"{n} members: {ratios[0]:.3f} x the time, {ratios[1]:.3f} x the processor time")
    print(json.dumps({"time": ratios[0], "processor_time": ratios[1], "turns": turns}))
    sys.stdout.flush()


if __name__ == "__main__":
    tune_allocator()
    main()
