"""Does `train --dry_run` say the truth? Its figure beside what training then takes, on the CPU.

    python benchmarks/memory.py

The model has SmolLM2-135M's shape and random weights. Each setting is a process of its own: it
predicts as `--dry_run` does, makes the model, trains on the largest rollout that can come (which
compiles), hands freed memory back to the system, and trains again; the largest resident size of
that second time counts, less what was resident before it and is no weight. Linux only. Last line:
one JSON document.
"""

import ctypes
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from speed import SHAPES, config_of, make_lines, random_model
from speed import Args as SpeedArgs
from speed_sides import forget_peak, resident_bytes

MICRO_BATCH_SIZES = (2, 4, 16)


def setting(micro_batch_size: int, gradient_checkpointing: bool) -> dict:
    """Bytes that are predicted and measured for one setting."""
    from pathlib import Path

    from jgrpo.policy.lora import stacked_up
    from jgrpo.run.memory import training_memory
    from jgrpo.run.policy import Policy
    from jgrpo.run.session import configure_jax
    from jgrpo.study.compare import saved_rows
    from jgrpo.update.learner import Learner

    configure_jax()
    shape = SHAPES["135m"]
    args = SpeedArgs(
        shape="135m",
        micro_batch_size=micro_batch_size,
        gradient_checkpointing=gradient_checkpointing,
    )
    config = config_of(args, shape, Path())
    graph, adapter, base = random_model(config, shape)
    policy = Policy(graph, stacked_up([adapter]), base)
    lengths = [config.max_prompt_tokens] * config.n_prompts_per_step
    predicted = training_memory([config], policy, lengths)
    learner = Learner([config], policy.graph, policy.adapter, policy.base)
    rows = saved_rows(config, make_lines(args, config, shape.model["vocab_size"]))
    learner.learn({0: rows})
    learner.update._tape = None  # kept from update to update, but part of what they take
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    before, _ = resident_bytes()
    learner.learn({0: rows})
    _, peak = resident_bytes()
    kept = predicted.base + predicted.adapter
    return {
        "micro_batch_size": micro_batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        "predicted_bytes": predicted.total,
        "measured_bytes": peak - before + kept,
    }


def main() -> None:
    rows = []
    print("| micro-batch | recomputed | --dry_run | measured | stated / measured |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for size in MICRO_BATCH_SIZES:
            for recompute in (False, True):
                row = pool.submit(setting, size, recompute).result()
                rows.append(row)
                stated, measured = (row[f"{x}_bytes"] / 2**20 for x in ("predicted", "measured"))
                print(
                    f"| {size} | {recompute} | {stated:,.0f} MiB | {measured:,.0f} MiB "
                    f"| {stated / measured:.2f} |",
                    flush=True,
                )
    print(json.dumps({"settings": rows}))


if __name__ == "__main__":
    main()
