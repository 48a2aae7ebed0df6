"""The demo's model as a GGUF file in BF16: the numbers that Pals computes with, for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from benchmarks.random_models import FOLDER
from pals.models.gguf import packaged_demo_model

_FIRST = "GGUF."
"""What the names of the fields begin with that the writer writes itself."""

_WRITTEN = ("general.architecture", "general.file_type")


def open_demo_gguf() -> Path:
    """Return the file, written when it is not there yet.

    Raises:
        FileNotFoundError: The package of the demo's model is not installed.
    """
    path = FOLDER / "demo" / "BF16.gguf"
    if not path.exists():
        source = packaged_demo_model()
        if source is None:
            raise FileNotFoundError("the demo's model is missing: run `make install`")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _convert(GGUFReader(source), partial)
        partial.rename(path)
    return path


def _convert(reader: GGUFReader, path: Path) -> None:
    writer = GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith(_FIRST) and name not in _WRITTEN:
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    writer.add_key_value(_WRITTEN[1], 32, GGUFValueType.UINT32)  # mostly BF16
    for tensor in reader.tensors:
        is_vector = len(tensor.shape) == 1
        kind = GGMLQuantizationType.F32 if is_vector else GGMLQuantizationType.BF16
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
