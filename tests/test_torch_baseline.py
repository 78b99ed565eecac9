"""jgrpo against the PyTorch baseline of benchmarks/: two derivations of every technique, in two
frameworks, on the same off-policy rollout; and each technique mutated, which must show.

The baseline works in float64. Its model differs from ours by float32 rounding alone (1e-6), so a
technique agrees below 1e-4, and a mutation is far above.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import adapted, in_one_batch, merged
from flax import nnx

import jgrpo
from jgrpo.advantages import group_advantages, leave_one_out
from jgrpo.config import Config
from jgrpo.policy.adapter import adapter_arrays
from jgrpo.policy.batch import completion_mask
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.study.compare import saved_rows
from jgrpo.update.learner import loss_of
from jgrpo.update.step import loss_denominator

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from agreement import NARROW, VARIANTS, relative_error
from agreement_sides import arrays_of, in_float64
from conftest import OneLearner
from speed import Args, make_lines
from torch_baseline import Baseline, advantages_of, load_adapter, open_model

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed.py"
N_PROMPTS, GROUP, VOCAB = 4, 3, 67
SHIFT = 0.0012
"""Of B between old and new adapter: ratios then differ from 1 by 10 % or so."""
LOSSES = [name for name, changes in VARIANTS.items() if not changes.keys() & {"updates_per_epoch"}]
"""Without the schedules, which say how often a rollout is used, not what for."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On products this small, torch's threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lines_here() -> list[dict]:
    """A ragged rollout; the first group is without signal, every fourth completion cut off."""
    rng = np.random.default_rng(3)
    lines = []
    for n in range(N_PROMPTS * GROUP):
        if n % GROUP == 0:
            prompt = rng.integers(VOCAB, size=rng.integers(2, 7)).tolist()
        ids = rng.integers(VOCAB, size=rng.integers(1, 9)).tolist()
        lines.append({
            "prompt_ids": prompt, "token_ids": ids,
            "sampler_logprobs": [],
            "advantage": 0.0 if n < GROUP else rng.normal(),
            "finish_reason": "length" if n % 4 == 3 else "stop",
        })  # fmt: skip
    return lines


class Both:
    """The same model, an old and a new adapter, and a rollout, in jgrpo and in torch."""

    def __init__(self, base: Path, folder: Path):
        self.config = Config(
            model_id=str(base), dtype="float32", rollout="jax", lora_r=2, lr=1e-2, max_tokens=8,
            max_prompt_tokens=8, n_prompts_per_step=N_PROMPTS, group_size=GROUP,
            micro_batch_size=N_PROMPTS * GROUP, gradient_checkpointing=False,
        )  # fmt: skip
        self.graph, self.new, self.base = adapted(base, 2)
        rng = np.random.default_rng(7)
        self.old = jax.tree.map(lambda x: x + SHIFT * rng.normal(size=x.shape), self.new)
        self.old = jax.tree.map(lambda x: x.astype(jnp.float32), self.old)
        self.folders = {"new": folder / "new", "old": folder / "old"}
        for name, adapter in (("new", self.new), ("old", self.old)):
            jgrpo.save_adapter(merged(self.graph, adapter, self.base), self.folders[name])
        self.model = open_model(self.config, self.folders["new"], torch.float64)
        in_float64(self.model)
        self.lines = lines_here()
        self.report_logprobs()

    def report_logprobs(self) -> None:
        """The sampler's: 10 % off those of the old policy."""
        batch = self.batch(self.config)
        rng = np.random.default_rng(8)
        for line, logprobs, mask in zip(self.lines, batch.old, batch.mask, strict=True):
            own = logprobs[mask > 0].numpy()
            line["sampler_logprobs"] = (own + rng.normal(0, 0.1, own.shape)).tolist()

    # -- torch

    def batch(self, config: Config):
        """The rollout, with the logprobs of the old policy."""
        lines = [{**line, "sampler_logprobs": line["sampler_logprobs"] or [0.0] *
                  len(line["token_ids"])} for line in self.lines]  # fmt: skip
        load_adapter(self.model, self.folders["old"])
        baseline = Baseline(config, self.model)
        batch = baseline.with_others(baseline.batch(lines))
        load_adapter(self.model, self.folders["new"])
        return batch

    def torch(self, config: Config, change=lambda batch: batch, micro_batch_size=6):
        """Loss and gradient of one update on the whole rollout."""
        batch = change(self.batch(config))
        baseline = Baseline(config, self.model, micro_batch_size)
        loss = baseline.backward(batch)
        return loss, arrays_of(baseline.gradient())

    # -- jgrpo: the model is compiled once, and every loss is pulled back through it

    def jgrpo(self, config: Config):
        rows, loss = saved_rows(config, self.lines), loss_of(config)
        batch = in_one_batch(rows)
        run = partial(self.compiled, config.temperature, batch)
        zeros = jnp.zeros(batch.mask.shape), jnp.zeros(batch.mask.shape)
        off = jax.tree.map(jnp.zeros_like, self.new)
        (new, entropies), _ = run(self.new, zeros)
        (old, _), _ = run(self.old, zeros)
        denominator = loss_denominator(loss, completion_mask(rows))
        arrays = {"sampler_logprobs": batch.sampler_logprobs}
        if config.use_kl_penalty and config.kl_to == "base":
            arrays["ref_logprobs"] = run(off, zeros)[0][0]

        def value(new, entropies):
            parts = loss(new, old, batch.advantages, batch.mask, entropies=entropies, **arrays)
            return parts[0] / denominator

        loss, by_logprobs = jax.value_and_grad(value, argnums=(0, 1))(new, entropies)
        _, gradient = run(self.new, by_logprobs)
        return float(loss), adapter_arrays(gradient)

    @cached_property
    def compiled(self):
        """temperature, batch, adapter, cotangents -> (logprobs, entropies), and what the cotangents
        are at the adapter."""

        def run(temperature, batch, adapter, cotangents):
            def values(adapter):
                model = nnx.merge(self.graph, adapter, self.base)
                return token_logprobs(model, batch, temperature=temperature, entropy_gradient=True)

            out, pull = jax.vjp(values, adapter)
            return out, pull(cotangents)[0]

        return jax.jit(run)

    @cache  # noqa: B019
    def agreed(self, name: str):
        """jgrpo's loss and gradient of a variant, and its config."""
        config = replace(self.config, updates_per_epoch=4, **VARIANTS[name])
        return config, *self.jgrpo(config)


@pytest.fixture(scope="module")
def both(checkpoint, tmp_path_factory):
    return Both(checkpoint("qwen3-tied"), tmp_path_factory.mktemp("both"))


def test_the_rollout_is_off_policy(both):
    batch = both.batch(both.config)
    new = Baseline(both.config, both.model).all_logprobs(batch)
    ratios = (new - batch.old).exp()[batch.mask > 0]
    assert 0.02 < (ratios - 1).abs().median() < 0.2


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_agree(both, name):
    config, loss, gradient = both.agreed(name)
    expected_loss, expected = both.torch(config)
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-5)
    assert relative_error(gradient, expected) < 1e-4


MUTATIONS = {
    "lower clip bound moved": ("clip", {"clip_eps": 0.03}),
    "upper clip bound moved": ("clip-higher", {"clip_eps_high": 0.15}),
    "upper clip bound forgotten": ("clip-higher", {"clip_eps_high": None}),
    "no clip": ("clip", {"use_clip": False}),
    "KL to old: k3 for k1": ("KL to old, k1", {"kl_estimator": "k3"}),
    "KL to old: k3 for k2": ("KL to old, k2", {"kl_estimator": "k3"}),
    "KL to old: k2 for k3": ("KL to old, k3", {"kl_estimator": "k2"}),
    "KL to base: k2 for k1": ("KL to base, k1", {"kl_estimator": "k2"}),
    "KL to base: k3 for k2": ("KL to base, k2", {"kl_estimator": "k3"}),
    "KL to base: k2 for k3": ("KL to base, k3", {"kl_estimator": "k2"}),
    "KL to the other policy": ("KL to base, k3", {"kl_to": "old"}),
    "beta doubled": ("KL to old, k3", {"beta": 0.4}),
    "completion mean for token level": ("token level", {"use_token_level_loss": False}),
    "token level for completion mean": ("clip", {"use_token_level_loss": True}),
    "Dr. GRPO by one token more": ("Dr. GRPO", {"max_tokens": 9}),
    "Dr. GRPO by lengths": ("Dr. GRPO", {"loss_type": "grpo"}),
    "GSPO's clip moved": ("GSPO", {"clip_eps": 0.03}),
    "token ratios for GSPO's": ("GSPO", {"loss_type": "grpo"}),
    "the mean log ratio for RLOO's sum": ("RLOO", {"loss_type": "gspo"}),
    "CISPO's cap moved": ("CISPO", {"cispo_max_ratio": 1.06}),
    "a clip for CISPO's cap": (
        "CISPO", {"loss_type": "grpo", "use_clip": True, "use_token_level_loss": True}),
    "no importance weights": ("importance weights", {"use_importance_weights": False}),
    "their cap moved": ("importance weights", {"importance_weight_cap": 1.2}),
    "no second upper clip": ("clip + second upper clip (clip_delta)", {"clip_delta": None}),
    "the second upper clip moved": (
        "Dr. GRPO + clip + second upper clip", {"clip_delta": 1.15}),
    "weighted KL: k1 as if on policy": (
        "KL to base, k1, weighted", {"use_weighted_kl": False}),
    "weighted KL: k3 as if on policy": (
        "KL to base, k3, weighted", {"use_weighted_kl": False}),
    "no gate for SAPO's": ("SAPO", {"loss_type": "grpo"}),
    "SAPO's temperatures swapped": (
        "SAPO", {"sapo_tau_positive": 5.0, "sapo_tau_negative": 3.0}),
    "SAPO's temperatures alike": ("SAPO", {"sapo_tau_negative": 3.0}),
    "no mask for DPPO's": ("DPPO", {"loss_type": "grpo"}),
    "DPPO's bound moved": ("DPPO", {"dppo_max_difference": 0.003}),
    "weights of tokens for sequences": (
        "importance weights of sequences", {"importance_weight_mode": "token_truncate"}),
    "truncated weights for masked": (
        "importance weights of tokens, masked", {"importance_weight_mode": "token_truncate"}),
    "masked weights for truncated": (
        "importance weights", {"importance_weight_mode": "token_mask"}),
    "truncated weights of sequences for masked": (
        "importance weights of sequences, masked",
        {"importance_weight_mode": "sequence_truncate"}),
    "no entropy bonus": ("entropy bonus", {"entropy_coef": 0.0}),
    "cut-off completions trained": ("mask truncated", {"mask_truncated_completions": False}),
    "temperature forgotten": ("temperature 0.7", {"temperature": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_technique_is_seen(both, name):
    variant, change = MUTATIONS[name]
    config, _, gradient = both.agreed(variant)
    _, mutated = both.torch(replace(config, **change))
    assert relative_error(gradient, mutated) > 1e-3


WRONG_BATCHES = {
    "old and ref swapped": lambda b: b._replace(old=b.ref, ref=b.old),
    "ratio of the sampler": lambda b: b._replace(old=b.sampler_logprobs),
    "the next row's advantage": lambda b: b._replace(advantages=b.advantages.roll(1)),
    "logprobs one token late": lambda b: b._replace(mask=b.mask.roll(1, dims=1)),
    "sign flipped": lambda b: b._replace(advantages=-b.advantages),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_a_wrong_batch_is_seen(both, name):
    config, _, gradient = both.agreed("KL to base, k3")
    _, mutated = both.torch(config, WRONG_BATCHES[name])
    assert relative_error(gradient, mutated) > 1e-3


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_baselines_micro_batches_change_nothing(both, size):
    config = both.agreed("token level + clip")[0]
    loss, gradient = both.torch(config)
    other_loss, other = both.torch(config, micro_batch_size=size)
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert relative_error(other, gradient) < 1e-12


# -- several updates on one rollout --------------------------------------------------------------


@pytest.fixture(scope="module")
def several(both):
    """A config with two epochs of two updates, and how far jgrpo moved the adapter."""
    config = replace(
        both.config, updates_per_epoch=2, epochs_per_step=2, use_kl_penalty=True, **NARROW
    )
    start = jax.tree.map(jnp.copy, both.new)
    learner = OneLearner(config, both.graph, start, both.base)
    before = adapter_arrays(both.new)
    metrics = learner.learn(saved_rows(config, both.lines))
    after = adapter_arrays(learner.state(0)[0])
    return config, metrics, {k: after[k] - before[k] for k in before}


def moved_by_torch(both, config, lines):
    load_adapter(both.model, both.folders["new"])
    baseline = Baseline(config, both.model)
    before = arrays_of(baseline.weights)
    metrics = baseline.learn(lines)
    after = arrays_of(baseline.weights)
    return metrics, {k: after[k] - before[k] for k in before}


@pytest.mark.slow
def test_two_epochs_of_two_updates_end_at_the_same_adapter(both, several):
    # Four steps of Adam: where a gradient is nearly 0 its rounding decides the direction.
    config, metrics, moved = several
    theirs, expected = moved_by_torch(both, config, both.lines)
    assert len(theirs) == 4
    for name in ("loss", "grad_norm"):
        mean = np.mean([update[name] for update in theirs])
        assert metrics[f"train/{name}"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
    assert relative_error(moved, expected) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"updates_per_epoch": 4, "epochs_per_step": 1}, {"epochs_per_step": 1}, {"lr": 0.02}]
)
def test_another_schedule_of_updates_is_seen(both, several, change):
    config, _, moved = several
    _, other = moved_by_torch(both, replace(config, **change), both.lines)
    assert relative_error(moved, other) > 0.05


def test_the_order_of_prompts_decides_which_update_they_are_in(both, several):
    config, _, moved = several
    group = config.group_size  # dealt out in turn: one further on, the halves change places
    _, other = moved_by_torch(both, config, both.lines[group:] + both.lines[:group])
    assert relative_error(moved, other) > 0.05


# -- advantages, and what speed.py trains on -----------------------------------------------------


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_advantages_agree(both, std, alone):
    rewards = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0.5, -0.25, 1, 0]], np.float32)
    config = replace(both.config, use_std_norm=std, use_leave_one_out=alone)
    ours = (leave_one_out if alone else group_advantages)(rewards, std)
    theirs = advantages_of(torch.tensor(rewards, dtype=torch.float64), config)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert (theirs[1] == 0).all()


def test_realistic_rollouts_are_as_described(both):
    config = replace(both.config, n_prompts_per_step=50, group_size=8, max_tokens=1024)
    lines = make_lines(Args(lengths="realistic"), config, vocab_size=500)
    lengths = np.array([len(line["token_ids"]) for line in lines])
    assert lengths.max() == 1024
    assert 0.15 < lengths.mean() / 1024 < 0.5
    assert np.mean([line["advantage"] == 0 for line in lines]) == pytest.approx(0.4)


def test_the_largest_shape_is_refused_without_a_gpu():
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU")
    command = [sys.executable, SPEED, "--shape", "1.7b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr
    assert "Traceback" not in done.stderr
