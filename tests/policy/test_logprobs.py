"""Log-probabilities and entropies against log_softmax in PyTorch; and what the chunked head must
never do: hold all logits, or spend itself on prompts."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import adapted, in_one_batch, merged, random_ids, torch_logits, torch_model
from flax import nnx
from marks import mostly_slow
from peft import PeftModel

import jgrpo
from jgrpo.policy import backend
from jgrpo.policy import logprobs as module
from jgrpo.policy.adapter import adapter_arrays
from jgrpo.policy.batch import MicroBatch, Rows
from jgrpo.policy.logprobs import token_logprobs
from jgrpo.policy.model import Decoder
from jgrpo.policy.weights import load_model

VOCAB, WIDTH = 67, 32
PROMPTS = [random_ids(1, n)[0] for n in (5, 1)]
LENGTHS = (27, 4, 11, 2, 3)
PROMPT_OF = (0, 0, 0, 1, 1)
COMPLETIONS = list(np.split(random_ids(1, sum(LENGTHS))[0], np.cumsum(LENGTHS)[:-1]))
"""All different, in three rows of 32: 27 + 4 tokens, 11, and 3 + 2 of the other prompt."""
TEXTS = [np.concatenate([PROMPTS[p], c]) for p, c in zip(PROMPT_OF, COMPLETIONS, strict=True)]


def make_batch() -> MicroBatch:
    rows = Rows(
        [PROMPTS[p].tolist() for p in PROMPT_OF],
        [c.tolist() for c in COMPLETIONS],
        [[0.0] * n for n in LENGTHS],
        np.ones(5, np.float32),
        np.array([True, True, True, False, True]),
    )
    return in_one_batch(rows)


def packed(batch: MicroBatch) -> MicroBatch:
    """Without the padding of prompts and rows, and with three tokens that only fill up."""
    in_prompts = np.arange(batch.prompts.shape[1]) < batch.prompt_lengths[:, None]
    used = np.flatnonzero(np.concatenate([in_prompts.ravel(), batch.segments.ravel()]))
    n_slots = batch.prompts.size + batch.rows.size
    return batch._replace(places=np.append(used, [n_slots] * 3).astype(np.uint32))


BATCH = make_batch()
PACKED = packed(BATCH)
MASK = BATCH.mask
N_TRAINED = sum(LENGTHS) - 2
WEIGHTS = np.cos(np.arange(MASK.size)).reshape(MASK.shape)  # each token counts differently
ENTROPY_WEIGHTS = np.sin(1 + np.arange(MASK.size)).reshape(MASK.shape)


def test_the_batch_is_packed_as_the_tests_below_say():
    assert BATCH.segments.tolist() == [
        [1] * 27 + [2] * 4 + [0], [1] * 11 + [0] * 21, [1] * 3 + [2] * 2 + [0] * 27,
    ]  # fmt: skip
    assert BATCH.row_prompts.tolist() == [0, 0, 1]
    assert MASK.sum() == N_TRAINED == 45
    assert BATCH.places.tolist() == list(range(2 * 16 + 3 * 32))
    assert PACKED.places.tolist() == [
        *range(5), 16, *range(32, 63), *range(64, 75), *range(96, 101), 128, 128, 128,
    ]  # fmt: skip


def slots() -> list[int]:
    """Which row of the mask is which completion's, by their tokens."""
    flat = BATCH.rows.reshape(-1)
    found = [flat[start:][:n].tolist() for start in BATCH.starts for n in [32]]
    return [
        next(i for i, row in enumerate(found) if row[: len(c)] == c.tolist()) for c in COMPLETIONS
    ]


@pytest.fixture(scope="module", params=["qwen3-tied", "qwen3-untied"])
def folder(checkpoint, request):
    return checkpoint(request.param)


def reference(folder, temperature) -> tuple[np.ndarray, np.ndarray]:
    """By torch, of each completion after its prompt alone; 0 where the mask is."""
    model, values = torch_model(folder), np.zeros((2, *MASK.shape))
    for text, n, slot in zip(TEXTS, LENGTHS, slots(), strict=True):
        logits = torch.tensor(torch_logits(model, text[None])).double()[0, -n - 1 : -1]
        distribution = torch.distributions.Categorical(logits=logits / temperature)
        values[0, slot, :n] = distribution.log_prob(torch.tensor(text[-n:])).numpy()
        values[1, slot, :n] = distribution.entropy().numpy()
    return values[0] * MASK, values[1] * MASK


@pytest.mark.parametrize(
    ("temperature", "batch"),
    [
        pytest.param(1.0, BATCH, id="1.0-padded", marks=pytest.mark.slow),
        pytest.param(0.7, PACKED, id="0.7-packed"),
        pytest.param(1.0, PACKED, id="1.0-packed", marks=pytest.mark.slow),
        pytest.param(0.7, BATCH, id="0.7-padded", marks=pytest.mark.slow),
    ],
)
def test_logprobs_and_entropies_equal_log_softmax(folder, temperature, batch):
    logprobs, entropies = reference(folder, temperature)
    assert (logprobs < 0).sum() == N_TRAINED
    got = jax.jit(partial(token_logprobs, temperature=temperature))(load_model(folder), batch)
    np.testing.assert_allclose(got[0], logprobs, atol=1e-4)
    np.testing.assert_allclose(got[1], entropies, atol=1e-4)
    assert np.asarray(got[0])[MASK == 0].tolist() == [0] * int((MASK == 0).sum())


def value_and_gradient(graph, adapter, base, batch=BATCH):
    """What the loss sees of the logprobs, and the adapter's gradient of it."""

    def loss(adapter, base):
        values = token_logprobs(nnx.merge(graph, adapter, base), batch)
        return (values[0] * WEIGHTS).sum(), values

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter, base)


@pytest.fixture(scope="module")
def whole(checkpoint):
    """Values and gradient where one chunk holds all tokens."""
    parts = adapted(checkpoint("qwen3-tied"), 2)
    assert BATCH.rows.size * VOCAB < backend.CPU.head_chunk_floats
    return parts, value_and_gradient(*parts)


def in_chunks(monkeypatch, tokens: int) -> None:
    small = backend.CPU._replace(head_chunk_floats=tokens * VOCAB)
    monkeypatch.setattr(backend, "CPU", small)


@pytest.mark.parametrize("chunks", mostly_slow([(40, 3), (100, 1), (8, 12)], short=2))
def test_chunks_change_nothing(whole, monkeypatch, chunks):
    # 45 of 96 tokens are trained: the sixth chunk of 8 is cut and six are skipped; of 40, two are
    # needed, and the third reaches beyond the 96; so does that of 100, which is.
    assert (BATCH.rows.size, N_TRAINED) == (96, 45)
    parts, whole = whole
    monkeypatch.setattr(module, "_chunks", lambda n, vocab_size: chunks)
    assert_equal(value_and_gradient(*parts), whole)


@pytest.mark.parametrize("trained", [0, 1])
def test_with_no_token_trained_and_with_every_slot_trained(checkpoint, trained):
    full = Rows([[5] * 32] * 2, [[6] * 64] * 2, [[0.0] * 64] * 2, np.ones(2, np.float32))
    batch = in_one_batch(full)
    batch = batch._replace(mask=batch.mask * np.float32(trained))
    assert batch.mask.sum() == trained * batch.rows.size
    parts = adapted(checkpoint("qwen3-tied"), 2)

    def total(adapter, base):
        logprobs, _ = token_logprobs(nnx.merge(parts[0], adapter, base), batch)
        return logprobs.sum(), (logprobs < 0).sum()

    (_, n), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(*parts[1:])
    assert n == batch.mask.sum()
    assert {bool(x.any()) for x in jax.tree.leaves(gradient)} == {bool(trained)}


def test_padding_that_is_not_computed_changes_nothing(whole):
    parts, whole = whole
    assert_equal(value_and_gradient(*parts, PACKED), whole)


def assert_equal(result, whole):
    """Both as from `value_and_gradient`, up to rounding."""
    for got, expected in zip(result[0][1], whole[0][1], strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)
    for got, expected in zip(*map(jax.tree.leaves, (result[1], whole[1])), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max()))


def torch_entropy_gradient(model, temperature: float, logprob_weight: float) -> dict:
    """Of the weighed sum of entropies (and logprobs), under PEFT's keys, by torch's autograd."""
    model.zero_grad()
    for text, n, slot in zip(TEXTS, LENGTHS, slots(), strict=True):
        ids = torch.tensor(text, dtype=torch.long)
        logits = model(ids[None]).logits[0, -n - 1 : -1] / temperature
        distribution = torch.distributions.Categorical(logits=logits)
        weights = (torch.tensor((w * MASK)[slot, :n]) for w in (WEIGHTS, ENTROPY_WEIGHTS))
        values = distribution.log_prob(ids[-n:]) * logprob_weight, distribution.entropy()
        sum((w * v).sum() for w, v in zip(weights, values, strict=True)).backward()
    return {
        name.replace(".default", ""): p.grad.numpy().copy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.slow
def test_the_gradient_of_the_entropies_equals_torch_and_peft(checkpoint, tmp_path, monkeypatch):
    # In chunks of 8 rows: 45 trained tokens need six of twelve.
    in_chunks(monkeypatch, 8)
    folder = checkpoint("qwen3-tied")
    graph, adapter, base = adapted(folder, 2)
    jgrpo.save_adapter(merged(graph, adapter, base), tmp_path / "adapter")
    model = torch_model(folder, torch.float64)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).double()

    @jax.jit
    def gradient(adapter, base, logprob_weight):
        def weighed(adapter):
            logprobs, entropies = token_logprobs(
                nnx.merge(graph, adapter, base), BATCH, temperature=0.7, entropy_gradient=True
            )
            return (logprob_weight * WEIGHTS * logprobs + ENTROPY_WEIGHTS * entropies).sum()

        return jax.grad(weighed)(adapter)

    for logprob_weight in (0.0, 1.0):  # alone, and beside that of the logprobs
        got = adapter_arrays(gradient(adapter, base, logprob_weight))
        expected = torch_entropy_gradient(model, 0.7, logprob_weight)
        assert got.keys() == expected.keys()
        for key in got:
            error = np.linalg.norm(got[key] - expected[key]) / np.linalg.norm(expected[key])
            assert error < 1e-4, key


def test_entropies_have_no_gradient_unless_asked_for(checkpoint):
    graph, adapter, base = adapted(checkpoint("qwen3-tied"), 2)

    def entropies(adapter):
        model = nnx.merge(graph, adapter, base)
        return token_logprobs(model, BATCH)[1].sum()

    assert not any(x.any() for x in jax.tree.leaves(jax.jit(jax.grad(entropies))(adapter)))


def test_in_bfloat16_the_head_is_exact_to_bfloat16(checkpoint):
    """Against float64, of the same bfloat16 hidden states and kernel."""
    model = load_model(checkpoint("qwen3-untied"), dtype="bfloat16")
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(64, WIDTH)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), jnp.bfloat16)
    model.lm_head.kernel[...] = kernel
    targets = rng.integers(VOCAB, size=64)
    (logprobs, entropies), (gradient, of_entropies) = module._head_and_gradients(
        model, 0.7, True, hidden, targets
    )

    def reference(hidden):
        logits = hidden @ torch.tensor(np.asarray(kernel, np.float64)) / 0.7
        distribution = torch.distributions.Categorical(logits=logits)
        return distribution.log_prob(torch.tensor(targets)), distribution.entropy()

    exact = torch.tensor(np.asarray(hidden, np.float64), requires_grad=True)
    for got, slope, value in zip(
        (logprobs, entropies), (gradient, of_entropies), reference(exact), strict=True
    ):
        (expected,) = torch.autograd.grad(value.sum(), exact, retain_graph=True)
        np.testing.assert_allclose(got, value.detach(), atol=0.01)
        assert np.abs(slope - expected.numpy()).max() < 0.01 * np.abs(expected.numpy()).max()


def shapes_in(jaxpr) -> Iterator[tuple[int, ...]]:
    """The shape of every array in a program, those of loops, branches and calls included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in (*equation.invars, *equation.outvars))
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from shapes_in(value)


@pytest.mark.parametrize(("chunk_rows", "all_at_once"), [(8, False), (10**6, True)])
def test_the_logits_of_all_tokens_never_exist(checkpoint, monkeypatch, chunk_rows, all_at_once):
    # All rows' logits are 96 rows of V; the largest allowed is the head itself, D = 32 rows. The
    # second case shows that the search finds such an array where there is one.
    in_chunks(monkeypatch, chunk_rows)
    parts = adapted(checkpoint("qwen3-tied"), 1)
    program = jax.make_jaxpr(lambda a, b: value_and_gradient(parts[0], a, b))(*parts[1:])
    with_vocab = [np.prod(s) // VOCAB for s in shapes_in(program) if VOCAB in s]
    assert max(with_vocab) == (BATCH.rows.size if all_at_once else WIDTH)


def test_the_head_sees_trained_tokens_alone(checkpoint, monkeypatch):
    # 45 tokens are trained: six chunks of 8 (three rows fill up), not twelve for the 96.
    seen = []
    logits = Decoder.logits

    def spy(model, hidden):
        jax.debug.callback(lambda h: seen.append(np.asarray(h)), hidden)
        return logits(model, hidden)

    in_chunks(monkeypatch, 8)
    monkeypatch.setattr(Decoder, "logits", spy)
    model = merged(*adapted(checkpoint("qwen3-tied"), 1))
    jax.block_until_ready(jax.jit(token_logprobs)(model, BATCH))
    jax.effects_barrier()
    assert [h.shape for h in seen] == [(8, WIDTH)] * 6
