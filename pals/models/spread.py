# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""One model over several devices of a machine, each of which holds a part of every layer.

The devices are one mesh axis. Each parameter says on which of its axes it is split, and a
step runs on each device over its own parts, as Megatron-LM divides them
(https://arxiv.org/abs/1909.08053, section 3): a device has whole heads, with their pages of
the cache, and whole columns of the feed-forward blocks; hidden states are the same on all,
and are added up after attention and after the feed-forward block. Experts are divided by
number, and the vocabulary by rows. Norms, routers, and what cannot be divided, such as the
latents of latent attention, each device has whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pals.errors import CannotDivide, TooFewDevices

MODEL_AXIS = "model"
"""The only axis of a mesh."""

Tree = TypeVar("Tree")
Given = ParamSpec("Given")
Result = TypeVar("Result")

Split = Literal["experts", "outputs", "inputs"]
"""Which axis of a matrix, or of a stack of them, is divided among the devices."""


# --- outside of steps ----------------------------------------------------------------


def open_mesh(devices: int) -> Mesh | None:
    """Return the first devices of this machine as one axis; None for a single one.

    Raises:
        TooFewDevices: jax sees fewer.
    """
    found = jax.local_devices()
    if devices > len(found):
        raise TooFewDevices(devices=devices, found=len(found), kind=found[0].device_kind)
    if devices == 1:
        return None
    return jax.make_mesh(
        (devices,), (MODEL_AXIS,), axis_types=(AxisType.Explicit,), devices=found[:devices]
    )


def place(mesh: Mesh, split_axis: int | None, ndim: int) -> NamedSharding:
    """Return where an array lies that is split on an axis, or whole on each device."""
    if split_axis is None:
        return NamedSharding(mesh, PartitionSpec())
    before = (None,) * (split_axis % ndim)
    return NamedSharding(mesh, PartitionSpec(*before, MODEL_AXIS))


def device_shape(array: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Return the shape of what each device holds of an array."""
    if array.sharding is None:
        return array.shape
    return array.sharding.shard_shape(array.shape)


def device_bytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Return the bytes that each device holds of an array."""
    return math.prod(device_shape(array)) * array.dtype.itemsize


def places_of(arrays: Tree) -> Tree:
    """Return for each array of a tree, or shape of one, how it is split; most are whole."""
    places: Tree = jax.tree.map(_place_of, arrays)
    return places


def _place_of(array: jax.Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    return array.sharding.spec if isinstance(array.sharding, NamedSharding) else PartitionSpec()


def run_apart(
    function: Callable[Given, Result],
    mesh: Mesh | None,
    arguments: tuple[object, ...],
    results: object,
) -> Callable[Given, Result]:
    """Return what runs a function on each device, over its own parts of the arguments.

    Args:
        function: Sees arrays as a device has them, and returns such.
        mesh: The devices; None runs the function as it is.
        arguments: `places_of` each.
        results: `places_of` what comes back.
    """
    if mesh is None:
        return function
    # Devices also compute what is the same on all of them, which the check does not believe.
    return jax.shard_map(
        function, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False
    )


# --- within steps, on each device ----------------------------------------------------


def heads_of_device(heads: int, devices: int) -> int:
    """Return how many of a layer's key heads each device has.

    Where there are fewer heads than devices, as in multi-query attention, several devices
    have the same one.

    Raises:
        CannotDivide: They would not all have as many.
    """
    if heads % devices and devices % heads:
        raise CannotDivide(
            count=heads,
            what="key heads",
            devices=devices,
            advice=f"choose `--devices` so that it divides {heads}, or {heads} it",
        )
    return max(1, heads // devices)


def check_divides(count: int, what: str, devices: int) -> None:
    """Raise unless each device can have as many of something.

    Raises:
        CannotDivide: It cannot.
    """
    if count % devices:
        raise CannotDivide(
            count=count,
            what=what,
            devices=devices,
            advice=f"choose `--devices` so that it divides {count}",
        )


def add_up(part: jax.Array, devices: int) -> jax.Array:
    """Return the sum of what each device has of an array; it is the same on all."""
    return part if devices == 1 else lax.psum(part, MODEL_AXIS)


def join_last(part: jax.Array, devices: int) -> jax.Array:
    """Return what the devices have one after another on the last axis; the same on all."""
    if devices == 1:
        return part
    return lax.all_gather(part, MODEL_AXIS, axis=part.ndim - 1, tiled=True)


def device_number(devices: int) -> jax.Array | int:
    """Return the place of this device among them."""
    return 0 if devices == 1 else lax.axis_index(MODEL_AXIS)


def own_heads(whole: jax.Array, devices: int) -> jax.Array:
    """Return of heads [M, K, W] that each device computed those that this one keeps."""
    heads = whole.shape[1]
    held = heads_of_device(heads, devices)
    if held == heads:
        return whole
    return lax.dynamic_slice_in_dim(whole, device_number(devices) * heads // devices, held, axis=1)
