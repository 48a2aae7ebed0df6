import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pals.errors import CorruptModel, ModelError
from pals.models import gguf_reader
from pals.models.gguf_plan import plan_import
from pals.models.gguf_reader import read_header
from tests.unit.models.gguf_files import hf_weights, to_gguf, write_gguf


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "valid.gguf"
    return write_gguf(path, to_gguf(hf_weights())).read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str = "t", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    *parts: bytes, tensors: int = 0, keys: int = 0, data: int = 32, version: int = 3
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(data)


def test_the_library_and_this_reader_agree(valid: bytes, tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(valid)
    header, theirs = read_header(path), gguf.GGUFReader(path)
    for field in theirs.fields.values():
        if not field.name.startswith("GGUF."):
            np.testing.assert_array_equal(header.metadata[field.name], field.contents())
    assert len(header.tensors) == len(theirs.tensors)
    for entry in theirs.tensors:
        ours = header.tensors[entry.name]
        assert ours.shape == tuple(reversed(entry.shape.tolist()))
        assert (ours.kind, ours.offset) == (entry.tensor_type, entry.data_offset)
        assert ours.size_bytes == entry.n_bytes


HOSTILE = {
    "nothing": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "a later version": gguf_bytes(version=4),
    "the first version": gguf_bytes(version=1),
    "more tensors than any model": gguf_bytes(tensors=2**63),
    "more keys than any model": gguf_bytes(keys=2**40),
    "keys that are not there": gguf_bytes(keys=3, data=0),
    "a string past the end": gguf_bytes(struct.pack("<Q", 2**60), keys=1),
    "a string of 2**64 - 1 bytes": gguf_bytes(struct.pack("<Q", 2**64 - 1), keys=1),
    "an empty key": gguf_bytes(text(""), struct.pack("<II", 4, 1), keys=1),
    "a key that is not UTF-8": gguf_bytes(
        struct.pack("<Q", 2) + b"\xff\xfe", struct.pack("<II", 4, 1), keys=1
    ),
    "a key twice": gguf_bytes(*[text("k"), struct.pack("<II", 4, 1)] * 2, keys=2),
    "an unknown type": gguf_bytes(text("k"), struct.pack("<I", 13), keys=1),
    "an array past the end": gguf_bytes(text("k"), struct.pack("<IIQ", 9, 4, 2**61), keys=1),
    "an array of strings past the end": gguf_bytes(
        text("k"), struct.pack("<IIQ", 9, 8, 2**61), keys=1
    ),
    "an array of arrays": gguf_bytes(text("k"), struct.pack("<IIQ", 9, 9, 1), keys=1),
    "an odd alignment": gguf_bytes(text("general.alignment"), struct.pack("<II", 4, 33), keys=1),
    "an alignment of zero": gguf_bytes(text("general.alignment"), struct.pack("<II", 4, 0), keys=1),
    "a tensor past the end": gguf_bytes(tensor(offset=64), tensors=1),
    "an offset of 2**64 - 32": gguf_bytes(tensor(offset=2**64 - 32), tensors=1),
    "a tensor larger than the file": gguf_bytes(tensor(shape=(9,)), tensors=1),
    "a shape whose product wraps": gguf_bytes(tensor(shape=(2**32, 2**32)), tensors=1),
    "a shape of zero": gguf_bytes(tensor(shape=(0,)), tensors=1),
    "no dimensions": gguf_bytes(tensor(shape=()), tensors=1),
    "five dimensions": gguf_bytes(tensor(shape=(1, 1, 1, 1, 1)), tensors=1),
    "an unknown tensor type": gguf_bytes(tensor(kind=999), tensors=1),
    "part of a block": gguf_bytes(tensor(shape=(8,), kind=8), tensors=1),
    "overlapping tensors": gguf_bytes(tensor("a"), tensor("b"), tensors=2),
    "two tensors of one name": gguf_bytes(tensor("a"), tensor("a", offset=32), tensors=2, data=64),
}


@pytest.mark.timeout(5)
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_header_that_lies_is_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CorruptModel) as caught:
        read_header(path)
    assert caught.value.fields["source"] == path


def test_the_smallest_file_is_read(tmp_path: Path):
    """Guards the table above: its files are refused for their lie, not for their making."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(text("k"), struct.pack("<II", 4, 7), tensor(), tensors=1, keys=1))
    header = read_header(path)
    assert header.metadata == {"k": 7}
    assert header.tensors["t"].shape == (8,)


def test_strings_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf_reader, "MAX_STRINGS", 3)
    path = tmp_path / "m.gguf"
    array = struct.pack("<IIQ", 9, 8, 3) + text("") * 3
    path.write_bytes(gguf_bytes(text("k"), array, keys=1))
    with pytest.raises(CorruptModel, match="more than 3 strings"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CorruptModel, match="No such file"):
        read_header(tmp_path / "m.gguf")


anywhere = st.floats(0, 1, exclude_max=True)
ours_only = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ours_only
@given(where=anywhere)
def test_a_file_cut_anywhere_is_refused(valid: bytes, tmp_path: Path, where: float):
    path = tmp_path / "m.gguf"
    path.write_bytes(valid[: int(where * len(valid))])
    with pytest.raises(CorruptModel):
        read_header(path)


@ours_only
@given(where=anywhere, flip=st.integers(1, 255))
def test_a_changed_byte_is_read_or_refused_but_never_a_crash(
    valid: bytes, tmp_path: Path, where: float, flip: int
):
    """Only the first 12 kB: header, metadata and table; weights have no wrong bytes."""
    at = int(where * 12_000)
    path = tmp_path / "m.gguf"
    path.write_bytes(valid[:at] + bytes([valid[at] ^ flip]) + valid[at + 1 :])
    with contextlib.suppress(ModelError):
        header = read_header(path)
        assert all(t.offset + t.size_bytes <= len(valid) for t in header.tensors.values())
        plan_import(header)
