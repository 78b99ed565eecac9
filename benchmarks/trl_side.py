"""TRL's GRPOTrainer on a rollout that is given: its own compute_loss, backward and optimizer.

The trainer is made as its users make it (PEFT model, GRPOConfig); only generation and rewards are
left out. Prompts are padded on the left and completions on the right, as the trainer does; one
optimizer update a rollout, so there are no old_per_token_logps (the trainer then skips that pass).
"""

import tempfile
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import jgrpo
from jgrpo.config import Config

TINY = jgrpo.__path__[0] + "/tiny/base"
"""A tokenizer has to be given; nothing is ever tokenized."""


class Trl:
    """`learn` makes one update of the adapter from a rollout's lines -> its gradient norm."""

    def __init__(
        self, config: Config, model: PeftModel, micro_batch_size: int, checkpointing: bool
    ):
        self.config, self.micro_batch_size = config, micro_batch_size
        self.folder = tempfile.TemporaryDirectory()  # the trainer wants one; it goes with this
        n = config.n_prompts_per_step * config.group_size
        arguments = GRPOConfig(
            self.folder.name,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=n // micro_batch_size,
            num_generations=config.group_size,
            loss_type="grpo",
            beta=0.0,
            temperature=config.temperature,
            learning_rate=config.lr,
            max_grad_norm=1.0,
            gradient_checkpointing=checkpointing,
            bf16=config.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            max_completion_length=config.max_tokens,
        )
        self.trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["?"] * n}),
            processing_class=AutoTokenizer.from_pretrained(TINY),
        )
        self.trainer.current_gradient_accumulation_steps = n // micro_batch_size
        if checkpointing:  # as `Trainer.train` does
            model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        self.trainer.create_optimizer()
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.trainer.model.train()

    def learn(self, lines: Sequence[dict]) -> float:
        trainer, optimizer = self.trainer, self.trainer.optimizer
        optimizer.zero_grad()
        batch = padded(lines, trainer.args.device)
        for index in torch.arange(len(lines)).split(self.micro_batch_size):
            part = {name: x[index] for name, x in batch.items()}
            part["num_items_in_batch"] = batch["completion_mask"].sum()
            trainer.compute_loss(trainer.model, part).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        optimizer.step()
        return float(norm)


def padded(lines: Sequence[dict], device: torch.device) -> dict[str, torch.Tensor]:
    """What the trainer's own generation step would hand to its loss."""
    n = len(lines)
    left = max(len(line["prompt_ids"]) for line in lines)
    right = max(len(line["token_ids"]) for line in lines)
    prompts, prompt_mask = torch.zeros(2, n, left, dtype=torch.long)
    completions, completion_mask = torch.zeros(2, n, right, dtype=torch.long)
    for i, line in enumerate(lines):
        prompt, completion = line["prompt_ids"], line["token_ids"]
        prompts[i, left - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[i, left - len(prompt) :] = 1
        completions[i, : len(completion)] = torch.tensor(completion)
        completion_mask[i, : len(completion)] = 1
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([line["advantage"] for line in lines]),
    }
    return {name: x.to(device) for name, x in batch.items()}
