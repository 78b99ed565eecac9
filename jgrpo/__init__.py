"""GRPO with a rank-r LoRA adapter and a verifiable reward, in JAX.

import jgrpo
    model = jgrpo.load_model("Qwen/Qwen3-1.7B", adapter="runs/1/adapters/step_000050")
    logits = model(ids)                       # int32 [N, T] -> float32 [N, T, V]
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jgrpo.policy.model import Decoder

__version__ = "0.1.0"
__all__ = ["load_model", "save_adapter"]


def load_model(
    model_id: str,
    *,
    lora_r: int = 0,
    lora_alpha: float = 32,
    adapter: str | Path | None = None,
    dtype: str = "float32",
) -> "Decoder":
    """A model m (nnx.Module) with m(ids): int32 [N, T] -> float32 logits [N, T, V].

    `lora_r` > 0 puts a fresh adapter on all seven projections; `adapter` reads a PEFT folder, whose
    own rank, alpha and targets hold. InputError says what is wrong with a folder.
    """
    from flax import nnx

    from jgrpo.config import PROJECTIONS
    from jgrpo.policy import adapter as adapters
    from jgrpo.policy import weights
    from jgrpo.policy.lora import split

    shape = adapters.AdapterConfig(lora_r, lora_alpha, PROJECTIONS)
    if adapter is not None:
        shape = adapters.read_config(Path(adapter))
    model = weights.load_model(
        weights.model_folder(model_id),
        dtype=dtype,
        rank=shape.rank,
        alpha=shape.alpha,
        target_modules=shape.target_modules,
    )
    if adapter is not None:
        graph, fresh, base = split(model)
        model = nnx.merge(graph, adapters.load(Path(adapter), fresh), base)
    return model


def save_adapter(model: "Decoder", folder: str | Path) -> None:
    """Write the model's adapter as a PEFT folder, which must not exist yet."""
    from jgrpo.policy import adapter as adapters

    adapters.save_model_adapter(model, Path(folder))
