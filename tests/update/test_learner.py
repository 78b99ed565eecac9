"""The learner, on a decoder of one layer: how many updates a rollout makes and from which policy,
what each divides by, and which completions take part."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PROMPTS, OneLearner, OneMember, with_random_b
from flax import nnx

from jgrpo.config import Config
from jgrpo.losses import LOSSES
from jgrpo.policy.adapter import adapter_arrays
from jgrpo.policy.batch import Rows, micro_batches
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.policy.lora import nth, split
from jgrpo.policy.weights import load_model
from jgrpo.update.learner import loss_of, parts_of
from jgrpo.update.optimizer import adam, global_norm, learning_rate

LENGTHS = [4, 2, 7, 2, 3, 2, 4, 3]
COMPLETIONS = [[*range(20 + n, 19 + n + length), 66] for n, length in enumerate(LENGTHS)]
ADVANTAGES = np.array([0.7, -0.7, 1.3, -1.1, 0.0, 0.4, 0.9, -0.9], np.float32)
LABELS = [[-(n + 1) / 4] * length for n, length in enumerate(LENGTHS)]  # sampler_logprobs
ROWS = Rows([PROMPTS[n // 2 % 3] for n in range(8)], COMPLETIONS, LABELS, ADVANTAGES)
TRUNCATED = np.isin(np.arange(8), [2, 7])
HALVES = ([0, 1, 4, 5], [2, 3, 6, 7])  # groups dealt out in turn; 11 and 16 tokens
FOUR_UPDATES = {"epochs_per_step": 2, "updates_per_epoch": 2, "use_token_level_loss": True,
                "use_clip": True, "clip_eps": 0.01, "use_kl_penalty": True}  # fmt: skip
TO_BASE = {"use_kl_penalty": True, "kl_to": "base"}
WITH_ENTROPY = TO_BASE | {"beta": 0.01, "kl_estimator": "k2", "entropy_coef": 0.2,
                          "use_token_level_loss": True}  # fmt: skip


def tiny_config(**options) -> Config:
    """Four prompts with two completions each, all in one micro-batch: 4 x (32 + 64) tokens."""
    return Config(
        n_prompts_per_step=4, group_size=2, max_prompt_tokens=9, max_tokens=7, n_grpo_steps=5,
        lr=0.01, gradient_checkpointing=False, **{"micro_batch_size": 24, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts(checkpoint):
    """Graph, adapter (on two projections alone: less to compile) with B non-zero, and base."""
    folder, targets = checkpoint("qwen3-tied", num_hidden_layers=1), ("q_proj", "down_proj")
    graph, adapter, base = split(load_model(folder, rank=1, alpha=32, target_modules=targets))
    return graph, with_random_b(adapter), base


@pytest.fixture(scope="module")
def new_learner(parts):
    """new_learner(**options of the config): at the same adapter always; compiled once for all that
    ask for the same loss and optimizer."""
    graph, adapter, base = parts
    updates = {}

    def get(**options) -> OneLearner:
        learner = OneLearner(tiny_config(**options), graph, jax.tree.map(jnp.copy, adapter), base)
        memory = ("micro_batch_size", "epochs_per_step", "updates_per_epoch")
        key = str({k: v for k, v in options.items() if k not in memory})
        learner.update = updates.setdefault(key, learner.update)
        return learner

    return get


class Recorder:
    """An Update that remembers what it was given and what it gave."""

    def __init__(self, update):
        self.update, self.calls = update, []

    def __call__(self, *args):
        *state, metrics, logprobs = self.update(*args)
        self.calls.append((args[3:], (nth(metrics, 0), logprobs)))
        return *state, metrics, logprobs

    def __getattr__(self, name):
        return getattr(self.update, name)


TAGS = ("train/loss", "train/grad_norm", "train/skipped_updates", "sampler/logprob_diff_max",
        "tokens/trained")  # fmt: skip


class AllOnes:
    """An Update whose gradient is all ones, with the learner's optimizer. It has no `logprobs`:
    nobody may ask for them."""

    n_compilations = 0

    def __init__(self, update):
        self.optimizer = update.programs.optimizer

    def __call__(self, adapter, state, base, batches, denominators, rates, old, ref):
        assert ref is None
        ones = jax.tree.map(jnp.ones_like, adapter)
        lr = rates[0, int(optax.tree.get(state, "count")[0])]
        step = jax.vmap(lambda *given: self.optimizer.update(*given, lr=lr))
        updates, state = step(ones, state, adapter)
        nothing = [np.zeros(batch.mask.shape, np.float32) for batch in batches]
        return optax.apply_updates(adapter, updates), state, {tag: [0.0] for tag in TAGS}, nothing

    def tags(self, e):
        return TAGS


def batches(rows=ROWS, index=range(8)):
    limits = {"max_prompt_tokens": 8, "max_tokens": 8}
    return micro_batches(rows, np.array(index), micro_batch_size=24, **limits)


def relative_error(got: dict, expected: dict, origin: dict | None = None) -> float:
    """The worst tensor's |got - expected| / |expected - origin|."""
    assert got.keys() == expected.keys()
    norm, zeros = np.linalg.norm, dict.fromkeys(expected, 0.0)
    return max(
        norm(got[k] - expected[k]) / norm(expected[k] - (origin or zeros)[k]) for k in expected
    )


def with_zeros(advantages, where) -> np.ndarray:
    return np.where(where, np.float32(0), advantages)


# -- several updates a rollout --------------------------------------------------------------------


@pytest.mark.slow
def test_four_updates_are_two_passes_over_two_halves_from_one_old_policy(parts, new_learner):
    """Against the loop written out: old logprobs of both halves before the first update, whole
    groups together, and each half's own tokens (11 and 16) as its denominator."""
    learner, before = new_learner(**FOUR_UPDATES), adapter_arrays(parts[1])
    update = OneMember(learner.update, 0.01)
    learner.update = recorder = Recorder(learner.update)
    metrics = learner.learn(ROWS)

    adapter, base = jax.tree.map(jnp.copy, parts[1]), parts[2]
    state = update.init(adapter)
    halves = [batches(index=half) for half in HALVES]
    old = [update.logprobs(adapter, base, half) for half in halves]
    history = []
    for _ in range(2):
        for half, n_tokens, o in zip(halves, (11.0, 16.0), old, strict=True):
            adapter, state, values, _ = update(adapter, state, base, half, n_tokens, o)
            history.append(values)

    got, expected = adapter_arrays(learner.state(0)[0]), adapter_arrays(adapter)
    assert relative_error(got, expected, before) < 1e-3
    assert len(recorder.calls) == 4
    for tag in ("train/loss", "train/entropy", "train/kl", "train/clip_fraction"):
        assert metrics[tag] == pytest.approx(np.mean([h[tag] for h in history]), rel=1e-3)
    assert metrics["tokens/trained"] == 2 * (11 + 16)
    # The first ratio is 1, but for rounding; the second half's is not, nor any of the second pass.
    approx_kl = [float(values["train/approx_kl"]) for _, (values, _) in recorder.calls]
    assert approx_kl[0] < 1e-10
    assert min(approx_kl[1:]) > 1e-5
    assert metrics["train/clip_fraction"] > 0.1


@pytest.mark.slow
def test_a_second_pass_takes_the_first_one_s_logprobs_as_old_and_a_rollout_its_own(new_learner):
    learner = new_learner(**FOUR_UPDATES | {"updates_per_epoch": 1})
    learner.update = recorder = Recorder(learner.update)
    for _ in range(2):
        learner.learn(ROWS)
    for calls in (recorder.calls[:2], recorder.calls[2:]):
        (first, (before, sampled)), (second, (after, _)) = calls
        assert first[3:] == (None, None)  # the policy is the one that sampled: no pass is spent
        for batch, old, new in zip(first[0], second[3], sampled, strict=True):
            np.testing.assert_array_equal(old[batch.mask > 0], new[batch.mask > 0])
        assert before["train/approx_kl"] == 0
        assert after["train/approx_kl"] > 1e-5


def test_the_largest_gap_to_the_sampler_is_that_of_all_updates(new_learner):
    learner = new_learner(**FOUR_UPDATES)
    learner.update = recorder = Recorder(learner.update)
    metrics = learner.learn(ROWS)
    gaps = [float(values["sampler/logprob_diff_max"]) for _, (values, _) in recorder.calls]
    assert metrics["sampler/logprob_diff_max"] == max(gaps) > min(gaps)


@pytest.mark.slow
def test_micro_batches_change_nothing(parts, new_learner):
    before = adapter_arrays(parts[1])
    two_updates = FOUR_UPDATES | {"epochs_per_step": 1}
    in_one, in_many = (new_learner(**two_updates | {"micro_batch_size": n}) for n in (24, 6))
    in_many.update = recorder = Recorder(in_many.update)
    metrics = [learner.learn(ROWS) for learner in (in_one, in_many)]
    assert [len(given[0]) for given, _ in recorder.calls] == [2, 2]
    got, expected = (adapter_arrays(learner.state(0)[0]) for learner in (in_many, in_one))
    assert relative_error(got, expected, before) < 1e-3
    for tag in metrics[0].keys() - {"train/compilations"}:
        assert metrics[0][tag] == pytest.approx(metrics[1][tag], rel=1e-3, abs=1e-6)


# -- which completions take part ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "row_4_pulls"),
    [
        ({}, False),
        ({"use_kl_penalty": True}, False),  # one update: the KL to the old policy has no gradient
        ({"epochs_per_step": 2}, False),
        ({"epochs_per_step": 2, "use_kl_penalty": True}, True),
        (TO_BASE, True),
        (TO_BASE | {"beta": 0.0}, False),
        ({"entropy_coef": 0.1}, True),
    ],
    ids=str,
)
def test_a_completion_without_advantage_is_left_out_unless_it_can_pull(options, row_4_pulls):
    everybody = list(range(8))
    expected = everybody if row_4_pulls else [n for n in everybody if n != 4]
    [part] = parts_of(tiny_config(**options), ROWS)
    assert [*part.index] == expected
    assert part.denominator == 8  # in the denominator they all are
    # A completion that is not trained on has neither advantage nor KL nor entropy.
    rows = dataclasses.replace(ROWS, trained=~TRUNCATED)
    [part] = parts_of(tiny_config(**options), rows)
    assert [*part.index] == [n for n in expected if n not in (2, 7)]


@pytest.mark.parametrize(
    ("options", "denominators"),
    [
        ({}, [4, 4]),
        ({"use_token_level_loss": True}, [11, 16]),
        ({"loss_type": "cispo"}, [11, 16]),
        ({"loss_type": "dr_grpo"}, [28, 28]),  # 4 completions x max_tokens
        ({"loss_type": "gspo"}, [4, 4]),
        ({"loss_type": "rloo"}, [4, 4]),
    ],
    ids=str,
)
def test_a_part_is_whole_groups_and_has_its_own_denominator(options, denominators):
    config = tiny_config(updates_per_epoch=2, **options)
    parts = parts_of(config, ROWS)
    assert [[*part.index] for part in parts] == [[0, 1, 5], [2, 3, 6, 7]]
    assert [part.denominator for part in parts] == denominators
    # Without two truncated ones, of 7 and 3 tokens, there are fewer tokens, but as many rows.
    parts = parts_of(config, dataclasses.replace(ROWS, trained=~TRUNCATED))
    fewer = [11, 6] if denominators == [11, 16] else denominators
    assert [part.denominator for part in parts] == fewer


@pytest.mark.parametrize(
    ("options", "denominator"),
    [({}, 8), (FOUR_UPDATES | {"epochs_per_step": 1, "updates_per_epoch": 1}, 17)],
    ids=["by completions", "by tokens"],
)
def test_a_truncated_completion_has_no_gradient_and_no_tokens(new_learner, options, denominator):
    # As if its advantage were zero; but by tokens the mean is over the 17 of the rest, not all 27.
    learner = new_learner(**options)
    adapter, base = learner.state(0)[0], learner.base
    rows = dataclasses.replace(ROWS, trained=~TRUNCATED)
    [part] = parts_of(learner.configs[0], rows)
    gradient = learner.update.gradient(adapter, base, batches(rows, part.index), part.denominator)
    zeroed = dataclasses.replace(ROWS, advantages=with_zeros(ADVANTAGES, TRUNCATED))
    expected = learner.update.gradient(adapter, base, batches(zeroed), float(denominator))
    assert relative_error(*map(adapter_arrays, (gradient, expected))) < 1e-5
    everyone = learner.update.gradient(adapter, base, batches(), 8.0)
    assert relative_error(*map(adapter_arrays, (gradient, everyone))) > 0.1


@pytest.mark.parametrize("options", [{}, FOUR_UPDATES, WITH_ENTROPY], ids=str)
def test_a_rollout_without_anything_to_train_on_changes_nothing(parts, new_learner, options):
    learner, before = new_learner(**options), adapter_arrays(parts[1])
    metrics = learner.learn(dataclasses.replace(ROWS, trained=np.zeros(8, bool)))
    assert metrics["train/grad_norm"] == metrics["train/loss"] == metrics["tokens/trained"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    after = adapter_arrays(learner.state(0)[0])
    assert all(np.array_equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("options", [{}, FOUR_UPDATES, WITH_ENTROPY], ids=str)
def test_a_rollout_of_empty_completions_changes_nothing(parts, new_learner, options):
    learner, before = new_learner(**options), adapter_arrays(parts[1])
    metrics = learner.learn(
        dataclasses.replace(ROWS, completions=[[]] * 8, sampler_logprobs=[[]] * 8)
    )
    assert metrics["train/grad_norm"] == metrics["train/loss"] == metrics["tokens/trained"] == 0
    assert metrics["train/skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    after = adapter_arrays(learner.state(0)[0])
    assert all(np.array_equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("options", [{}, {"use_token_level_loss": True}], ids=str)
def test_an_empty_completion_counts_as_a_completion_without_tokens(new_learner, options):
    """As one that is masked: in the mean over completions, not in that over tokens."""
    without = lambda rows: [[] if TRUNCATED[n] else row for n, row in enumerate(rows)]  # noqa: E731
    rows = dataclasses.replace(
        ROWS, completions=without(COMPLETIONS), sampler_logprobs=without(LABELS)
    )
    found, expected = new_learner(**options), new_learner(**options)
    metrics = found.learn(rows)
    masked = expected.learn(dataclasses.replace(ROWS, trained=~TRUNCATED))
    assert metrics["train/loss"] == pytest.approx(masked["train/loss"], rel=1e-5)
    assert metrics["tokens/trained"] == 14  # of 27 without the fifth, whose advantage is 0
    arrays = (adapter_arrays(learner.state(0)[0]) for learner in (found, expected))
    assert relative_error(*arrays) < 1e-5


def test_a_rollout_without_advantages_has_no_gradient_but_is_measured(new_learner):
    learner = new_learner()
    metrics = learner.learn(dataclasses.replace(ROWS, advantages=np.zeros(8, np.float32)))
    assert metrics["train/grad_norm"] == metrics["train/loss"] == 0
    assert metrics["tokens/trained"] == LENGTHS[0]  # the first completion stands for all
    assert metrics["train/entropy"] > 0.1


# -- KL to the base, entropy ----------------------------------------------------------------------


def logprobs_and_entropies(graph, adapter, base, batch):
    return token_logprobs(nnx.merge(graph, adapter, base), batch)


def test_the_base_is_the_model_with_the_adapter_off(checkpoint, new_learner):
    """At every update of every rollout, for the completions of each, however far the adapter has
    moved."""
    learner = new_learner(**WITH_ENTROPY, updates_per_epoch=2)
    learner.update = recorder = Recorder(learner.update)
    for _ in range(2):
        learner.learn(ROWS)
    model = split(load_model(checkpoint("qwen3-tied", num_hidden_layers=1)))  # of rank 0
    base = jax.jit(partial(logprobs_and_entropies, *model))
    assert len(recorder.calls) == 4
    for ([batch], _, _, _, [ref]), (metrics, [logprobs]) in recorder.calls:
        there = batch.mask > 0
        np.testing.assert_allclose(ref[there], base(batch)[0][there], atol=2e-5)
        d = (ref.astype(float) - logprobs)[there]
        assert np.abs(d).mean() > 0.1  # the policy is elsewhere
        assert float(metrics["train/kl"]) == pytest.approx((d**2 / 2).mean(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"use_kl_penalty": True}, TO_BASE | {"beta": 0.0}], ids=str
)
def test_without_a_kl_to_the_base_no_pass_is_spent_on_it(new_learner, options):
    learner = new_learner(**options)
    learner.update = AllOnes(learner.update)
    learner.learn(ROWS)


@pytest.mark.slow
def test_kl_and_entropy_pull_without_any_advantage(parts, new_learner):
    """The gradient, as Adam's first moment keeps it (a tenth), against finite differences of
    0.01 KL - 0.2 entropy, means over the 27 tokens, along random directions."""
    graph, adapter, base = parts
    learner = new_learner(**WITH_ENTROPY)
    metrics = learner.learn(dataclasses.replace(ROWS, advantages=np.zeros(8, np.float32)))
    scale = 10 * max(1.0, metrics["train/grad_norm"])  # the norm is clipped at 1
    gradient = jax.tree.map(lambda m: scale * m, optax.tree.get(learner.state(0)[1], "mu"))
    [batch] = batches()
    off = jax.tree.map(jnp.zeros_like, adapter)

    @jax.jit
    def pulls(step, direction):
        moved = jax.tree.map(lambda x, d: x + step * d, adapter, direction)
        logprobs, entropies = logprobs_and_entropies(graph, moved, base, batch)
        d = logprobs_and_entropies(graph, off, base, batch)[0] - logprobs
        return jnp.stack([0.01 * (d**2 / 2).sum(), -0.2 * entropies.sum()]) / 27

    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda x, r=rng: jnp.asarray(r.normal(size=x.shape)), adapter)
        slopes = (pulls(3e-4, direction) - pulls(-3e-4, direction)) / 6e-4
        along = jax.tree.map(lambda g, d: float((g * d).sum()), gradient, direction)
        assert np.abs(slopes).min() > 0.05 * np.abs(slopes).max()  # both count
        assert sum(jax.tree.leaves(along)) == pytest.approx(float(slopes.sum()), rel=0.02)


# -- the learning rate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "warmup_steps", "rates"),
    [
        ("constant", 4, {0: 0, 1: 0.25, 3: 0.75, 4: 1, 20: 1}),
        ("linear", 0, {0: 1, 1: 0.95, 10: 0.5, 19: 0.05, 20: 0, 25: 0}),
        ("linear", 4, {0: 0, 2: 0.5, 4: 1, 8: 0.75, 12: 0.5, 20: 0}),
        ("cosine", 0, {0: 1, 5: (1 + math.sqrt(0.5)) / 2, 10: 0.5, 20: 0}),
        ("cosine", 4, {0: 0, 1: 0.25, 4: 1, 12: 0.5, 8: (1 + math.sqrt(0.5)) / 2, 20: 0}),
    ],
)
def test_learning_rates_by_hand(kind, warmup_steps, rates):
    rate = learning_rate(kind, 0.3, 20, warmup_steps)
    for count, share in rates.items():
        assert float(rate(count)) == pytest.approx(0.3 * share, abs=1e-7)


def test_a_constant_rate_is_a_number():
    assert learning_rate("constant", 0.3, 20) == 0.3


def test_a_schedule_counts_updates_and_moves_the_adapter_by_its_rate(parts, new_learner):
    """Three updates a rollout, fifteen in all: a rise over three, then a linear fall over twelve.
    Where the gradient is always the same, Adam moves by the rate."""
    learner = new_learner(epochs_per_step=3, lr_scheduler_type="linear", warmup_steps=3)
    learner.update = AllOnes(learner.update)
    place, rates = jax.tree.leaves(parts[1])[0].mean(), []
    thirds = [0, 1, 2], [3, 2.75, 2.5], [2.25, 2, 1.75], [1.5, 1.25, 1], [0.75, 0.5, 0.25]
    for of_rollout in thirds:
        rates.append(learner.learn(ROWS)["train/lr"])
        moved = place - jax.tree.leaves(learner.state(0)[0])[0].mean()
        assert float(moved) == pytest.approx(0.01 * sum(of_rollout) / 3, rel=1e-3)
        place -= moved
    assert rates == pytest.approx([0.01 * first / 3 for first, *_ in thirds])


def test_the_constant_rate_is_logged_too(new_learner):
    learner = new_learner()
    learner.update = AllOnes(learner.update)
    assert learner.learn(ROWS)["train/lr"] == 0.01


CLIP = {"clip_eps": 0.2, "clip_eps_high": None, "clip_delta": None}
WEIGHTS = {"importance_cap": 2.0, "importance_mode": "token_truncate"}


# -- what a config asks for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "loss", "options"),
    [
        ({}, "grpo", {}),
        ({"clip_eps": 0.3, "beta": 0.1, "importance_weight_cap": 3.0}, "grpo", {}),  # not asked for
        ({"use_clip": True}, "grpo", CLIP),
        ({"use_clip": True, "clip_eps": 0.1, "clip_eps_high": 0.28, "loss_type": "gspo"},
         "gspo", CLIP | {"clip_eps": 0.1, "clip_eps_high": 0.28}),
        ({"use_token_level_loss": True}, "grpo", {"token_level": True}),
        ({"loss_type": "gspo", "use_token_level_loss": True}, "gspo", {"token_level": True}),
        ({"loss_type": "dr_grpo"}, "dr_grpo", {"max_tokens": 7}),
        ({"loss_type": "cispo"}, "cispo", {"max_ratio": 5.0}),
        ({"loss_type": "cispo", "cispo_max_ratio": 2.0, "use_token_level_loss": True},
         "cispo", {"max_ratio": 2.0}),
        ({"loss_type": "rloo"}, "rloo", {}),
        ({"use_kl_penalty": True}, "grpo", {"beta": 0.04, "kl_estimator": "k3"}),
        ({"use_kl_penalty": True, "beta": 0.5, "kl_estimator": "k2", "kl_to": "base"},
         "grpo", {"beta": 0.5, "kl_estimator": "k2"}),
        ({"use_importance_weights": True}, "grpo", WEIGHTS),
        ({"use_importance_weights": True, "importance_weight_cap": 3.0},
         "grpo", WEIGHTS | {"importance_cap": 3.0}),
        ({"entropy_coef": 0.01}, "grpo", {"entropy_coef": 0.01}),
    ],
    ids=str,
)  # fmt: skip
def test_the_loss_is_the_one_asked_for_with_its_options_and_no_others(fields, loss, options):
    bound = loss_of(tiny_config(**fields))
    assert bound.func is LOSSES[loss]
    assert bound.keywords == options


@pytest.mark.parametrize("bad", [np.nan, 3e38])
def test_an_update_that_is_not_finite_is_skipped_and_counted(new_learner, bad):
    """Of two updates a rollout, each on half of the completions, the second is bad."""
    learner = new_learner(updates_per_epoch=2)
    state = jax.tree.map(jnp.copy, (learner.adapters, learner.opt_states))  # the update eats it
    advantages = np.where(np.isin(np.arange(8), HALVES[1]), np.float32(bad), ADVANTAGES)
    learner.update = recorder = Recorder(learner.update)
    metrics = learner.learn(dataclasses.replace(ROWS, advantages=advantages))
    assert (metrics["train/skipped_updates"], learner.skipped_in_a_row) == (1, [1])
    (_, (made, _)), (_, (skipped, _)) = recorder.calls
    assert not np.isfinite(skipped["train/grad_norm"])
    assert metrics["train/loss"] == made["train/loss"]
    first = recorder.calls[0][0]
    expected = new_learner().update(*state, learner.base, *first)[:2]
    after = learner.adapters, learner.opt_states
    for got, wanted in zip(*map(jax.tree.leaves, (after, expected)), strict=True):
        np.testing.assert_array_equal(got, wanted)
    learner.learn(ROWS)
    assert learner.skipped_in_a_row == [0]


def test_a_gradient_whose_square_would_overflow_is_clipped_like_any_other(new_learner):
    """Scaled by a power of two, its norm from about 10 to 10^23 (float32 squares overflow above
    1.8e19): Adam gets the same gradient, and the norm is reported as it is."""
    norms, adapters = [], []
    for power in (10, 80):
        learner = new_learner()
        metrics = learner.learn(dataclasses.replace(ROWS, advantages=np.ldexp(ADVANTAGES, power)))
        assert metrics["train/skipped_updates"] == 0
        norms.append(metrics["train/grad_norm"])
        adapters.append(adapter_arrays(learner.state(0)[0]))
    assert norms[0] > 1
    assert norms[1] > 1.8e19
    assert norms[1] == pytest.approx(norms[0] * 2.0**70, rel=1e-6)
    assert relative_error(*adapters) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 0.3, 1.0, 3e9, 1e15, 1.7e19, 1.9e19, 1e25, 1e38])
def test_a_norm_is_that_of_float64_and_adam_gets_the_gradient_at_norm_one(size):
    tree = {"a": np.array([[0.6, -0.1], [0.3, 0.0]]), "b": np.array([-0.2])}
    gradient = {k: jnp.asarray(size * x, jnp.float32) for k, x in tree.items()}
    norm = math.sqrt(sum((np.asarray(x, float) ** 2).sum() for x in gradient.values()))
    if size > 1e-20:  # below, squares are 0 in float32
        assert float(global_norm(gradient)) == pytest.approx(norm, rel=1e-6)
    optimizer = adam(0.1)
    state = optimizer.init(gradient)
    _, state = optimizer.update(gradient, state, gradient)
    for got, x in zip(jax.tree.leaves(optax.tree.get(state, "mu")), gradient.values(), strict=True):
        clipped = np.asarray(x, float) / max(1.0, norm)
        np.testing.assert_allclose(got, 0.1 * clipped, rtol=1e-5)
