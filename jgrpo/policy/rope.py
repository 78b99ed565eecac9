"""Rotary position embedding (Su et al. 2021, RoFormer), plain, as in Llama 3, and by YaRN.

Axes as in `model`: N rows, T tokens, H heads, C head width; C/2 pairs (c, c + C/2) are turned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jgrpo.errors import InputError

ROPE_TYPES = ("default", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """How fast each pair turns, read from a transformers config's rope_parameters."""

    head_width: int
    theta: float
    llama3: tuple[float, float, float, float] | None = None
    """factor, low_freq_factor, high_freq_factor, original_max_position_embeddings"""
    yarn: tuple[float, float, float, float] | None = None
    """factor, the pairs of C from which and up to which it sets in, what cos and sin grow by"""

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any], head_width: int) -> "Rope":
        """`rope` has a rope_type of ROPE_TYPES and a rope_theta. InputError if more is missing."""
        llama3 = None
        if rope["rope_type"] == "llama3":
            length = rope["original_max_position_embeddings"]
            llama3 = (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], length)
        yarn = _yarn(rope, head_width) if rope["rope_type"] == "yarn" else None
        return cls(head_width, float(rope["rope_theta"]), llama3, yarn)

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """positions [N, T] -> cos and sin, float32 [N, T, 1, C/2]."""
        half = jnp.arange(0, self.head_width, 2, dtype=jnp.float32) / self.head_width
        frequency = self.theta**-half
        if self.llama3 is not None:
            factor, low, high, length = self.llama3
            turns = length * frequency / (2 * math.pi)
            smooth = jnp.clip((turns - low) / (high - low), 0, 1)  # 0: slow, stretched; 1: kept
            frequency = frequency * (smooth + (1 - smooth) / factor)
        grown = 1.0
        if self.yarn is not None:
            factor, first, last, grown = self.yarn
            stretched = jnp.clip((jnp.arange(len(half)) - first) / (last - first), 0, 1)
            frequency = frequency * (1 - stretched + stretched / factor)
        angles = positions[..., None, None] * frequency
        return jnp.cos(angles) * grown, jnp.sin(angles) * grown


def _yarn(rope: Mapping[str, Any], head_width: int) -> tuple[float, float, float, float]:
    """What config.json says of YaRN (Peng et al. 2023, sections 3.2 and 3.4) as `Rope.yarn`."""
    names = ("factor", "original_max_position_embeddings")
    if missing := [name for name in names if not rope.get(name)]:
        raise InputError(f"rope_type='yarn' without {' and '.join(missing)}")
    factor, length = (rope[name] for name in names)
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1

    def pair(turns: float) -> float:
        """The pair of C that turns so often over the original length."""
        return head_width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    theta = rope["rope_theta"]
    first, last = pair(fast), pair(slow)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_width - 1)
    last += 0.001 * (first == last)
    grown = rope.get("attention_factor")
    if grown is None:
        scales = rope.get("mscale"), rope.get("mscale_all_dim")
        growth = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
        grown = growth(scales[0]) / growth(scales[1]) if all(scales) else growth(1)
    return factor, first, last, grown


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (c, c + C/2) of x [N, T, H, C], in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
