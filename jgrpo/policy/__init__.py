"""The policy: a frozen decoder with a LoRA adapter, its weights and adapter folders, and the
logprobs that it gives a packed batch of completions."""

from jgrpo.policy.batch import MicroBatch, Rows, micro_batches
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.policy.lora import split
from jgrpo.policy.model import Decoder, ModelConfig
from jgrpo.policy.weights import load_model, model_config, model_folder

__all__ = [
    "Decoder",
    "MicroBatch",
    "ModelConfig",
    "Rows",
    "load_model",
    "micro_batches",
    "model_config",
    "model_folder",
    "split",
    "token_logprobs",
]
