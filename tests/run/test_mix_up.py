"""jgrpo.run.mix_up: a server that mixes two members' adapters up is found at the load at which it
begins to, also where no limit on a mean gap shows it."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_run import tiny_config
from vllm_server import FakeVllm, Reply, listening

from jgrpo.errors import RunError
from jgrpo.policy.lora import nth
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.run import session
from jgrpo.run.mix_up import check_members
from jgrpo.run.policy import Policy, open_policies
from jgrpo.run.rundir import read_metrics
from jgrpo.run.sampler import open_sampler
from jgrpo.run.session import open_problems
from jgrpo.train import train_together

ROUNDING = 1e-6


@pytest.fixture(autouse=True, scope="module")
def configured():
    session.configure_jax()


def near_each_other(policy: Policy, size: float):
    """Adapters of random B's, each another one."""

    def one(path, x):
        key = jax.random.key(x.shape[-1])
        return size * jax.random.normal(key, x.shape) if "lora_B" in str(path) else x

    return jax.tree.map_with_path(one, policy.adapter)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_that_are_mixed_up_are_named_and_others_are_not(root, dtype):
    """In float32 at gaps far below the guard's limit of 1e-3."""
    configs = [replace(tiny_config(root, dtype=dtype), seed=seed) for seed in range(3)]
    policy, problems = open_policies(configs), open_problems(configs[0])
    sampler = open_sampler(configs[0], policy, problems.stop_token_ids, "t")
    assert isinstance(sampler, JaxSampler)
    loaded = near_each_other(policy, 1e-4 if dtype == "float32" else 0.1)
    rounding = ROUNDING if dtype == "float32" else 0.01

    def check(*order: int) -> None:
        sampler.adapter = jax.tree.map(lambda x: x[jnp.array(order)], loaded)
        adapters = {e: nth(loaded, e) for e in range(3)}
        check_members(
            configs, policy, sampler, problems, adapters,
            names=["a", "b", "c"], rounding=rounding, seed=7,
        )  # fmt: skip

    check(0, 1, 2)
    with pytest.raises(RunError, match=r"a is .* adapter of c; c is .* adapter of a \(3 looks"):
        check(2, 1, 0)
    with pytest.raises(RunError, match=r"up: b is sampled from the adapter of a \("):
        check(0, 0, 2)


@pytest.mark.slow
def test_two_that_are_the_same_cannot_be_mixed_up(root):
    configs = [tiny_config(root)] * 2
    policy, problems = open_policies(configs), open_problems(configs[0])
    sampler = open_sampler(configs[0], policy, problems.stop_token_ids, "t")
    first = nth(near_each_other(policy, 0.1), 0)
    sampler.adapter = jax.tree.map(lambda x: jnp.stack([x, x * (1 + 1e-6)]), first)
    for order in ((0, 1), (1, 0)):
        adapters = {e: nth(sampler.adapter, order[e]) for e in range(2)}
        check_members(
            configs, policy, sampler, problems, adapters, names="ab", rounding=ROUNDING, seed=1
        )


class Sampling(FakeVllm):
    """Samples from a model and its adapters, one request at a time. From the `swaps_at`th load of
    two on it takes each of them for the other."""

    def __init__(self, sampler: JaxSampler, swaps_at: int) -> None:
        super().__init__()
        self.sampler, self.swaps_at = sampler, swaps_at
        self.base["max_model_len"] = 4096

    def completions(self, body: dict) -> Reply:
        with self.lock:
            folder = Path(self.adapters[body["model"]])
            if folder.name == f"step_{self.swaps_at:06d}":
                [folder] = {Path(path) for path in self.adapters.values()} - {folder}
            self.sampler.load(folder)
            [group] = self.sampler.sample(
                [body["prompt"]], seeds=[body["seed"]], group_size=body["n"],
                temperature=body["temperature"], max_tokens=body["max_tokens"],
            )  # fmt: skip
        return 200, {
            "model": body["model"],
            "choices": [
                {
                    "index": g, "token_ids": c.token_ids, "prompt_token_ids": body["prompt"],
                    "logprobs": {"token_logprobs": c.logprobs}, "finish_reason": c.finish_reason,
                }
                for g, c in enumerate(group)
            ],
        }  # fmt: skip


@pytest.mark.slow
def test_a_server_that_begins_to_at_step_7_ends_the_run_there(root, tmp_path):
    """Two seeds at a small learning rate, which the limit on the mean gap would let through."""
    plain = tiny_config(
        root, rollout="vllm", n_grpo_steps=9, n_prompts_per_step=1, group_size=4, lr=1e-5,
        eval_every=0, max_mean_logprob_diff=1.0, check_stale=False,
    )  # fmt: skip
    policy, problems = open_policies([plain]), open_problems(plain)
    sampler = open_sampler(replace(plain, rollout="jax"), policy, problems.stop_token_ids, "t")
    assert isinstance(sampler, JaxSampler)
    runs = [tmp_path / name for name in ("first", "second")]
    with listening(Sampling(sampler, swaps_at=7)) as url:
        both = replace(plain, vllm_url=url)
        members = [replace(both, seed=i, run_dir=str(run)) for i, run in enumerate(runs)]
        with pytest.raises(RunError, match="first is sampled from the adapter of second"):
            train_together(members)
    rows = read_metrics(runs[0])
    assert [row["step"] for row in rows] == [*range(1, 7)]
    assert max(row["sampler/logprob_diff_mean"] for row in rows) < 1e-5
