"""Fills a shard's parameters from a checkpoint, a block of rows at a time.

The check is strict both ways: a weight that is missing, that nothing reads, or that has
another shape refuses the model, before anything of it is read.
"""
# pyright: reportUnknownMemberType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax
import ml_dtypes
import numpy as np

from pals.errors import CorruptModel
from pals.models.assemble import Assembler
from pals.models.build import ParameterPath, Parameters
from pals.models.config import ModelConfig
from pals.models.matrix import QUANTIZED_LEAVES
from pals.models.quantize import (
    Int4Matrix,
    pack_int4,
    quantize_int4,
    quantize_int8,
)
from pals.models.safetensors import Weights
from pals.models.storage import Storage
from pals.models.stored import StackedWeight, StoredWeight
from pals.models.stored_words import PackedWeight
from pals.models.table import Array, Piece, Root, Shape, WeightTable, unchanged
from pals.types import LayerRange

MAX_PROBLEMS = 8
BLOCK_BYTES = 16 << 20
MAX_MAGNITUDE = 2.0**120
"""No weight comes near. Sums that quantise, and bf16, which rounds up, stay finite below."""
MAX_EXPONENT_BITS = np.uint16((127 + 120) << 7)

_COMPUTED = r"layers\.\d{1,5}\.self_attn\.rotary_emb\.inv_freq"
"""Tensors of old exports that follow from the config."""


class WeightSource:
    """The weights of a checkpoint as parameters of one shard, each checked but not read."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        layers: LayerRange,
        table: WeightTable,
        logical: Parameters,
        *,
        wanted: Collection[ParameterPath] | None = None,
    ) -> None:
        """Check the names of all that the shard needs, and the shapes of what will be read.

        Args:
            weights: The checkpoint's files.
            config: Of the whole model.
            layers: The shard's.
            table: The family's.
            logical: All parameters of the shard, none of them quantised.
            wanted: Those of them that are going to be read; None for all. No file that
                holds only others is opened.

        Raises:
            CorruptModel: Files are malformed, or weights are missing, unexpected or
                misshapen.
            UnsupportedModel: A weight has a dtype that is not read.
            ModelNotFound: A weight was not downloaded.
        """
        storage = Storage.of(config.quantization, set(weights.file_of), weights.folder)
        self._pieces = {
            path: parameter_pieces(path, p.shape, config, layers, table, storage.names)
            for path, p in logical.items()
        }
        needed = {p.source for pieces in self._pieces.values() for p in pieces}
        problems = name_problems(storage.names, needed, config, layers, table)
        paths = logical if wanted is None else wanted
        shapes = {p.source: p.shape for path in paths for p in self._pieces[path]}
        found = [name for name in shapes if name in storage.names]
        entries = weights.entries(tensor for name in found for tensor in storage.tensors(name))
        self._stored = {name: storage.weight(name, entries) for name in found}
        problems += shape_problems(self._stored, shapes)
        if problems:
            raise CorruptModel(source=weights.folder, problem=summarize(problems))

    def load(
        self, parameters: Parameters, *, group_size: int
    ) -> Iterator[tuple[ParameterPath, jax.Array]]:
        """Yield parameters as they are read to the default device.

        At most one block of a tensor is held on the host beside the parameters; a tensor
        that is stored in another layout is read whole.

        Args:
            parameters: What is wanted; several leaves may stand for one matrix.
            group_size: Of matrices in int4.

        Raises:
            CorruptModel: A weight holds infinities or NaN, or a file became shorter.
        """
        for path, leaves in group_leaves(parameters).items():
            pieces = self._pieces[path]
            if None in leaves:
                yield path, load_plain(pieces, self._stored, leaves[None])
            else:
                arrays = load_quantized(pieces, self._stored, leaves, group_size)
                yield from (((*path, name), array) for name, array in arrays.items())


def group_leaves(
    parameters: Parameters,
) -> dict[ParameterPath, dict[str | None, jax.ShapeDtypeStruct]]:
    """Return the leaves of each logical parameter; a plain one has a single one, None."""
    groups: dict[ParameterPath, dict[str | None, jax.ShapeDtypeStruct]] = {}
    for path, leaf in parameters.items():
        key = logical_path(path)
        groups.setdefault(key, {})[None if key == path else str(path[-1])] = leaf
    return groups


def logical_path(path: ParameterPath) -> ParameterPath:
    """Return the path of the matrix that a leaf is a part of, or the leaf's own path."""
    is_part = path[-2:-1] == ("weight",) and path[-1] in QUANTIZED_LEAVES
    return path[:-1] if is_part else path


def parameter_pieces(
    path: ParameterPath,
    shape: tuple[int, ...],
    config: ModelConfig,
    layers: LayerRange,
    table: WeightTable,
    present: set[str],
) -> list[Piece]:
    """Return what a parameter of the shard of ``layers`` is made of."""
    root = table.root_of(present)
    module, *rest = path
    if module == "layers":
        number, *inner = rest
        prefix = f"{root.model}layers.{layers.start + int(number)}."
        return table.layer_pieces(".".join(map(str, inner)), prefix, shape, present)
    if module == "lm_head" and config.tie_word_embeddings:
        module = "embed_tokens"
    prefix = root.head if module == "lm_head" else f"{root.model}{module}."
    source = prefix + ".".join(map(str, rest))
    return [Piece(source=source, shape=shape, rows=slice(0, shape[0]))]


def load_plain(
    pieces: Sequence[Piece], stored: Mapping[str, StoredWeight], leaf: jax.ShapeDtypeStruct
) -> jax.Array:
    """Read one parameter to the device in the dtype that it is held in."""
    target = Assembler(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    for piece in pieces:
        for rows, block in read_piece(piece, stored[piece.source]):
            target.write(piece.index, rows, block)
    return target.finish()


def load_quantized(
    pieces: Sequence[Piece],
    stored: Mapping[str, StoredWeight],
    leaves: Mapping[str | None, jax.ShapeDtypeStruct],
    group_size: int,
) -> dict[str, jax.Array]:
    """Read one matrix, or stack of them, quantising it row by row on the way."""
    targets = {
        str(name): Assembler(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in leaves.items()
    }
    for piece in pieces:
        weight = stored[piece.source]
        blocks = (
            quantized_int4(piece, weight, group_size)
            if "packed" in targets
            else quantized_int8(piece, weight)
        )
        for rows, arrays in blocks:
            for name, block in arrays.items():
                # the groups of int4 come before the rows, see `Int4Matrix`
                targets[name].write(piece.index, rows, block, axis=int("packed" in targets))
    return {name: target.finish() for name, target in targets.items()}


def quantized_int8(piece: Piece, weight: StoredWeight) -> Iterator[tuple[slice, dict[str, Array]]]:
    """Yield the rows of a piece in int8."""
    for rows, block in read_piece(piece, weight):
        matrix = quantize_int8(block)
        yield rows, {"values": matrix.values, "scales": matrix.scales}


def quantized_int4(
    piece: Piece, weight: StoredWeight, group_size: int
) -> Iterator[tuple[slice, dict[str, Array]]]:
    """Yield the rows of a piece in int4: the checkpoint's own codes where it has such."""
    if isinstance(weight, PackedWeight) and weight.is_int4(group_size):
        matrices = own_int4(piece, weight, group_size)
    else:
        blocks = read_piece(piece, weight)
        matrices = ((rows, quantize_int4(block, group_size)) for rows, block in blocks)
    for rows, matrix in matrices:
        yield rows, {"packed": matrix.packed, "scales": matrix.scales, "zeros": matrix.zeros}


def own_int4(
    piece: Piece, weight: PackedWeight, group_size: int
) -> Iterator[tuple[slice, Int4Matrix]]:
    """Yield the checkpoint's own codes, scales and zero points."""
    for rows, block in weight.int4_blocks(BLOCK_BYTES, group_size):
        scales = checked(block.scales, weight)
        yield shifted(rows, piece), pack_int4(block.codes, scales, block.zeros, group_size)


def read_piece(piece: Piece, weight: StoredWeight) -> Iterator[tuple[slice, Array]]:
    """Yield the blocks of a piece, each with the rows of the parameter that it fills."""
    part = weight
    if piece.entry is not None:
        assert isinstance(weight, StackedWeight)  # only these have the axes that were checked
        part = weight.part(piece.entry)
    blocks = ((rows, checked(block, weight)) for rows, block in part.blocks(BLOCK_BYTES))
    if piece.change is unchanged:
        yield from ((shifted(rows, piece), block) for rows, block in blocks)
    else:
        yield piece.rows, piece.change(np.concatenate([block for _, block in blocks]))


def shifted(rows: slice, piece: Piece) -> slice:
    """Return where rows of a tensor come to lie in the parameter."""
    return slice(piece.rows.start + rows.start, piece.rows.start + rows.stop)


def checked(block: Array, weight: StoredWeight) -> Array:
    """Return ``block`` when all of it is finite, and stays so in every dtype.

    Raises:
        CorruptModel: It is not.
    """
    if not is_bounded(block):
        raise CorruptModel(
            source=weight.path,
            problem=f"weight `{weight.name}` holds infinities or NaN, or numbers near them",
        )
    return block


def is_bounded(block: Array) -> bool:
    """Return whether each number of a block of floats is one and below `MAX_MAGNITUDE`."""
    if block.dtype == ml_dtypes.bfloat16:
        # numpy would widen each value: the exponent's bits say the same 10 x faster
        exponents = block.view(np.uint16) & np.uint16(0x7F80)
        return not bool((exponents >= MAX_EXPONENT_BITS).any())
    low, high = float(block.min(initial=0)), float(block.max(initial=0))  # NaN where any is
    return low > -MAX_MAGNITUDE and high < MAX_MAGNITUDE


# --- the check of names and shapes ---------------------------------------------------


def name_problems(
    present: set[str],
    needed: set[str],
    config: ModelConfig,
    layers: LayerRange,
    table: WeightTable,
) -> list[str]:
    """Return what is wrong with the names of a checkpoint, seen from one shard."""
    known = _KnownNames(config, layers, table, table.root_of(present))
    missing = [f"`{name}` is missing" for name in sorted(needed - present)]
    unexpected = [
        f"`{name}` is unexpected"
        for name in sorted(present - needed)
        if not known.is_left_alone(name)
    ]
    return missing + unexpected


class _KnownNames:
    """Tells which tensors a shard rightly leaves alone."""

    def __init__(
        self, config: ModelConfig, layers: LayerRange, table: WeightTable, root: Root
    ) -> None:
        self._stored_layers = config.num_layers + config.num_mtp_layers
        self._layers = layers
        model = re.escape(root.model)
        self._layer = re.compile(rf"{model}layers\.(\d{{1,5}})\.")
        ends = rf"{model}(embed_tokens|norm)\.weight|{re.escape(root.head)}weight"
        patterns = [ends, model + _COMPUTED, *table.unused]
        self._others = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))

    def is_left_alone(self, name: str) -> bool:
        if self._others.fullmatch(name):
            return True
        match = self._layer.match(name)
        if match is None:
            return False
        layer = int(match[1])
        return layer < self._stored_layers and not self._layers.start <= layer < self._layers.stop


def shape_problems(stored: Mapping[str, StoredWeight], shapes: Mapping[str, Shape]) -> list[str]:
    """Return which weights do not have the shape that config.json asks for."""
    return [
        f"`{name}` has shape {list(weight.shape)} instead of {list(shapes[name])}"
        for name, weight in sorted(stored.items())
        if weight.shape != shapes[name]
    ]


def summarize(problems: Sequence[str]) -> str:
    """Join the first problems into one line and count the others."""
    more = len(problems) - MAX_PROBLEMS
    shown = "; ".join(problems[:MAX_PROBLEMS])
    return f"{shown}; and {more} more" if more > 0 else shown
