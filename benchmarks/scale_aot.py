"""What the compiler makes of training and sampling for eight H100 that are not there.

    JAX_PLATFORMS=cpu python benchmarks/scale_aot.py [--models 1.7b 8b 32b] [--micro_batch_size 4]

Wants jax[cuda13]; no card, and no driver: XLA compiles for a device that is only described (as in
JAX's tests/deviceless_aot_test.py). The real programs at the models' shapes, bfloat16, rank 1, the
largest micro-batch of the default config, for each way of laying eight devices out: bytes that each
holds, and what they send each other, read from the optimised program. Attention is XLA's: cuDNN's
would have to ask a card. Nothing runs, so there are no times. Last line: one JSON document.
"""

import json
import os
import re
import time
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.experimental import topologies
from speed import QWEN3_1_7B
from transformers import AutoConfig

from jgrpo.config import Config
from jgrpo.policy.lora import split, stacked_up
from jgrpo.policy.mesh import lies, make_mesh
from jgrpo.policy.model import Decoder, ModelConfig
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.run.memory import largest_micro_batch
from jgrpo.update.learner import update_of
from jgrpo.update.step import Update

N_DEVICES, GB = 8, 1e9
CARDS = {
    "h100": ("NVIDIA H100 80GB HBM3", 84942979072, 3352320000000),
    "h200": ("NVIDIA H200", 151397597184, 4800000000000),
}
"""Name, bytes of memory and bytes a second, as NVIDIA's data sheets say."""
CARD = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  device_memory_size: {memory} memory_bandwidth: {bandwidth}
  device_vendor: "NVIDIA Corporation" name: "{name}" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  {more}
}}
platform_name: "CUDA"
device_description_str: "{name}"
"""
"""As XLA's GpuTargetConfigProto; the figures are those of NVIDIA's data sheet and tuning guide."""
QWEN3_8B = QWEN3_1_7B | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_32B = QWEN3_8B | {
    "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
    "num_attention_heads": 64,
}  # fmt: skip
MODELS = {"1.7b": QWEN3_1_7B, "8b": QWEN3_8B, "32b": QWEN3_32B}
SIZES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


@dataclass
class Args:
    """Compile for eight devices that are only described."""

    models: tuple[Literal["1.7b", "8b", "32b"], ...] = ("1.7b", "8b", "32b")
    """Qwen3's shapes."""
    fsdp: tuple[int, ...] = (1, 2, 8)
    """Over how many devices the base is cut."""
    micro_batch_size: int = 4
    """Completions of the longest kind that are trained at a time."""


def sent(compiled: jax.stages.Compiled) -> dict[str, list[int]]:
    """What devices send each other: by kind, the bytes that come of each instruction."""
    found: dict[str, list[int]] = {}
    line = re.compile(rf" = (\([^=]*?\)|\S+) ({KINDS})(-start)?\(")
    for shapes, kind, start in line.findall(compiled.as_text()):
        sizes = [
            SIZES[dtype] * prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        of_results = sizes[len(sizes) // 2 :] if start and kind == "all-gather" else sizes
        found.setdefault(kind, []).append(sum(of_results))
    return found


def held(compiled: jax.stages.Compiled) -> int:
    """Bytes that each device needs beside what it is given: temporaries."""
    stats: Any = compiled.memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def described(card: str, n: int, cudnn: str = "") -> list[jax.Device]:
    """`n` cards that are not there, for which what is traced from now on is compiled. `cudnn`: its
    version, e.g. 9.19.0, where its calls are in the programs."""
    name, memory, bandwidth = CARDS[card]
    more = f'dnn_version: "{cudnn}"' if cudnn else ""
    text = CARD.format(name=name, memory=memory, bandwidth=bandwidth, more=more)
    if cudnn:
        text += "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*cudnn.split("."))
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=text, topology=f"1x1x{n}"
    )
    jax.config.update("jax_default_matmul_precision", "highest")  # as session.configure_jax
    jax.default_backend = lambda: "gpu"  # what jgrpo asks; JAX itself compiles for the mesh
    return topology.devices


def policy_shapes(model: str, config: Config, members: int = 1):
    """Structure, adapters [E, ...] and base of random weights in this shape; rank 1, bfloat16."""
    shape = ModelConfig.from_hf(AutoConfig.for_model(**MODELS[model]))
    make = lambda: Decoder(  # noqa: E731
        shape, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, rank=1, alpha=32,
        target_modules=config.lora_target_modules,
    )  # fmt: skip
    graph, adapter, base = split(nnx.eval_shape(make))
    return shape, graph, jax.eval_shape(stacked_up, [adapter] * members), base


def apply_program(update: Update, adapters) -> jax.stages.Lowered:
    """The optimizers' step of an update."""
    total, state = update.programs.zeros.eval_shape(adapters), jax.eval_shape(update.init, adapters)
    e = jax.tree.leaves(adapters)[0].shape[0]
    rates = np.ones((e, 1), np.float32)
    return update.programs.apply.lower(adapters, state, total, np.ones(e), rates)


def sampler_programs(graph, adapters, base, mesh, config: Config, vocab: int):
    """Prefill of a step's prompts, and the last stage of decoding its completions; lowered."""
    c, n = config, config.n_prompts_per_step
    sampler = JaxSampler(
        graph, adapters, nnx.State({}), stop_token_ids=[vocab - 1], max_tokens=c.max_tokens,
        max_rows=c.n_completions_per_step, mesh=mesh,
        scales=[1.0] * jax.tree.leaves(adapters)[0].shape[0],
    )  # fmt: skip
    int32, uint32 = (lambda *s, d=d: jax.ShapeDtypeStruct(s, d) for d in (jnp.int32, jnp.uint32))
    asked = int32(n, c.max_prompt_tokens), int32(n), uint32(n)
    keys = jax.eval_shape(lambda s: sampler.programs.keys(s, group_size=c.group_size), uint32(n))
    logits, prefix = jax.eval_shape(sampler.programs.prefill, adapters, base, *asked)
    real = jax.ShapeDtypeStruct((n,), jnp.bool_)
    first = lambda *x: sampler.programs.grown(  # noqa: E731
        sampler.programs.first(*x, 1.0, None, group_size=c.group_size, greedy=False),
        capacity=c.max_tokens,
    )
    state = jax.eval_shape(first, logits, prefix, keys, real)
    options = {"capacity": c.max_tokens, "greedy": False}
    given = adapters, base, prefix, keys, 1.0, None, 0, 1, state
    prefilled = sampler.programs.prefill.lower(adapters, base, *asked)
    return prefilled, sampler.programs.decode.lower(*given, **options)


def measure(model: str, fsdp: int, devices, args: Args) -> dict[str, Any]:
    """One model on one mesh."""
    start = time.perf_counter()
    config = Config(
        dtype="bfloat16", fsdp=fsdp, micro_batch_size=args.micro_batch_size, max_prompt_tokens=256,
        gradient_checkpointing=model != "1.7b", attn_implementation="xla",
    )  # fmt: skip
    shape, graph, adapters, base = policy_shapes(model, config)
    mesh = make_mesh(fsdp, devices)
    update = update_of([config], graph, adapters, base, mesh=mesh)
    batch = largest_micro_batch(config, [config.max_prompt_tokens] * config.n_prompts_per_step)
    trained = update.compiled(adapters, base, batch)
    applied = apply_program(update, adapters).compile()
    _, decode = sampler_programs(graph, adapters, base, mesh, config, shape.vocab_size)
    sampled = decode.compile()
    base_bytes = sum(
        2 * prod(lies(mesh, path, x.shape).shard_shape(x.shape))
        for path, x in nnx.to_flat_state(base)
    )
    gathers = sent(trained).pop("all-gather", [])
    return {
        "model": model, "mesh": f"{N_DEVICES // fsdp} x {fsdp}", "base_bytes": base_bytes,
        "training_bytes": held(trained), "sampling_bytes": held(sampled),
        "gathered_a_micro_batch_bytes": shape.n_layers * sum(gathers),
        "gathers_a_layer": len(gathers), "micro_batch": sent(trained), "update": sent(applied),
        "a_token": sent(sampled), "compiled_s": time.perf_counter() - start,
        "tokens": int(batch.places.size), "recomputed": config.gradient_checkpointing,
    }  # fmt: skip


def main() -> None:
    args = tyro.cli(Args)
    devices = described("h100", N_DEVICES)
    rows = []
    print("| Qwen3 | data x fsdp | base | to train | to decode | all-reduce, an update | gathered, "
          "a micro-batch | all else |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for model in args.models:
        for fsdp in args.fsdp:
            row = measure(model, fsdp, devices, args)
            rows.append(row)
            reduced, *more = row["update"].get("all-reduce", [0])
            known = {"all-gather"}
            others = {k: v for k, v in row["micro_batch"].items() if k not in known}
            print(
                f"| {model} | {row['mesh']} | {row['base_bytes'] / GB:.1f} GB "
                f"| {row['training_bytes'] / GB:.1f} GB | {row['sampling_bytes'] / GB:.1f} GB "
                f"| {reduced / 1e6:.1f} MB | {row['gathered_a_micro_batch_bytes'] / GB:.1f} GB "
                f"| {[*more, *others] or 'nothing'} |",
                flush=True,
            )
    print(json.dumps({"arguments": vars(args), "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
