"""Tunix's RL trainer on a rollout that is given: its own Llama, LoRA, loss, and accumulation.

Made as its GRPO learner makes it (`rl.trainer.Trainer` with the policy loss "grpo"), without
rollout and rewards. Its Llama ignores rope_theta and takes 1,000,000, so the benchmark's model has
that; its Qwen3 is not used here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from safetensors.numpy import load_file
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl.algo_core import grpo_loss_fn
from tunix.rl.common import TrainExample
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

from jgrpo.config import Config

PADDING = 0
MODULES = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Tunix:
    """`learn` makes one update of the adapter from a rollout's lines -> its gradient norm."""

    def __init__(self, config: Config, adapter: Path, micro_batch_size: int):
        self.micro_batch_size = micro_batch_size
        n = config.n_prompts_per_step * config.group_size
        model = create_model_from_safe_tensors(config.model_id, model_config(config.model_id))
        provider = qwix.LoraProvider(
            module_path=MODULES, rank=config.lora_r, alpha=config.lora_alpha
        )
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        copy_adapter(model, load_file(adapter / "adapter_model.safetensors"))
        optimizer = optax.chain(norm_seen(), optax.clip_by_global_norm(1.0), optax.adam(config.lr))
        self.trainer = Trainer(
            model,
            optimizer,
            TrainingConfig(
                eval_every_n_steps=10**9, gradient_accumulation_steps=n // micro_batch_size
            ),
            custom_checkpoint_metadata_fn=dict,
        )
        self.trainer.is_managed_externally = True
        algorithm = GRPOConfig(num_generations=config.group_size, beta=0.0)
        algorithm.temperature = config.temperature  # as its learner does
        self.trainer.with_loss_fn(
            lambda model, train_example: grpo_loss_fn(
                model, train_example, algorithm, pad_id=PADDING, eos_id=1
            ),
            has_aux=True,
        )
        self.trainer.with_gen_model_input_fn(lambda example: {"train_example": example})

    def learn(self, lines: Sequence[dict]) -> float:
        batch = padded(lines)
        parts = [
            TrainExample(
                **{name: x[i : i + self.micro_batch_size] for name, x in batch.items()},
                ref_per_token_logps=None,
                old_per_token_logps=None,
            )
            for i in range(0, len(lines), self.micro_batch_size)
        ]
        self.trainer.train(parts)
        state = nnx.state(self.trainer.optimizer)
        norms = [x for path, x in nnx.to_flat_state(state) if path[-1] == "norm"]
        return float(norms[0][...])


class NormSeen(NamedTuple):
    norm: jax.Array


def norm_seen() -> optax.GradientTransformation:
    """Keeps the norm of the gradient that the optimizer is given."""
    return optax.GradientTransformation(
        lambda _: NormSeen(jnp.zeros(())),
        lambda g, _, params=None: (g, NormSeen(optax.tree.norm(g))),
    )


def model_config(folder: str) -> ModelConfig:
    hf = json.loads((Path(folder) / "config.json").read_text())
    heads = hf["num_attention_heads"]
    return ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=1_000_000,
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )


def copy_adapter(model: Llama3, tensors: dict[str, np.ndarray]) -> None:
    """PEFT's A [R, in] and B [out, R] into qwix's, whose axes are those of the kernel."""
    state = nnx.state(model, nnx.LoRAParam)
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        _, layer, block, module, name = map(str, path)
        block = {"attn": "self_attn"}.get(block, block)
        kind = "lora_A" if name.endswith("lora_a") else "lora_B"
        key = f"base_model.model.model.layers.{layer}.{block}.{module}.{kind}.weight"
        flat.append((path, leaf.replace(jnp.asarray(tensors.pop(key).T.reshape(leaf.shape)))))
    assert not tensors, sorted(tensors)
    nnx.update(model, nnx.from_flat_state(flat))


def padded(lines: Sequence[dict]) -> dict[str, jax.Array]:
    """What the learner's own generation step would hand to the loss: prompts padded on the left,
    completions on the right."""
    n = len(lines)
    left = max(len(line["prompt_ids"]) for line in lines)
    right = max(len(line["token_ids"]) for line in lines)
    prompts, completions = np.zeros((n, left), np.int32), np.zeros((n, right), np.int32)
    for i, line in enumerate(lines):
        prompts[i, left - len(line["prompt_ids"]) :] = line["prompt_ids"]
        completions[i, : len(line["token_ids"])] = line["token_ids"]
    return {
        "prompt_ids": jnp.asarray(prompts),
        "prompt_mask": jnp.asarray(prompts != PADDING),
        "completion_ids": jnp.asarray(completions),
        "completion_mask": jnp.asarray(completions != PADDING).astype(jnp.float32),
        "advantages": jnp.asarray([line["advantage"] for line in lines], jnp.float32),
    }
