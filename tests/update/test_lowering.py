"""The programs as they go to a GPU's compiler, without one: bfloat16, attention by cuDNN. What must
not be in them, and for each that it would be found."""

import re
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PROMPTS, in_one_batch, random_ids
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jgrpo.losses import LOSSES
from jgrpo.policy import backend
from jgrpo.policy.batch import MicroBatch, Rows, emptied
from jgrpo.policy.lora import split
from jgrpo.policy.mesh import dealt
from jgrpo.policy.weights import load_model
from jgrpo.rollout.decoding import grown
from jgrpo.rollout.embedded import JaxSampler
from jgrpo.update.step import STACK, Update, adam

VOCAB, WIDTH, FF, HEADS = 67, 32, 48, 4
LENGTHS = (27, 4, 11, 30)
CHUNK = 16
"""Tokens in a chunk of the head."""
Op = tuple[str, list[tuple[int, ...]], list[str]]


@pytest.fixture(scope="module")
def parts(checkpoint):
    return split(load_model(checkpoint("qwen3-untied"), dtype="bfloat16", rank=2, alpha=32))


@pytest.fixture
def on_gpu(monkeypatch):
    """Programs are made as for a GPU, in small chunks of the head."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    small = backend.GPU._replace(head_chunk_floats=CHUNK * VOCAB)
    monkeypatch.setattr(backend, "GPU", small)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)


def make_batch() -> MicroBatch:
    """Two completions in a row, and three of one prompt: 72 tokens in rows of 32."""
    completions = [random_ids(1, n)[0].tolist() for n in LENGTHS]
    prompts = [PROMPTS[p] for p in (0, 0, 0, 1)]
    return in_one_batch(Rows(prompts, completions, completions, np.ones(4, np.float32)))


def lowered(jitted, *args, **options) -> str:
    return jitted.trace(*args, **options).lower(lowering_platforms=("cuda",)).as_text()


def update_text(parts, attention: str) -> str:
    graph, adapter, base = parts
    update = Update(graph, LOSSES["grpo"], adam(0.01), attn_implementation=attention)
    ((stack, n),) = dealt([make_batch()], emptied, 1, STACK)
    total = update.programs.zeros(adapter)
    return lowered(update.programs.accumulate, total, None, adapter, base, stack, n, None, None)


def sampler_texts(parts) -> list[str]:
    """Prefill, and a stage of decoding."""
    sampler = JaxSampler(*parts, stop_token_ids=[1], max_tokens=64, max_rows=8)
    given = sampler.adapter, sampler.base
    asked = np.zeros((2, 16), np.int32), np.full(2, 16, np.int32), np.zeros(2, np.uint32)
    logits, prefix = jax.eval_shape(sampler.programs.prefill, *given, *asked)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (2, 4)))
    state = jax.eval_shape(
        lambda *x: sampler.programs.first(*x, 1.0, None, group_size=4, greedy=False),
        logits, prefix, keys, np.ones(2, bool),
    )  # fmt: skip
    state = jax.eval_shape(partial(grown, capacity=64), state)
    of_rows = prefix, keys, 1.0, None, 0, 1, state
    decode = lowered(sampler.programs.decode, *given, *of_rows, capacity=64, greedy=False)
    return [lowered(sampler.programs.prefill, *given, *asked), decode]


def arrays(text: str) -> list[tuple[tuple[int, ...], str]]:
    """The shapes and types in a text of StableHLO."""
    found = re.findall(r"tensor<((?:\d+x)*)([a-z]\w*)>", text)
    return [(tuple(map(int, re.findall(r"\d+", dims))), dtype) for dims, dtype in found]


def products(text: str) -> list[list[tuple[tuple[int, ...], str]]]:
    """Operands and result of each product."""
    return [arrays(line) for line in text.splitlines() if "stablehlo.dot_general" in line]


def products_of_weights(text: str, base: nnx.State) -> list[str]:
    """The type of each operand that is a kernel of the base."""
    leaves = [x.shape for x in jax.tree.leaves(base) if x.ndim >= 2]
    kernels = {s[-2:] for s in leaves} | {s[:-3:-1] for s in leaves}
    return [
        dtype for *operands, _ in products(text) for shape, dtype in operands if shape in kernels
    ]


def adds_by_index(text: str) -> int:
    bodies = re.findall(r'"stablehlo\.scatter"\(.*?\^bb0(.*?)stablehlo\.return', text, re.DOTALL)
    assert len(bodies) == text.count('"stablehlo.scatter"')
    return sum("stablehlo.add" in body for body in bodies)


def test_every_product_with_the_base_is_one_of_bfloat16(parts, on_gpu):
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), parts)
    for texts, dtype in (
        ([update_text(parts, "cudnn"), *sampler_texts(parts)], "bf16"),
        ([update_text(in_float32, "xla")], "f32"),
    ):
        for text in texts:
            found = products_of_weights(text, parts[2])
            assert len(found) >= 8  # seven a layer and the head
            assert set(found) == {dtype}


def test_nothing_is_added_by_index(parts, on_gpu):
    """A GPU does that by atomic additions, in an order that changes: no run would repeat."""
    for text in (update_text(parts, "cudnn"), update_text(parts, "xla"), *sampler_texts(parts)):
        assert adds_by_index(text) == 0
    plain = jax.jit(lambda x, i: jnp.zeros(3).at[i].add(x))
    assert adds_by_index(lowered(plain, np.ones(4, np.float32), np.zeros(4, np.int32))) == 1


def test_the_logits_of_all_tokens_never_exist(parts, on_gpu):
    tokens = make_batch().rows.size
    for chunk, largest in ((CHUNK, WIDTH), (10**4, tokens)):
        backend.GPU = backend.GPU._replace(head_chunk_floats=chunk * VOCAB)
        shapes = [s for s, _ in arrays(update_text(parts, "cudnn")) if VOCAB in s]
        assert max(prod(s) // VOCAB for s in shapes) == largest


@pytest.mark.parametrize(("attention", "there"), [("cudnn", False), ("xla", True)])
def test_flash_attention_keeps_no_scores(parts, on_gpu, attention, there):
    r, u = make_batch().rows.shape
    n_scores = r * HEADS * u * u
    text = update_text(parts, attention)
    big = [s for s, _ in arrays(text) if prod(s) >= n_scores and u in s and s[-1] > u]
    assert bool(big) == there
    assert ("__cudnn$fmha" in text) == (not there)
