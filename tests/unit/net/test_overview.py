"""What `pals status` says of the shards of a swarm, and of what is wrong with them."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from pals.net.announce import LAYER_HASH_BYTES, Announcement
from pals.net.overview import ModelLines, SwarmReport, describe_models
from pals.types import LayerRange, PeerId

MANIFEST = bytes(range(32))


def shard(peer: str, layers: str, **changes: object) -> Announcement:
    held = LayerRange.parse(layers)
    made = Announcement(
        peer=PeerId(peer),
        model_id="friends/model",
        manifest=MANIFEST,
        layers=held,
        num_layers=6,
        layer_hashes=tuple(
            layer.to_bytes(LAYER_HASH_BYTES, "big") for layer in range(held.start, held.stop)
        ),
        dtype="bf16",
        free_tokens=100,
        max_context_tokens=512,
        step_ms=1.5,
        addresses=("/ip4/127.0.0.1/tcp/1",),
        seq=1,
        expires_at=0.0,
    )
    return replace(made, **changes)


def describe(*shards: Announcement) -> ModelLines:
    (model,) = describe_models(shards, {})
    return model


def test_a_whole_chain_has_no_problem_and_is_named_head_first() -> None:
    model = describe(shard("b", "3:6"), shard("a", "0:3"))

    assert (model.model, model.num_layers) == ("friends/model", 6)
    assert model.chain == ("a", "b")
    assert [line.layers for line in model.shards] == ["0:3", "3:6"]
    assert model.problems == ()


def test_layers_that_nobody_serves_are_named_with_the_command_that_serves_them() -> None:
    (problem,) = describe(shard("a", "0:3")).problems

    assert "3:6" in problem.text
    assert problem.hint == "start one with `pals shard friends/model --layers 3:6`"


def test_ranges_that_do_not_meet_are_told_from_layers_that_are_missing() -> None:
    model = describe(shard("a", "0:4"), shard("b", "3:6"))

    (problem,) = model.problems
    assert "the ranges do not meet" in problem.text
    assert model.chain == ()


def test_a_shard_that_leaves_is_listed_and_counts_for_no_chain() -> None:
    model = describe(shard("a", "0:3"), shard("b", "3:6", state="draining"))

    assert [line.state for line in model.shards] == ["serving", "draining"]
    assert model.chain == ()
    assert model.problems


def test_a_full_shard_that_another_can_take_the_place_of_is_no_problem() -> None:
    full = shard("b", "3:6", free_tokens=0)

    (problem,) = describe(shard("a", "0:3"), full).problems
    assert "layers 3:6" in problem.text
    assert "new sessions wait" in problem.text
    assert describe(shard("a", "0:3"), full, shard("c", "3:6")).problems == ()


def test_a_shard_with_other_bytes_than_most_is_named() -> None:
    odd = shard("c", "3:6", layer_hashes=tuple(bytes(LAYER_HASH_BYTES) for _ in range(3)))
    two = [shard("a", "0:6"), shard("b", "0:6")]

    model = describe(*two, odd)

    (problem,) = model.problems
    assert "peer c holds other bytes" in problem.text
    assert len(model.shards) == 3


def test_models_are_told_apart_by_their_files_and_not_by_what_peers_call_them() -> None:
    same = shard("b", "3:6", model_id="other/name")
    another = shard("c", "0:6", manifest=bytes(32), model_id="friends/model")

    models = describe_models([shard("a", "0:3"), same, another], {})

    assert sorted(len(model.shards) for model in models) == [1, 2]
    assert {model.manifest for model in models} == {MANIFEST.hex()[:16], "0" * 16}


def test_the_way_to_a_shard_is_shown_where_there_is_one() -> None:
    (model,) = describe_models([shard("a", "0:3"), shard("b", "3:6")], {PeerId("a"): "relayed"})

    assert [line.path for line in model.shards] == ["relayed", ""]


@pytest.mark.parametrize("count", [0, 1, 300])
def test_a_report_of_any_size_is_read_back(count: int) -> None:
    models = describe_models([shard(f"peer-{i}", "0:6") for i in range(count)], {})
    report = SwarmReport(swarm_id="00", peer="me", models=models)

    assert msgspec.json.decode(msgspec.json.encode(report), type=SwarmReport) == report
