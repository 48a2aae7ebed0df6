"""fp8 and MXFP4 matrices are what transformers' own dequantisation makes of them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pals.models.config import QuantizationConfig
from pals.models.storage import Storage
from tests.unit.models.test_storage import FakeTensor, decode

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
def test_fp8_blocks_are_those_of_transformers(shape: tuple[int, int]):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    random = np.random.default_rng(0)
    weight = random.standard_normal(shape, np.float32).astype(ml_dtypes.float8_e4m3fn)
    scales = random.random((shape[0] // 128, shape[1] // 128), np.float32)
    stored = torch.from_numpy(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    wanted = Fp8Dequantize(None)._dequantize_one(stored, torch.from_numpy(scales))
    tensors = {
        "q.weight": FakeTensor("q.weight", weight),
        "q.weight_scale_inv": FakeTensor("q.weight_scale_inv", scales),
    }
    config = QuantizationConfig(method="fp8", bits=8, block_size=(128, 128))
    got = decode(Storage.of(config, set(tensors), Path("m")).weight("q.weight", tensors))
    np.testing.assert_array_equal(got, wanted.to(torch.float32).numpy())


def test_mxfp4_experts_are_those_of_transformers_transposed():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 10, 4, 16), np.uint8)
    scales = random.integers(100, 140, (3, 10, 4), np.uint8)
    wanted = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    tensors = {
        "gate_up_proj_blocks": FakeTensor("gate_up_proj_blocks", blocks),
        "gate_up_proj_scales": FakeTensor("gate_up_proj_scales", scales),
    }
    storage = Storage.of(QuantizationConfig(method="mxfp4"), set(tensors), Path("m"))
    got = decode(storage.weight("gate_up_proj_blocks", tensors))
    assert got.shape == (3, 10, 128)
    np.testing.assert_array_equal(got.transpose(0, 2, 1), wanted.numpy())
