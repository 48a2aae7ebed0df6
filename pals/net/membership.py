"""The membership backend seen from a member: requests, the first roster, the poller.

What comes back is never trusted: entries are verified against the swarm id that the
profile pins, and an answer that does not verify changes nothing. Runs on trio.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import httpx
import msgspec
import trio

from pals.config import Profile, read_private, write_private
from pals.errors import (
    BackendRefused,
    BackendUnreachable,
    InvalidConfig,
    InviteRefused,
    PalsError,
    ProfileMissing,
    RosterRefused,
    RosterUnavailable,
)
from pals.swarm.allowlist import AllowList
from pals.swarm.identity import Identity
from pals.swarm.messages import (
    BackendMessage,
    EntriesMessage,
    EntryMessage,
    HintMessage,
    HintsMessage,
    ProblemMessage,
    RecordMessage,
    RedeemMessage,
)
from pals.swarm.requests import HEADER as AUTHORIZATION_HEADER
from pals.swarm.requests import sign_request
from pals.swarm.roster import Roster, verify_chain
from pals.types import PeerId, SwarmId

REQUEST_DEADLINE_S = 10.0
MAX_RESPONSE_BYTES = 12 << 20
MAX_BACKOFF_S = 30.0
MAX_COUNTED_FAILURES = 8
DRAIN_S = 60.0
EXPIRY_INTERVAL_S = 5.0
POLL_SPREAD = (0.9, 1.1)
NOT_MODIFIED = 304

_log = logging.getLogger(__name__)

_Reply = TypeVar("_Reply", EntryMessage, EntriesMessage, HintsMessage, BackendMessage)

OnChange = Callable[[frozenset[PeerId], frozenset[PeerId]], None]
"""Called with the peers that were removed and those that were added."""


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

    async def fetch_records(
        self, swarm_id: SwarmId, *, etag: str | None = None
    ) -> tuple[tuple[bytes, ...], str] | None:
        """Return the chain, unverified, and its tag; None when it is still that of ``etag``."""
        path = f"/v1/swarms/{swarm_id.hex()}/records"
        response, body = await self._request("GET", path, etag=etag)
        if response.status_code == NOT_MODIFIED:
            return None
        return self._decode(body, EntriesMessage).entries, response.headers.get("etag", "")

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
        etag: str | None = None,
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
            trust_env=False, follow_redirects=False, timeout=self._deadline_s
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


async def fetch_roster(
    client: MembershipClient, swarm_id: SwarmId, *, known: Roster | None = None
) -> tuple[Roster, tuple[bytes, ...], str]:
    """Return the backend's roster, verified, with its entries and tag.

    Raises:
        BackendUnreachable: There is no proper answer.
        BackendRefused: The answer is an error.
        InvalidRecord: A record does not verify.
        RosterRefused: It is older than, or departs from, ``known``.
    """
    fetched = await client.fetch_records(swarm_id)
    if fetched is None:
        raise RosterRefused(problem="an answer without a list")
    entries, etag = fetched
    return await _verify_in_thread(swarm_id, entries, known), entries, etag


async def _verify_in_thread(
    swarm_id: SwarmId, entries: tuple[bytes, ...], known: Roster | None
) -> Roster:
    """Verify a chain where even the longest one holds up no session."""
    return await trio.to_thread.run_sync(partial(verify_chain, swarm_id, entries, known=known))


async def first_roster(
    client: MembershipClient, swarm_id: SwarmId, allow_list: AllowList, profile: Profile
) -> None:
    """Fill the allow-list from the backend, else from the last list that was verified.

    Raises:
        RosterUnavailable: There is neither, or the saved one is too old.
    """
    saved = load_roster(profile, swarm_id)
    if saved is not None:
        roster, age_s = saved
        allow_list.update(roster, trio.current_time(), age_s=age_s)
    try:
        roster, entries, _ = await fetch_roster(client, swarm_id, known=allow_list.roster)
    except PalsError as error:
        if allow_list.state(trio.current_time()) in ("none", "expired"):
            raise RosterUnavailable(url=client.url, problem=str(error)) from error
        _log.warning("using the last verified member list: %s", error)
        return
    allow_list.update(roster, trio.current_time())
    _keep(lambda: save_roster(profile, swarm_id, entries))


async def poll_roster(
    client: MembershipClient,
    swarm_id: SwarmId,
    allow_list: AllowList,
    profile: Profile,
    *,
    interval: float,
    on_change: OnChange,
    rng: random.Random | None = None,
) -> None:
    """Keep the allow-list fresh for ever.

    A backend that is unreachable or lies leaves the list as it is, so that it ages; it is
    asked again sooner, with a back-off of at most `MAX_BACKOFF_S`.

    Args:
        client: The backend to ask.
        swarm_id: The swarm, as the profile pins it.
        allow_list: Filled by `first_roster`.
        profile: Where the verified list is kept.
        interval: Seconds between two polls, varied by a tenth.
        on_change: Called after the list changed.
        rng: Source of the variation.
    """
    rng = rng or random.SystemRandom()
    etag: str | None = None
    failures = 0
    while True:
        delay_s = min(2.0**failures, MAX_BACKOFF_S) if failures else interval
        await trio.sleep(delay_s * rng.uniform(*POLL_SPREAD))
        try:
            etag = await _poll_once(client, swarm_id, allow_list, profile, etag, on_change)
        except PalsError as error:
            # Once for each time it fails, not every half minute.
            _log.log(
                logging.DEBUG if failures else logging.WARNING,
                "the member list could not be renewed: %s",
                error,
            )
            failures, etag = min(failures + 1, MAX_COUNTED_FAILURES), None
        else:
            if failures:
                _log.info("the member list is renewed again")
            failures = 0


async def cut_when_expired(allow_list: AllowList, cut: Callable[[], None]) -> None:
    """Call ``cut`` again and again while the list has been expired for `DRAIN_S`.

    New connections are refused from the first second; what runs may end in that time.
    A renewed list ends that by itself.
    """
    warned = False
    while True:
        expired_s = allow_list.expired_s(trio.current_time())
        if expired_s > 0 and not warned:
            _log.warning("the member list expired: nobody may connect until it is renewed")
        warned = expired_s > 0
        if expired_s >= DRAIN_S:
            cut()
        await trio.sleep(EXPIRY_INTERVAL_S)


async def _poll_once(
    client: MembershipClient,
    swarm_id: SwarmId,
    allow_list: AllowList,
    profile: Profile,
    etag: str | None,
    on_change: OnChange,
) -> str | None:
    """Renew the list once and return the tag to ask with next time."""
    before = allow_list.roster
    fetched = await client.fetch_records(swarm_id, etag=etag)
    if fetched is None and before is not None:
        allow_list.update(before, trio.current_time())
        _keep(lambda: os.utime(profile.roster_path(swarm_id.hex())))
        return etag
    if fetched is None:
        raise RosterRefused(problem="an answer without a list")
    entries, etag = fetched
    roster = await _verify_in_thread(swarm_id, entries, before)
    allow_list.update(roster, trio.current_time())
    members = before.members if before is not None else frozenset[PeerId]()
    if members != roster.members:
        on_change(members - roster.members, roster.members - members)
    _keep(lambda: save_roster(profile, swarm_id, entries))
    return etag


def _keep(write: Callable[[], None]) -> None:
    """Write, or log why not: a full disk must not stop a removal from taking effect."""
    try:
        write()
    except OSError as error:
        _log.warning("the verified member list could not be saved: %s", error.strerror)


def save_roster(profile: Profile, swarm_id: SwarmId, entries: tuple[bytes, ...]) -> None:
    """Keep verified entries; the file's time is when they were last verified."""
    path = profile.roster_path(swarm_id.hex())
    write_private(path, msgspec.msgpack.encode(EntriesMessage(entries)))


def load_roster(profile: Profile, swarm_id: SwarmId) -> tuple[Roster, float] | None:
    """Return the saved roster, verified anew, and its age in seconds; None without a file.

    Raises:
        InvalidConfig: The file is damaged.
        ProfileExposed: Others could have changed it.
    """
    path = profile.roster_path(swarm_id.hex())
    try:
        data = read_private(path, max_bytes=MAX_RESPONSE_BYTES)
        modified_at = path.stat().st_mtime
    except (ProfileMissing, FileNotFoundError):
        return None
    try:
        entries = msgspec.msgpack.decode(data, type=EntriesMessage).entries
        roster = verify_chain(swarm_id, entries)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, PalsError) as error:
        raise InvalidConfig(
            source=path,
            problem=f"the saved member list is damaged: {error}",
            advice="delete it; it is fetched again from the backend",
        ) from error
    # A time in the future is as doubtful as one in the past: a clock was changed.
    return roster, abs(time.time() - modified_at)
