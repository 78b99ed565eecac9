"""Trains and samples on the 8 devices of JAX_NUM_CPU_DEVICES, for tests/policy/test_mesh.py:
python on_devices.py BASE OUT.

The same rollouts for each mesh, and for one device: the adapters go to OUT/MESH.RUN.npz, what
devices send each other in the compiled programs to OUT/sent.json; what is sampled there to
OUT/MESH.sampled.json.
"""

import json
import re
import sys
from math import prod
from pathlib import Path

import jax
import numpy as np
from conftest import PROMPTS, random_ids, with_random_b
from jax.sharding import Mesh

from jgrpo.config import Config
from jgrpo.policy.adapter import adapter_arrays
from jgrpo.policy.batch import Rows
from jgrpo.policy.lora import fresh_adapter, split, stacked_up
from jgrpo.policy.mesh import make_mesh
from jgrpo.policy.weights import load_model
from jgrpo.rollout import embedded
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.update.learner import Learner, batches_of

MESHES = {"one": (1, 1), "data=8": (8, 1), "fsdp=8": (8, 8), "data=4 x fsdp=2": (8, 2)}
"""How many devices, and over how many of them the base is cut."""
FOUR_UPDATES = {"epochs_per_step": 2, "updates_per_epoch": 2, "use_clip": True, "clip_eps": 0.01,
                "use_kl_penalty": True, "kl_to": "base", "entropy_coef": 0.2}  # fmt: skip
RUNS = {
    "four updates": (FOUR_UPDATES,),
    "three members": (
        {"use_token_level_loss": True},
        {"loss_type": "gspo", "lr": 0.003},
        FOUR_UPDATES,
    ),
}
N_PROMPTS, GROUP = 22, 2
"""11 micro-batches an update: on 8 devices, 5 are empty."""
TARGETS = ("q_proj", "down_proj")


def config_of(options: dict) -> Config:
    """A micro-batch has room for a prompt and a row: 128 tokens."""
    return Config(
        n_prompts_per_step=N_PROMPTS, group_size=GROUP, max_prompt_tokens=9, max_tokens=7,
        n_grpo_steps=5, micro_batch_size=8, **{"lr": 0.001, **options},
    )  # fmt: skip


def rows_of(e: int) -> Rows:
    rng = np.random.default_rng(e)
    n = N_PROMPTS * GROUP
    prompts = [[i, *PROMPTS[i % 3]] for i in range(N_PROMPTS) for _ in range(GROUP)]
    completions = [random_ids(1, 1 + i % 7, seed=i + e)[0].tolist() for i in range(n)]
    logprobs = [[-2.0] * len(c) for c in completions]
    return Rows(prompts, completions, logprobs, rng.normal(size=n).astype(np.float32))


def learner_of(base: Path, run: str, mesh: Mesh) -> Learner:
    configs = [config_of(options) for options in RUNS[run]]
    graph, adapter, weights = split(load_model(base, rank=2, alpha=2, target_modules=TARGETS))
    each = [with_random_b(fresh_adapter(adapter, e), seed=e) for e in range(len(configs))]
    return Learner(configs, graph, stacked_up(each), weights, mesh=mesh)


def sent(compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """What a program's devices send each other: the operation, and the bytes that come of it."""
    found = []
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for shape, kind in re.findall(rf" = (\S+) ({kinds})(?:-start)?\(", compiled.as_text()):
        [sizes] = re.findall(r"^f32\[([\d,]*)\]", shape)  # one array, float32
        found.append((kind, 4 * prod(map(int, sizes.split(",")))))
    return sorted(found)


def main(base: Path, out: Path) -> None:
    told = {}
    for name, (n_devices, fsdp) in MESHES.items():
        mesh = make_mesh(fsdp, jax.devices()[:n_devices])
        for run in RUNS if name in ("one", "data=4 x fsdp=2") else ["four updates"]:
            learner = learner_of(base, run, mesh)
            rows = {e: rows_of(e) for e in range(len(RUNS[run]))}
            if run == "four updates":
                told[name] = sent_in_programs(learner, rows[0])
            arrays = {f"{key}.start": x for key, x in adapters_of(learner).items()}
            for _ in range(2):
                learner.learn(rows)
            arrays |= adapters_of(learner) | {f"{e} logprobs": learner.logprobs[e] for e in rows}
            np.savez(out / f"{name}.{run}.npz", **arrays)
        (out / f"{name}.sampled.json").write_text(json.dumps(sampled(base, mesh)))
    (out / "sent.json").write_text(json.dumps(told))


def sampled(base: Path, mesh: Mesh) -> dict[str, list]:
    """What three members sample, 32 rows a device of 8; how many rows were packed into, and what
    devices sent each other in a stage."""
    graph, adapter, weights = split(load_model(base, rank=2, alpha=2, target_modules=TARGETS))
    each = [with_random_b(fresh_adapter(adapter, e), seed=e) for e in range(3)]
    sampler = JaxSampler(
        graph, stacked_up(each), weights, scales=[1.0, 2.0, 1.0], mesh=mesh,
        stop_token_ids=[11, 40, 41, 42, 43], max_tokens=40, max_rows=256 // mesh.size,
    )  # fmt: skip
    prompts = [[i, *PROMPTS[i % 3]] for i in range(15)]  # one place fills up
    packings, packed = [], embedded.packed
    embedded.packed = lambda *x: (packings.append(x[-1].size), packed(*x))[1]
    groups = sampler.sample(
        prompts, seeds=range(15), group_size=16, members=[i % 3 for i in range(15)]
    )
    embedded.packed = packed
    found = [[c.token_ids, c.finish_reason] for group in groups for c in group]
    logprobs = [c.logprobs for group in groups for c in group]
    return {"completions": found, "logprobs": logprobs, "packings": packings}


def adapters_of(learner: Learner) -> dict[str, np.ndarray]:
    return {
        f"{e} {key}": array
        for e in range(len(learner.configs))
        for key, array in adapter_arrays(learner.state(e)[0]).items()
    }


def sent_in_programs(learner: Learner, rows: Rows) -> dict[str, list[tuple[str, int]]]:
    update, adapters = learner.update, learner.adapters
    total = update.programs.zeros.eval_shape(adapters)
    given = adapters, learner.opt_states, total, np.ones(1), learner.rates
    batch = batches_of(learner.configs[0], rows, np.arange(4))[0]
    return {
        "micro-batch": sent(update.compiled(adapters, learner.base, batch)),
        "update": sent(update.programs.apply.lower(*given).compile()),
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
