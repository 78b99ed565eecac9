"""A Hugging Face folder of safetensors -> the model: every tensor used, every parameter filled.

Our names are the checkpoint's, but for the leaf: kernel, scale and embedding are all `weight`
there, kernels are transposed, and layers are stacked. One stacked parameter is read at a time,
in its final type and layout, so that no more than one of them ever exists twice.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from transformers import AutoConfig, PretrainedConfig

from jgrpo.errors import InputError
from jgrpo.policy.lora import fresh_adapter, split
from jgrpo.policy.mesh import lies
from jgrpo.policy.model import Decoder, ModelConfig

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
MAX_PROBLEMS_SHOWN = 12
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of each file, for a fingerprint."""
SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)
QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|biases|g_idx|SCB|weight_(scale|packed|zero_point|shape|global_scale)"
    r"(_\w+)?|input_scale|(nested_)?(absmax|quant_map)|quant_state\..*)$"
)
"""Tensors that GPTQ, AWQ, FP8, bitsandbytes, compressed-tensors and MLX put beside a weight."""
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*"]
M = TypeVar("M", bound=nnx.Module)


def model_folder(model_id: str, option: str = "model_id") -> Path:
    """The folder of a model: itself if it is one, else the hub's (downloaded once, then cached)."""
    if Path(model_id).is_dir():
        return Path(model_id)
    if Path(model_id).is_file():
        raise InputError(f"{option}={model_id!r} is a file; give the model's folder")
    try:
        return Path(snapshot_download(model_id, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{option}={model_id!r} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the spelling and the "
            "network, or download the model elsewhere and give its folder."
        ) from error


def weights_fingerprint(folder: Path) -> str:
    """Of the sizes of a model's files and samples of their bytes: takes no time at any size, and
    two models that were trained apart differ in it."""
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            starts = range(0, size, -(-size // SAMPLES)) if size else ()
            for start in (*starts, max(0, size - SAMPLE_BYTES)):
                data.seek(start)
                found.update(data.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def read_hf_config(folder: Path) -> PretrainedConfig:
    """A folder's config.json as transformers reads it. InputError if it is missing, damaged, or of
    a quantised model."""
    if not (folder / "config.json").is_file():
        hint = (folder / "adapter_config.json").is_file() * (
            ": it is an adapter's; --model_id is the base model"
        )
        raise InputError(f"model folder {folder} has no config.json{hint}")
    _refuse_quantised_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):  # the remedy that transformers names is none here
            raise InputError(
                f"{folder}/config.json: the model needs code of its own, which is never run"
            ) from error
        raise InputError(f"{folder}/config.json cannot be read: {error}") from error


def _refuse_quantised_config(folder: Path) -> None:
    """By the method that config.json names: `quantization_config`, or MLX's own `quantization`."""
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        asked = content.get("quantization_config") or content.get("quantization")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # transformers says what is wrong with it
    if not asked:
        return
    known = asked if isinstance(asked, dict) else {"quant_method": str(asked)}
    method = known.get("quant_method")
    if not method and any(key.startswith(("load_in_", "bnb_")) for key in known):
        method = "bitsandbytes"
    if not method and content.get("quantization"):
        method = "mlx"
    bits = f", {known['bits']} bits" if known.get("bits") else ""
    raise _quantised(f"{folder}/config.json", f"{method or 'of an unnamed method'}{bits}")


def _quantised(where: str, how: str) -> InputError:
    return InputError(
        f"{where}: the model is quantised ({how}), which is not supported: the gradient needs the "
        "base's weights in bfloat16, float16 or float32; give the unquantised base that it was "
        "made from (its model card names it)"
    )


def _refuse_quantised_tensors(folder: Path, tensors: dict) -> None:
    for name in tensors:
        if QUANTISED.search(name):
            raise _quantised(str(folder), f"it holds {name}")
        if (kind := tensors[name].get_slice(name).get_dtype()).startswith("F8"):
            raise _quantised(str(folder), f"FP8: {name} is of type {kind}")


def model_config(folder: Path) -> ModelConfig:
    """The shape of the model in a folder. Raises InputError for what we cannot run."""
    hf = read_hf_config(folder)
    with ExitStack() as files, suppress(OSError, SafetensorError):  # told when they are loaded
        for name in sorted(folder.glob("*.safetensors")):
            opened = files.enter_context(safe_open(name, framework="numpy"))
            _refuse_quantised_tensors(folder, dict.fromkeys(opened.keys(), opened))
    try:
        config = ModelConfig.from_hf(hf)
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from None
    if odd := [f"{name}={getattr(hf, name)}" for name in SIZES if getattr(hf, name) < 1]:
        raise InputError(f"{folder}/config.json: {', '.join(odd)}: must be positive")
    return config


def abstract_model(folder: Path, **options: Any) -> Decoder:
    """The model of a folder as shapes and types alone, without an array; options of Decoder."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return nnx.merge(*_traced_model(model_config(folder), **given))


@lru_cache(maxsize=8)
def _traced_model(config: ModelConfig, **options: Any) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options)))


def load_model(
    folder: Path,
    *,
    dtype: str = "float32",
    rank: int = 0,
    alpha: float = 32,
    target_modules: tuple[str, ...] = (),
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Decoder:
    """The model of a folder in `dtype`, its base on a `mesh`, with a fresh float32 adapter if rank
    > 0.

    Raises InputError as `filled` does.
    """
    shape = {"dtype": dtype, "rank": rank, "alpha": alpha, "target_modules": target_modules}
    model = abstract_model(folder, **shape)
    # A tied head's weight is a copy of the embedding that some tools write.
    unused = {"lm_head.weight"} if model.config.tied_head else set()
    return filled(folder, model, unused=unused, seed=seed, mesh=mesh)


def filled(
    folder: Path,
    module: M,
    *,
    unused: Collection[str] = (),
    seed: int = 0,
    mesh: Mesh | None = None,
) -> M:
    """The abstract `module` with the arrays of a folder's tensors, and a fresh adapter if it has
    one; tensors named in `unused` may be there.

    InputError lists every tensor that is missing, unexpected or of another shape, before any is
    read.
    """
    graph, adapter, base = split(module)
    with ExitStack() as files:
        tensors, files_of = _open_all(folder, files)
        _refuse_quantised_tensors(folder, tensors)
        flat = list(nnx.to_flat_state(base))
        _check(folder, tensors, flat, unused)
        base = nnx.from_flat_state(
            (path, leaf.replace(_read(folder, tensors, files_of, path, leaf, mesh)))
            for path, leaf in flat
        )
    return nnx.merge(graph, fresh_adapter(adapter, seed), base)


def tensor_names(path: tuple, shape: tuple[int, ...]) -> list[str]:
    """Checkpoint names of one of our parameters: one, or one a layer if it is stacked [L, ...]."""
    name = ".".join((*map(str, path[:-1]), LEAF_NAMES[path[-1]]))
    if not name.startswith("model.layers."):
        return [name]
    return [name.replace("model.layers.", f"model.layers.{i}.") for i in range(shape[0])]


def _open_all(folder: Path, files: ExitStack) -> tuple[dict, dict[str, Path]]:
    """Tensor name -> the open file that holds it, and its path. Where both are there,
    model.safetensors counts and the index is another save's, as transformers has it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if odd := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{odd[0]!r} is not in the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is damaged ({error!r}); download it again") from error
    else:
        names = ["model.safetensors"]
    tensors: dict = {}
    files_of: dict[str, Path] = {}
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"model folder {folder} has no {name}{_about_pickles(folder)}")
        try:
            (folder / name).open("rb").close()  # safetensors calls missing whatever it cannot open
            file = files.enter_context(safe_open(folder / name, framework="numpy"))
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read: {error}") from error
        except SafetensorError as error:
            raise InputError(f"{folder / name} is damaged ({error}); download it again") from error
        if twice := sorted(set(tensors) & set(file.keys())):
            raise InputError(f"{folder / name}: {twice[0]} is in another file as well")
        tensors.update(dict.fromkeys(file.keys(), file))
        files_of.update(dict.fromkeys(file.keys(), folder / name))
    return tensors, files_of


def _about_pickles(folder: Path) -> str:
    if not (found := sorted(f.name for p in ("*.bin", "*.pt", "*.pth") for f in folder.glob(p))):
        return ""
    return (
        f": {found[0]} is a pickle, which can run code and is never read; convert it with "
        "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
    )


def _problems(tensors: dict, flat: list, may_be_unused: Collection[str]) -> Iterator[str]:
    unused = {n for n in tensors if not n.endswith("rotary_emb.inv_freq")} - set(may_be_unused)
    for path, leaf in flat:
        names = tensor_names(path, leaf.shape)
        shape = leaf.shape[1:] if path[1] == "layers" else leaf.shape
        wanted = list(shape[::-1] if path[-1] == "kernel" else shape)
        for name in names:
            if name not in unused:
                yield f"{name} is missing (shape {wanted})"
                continue
            unused.remove(name)
            tensor = tensors[name].get_slice(name)
            if list(tensor.get_shape()) != wanted:
                yield f"{name} has shape {tensor.get_shape()}, config.json makes it {wanted}"
            if tensor.get_dtype() not in ("F32", "BF16", "F16"):
                yield f"{name} is of type {tensor.get_dtype()}, not F32, BF16 or F16"
    yield from (f"{name} is not a parameter of this architecture" for name in sorted(unused))


def _check(folder: Path, tensors: dict, flat: list, may_be_unused: Collection[str]) -> None:
    problems = list(_problems(tensors, flat, may_be_unused))
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise InputError(
            f"the weights in {folder} do not fit its config.json:\n  " + "\n  ".join(shown)
        )


def _slice(file: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor. The file is opened for it alone: while it is open, all pages of it that
    were read count as the process's memory."""
    with safe_open(file, framework="numpy") as opened:
        return opened.get_slice(name)[index]


def _read(
    folder: Path, tensors: dict, files_of: dict, path: tuple, leaf, mesh: Mesh | None
) -> jax.Array:
    """A parameter; of one that is cut over devices, what those of this process hold."""
    stacked, names = path[1] == "layers", tensor_names(path, leaf.shape)
    read: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if (known := read.get(str(index))) is not None:
            return known
        sizes = [len(range(*cut.indices(n))) for cut, n in zip(index, leaf.shape, strict=True)]
        array = np.empty(sizes, jnp.dtype(leaf.dtype))
        inner = index[1:] if stacked else index
        for i, name in enumerate(names[index[0]] if stacked else names):
            target = array[i] if stacked else array
            with np.errstate(over="ignore"):  # what float16 cannot hold is told below
                if path[-1] == "kernel":
                    target[...] = _slice(files_of[name], name, inner[::-1]).T
                else:
                    target[...] = _slice(files_of[name], name, inner)
        return read.setdefault(str(index), array)

    if mesh is None:
        filled = jnp.asarray(part((slice(None),) * len(leaf.shape)))
    else:
        there = lies(mesh, path, leaf.shape)
        filled = jax.make_array_from_callback(leaf.shape, there, part)  # type: ignore[arg-type]
    jax.block_until_ready(filled)  # else several copies are in flight
    if not _is_finite(filled):
        raise InputError(f"the weights in {folder}: {_what_is_not_finite(tensors, names, leaf)}")
    return filled


def _what_is_not_finite(tensors: dict, names: Sequence[str], leaf) -> str:
    for name in names:
        array = tensors[name].get_tensor(name)
        if not np.isfinite(array).all():
            return f"{name} holds NaN or infinity; download it again"
        if np.abs(array).max() > jnp.finfo(leaf.dtype).max:
            return f"{name} goes beyond {jnp.dtype(leaf.dtype)}; give --dtype bfloat16"
    raise AssertionError(names)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    """Compiled, so that there is no array of the intermediate result."""
    return jnp.isfinite(array).all()


def save_model(model: nnx.Module, folder: Path, hf_config: PretrainedConfig, dtype: str) -> None:
    """Write the base as a Hugging Face folder: config.json and model.safetensors."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in nnx.to_flat_state(split(model)[2]):
        array = np.asarray(leaf[...]).astype(jnp.dtype(dtype))
        array = array.swapaxes(-1, -2) if path[-1] == "kernel" else array
        names = tensor_names(path, array.shape)
        parts = array if path[1] == "layers" else [array]
        tensors.update((n, np.ascontiguousarray(x)) for n, x in zip(names, parts, strict=True))
    hf_config.dtype = dtype
    hf_config.save_pretrained(folder)
    # Not save_file, which gives its files mode 0600.
    (folder / "model.safetensors").write_bytes(to_safetensors(tensors, {"format": "pt"}))
