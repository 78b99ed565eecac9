"""The update against torch + PEFT: the gradient of the loss on the same ragged rollout, then Adam;
and that neither micro-batches, nor padding, nor rows without signal change anything."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import OneMember, adapted, in_one_batch, merged, torch_model, with_random_b
from peft import PeftModel

import jgrpo
from jgrpo.losses import LOSSES
from jgrpo.policy.adapter import adapter_arrays
from jgrpo.policy.batch import MicroBatch, Rows, completion_mask, micro_batches, with_signal
from jgrpo.policy.lora import split
from jgrpo.update.step import Update, adam, loss_denominator

LR = 0.01
ROUNDING = 1e-5  # sums of float32 in another order; a row too much or too few is off by 0.1


def torch_adapter(base, folder) -> torch.nn.Module:
    """The base in float64 with an adapter of ours, trainable."""
    model = torch_model(base, torch.float64)
    return PeftModel.from_pretrained(model, folder, is_trainable=True).double()


def torch_gradient(model, rows: Rows, temperature=1.0) -> dict[str, np.ndarray]:
    """d/d(adapter) of GRPO's loss, one unpadded completion at a time, under PEFT's keys:
    the mean over completions of each one's mean over tokens of -ratio A."""
    model.zero_grad()
    for prompt, completion, advantage in zip(
        rows.prompts, rows.completions, rows.advantages, strict=True
    ):
        logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
        predictions = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        logprobs = predictions[range(len(completion)), completion]
        ratio = (logprobs - logprobs.detach()).exp()
        loss = -(ratio * float(advantage)).mean() / len(rows.completions)
        loss.backward()
    return {
        name.replace(".default", ""): weight.grad.numpy().copy()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def relative_error(got: dict, expected: dict) -> float:
    """The worst tensor's |got - expected| / |expected|."""
    assert got.keys() == expected.keys()
    norm = np.linalg.norm
    return max(norm(got[k] - expected[k]) / norm(expected[k]) for k in expected)


def batches_of(rows, index, size):
    return micro_batches(rows, index, micro_batch_size=size, max_prompt_tokens=8, max_tokens=8)


@cache
def _compiled(graph, temperature: float, checkpoint: bool, options: tuple) -> OneMember:
    loss = partial(LOSSES["grpo"], **dict(options))
    update = Update(graph, loss, adam(), temperature=temperature, checkpoint=checkpoint)
    return OneMember(update, LR)


def compiled(graph, *, temperature=1.0, checkpoint=False, **options) -> OneMember:
    """One Update for all tests that want the same, since compiling is what takes the time."""
    return _compiled(graph, temperature, checkpoint, tuple(options.items()))


def our_gradient(parts, batches, denominator, **options) -> dict[str, np.ndarray]:
    graph, adapter, base = parts
    update = compiled(graph, **options)
    return adapter_arrays(update.gradient(adapter, base, batches, float(denominator)))


def start(parts, **options):
    """An Update, an adapter that it may consume, its optimizer's state, and the base."""
    graph, adapter, base = parts
    update, adapter = compiled(graph, **options), jax.tree.map(jnp.copy, adapter)
    return update, adapter, update.init(adapter), base


@pytest.fixture(scope="module")
def pair(checkpoint, tmp_path_factory):
    """pair(rank) -> the same adapter, with B non-zero, here and in torch."""

    @cache
    def get(rank: int):
        folder, parts = checkpoint("qwen3-tied"), adapted(checkpoint("qwen3-tied"), rank)
        saved = tmp_path_factory.mktemp("pair") / "adapter"
        jgrpo.save_adapter(merged(*parts), saved)
        return parts, torch_adapter(folder, saved)

    return get


@pytest.mark.parametrize(
    ("rank", "temperature", "checkpoint_layers"),
    [
        pytest.param(1, 1.0, False, marks=pytest.mark.slow),
        (4, 1.0, True),
        pytest.param(1, 0.7, True, marks=pytest.mark.slow),
        pytest.param(4, 0.7, False, marks=pytest.mark.slow),
    ],
)
def test_gradient_equals_torch_and_peft(pair, rows, rank, temperature, checkpoint_layers):
    parts, reference = pair(rank)
    expected = torch_gradient(reference, rows, temperature)
    assert len(expected) == 3 * 7 * 2  # layers, projections, A and B
    got = our_gradient(
        parts, [in_one_batch(rows)], 5, temperature=temperature, checkpoint=checkpoint_layers
    )
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize(("dtype", "at_most"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_in_16_bits_the_gradient_points_where_torch_s_does(checkpoint, pair, rows, dtype, at_most):
    """Rounding turns it by a few hundredths in bfloat16, and an eighth of that in float16."""
    expected = torch_gradient(pair(4)[1], rows)
    model = jgrpo.load_model(str(checkpoint("qwen3-tied")), lora_r=4, dtype=dtype)
    graph, adapter, base = split(model)
    got = our_gradient((graph, with_random_b(adapter), base), [in_one_batch(rows)], 5)
    a, b = (np.concatenate([x[k].ravel() for k in sorted(x)]) for x in (got, expected))
    apart = np.linalg.norm(a - b) / np.linalg.norm(b)
    print(apart)
    assert apart < at_most


def last_trained(mask: np.ndarray) -> np.ndarray:
    return mask * (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)


MUTATIONS = {
    "mask one early": lambda b: b._replace(mask=np.roll(b.mask, -1, axis=1)),
    "mask one late": lambda b: b._replace(mask=np.roll(b.mask, 1, axis=1)),
    "end token dropped": lambda b: b._replace(mask=b.mask - last_trained(b.mask)),
    "completions one late": lambda b: b._replace(starts=b.starts + 1),
    "prompt cut by one": lambda b: b._replace(prompt_lengths=b.prompt_lengths - 1),
    "answers to the next prompt": lambda b: b._replace(row_prompts=(b.row_prompts + 1) % 3),
    "one segment a row": lambda b: b._replace(segments=np.minimum(b.segments, 1)),
    "sign flipped": lambda b: b._replace(advantages=-b.advantages),
    "advantages of the next row": lambda b: b._replace(advantages=np.roll(b.advantages, 1)),
    "segments one late": lambda b: b._replace(segments=np.roll(b.segments, 1, axis=1)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_would_see(pair, rows, name):
    # The same comparison as above, which passes at 1e-4, fails by far where the batch is wrong.
    parts, reference = pair(1)
    mutated = MUTATIONS[name](in_one_batch(rows))
    got = our_gradient(parts, [mutated], 5)
    assert relative_error(got, torch_gradient(reference, rows)) > 0.01


def test_the_comparison_would_see_the_wrong_temperature(pair, rows):
    parts, reference = pair(1)
    got = our_gradient(parts, [in_one_batch(rows)], 5)
    assert relative_error(got, torch_gradient(reference, rows, temperature=0.7)) > 0.01


def test_three_updates_equal_torch_adam_with_clipped_gradients(pair, rows):
    # The same gradients go to torch's Adam. clip_grad_norm_ divides by norm + 1e-6 where optax
    # divides by the norm: that is 1e-6 of a gradient.
    update, adapter, state, base = start(pair(1)[0])
    before = adapter_arrays(adapter)
    reference = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in before.items()}
    optimizer = torch.optim.Adam(reference.values(), lr=LR, betas=(0.9, 0.999), eps=1e-8)
    norms = []
    for scale in (1.0, 30.0, 1e-3):  # below and above the norm at which clipping begins
        batch = in_one_batch(rows)
        batch = batch._replace(advantages=batch.advantages * scale)
        gradient = adapter_arrays(update.gradient(adapter, base, [batch], 5.0))
        adapter, state, metrics, _ = update(adapter, state, base, [batch], 5.0)
        for k, weight in reference.items():
            weight.grad = torch.tensor(gradient[k])
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.values(), 1.0)))
        optimizer.step()
        assert float(metrics["train/grad_norm"]) == pytest.approx(norms[-1], rel=1e-5)
    assert max(norms) > 1 > min(norms)
    moved = {k: v - before[k] for k, v in adapter_arrays(adapter).items()}
    expected = {k: v.detach().numpy() - before[k] for k, v in reference.items()}
    assert relative_error(moved, expected) < 1e-4


# -- what must not matter -------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "n_batches"), [(1, 3), (12, 1)])
def test_micro_batches_change_nothing(pair, rows, size, n_batches):
    parts, _ = pair(1)
    batches = batches_of(rows, np.arange(5), size)
    assert len(batches) == n_batches
    in_one = our_gradient(parts, [in_one_batch(rows)], 5)
    assert relative_error(our_gradient(parts, batches, 5), in_one) < ROUNDING


def test_what_fills_up_changes_nothing(pair, rows):
    parts, batch = pair(1)[0], in_one_batch(rows)
    wide = MicroBatch(*[np.pad(x, ((0, 3), (0, 9)) if x.ndim == 2 else (0, 3)) for x in batch])
    old_width = batch.rows.shape[1]
    row, column = np.divmod(wide.starts, old_width)
    slots = np.arange(wide.prompts.size + wide.rows.size, dtype=np.uint32)
    moved = wide._replace(starts=row * (old_width + 9) + column, places=slots)
    in_one = our_gradient(parts, [batch], 5)
    assert relative_error(our_gradient(parts, [moved], 5), in_one) < ROUNDING


def only(rows: Rows, i: int) -> Rows:
    """A rollout of the i-th completion alone."""
    columns = rows.prompts, rows.completions, rows.sampler_logprobs, rows.advantages
    return Rows(*(column[i : i + 1] for column in columns))


def test_company_changes_nothing(pair, rows):
    # Each completion alone, with its prompt, against all of them packed into shared rows.
    parts, batch = pair(1)[0], in_one_batch(rows)
    assert batch.segments.max() > 1
    alone = [in_one_batch(only(rows, i)) for i in range(5)]  # all of one shape: compiled once
    assert all(b.segments.max() == 1 for b in alone)
    apart = [our_gradient(parts, [b], 5) for b in alone]
    summed = {name: sum(g[name] for g in apart) for name in apart[0]}
    assert relative_error(summed, our_gradient(parts, [batch], 5)) < ROUNDING


@pytest.mark.parametrize("token_level", [False, True])
def test_rows_without_signal_count_in_the_denominator_alone(pair, rows, token_level):
    # Row 3 has advantage 0 and two tokens of 18: leaving it out changes nothing, since the
    # denominator is still 5 completions, or 18 tokens.
    options = {"token_level": True} if token_level else {}
    loss = partial(LOSSES["grpo"], **options)
    denominator = loss_denominator(loss, completion_mask(rows))
    assert denominator == (18 if token_level else 5)
    kept = with_signal(rows.advantages)
    assert kept.tolist() == [0, 1, 2, 4]
    everything, less = (
        our_gradient(pair(1)[0], batches_of(rows, index, 8), denominator, **options)
        for index in (np.arange(5), kept)
    )
    assert relative_error(less, everything) < ROUNDING


def test_the_loss_of_the_update_is_the_mean_over_all_completions(pair, rows):
    # On policy each completion's loss is -A: -(0.7 - 0.7 + 1.3 + 0 - 0.9) / 5 = -0.08.
    update, adapter, state, base = start(pair(1)[0])
    batches = batches_of(rows, with_signal(rows.advantages), 8)
    _, _, metrics, _ = update(adapter, state, base, batches, 5.0)
    assert float(metrics["train/loss"]) == pytest.approx(-0.08, abs=1e-6)
    assert metrics["tokens/trained"] == 16
    assert metrics["train/approx_kl"] == 0


def test_sampler_metrics_by_hand(pair, rows):
    # The sampler reports the trainer's own logprobs, but for one token, where it says 0.3 more.
    batch = in_one_batch(rows)
    _, _, _, (ours,) = _update_once(pair(1)[0], batch)
    reported = np.array(ours)
    n, t = np.argwhere(batch.mask)[4]
    reported[n, t] += 0.3
    reported[batch.mask == 0] = 7  # outside of the mask nothing is compared
    _, _, metrics, _ = _update_once(pair(1)[0], batch._replace(sampler_logprobs=reported))
    assert float(metrics["sampler/logprob_diff_max"]) == pytest.approx(0.3, abs=1e-5)
    assert float(metrics["sampler/logprob_diff_mean"]) == pytest.approx(0.3 / 18, abs=1e-5)
    assert float(metrics["sampler/kl"]) == pytest.approx((np.exp(-0.3) - 1 + 0.3) / 18, abs=1e-5)


def _update_once(parts, batch):
    update, adapter, state, base = start(parts)
    return update(adapter, state, base, [batch], 5.0)


@pytest.mark.slow
def test_a_second_update_takes_the_first_ones_logprobs_as_old(pair, rows):
    # After a step the policy has moved: ratios are no longer 1, some beyond 1 +- 0.01.
    update, adapter, state, base = start(pair(1)[0], clip_eps=0.01, beta=0.1)
    batch = in_one_batch(rows)
    adapter, state, first, old = update(adapter, state, base, [batch], 5.0)
    adapter, state, second, new = update(adapter, state, base, [batch], 5.0, old)
    assert (first["train/clip_fraction"], first["train/approx_kl"]) == (0, 0)
    d = (new[0].astype(float) - old[0])[batch.mask > 0]
    clipped = np.abs(np.exp(d) - 1) > 0.01
    assert clipped.any()
    assert float(second["train/clip_fraction"]) == pytest.approx(clipped.mean())
    assert float(second["train/approx_kl"]) == pytest.approx((np.expm1(d) - d).mean(), rel=1e-3)


@pytest.mark.slow
def test_more_micro_batches_than_one_program_goes_through(pair, rows):
    """2 x 16 + 4 of them: the gradient is the sum of all, and each has its own logprobs."""
    update, adapter, state, base = start(pair(1)[0], clip_eps=0.01, beta=0.1)
    few = batches_of(rows, np.arange(5), 1)
    assert len(few) == 3
    many = few * 12
    once, often = (adapter_arrays(update.gradient(adapter, base, b, 1.0)) for b in (few, many))
    assert relative_error(often, {name: 12 * g for name, g in once.items()}) < ROUNDING
    old = update.logprobs(adapter, base, many)
    assert len(old) == len(many)
    for i, batch in enumerate(many):
        np.testing.assert_allclose(old[i], update.logprobs(adapter, base, [batch])[0])
    _, _, metrics, new = update(adapter, state, base, many, 1.0, old)
    assert (metrics["train/clip_fraction"], metrics["tokens/trained"]) == (0, 12 * 18)
    assert metrics["train/approx_kl"] < 1e-9
    np.testing.assert_allclose(new, old, atol=1e-5)


def test_a_second_step_compiles_nothing(pair, rows):
    update, adapter, state, base = start(pair(1)[0])
    counts = []
    for _ in range(3):
        adapter, state, _, _ = update(adapter, state, base, batches_of(rows, np.arange(5), 1), 5.0)
        counts.append(update.n_compilations)
    assert counts[0] == counts[1] == counts[2]
