"""Routing: a chain covers every layer once, is found when it exists, and is the best."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.net.route import Chain, find_chain
from pals.types import LayerRange, PeerId

MANIFEST = b"m" * 32
NUM_LAYERS = 8


def shard(
    start,
    stop,
    *,
    step_ms=1.0,
    dtype="bf16",
    free=1,
    manifest=MANIFEST,
    layers=NUM_LAYERS,
    hashes=None,
):
    return Announcement(
        peer=PeerId(f"peer-{start}-{stop}-{step_ms}-{dtype}"),
        model_id="org/model",
        manifest=manifest,
        layers=LayerRange(start, stop),
        num_layers=layers,
        layer_hashes=tuple(hashes or [b"h" * 16] * (stop - start)),
        dtype=dtype,
        free_tokens=free,
        max_context_tokens=2048,
        step_ms=step_ms,
        addresses=(),
        seq=0,
        expires_at=0.0,
    )


def find(*shards, **options) -> Chain:
    return find_chain(shards, manifest=MANIFEST, num_layers=NUM_LAYERS, **options)


def ranges(chain: Chain) -> list[str]:
    return [str(hop.layers) for hop in chain.hops]


shards_strategy = st.lists(
    st.builds(
        lambda bounds, step_ms, dtype, free: shard(
            min(bounds), max(bounds), step_ms=step_ms, dtype=dtype, free=free
        ),
        st.lists(st.integers(0, NUM_LAYERS), min_size=2, max_size=2, unique=True),
        st.integers(0, 20).map(float),
        st.sampled_from(["bf16", "f32"]),
        st.sampled_from([0, 1]),
    ),
    max_size=6,
)


def every_chain(shards):
    """Enumerate, without any cleverness, every ordered choice that covers the model."""
    found = []

    def extend(hops):
        reached = hops[-1].layers.stop if hops else 0
        if reached == NUM_LAYERS:
            found.append(hops)
        for s in shards:
            if s.layers.start == reached and (not hops or s.dtype == hops[0].dtype):
                extend((*hops, s))

    extend(())
    return found


def cost(hops):
    return (sum(h.free_tokens == 0 for h in hops), len(hops), sum(h.step_ms for h in hops))


@given(shards_strategy)
def test_the_best_chain_is_found_exactly_when_one_exists(shards):
    chains = every_chain(shards)
    try:
        chain = find(*shards)
    except NoChain:
        assert not chains
    else:
        covered = [layer for h in chain.hops for layer in range(h.layers.start, h.layers.stop)]
        assert covered == list(range(NUM_LAYERS))
        assert len({h.dtype for h in chain.hops}) == 1
        assert cost(chain.hops) == min(map(cost, chains))


@given(shards_strategy, st.data())
def test_no_peer_that_failed_is_used_where_a_chain_has_fewer_failures(shards, data):
    peers = sorted({s.peer for s in shards})
    failures = {peer: data.draw(st.integers(0, 2)) for peer in peers}
    try:
        chain = find(*shards, failures=failures)
    except NoChain:
        assert not every_chain(shards), "a suspect is used last, and not left out"
    else:
        used = (sum(failures[h.peer] for h in chain.hops), *cost(chain.hops))
        assert used == min(
            (sum(failures[h.peer] for h in hops), *cost(hops)) for hops in every_chain(shards)
        )


@given(shards_strategy)
def test_serving_the_missing_layers_completes_a_chain_and_no_fewer_would(shards):
    try:
        find(*shards)
    except NoChain as error:
        gaps = [LayerRange.parse(text) for text in str(error.fields["missing"]).split(",")]
    else:
        return
    assert any(
        _is_chain(shards + [shard(g.start, g.stop, dtype=dtype) for g in gaps])
        for dtype in ("bf16", "f32")
    )
    fewer = sum(map(len, gaps)) - 1
    for dtype, layers in product(("bf16", "f32"), _subsets(fewer)):
        singles = [shard(i, i + 1, dtype=dtype) for i in layers]
        assert not _is_chain(shards + singles)


def _is_chain(shards) -> bool:
    return bool(every_chain(shards))


def _subsets(most):
    numbers = product((False, True), repeat=NUM_LAYERS)
    chosen = ([i for i, taken in enumerate(flags) if taken] for flags in numbers)
    return [layers for layers in chosen if len(layers) <= most]


def test_fewer_hops_win_over_a_faster_longer_chain():
    assert ranges(find(shard(0, 4), shard(4, 8), shard(0, 8, step_ms=50))) == ["0:8"]


def test_the_faster_of_two_equal_shards_is_taken():
    chain = find(shard(0, 8, step_ms=2), shard(0, 8, step_ms=1))
    assert chain.step_ms == 1


def test_a_full_shard_is_taken_only_where_nothing_else_serves():
    full, first, second = shard(0, 8, free=0), shard(0, 4), shard(4, 8)
    assert ranges(find(full, first, second)) == ["0:4", "4:8"]
    assert ranges(find(full, first)) == ["0:8"]


def test_a_chain_never_mixes_dtypes_or_models():
    with pytest.raises(NoChain):
        find(shard(0, 4), shard(4, 8, dtype="f32"))
    with pytest.raises(NoChain):
        find(shard(0, 4), shard(4, 8, manifest=b"x" * 32))
    with pytest.raises(NoChain):
        find(shard(0, 4), shard(4, 8, layers=9))


def test_quantised_shards_join_the_chains_of_bf16():
    chain = find(shard(0, 4, dtype="int8"), shard(4, 6), shard(6, 8, dtype="int4"))

    assert [hop.dtype for hop in chain.hops] == ["int8", "bf16", "int4"]


def test_shards_whose_layers_come_from_other_bytes_share_no_chain():
    good, bad = [b"g" * 16] * 8, [b"g" * 16] * 7 + [b"b" * 16]
    one = shard(0, 8, step_ms=3, hashes=good)
    other = shard(4, 8, step_ms=1, hashes=bad[4:])
    head = shard(0, 4, step_ms=1, hashes=good[:4])

    assert find(head, one, other, shard(2, 8, hashes=good[2:])) == find(head, one)


def test_an_even_disagreement_is_settled_alike_in_every_order():
    one, other = shard(0, 8, step_ms=1, hashes=[b"a" * 16] * 8), shard(0, 8, step_ms=2)

    assert find(one, other) == find(other, one) == find(other)


def test_a_chosen_dtype_is_kept():
    both = (shard(0, 8, step_ms=1), shard(0, 8, step_ms=9, dtype="f32"))
    assert find(*both).head.dtype == "bf16"
    assert find(*both, dtype="f32").head.dtype == "f32"


@pytest.mark.parametrize(
    ("shards", "missing"),
    [
        ([], "0:8"),
        ([(0, 2), (4, 8)], "2:4"),
        ([(2, 4), (6, 8)], "0:2,4:6"),
        ([(0, 3), (2, 8)], "0:2"),
        ([(0, 4)], "4:8"),
    ],
)
def test_the_error_names_the_missing_layers(shards, missing):
    with pytest.raises(NoChain) as caught:
        find(*(shard(a, b) for a, b in shards), model="org/model")
    assert caught.value.fields == {"model": "org/model", "missing": missing}


def test_a_chain_knows_its_ends_and_its_context():
    chain = find(shard(0, 4), shard(4, 8))
    assert (str(chain.head.layers), str(chain.tail.layers)) == ("0:4", "4:8")
    assert chain.max_context_tokens == 2048
    assert str(chain).count("->") == 1


def test_a_chain_with_room_for_the_prompt_comes_before_one_that_has_less():
    roomy, cramped = shard(0, NUM_LAYERS, step_ms=9.0, free=101), shard(0, NUM_LAYERS, free=100)
    assert find(roomy, cramped, tokens=101).hops == (roomy,)
    assert find(roomy, cramped, tokens=100).hops == (cramped,)


def test_a_chain_without_room_is_taken_where_there_is_no_other():
    """What is announced is some seconds old, and a session may wait for its room."""
    cramped = shard(0, NUM_LAYERS, free=0)
    assert find(cramped, tokens=4096).hops == (cramped,)
