"""What compiled programs depend on, and how a difference reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pals.engine.kinds import differences, machine_kind, shard_kind
from pals.types import EngineLimits, LayerRange, Quantization, ShardSpec
from tests.unit.models.tiny_configs import tiny_config

LLAMA = tiny_config("llama")
LAYERS = LayerRange(0, 2)
SPEC = ShardSpec(dtype="f32", limits=EngineLimits(kv_bytes=1 << 20))


def limited(**changes: int) -> ShardSpec:
    return replace(SPEC, limits=replace(SPEC.limits, **changes))


def test_a_machine_is_of_its_own_kind():
    assert differences(machine_kind(), machine_kind()) == []


def test_the_versions_and_the_processor_make_a_kind_of_machine():
    kind = machine_kind()

    assert {"jax", "jaxlib", "platform", "device", "processor", "threads"} <= kind.keys()
    assert "processor features" in kind


def test_other_threads_make_another_kind_of_machine(monkeypatch: pytest.MonkeyPatch):
    before = machine_kind()
    monkeypatch.setenv("NPROC", "77")

    assert differences(before, machine_kind()) == [
        f"threads: `{before['threads']}` there, `77` here"
    ]


@pytest.mark.parametrize(
    "other",
    [
        shard_kind(LLAMA, LayerRange(1, 2), SPEC),
        shard_kind(LLAMA, LAYERS, replace(SPEC, dtype="bf16")),
        shard_kind(LLAMA, LAYERS, replace(SPEC, quantization=Quantization(group_size=64))),
        shard_kind(LLAMA, LAYERS, replace(SPEC, devices=2)),
        shard_kind(LLAMA, LAYERS, limited(max_rows=3)),
        shard_kind(LLAMA, LAYERS, limited(max_context_tokens=64)),
        shard_kind(LLAMA, LAYERS, limited(page_tokens=16)),
        shard_kind(LLAMA, LAYERS, limited(kv_bytes=2 << 20)),
        shard_kind(replace(LLAMA, vocab_size=LLAMA.vocab_size + 1), LAYERS, SPEC),
    ],
)
def test_what_changes_the_shapes_makes_another_kind_of_shard(other: dict[str, str]):
    assert len(differences(other, shard_kind(LLAMA, LAYERS, SPEC))) == 1


def test_how_many_sessions_are_let_in_changes_no_shapes():
    assert shard_kind(LLAMA, LAYERS, limited(max_sessions=3)) == shard_kind(LLAMA, LAYERS, SPEC)


def test_a_difference_names_both_values():
    assert differences({"jaxlib": "1"}, {"jaxlib": "2"}) == ["jaxlib: `1` there, `2` here"]


def test_what_only_one_side_states_is_a_difference():
    assert differences({"a": "1"}, {"b": "2"}) == [
        "b: `not stated` there, `2` here",
        "a: `1` there, `not stated` here",
    ]


def test_features_of_the_processor_are_compared_one_by_one():
    (text,) = differences({"processor features": "avx avx2"}, {"processor features": "avx fma"})

    assert text == "processor features: without avx2 and with fma here"


def test_long_values_are_cut():
    (text,) = differences({"device": "x" * 500}, {"device": ""})

    assert text == f"device: `{'x' * 80}…` there, `nothing` here"
