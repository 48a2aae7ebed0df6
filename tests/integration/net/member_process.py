"""A light member: host, discovery and an announcer without any model, in its own process.

Arguments: its number, the layers that it announces (`-` for none), addresses of members.
It prints one JSON object a line: what happened, and when in Unix seconds.
"""

from __future__ import annotations

import json
import sys
import time

import trio

from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.net.announcer import Announcer
from pals.net.bootstrap import peer_in
from pals.net.discovery import Discovery
from pals.net.host import open_host
from pals.net.route import find_chain
from pals.types import LayerRange, PeerId
from tests.integration.net.harness import LISTEN
from tests.integration.net.swarms import NUM_LAYERS, SWARM_ID, announcement, numbered

MEMBERS = frozenset(numbered(number).peer_id for number in range(1, 65))


def tell(event: str, **said) -> None:
    print(json.dumps({"event": event, "at": time.time(), **said}), flush=True)  # noqa: T201


def allow(peer: PeerId) -> bool:
    return peer in MEMBERS


async def follow_table(discovery: Discovery) -> None:
    while True:
        announced = discovery.announcements()
        tell("table", peers=sorted(announced), chain=covers(list(announced.values())))
        await discovery.wait_for_change()


def covers(announced: list[Announcement]) -> bool:
    try:
        find_chain(announced, manifest=bytes(32), num_layers=NUM_LAYERS)
    except NoChain:
        return False
    return True


async def main(number: int, layers: str, *known: str) -> None:
    async with (
        open_host(numbered(number), listen=LISTEN, allow=allow) as host,
        trio.open_nursery() as nursery,
    ):
        discovery = Discovery(host, SWARM_ID, allow)
        await nursery.start(discovery.run)
        host.on_disconnect(lambda peer: tell("lost", peer=peer))
        nursery.start_soon(follow_table, discovery)
        for address in known:
            await host.connect(peer_in(address), [address])
        tell("connected", peer=host.peer_id, addresses=host.addresses())
        if layers != "-":
            said = announcement(number, layers=LayerRange.parse(layers), addresses=host.addresses())
            announcer = Announcer(discovery, numbered(number), lambda: said)
            nursery.start_soon(announcer.run, lambda: tell("ready"))
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), *sys.argv[2:])
