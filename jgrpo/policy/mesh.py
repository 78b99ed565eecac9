"""One program on many devices: what lies where, and how what each has summed comes together.

All devices form a mesh of two axes; one device is a mesh of one. Each goes through micro-batches of
its own, and what they sum up to is added once an update. Along `fsdp` the layers' kernels are cut:
a layer's are gathered where it reads them, forward and backward, and let go (ZeRO-3: Rajbhandari et
al. 2020). The base is frozen, so that nothing of it is ever reduced. All else is on every device.

What each device has of its own is one array for all: [16, N, U] on each of D is [16 D, N, U]. A
program sees its device's part (`jax.shard_map`), and so does not know how many there are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jgrpo.errors import InputError

Tree = Any
T = TypeVar("T")
AXES = ("data", "fsdp")
Where = Literal["each", "all", "base"]
"""A part of it on each device, the same on all, or as the base lies."""
SPECS = {"each": PartitionSpec(AXES), "all": PartitionSpec()}
KERNEL = PartitionSpec(None, "fsdp")
"""Of a kernel [L, in, out]: a layer's parts lie one after another when they are gathered."""


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Of all devices, or of these: `fsdp` neighbours share one copy of the base's layers.
    InputError if that does not divide them."""
    n = jax.device_count() if devices is None else len(devices)
    if n % fsdp:
        fit = ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
        raise InputError(
            f"fsdp={fsdp}: JAX has {n} devices here, which cannot be put into groups of {fsdp}; "
            f"give one of {fit}"
        )
    shape, kinds = (n // fsdp, fsdp), (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)


class Cut(nnx.Param):
    """A layer's kernel of which each device has a part; whoever reads it has it whole."""

    def get_value(self, **index: Any) -> jax.Array:
        return jax.lax.all_gather(super().get_value(**index), "fsdp", axis=0, tiled=True)


def _is_cut(mesh: Mesh, path: tuple) -> bool:
    return mesh.shape["fsdp"] > 1 and path[:2] == ("model", "layers") and path[-1] == "kernel"


def gathered_when_read(mesh: Mesh, base: nnx.State) -> nnx.State:
    """A device's part of the base as the model takes it, in a program."""
    flat = nnx.to_flat_state(base)
    return nnx.from_flat_state(
        (path, Cut(leaf.get_raw_value()) if _is_cut(mesh, path) else leaf) for path, leaf in flat
    )


def lies(mesh: Mesh, path: tuple, shape: Sequence[int]) -> NamedSharding:
    """Where a parameter of the base lies. InputError if it is a kernel that cannot be cut."""
    if not _is_cut(mesh, path):
        return NamedSharding(mesh, SPECS["all"])
    if shape[1] % (n := mesh.shape["fsdp"]):
        raise InputError(
            f"fsdp={n}: {'.'.join(map(str, path[2:]))} of this model has {shape[1]} rows, which "
            f"cannot be cut into {n} equal parts; give an fsdp that divides {shape[1]}"
        )
    return NamedSharding(mesh, KERNEL)


def _shardings(mesh: Mesh, tree: Tree, where: Where | Tree) -> Tree:
    """Of arrays, or a prefix of them; `where` may be a prefix of them too."""
    if where != "base":
        return jax.tree.map(lambda w: NamedSharding(mesh, SPECS[w]), where)
    return nnx.from_flat_state(
        (path, leaf.replace(lies(mesh, path, leaf.shape))) for path, leaf in nnx.to_flat_state(tree)
    )


def placed(mesh: Mesh, tree: Tree, where: Where) -> Tree:
    """Arrays where they belong; those that are there stay."""
    return jax.device_put(tree, _shardings(mesh, tree, where))


def here(tree: Tree) -> Tree:
    """What is on every device, on the first one of this process."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def fetched(tree: Tree) -> Tree:
    """On the host, what the devices of all processes hold; all must ask for it."""

    def whole(x: jax.Array) -> Any:
        return x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def handed_out(mesh: Mesh, stack: Tree) -> Tree:
    """Arrays of the host, the same in all processes, as a program takes "each"."""
    if mesh.local_mesh == mesh:  # JAX does so by itself
        return stack
    where = NamedSharding(mesh, SPECS["each"])
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, where, x.__getitem__), stack
    )


def on_each(
    mesh: Mesh,
    function: Callable[..., Any],
    given: Sequence[Where | Tree],
    gives: Where | Tree,
    donated: Sequence[int] = (),
    static: Sequence[str] = (),
) -> Any:
    """`function` compiled as one program for all devices; where its arguments and results lie, each
    or each part of them. It may be given `static` values by name."""
    out = jax.tree.map(SPECS.__getitem__, gives)

    def program(*arrays, **values):
        there = [_shardings(mesh, x, where) for x, where in zip(arrays, given, strict=True)]
        specs = tuple(jax.tree.map(lambda sharding: sharding.spec, there))
        # Unchecked: JAX would add up every micro-batch's gradient over the devices.
        of_one = partial(function, **values)
        run = jax.shard_map(of_one, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return run(*arrays)

    return jax.jit(program, donate_argnums=tuple(donated), static_argnames=tuple(static))


def added_up(mesh: Mesh, sums: Tree, largest: Tree) -> tuple[Tree, Tree]:
    """In a program: sums over all devices, and the largest of `largest`; one all-reduce of it all,
    in which each device's `largest` has a place of its own."""
    mine = jax.lax.axis_index(AXES)
    places = jax.tree.map(lambda x: jnp.zeros((mesh.size, *x.shape)).at[mine].set(x), largest)
    flat, whole = ravel_pytree((sums, places))
    sums, places = whole(jax.lax.psum(flat, _several(mesh)))
    return sums, jax.tree.map(lambda x: x.max(axis=0), places)


def largest(mesh: Mesh, x: jax.Array) -> jax.Array:
    """In a program: the largest of what each device has."""
    return jax.lax.pmax(x, _several(mesh))


def _several(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in AXES if mesh.shape[axis] > 1)


def dealt(items: Sequence[T], empty: Callable[[T], T], n_devices: int, at_once: int):
    """Trees of one shape (micro-batches) dealt out to the devices in turn -> stacks of `at_once`
    for each, [n_devices x at_once, ...], and how many of each device's count. All devices have as
    many; what an `empty` one fills up adds nothing to any sum."""
    rounds = -(-len(items) // n_devices)
    filled_up = [*items]
    while len(filled_up) < rounds * n_devices:
        filled_up.append(empty(items[-1]))
    hands = [filled_up[d::n_devices] for d in range(n_devices)]
    stacks = []
    for start in range(0, rounds, at_once):
        parts = [hand[start : start + at_once] for hand in hands]
        n = len(parts[0])
        filled = [x for part in parts for x in [*part, *part[-1:] * (at_once - n)]]
        stacks.append((jax.tree.map(lambda *x: np.stack(x), *filled), n))
    return stacks


def collected(stacks: Sequence[tuple[jax.Array, int]], n_devices: int, n_items: int) -> list[Any]:
    """What came of `dealt` items, in their order."""
    found: list[Any] = []
    for stack, n in stacks:
        hands = fetched(stack).reshape(n_devices, -1, *stack.shape[1:])
        found += [hand[i] for i in range(n) for hand in hands]
    return found[:n_items]
