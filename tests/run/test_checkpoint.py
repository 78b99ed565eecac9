"""jgrpo.run.checkpoint: what is saved comes back to the bit, and what does not fit is refused."""

import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jgrpo.errors import InputError, no_more_interrupts
from jgrpo.run.checkpoint import Checkpoints
from jgrpo.update.step import adam


def state(seed: int = 0, rank: int = 2):
    """An adapter and Adam's state after one update: awkward floats, an int count, nested names."""
    adapter = {
        "layers": {"q_proj": {"lora_A": jnp.ones((3, 8, rank)), "lora_B": jnp.ones((3, rank, 4))}}
    }
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x * jax.random.normal(k, x.shape) / 3e-30 for x, k in zip(leaves, keys, strict=True)]
    adapter = jax.tree.unflatten(tree, leaves)
    optimizer = adam(1e-3)
    _, opt_state = optimizer.update(adapter, optimizer.init(adapter), adapter)
    return adapter, opt_state


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path)
    yield opened
    opened.close()


def test_adapter_and_optimizer_state_come_back_to_the_bit(checkpoints, tmp_path):
    saved = state()
    checkpoints.save(3, jax.device_get(saved))
    again = Checkpoints(tmp_path)  # as a resumed process would
    restored = again.restore(again.steps()[-1], state(seed=1))
    again.close()
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))
    counts = [x for x in jax.tree.leaves(restored) if x.dtype == jnp.int32]
    assert [int(x) for x in counts] == [1]  # Adam's count, without which the bias returns


def test_a_program_that_ran_on_a_fresh_state_is_not_compiled_again_for_a_restored_one(checkpoints):
    program = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))
    program(state())
    checkpoints.save(1, state())
    program(checkpoints.restore(1, state()))
    assert program._cache_size() == 1


def test_the_last_two_are_kept_and_the_last_is_found(checkpoints, tmp_path):
    for step in (2, 4, 6):
        checkpoints.save(step, state(step))
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["000004", "000006"]
    assert checkpoints.steps()[-1] == 6
    adapter, _ = checkpoints.restore(4, state())
    assert np.array_equal(*(s["layers"]["q_proj"]["lora_A"] for s in (adapter, state(4)[0])))


def test_a_step_is_written_once(checkpoints):
    checkpoints.save(2, state(0))
    checkpoints.save(2, state(1))
    adapter, _ = checkpoints.restore(2, state())
    assert np.array_equal(*(s["layers"]["q_proj"]["lora_A"] for s in (adapter, state(0)[0])))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_the_checkpoint_is_whole(checkpoints, monkeypatch, number):
    """Orbax's threads would go on writing into what the next try removes."""
    real = ocp.CheckpointManager.save

    def save(*args, **kwargs):
        signal.raise_signal(number)
        real(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, state())
        assert checkpoints.steps()[-1] == 2
        with no_more_interrupts():
            checkpoints.save(3, state())  # and once the run is ending, nothing comes
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert checkpoints.steps()[-1] == 3


def test_a_checkpoint_of_another_shape_is_refused(checkpoints):
    checkpoints.save(2, state(rank=2))
    with pytest.raises(InputError, match=r"checkpoint 2 .* does not fit.*lora_[AB]"):
        checkpoints.restore(2, state(rank=4))


def test_a_checkpoint_with_other_names_is_refused(checkpoints):
    checkpoints.save(2, state())
    adapter, opt_state = state()
    with pytest.raises(InputError, match=r"does not fit.*[kq]_proj"):
        checkpoints.restore(2, ({"layers": {"k_proj": adapter["layers"]["q_proj"]}}, opt_state))


def test_a_folder_without_a_checkpoint_has_no_step(checkpoints):
    assert checkpoints.steps() == []


def names(run_dir):
    return sorted(f.name for f in (run_dir / "checkpoints").iterdir())


def test_every_nth_is_kept_beside_the_last_ones(tmp_path):
    opened = Checkpoints(tmp_path, keep=1, keep_period=4)
    for step in range(0, 12, 2):
        opened.save(step, state(step))
    opened.close()
    assert names(tmp_path) == ["000000", "000004", "000008", "000010"]
    again = Checkpoints(tmp_path, keep=1)  # a resume may ask for fewer
    again.tidy(10)
    assert names(tmp_path) == ["000010"]
    again.close()


def test_what_a_kill_left_is_removed(checkpoints, tmp_path):
    for step in (4, 6):
        checkpoints.save(step, state(step))
    folder = tmp_path / "checkpoints"
    (folder / "000002" / "default").mkdir(parents=True)  # half removed, after 6 was there
    (folder / "000008.orbax-checkpoint-tmp" / "default").mkdir(parents=True)  # half written
    again = Checkpoints(tmp_path)
    assert len(names(tmp_path)) == 4  # it may be a reader, beside a run that is at work
    again.tidy(6)
    assert names(tmp_path) == ["000004", "000006"]
    assert again.steps() == [4, 6]
    again.tidy(4)  # step 6 comes again
    assert names(tmp_path) == ["000004"]
    assert again.steps() == [4]
    again.close()


def test_a_damaged_checkpoint_is_refused(checkpoints, tmp_path):
    checkpoints.save(2, state())
    for file in (tmp_path / "checkpoints" / "000002" / "default").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    again = Checkpoints(tmp_path)
    with pytest.raises(InputError, match=r"checkpoint 2 .* does not fit"):
        again.restore(2, state())
    again.close()


RESTORE = """
import asyncio, sys, time
from pathlib import Path
from jgrpo.run.checkpoint import Checkpoints
from jgrpo.errors import exit_status

class Lingering(asyncio.SelectorEventLoop):
    def close(self):
        time.sleep(0.2)
        self.call_soon(self.stop)
        self.run_forever()  # once round: tasks end, and what awaits them does not hear of it
        super().close()

if sys.argv[2] == "lingers":
    asyncio.new_event_loop = Lingering
checkpoints = Checkpoints(Path(sys.argv[1]))
with exit_status():
    try:
        checkpoints.restore(2, {})
    finally:
        time.sleep(0.5)
"""


@pytest.mark.parametrize("loop", ["closes", "lingers"])
def test_a_damaged_checkpoint_is_told_once_and_shortly(checkpoints, tmp_path, loop):
    """TensorStore's threads add a traceback each where they come after their event loop, Orbax's
    tasks where they come before its end (on a busy machine); the error itself has a page of
    specification."""
    adapter = state()[0]
    many = {str(i): x for i in range(30) for x in jax.tree.leaves(adapter)}
    checkpoints.save(2, many)
    (tmp_path / "checkpoints" / "000002" / "default" / "manifest.ocdbt").unlink()
    done = subprocess.run(
        [sys.executable, "-c", RESTORE, str(tmp_path), loop], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: checkpoint 2 in ")
    assert "remove its folder" in done.stderr
    assert len(done.stderr) < 800
