import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.models import assemble
from pals.models.assemble import ALIGNMENT, Assembler, aligned_empty

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.uint8]


def random_values(shape, dtype=np.float32):
    return np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)


@pytest.fixture(params=["host", "device"])
def memory(request, monkeypatch):
    """Assemble in host memory, or on the device as on platforms other than the CPU."""
    if request.param == "device":
        monkeypatch.setattr(assemble, "_HostPart", assemble._DevicePart)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_experts_are_stacked_from_their_parts(memory, dtype):
    values = random_values((3, 8, 5), dtype)
    target = Assembler(values.shape, dtype)

    for expert in (2, 0, 1):
        target.write(expert, slice(4, 8), values[expert, 4:])
        target.write(expert, slice(0, 4), values[expert, :4])
    array = target.finish()

    assert array.dtype == dtype
    np.testing.assert_array_equal(array, values)


@settings(max_examples=20)
@given(cuts=st.sets(st.integers(1, 9)))
def test_rows_come_in_blocks_of_any_size(cuts):
    values = random_values((10, 3))
    target = Assembler(values.shape, np.float32)

    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 10], strict=True):
        target.write(None, slice(start, stop), values[start:stop])

    np.testing.assert_array_equal(target.finish(), values)


def test_blocks_are_cast_to_the_dtype_of_the_array(memory):
    target = Assembler((2, 2), ml_dtypes.bfloat16)

    target.write(None, slice(0, 2), np.array([[1.0, 2.0], [3.0, 1.0039]], np.float32))

    np.testing.assert_array_equal(target.finish(), np.array([[1, 2], [3, 1]], ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_jax_takes_the_host_memory_over(dtype):
    host = aligned_empty((64, 33), np.dtype(dtype))
    host[...] = 1

    array = jax.device_put(host, jax.devices("cpu")[0], may_alias=True)

    assert host.ctypes.data % ALIGNMENT == 0
    assert array.unsafe_buffer_pointer() == host.ctypes.data


def test_filling_holds_the_array_once_and_one_block():
    shape, block = (16, 256, 256), random_values((256, 256))
    size = 4 * 16 * 256 * 256

    tracemalloc.start()
    try:
        target = Assembler(shape, np.float32)
        for expert in range(16):
            target.write(expert, slice(0, 256), block)
        array = target.finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert size <= peak <= size + block.nbytes
    assert array.shape == shape


def test_a_device_holds_the_array_once_and_one_block(monkeypatch):
    monkeypatch.setattr(assemble, "_HostPart", assemble._DevicePart)
    block = random_values((256, 256))
    before = sum(array.nbytes for array in jax.live_arrays())
    target = Assembler((8, 256, 256), np.float32)

    held = []
    for expert in range(8):
        target.write(expert, slice(0, 256), block)
        held.append(sum(array.nbytes for array in jax.live_arrays()) - before)

    assert max(held) <= 9 * block.nbytes
    assert target.finish().nbytes == 8 * block.nbytes


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (1, 2, 4)])
def test_a_block_that_does_not_fit_its_place_is_refused(shape):
    target = Assembler((4, 4), np.float32)

    with pytest.raises(ValueError, match="does not fit"):
        target.write(None, slice(0, 3), random_values(shape))


def test_an_array_with_holes_is_not_returned():
    target = Assembler((4, 4), np.float32)
    target.write(None, slice(0, 3), random_values((3, 4)))

    with pytest.raises(ValueError, match="4 elements"):
        target.finish()


def test_rows_written_twice_are_noticed():
    target = Assembler((4, 4), np.float32)
    for rows in (slice(0, 3), slice(1, 4)):
        target.write(None, rows, random_values((3, 4)))

    with pytest.raises(ValueError, match="not written once"):
        target.finish()
