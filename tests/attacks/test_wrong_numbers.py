"""P14 on a real chain: a member that sends numbers that are none, and a swarm that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import trio

from pals.driver.sessions import SessionClient
from pals.engine.work import StepOutput, StepResult
from pals.net.control import Control, Failed
from pals.net.ring import ShardSession
from pals.net.shard_service import ShardService
from pals.net.wire import FrameShape
from pals.types import PeerId
from tests.integration.swarm import (
    RunningShard,
    ask,
    make_swarm,
    open_client,
    request,
    start_chain,
)

pytestmark = [pytest.mark.trio, pytest.mark.timeout(120)]

HEAD, MIDDLE, TAIL = LAYERS = ("0:1", "1:2", "2:3")
WANTED = request((5, 9, 200, 31), count=16)
LIES = [
    ("prompt", float("nan")),
    ("answer", float("nan")),
    ("answer", float("-inf")),
    ("answer", 2.0**31),
]
"""When a member begins to lie, and what it puts in place of its hidden states."""


@dataclass
class Liar:
    """The first of some shards to send on states of one kind sends others, from then on."""

    begins: str
    wrong: float
    peer: PeerId | None = None

    def take_over(self, shards: Sequence[RunningShard]) -> None:
        for shard in shards:
            outbound = service_of(shard)._outbound
            honest = type(outbound).send_hidden.__get__(outbound)
            outbound.send_hidden = partial(self._send, shard.node.peer_id, honest)

    def _send(
        self,
        sender: PeerId,
        honest: partial[None],
        shape: FrameShape,
        result: StepResult,
        sessions: Sequence[ShardSession | None],
    ) -> None:
        is_prompt = result.rows[0].kind == "prefill"
        if self.peer is None and is_prompt == (self.begins == "prompt"):
            self.peer = sender
        if sender == self.peer:
            assert result.output is not None
            assert result.output.hidden is not None
            hidden = result.output.hidden.copy()
            hidden[-1, -1] = self.wrong
            result = replace(result, output=StepOutput(hidden=hidden, sampled=None))
        honest(shape, result, sessions)


def service_of(shard: RunningShard) -> ShardService:
    (service,) = (r for r in shard.node._dispatch.roles if isinstance(r, ShardService))
    return service


def listen_to(client: SessionClient) -> list[tuple[PeerId, Failed]]:
    """Return a list that gets what shards tell a driver of sessions that failed."""
    heard: list[tuple[PeerId, Failed]] = []
    take = client.on_control

    def on_control(peer: PeerId, message: Control) -> None:
        if isinstance(message, Failed):
            heard.append((peer, message))
        take(peer, message)

    client.on_control = on_control
    return heard


async def test_p14_the_receiver_names_the_liar_and_a_spare_shard_goes_on_with_the_same_text(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path, count=4, num_layers=3) as swarm:
        shards = await start_chain(nursery, swarm, *LAYERS, MIDDLE)
        tail, spares = shards[2], (shards[1], shards[3])
        async with open_client(swarm) as client:
            honest = await (await ask(client, WANTED)).all_tokens()
        for begins, wrong in LIES:
            liar = Liar(begins, wrong)
            liar.take_over(spares)
            async with open_client(swarm, wait_for_peers_s=30.0) as client:
                heard = listen_to(client)
                answer = await ask(client, WANTED)
                assert await answer.all_tokens() == honest
            told = {(peer, failed.code, failed.peer) for peer, failed in heard}
            assert told == {(tail.node.peer_id, "PALS-ACTIVATION-INVALID", liar.peer)}
            assert liar.peer in heard[0][1].problem
            assert answer.session.chain.hops[1].peer in {s.node.peer_id for s in spares}
            assert answer.session.chain.hops[1].peer != liar.peer
        nursery.cancel_scope.cancel()
