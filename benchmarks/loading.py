"""Loading by share: what two processes take of the host's memory, each with its half of a base.

    python benchmarks/loading.py [--dtype bfloat16] [--n_processes 2]

Random weights of a 0.6 B model's shape go into safetensors shards in a temporary folder; then
processes that know of each other (`--fsdp` is their number) load them. Of each: the most that it
ever held while it loaded (VmHWM, which counts pages of mapped files too), less what it held before,
against the bytes of the parameters that its device has. Linux only. Last line: one JSON document.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from flax import nnx
from safetensors.numpy import save_file
from transformers import AutoConfig

from jgrpo.policy.lora import split
from jgrpo.policy.model import Decoder, ModelConfig
from jgrpo.policy.weights import tensor_names

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ports import free_port

SHARD_BYTES = 500_000_000
SHAPE = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
"""Qwen3-0.6B's."""
WORKER = """
import gc, json, re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jgrpo.policy.lora import split
from jgrpo.policy.mesh import make_mesh
from jgrpo.policy.weights import load_model
from jgrpo.run.hosts import join
from jgrpo.run.session import configure_jax

def held(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, dtype, address, n, i = sys.argv[1:]
join(address, int(n), int(i)) if int(n) > 1 else None
configure_jax()
mesh = make_mesh(int(n))
jnp.isfinite(jnp.zeros(2)).all().block_until_ready()
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = held("VmRSS")
base = split(load_model(Path(folder), dtype=dtype, mesh=mesh))[2]
share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(base))
found = {"share_bytes": share, "peak_bytes": held("VmHWM") - before, "before_bytes": before}
print(json.dumps(found))
"""


@dataclass
class Args:
    """Measure what loading takes of the host's memory."""

    dtype: str = "bfloat16"
    """In which it is loaded; the files are in bfloat16's size, float16."""
    n_processes: int = 2
    """Over which the base is cut."""


def write(folder: Path, shape: dict) -> None:
    """A model's folder, random weights in shards."""
    config = AutoConfig.for_model(**shape)
    config.save_pretrained(folder)
    model = nnx.eval_shape(lambda: Decoder(ModelConfig.from_hf(config), rngs=nnx.Rngs(0)))
    some = np.random.default_rng(0).normal(scale=0.02, size=99_991).astype(np.float16)
    shard, index = {}, {}  # type: ignore[var-annotated]
    for path, leaf in nnx.to_flat_state(split(model)[2]):
        stacked = path[1] == "layers"
        sizes = leaf.shape[1:] if stacked else leaf.shape
        for name in tensor_names(path, leaf.shape):
            shard[name] = np.resize(some, sizes[::-1] if path[-1] == "kernel" else sizes)
            if sum(x.nbytes for x in shard.values()) > SHARD_BYTES:
                _flush(folder, shard, index)
    _flush(folder, shard, index)
    weight_map = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(weight_map)


def _flush(folder: Path, shard: dict, index: dict) -> None:
    """Write the shard, under a name of its own, and empty it."""
    if shard:
        name = f"model-{len(list(folder.glob('*.safetensors'))):05}.safetensors"
        save_file(shard, folder / name)
        index |= dict.fromkeys(shard, name)
        shard.clear()


def main() -> None:
    args = tyro.cli(Args)
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), SHAPE)
        given = [name, args.dtype, address, str(args.n_processes)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, *given, str(i)], stdout=subprocess.PIPE, text=True
            )
            for i in range(args.n_processes)
        ]
        found = [json.loads(p.communicate()[0].splitlines()[-1]) for p in processes]
    for i, one in enumerate(found):
        share, peak = one["share_bytes"], one["peak_bytes"]
        print(f"process {i}: {peak / 1e6:,.0f} MB at most, of a share of {share / 1e6:,.0f} MB: "
              f"{peak / share:.2f}")  # fmt: skip
    print(json.dumps({"arguments": vars(args), "processes": found}))


if __name__ == "__main__":
    main()
