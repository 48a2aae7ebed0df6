"""Bodies of the membership service's HTTP messages; msgspec writes bytes as base64."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from pals.swarm.hints import MAX_HINT_BYTES
from pals.swarm.records import MAX_ENTRY_BYTES, MAX_RECORD_BYTES, Key
from pals.swarm.roster import MAX_ENTRIES, MAX_MEMBERS

RecordBytes = Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]
EntryBytes = Annotated[bytes, Meta(max_length=MAX_ENTRY_BYTES)]
HintBytes = Annotated[bytes, Meta(max_length=MAX_HINT_BYTES)]
Auth = Annotated[bytes, Meta(min_length=32, max_length=32)]


class RecordMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record to store: a genesis, a certificate or a removal."""

    record: RecordBytes


class RedeemMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A join and what proves the right to use its invite."""

    auth: Auth
    join: RecordBytes


class HintMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One member's address hint."""

    hint: HintBytes


class EntryMessage(msgspec.Struct, frozen=True):
    """The entry that a record became."""

    entry: EntryBytes


class EntriesMessage(msgspec.Struct, frozen=True):
    """A swarm's whole chain; also the form of ``roster.bin``."""

    entries: Annotated[tuple[EntryBytes, ...], Meta(max_length=MAX_ENTRIES)]


class HintsMessage(msgspec.Struct, frozen=True):
    """The address hints of a swarm's members."""

    hints: Annotated[tuple[HintBytes, ...], Meta(max_length=MAX_MEMBERS)]


class BackendMessage(msgspec.Struct, frozen=True):
    """Which key a backend signs with how new its lists are."""

    key: Key


class Problem(msgspec.Struct, frozen=True):
    """What went wrong: a code for programs, a message for people."""

    code: str
    message: str


class ProblemMessage(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: Problem
