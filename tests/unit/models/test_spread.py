"""Which heads, columns and rows each of several devices has."""

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from pals.errors import CannotDivide, TooFewDevices
from pals.models.numerics import Numerics
from pals.models.quantize import check_groups_divide, check_rotation_divides
from pals.models.spread import check_divides, device_bytes, heads_of_device, open_mesh, place

MESH = AbstractMesh((4,), ("model",))


@pytest.mark.parametrize(
    ("heads", "devices", "held"), [(8, 1, 8), (8, 4, 2), (8, 8, 1), (2, 4, 1), (1, 4, 1)]
)
def test_devices_have_as_many_key_heads_each_and_one_at_least(heads, devices, held):
    assert heads_of_device(heads, devices) == held


def test_key_heads_that_would_be_cut_are_refused_with_both_numbers():
    with pytest.raises(CannotDivide) as caught:
        heads_of_device(6, 4)

    assert str(caught.value) == "6 key heads cannot be divided among 4 devices"
    assert caught.value.hint == "choose `--devices` so that it divides 6, or 6 it"


def test_what_does_not_divide_is_refused_by_its_name():
    check_divides(12, "experts", 4)

    with pytest.raises(CannotDivide, match="9 experts cannot be divided among 4 devices"):
        check_divides(9, "experts", 4)


def test_columns_that_are_quantised_together_stay_on_one_device():
    check_rotation_divides(512, 4)
    check_groups_divide(512, 64, 4)

    with pytest.raises(CannotDivide, match="2 blocks of 128 columns that int8 rotates together"):
        check_rotation_divides(256, 4)
    with pytest.raises(CannotDivide, match="512 columns, of which int4 packs 256 together,"):
        check_groups_divide(512, 128, 4)


def test_one_device_has_columns_that_fill_no_group():
    check_groups_divide(100, 128, 1)
    check_rotation_divides(100, 1)


@pytest.mark.parametrize(
    ("axis", "spec"),
    [(None, PartitionSpec()), (0, PartitionSpec("model")), (-1, PartitionSpec(None, "model"))],
)
def test_an_array_lies_as_its_parameter_says(axis, spec):
    assert place(MESH, axis, 2).spec == spec


def test_bytes_are_those_of_one_device():
    split, whole = (
        jax.ShapeDtypeStruct((8, 3), "float32", sharding=place(MESH, axis, 2)) for axis in (0, None)
    )

    assert device_bytes(split) == 2 * 3 * 4
    assert device_bytes(whole) == 8 * 3 * 4
    assert device_bytes(jax.ShapeDtypeStruct((8, 3), "float32")) == 8 * 3 * 4


def test_a_single_device_is_no_mesh():
    assert open_mesh(1) is None
    assert Numerics.of("f32").devices == 1


def test_more_devices_than_there_are_are_refused_with_both_numbers():
    found = jax.local_device_count()

    with pytest.raises(TooFewDevices) as caught:
        open_mesh(found + 1)

    assert caught.value.fields["devices"] == found + 1
    assert f"there are {found} of kind" in str(caught.value)
