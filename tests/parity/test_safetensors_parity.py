"""Weight files that are read here against the safetensors library, which must agree."""

import json
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.safetensors import read_header
from tests.checkpoints import write_safetensors

pytestmark = pytest.mark.parity

safetensors = pytest.importorskip("safetensors")

WEIGHTS = {"a": np.ones(3, np.float32), "b": np.ones((2, 3), np.float16), "c": np.ones((0, 4))}
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 12, 24, 36, 1 << 47, 1 << 62, 1.0, True])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("parity") / "model.safetensors"


@settings(max_examples=300)
@example(name="c", change={"shape": [1 << 47, 1 << 47, 0]}, more=b"")
@given(
    name=st.sampled_from(["a", "b", "c", "d"]),
    change=st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "F4", "", 1]),
            "shape": st.lists(NUMBERS, max_size=3),
            "data_offsets": st.lists(NUMBERS, max_size=3),
        },
    ),
    more=st.binary(max_size=1),
)
def test_changed_file_is_accepted_by_both_or_by_neither(path, name, change, more):
    write_safetensors(
        path, {k: v.astype(v.dtype if k != "c" else np.float32) for k, v in WEIGHTS.items()}
    )
    sound = path.read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8:end])
    header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} | header.get(name, {})
    header[name] |= change
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + sound[end:] + more)

    assert is_read_here(path) == is_read_there(path)


def is_read_here(path):
    try:
        read_header(path)
    except (CorruptModel, UnsupportedModel):
        return False
    return True


def is_read_there(path):
    try:
        safetensors.safe_open(path, "numpy").keys()
    except safetensors.SafetensorError:
        return False
    return True
