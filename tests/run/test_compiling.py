"""What JAX compiles is told by name and shape, its seconds are counted once, and a phase knows its
own."""

import io
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jgrpo.policy.tracing import traced
from jgrpo.run import compiling
from jgrpo.run.compiling import Compilations, plain
from jgrpo.run.runlog import RunLog


@pytest.fixture
def slow(monkeypatch):
    """Every program counts as slow."""
    monkeypatch.setattr(compiling, "SLOW_S", 0.0)
    monkeypatch.setattr(compiling, "NAMELESS_S", 0.0)
    monkeypatch.setattr(compiling, "SHORT_S", 0.0)


@pytest.fixture
def told(slow):
    lines: list[str] = []
    listener = Compilations(lines.append)
    yield listener, lines
    listener.close()


def program(name: str = "double"):
    """A program that sleeps for 0.2 s while it is traced, and calls another one there."""
    inner = jax.jit(lambda x: jnp.sin(x) + 1)

    def double(x):
        traced(name, f"{x.shape[0]} rows")
        time.sleep(0.2)
        return 2 * inner(x)

    return jax.jit(double)


def test_a_program_is_told_of_once_a_shape_by_name_and_seconds(told):
    _, lines = told
    double = program()
    for n in (3, 3, 5):
        double(jnp.zeros(n)).block_until_ready()
    named = [line for line in lines if line.startswith("compiled double")]
    assert [line.split(":")[0] for line in named] == [
        "compiled double (3 rows)", "compiled double (5 rows)",
    ]  # fmt: skip
    assert all(float(line.split(": ")[1].removesuffix(" s")) >= 0.2 for line in named)


def test_seconds_are_those_of_tracing_too_and_count_a_program_within_another_once(told):
    listener, _ = told
    x = jnp.zeros(4)
    double = program()
    before_s, start_s = listener.seconds, time.perf_counter()
    double(x).block_until_ready()
    elapsed_s = time.perf_counter() - start_s
    assert 0.2 <= listener.seconds - before_s <= elapsed_s
    before_s = listener.seconds
    double(x).block_until_ready()
    assert listener.seconds == before_s


def test_the_program_at_work_is_named_while_it_is_and_no_longer(told):
    listener, _ = told
    seen = []

    def work(x):
        seen.append(listener.now)
        traced("work", "2 rows")
        seen.append(listener.now)
        return x

    jax.jit(work)(jnp.zeros(2))
    assert seen == ["work", "work (2 rows)"]
    assert listener.now == ""


def test_a_program_that_cannot_be_traced_leaves_the_next_one_its_own_name(told):
    listener, lines = told

    def broken(x):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        jax.jit(broken)(jnp.zeros(2))
    assert listener.now == ""
    lines.clear()
    jax.jit(lambda x: x + 41)(jnp.zeros(2))
    assert [line.split(":")[0] for line in lines] == ["compiled lambda"]


def test_what_is_quick_is_not_told_of():
    lines: list[str] = []
    listener = Compilations(lines.append)
    jax.jit(lambda x: x + 43)(jnp.zeros(2))
    listener.close()
    assert lines == []
    assert listener.seconds > 0


def test_a_closed_listener_hears_nothing(slow):
    lines: list[str] = []
    listener = Compilations(lines.append)
    listener.close()
    jax.jit(lambda x: x + 47)(jnp.zeros(2))
    assert (listener.seconds, lines) == (0.0, [])


def test_a_phase_knows_what_of_it_was_compilation(tmp_path, slow):
    console = Console(file=io.StringIO(), width=80)
    with RunLog(tmp_path, 1, console=console) as log:
        with log.screen.phase("training"):
            program("update")(jnp.zeros(6)).block_until_ready()
        with log.screen.phase("evaluation"):  # a line of its own in metrics.jsonl
            program("decode")(jnp.zeros(7)).block_until_ready()
        taken = log.screen.take_seconds()
    assert 0.2 <= taken["time/compile"] <= taken["time/training"]
    assert "compiled update (6 rows): " in console.file.getvalue()
    assert log.screen.summary().startswith("1 steps")


def test_plain_names():
    assert plain("jit(_decode)") == "decode"
