"""GRPO with a rank-1 adapter, the whole algorithm: python docs/loop.py

A model of a million parameters learns to work out sums instead of guessing them. `jgrpo.train` is
this loop with packed batches, logs, checkpoints, and the proof that the sampler has the adapter.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jgrpo

P, G, MAX_TOKENS = 16, 8, 64  # prompts a step, completions of each, tokens of a completion

config = jgrpo.load_config("configs/tiny.py")
problems = jgrpo.open_problems(config)
graph, adapter, base = jgrpo.split(jgrpo.load_model(config.model_id, lora_r=1, lora_alpha=32))
stops = problems.stop_token_ids
width = max(len(p.prompt_ids) for p in problems.train) + MAX_TOKENS
sampler = jgrpo.JaxSampler(
    graph, adapter, base, stop_token_ids=stops, max_tokens=MAX_TOKENS, max_rows=P * G
)
optimizer = jgrpo.adam(1e-3)
opt_state = optimizer.init(adapter)


def grade(asked, groups):
    """1 for a completion whose boxed answer is the gold one, else 0: float [P, G]."""
    pairs = zip(asked, groups, strict=True)
    return np.array([[jgrpo.is_correct(problems.text(c), p.gold) for c in g] for p, g in pairs])


def pad(prompts, completions):
    """Prompt and completion in one row: ids int32 [N, T], mask float32 [N, T - 1], which is 1 where
    the next token is a completion's."""
    ids, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width - 1))
    for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[n, :end] = [*prompt, *completion]
        mask[n, len(prompt) - 1 : end - 1] = 1
    return ids, mask.astype(np.float32)


@jax.jit
def update(adapter, opt_state, base, ids, mask, advantages):
    def loss(adapter):
        logits = nnx.merge(graph, adapter, base)(ids[:, :-1])
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1)[..., 0]
        old = jax.lax.stop_gradient(logprobs)  # the policy that sampled is the one that is trained
        numerator, denominator, _ = jgrpo.LOSSES["grpo"](logprobs, old, advantages, mask)
        return numerator / denominator

    updates, opt_state = optimizer.update(jax.grad(loss)(adapter), opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state


with tempfile.TemporaryDirectory() as folder:
    order = np.random.default_rng(0).permutation(len(problems.train))
    for step in range(int(sys.argv[1]) if sys.argv[1:] else 30):
        asked = [problems.train[i] for i in order[step * P : (step + 1) * P]]
        prompts, seeds = [p.prompt_ids for p in asked], range(step * P, (step + 1) * P)
        groups = sampler.sample(prompts, seeds=seeds, group_size=G, temperature=1.0)
        rewards = grade(asked, groups)
        advantages = jgrpo.group_advantages(rewards).reshape(-1)
        completions = [c.token_ids for group in groups for c in group]
        ids, mask = pad([p for p in prompts for _ in range(G)], completions)
        adapter, opt_state = update(adapter, opt_state, base, ids, mask, advantages)
        jgrpo.save_adapter(nnx.merge(graph, adapter, base), Path(folder) / f"step_{step}")
        sampler.load(Path(folder) / f"step_{step}")
        print(f"step {step + 1}: accuracy {rewards.mean():.3f}", flush=True)
    asked = problems.evaluation
    greedy = sampler.sample([p.prompt_ids for p in asked], seeds=[0] * len(asked), temperature=0.0)
    print(f"held out: {grade(asked, greedy).mean():.3f}")
