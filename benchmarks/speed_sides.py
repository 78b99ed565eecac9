"""The sides of speed.py, each a process that it starts: `speed_sides.py SIDE FOLDER N`."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jgrpo.config import Config

Learn = Callable[[], float]
"""All updates on the rollout -> the gradient norm of the last."""
Memory = Callable[[], tuple[int, int]]
"""Bytes in use now, and at most so far."""


def open_jgrpo(config: Config, folder: Path, lines: list[dict], _: int) -> tuple[Learn, Memory]:
    import jax

    from jgrpo.policy import adapter
    from jgrpo.policy.lora import stacked_up
    from jgrpo.run.policy import open_policy
    from jgrpo.run.session import configure_jax
    from jgrpo.study.compare import saved_rows
    from jgrpo.update.learner import Learner

    configure_jax()
    policy = open_policy(config)
    start = adapter.load(folder / "adapter", policy.adapter)
    learner = Learner([config], policy.graph, stacked_up([start]), policy.base)
    rows = saved_rows(config, lines)

    def on_gpu() -> tuple[int, int]:
        stats = jax.devices()[0].memory_stats()
        return stats["bytes_in_use"], stats["peak_bytes_in_use"]

    memory = on_gpu if jax.default_backend() == "gpu" else resident_bytes
    return lambda: learner.learn({0: rows})[0]["train/grad_norm"], memory


def open_torch(
    config: Config, folder: Path, lines: list[dict], micro_batch_size: int
) -> tuple[Learn, Memory]:
    from torch_baseline import Baseline, open_model

    baseline = Baseline(config, open_model(config, folder / "adapter"), micro_batch_size)
    return lambda: baseline.learn(lines)[-1]["grad_norm"], torch_memory(baseline.model)


def open_trl(
    config: Config, folder: Path, lines: list[dict], micro_batch_size: int, checkpointing=False
) -> tuple[Learn, Memory]:
    from torch_baseline import open_model
    from trl_side import Trl

    model = open_model(config, folder / "adapter")
    trl = Trl(config, model, micro_batch_size, checkpointing)
    return lambda: trl.learn(lines), torch_memory(model)


def open_trl_defaults(
    config: Config, folder: Path, lines: list[dict], _: int
) -> tuple[Learn, Memory]:
    return open_trl(config, folder, lines, micro_batch_size=8, checkpointing=True)


def open_tunix(
    config: Config, folder: Path, lines: list[dict], micro_batch_size: int
) -> tuple[Learn, Memory]:
    from tunix_side import Tunix

    tunix = Tunix(config, folder / "adapter", micro_batch_size)
    return lambda: tunix.learn(lines), resident_bytes


def open_tunix_defaults(
    config: Config, folder: Path, lines: list[dict], _: int
) -> tuple[Learn, Memory]:
    return open_tunix(config, folder, lines, micro_batch_size=len(lines))


def torch_memory(model: Any) -> Memory:
    import torch

    for weight in model.parameters():
        weight.sum()  # a mapped file is in memory, and counted, once it is read
    if not torch.cuda.is_available():
        return resident_bytes
    torch.cuda.reset_peak_memory_stats()
    return lambda: (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())


def resident_bytes() -> tuple[int, int]:
    """This process's memory now, and the most since the last `forget_peak`."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    kib = (int(status[name].removesuffix("kB")) for name in ("VmRSS", "VmHWM"))
    now, peak = (1024 * n for n in kib)
    return now, peak


def forget_peak() -> None:
    """Let the largest resident size be today's: loading a model takes more than keeping it."""
    Path("/proc/self/clear_refs").write_text("5")


def work(side: str, folder: Path, torch_micro_batch_size: int) -> None:
    """For each line on stdin, learn once; a JSON line of seconds, norm and memory on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    config = Config(**json.loads((folder / "config.json").read_text()))
    lines = [json.loads(line) for line in (folder / "rollout.jsonl").open()]
    opened = {
        "jgrpo": open_jgrpo, "torch": open_torch, "trl": open_trl,
        "trl-defaults": open_trl_defaults, "tunix": open_tunix,
        "tunix-defaults": open_tunix_defaults,
    }[side]  # fmt: skip
    learn, memory = opened(config, folder, lines, torch_micro_batch_size)
    forget_peak()
    before, _ = memory()
    print(json.dumps({"before_bytes": before}), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        norm = learn()
        elapsed = time.perf_counter() - start
        answer = {"seconds": elapsed, "grad_norm": norm, "peak_bytes": memory()[1]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
