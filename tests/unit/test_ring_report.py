from __future__ import annotations

import pytest

from benchmarks.results import Subject
from benchmarks.ring_report import Answer, Round, summarise_decode, summarise_parts
from benchmarks.ring_shard import Steps
from pals.driver.interface import HopReport

SUBJECT = Subject(benchmark="ring", system="pals", setting={"shards": 2}, load=0.0)


def make_round(*arrivals_s: float, decode_s: list[list[float]]) -> Round:
    steps = [Steps(prefill_s=[9.0], decode_s=shard_s) for shard_s in decode_s]
    return Round.of(Answer(list(arrivals_s)), steps)


def test_what_of_a_turn_is_no_step_and_no_delay_is_software() -> None:
    one = make_round(1.0, 1.1, 1.3, decode_s=[[0.02, 0.05], [0.03, 0.06]])
    lines = {line.metric: line for line in summarise_decode(SUBJECT, [one], delay_s=0.01)}
    assert lines["hop_software_ms"].value == pytest.approx(1000 * (0.015 + 0.035) / 2)
    assert lines["fraction_of_ideal"].value == pytest.approx((0.07 / 0.1 + 0.13 / 0.2) / 2)
    assert lines["decode_tokens_per_s"].value == pytest.approx(1 / 0.15)


def test_one_shard_has_no_link_to_itself() -> None:
    one = make_round(1.0, 1.1, decode_s=[[0.09]])
    lines = {line.metric: line for line in summarise_decode(SUBJECT, [one], delay_s=0.1)}
    assert lines["hop_software_ms"].value == pytest.approx(10.0)


def test_a_session_without_a_step_for_each_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        make_round(1.0, 1.1, decode_s=[[0.1], []])


def test_the_delay_is_no_part_of_the_wire() -> None:
    hop = HopReport(
        peer="p",
        layers="0:1",
        steps=1,
        step_ms=5.0,
        queue_ms=0.0,
        handover_ms=0.2,
        codec_ms=0.3,
        wire_ms=25.5,
    )
    lines = summarise_parts(SUBJECT, [hop, hop], delay_s=0.025, crypto_ms=0.1)
    values = {line.metric: line.value for line in lines}
    assert values["hop_wire_ms"] == pytest.approx(0.5)
    assert values["hop_codec_ms"] == pytest.approx(0.2)
    assert values["hop_crypto_ms"] == pytest.approx(0.1)
