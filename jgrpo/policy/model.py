"""The decoder: Qwen3, and by the same few flags Qwen2 and Llama.

Axes: N rows, T tokens, D model width, F feed-forward width, H query heads, K key/value heads,
C head width, V vocabulary, L layers, R rank. Attributes are named as in the Hugging Face
checkpoint; layers are stacked along a leading L axis and scanned, so that 28 compile like 2.
What attention sees is the caller's business (`Attend`): the trainer masks, the sampler caches.
Left out on purpose: dropout, sliding windows, mixture of experts, rope types but three.

    logits = model(ids)        # int32 [N, T] -> float32 [N, T, V]
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jgrpo.errors import InputError
from jgrpo.policy.attention import Attend, full_attention
from jgrpo.policy.lora import LoRADense, split
from jgrpo.policy.remat import is_kept, keep
from jgrpo.policy.rope import ROPE_TYPES, Rope, rotate
from jgrpo.policy.tape import Tape, taped_scan


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, read from a transformers config by `from_hf`."""

    n_layers: int
    width: int
    ff_width: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    vocab_size: int
    rms_eps: float
    rope: Rope
    qkv_bias: bool
    qk_norm: bool
    tied_head: bool

    @classmethod
    def from_hf(cls, hf: Any) -> "ModelConfig":
        """Read a transformers config. InputError names all that this decoder cannot do."""
        kinds = {"qwen3": (False, True), "qwen2": (True, False), "llama": (False, False)}
        if hf.model_type not in kinds:
            raise InputError(
                f"model_type={hf.model_type!r} is not supported; supported: {', '.join(kinds)}"
            )
        qkv_bias, qk_norm = kinds[hf.model_type]
        rope = hf.rope_parameters or {}
        if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
            raise InputError(
                f"{hf.model_type} with rope_parameters by layer type ({', '.join(nested)}) is not "
                "supported: every layer has the same"
            )
        if missing := [name for name in ("rope_type", "rope_theta") if rope.get(name) is None]:
            raise InputError(f"{hf.model_type}: rope_parameters has no {', '.join(missing)}")
        unsupported = {
            f"rope_type={rope['rope_type']!r} (supported: {', '.join(ROPE_TYPES)})": (
                rope["rope_type"] not in ROPE_TYPES
            ),
            f"hidden_act={hf.hidden_act!r} (supported: silu)": hf.hidden_act != "silu",
            "attention_bias=True": getattr(hf, "attention_bias", False),
            "mlp_bias=True": getattr(hf, "mlp_bias", False),
            "use_sliding_window=True": getattr(hf, "use_sliding_window", False),
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
        }
        if found := [name for name, present in unsupported.items() if present]:
            raise InputError(f"{hf.model_type} with " + " and ".join(found) + " is not supported")
        head_width = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        return cls(
            n_layers=hf.num_hidden_layers,
            width=hf.hidden_size,
            ff_width=hf.intermediate_size,
            n_heads=hf.num_attention_heads,
            n_kv_heads=hf.num_key_value_heads,
            head_width=head_width,
            vocab_size=hf.vocab_size,
            rms_eps=hf.rms_norm_eps,
            rope=Rope.from_hf(rope, head_width),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            tied_head=hf.tie_word_embeddings,
        )

    @property
    def n_params(self) -> int:
        """Parameters of the base (norms and biases included, adapter not)."""
        state = nnx.state(nnx.eval_shape(lambda: Decoder(self, rngs=nnx.Rngs(0))), nnx.Param)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


# -- layers -----------------------------------------------------------------------------------


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        per_row = jax.lax.rsqrt(jnp.mean(y * y, axis=-1) + self.eps)
        y = jnp.einsum("...d,...->...d", y, per_row)  # XLA's sum in the gradient of y * r is slow
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


@dataclass(frozen=True)
class Parts:
    """Makes the layers' parts: dtype, source of randomness, and where adapters go."""

    config: ModelConfig
    dtype: Any
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    rngs: nnx.Rngs

    def dense(self, name: str, fan_in: int, fan_out: int, use_bias: bool = False) -> LoRADense:
        rank = self.rank if name in self.target_modules else 0
        return LoRADense(
            fan_in,
            fan_out,
            rank=rank,
            alpha=self.alpha,
            use_bias=use_bias,
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def norm(self, width: int) -> RMSNorm:
        return RMSNorm(width, self.config.rms_eps, self.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions; what it sees is up to `attend`."""

    def __init__(self, parts: Parts):
        c = parts.config
        q_width, kv_width = c.n_heads * c.head_width, c.n_kv_heads * c.head_width
        self.q_proj = parts.dense("q_proj", c.width, q_width, c.qkv_bias)
        self.k_proj = parts.dense("k_proj", c.width, kv_width, c.qkv_bias)
        self.v_proj = parts.dense("v_proj", c.width, kv_width, c.qkv_bias)
        self.o_proj = parts.dense("o_proj", q_width, c.width)
        self.q_norm = parts.norm(c.head_width) if c.qk_norm else None
        self.k_norm = parts.norm(c.head_width) if c.qk_norm else None
        self.head_width = c.head_width

    def __call__(self, x, rope, attend: Attend, own, cache):
        q, k, v = (
            keep(project(x, own)).reshape(*x.shape[:2], -1, self.head_width)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, kept = attend(rotate(q, *rope), rotate(k, *rope), v, cache)
        return self.o_proj(out.reshape(*x.shape[:2], -1), own), kept


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, parts: Parts):
        c = parts.config
        self.gate_proj = parts.dense("gate_proj", c.width, c.ff_width)
        self.up_proj = parts.dense("up_proj", c.width, c.ff_width)
        self.down_proj = parts.dense("down_proj", c.ff_width, c.width)

    def __call__(self, x, own):
        gate, up = keep(self.gate_proj(x, own)), keep(self.up_proj(x, own))
        return self.down_proj(jax.nn.silu(gate) * up, own)


class DecoderLayer(nnx.Module):
    """One pre-norm block: attention, then MLP, each added to its input."""

    def __init__(self, parts: Parts):
        self.input_layernorm = parts.norm(parts.config.width)
        self.self_attn = Attention(parts)
        self.post_attention_layernorm = parts.norm(parts.config.width)
        self.mlp = MLP(parts)

    def __call__(self, x, rope, attend: Attend, own, cache):
        out, kept = self.self_attn(self.input_layernorm(x), rope, attend, own, cache)
        x = keep(x + out)
        return x + self.mlp(self.post_attention_layernorm(x), own), kept


class Embedding(nnx.Module):
    def __init__(self, parts: Parts):
        shape = (parts.config.vocab_size, parts.config.width)
        normal = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(normal(parts.rngs.params(), shape, parts.dtype))


class Body(nnx.Module):
    """Embedding, L layers, final norm; the `model.` of the checkpoint's names."""

    def __init__(self, parts: Parts):
        config = parts.config
        self.embed_tokens = Embedding(parts)
        one_per_layer = nnx.split_rngs(splits=config.n_layers)(
            nnx.vmap(lambda rngs: DecoderLayer(replace(parts, rngs=rngs)))
        )
        self.layers = one_per_layer(parts.rngs)
        self.norm = parts.norm(config.width)
        self.config = config

    def __call__(
        self,
        ids,
        positions,
        attend: Attend,
        cache=None,
        *,
        own: jax.Array | None = None,
        checkpoint: bool = False,
        tape: Tape | None = None,
    ):
        """ids, positions [N, T] -> final hidden states [N, T, D] and what `attend` kept [L, ...].
        `own` [N, T, R], where several adapters stand side by side: `lora.own_columns`.

        A layer keeps what is marked for its backward pass, with `checkpoint` its input alone. With
        a `tape` (`taped_scan`) it does so there, `attend` keeps nothing, and the tape is returned.
        """
        shared = self.config.rope.angles(positions), attend, own
        graph, adapter, base = split(self.layers)

        layer = _layer(graph, checkpoint)

        def step(x, sliced):
            adapter, base, cache = sliced
            return layer(x, adapter, base, shared, cache)

        x = self.embed_tokens.embedding[...][ids]
        if tape is None:
            x, kept = jax.lax.scan(step, x, (adapter, base, cache))
        else:
            x, kept = taped_scan(lambda *given: layer(*given)[0], x, adapter, base, shared, tape)
        return self.norm(x), kept


@cache
def _layer(graph: nnx.GraphDef, checkpoint: bool):
    """A layer of its states and its input; the same function each time, which JAX traces once for
    the same shapes."""

    @partial(jax.checkpoint, prevent_cse=False, policy=None if checkpoint else is_kept)
    def layer(x, adapter, base, shared, cache=None):
        return nnx.merge(graph, adapter, base)(x, *shared, cache)

    return layer


class Decoder(nnx.Module):
    """A causal language model; `rank` > 0 puts an adapter on each of `target_modules`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        rank: int = 0,
        alpha: float = 32,
        target_modules: tuple[str, ...] = (),
    ):
        parts = Parts(config, dtype, rank, alpha, target_modules, rngs)
        self.rank, self.alpha, self.target_modules = rank, alpha, target_modules
        self.base_model = ""  # where the weights come from, for who saves the adapter
        self.model = Body(parts)
        tied, sizes = config.tied_head, (config.width, config.vocab_size)
        self.lm_head = None if tied else parts.dense("lm_head", *sizes)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def head(self) -> jax.Array:
        """The kernel from hidden states to logits [D, V]."""
        if self.lm_head is None:
            return self.model.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final hidden states [..., D] -> float32 logits [..., V]."""
        return jnp.matmul(hidden, self.head, preferred_element_type=jnp.float32)

    def __call__(self, ids: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """ids int32 [N, T] -> float32 logits [N, T, V]; segments as in `causal_mask`."""
        segments = jnp.ones_like(ids) if segments is None else segments
        hidden, _ = self.model(ids, positions_in(segments), full_attention(segments))
        return self.logits(hidden)


def positions_in(segments: jax.Array) -> jax.Array:
    """segments [N, T] -> each token's position in its own segment [N, T]."""
    index = jnp.arange(segments.shape[1])
    starts = jnp.diff(segments, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
