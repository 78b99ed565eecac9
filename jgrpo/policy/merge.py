"""Base and adapter as one checkpoint: W + (alpha / r) B A, for who serves without LoRA."""

import shutil
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jgrpo.errors import InputError
from jgrpo.policy import adapter as adapters
from jgrpo.policy.lora import split
from jgrpo.policy.weights import load_model, model_folder, read_hf_config, save_model

BESIDE = ("*.json", "*.jinja", "*.txt", "tokenizer*")
"""Files of the base that go with the weights: tokenizer, chat template, generation config."""


def merge(base: str, adapter: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write the model in `base` with its `adapter` merged in as a Hugging Face folder.

    The sum is taken in float32, and rounded once, to `dtype`. InputError if `out` exists, or the
    adapter does not fit.
    """
    if out.exists():
        raise InputError(f"--merge {out}: exists already; give a new folder")
    shape, folder = adapters.read_config(adapter), model_folder(base)
    model = load_model(
        folder,
        dtype="float32",
        rank=shape.rank,
        alpha=shape.alpha,
        target_modules=shape.target_modules,
    )
    graph, fresh, weights = split(model)
    trained = adapters.load(adapter, fresh)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in {f for pattern in BESIDE for f in folder.glob(pattern) if f.is_file()}:
        if file.name != "model.safetensors.index.json":
            shutil.copyfile(file, partial / file.name)
    whole = nnx.merge(graph, fresh, added(weights, trained, shape.alpha / shape.rank))
    save_model(whole, partial, read_hf_config(folder), dtype)
    partial.rename(out)


def added(weights: nnx.State, adapter: nnx.State, scale: float) -> nnx.State:
    """The base's kernels [L, in, out] plus scale A B, in their own type; the rest as it is."""
    lora = {path: leaf[...] for path, leaf in nnx.to_flat_state(adapter)}

    def one(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        a = lora.get((*path[:-1], "lora_A"))
        if path[-1] != "kernel" or a is None:
            return leaf
        update = jnp.einsum("lir,lro->lio", a, lora[(*path[:-1], "lora_B")], precision="highest")
        return leaf.replace(leaf[...] + scale * update)

    return nnx.from_flat_state((path, one(path, leaf)) for path, leaf in nnx.to_flat_state(weights))
