"""Damaged weight files against the rules of the format, written down a second time here.

Source: ``SafeTensors::read_metadata`` and ``Metadata::validate`` of the safetensors crate.
tests/parity/test_safetensors_parity.py compares with the library itself.
"""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.safetensors import INDEX_NAME, read_header, read_index
from tests.checkpoints import write_safetensors

BITS = {"BOOL": 8, "U8": 8, "F16": 16, "BF16": 16, "I32": 32, "F32": 32, "I64": 64}
WEIGHTS = {
    "model.norm.weight": np.ones(3, np.float32),
    "model.layers.0.mlp.up_proj.weight": np.ones((2, 3), np.float16),
    "empty": np.ones((0, 4), np.float32),
}

NUMBERS = st.sampled_from([-1, 0, 1, 3, 12, 24, 1 << 20, 1 << 47, 1 << 62, 1 << 64, 1.0, True])
LEAVES = NUMBERS | st.none() | st.text(max_size=4) | st.sampled_from([*BITS, "F4", ""])
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "model.safetensors"
    write_safetensors(path, WEIGHTS)
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


def accepts(data):
    """Return whether the bytes are a weight file, by the format's own rules."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(100_000_000, len(data) - 8) or data[8:9] != b"{":
        return False
    try:
        header = json.loads(data[8 : 8 + size].decode(), object_pairs_hook=pairs)
    except ValueError:
        return False
    header.pop("__metadata__", None)
    spans = [span(entry) for entry in header.values()]
    if None in spans:
        return False
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            return False
        end = stop
    return end == len(data) - 8 - size


def pairs(items):
    if len(dict(items)) != len(items):
        raise ValueError("a name stands twice")
    return dict(items)


def span(entry):
    """Return the offsets of a tensor when they fit its shape and dtype, else None."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        return None
    shape, offsets = entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not all(type(n) is int and n >= 0 for n in [*shape, *offsets]):
        return None
    bits = BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    count = 1
    for size in shape:
        count *= size
    fits = bits is not None and count * bits == 8 * (offsets[1] - offsets[0])
    return tuple(offsets) if fits else None


def is_read(path):
    try:
        read_header(path)
    except (CorruptModel, UnsupportedModel) as error:
        return len(str(error)) > 2000
    return True


def with_header(header, data):
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def test_reference_accepts_what_is_sound(sound, path):
    path.write_bytes(sound)

    assert accepts(sound)
    assert is_read(path)


@settings(max_examples=300)
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=4)
)
def test_damaged_bytes_are_refused_or_still_a_weight_file(sound, path, edits):
    data = sound
    for at, piece in edits:
        data = data[:at] + piece + data[at + max(1, len(piece)) :]
    path.write_bytes(data)

    assert is_read(path) <= accepts(data)


@settings(max_examples=300)
@given(
    name=st.sampled_from([*WEIGHTS, "new", "__metadata__"]),
    key=st.sampled_from(["dtype", "shape", "data_offsets", None]),
    value=JSON | st.lists(NUMBERS, min_size=2, max_size=2),
    more=st.binary(max_size=2),
)
def test_changed_entry_is_refused_or_still_a_weight_file(sound, path, name, key, value, more):
    end = 8 + int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8:end])
    if key is None:
        header[name] = value
    else:
        header[name] = {**header.get(name, {"dtype": "F32", "shape": [], "data_offsets": [0, 0]})}
        header[name][key] = value
    data = with_header(header, sound[end:] + more)
    path.write_bytes(data)

    assert is_read(path) == accepts(data)


@settings(max_examples=300)
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=5), order=st.randoms())
def test_every_sound_file_is_read(path, shapes, order):
    header, entries, end = {}, [], 0
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape, dtype=int)) * 4
        offsets = [end, end + size]
        entries.append((f"w{number}", {"dtype": "F32", "shape": shape, "data_offsets": offsets}))
        end += size
    order.shuffle(entries)
    header |= entries
    data = with_header(header, bytes(end))
    path.write_bytes(data)

    assert accepts(data)
    assert {name: list(entry.shape) for name, entry in read_header(path).items()} == {
        f"w{number}": shape for number, shape in enumerate(shapes)
    }


@settings(max_examples=300)
@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON}) | st.binary(max_size=40))
def test_any_index_is_read_or_refused(tmp_path_factory, index):
    folder = tmp_path_factory.getbasetemp()
    encoded = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / INDEX_NAME).write_bytes(encoded)

    try:
        files = set(read_index(folder).values())
    except CorruptModel:
        files = set()
    assert all(name.endswith(".safetensors") and "/" not in name for name in files)
