"""GRPO with a rank-r LoRA adapter and a verifiable reward, in JAX.

import jgrpo
    model = jgrpo.load_model("Qwen/Qwen3-1.7B", adapter="runs/1/adapters/step_000050")
    logits = model(ids)                       # int32 [N, T] -> float32 [N, T, V]

`__all__` is all that docs/loop.py, the whole algorithm on one page, is made of. A run with
everything around it is `jgrpo.train.train(config)`.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jgrpo.home import find_home

if TYPE_CHECKING:
    from jgrpo.policy import Decoder

find_home()  # before any library looks for its cache
# "PyTorch was not found", it would say: only its tokenizers and configs are wanted.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
__version__ = "0.2.0"
_HANDED_ON = {
    "Config": "config",
    "load_config": "config",
    "open_problems": "run.session",
    "split": "policy.lora",
    "JaxSampler": "rollout.embedded",
    "VllmSampler": "rollout.vllm",
    "generate": "rollout.generate",
    "is_correct": "answers",
    "last_boxed": "answers",
    "group_advantages": "advantages",
    "leave_one_out": "advantages",
    "LOSSES": "losses",
    "adam": "update.step",
}
"""Names and the files that they live in, imported when they are first asked for: JAX takes its
time, and a command that answers --help has none."""
_MOVED = {
    **dict.fromkeys(("weights", "adapter", "model", "lora", "batch"), "policy"),
    **dict.fromkeys(("problems", "tokenizer"), "prompts"),
    **dict.fromkeys(("replies", "protocol", "vllm"), "rollout"),
}
"""Files that lay in the package itself before it had rooms: `jgrpo.weights` still imports."""
__all__ = ["load_model", "read_rollouts", "save_adapter", *_HANDED_ON]


def __getattr__(name: str) -> Any:
    if name not in _HANDED_ON:
        raise AttributeError(f"module 'jgrpo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jgrpo.{_HANDED_ON[name]}"), name)


class _Moved(ModuleType):
    """A file under its old name, imported when it is first asked for something."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # who walks through sys.modules asks each for its __file__
            raise AttributeError(name)
        old = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(f"jgrpo.{_MOVED[old]}.{old}"), name)


sys.modules.update({f"jgrpo.{old}": _Moved(f"jgrpo.{old}") for old in _MOVED})


def __dir__() -> list[str]:
    return sorted({*globals(), *_HANDED_ON})


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
    model.base_model = str(model_id)
    if adapter is not None:
        graph, fresh, base = split(model)
        model = nnx.merge(graph, adapters.load(Path(adapter), fresh), base)
    return model


def save_adapter(model: "Decoder", folder: str | Path) -> None:
    """Write the model's adapter as a PEFT folder, which must not exist yet; it names the base that
    `load_model` was given, so that `AutoPeftModelForCausalLM` finds it."""
    from jgrpo.policy import adapter as adapters

    adapters.save_model_adapter(model, Path(folder))


def read_rollouts(run: str | Path, step: int) -> list[dict[str, Any]]:
    """The completions that step `step` of a run learned from, groups together: problem, prompt,
    completion, prompt_ids, token_ids, sampler_logprobs, gold, reward, reward_parts, advantage,
    finish_reason. InputError if the run has no such step."""
    from jgrpo.run.rundir import read_config, rollouts_file
    from jgrpo.study import compare

    file, config = rollouts_file(Path(run), step), read_config(run)["config"]
    return [dict(line) for line in compare.read_rollouts(file, config["group_size"])]
