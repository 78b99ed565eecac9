"""How long the programs of a run take to compile, and how long from the persistent cache, on a CPU.

    python benchmarks/compilation.py [--n_rollouts 20]

The model has SmolLM2-135M's shape and random weights. "training": the programs of all shapes of
micro-batch that so many rollouts of log-normal lengths need (4 prompts x 4 completions of up to 192
tokens, 40 % of the groups without a signal), those that make their tapes, and the optimizer's;
"sampling": those of one rollout by the embedded sampler, which is really sampled. The first process
begins with an empty cache, the second has what the first one left. Seconds of tracing, lowering and
compiling (or reading), as JAX reports them. Last line: one JSON document.
"""

import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from speed import SHAPES, config_of, make_lines, random_model
from speed import Args as SpeedArgs


@dataclass
class Args:
    """Time compilation, cold and from the cache."""

    n_rollouts: int = 20
    """Rollouts whose micro-batches are looked at."""


def compile_all(cache: str, n_rollouts: int) -> dict[str, tuple[int, float]]:
    """For each part of a run: programs, and seconds spent to get them."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    import jax
    import numpy as np

    from jgrpo.policy.batch import emptied
    from jgrpo.policy.lora import stacked_up
    from jgrpo.policy.mesh import dealt
    from jgrpo.rollout.embedded import JaxSampler
    from jgrpo.run.session import configure_jax
    from jgrpo.study.compare import saved_rows
    from jgrpo.update.learner import Learner, batches_of, parts_of
    from jgrpo.update.step import STACK

    configure_jax()
    shape, spent = SHAPES["135m"], []

    def heard(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):  # trace, lower, compile or read
            spent.append((event.endswith("backend_compile_duration"), seconds))

    def since(start: int) -> tuple[int, float]:
        return sum(last for last, _ in spent[start:]), sum(seconds for _, seconds in spent[start:])

    jax.monitoring.register_event_duration_secs_listener(heard)
    config = config_of(SpeedArgs(shape="135m"), shape, Path())
    graph, adapter, base = random_model(config, shape)
    learner = Learner([config], graph, stacked_up([adapter]), base)
    found = {}
    for seed in range(n_rollouts):
        lines = make_lines(
            SpeedArgs(shape="135m", lengths="realistic", seed=seed),
            config, shape.model["vocab_size"],
        )  # fmt: skip
        rows = saved_rows(config, lines)
        for part in parts_of(config, rows):
            batches = batches_of(config, rows, part.index)
            found |= {str(jax.tree.map(jax.numpy.shape, batch)): batch for batch in batches}
    jax.block_until_ready(jax.tree.leaves(base))
    start = len(spent)
    for batch in found.values():
        learner.update.compiled(learner.adapters, base, batch)
        ((stack, _),) = dealt([batch], emptied, learner.mesh.size, STACK)
        learner.update.programs.new_tape.lower(learner.adapters, base, stack).compile()
    learner.update.programs.apply.lower(
        learner.adapters, learner.opt_states,
        learner.update.programs.zeros.eval_shape(learner.adapters), np.ones(1), learner.rates,
    ).compile()  # fmt: skip
    training = since(start)
    sampler = JaxSampler(
        graph, adapter, base, stop_token_ids=[0], max_tokens=config.max_tokens,
        max_rows=config.n_completions_per_step,
    )  # fmt: skip
    prompts = [[5 + i] * config.max_prompt_tokens for i in range(config.n_prompts_per_step)]
    start = len(spent)
    sampler.sample(prompts, seeds=range(len(prompts)), group_size=config.group_size)
    return {"training": training, "sampling": since(start)}


def main() -> None:
    args = tyro.cli(Args)
    context = multiprocessing.get_context("spawn")
    rows, wall = [], []
    with tempfile.TemporaryDirectory() as cache:
        for _ in ("cold", "cached"):
            start = time.perf_counter()
            with ProcessPoolExecutor(1, context) as pool:
                rows.append(pool.submit(compile_all, cache, args.n_rollouts).result())
            wall.append(time.perf_counter() - start)
    cold, cached = rows
    print("| programs of | number | cold | from the cache |\n| --- | --- | --- | --- |")
    for part, (n, seconds) in cold.items():
        print(f"| {part} | {n} | {seconds:.1f} s | {cached[part][1]:.1f} s |")
    both = [sum(seconds for _, seconds in row.values()) for row in rows]
    print(f"| together | {sum(n for n, _ in cold.values())} | {both[0]:.1f} s | {both[1]:.1f} s |")
    print(json.dumps({"cold": cold, "cached": cached, "seconds": both, "wall_s": wall}))


if __name__ == "__main__":
    main()
