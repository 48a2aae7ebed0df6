# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (orbax annotates its functions with types that pyright sees as partially unknown)
"""Named arrays in an Orbax checkpoint, of which never more than a block is held twice.

Orbax holds whatever it is asked for twice, so an array is kept in blocks of its first
axis, each an entry of its own in the checkpoint's tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from pals.models.assemble import Assembler, intersection, relative, whole_region

BLOCK_BYTES = 2 << 20

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def save_arrays(path: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Write arrays, split over devices or not, to a new folder.

    Raises:
        Exception: They cannot be written, in any way that Orbax finds.
    """
    blocks = {
        block: _to_host(array, rows)
        for name, array in arrays.items()
        for block, rows in _blocks(name, array.shape, array.dtype.itemsize)
    }
    with _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), ocp.args.PyTreeSave(blocks))


def load_arrays(path: Path, shapes: Shapes) -> dict[str, jax.Array]:
    """Read arrays to their shardings, or to the default device.

    Raises:
        Exception: The files are damaged in any way that Orbax finds, or the arrays are
            not what was asked for.
    """
    with _checkpointer() as checkpointer:
        return {name: _load(checkpointer, path, name, leaf) for name, leaf in shapes.items()}


def _load(
    checkpointer: ocp.Checkpointer, path: Path, name: str, leaf: jax.ShapeDtypeStruct
) -> jax.Array:
    target = Assembler(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    for block, rows in _blocks(name, leaf.shape, leaf.dtype.itemsize):
        args = ocp.args.PyTreeRestore(
            item={block: jax.ShapeDtypeStruct((), leaf.dtype)},
            restore_args={block: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        values: np.ndarray = checkpointer.restore(path.absolute(), args)[block]
        if values.dtype != leaf.dtype:
            raise ValueError(f"`{name}` is {values.dtype}, not {leaf.dtype}")
        target.write(None, rows, values)
    return target.finish()


def _to_host(array: jax.Array, rows: slice) -> np.ndarray:
    """Return rows of an array: on a CPU its own memory, unless several devices hold them."""
    wanted = whole_region((rows,), array.shape)
    gathered: np.ndarray | None = None
    for shard in array.addressable_shards:
        held = whole_region(shard.index or (), array.shape)
        shared = intersection(wanted, held)
        if shard.replica_id or shared is None:
            continue
        here = relative(shared, held)
        on_cpu = shard.device.platform == "cpu"
        part = np.asarray(shard.data)[here] if on_cpu else np.asarray(shard.data[here])
        if shared == wanted:
            return part
        if gathered is None:
            gathered = np.empty((rows.stop - rows.start, *array.shape[1:]), array.dtype)
        gathered[relative(shared, wanted)] = part
    assert gathered is not None
    return gathered


def _blocks(name: str, shape: tuple[int, ...], item_bytes: int) -> Iterator[tuple[str, slice]]:
    """Yield the name and the rows of each block of an array."""
    step = max(1, BLOCK_BYTES // max(1, item_bytes * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield f"{name}.{start}", slice(start, min(start + step, shape[0]))


def _checkpointer() -> ocp.Checkpointer:
    # Quantised numbers hardly compress; compressing them would hold them all once more.
    in_place = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, in_place), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=handlers)
    )
