"""Log-probabilities and entropies against log_softmax in PyTorch; and what the chunked head must
never do: hold all logits, or spend itself on prompts."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import adapted, merged, random_ids, torch_logits, torch_model
from flax import nnx
from peft import PeftModel

import jgrpo
from jgrpo import logprobs as module
from jgrpo.adapter import adapter_arrays
from jgrpo.logprobs import token_logprobs
from jgrpo.model import Decoder
from jgrpo.weights import load_model

IDS = jnp.asarray(random_ids(4, 32))
VOCAB, WIDTH = 67, 32
LENGTHS, PROMPT_LENGTHS = np.array([[32], [20], [9], [3]]), np.array([[5], [1], [8], [3]])
SEGMENTS = (np.arange(32) < LENGTHS).astype(np.int32)
MASK = (SEGMENTS * (np.arange(32) >= PROMPT_LENGTHS)).astype(np.float32)


@pytest.fixture(scope="module", params=["qwen3-tied", "qwen3-untied"])
def folder(checkpoint, request):
    return checkpoint(request.param)


def reference(folder, temperature) -> tuple[np.ndarray, np.ndarray]:
    """log_softmax by torch; the row's first token, the prompt and the padding are 0."""
    logits = torch.tensor(torch_logits(torch_model(folder), IDS)).double() / temperature
    distribution = torch.distributions.Categorical(logits=logits[:, :-1])
    next_ids = torch.tensor(np.asarray(IDS[:, 1:]), dtype=torch.long)
    values = distribution.log_prob(next_ids).numpy(), distribution.entropy().numpy()
    return tuple(np.pad(v, ((0, 0), (1, 0))) * MASK for v in values)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_equal_log_softmax(folder, temperature):
    logprobs, entropies = reference(folder, temperature)
    assert (MASK.sum(), MASK[3].sum()) == (27 + 19 + 1, 0)
    got = jax.jit(partial(token_logprobs, temperature=temperature))(
        load_model(folder), IDS, SEGMENTS, MASK
    )
    np.testing.assert_allclose(got[0], logprobs, atol=1e-4)
    np.testing.assert_allclose(got[1], entropies, atol=1e-4)
    assert np.asarray(got[0])[MASK == 0].tolist() == [0] * int((MASK == 0).sum())


def value_and_gradient(graph, adapter, base):
    """What the loss sees of the logprobs, and the adapter's gradient of it."""

    def loss(adapter, base):
        values = token_logprobs(nnx.merge(graph, adapter, base), IDS, SEGMENTS, MASK)
        weights = jnp.cos(jnp.arange(IDS.size)).reshape(IDS.shape)  # each token counts differently
        return (values[0] * weights).sum(), values

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter, base)


@pytest.fixture(scope="module")
def whole(checkpoint):
    """Values and gradient where one chunk holds all tokens."""
    parts = adapted(checkpoint("qwen3-tied"), 2)
    assert IDS.size * VOCAB < module.HEAD_CHUNK_FLOATS
    return parts, value_and_gradient(*parts)


@pytest.mark.parametrize("chunk_rows", [8, 40])
def test_chunks_change_nothing(whole, monkeypatch, chunk_rows):
    # 47 of 128 tokens are trained: the sixth chunk of 8 is cut and ten are skipped; of 40, two are
    # needed, and the fourth reaches beyond the 128.
    parts, whole = whole
    monkeypatch.setattr(module, "HEAD_CHUNK_FLOATS", chunk_rows * VOCAB)
    (_, values), gradient = value_and_gradient(*parts)
    for got, expected in zip(values, whole[0][1], strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)
    for got, expected in zip(*map(jax.tree.leaves, (gradient, whole[1])), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max()))


LOGPROB_WEIGHTS = np.cos(np.arange(IDS.size)).reshape(IDS.shape)
ENTROPY_WEIGHTS = np.sin(1 + np.arange(IDS.size)).reshape(IDS.shape)


def torch_entropy_gradient(model, temperature: float, logprob_weight: float) -> dict:
    """Of the weighed sum of entropies (and logprobs), under PEFT's keys, by torch's autograd."""
    model.zero_grad()
    ids = torch.tensor(np.asarray(IDS), dtype=torch.long)
    distribution = torch.distributions.Categorical(logits=model(ids).logits[:, :-1] / temperature)
    weights = (torch.tensor((w * MASK)[:, 1:]) for w in (LOGPROB_WEIGHTS, ENTROPY_WEIGHTS))
    values = distribution.log_prob(ids[:, 1:]) * logprob_weight, distribution.entropy()
    sum((w * v).sum() for w, v in zip(weights, values, strict=True)).backward()
    return {
        name.replace(".default", ""): p.grad.numpy().copy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def test_the_gradient_of_the_entropies_equals_torch_and_peft(checkpoint, tmp_path, monkeypatch):
    # In chunks of 8 rows: 47 trained tokens need six of sixteen.
    monkeypatch.setattr(module, "HEAD_CHUNK_FLOATS", 8 * VOCAB)
    folder = checkpoint("qwen3-tied")
    graph, adapter, base = adapted(folder, 2)
    jgrpo.save_adapter(merged(graph, adapter, base), tmp_path / "adapter")
    model = torch_model(folder, torch.float64)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True).double()

    @jax.jit
    def gradient(adapter, base, logprob_weight):
        def weighed(adapter):
            logprobs, entropies = token_logprobs(
                nnx.merge(graph, adapter, base), IDS, SEGMENTS, MASK,
                temperature=0.7, entropy_gradient=True,
            )  # fmt: skip
            return (logprob_weight * LOGPROB_WEIGHTS * logprobs + ENTROPY_WEIGHTS * entropies).sum()

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
        return token_logprobs(model, IDS, SEGMENTS, MASK)[1].sum()

    assert not any(x.any() for x in jax.tree.leaves(jax.jit(jax.grad(entropies))(adapter)))


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
    # [N, T, V] has 128 rows of V; the largest allowed is the head itself, D = 32 rows. The second
    # case shows that the search finds such an array where there is one.
    monkeypatch.setattr(module, "HEAD_CHUNK_FLOATS", chunk_rows * VOCAB)
    parts = adapted(checkpoint("qwen3-tied"), 1)
    program = jax.make_jaxpr(lambda a, b: value_and_gradient(parts[0], a, b))(*parts[1:])
    with_vocab = [np.prod(s) // VOCAB for s in shapes_in(program) if VOCAB in s]
    assert max(with_vocab) == (IDS.size if all_at_once else WIDTH)


def test_the_head_sees_the_trained_tokens_alone(checkpoint, monkeypatch):
    # 47 tokens are trained: six chunks of 8 (one row fills up), not sixteen for the 128.
    seen = []
    logits = Decoder.logits

    def spy(model, hidden):
        jax.debug.callback(lambda h: seen.append(np.asarray(h)), hidden)
        return logits(model, hidden)

    monkeypatch.setattr(module, "HEAD_CHUNK_FLOATS", 8 * VOCAB)
    monkeypatch.setattr(Decoder, "logits", spy)
    model = merged(*adapted(checkpoint("qwen3-tied"), 1))
    jax.block_until_ready(jax.jit(token_logprobs)(model, IDS, SEGMENTS, MASK))
    jax.effects_barrier()
    assert [h.shape for h in seen] == [(8, WIDTH)] * 6
