"""A model of four gigabytes: what loading takes, and three machines that hold a third each.

In bf16: whole and split compute the same numbers, layer by layer, so the texts are equal.
"""

import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.large_model import FULL, write_model
from benchmarks.load import DTYPES, QUANTIZED, SHARDS, answer_with, load_in_turn, peak_ratio
from pals.types import LayerRange

pytestmark = [
    pytest.mark.large,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc"),
]

MOST_RATIO = 1.10
MOST_SHARE = 0.5
LAYERS = {"bf16": LayerRange(0, 5)}
FEW_LAYERS = LayerRange(0, 2)  # of a gigabyte: quantising takes its time


@pytest.fixture(scope="module")
def model():
    """The folder of the model and the bytes of its weights; its disk space comes back."""
    with tempfile.TemporaryDirectory(prefix="pals-large-") as name:
        folder = Path(name) / "model"
        yield folder, write_model(folder, FULL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_takes_the_result_and_one_tensor(model, dtype):
    folder, _ = model
    first, again = load_in_turn(folder, LAYERS.get(dtype, FEW_LAYERS), dtype, 2)

    assert peak_ratio(first, FULL) <= MOST_RATIO
    assert peak_ratio(again, FULL) <= MOST_RATIO
    assert first.device_bytes == again.device_bytes
    assert dtype not in QUANTIZED or again.load_s < first.load_s


def test_three_shards_hold_less_than_half_each_and_answer_as_one(model):
    folder, model_bytes = model
    assert model_bytes > 2e9
    alone, (peak,) = answer_with(folder, FULL, 1)
    together, peaks = answer_with(folder, FULL, SHARDS)

    assert together.text == alone.text
    assert len(set(alone.text)) > 4
    assert peak > model_bytes
    assert len(peaks) == SHARDS
    assert max(peaks) < MOST_SHARE * model_bytes
