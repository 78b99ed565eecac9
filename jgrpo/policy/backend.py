"""What suits one kind of device and not another: here alone, each with why."""

from typing import Literal, NamedTuple

import jax


class Backend(NamedTuple):
    """What one kind of device has otherwise than another."""

    head_chunk_floats: int
    """Logits in memory at once, float32 [chunk, V]; a chunk's gradient needs a few such."""
    tape_outlives_programs: bool
    """Is what layers keep for the backward pass (the tape) the caller's memory, or a program's?"""
    lora_gradient_alone: Literal["all", "square"]
    """Of which LoRA products the gradient's inputs are written before it, not made in its pass."""
    lora_columns_summed: int
    """Of so many columns or fewer x A B is summed up with x W where nothing is differentiated, and
    no product of its own."""
    flash_attention: bool
    """Is there cuDNN?"""
    cache_by_products: bool
    """Is a cache of one row's keys and values read by matrix products, or by plain sums?"""
    members_decoded_at_once: bool
    """Are the completions of all members one batch, or several as large as a lone run's?"""


CPU = Backend(
    head_chunk_floats=2**24,  # 64 MiB: more leaves the caches
    tape_outlives_programs=True,  # XLA gives a program's memory back, and maps it anew each time
    lora_gradient_alone="all",  # else XLA merges them, transposed, and reads by columns
    lora_columns_summed=0,
    flash_attention=False,
    cache_by_products=True,
    members_decoded_at_once=False,  # the keys and values of more leave the caches: a quarter slower
)
GPU = Backend(
    head_chunk_floats=2**27,  # 512 MiB: each chunk reads the head, and the host waits for it
    tape_outlives_programs=False,  # the memory pool is the process's, and the sampler's in between
    lora_gradient_alone="square",  # these too by columns: all layers' queries, transposed for it
    lora_columns_summed=8,  # a product is written and read again: 6 % of a decoded token
    flash_attention=True,
    cache_by_products=False,  # for these a layer's slice is copied first, and read more than once
    members_decoded_at_once=True,  # a token of all reads the weights once
)


def backend() -> Backend:
    """Of the device that programs are compiled for."""
    return CPU if jax.default_backend() == "cpu" else GPU
