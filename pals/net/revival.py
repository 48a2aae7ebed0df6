"""A list that expired, renewed by asking members that are on it when the backend gives nothing.

Whoever hands over entries and a word about them need not be believed: both are signed. Only
the operator's word counts here. Any other authority of the old list may have been dismissed
in what that list lacks, and could keep this machine on it for ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import trio

from pals.config import KnownPeer, Profile
from pals.errors import InvalidRecord, PalsError
from pals.net.host import Host, open_caller
from pals.net.membership import SavedList, verify_in_thread
from pals.net.roster_exchange import ask_roster
from pals.swarm.allowlist import AllowList
from pals.swarm.freshness import open_freshness
from pals.swarm.identity import Identity
from pals.swarm.news import News
from pals.swarm.records import decode_entry
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

ASKED = 8
ASK_S = 10.0


async def ask_members(
    profile: Profile, identity: Identity, saved: SavedList, allow_list: AllowList
) -> SavedList | None:
    """Return a list that the operator lately called the newest, from a member of the saved one.

    Members are dialled where they were met before, by a host that listens nowhere.

    Args:
        profile: Which remembers them.
        identity: This machine.
        saved: The list that is not in force any more.
        allow_list: Filled with it; it says who is on it and for how long a list is in force.
    """
    swarm_id = saved.roster.swarm_id.hex()
    try:
        known = await trio.to_thread.run_sync(profile.load_known_peers, swarm_id)
    except PalsError as error:
        _log.warning("no member is asked for the list: %s", error)
        return None
    wanted = allow_list.listed - {identity.peer_id}
    asked = [peer for peer in known if peer.peer in wanted][:ASKED]
    async with open_caller(identity, allow=wanted.__contains__) as caller:
        return await _first_answer(caller, asked, saved, allow_list.max_stale_s)


async def _first_answer(
    caller: Host, asked: Sequence[KnownPeer], saved: SavedList, max_stale_s: float
) -> SavedList | None:
    """Ask all at the same time, and return the first list that is in force."""
    found: list[SavedList] = []

    async def ask(member: KnownPeer) -> None:
        peer = PeerId(member.peer)
        try:
            await caller.connect(peer, member.addresses)
            news, entries = await ask_roster(caller, peer, _news(saved))
            renewed = await _renew(saved, news, entries)
        except PalsError as error:
            _log.info("the list of peer %s: %s", short_id(peer), error)
            return
        if renewed.age_s is not None and renewed.age_s <= max_stale_s:
            found.append(renewed)
            nursery.cancel_scope.cancel()

    with trio.move_on_after(ASK_S):
        async with trio.open_nursery() as nursery:
            for member in asked:
                nursery.start_soon(ask, member)
    return found[0] if found else None


def _news(saved: SavedList) -> News:
    return News(seq=saved.roster.seq, head=saved.roster.head, epoch=saved.roster.epoch)


async def _renew(saved: SavedList, news: News, after: tuple[bytes, ...]) -> SavedList:
    """Return the saved list with what a member knows more.

    Raises:
        InvalidRecord: An entry is none, or the operator did not say that it is the newest.
        RosterRefused: The entries do not follow the saved ones.
    """
    entries, roster = saved.held.entries, saved.roster
    if after:
        entries = entries[: decode_entry(after[0]).seq] + after
        roster = await verify_in_thread(roster.swarm_id, entries, roster)
    now_unix = time.time()
    word = open_freshness(news.freshness, roster, now_unix=now_unix)
    if word.signer != roster.genesis.operator:
        raise InvalidRecord(kind="freshness", problem="it is not the operator's")
    held = replace(saved.held, entries=entries, word=news.freshness)
    return SavedList(roster=roster, held=held, age_s=word.age_s(now_unix))
