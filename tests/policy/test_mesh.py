"""Devices: what each does, and that many give what one gives. On virtual devices, in a process of
their own (tests/on_devices.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SHAPE

from jgrpo.errors import InputError
from jgrpo.policy.mesh import collected, dealt, lies, make_mesh

TESTS = Path(__file__).parent.parent
LAYERS, WIDTH, FF, HEADS, KV_HEADS, C = 2, 32, 48, 4, 2, 16
"""Of the base; its embedding and its head are never cut."""
assert (SHAPE["hidden_size"], SHAPE["intermediate_size"]) == (WIDTH, FF)
QUERIES, KEYS = HEADS * C, KV_HEADS * C
KERNELS = [WIDTH * QUERIES, *2 * [WIDTH * KEYS], QUERIES * WIDTH, *3 * [WIDTH * FF]]
"""Of a layer: q, k, v, o, gate, up, down."""
N_FIGURES = 8
"""Sums that are logged beside the gradient: loss, entropy, tokens, gap, KL to the sampler, and the
loss's own: KL to the old policy and to the base, clipped tokens."""


def test_micro_batches_are_dealt_in_turn_and_come_back_in_order():
    items = [np.full((1, 2), i) for i in range(7)]
    stacks = dealt(items, lambda last: last * 0 - 1, n_devices=3, at_once=2)
    # Three rounds, of which two fill a stack; the second one's last places do not count.
    first, second = (stack[:, 0, 0].tolist() for stack, _ in stacks)
    assert [n for _, n in stacks] == [2, 1]
    assert first == [0, 3, 1, 4, 2, 5]
    assert second == [6, 6, -1, -1, -1, -1]
    computed = [(jax.numpy.asarray(stack), n) for stack, n in stacks]
    assert [int(x[0, 0]) for x in collected(computed, 3, 7)] == [*range(7)]
    assert dealt([], None, 3, 2) == []


def test_on_one_device_they_stay_as_they_are():
    items = [np.full(1, i) for i in range(3)]
    [(stack, n)] = dealt(items, None, n_devices=1, at_once=4)
    assert (stack[:, 0].tolist(), n) == ([0, 1, 2, 2], 3)


def test_devices_that_cannot_be_grouped_are_bad_input():
    with pytest.raises(InputError, match=r"fsdp=3: JAX has 8 devices.* give one of 1, 2, 4, 8"):
        make_mesh(3, jax.devices() * 8)


def test_a_kernel_that_cannot_be_cut_is_bad_input():
    mesh = jax.sharding.AbstractMesh((1, 5), ("data", "fsdp"))
    path = ("model", "layers", "mlp", "up_proj", "kernel")
    with pytest.raises(InputError, match=r"fsdp=5: mlp.up_proj.kernel .* 32 rows.* divides 32"):
        lies(mesh, path, (2, 32, 48))
    embedding = ("model", "embed_tokens", "embedding")
    assert lies(mesh, embedding, (67, 32)).is_fully_replicated


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory) -> Path:
    """The folder that tests/on_devices.py filled."""
    base, out = checkpoint("qwen3-tied", num_hidden_layers=LAYERS), tmp_path_factory.mktemp("out")
    command = [sys.executable, str(TESTS / "on_devices.py"), str(base), str(out)]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(TESTS.parent)}
    subprocess.run(command, check=True, env=env, timeout=600)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=4 x fsdp=2"])
def test_many_devices_learn_what_one_learns(trained, mesh):
    """Eight updates, with an entropy bonus, a clip and a KL to the base; 11 micro-batches each."""
    compare(trained, mesh, "four updates")


@pytest.mark.slow
def test_so_do_several_members_side_by_side(trained):
    compare(trained, "data=4 x fsdp=2", "three members")


def compare(trained: Path, mesh: str, run: str) -> None:
    one, many = (np.load(trained / f"{name}.{run}.npz") for name in ("one", mesh))
    assert {*one} == {*many}
    for key in one:
        np.testing.assert_allclose(many[key], one[key], atol=1e-5, rtol=0, err_msg=key)
    for start in (key for key in one if key.endswith("start")):
        assert np.abs(many[start.removesuffix(".start")] - many[start]).max() > 1e-3, start


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=4 x fsdp=2"])
def test_many_devices_sample_what_one_samples(trained, mesh):
    """Of three members, 240 completions to the token, also where rows that have ended left: one
    device has 256 rows, each of eight 32, of which half go on in the end."""
    one, many = (
        json.loads((trained / f"{name}.sampled.json").read_text()) for name in ("one", mesh)
    )
    assert many["completions"] == one["completions"]
    assert len({reason for _, reason in one["completions"]}) == 2
    for a, b in zip(many["logprobs"], one["logprobs"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert one["packings"][0] == 128
    assert many["packings"] == [128]  # 16 rows each, the fewest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "n_devices", "cut"),
    [("one", 1, False), ("data=8", 8, False), ("fsdp=8", 8, True), ("data=4 x fsdp=2", 8, True)],
)
def test_devices_send_each_other_the_sums_and_kernels_and_nothing_else(
    trained, mesh, n_devices, cut
):
    sent = json.loads((trained / "sent.json").read_text())[mesh]
    # A and B of rank 2 on q_proj and down_proj, the figures, and a place for each device's gap.
    gradient = LAYERS * 2 * (WIDTH + QUERIES + FF + WIDTH)
    sums = 4 * (gradient + N_FIGURES + n_devices)
    assert sent["update"] == ([["all-reduce", sums]] if n_devices > 1 else [])
    # In the loop over layers, forward and backward.
    gathers = [["all-gather", 4 * n] for n in sorted(2 * KERNELS)] if cut else []
    assert sent["micro-batch"] == gathers
