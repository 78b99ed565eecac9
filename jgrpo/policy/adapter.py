"""The adapter's arrays <-> a PEFT folder (adapter_config.json, adapter_model.safetensors).

PEFT keeps A as [R, in] and B as [out, R], one pair a layer; we keep A [L, in, R] and B [L, R, out].
A folder is written under another name and renamed, so that it is whole or absent, and it is never
written twice: vLLM's prefix cache knows an adapter by its path, and would serve the old one.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from jgrpo.config import PROJECTIONS
from jgrpo.errors import InputError
from jgrpo.policy.lora import LoRAParam, rank_of, stacked_up, with_rank
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


def fingerprint(folder: Path) -> str:
    """Of all that a PEFT folder says. InputError if it is none."""
    read_config(folder)
    whole = hashlib.sha256((Path(folder) / CONFIG_FILE).read_bytes())
    try:
        with (Path(folder) / WEIGHTS_FILE).open("rb") as weights:
            whole.update(hashlib.file_digest(weights, "sha256").digest())
    except OSError as error:
        raise InputError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from None
    return whole.hexdigest()[:16]


def base_of(folder: Path) -> str:
    """The name of the base that a PEFT folder was made for; empty where it names none."""
    named = json.loads((Path(folder) / CONFIG_FILE).read_text()).get("base_model_name_or_path")
    return named if isinstance(named, str) else ""


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
    _refuse_a_pickle(folder)
    odd = [k for k, plain in UNSUPPORTED.items() if peft.get(k) not in (plain, None, [], {})]
    if str(peft.get("init_lora_weights")).startswith(INIT_CHANGES_BASE):
        odd.append("init_lora_weights")  # PEFT then trains against another base than the plain one
    if odd:
        what = ", ".join(f"{k}={peft[k]!r}" for k in odd)
        raise InputError(f"{file}: only plain LoRA is read, not {what}")
    names = targets if isinstance(targets, list) else [targets or ""]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{file} is damaged: target_modules={targets!r}: must name modules")
    for name, value, types in (("r", rank, (int,)), ("lora_alpha", alpha, (int, float))):
        if type(value) not in types or not 0 < value < 2**31:
            raise InputError(f"{file} is damaged: {name}={value!r}: must be a positive number")
    if peft.get("use_rslora"):  # PEFT then scales by alpha / sqrt(r)
        alpha = alpha * math.sqrt(rank)
    if _is_a_choice(peft):
        return AdapterConfig(rank, alpha, _targets_of_tensors(folder))
    unknown = [t for t in targets if t not in PROJECTIONS]
    if unknown or not targets:
        raise InputError(f"{file}: target_modules {unknown} are none of {', '.join(PROJECTIONS)}")
    return AdapterConfig(rank, alpha, tuple(targets))


def _is_a_choice(peft: dict) -> bool:
    """Do the targets choose among modules, by a pattern, by whole names or by what they exclude?
    Then a projection may have an adapter in some layers only, and the tensors say in which."""
    targets = peft.get("target_modules")
    whole = isinstance(targets, list) and any("." in name for name in targets)
    return whole or not isinstance(targets, list) or bool(peft.get("exclude_modules"))


def _targets_of_tensors(folder: Path) -> tuple[str, ...]:
    names = {key.split(".")[-3] for key in _tensors(folder) if ".lora_" in key}
    if unknown := sorted(names - set(PROJECTIONS)):
        raise InputError(
            f"{folder}/{WEIGHTS_FILE}: it adapts {unknown}, which are none of "
            f"{', '.join(PROJECTIONS)}"
        )
    if not names:
        raise InputError(f"{folder}/{WEIGHTS_FILE} holds no adapter (no lora_A, no lora_B)")
    return tuple(name for name in PROJECTIONS if name in names)


def _refuse_a_pickle(folder: Path) -> None:
    pickle = Path(folder) / "adapter_model.bin"
    if pickle.is_file() and not (Path(folder) / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{pickle} is a pickle, which can run code and is never read; convert it with PEFT: "
            f"PeftModel.from_pretrained(BASE, {str(folder)!r}).save_pretrained(FOLDER)"
        )


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    file = Path(folder) / WEIGHTS_FILE
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from None


def _some_layers_only(folder: Path) -> bool:
    try:
        return _is_a_choice(json.loads((Path(folder) / CONFIG_FILE).read_text()))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def _other_half(key: str) -> str:
    a, b = ".lora_A.", ".lora_B."
    return key.replace(a, b) if a in key else key.replace(b, a)


def load(folder: Path, like: nnx.State) -> nnx.State:
    """Read a PEFT folder into the shapes of `like`: every tensor used, every parameter filled.

    float32, whatever the file's type. InputError names the tensors that are missing, unexpected,
    of another shape, or not finite. Scale is not stored in arrays: compare `read_config`.
    """
    file, tensors = Path(folder) / WEIGHTS_FILE, _tensors(folder)
    may_lack = _some_layers_only(folder)
    whole = set(tensors)
    problems, flat = [], []
    for path, leaf in nnx.to_flat_state(like):
        array = np.zeros(leaf.shape, np.float32)
        for i in range(leaf.shape[0]):
            key = _peft_key(path, i)
            tensor = tensors.pop(key, None)
            if tensor is None and may_lack and _other_half(key) not in whole:
                continue  # this layer has none: A = B = 0
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


def load_all(folders: Sequence[Path], like: nnx.State) -> nnx.State:
    """`load` of one folder, or of one a member into [E, ...], filled up to the rank of `like`."""
    leaf = jax.tree.leaves(like)[0]
    if leaf.ndim == 3:
        [folder] = folders
        return load(folder, like)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), like)
    ranks = [read_config(folder).rank for folder in folders]
    each = [
        load(folder, jax.eval_shape(lambda a, r=r: with_rank(a, r), shapes))
        for folder, r in zip(folders, ranks, strict=True)
    ]
    return stacked_up([with_rank(adapter, rank_of(like)) for adapter in each])
