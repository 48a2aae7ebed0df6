"""A member that follows no rule, in a swarm whose other members go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import trio

from pals.net.control import Close, Control, Failed, Hop, Open, Opened, Refused, encode_control
from pals.net.links import Arrival
from pals.net.node import Node, open_node
from pals.net.wire import (
    CONTROL_SHAPE,
    NO_ROWS,
    FrameShape,
    Lane,
    Outgoing,
    Row,
    Rows,
    buffer_of,
    tokens_shape,
)
from pals.types import PeerId, SessionId
from tests.integration.net.harness import until
from tests.integration.swarm import (
    DEADLINE_S,
    ask,
    make_swarm,
    open_client,
    request,
    served_model,
    start_chain,
)

pytestmark = [pytest.mark.trio, pytest.mark.timeout(120)]

PROMPT = [5, 9, 200, 31]
LAYERS = ("0:3", "3:6")
SESSION = SessionId(b"hostile session!")


@dataclass(slots=True)
class Hostile:
    """A driver that sends what it likes, and notes the control messages that come back."""

    node: Node
    answers: list[tuple[PeerId, Control]] = field(default_factory=list)

    def accepted(self, lane: Lane) -> tuple[FrameShape, ...]:
        return ()

    def on_control(self, peer: PeerId, message: Control) -> None:
        self.answers.append((peer, message))

    def on_rows(self, peer: PeerId, arrival: Arrival) -> None: ...

    def needs(self, peer: PeerId) -> bool:
        return False

    def on_peer_lost(self, peer: PeerId, problem: str) -> None: ...

    def tell(self, shard: Node, message: Control) -> None:
        outgoing = Outgoing(CONTROL_SHAPE, NO_ROWS, (encode_control(message),))
        self.node.links.send(shard.peer_id, Lane.CONTROL, outgoing)

    def open(self, shard: Node, chain: tuple[Hop, ...], prompt_tokens: int) -> None:
        message = Open(session=SESSION, chain=chain, prompt_tokens=prompt_tokens, max_new_tokens=4)
        self.tell(shard, message)

    async def has_answer(self, shard: Node, kind: type[Control]) -> None:
        """Wait until ``shard`` has sent a message of one kind."""
        await until(
            lambda: any(p == shard.peer_id and isinstance(m, kind) for p, m in self.answers),
            deadline_s=DEADLINE_S,
        )


def chain_of(*nodes: Node, addresses: tuple[str, ...] = ()) -> tuple[Hop, ...]:
    return tuple(
        Hop(peer=node.peer_id, start=3 * i, stop=3 * (i + 1), addresses=addresses)
        for i, node in enumerate(nodes)
    )


async def test_driver_that_tells_two_shards_different_prompts_harms_only_its_own_session(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        head, tail = (shard.node for shard in await start_chain(nursery, swarm, *LAYERS))
        async with open_client(swarm) as client, open_node(swarm.options(swarm.peers[2])) as node:
            alone = await (await ask(client, request(PROMPT, count=60))).all_tokens()
            hostile = Hostile(node)
            node.add_role(hostile)
            answer = await ask(client, request(PROMPT, count=60))
            await answer.next_token()
            for shard, prompt_tokens in ((head, 5), (tail, 3)):
                await node.links.ensure(shard.peer_id, shard.host.addresses())
                hostile.open(shard, chain_of(head, tail), prompt_tokens)
                await hostile.has_answer(shard, Opened)
            shape = tokens_shape(served_model(swarm).manifest)
            prompt = Outgoing(
                shape, Rows.of(Row(SESSION, 0, 5)), (buffer_of(np.arange(5, dtype="<i4")),)
            )
            node.links.send(head.peer_id, Lane.PREFILL, prompt)
            await hostile.has_answer(tail, Failed)
            tokens = await answer.all_tokens()
        nursery.cancel_scope.cancel()

    assert tokens == alone


async def test_sessions_to_a_silent_address_leave_no_task_and_no_address_behind(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        (head,) = (shard.node for shard in await start_chain(nursery, swarm, LAYERS[0]))
        async with (
            open_node(swarm.options(swarm.peers[1])) as other,
            open_node(swarm.options(swarm.peers[2])) as node,
        ):
            hostile = Hostile(node)
            node.add_role(hostile)
            await node.links.ensure(head.peer_id, head.host.addresses())
            for one, far in ((other, head), (head, other)):
                await one.host.drop_peer(far.peer_id)
            await until(lambda: other.peer_id not in head.host.connected_peers())
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            silent = f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}"
            tasks = len(head.nursery.child_tasks)
            async with listeners[0]:
                for _ in range(50):
                    hostile.open(head, chain_of(head, other, addresses=(silent,)), 1)
                    hostile.tell(head, Close(session=SESSION))
                hostile.open(head, (*chain_of(head), Hop(peer="stranger", start=3, stop=6)), 1)
                await hostile.has_answer(head, Refused)
                await until(lambda: len(head.nursery.child_tasks) <= tasks)
            await head.host.connect(other.peer_id, other.host.addresses())
        nursery.cancel_scope.cancel()
