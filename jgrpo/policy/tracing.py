"""Which program JAX is about to compile, told to whoever listens (run/compiling.py)."""

from jax import monitoring

PROGRAM = "/jgrpo/program"


def traced(name: str, shape: str) -> None:
    """To be called in a function under jit: what stands there runs once for each program."""
    monitoring.record_event(PROGRAM, name=name, shape=shape)
