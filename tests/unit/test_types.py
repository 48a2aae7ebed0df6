from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidLayerRange
from pals.types import LayerRange, short_id, split_layers


@pytest.mark.parametrize(
    ("text", "start", "stop"), [("0:1", 0, 1), ("10:20", 10, 20), ("0:99999", 0, 99999)]
)
def test_range_is_read_and_written_alike(text: str, start: int, stop: int) -> None:
    layers = LayerRange.parse(text)
    assert (layers.start, layers.stop) == (start, stop)
    assert str(layers) == text
    assert len(layers) == stop - start


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "3", "1:", ":3", "a:b", "1:2:3", "-1:3", "1:-3", "+1:3", "1.0:3", "0x1:3"),
        *(" 1:3", "1:3 ", "1:3\n", "1 :3", "1_0:30", "1-3", "1:100000"),
        "\u0660:\u0663",  # digits, but not ours
        *("3:3", "4:3", "0:0"),
    ],
)
def test_text_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(InvalidLayerRange) as caught:
        LayerRange.parse(text)
    assert caught.value.fields == {"text": text}


@pytest.mark.parametrize(("start", "stop"), [(2, 2), (3, 2), (-1, 2)])
def test_empty_or_negative_range_is_not_made(start: int, stop: int) -> None:
    with pytest.raises(InvalidLayerRange):
        LayerRange(start, stop)


@given(st.text(max_size=12))
def test_any_text_is_a_range_or_refused(text: str) -> None:
    try:
        layers = LayerRange.parse(text)
    except InvalidLayerRange:
        return
    assert layers.start < layers.stop


def test_ranges_sort_by_their_first_layer() -> None:
    ranges = [LayerRange(4, 6), LayerRange(0, 9), LayerRange(0, 4)]
    assert sorted(ranges) == [LayerRange(0, 4), LayerRange(0, 9), LayerRange(4, 6)]


@given(st.integers(1, 200), st.data())
def test_split_covers_every_layer_once_in_equal_parts(num_layers: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, num_layers))
    ranges = split_layers(num_layers, parts)
    assert [i for r in ranges for i in range(r.start, r.stop)] == list(range(num_layers))
    assert len(ranges) == parts
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(("num_layers", "parts"), [(1, 2), (0, 1), (30, 31)])
def test_more_parts_than_layers_are_refused(num_layers: int, parts: int) -> None:
    with pytest.raises(InvalidLayerRange):
        split_layers(num_layers, parts)


def test_short_ids_have_eight_characters() -> None:
    assert short_id(bytes(range(32))) == "00010203"
    assert short_id("12D3KooWabcdefgh") == "abcdefgh"
