"""What is fuzzed: every decoder of bytes that anybody may send.

A target takes any bytes. It returns whether they were let in, which they are when what they
mean holds together, and are not when the decoder refused them with its own error. It raises
on everything else.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np
from msgspec.structs import replace

from pals.errors import InvalidFrame, InvalidInvite, InvalidRecord, SwarmFull
from pals.net.announce import (
    MAX_RECORD_BYTES,
    Announcement,
    open_announcement,
    sign_announcement,
)
from pals.net.control import (
    Close,
    Fork,
    Hop,
    Open,
    Opened,
    Preempted,
    Sampler,
    decode_control,
    encode_control,
    history_of,
    split_names,
)
from pals.net.nat.messages import Ask, decode_message
from pals.net.scores import pack_scores, unpack_scores
from pals.net.suspicion import Notice, decode_notice, encode_notice
from pals.net.wire import (
    CONTROL_SHAPE,
    HEADER_BYTES,
    KEY_SHAPE,
    MAX_BODY_BYTES,
    ROW_BYTES,
    SCORED_WIDTH,
    FrameHead,
    Lane,
    LinkAddress,
    check_header,
    hidden_shape,
    pack_header,
    pack_rows,
    parse_body,
    sampled_shape,
    scored_shape,
    tokens_shape,
)
from pals.swarm.freshness import decode_freshness, open_freshness, sign_freshness
from pals.swarm.hints import open_hint, sign_hint
from pals.swarm.identity import SIGNATURE_BYTES
from pals.swarm.invite import Invite
from pals.swarm.news import News, decode_news, encode_news
from pals.swarm.records import (
    AdminRecord,
    Genesis,
    Join,
    Leave,
    Record,
    decode_entry,
    decode_record,
    encode,
    sign_by,
    sign_join,
    sign_leave,
)
from pals.swarm.requests import open_request, sign_request
from pals.swarm.roster import MAX_MEMBERS, Roster, apply, next_entry
from pals.swarm.sealing import SEALED_BYTES, open_secret, seal_secret
from pals.types import LayerRange, SessionId
from tests.fuzz.heads import head_seeds, run_head
from tests.unit.swarm.chains import NOW, SECRET, Chain, exchange, identity
from tests.unit.text.answers.reading import format_of, joined, read
from tests.unit.text.answers.transcripts import TRANSCRIPTS

OPERATOR, MEMBER, INVITED = identity(1), identity(3), identity(4)
PEER = MEMBER.peer_id


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder.

    Attributes:
        run: Takes any bytes and returns whether they were let in.
        seeds: Valid inputs to begin with.
        skip: Bytes before what is msgpack; None when nothing is.
    """

    run: Callable[[bytes], bool]
    seeds: Callable[[], tuple[bytes, ...]]
    skip: int | None = None


@cache
def chain() -> Chain:
    """Return a swarm with a member and an open invite, whose keys the fuzzer holds."""
    made = Chain()
    made.add_peer(MEMBER)
    made.append(made.certificate(invite(), max_uses=3))
    return made


@cache
def invite() -> Invite:
    return Chain().invite()


@cache
def roster() -> Roster:
    return chain().roster()


# --- invites ---------------------------------------------------------------------------


def run_invite(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    try:
        parsed = Invite.parse(text)
    except InvalidInvite:
        return False
    assert parsed.to_text() == text.strip()
    return True


def invite_seeds() -> tuple[bytes, ...]:
    return (invite().to_text().encode(),)


# --- records, entries, freshness, requests, envelopes ---------------------------------------


def run_record(data: bytes) -> bool:
    """Decode a record and reduce it, as it is and with the signatures that it lacks."""
    try:
        record = decode_record(data)
    except InvalidRecord:
        return False
    assert encode(record) == data
    for candidate in (data, encode(_signed(record))):
        entry = next_entry(roster(), candidate, received_at=NOW)
        try:
            after = apply(roster(), entry)
        except (InvalidRecord, SwarmFull):
            continue
        assert after.seq == roster().seq + 1
        assert after.swarm_id == roster().swarm_id
        assert len(after.live) <= MAX_MEMBERS
        assert after.head != roster().head
    return True


def _signed(record: Record) -> Record:
    """Return ``record`` with signatures of the keys that the fuzzer holds."""
    match record:
        case Genesis():
            return record
        case Join():
            fitting = replace(record, invite=invite().signing_key.public_key)
            return sign_join(fitting, invite=invite().signing_key, peer=INVITED)
        case Leave():
            return sign_leave(record, peer=MEMBER)
        case _:
            admin: AdminRecord = record
            return sign_by(replace(admin, swarm_id=chain().swarm_id), OPERATOR)


def record_seeds() -> tuple[bytes, ...]:
    swarm = chain()
    joined = roster().live[PEER].joined
    records = (decode_entry(entry).record for entry in swarm.entries)
    return (
        *records,
        swarm.remove(MEMBER, joined=joined),
        swarm.leave(MEMBER, joined=joined),
        swarm.join(invite().signing_key, INVITED),
        swarm.epoch(1),
        swarm.revoke(invite()),
        swarm.appoint(MEMBER.public_key),
    )


def run_entry(data: bytes) -> bool:
    try:
        entry = decode_entry(data)
        assert encode(entry) == data
        apply(roster(), entry)
    except (InvalidRecord, SwarmFull):
        return False
    return True


def entry_seeds() -> tuple[bytes, ...]:
    swarm = chain()
    return (swarm.entry(swarm.epoch(1)), swarm.entry(swarm.revoke(invite())))


def run_freshness(data: bytes) -> bool:
    try:
        word = decode_freshness(data)
        open_freshness(data, roster(), now_unix=NOW)
    except InvalidRecord:
        return False
    assert (word.seq, word.head) == (roster().seq, roster().head)
    return True


def freshness_seeds() -> tuple[bytes, ...]:
    return (sign_freshness(OPERATOR, roster(), at=NOW),)


def run_hint(data: bytes) -> bool:
    try:
        hint = open_hint(data, swarm_id=chain().swarm_id, now_unix=NOW)
    except InvalidRecord:
        return False
    assert hint.key == MEMBER.public_key
    return True


def hint_seeds() -> tuple[bytes, ...]:
    addresses = ("/ip4/192.0.2.1/tcp/4001", "/dns4/pals.example/tcp/4001")
    hint = sign_hint(MEMBER, swarm_id=chain().swarm_id, addresses=addresses, issued_at=NOW)
    return (hint,)


REQUEST = {"method": "POST", "path": "/v1/swarms/ab/records", "body": b"{}"}


def run_request(data: bytes) -> bool:
    """Take the proof as bytes, and the same bytes as the header's text."""
    let_in = False
    for value in (base64.urlsafe_b64encode(data).decode(), data.decode("latin-1")):
        try:
            proof = open_request(value, now_unix=NOW, **REQUEST)
        except InvalidRecord:
            continue
        assert proof.signer == OPERATOR.public_key
        let_in = True
    return let_in


def request_seeds() -> tuple[bytes, ...]:
    value = sign_request(OPERATOR, at=NOW, **REQUEST)
    return base64.urlsafe_b64decode(value), value.encode()


def run_envelope(data: bytes) -> bool:
    try:
        opened = open_secret(data, identity=MEMBER, swarm_id=chain().swarm_id, epoch=1)
    except InvalidRecord:
        return False
    assert len(data) == SEALED_BYTES
    assert opened == SECRET.reveal()
    return True


def envelope_seeds() -> tuple[bytes, ...]:
    sealed = seal_secret(
        SECRET.reveal(), exchange=exchange(MEMBER), swarm_id=chain().swarm_id, epoch=1, peer=PEER
    )
    return (sealed,)


# --- frames ----------------------------------------------------------------------------

ADDRESS = LinkAddress(swarm=b"s" * 16, epoch=3, link=b"l" * 16)
MANIFEST = b"m" * 32
SCORED_BYTES = 4 * SCORED_WIDTH
SHAPES = {
    Lane.CONTROL: (CONTROL_SHAPE, KEY_SHAPE),
    Lane.DECODE: (
        tokens_shape(MANIFEST),
        hidden_shape(MANIFEST, 3, "bf16", 8),
        sampled_shape(MANIFEST, 6),
        scored_shape(MANIFEST, 6),
    ),
}


def run_frame(data: bytes) -> bool:
    """Take a header, and after it a decrypted body of the size that the header states."""
    let_in = False
    for lane, shapes in SHAPES.items():
        header, body = data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), data[HEADER_BYTES:]
        try:
            head = check_header(
                header, peer=PEER, address=ADDRESS, lane=lane, counter=7, accepted=shapes
            )
            assert 0 < head.body_bytes <= MAX_BODY_BYTES
            sizes = (head.row_count, head.body_bytes)
            assert header == pack_header(ADDRESS, lane, 7, head.shape, *sizes)
            if len(body) >= head.body_bytes:
                _check_body(lane, head, body[: head.body_bytes])
        except InvalidFrame:
            continue
        let_in = True
    return let_in


def run_body(data: bytes) -> bool:
    """Take a row table and a payload under every shape that has rows."""
    let_in = False
    for rows in {1, 2, len(data) // ROW_BYTES or 1}:
        for shape in SHAPES[Lane.DECODE]:
            if len(data) >= rows * ROW_BYTES:
                try:
                    _check_body(Lane.DECODE, FrameHead(shape, rows, len(data)), data)
                except InvalidFrame:
                    continue
                let_in = True
    return let_in


def _check_body(lane: Lane, head: FrameHead, body: bytes) -> None:
    frame = parse_body(PEER, lane, head, body)
    assert pack_rows(frame.rows) + bytes(frame.payload) == body
    assert sum(frame.rows.num_tokens) * head.shape.token_bytes in (0, len(frame.payload))


def frame_seeds() -> tuple[bytes, ...]:
    made: list[bytes] = []
    for lane, shapes in SHAPES.items():
        for shape in shapes:
            count = 2 if lane is Lane.DECODE else 0
            body = body_seeds()[0] if count else b"\x01"
            body = body[: count * ROW_BYTES].ljust(
                count * ROW_BYTES + max(1, count * shape.token_bytes), b"\1"
            )
            made.append(pack_header(ADDRESS, lane, 7, shape, count, len(body)) + body)
    return tuple(made)


def body_seeds() -> tuple[bytes, ...]:
    rows = b"".join(
        session * 16 + (5).to_bytes(4, "big") + (1).to_bytes(2, "big") + bytes(2)
        for session in (b"a", b"b")
    )
    return rows + bytes(8), rows + bytes(32)


# --- announcements and what members tell each other ------------------------------------------


def run_announcement(data: bytes) -> bool:
    """Open a record as it is, and when nothing but its signature is wrong, with a good one."""
    let_in = False
    for record in (data, _resigned(data)):
        try:
            opened = open_announcement(record, now_unix=NOW, is_member=lambda _: True)
        except InvalidRecord:
            continue
        assert len(record) <= MAX_RECORD_BYTES
        assert 0 < len(opened.layers) == len(opened.layer_hashes)
        assert opened.layers.stop <= opened.num_layers
        let_in = True
    return let_in


def _resigned(data: bytes) -> bytes:
    body = data[SIGNATURE_BYTES:]
    return MEMBER.sign(b"pals/1 announcement\x00" + body) + body


def announcement_seeds() -> tuple[bytes, ...]:
    announcement = Announcement(
        peer=PEER,
        model_id="org/model",
        manifest=MANIFEST,
        layers=LayerRange(0, 2),
        num_layers=3,
        layer_hashes=(bytes(16),) * 2,
        dtype="bf16",
        free_tokens=4096,
        max_context_tokens=2048,
        step_ms=1.5,
        addresses=("/ip4/192.0.2.1/tcp/4001",),
        seq=1,
        expires_at=NOW + 100.0,
    )
    return (sign_announcement(MEMBER, announcement),)


def run_control(data: bytes) -> bool:
    try:
        message = decode_control(PEER, memoryview(data))
    except InvalidFrame:
        return False
    assert decode_control(PEER, memoryview(encode_control(message))) == message
    if isinstance(message, Open | Close):
        assert b"".join(split_names(message.names)) == message.names
    if isinstance(message, Open | Fork) and message.sampler is not None:
        sampler = message.sampler
        assert Sampler.of(sampler.to_sampling()).to_sampling() == sampler.to_sampling()
        assert sampler.answered <= len(history_of(sampler))
    return True


def control_seeds() -> tuple[bytes, ...]:
    session = SessionId(bytes(16))
    hop = Hop(peer=PEER, start=0, stop=3)
    sampler = Sampler(top_k=3, logit_bias=((1, 0.5),), logprobs=2, history=bytes(8), answered=1)
    opening = Open(session=session, chain=(hop,), prompt_tokens=3, max_new_tokens=4)
    replay = replace(opening, names=bytes(32), replaces=session, deadline_s=9.0, sampler=sampler)
    forking = Fork(session=session, child=bytes(16), position=2, sampler=sampler)
    others = Opened(session=session, held=64), Preempted(session=session)
    closing = Close(session=session, names=bytes(16))
    return tuple(map(encode_control, (opening, replay, forking, *others, closing)))


def run_scores(data: bytes) -> bool:
    """Take the payload of a scored frame; what is let in says the same when it is sent on."""
    try:
        scores = unpack_scores(PEER, data[: len(data) // SCORED_BYTES * SCORED_BYTES])
    except InvalidFrame:
        return False
    for score in scores:
        token, logprob = np.array([score.token], "<i4"), np.array([score.logprob], "<f4")
        ids = np.array([[top for top, _ in score.top]], "<i4")
        packed = pack_scores(token, logprob, ids, np.array([[at for _, at in score.top]], "<f4"))
        assert unpack_scores(PEER, packed.tobytes()) == [score]
    return True


def scores_seeds() -> tuple[bytes, ...]:
    logprobs = np.array([[-0.5, -1.5]], np.float32)
    return (pack_scores(np.array([7]), logprobs[:, 0], np.array([[7, 8]]), logprobs).tobytes(),)


def run_notice(data: bytes) -> bool:
    try:
        notice = decode_notice(data)
    except InvalidRecord:
        return False
    assert encode_notice(notice) == data
    return True


def run_news(data: bytes) -> bool:
    try:
        news = decode_news(data)
    except InvalidRecord:
        return False
    assert encode_news(news) == data
    return True


def news_seeds() -> tuple[bytes, ...]:
    word = sign_freshness(OPERATOR, roster(), at=NOW)
    removal = chain().remove(MEMBER, joined=roster().live[PEER].joined)
    known = {"seq": roster().seq, "head": roster().head, "epoch": 0}
    full = News(**known, freshness=word, removals=(removal,))
    return encode_news(News(**known)), encode_news(full)


def run_meeting(data: bytes) -> bool:
    try:
        decode_message(PEER, data)
    except InvalidFrame:
        return False
    return True


# --- answers -----------------------------------------------------------------------------

MAX_ANSWER_BYTES = 300


def run_answer(data: bytes) -> bool:
    """Read what a tail may make a model seem to have written: family, cut, text."""
    if len(data) < 2:
        return False
    transcripts = list(TRANSCRIPTS.values())
    transcript, step = transcripts[data[0] % len(transcripts)], 1 + data[1] % 16
    answers = format_of(transcript.family, transcript.thinking, transcript.special)
    text = data[2 : 2 + MAX_ANSWER_BYTES].decode("utf-8", "replace")
    parts = [text[at : at + step] for at in range(0, len(text), step)]
    read_whole = joined(read(answers, [text], prompt_tail=transcript.prompt_tail))
    assert joined(read(answers, parts, prompt_tail=transcript.prompt_tail)) == read_whole
    shown = [part[1] for part in read_whole if part[0] in ("content", "reasoning")]
    assert not any(mark in told for mark in transcript.special for told in shown)
    return True


def answer_seeds() -> tuple[bytes, ...]:
    texts = [transcript.text.encode() for transcript in TRANSCRIPTS.values()]
    return tuple(bytes([number, 3]) + text for number, text in enumerate(texts))


TARGETS = {
    "invite": Target(run_invite, invite_seeds),
    "record": Target(run_record, record_seeds, skip=0),
    "frame": Target(run_frame, frame_seeds),
    "announcement": Target(run_announcement, announcement_seeds, skip=SIGNATURE_BYTES),
    "body": Target(run_body, body_seeds),
    "entry": Target(run_entry, entry_seeds, skip=0),
    "freshness": Target(run_freshness, freshness_seeds, skip=0),
    "hint": Target(run_hint, hint_seeds, skip=0),
    "request": Target(run_request, request_seeds, skip=0),
    "envelope": Target(run_envelope, envelope_seeds),
    "control": Target(run_control, control_seeds, skip=0),
    "scores": Target(run_scores, scores_seeds),
    "notice": Target(run_notice, lambda: (encode_notice(Notice(PEER, 3)),), skip=0),
    "news": Target(run_news, news_seeds, skip=0),
    "head": Target(run_head, head_seeds),
    "answer": Target(run_answer, answer_seeds),
    "meeting": Target(run_meeting, lambda: (msgspec.msgpack.encode(Ask(ports=(4001,))),), skip=0),
}
