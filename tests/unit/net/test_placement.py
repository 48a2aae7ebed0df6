"""Placement: a new shard takes what the swarm lacks, and joins what is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.net.placement import choose_range, explain_choice
from pals.net.route import find_chain
from pals.types import LayerRange, PeerId

NUM_LAYERS = 12
MANIFEST = b"m" * 32

ranges = st.lists(st.integers(0, NUM_LAYERS), min_size=2, max_size=2, unique=True).map(
    lambda bounds: LayerRange(min(bounds), max(bounds))
)
swarms = st.lists(ranges, max_size=6)
capacities = st.lists(st.integers(0, NUM_LAYERS), min_size=NUM_LAYERS, max_size=NUM_LAYERS)


def parse(*texts: str) -> list[LayerRange]:
    return [LayerRange.parse(text) for text in texts]


def choose(announced: list[LayerRange], capacity: int) -> LayerRange | None:
    return choose_range(announced, NUM_LAYERS, lambda _: capacity)


def shard(number: int, layers: LayerRange) -> Announcement:
    return Announcement(
        peer=PeerId(f"peer-{number:08}"),
        model_id="org/model",
        manifest=MANIFEST,
        layers=layers,
        num_layers=NUM_LAYERS,
        layer_hashes=(b"h" * 16,) * len(layers),
        dtype="bf16",
        free_tokens=1,
        max_context_tokens=2048,
        step_ms=1.0,
        addresses=(),
        seq=0,
        expires_at=0.0,
    )


def has_chain(announced: list[LayerRange]) -> bool:
    shards = [shard(number, layers) for number, layers in enumerate(announced)]
    try:
        find_chain(shards, manifest=MANIFEST, num_layers=NUM_LAYERS)
    except NoChain:
        return False
    return True


def served(announced: list[LayerRange]) -> list[int]:
    return [sum(r.start <= layer < r.stop for r in announced) for layer in range(NUM_LAYERS)]


# --- what is always so ---------------------------------------------------------------


@given(swarms, capacities)
def test_the_range_is_within_the_model_and_the_capacity(
    announced: list[LayerRange], capacity: list[int]
):
    chosen = choose_range(announced, NUM_LAYERS, capacity.__getitem__)

    if chosen is None:
        assert not any(capacity)
    else:
        assert chosen.stop <= NUM_LAYERS
        assert len(chosen) <= capacity[chosen.start]


@given(swarms, st.integers(1, NUM_LAYERS))
def test_layers_that_nobody_serves_come_first_and_as_many_as_fit(
    announced: list[LayerRange], capacity: int
):
    counts = served(announced)
    windows = [counts[start : start + capacity] for start in range(NUM_LAYERS)]
    most = max(window.count(0) for window in windows)

    chosen = choose(announced, capacity)

    assert chosen is not None
    assert counts[chosen.start : chosen.stop].count(0) == most


@given(swarms, st.integers(1, NUM_LAYERS))
def test_the_choice_does_not_depend_on_the_order_of_the_others(
    announced: list[LayerRange], capacity: int
):
    assert choose(announced, capacity) == choose(announced[::-1], capacity)


@given(swarms, st.integers(1, NUM_LAYERS))
def test_where_every_layer_is_served_one_of_the_least_served_is_taken(
    announced: list[LayerRange], capacity: int
):
    announced = [*announced, LayerRange(0, NUM_LAYERS)]
    counts = served(announced)

    chosen = choose(announced, capacity)

    assert chosen is not None
    assert min(counts) in counts[chosen.start : chosen.stop]


@given(st.lists(st.integers(1, NUM_LAYERS), min_size=NUM_LAYERS, max_size=NUM_LAYERS))
def test_machines_that_come_one_by_one_make_a_chain_as_soon_as_they_can(sizes: list[int]):
    announced: list[LayerRange] = []
    for count, capacity in enumerate(sizes):
        chosen = choose(announced, capacity)
        assert chosen is not None
        announced.append(chosen)
        assert has_chain(announced) == (sum(sizes[: count + 1]) >= NUM_LAYERS)
        if has_chain(announced):
            break


@given(st.integers(1, NUM_LAYERS), st.data())
def test_a_machine_that_left_is_replaced_by_an_equal_one(capacity: int, data: st.DataObject):
    announced: list[LayerRange] = []
    while not has_chain(announced):
        announced.append(choose(announced, capacity) or LayerRange(0, 1))
    lost = data.draw(st.sampled_from(announced))
    rest = [layers for layers in announced if layers != lost]

    chosen = choose(rest, capacity)

    assert has_chain([*rest, *([chosen] if chosen else [])])


# --- examples ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("announced", "capacity", "chosen"),
    [
        ([], 5, "0:5"),
        ([], 20, "0:12"),
        (["0:5"], 5, "5:10"),
        (["0:4", "8:12"], 4, "4:8"),
        # a larger machine starts where another ends, and goes on to where one ends
        (["0:4", "8:12"], 7, "4:8"),
        (["0:4", "8:10", "10:12"], 7, "4:10"),
        # the larger gap first
        (["2:6"], 6, "6:12"),
        # every layer is served, but two shards overlap and make no chain
        (["0:6", "4:12"], 4, "0:4"),
        # the least served layers, in whole ranges of the others where one fits
        (["0:6", "6:12", "0:6"], 6, "6:12"),
        (["0:6", "6:12", "0:6"], 8, "6:12"),
        (["0:6", "6:12", "0:6"], 12, "0:12"),
        (["0:12"], 5, "0:5"),
        (["0:12", "0:5"], 7, "5:12"),
    ],
)
def test_the_range_of_an_example(announced: list[str], capacity: int, chosen: str):
    assert str(choose(parse(*announced), capacity)) == chosen


def test_nothing_is_chosen_where_nothing_fits():
    assert choose(parse("0:6"), 0) is None


def test_the_reason_names_who_serves_what():
    others = [shard(1, LayerRange(0, 4)), shard(2, LayerRange(8, 12)), shard(3, LayerRange(0, 4))]

    text = explain_choice(LayerRange(4, 8), others, NUM_LAYERS, "8 GiB")

    assert text == (
        "layers 4:8: 0:4 is served by 00000001, 00000003, 8:12 is served by 00000002; "
        "4 layers fit in 8 GiB"
    )


def test_the_reason_says_when_there_is_nobody_or_no_gap():
    alone = explain_choice(LayerRange(0, 4), [], NUM_LAYERS, "8 GiB")
    spare = explain_choice(LayerRange(0, 4), [shard(1, LayerRange(0, 12))], NUM_LAYERS, "8 GiB")

    assert alone == "layers 0:4: nobody serves this model yet; 4 layers fit in 8 GiB"
    assert "so every layer is, and these by the fewest; 4 layers fit" in spare
