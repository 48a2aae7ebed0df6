"""Real shards that are killed, stopped and asked to leave under a streamed answer.

The tests share one swarm of two shards of each range, and use its spares up in their order.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import APIError

from pals.config import Profile
from tests.chaos.process_swarm import (
    ProcessSwarm,
    StreamReader,
    make_endless_checkpoint,
    open_process_swarm,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="starts processes as on Linux"),
    pytest.mark.timeout(180),
]

SPLIT = HEAD, MIDDLE, TAIL = "0:1", "1:2", "2:3"
OPTIONS = ("--threads", "1", "--context", "1024", "--sessions", "2")
MODEL = "tiny"
PROMPT = "Tell me a long story."
MAX_TOKENS = 700
BEGUN = 20
RECOVERY_S = 5.0
"""The promise: the longest silence after a SIGKILL, with a spare shard."""

PATIENT_S, IMPATIENT_S = 90.0, 2.0
"""How long an answer waits for a peer at the two endpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The swarm, two endpoints over it, and the answer that nothing disturbed."""

    swarm: ProcessSwarm
    spare: Profile
    patient: str
    impatient: str
    unfailed: str

    def ask(self, url: str) -> StreamReader:
        """Return a reader whose answer has begun."""
        reader = StreamReader(url, MODEL, PROMPT, MAX_TOKENS)
        reader.wait_for_pieces(BEGUN)
        return reader


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("chaos")
    model = str(make_endless_checkpoint(folder / MODEL, num_layers=3))
    with open_process_swarm(folder, model, cache=shared_cache, options=OPTIONS) as swarm:
        # All join first: a member that is up learns of a new one with its next poll.
        impatient, spare, *members = [swarm.join() for _ in range(8)]
        first, second = (tuple(zip(members[i::2], SPLIT, strict=True)) for i in range(2))
        with ThreadPoolExecutor() as pool:
            urls = [
                pool.submit(swarm.start_endpoint, profile, wait_for_peers_s=wait_s)
                for profile, wait_s in ((swarm.operator, PATIENT_S), (impatient, IMPATIENT_S))
            ]
            swarm.start_shards(*first)
            swarm.start_shards(*second)  # they find the programs that the first ones compiled
        patient_url, impatient_url = (url.result() for url in urls)
        unfailed = StreamReader(patient_url, MODEL, PROMPT, MAX_TOKENS).read()
        yield World(
            swarm=swarm,
            spare=spare,
            patient=patient_url,
            impatient=impatient_url,
            unfailed=unfailed,
        )


@pytest.mark.parametrize("layers", SPLIT)
def test_a_killed_shard_costs_a_pause_and_no_token(world: World, layers: str) -> None:
    reader = world.ask(world.patient)
    victim = world.swarm.active_shard(world.patient, layers)

    victim.running.signal(signal.SIGKILL)

    assert reader.read() == world.unfailed
    assert reader.longest_silence_s <= RECOVERY_S
    assert world.swarm.active_shard(world.patient, layers).peer != victim.peer


def test_without_a_spare_one_answer_ends_with_the_layers_and_one_waits_for_the_peer(
    world: World,
) -> None:
    impatient, patient = world.ask(world.impatient), world.ask(world.patient)
    victim = world.swarm.active_shard(world.patient, MIDDLE)

    victim.running.signal(signal.SIGKILL)
    with pytest.raises(APIError) as caught:
        impatient.read()
    world.swarm.start_shards((victim.profile, MIDDLE))

    assert caught.value.code == "PALS-NO-CHAIN"
    assert f"layers {MIDDLE}" in caught.value.message
    assert world.unfailed.startswith(impatient.text)
    assert patient.read() == world.unfailed


def test_a_shard_that_is_alive_but_silent_is_left(world: World) -> None:
    world.swarm.start_shards((world.spare, HEAD))
    reader = world.ask(world.patient)
    victim = world.swarm.active_shard(world.patient, HEAD)

    victim.running.signal(signal.SIGSTOP)

    try:
        assert reader.read() == world.unfailed
    finally:
        victim.running.signal(signal.SIGCONT)
    assert reader.longest_silence_s <= RECOVERY_S
    assert world.swarm.active_shard(world.patient, HEAD).peer != victim.peer


def test_a_shard_that_is_asked_to_stop_hands_its_sessions_over_and_exits_0(world: World) -> None:
    reader = world.ask(world.patient)
    victim = world.swarm.active_shard(world.patient, HEAD)

    victim.running.signal(signal.SIGTERM)
    left = victim.running.wait(within_s=RECOVERY_S)
    was_running = reader.is_running
    answer = reader.read()

    assert left.status == 0, left.err
    assert was_running, "it left only after the answer was over"
    assert answer == world.unfailed
    assert world.swarm.active_shard(world.patient, HEAD).peer != victim.peer
