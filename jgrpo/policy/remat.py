"""What a layer keeps for its backward pass: what matmuls gave, and attention's weights. Norms,
rotations, gates and copies are computed again, which costs less than to write and read them."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


def keep(x: jax.Array) -> jax.Array:
    """x, marked."""
    return checkpoint_name(x, "kept")


_is_marked = jax.checkpoint_policies.save_only_these_names("kept")


def is_kept(primitive, *args: Any, **params: Any) -> bool:
    """The policy for `jax.checkpoint`: what is marked, and what flash attention gives."""
    flash = primitive.name.startswith("dot_product_attention")
    return flash or _is_marked(primitive, *args, **params)
