"""The PyTorch baseline: the study's training loop on transformers, PEFT and torch, written anew.

    model = open_model(config, "runs/1/adapters/step_000003")
    metrics = Baseline(config, model).learn(lines)    # lines of runs/1/rollouts/step_000004.jsonl

It takes the configs of jgrpo, and makes the study's choices where they cost time and memory: a pass
over all rows for old_logprobs, every batch as wide as the rollout's longest row, logits [b, T, V]
and their log_softmax whole, micro-batches of 2, no row left out although its advantage is zero.
The losses are written from the formulas (README, docs), not from jgrpo/losses.py: two derivations
that agree are an argument, one and its copy are not.

Left out on purpose: the study encodes the returned text again and drops the end token; here both
sides train the sampled ids, or no number could be compared. Its token-level loss, which is not
DAPO's, is left out too: its description leaves the constant open.
Axes: N rows, b rows of a micro-batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from jgrpo.config import Config

STUDY_MICRO_BATCH_SIZE = 2


class Batch(NamedTuple):
    """N rows padded on the right to the longest of them. Column t of [N, T-1] is token t + 1."""

    ids: Tensor
    """int64 [N, T]"""
    attention: Tensor
    """int64 [N, T]: 1 on tokens, 0 on padding"""
    mask: Tensor
    """[N, T-1]: 1 on the completion tokens that are trained, the end token included"""
    sampler_logprobs: Tensor
    """[N, T-1], 0 where mask is 0"""
    advantages: Tensor
    """[N]"""
    old: Tensor | None = None
    """[N, T-1]: logprobs of the policy before the first update; no gradient goes to it"""
    ref: Tensor | None = None
    """[N, T-1]: logprobs of the base model, where the loss looks at them; likewise"""

    def rows(self, index: Tensor) -> "Batch":
        return Batch(*(None if x is None else x[index] for x in self))


# -- advantages and losses -----------------------------------------------------------------------


def advantages_of(rewards: Tensor, config: Config) -> Tensor:
    """rewards [P, G] -> advantages [P, G]: (r - mean) / (std + 1e-4), std with ddof 1; without std:
    r - mean; leave-one-out: r - mean of the others. Equal rewards have exact zeros."""
    n = rewards.shape[1]
    total = rewards.sum(dim=1, keepdim=True)
    others = (total - rewards) / (n - 1)
    centered = rewards - (others if config.use_leave_one_out else total / n)
    if config.use_std_norm:
        centered = centered / (rewards.std(dim=1, keepdim=True) + 1e-4)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return centered.masked_fill(equal, 0.0)


def token_weights(config: Config, mask: Tensor, n_rows: int, n_tokens: float) -> Tensor:
    """What each token [b, T-1] weighs in the loss; the update has n_rows rows and n_tokens trained
    tokens in all. Mean over rows of token means, or 1 / tokens, or 1 / (rows x max_tokens)."""
    if config.loss_type == "dr_grpo":
        return mask / (n_rows * config.max_tokens)
    if config.use_token_level_loss or config.loss_type == "cispo":
        return mask / max(n_tokens, 1)
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / n_rows


def log_ratio_of(config: Config, new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """log of how much likelier the policy makes what the old one sampled: of each token, or of the
    row, by the mean (GSPO) or the sum (REINFORCE with a row as one action) of its tokens."""
    d = (new - old) * mask
    if config.loss_type == "gspo":
        return d.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return d.sum(dim=1, keepdim=True) if config.loss_type == "rloo" else d


def policy_term(config: Config, new: Tensor, batch: Batch) -> Tensor:
    """What is minimised per token for the reward's sake [b, T-1]."""
    a = batch.advantages[:, None]
    ratio = log_ratio_of(config, new, batch.old, batch.mask).exp()
    if config.loss_type == "cispo":
        term = -ratio.detach().clamp(max=config.cispo_max_ratio) * a * new
    elif config.loss_type == "sapo":
        term = -soft_gate(config, ratio, a) * a
    elif config.loss_type == "dppo":
        term = -trusted(config, new.exp(), batch.old.exp(), a) * ratio * a
    elif config.use_clip:
        term = clipped_term(config, ratio, a)
    else:
        term = -ratio * a
    return term * importance_of(config, batch) if config.use_importance_weights else term


def clipped_term(config: Config, ratio: Tensor, a: Tensor) -> Tensor:
    """PPO's clip, with DAPO's upper width; where A < 0 the objective is at least clip_delta A too
    (dual clip, Ye et al. 2020, eq. 5: max(min(r A, clip(r) A), c A))."""
    high = config.clip_eps if config.clip_eps_high is None else config.clip_eps_high
    objective = torch.minimum(ratio * a, ratio.clamp(1 - config.clip_eps, 1 + high) * a)
    if config.clip_delta is not None:
        objective = torch.where(a < 0, torch.maximum(objective, config.clip_delta * a), objective)
    return -objective


def soft_gate(config: Config, ratio: Tensor, a: Tensor) -> Tensor:
    """SAPO (Gao et al. 2025, arXiv:2511.20347): (4 / tau) / (1 + exp(-tau (ratio - 1)))."""
    tau = torch.where(a > 0, config.sapo_tau_positive, config.sapo_tau_negative)
    return 4 / tau / (1 + (-tau * (ratio - 1)).exp())


def trusted(config: Config, p: Tensor, p_old: Tensor, a: Tensor) -> Tensor:
    """DPPO (Qi et al. 2026, arXiv:2602.04879, eq. 12): 0 where A > 0 and p - p_old is above the
    bound, or A < 0 and p_old - p is; else 1. No gradient goes through it."""
    moved = (p - p_old).detach() * a.sign()
    return (moved <= config.dppo_max_difference).to(p.dtype)


def importance_of(config: Config, batch: Batch) -> Tensor:
    """p_old / p_sampler, of each token or of the row as a whole; above the cap the cap, or 0."""
    d = (batch.old - batch.sampler_logprobs) * batch.mask
    of, beyond = config.importance_weight_mode.split("_")
    weight = (d.sum(dim=1, keepdim=True) if of == "sequence" else d).exp()
    cap = config.importance_weight_cap
    return weight.clamp(max=cap) if beyond == "truncate" else weight * (weight <= cap)


def kl_term(config: Config, new: Tensor, batch: Batch) -> Tensor:
    """An estimate per token [b, T-1] of the KL to the old policy (d = log ratio), or to the base
    (d = ref - logprob): k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d (Schulman 2020). Weighted: times
    p / p_old, through which a gradient goes (DeepSeek-V3.2, 2025, eq. 7)."""
    d = (new - batch.old if batch.ref is None else batch.ref - new) * batch.mask
    weight = ((new - batch.old) * batch.mask).exp() if config.use_weighted_kl else 1.0
    if config.kl_estimator == "k3":
        return weight * (d.exp() - 1 - d)
    return weight * (d.square() / 2 if config.kl_estimator == "k2" else -d)


def loss_of(
    config: Config, new: Tensor, entropies: Tensor | None, batch: Batch, *, n_rows, n_tokens
) -> Tensor:
    """A micro-batch's share of the loss of an update with n_rows rows and n_tokens tokens."""
    values = policy_term(config, new, batch)
    if config.use_kl_penalty:
        values = values + config.beta * kl_term(config, new, batch)
    if entropies is not None:
        values = values - config.entropy_coef * entropies
    return (values * token_weights(config, batch.mask, n_rows, n_tokens)).sum()


# -- the loop ----------------------------------------------------------------------------------


class Baseline:
    """A policy and its optimizer, trained a rollout at a time."""

    def __init__(
        self, config: Config, model: PeftModel, micro_batch_size: int = STUDY_MICRO_BATCH_SIZE
    ):
        if config.lr_scheduler_type != "constant" or config.warmup_steps:
            raise ValueError("the baseline's learning rate is constant, without warm-up")
        self.config, self.model, self.micro_batch_size = config, model, micro_batch_size
        self.weights = adapter_weights(model)
        self.optimizer = torch.optim.Adam(
            self.weights.values(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8
        )

    def learn(self, lines: Sequence[dict]) -> list[dict[str, float]]:
        """All updates on one rollout -> the loss and gradient norm of each. Every epoch deals
        the prompts out into equal parts, in turn; the old policy is that before the first one."""
        batch, n = self.with_others(self.batch(lines)), self.config.updates_per_epoch
        prompts = torch.arange(len(lines)).view(-1, self.config.group_size)
        parts = [prompts[first::n].flatten() for first in range(n)]
        assert len({len(part) for part in parts}) == 1, "updates_per_epoch must divide the prompts"
        return [
            self.update(batch.rows(part))
            for _ in range(self.config.epochs_per_step)
            for part in parts
        ]

    def update(self, batch: Batch) -> dict[str, float]:
        """One step of Adam, the gradient's norm clipped at 1."""
        loss = self.backward(batch)
        norm = nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        return {"loss": loss, "grad_norm": float(norm)}

    def backward(self, batch: Batch) -> float:
        """The loss of one update; its gradient is left in the weights' `grad`."""
        self.optimizer.zero_grad()
        n_rows, n_tokens = len(batch.ids), float(batch.mask.sum())
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for index in torch.arange(n_rows).split(self.micro_batch_size):
            micro = batch.rows(index)
            new, entropies = self.logprobs(micro, with_entropies=self.config.entropy_coef > 0)
            loss = loss_of(self.config, new, entropies, micro, n_rows=n_rows, n_tokens=n_tokens)
            loss.backward()
            total += loss.detach()
        return float(total)

    def gradient(self) -> dict[str, Tensor]:
        """What `backward` left, under PEFT's keys."""
        return {name: weight.grad.clone() for name, weight in self.weights.items()}

    def with_others(self, batch: Batch) -> Batch:
        """The passes before the updates: the policy's logprobs, and the base's if they are used."""
        batch = batch._replace(old=self.all_logprobs(batch))
        if not (self.config.use_kl_penalty and self.config.kl_to == "base"):
            return batch
        with self.model.disable_adapter():
            return batch._replace(ref=self.all_logprobs(batch))

    @torch.no_grad()
    def all_logprobs(self, batch: Batch) -> Tensor:
        """[N, T-1], without a gradient."""
        index = torch.arange(len(batch.ids)).split(self.micro_batch_size)
        return torch.cat([self.logprobs(batch.rows(i))[0] for i in index])

    def logprobs(self, batch: Batch, with_entropies: bool = False) -> tuple[Tensor, Tensor | None]:
        """Of each next token [b, T-1], and the entropies of their distributions if asked for."""
        out = self.model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
        logits = out.logits[:, :-1].to(torch.promote_types(out.logits.dtype, torch.float32))
        if self.config.temperature != 1:
            logits = logits / self.config.temperature
        table = logits.log_softmax(dim=-1)
        chosen = table.gather(2, batch.ids[:, 1:, None])[..., 0]
        return chosen, -(table.exp() * table).sum(dim=-1) if with_entropies else None

    def batch(self, lines: Sequence[dict]) -> Batch:
        """The rollout's lines, padded."""
        lengths = [len(line["prompt_ids"]) + len(line["token_ids"]) for line in lines]
        ids = torch.zeros(len(lines), max(lengths), dtype=torch.long)
        attention = torch.zeros_like(ids)
        mask, sampler = torch.zeros(2, len(lines), max(lengths) - 1, dtype=torch.float64)
        for n, line in enumerate(lines):
            span = slice(len(line["prompt_ids"]) - 1, lengths[n] - 1)
            ids[n, : lengths[n]] = torch.tensor(line["prompt_ids"] + line["token_ids"])
            attention[n, : lengths[n]] = 1
            cut_off = line["finish_reason"] == "length"
            mask[n, span] = not (cut_off and self.config.mask_truncated_completions)
            sampler[n, span] = torch.tensor(line["sampler_logprobs"], dtype=torch.float64)
        advantages = torch.tensor([line["advantage"] for line in lines], dtype=torch.float64)
        dtype = next(iter(self.weights.values())).dtype
        numbers = (x.to(dtype) for x in (mask, sampler * mask, advantages))
        return Batch(*(x.to(self.model.device) for x in (ids, attention, *numbers)))


# -- the model ---------------------------------------------------------------------------------


def open_model(config: Config, adapter: str | Path, dtype: torch.dtype | None = None) -> PeftModel:
    """The base in `dtype` (None: the config's) with a PEFT adapter, which alone is trainable."""
    dtype = getattr(torch, config.dtype) if dtype is None else dtype
    base = AutoModelForCausalLM.from_pretrained(config.model_id, dtype=dtype)
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def adapter_weights(model: PeftModel) -> dict[str, nn.Parameter]:
    """The trainable weights under PEFT's keys, as in adapter_model.safetensors."""
    named = model.named_parameters()
    return {name.replace(".default", ""): p for name, p in named if p.requires_grad}


def load_adapter(model: PeftModel, folder: str | Path) -> None:
    """Another adapter of the same shape in place of the model's own."""
    weights, saved = adapter_weights(model), load_file(Path(folder) / "adapter_model.safetensors")
    assert weights.keys() == saved.keys(), sorted(weights.keys() ^ saved.keys())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
