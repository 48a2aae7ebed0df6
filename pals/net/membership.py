"""The membership backend seen from a member: requests, the first list, the list on disk.

What comes back is never trusted: entries are verified against the swarm id that the
profile pins, and an answer that does not verify changes nothing. Runs on trio.
"""

from __future__ import annotations

import base64
import binascii
import logging
import math
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated, TypeVar

import httpx
import msgspec
import trio

from pals.config import Profile, read_private, write_private
from pals.errors import (
    BackendRefused,
    BackendUnreachable,
    InvalidConfig,
    InvalidRecord,
    InviteRefused,
    PalsError,
    ProfileMissing,
    RosterRefused,
    RosterUnavailable,
)
from pals.net.backend import Backend, FetchedRecords
from pals.swarm.allowlist import AllowList
from pals.swarm.freshness import HEADER as FRESHNESS_HEADER
from pals.swarm.freshness import MAX_FRESHNESS_BYTES, open_freshness, open_word
from pals.swarm.identity import Identity
from pals.swarm.ledger import Held
from pals.swarm.messages import (
    BackendMessage,
    EntriesMessage,
    EntryBytes,
    EntryMessage,
    HintMessage,
    HintsMessage,
    ProblemMessage,
    RecordBytes,
    RecordMessage,
    RedeemMessage,
)
from pals.swarm.records import Remove, decode_record
from pals.swarm.requests import HEADER as AUTHORIZATION_HEADER
from pals.swarm.requests import sign_request
from pals.swarm.roster import MAX_ENTRIES, MAX_MEMBERS, Roster, verify_chain
from pals.types import SwarmId

REQUEST_DEADLINE_S = 10.0
MAX_RESPONSE_BYTES = 12 << 20
MAX_FRESHNESS_CHARS = 512
NOT_MODIFIED = 304

_log = logging.getLogger(__name__)

_Reply = TypeVar("_Reply", EntryMessage, EntriesMessage, HintsMessage, BackendMessage)


class MembershipClient:
    """Requests to one backend; holds no connection between them.

    Every method raises `BackendUnreachable` when no proper answer comes within the
    deadline and `BackendRefused` when the answer is an error.
    """

    def __init__(self, url: str, *, deadline_s: float = REQUEST_DEADLINE_S) -> None:
        self.url = url.rstrip("/")
        self._deadline_s = deadline_s

    async def create_swarm(self, genesis: bytes) -> bytes:
        """Store a genesis and return its entry."""
        _, body = await self._request("POST", "/v1/swarms", RecordMessage(genesis))
        return self._decode(body, EntryMessage).entry

    async def fetch_key(self) -> bytes:
        """Return the key with which the backend signs how new its lists are."""
        _, body = await self._request("GET", "/v1/backend")
        return self._decode(body, BackendMessage).key

    async def append(
        self, swarm_id: SwarmId, record: bytes, *, signer: Identity | None = None
    ) -> bytes:
        """Store a record and return its entry.

        Args:
            swarm_id: The swarm.
            record: The signed record.
            signer: The administrator who asks for it; None for a member that leaves.
        """
        path = f"/v1/swarms/{swarm_id.hex()}/records"
        _, body = await self._request("POST", path, RecordMessage(record), signer=signer)
        return self._decode(body, EntryMessage).entry

    async def redeem(self, swarm_id: SwarmId, auth: bytes, join: bytes) -> bytes:
        """Join by an invite and return the entry; may be repeated after a lost reply.

        Raises:
            InviteRefused: The invite is unknown, spent, closed or expired.
        """
        path = f"/v1/swarms/{swarm_id.hex()}/redeem"
        _, body = await self._request("POST", path, RedeemMessage(auth, join))
        return self._decode(body, EntryMessage).entry

    async def fetch_records(self, swarm_id: SwarmId, *, etag: str = "") -> FetchedRecords:
        """Return the chain, unless it is still that of ``etag``."""
        path = f"/v1/swarms/{swarm_id.hex()}/records"
        response, body = await self._request("GET", path, etag=etag)
        is_same = response.status_code == NOT_MODIFIED
        return FetchedRecords(
            entries=None if is_same else self._decode(body, EntriesMessage).entries,
            etag=response.headers.get("etag", ""),
            freshness=_freshness(response.headers.get(FRESHNESS_HEADER, "")),
        )

    async def put_hint(self, swarm_id: SwarmId, hint: bytes) -> None:
        """Leave this machine's address hint."""
        await self._request("PUT", f"/v1/swarms/{swarm_id.hex()}/hints", HintMessage(hint))

    async def fetch_hints(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        """Return the members' address hints, unverified."""
        _, body = await self._request("GET", f"/v1/swarms/{swarm_id.hex()}/hints")
        return self._decode(body, HintsMessage).hints

    async def _request(
        self,
        method: str,
        path: str,
        message: msgspec.Struct | None = None,
        *,
        etag: str = "",
        signer: Identity | None = None,
    ) -> tuple[httpx.Response, bytes]:
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if etag:
            headers["if-none-match"] = etag
        content = None
        if message is not None:
            headers["content-type"] = "application/json"
            content = msgspec.json.encode(message)
        if signer is not None:
            at = int(time.time())
            headers[AUTHORIZATION_HEADER] = sign_request(
                signer, method=method, path=path, body=content or b"", at=at
            )
        try:
            with trio.fail_after(self._deadline_s):
                response, body = await self._exchange(method, path, headers, content)
        except trio.TooSlowError:
            raise self._unreachable(f"no answer within {self._deadline_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(str(error) or type(error).__name__) from error
        if not (response.is_success or (etag and response.status_code == NOT_MODIFIED)):
            raise self._refusal(response.status_code, body)
        return response, body

    async def _exchange(
        self, method: str, path: str, headers: dict[str, str], content: bytes | None
    ) -> tuple[httpx.Response, bytes]:
        # Proxy variables and redirects would let others choose where a token goes.
        client = httpx.AsyncClient(
            verify=_trusted(), trust_env=False, follow_redirects=False, timeout=self._deadline_s
        )
        async with (
            client,
            client.stream(method, self.url + path, headers=headers, content=content) as response,
        ):
            body = bytearray()
            # Cancelled, not left: httpx's nested generators close only from the inside.
            with trio.CancelScope() as reading:
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_RESPONSE_BYTES:
                        reading.cancel()
            if len(body) > MAX_RESPONSE_BYTES:
                raise self._unreachable(f"its answer is over {MAX_RESPONSE_BYTES} bytes long")
            return response, bytes(body)

    def _decode(self, body: bytes, kind: type[_Reply]) -> _Reply:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise self._unreachable("the answer is not that of a membership backend") from None

    def _refusal(self, status: int, body: bytes) -> PalsError:
        try:
            problem = msgspec.json.decode(body, type=ProblemMessage).error
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return BackendRefused(url=self.url, status=status, problem="no explanation")
        if problem.code == InviteRefused.code:
            return InviteRefused()
        return BackendRefused(url=self.url, status=status, problem=problem.message[:500])

    def _unreachable(self, problem: str) -> BackendUnreachable:
        return BackendUnreachable(url=self.url, problem=problem)


def _freshness(value: str) -> bytes:
    """Return the word in a header; empty when it is none, which renews nothing."""
    try:
        return base64.b64decode(value[:MAX_FRESHNESS_CHARS], altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""


@cache
def _trusted() -> ssl.SSLContext:
    """Return the certificates to trust, read once: it takes longer than a request."""
    return httpx.create_ssl_context(trust_env=False)


async def fetch_roster(
    client: Backend, swarm_id: SwarmId, *, known: Roster | None = None
) -> tuple[Roster, tuple[bytes, ...], bytes]:
    """Return the backend's roster, verified, with its entries and its word.

    The word is empty unless it is an authority's and says that this list is the newest.

    Raises:
        BackendUnreachable: There is no proper answer.
        BackendRefused: The answer is an error.
        InvalidRecord: A record does not verify.
        RosterRefused: It is older than, or departs from, ``known``.
    """
    fetched = await client.fetch_records(swarm_id)
    if fetched.entries is None:
        raise RosterRefused(problem="an answer without a list")
    roster = await verify_in_thread(swarm_id, fetched.entries, known)
    try:
        open_freshness(fetched.freshness, roster, now_unix=time.time())
    except InvalidRecord as error:
        _log.warning("the backend's member list is taken, but not as the newest: %s", error)
        return roster, fetched.entries, b""
    return roster, fetched.entries, fetched.freshness


async def fetch_list(client: Backend, swarm_id: SwarmId, saved: SavedList | None) -> SavedList:
    """Return the backend's list, verified as the continuation of the saved one.

    Raises:
        BackendUnreachable: There is no proper answer.
        BackendRefused: The answer is an error.
        InvalidRecord: A record does not verify.
        RosterRefused: It is older than, or departs from, the saved one.
    """
    known = None if saved is None else saved.roster
    roster, entries, word = await fetch_roster(client, swarm_id, known=known)
    before = Held(entries=()) if saved is None else saved.held
    held = replace(before, entries=entries, word=word or before.word)
    return SavedList(roster=roster, held=held, age_s=age_of(held.word, roster, time.time()))


async def verify_in_thread(
    swarm_id: SwarmId, entries: tuple[bytes, ...], known: Roster | None
) -> Roster:
    """Verify a chain where even the longest one holds up no session."""
    return await trio.to_thread.run_sync(partial(verify_chain, swarm_id, entries, known=known))


async def first_roster(
    client: Backend,
    swarm_id: SwarmId,
    allow_list: AllowList,
    profile: Profile,
    *,
    ask: AskMembers | None = None,
) -> Held:
    """Fill the allow-list from the backend, else from the last list that was verified.

    Args:
        client: The backend.
        swarm_id: The swarm.
        allow_list: Empty.
        profile: Where the list is kept.
        ask: Renews a list that is not in force any more by asking members that are on it.

    Returns:
        What is known of the list now, and is kept in the profile.

    Raises:
        RosterUnavailable: There is neither, or no word that it is the newest that is young
            enough.
    """
    saved = load_saved(profile, swarm_id)
    if saved is not None:
        _fill(allow_list, saved)
    problem: PalsError | None = None
    try:
        saved = await fetch_list(client, swarm_id, saved)
        _fill(allow_list, saved)
    except PalsError as error:
        problem = error
    is_saved = problem is not None
    if saved is not None and ask is not None and _is_out_of_force(allow_list):
        renewed = await ask(saved, allow_list)
        if renewed is not None:
            saved, is_saved = renewed, False
            _fill(allow_list, saved)
    if saved is None or _is_out_of_force(allow_list):
        raise _unavailable(client, saved, problem) from problem
    if problem is not None:
        _log.warning("using the last verified member list: %s", problem)
    if not is_saved:
        keep_list(profile, swarm_id, saved.held)
    return saved.held


def _is_out_of_force(allow_list: AllowList) -> bool:
    return allow_list.state(trio.current_time()) in ("none", "expired")


def _fill(allow_list: AllowList, saved: SavedList) -> None:
    """Take a list, and the removals that it does not hold; the alarms come with polling."""
    allow_list.update(saved.roster, trio.current_time(), age_s=saved.age_s)
    for data in saved.held.removals:
        record = decode_record(data)
        if isinstance(record, Remove):
            with suppress(InvalidRecord):  # of an administrator who is none any more
                allow_list.deny(record)


def _unavailable(
    client: Backend, saved: SavedList | None, problem: PalsError | None
) -> RosterUnavailable:
    """Say which list there is, and why it is not in force."""
    text = str(problem)
    if problem is None:
        text = "nobody with authority said lately that the backend's is the newest"
    elif saved is not None and saved.age_s is None:
        text = f"nothing shows how old the saved one is, and {problem}"
    elif saved is not None and saved.age_s is not None:
        text = f"the saved one was the newest {saved.age_s / 3600:.0f} h ago, and {problem}"
    return RosterUnavailable(url=client.url, problem=text)


# --- the list on disk ----------------------------------------------------------------


class _ListFile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The form of ``roster.bin``."""

    entries: Annotated[tuple[EntryBytes, ...], msgspec.Meta(max_length=MAX_ENTRIES)]
    word: Annotated[bytes, msgspec.Meta(max_length=MAX_FRESHNESS_BYTES)]
    removals: Annotated[tuple[RecordBytes, ...], msgspec.Meta(max_length=MAX_MEMBERS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedList:
    """The list of a profile, verified anew.

    Attributes:
        roster: What the entries come to.
        held: What the file holds.
        age_s: Seconds since somebody with authority called it the newest; None when that
            is not known.
    """

    roster: Roster
    held: Held
    age_s: float | None


AskMembers = Callable[[SavedList, AllowList], Awaitable[SavedList | None]]
"""Returns a later list, or a younger word about this one; None when nobody has any."""


def keep_list(profile: Profile, swarm_id: SwarmId, held: Held) -> None:
    """Save a verified list, or log why not: a full disk must not undo a removal."""
    try:
        _write_list(profile, swarm_id, held)
    except OSError as error:
        _log.warning("the verified member list could not be saved: %s", error.strerror)


def save_roster(
    profile: Profile, swarm_id: SwarmId, entries: tuple[bytes, ...], word: bytes = b""
) -> None:
    """Keep verified entries and the word about them, and what the file holds beside them."""
    saved = load_saved(profile, swarm_id)
    before = Held(entries=()) if saved is None else saved.held
    _write_list(profile, swarm_id, replace(before, entries=entries, word=word or before.word))


def _write_list(profile: Profile, swarm_id: SwarmId, held: Held) -> None:
    file = _ListFile(held.entries, held.word, held.removals)
    write_private(profile.roster_path(swarm_id.hex()), msgspec.msgpack.encode(file))


def load_roster(profile: Profile, swarm_id: SwarmId) -> tuple[Roster, float] | None:
    """Return the saved roster, verified anew, and its age in seconds; None without a file.

    Raises:
        InvalidConfig: The file is damaged.
        ProfileExposed: Others could have changed it.
    """
    saved = load_saved(profile, swarm_id)
    if saved is None:
        return None
    return saved.roster, math.inf if saved.age_s is None else saved.age_s


def load_saved(
    profile: Profile, swarm_id: SwarmId, *, known: Roster | None = None
) -> SavedList | None:
    """Return the saved list, verified anew; None without a file.

    Args:
        profile: Whose list.
        swarm_id: The swarm.
        known: A roster verified before, which spares the work; used where it fits.

    Raises:
        InvalidConfig: The file is damaged.
        ProfileExposed: Others could have changed it.
    """
    path = profile.roster_path(swarm_id.hex())
    try:
        data = read_private(path, max_bytes=MAX_RESPONSE_BYTES)
    except ProfileMissing:
        return None
    try:
        file = msgspec.msgpack.decode(data, type=_ListFile)
        roster = _verify_saved(swarm_id, file.entries, known)
        for removal in file.removals:
            decode_record(removal)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, PalsError) as error:
        raise InvalidConfig(
            source=path,
            problem=f"the saved member list is damaged: {error}",
            advice="delete it; it is fetched again from the backend",
        ) from error
    held = Held(entries=file.entries, word=file.word, removals=file.removals)
    return SavedList(roster=roster, held=held, age_s=age_of(file.word, roster, time.time()))


def _verify_saved(swarm_id: SwarmId, entries: tuple[bytes, ...], known: Roster | None) -> Roster:
    with suppress(RosterRefused):
        return verify_chain(swarm_id, entries, known=known)
    return verify_chain(swarm_id, entries)


def age_of(word: bytes, roster: Roster, now_unix: float) -> float | None:
    """Return how old a list is by a word about it, or about an earlier state of it.

    Whoever holds more than what was the newest then holds what was known then. A word from
    the future shows that a clock is wrong, and says nothing.
    """
    try:
        said = open_word(word, roster, now_unix=now_unix)
    except InvalidRecord:
        return None
    if said.seq > roster.seq or roster.heads[said.seq] != said.head:
        return None
    return said.age_s(now_unix)
