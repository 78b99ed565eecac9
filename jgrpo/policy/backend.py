"""What suits one kind of device and not another: here alone, each with why."""

from typing import NamedTuple

import jax


class Backend(NamedTuple):
    head_chunk_floats: int
    """Logits in memory at once, float32 [chunk, V]; a chunk's gradient needs a few such."""
    tape_outlives_programs: bool
    """Is what layers keep for the backward pass (the tape) the caller's memory, or a program's?"""
    lora_gradient_alone: bool
    """Are the inputs of a LoRA product's gradient written before it, or made in the same pass?"""
    flash_attention: bool
    """Is there cuDNN?"""
    cache_by_products: bool
    """Is a cache of one row's keys and values read by matrix products, or by plain sums?"""


CPU = Backend(
    head_chunk_floats=2**24,  # 64 MiB: more leaves the caches
    tape_outlives_programs=True,  # XLA gives a program's memory back, and maps it anew each time
    lora_gradient_alone=True,  # else XLA merges them, transposed, and reads by columns
    flash_attention=False,
    cache_by_products=True,
)
GPU = Backend(
    head_chunk_floats=2**27,  # 512 MiB: each chunk reads the head, and the host waits for it
    tape_outlives_programs=False,  # the memory pool is the process's, and the sampler's in between
    lora_gradient_alone=False,  # activations are read fewer times
    flash_attention=True,
    cache_by_products=False,  # for these a layer's slice is copied first, and read more than once
)


def backend() -> Backend:
    """Of the device that programs are compiled for."""
    return CPU if jax.default_backend() == "cpu" else GPU
