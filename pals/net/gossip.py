"""News to all members: one topic of the swarm over GossipSub.

What is here beside py-libp2p 0.8.1's GossipSub works round it: of more than 10 messages a
second it forwards none, a message that makes its handling fail ends the whole service, and
peers that were connected before it started are never told to it. It signs every message
by its origin and checks that; a message goes on only when the receiver has judged it.
"""

# pyright: reportMissingTypeStubs=false
# Reason: parts of libp2p ship no types.

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from pals.net.host import Host
from pals.net.rates import RateLimit
from pals.types import PeerId, SwarmId, short_id

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 << 10
MAX_RPC_BYTES = 256 << 10
HEARTBEAT_S = 1
FORWARDED_PER_S = 500.0
"""Of one neighbour; 512 members that announce once a minute give 9 a second in all."""
FORWARDED_BURST = 2000.0
RESTART_S = 1.0
TRIM_S = 60.0

Judge = Callable[[PeerId, bytes], bool]
"""Takes a message of its origin, and says whether others are to have it too."""


class Gossip:
    """This machine's part in the swarm's topic.

    Args:
        host: The running host.
        swarm_id: Names the topic.
        judge: Called once for each message whose signature is its origin's.
    """

    def __init__(self, host: Host, swarm_id: SwarmId, judge: Judge) -> None:
        self._host = host
        self._judge = judge
        self._topic = f"/pals/{short_id(swarm_id)}/news/1"
        self._running: Pubsub | None = None

    async def run(self) -> None:
        """Take part until cancelled; a fault of the library only starts it anew."""
        while True:
            try:
                await self._run_once()
            except Exception:  # tables and the DHT go on without it
                _log.exception("gossip failed and starts anew")
            await trio.sleep(RESTART_S)

    async def publish(self, message: bytes) -> None:
        """Send a message to all members, as far as the mesh reaches now."""
        if self._running is not None:
            await self._running.publish(self._topic, message)

    async def _run_once(self) -> None:
        router = _make_router()
        pubsub = _Pubsub(self._host, router, self._topic, self._judge)
        try:
            async with background_trio_service(pubsub), background_trio_service(router):
                await pubsub.wait_until_ready()
                await pubsub.subscribe(self._topic)
                self._running = pubsub
                async with trio.open_nursery() as nursery:
                    for peer in self._host.connected_peers():
                        nursery.start_soon(pubsub.ensure_peer_stream, ID.from_base58(peer))
                    nursery.start_soon(pubsub.trim, router)
        finally:
            self._running = None


class _Pubsub(Pubsub):
    """Pubsub that outlives what a message does to it, and that knows one topic."""

    def __init__(self, host: Host, router: GossipSub, topic: str, judge: Judge) -> None:
        super().__init__(
            host.libp2p_host,
            router,
            strict_signing=True,
            max_inbound_rpc_size=MAX_RPC_BYTES,
            max_subscriptions_per_peer=1,
            allowed_topics={topic},
        )
        self._members = host
        self._judge = judge
        self._forwarded = RateLimit(per_s=FORWARDED_PER_S, burst=FORWARDED_BURST)
        self.set_topic_validator(topic, self._validate, is_async_validator=False)

    def _validate(self, _forwarder: ID, message: rpc_pb2.Message) -> bool:
        origin = PeerId(ID(message.from_id).to_base58())
        if len(message.topicIDs) != 1 or len(message.data) > MAX_MESSAGE_BYTES:
            return False
        return self._members.is_member(origin) and self._judge(origin, message.data)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Handle one message; one too many of a neighbour is not even verified."""
        forwarder = PeerId(msg_forwarder.to_base58())
        if not self._forwarded.allows(forwarder, trio.current_time()):
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception:  # it runs as a task of the service, which would end with it
            _log.info("a message of peer %s failed", short_id(forwarder), exc_info=True)

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """Do nothing: the judge has taken the message."""

    async def trim(self, router: GossipSub) -> None:
        """Empty what grows with each message and is never shortened."""
        while True:
            await trio.sleep(TRIM_S)
            router.recent_message_deliveries.clear()
            self._forwarded.purge(trio.current_time())


def _make_router() -> GossipSub:
    return GossipSub(
        protocols=[PROTOCOL_ID_V11],
        degree=6,
        degree_low=4,
        degree_high=12,
        heartbeat_interval=HEARTBEAT_S,
        max_messages_per_topic_per_second=FORWARDED_PER_S,
        # Members are invited, often from one network: no addresses to spread over.
        eclipse_protection_enabled=False,
        adaptive_gossip_enabled=False,
    )
