"""The adapter's arrays <-> a PEFT folder (adapter_config.json, adapter_model.safetensors).

PEFT keeps A as [R, in] and B as [out, R], one pair a layer; we keep A [L, in, R] and B [L, R, out].
A folder is written under another name and renamed, so that it is whole or absent, and it is never
written twice: vLLM's prefix cache knows an adapter by its path, and would serve the old one.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from jgrpo.config import PROJECTIONS
from jgrpo.errors import InputError
from jgrpo.policy.lora import LoRAParam
from jgrpo.policy.model import Decoder

PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
UNSUPPORTED = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "alora_invocation_tokens": None,
}
INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What shapes an adapter: rank, alpha, and the projections that have one."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


def adapter_arrays(adapter: nnx.State) -> dict[str, np.ndarray]:
    """The adapter under PEFT's keys: `...layers.0.self_attn.q_proj.lora_A.weight`, float32."""
    arrays = {}
    for path, leaf in nnx.to_flat_state(adapter):
        stacked = np.asarray(leaf[...], np.float32)
        for i, layer in enumerate(stacked):
            arrays[_peft_key(path, i)] = np.ascontiguousarray(layer.T)
    return arrays


def _peft_key(path: tuple, layer: int) -> str:
    name = ".".join(map(str, path)).replace("model.layers.", f"model.layers.{layer}.")
    return f"{PREFIX}{name}.weight"


def save(adapter: nnx.State, folder: Path, config: AdapterConfig, base_model: str) -> None:
    """Write a PEFT folder, atomically. InputError if it exists already."""
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"adapter folder {folder} exists; an adapter's folder is never reused")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": sorted(config.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    (partial / CONFIG_FILE).write_text(json.dumps(peft, indent=2) + "\n")
    # Not save_file, which gives its files mode 0600, and errors of its own.
    weights = to_safetensors(adapter_arrays(adapter), metadata={"format": "pt"})
    (partial / WEIGHTS_FILE).write_bytes(weights)
    os.rename(partial, folder)


def save_model_adapter(model: Decoder, folder: Path) -> None:
    """Write the adapter that a model carries. InputError if it carries none."""
    adapter = nnx.state(model, LoRAParam)
    if not model.rank:
        raise InputError("this model has no adapter; load it with lora_r of 1 or more")
    shape = AdapterConfig(model.rank, model.alpha, model.target_modules)
    save(adapter, folder, shape, model.base_model)


def read_config(folder: Path) -> AdapterConfig:
    """Rank, alpha and targets of a PEFT folder. InputError for what we cannot represent."""
    file = Path(folder) / CONFIG_FILE
    try:
        peft = json.loads(file.read_text())
        rank, alpha, targets = peft["r"], peft["lora_alpha"], peft["target_modules"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is no PEFT adapter: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    odd = [k for k, plain in UNSUPPORTED.items() if peft.get(k) not in (plain, None)]
    if str(peft.get("init_lora_weights")).startswith(INIT_CHANGES_BASE):
        odd.append("init_lora_weights")  # PEFT then trains against another base than the plain one
    if odd or not isinstance(targets, list):
        what = ", ".join(f"{k}={peft[k]!r}" for k in odd) or f"target_modules={targets!r}"
        raise InputError(f"{file}: only plain LoRA with a list of targets is read, not {what}")
    for name, value, types in (("r", rank, (int,)), ("lora_alpha", alpha, (int, float))):
        if type(value) not in types or not 0 < value < 2**31:
            raise InputError(f"{file} is damaged: {name}={value!r}: must be a positive number")
    if peft.get("use_rslora"):  # PEFT then scales by alpha / sqrt(r)
        alpha = alpha * math.sqrt(rank)
    unknown = [t for t in targets if t not in PROJECTIONS]
    if unknown or not targets:
        raise InputError(f"{file}: target_modules {unknown} are none of {', '.join(PROJECTIONS)}")
    return AdapterConfig(rank, alpha, tuple(targets))


def load(folder: Path, like: nnx.State) -> nnx.State:
    """Read a PEFT folder into the shapes of `like`: every tensor used, every parameter filled.

    float32, whatever the file's type. InputError names the tensors that are missing, unexpected,
    of another shape, or not finite. Scale is not stored in arrays: compare `read_config`.
    """
    file = Path(folder) / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from None
    problems, flat = [], []
    for path, leaf in nnx.to_flat_state(like):
        array = np.zeros(leaf.shape, np.float32)
        for i in range(leaf.shape[0]):
            key = _peft_key(path, i)
            tensor = tensors.pop(key, None)
            if tensor is None:
                problems.append(f"{key} is missing")
            elif tensor.T.shape != array[i].shape:
                problems.append(f"{key} is {list(tensor.shape)}, not {list(leaf.shape[:0:-1])}")
            else:
                array[i] = tensor.T
                if not np.isfinite(array[i]).all():
                    problems.append(f"{key} is not finite")
        flat.append((path, leaf.replace(jnp.asarray(array))))
    problems += [f"{key} belongs to no target of this model" for key in sorted(tensors)]
    if problems:
        shown = "\n  ".join(problems[:12]) + ("\n  ..." if len(problems) > 12 else "")
        raise InputError(f"{file} does not fit the model:\n  {shown}")
    return nnx.from_flat_state(flat)
