import io
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pals.models import gguf as importer
from pals.models.gguf_plan import PlannedTensor
from pals.models.gguf_reader import GgufTensor
from tests.unit.models.ggml_blocks import BLOCKS

ROWS, BLOCKS_PER_ROW = 5, 2


def random_blocks(kind: Kind, scales: tuple[int, ...]) -> np.ndarray:
    """Return [rows, bytes] of random quants whose scales are small finite numbers."""
    random = np.random.default_rng(int(kind))
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    raw = random.integers(0, 256, (ROWS * BLOCKS_PER_ROW, block_bytes), np.uint8)
    for at in scales:
        values = random.normal(0, 0.1, (len(raw), 1)).astype("<f2")
        raw[:, at : at + 2] = values.view(np.uint8)
    return raw.reshape(ROWS, -1)


@pytest.mark.parametrize("keeps_float32", [True, False])
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_every_block_type_means_what_ggml_says(
    kind: Kind, keeps_float32: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importer, "BLOCK_ELEMENTS", 1000)
    meaning, scales = BLOCKS[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = random_blocks(kind, scales)
    expected = np.array(
        [
            [
                value
                for start in range(0, len(row), block_bytes)
                for value in meaning(row[start : start + block_bytes])
            ]
            for row in map(bytes, raw)
        ],
        np.float32,
    )
    source = GgufTensor(
        name="t", shape=(ROWS, BLOCKS_PER_ROW * block), kind=kind, offset=3, size_bytes=raw.nbytes
    )
    tensor = PlannedTensor(name="t", source=source, keeps_float32=keeps_float32)
    file = io.BytesIO(bytes(3) + raw.tobytes())
    found = np.concatenate(list(importer._converted_blocks(file, tensor, Path("m.gguf"))))
    if keeps_float32:
        np.testing.assert_array_equal(found, expected)
    else:
        bf16 = expected.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found.view(ml_dtypes.bfloat16), bf16)


def test_a_tensor_is_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch):
    """An embedding of gigabytes is never in memory whole; nor is an expert stack."""
    monkeypatch.setattr(importer, "BLOCK_ELEMENTS", 64)
    sizes: list[int] = []

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            sizes.append(size or 0)
            return super().read(size)

    source = GgufTensor(name="t", shape=(100, 32), kind=Kind.F32, offset=0, size_bytes=12800)
    tensor = PlannedTensor(name="t", source=source, rotary_head_dim=2)
    blocks = list(importer._converted_blocks(Counting(bytes(12800)), tensor, Path("m.gguf")))
    assert sum(len(block) for block in blocks) == 100
    assert max(sizes) == 64 * 4
