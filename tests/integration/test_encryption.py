"""What the links encrypt, tapped below them and inside Noise, at the libp2p stream.

One recorder writes down every byte that any member of a real swarm writes, before and
after it enters another epoch of the swarm secret. A second implementation of the
encryption then opens them all, given the swarm secrets and the links' ephemeral keys, and
not one of them without.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import trio

from pals import config
from pals.models.snapshot import Snapshot
from pals.net.links import Links
from pals.types import Dtype, PeerId
from tests.integration import decryptor
from tests.integration.decryptor import (
    DECODE,
    FLAG_LAST,
    KIND_CONTROL,
    KIND_HIDDEN,
    KIND_KEY,
    KIND_SAMPLED,
    KIND_TOKENS,
    PREFILL,
    Agreement,
    Link,
    LinkKeys,
    OpenFrame,
    Role,
    Secrets,
    read_links,
)
from tests.integration.net.harness import until
from tests.integration.swarm import (
    DEADLINE_S,
    RunningShard,
    TestSwarm,
    ask,
    make_swarm,
    open_client,
    request,
    start_chain,
)
from tests.integration.wiretap import Wiretap, flip
from tests.vectors import make_keys

pytestmark = pytest.mark.timeout(180)  # whoever asks first waits for the shards to compile

LAYERS = ("0:1", "1:2", "2:3")
PROMPTS = (tuple(range(40, 77)), (5, 9, 200, 31))
ANSWER_TOKENS = 8
HIDDEN_SIZE = 64
NEXT_SECRET = bytes(range(100, 132))
ROLES: tuple[Role, Role] = ("initiator", "responder")
EPHEMERAL_BITS = range(3, 254, 5)
"""X25519 clamps the bits 0 to 2, 254 and 255 of a private key: those change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """Everything that went over the streams while one driver asked two questions."""

    dtype: Dtype
    swarm_id: bytes
    epoch: int
    secrets: dict[int, bytes]
    manifest: bytes
    driver: PeerId
    shards: tuple[PeerId, ...]
    answers: tuple[list[int], ...]
    receipts: tuple[str, ...]
    tap: Wiretap
    links: list[Link]
    frames: list[OpenFrame]
    key_frames: list[OpenFrame]

    @property
    def recorded(self) -> bytes:
        return b"".join(data for end in self.tap.ends for data in end.writes)

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each session went through the layers: all but the last."""
        return [len(p) + len(a) - 1 for p, a in zip(PROMPTS, self.answers, strict=True)]

    @property
    def sessions(self) -> list[bytes]:
        """The ids of the two sessions, in the order of their prompts."""
        prompts = self.between(self.driver, self.shards[0], PREFILL)
        return [row.session for frame in prompts for row in frame.rows]

    def between(self, sender: PeerId, receiver: PeerId, lane: int) -> list[OpenFrame]:
        """Return the frames of one lane in one direction, in order."""
        return [
            frame
            for frame in self.frames
            if (frame.wire.sender, frame.wire.receiver) == (sender, receiver)
            and frame.wire.lane == lane
        ]


@pytest.fixture(scope="module", params=["bf16", "f32"])
def capture(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_cache: Path
) -> Capture:
    folder = tmp_path_factory.mktemp(request.param)
    # Made before any test's own environment, so it has to keep off the user's by itself.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(config.CONFIG_DIR_VARIABLE, str(folder / "config"))
        patch.setenv(config.CACHE_DIR_VARIABLE, str(shared_cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        tap = Wiretap()
        tap.install(patch)
        return trio.run(record, folder, request.param, tap)


async def record(folder: Path, dtype: Dtype, tap: Wiretap) -> Capture:
    """Run a swarm of three shards and a driver under a recorder."""
    async with (
        make_swarm(folder, num_layers=len(LAYERS)) as swarm,
        trio.open_nursery() as nursery,
    ):
        make = tap.make_ephemeral
        shards = await start_chain(nursery, swarm, *LAYERS, dtype=dtype, make_ephemeral=make)
        async with open_client(swarm, make_ephemeral=make) as client:
            asked = [await ask(client, request(p, count=ANSWER_TOKENS)) for p in PROMPTS]
            await asked[0].next_token()
            members = [client._node.links, *(shard.node.links for shard in shards)]
            await enter_next_epoch(swarm, members)
            answers = [await answer.all_tokens() for answer in asked]
            await until(tap.all_sent_is_written, deadline_s=DEADLINE_S)
        nursery.cancel_scope.cancel()
    return build_capture(swarm, shards, answers, tap, dtype)


async def enter_next_epoch(swarm: TestSwarm, members: Sequence[Links]) -> None:
    """Tell every member a new secret while it runs, and wait for each end of each link."""
    epoch = swarm.options(swarm.operator).entry.epoch + 1
    for links in members:
        links.rekey(epoch, NEXT_SECRET)
    ends = [live.link for links in members for live in links._all_links()]
    await until(lambda: {link.epoch for link in ends} == {epoch}, deadline_s=DEADLINE_S)


def build_capture(
    swarm: TestSwarm,
    shards: list[RunningShard],
    answers: list[list[int]],
    tap: Wiretap,
    dtype: Dtype,
) -> Capture:
    options = swarm.options(swarm.operator)
    epoch = options.entry.epoch
    epochs = {epoch: options.secret.reveal(), epoch + 1: NEXT_SECRET}
    swarm_id = bytes(options.swarm_id)
    links = read_links(tap.streams(), Secrets(swarm_id, epochs, tap.private_keys))
    opened = [link.open(frame) for link in links for frame in link.frames]
    assert None not in opened
    return Capture(
        dtype=dtype,
        swarm_id=swarm_id,
        epoch=epoch,
        secrets=epochs,
        manifest=Snapshot.open(swarm.checkpoint, "tapped").manifest,
        driver=options.identity.peer_id,
        shards=tuple(shard.node.peer_id for shard in shards),
        answers=tuple(answers),
        receipts=tuple(
            profile.load_swarm().peer_credential for profile in (swarm.operator, *swarm.peers)
        ),
        tap=tap,
        links=links,
        frames=[f for f in opened if f is not None and f.header.kind != KIND_KEY],
        key_frames=[f for f in opened if f is not None and f.header.kind == KIND_KEY],
    )


# --- the second implementation -------------------------------------------------------


def test_the_decryptor_imports_nothing_of_pals() -> None:
    tree = ast.parse(Path(decryptor.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]

    assert {"hashlib", "hmac", "struct"} <= set(names)
    assert not [name for name in names if name.startswith(("pals", "tests"))]


def test_the_decryptor_derives_the_published_vectors() -> None:
    v = json.loads(make_keys.FILE.read_text())
    prk = decryptor.derive_link_prk(
        bytes.fromhex(v["swarm_id"]),
        v["epoch"],
        bytes.fromhex(v["secret"]),
        bytes.fromhex(v["shared_dh"]),
        (bytes.fromhex(v["initiator_share"]), bytes.fromhex(v["responder_share"])),
        (v["initiator"], v["responder"]),
    )
    assert prk.hex() == v["link_prk"]
    assert decryptor.expand(prk, b"link id", length=16).hex() == v["link_id"]
    assert decryptor.expand(prk, b"confirm", b"initiator").hex() == v["confirm_initiator"]


# --- with the keys -------------------------------------------------------------------


def test_every_byte_is_a_handshake_or_a_frame(capture: Capture) -> None:
    head, middle, tail = capture.shards
    handshakes = [link.agreements[0] for link in capture.links]
    made = Counter((handshake.initiator, handshake.responder) for handshake in handshakes)
    handshake_bytes = len(capture.links) * (79 + 111 + 32 + 2 * 17)
    every_frame = capture.frames + capture.key_frames
    frame_bytes = sum(len(f.wire.aad) + len(f.wire.sealed) for f in every_frame)

    assert made == Counter(
        [(capture.driver, shard) for shard in capture.shards]
        + [(head, middle), (middle, tail), (tail, head)]
    )
    assert handshake_bytes + frame_bytes == len(capture.recorded)


def test_every_link_enters_the_next_epoch_once_while_frames_go_on(capture: Capture) -> None:
    for link in capture.links:
        epochs = [agreement.offer.epoch for agreement in link.agreements]
        assert epochs == [capture.epoch, capture.epoch + 1]
        switches = [f.wire for f in capture.key_frames if f.body[0] == decryptor.KEY_SWITCH]
        own = [f for f in switches if f in link.frames]
        peers = (link.agreements[0].initiator, link.agreements[0].responder)
        assert {(f.sender, f.lane) for f in own} == {(p, lane) for p in peers for lane in range(3)}
        assert len(own) == 2 * 3
    assert {f.wire.generation for f in capture.frames if f.wire.lane == DECODE} == {0, 1}


def test_both_sides_confirm_the_keys_of_the_second_implementation(capture: Capture) -> None:
    for link in capture.links:
        for keys, agreement in zip(link.keys, link.agreements, strict=True):
            secret = capture.secrets[agreement.offer.epoch]
            from_responder = keys_of(capture, agreement, "responder", secret)
            assert keys.confirmations == agreement.confirmations
            assert from_responder.prk == keys.prk


def test_headers_name_the_link_and_count_from_zero(capture: Capture) -> None:
    for link in capture.links:
        for frame in link.frames:
            header = frame.header
            assert (header.magic, header.version, header.codec) == (b"PALS", 3, 0)
            epoch = capture.epoch + frame.generation
            assert (header.swarm, header.epoch) == (capture.swarm_id[:16], epoch)
            assert header.link == link.keys[frame.generation].link_id
            assert (header.lane, header.counter) == (frame.lane, frame.number)
            control = header.kind in (KIND_CONTROL, KIND_KEY)
            assert header.manifest == (bytes(32) if control else capture.manifest)


def test_the_frames_are_exactly_those_that_the_members_sent(capture: Capture) -> None:
    sent: dict[tuple[str, str, int], list[object]] = {}
    for s in capture.tap.sent:
        rows = [(r.session, r.position, r.num_tokens, r.flags) for r in s.outgoing.rows]
        content = (int(s.outgoing.shape.kind), rows, b"".join(s.outgoing.payload))
        sent.setdefault((s.sender, s.receiver, int(s.lane)), []).append(content)
    opened: dict[tuple[str, str, int], list[object]] = {}
    for f in capture.frames:
        rows = [(r.session, r.position, r.num_tokens, r.flags) for r in f.rows]
        content = (f.header.kind, rows, f.payload)
        opened.setdefault((f.wire.sender, f.wire.receiver, f.wire.lane), []).append(content)

    assert opened == sent


def test_prompt_ids_go_to_the_head_and_sampled_ids_to_driver_and_head(capture: Capture) -> None:
    head, _, tail = capture.shards
    prompts = ids_of(capture.between(capture.driver, head, PREFILL), KIND_TOKENS)
    to_driver = ids_of(capture.between(tail, capture.driver, DECODE), KIND_SAMPLED)
    to_head = ids_of(capture.between(tail, head, DECODE), KIND_TOKENS)

    assert [len(answer) for answer in capture.answers] == [ANSWER_TOKENS] * len(PROMPTS)
    assert list(prompts.values()) == [list(prompt) for prompt in PROMPTS]
    assert to_driver == dict(zip(prompts, capture.answers, strict=True))
    assert to_head == {session: ids[:-1] for session, ids in to_driver.items()}


def test_only_the_last_token_to_the_driver_is_flagged(capture: Capture) -> None:
    _, _, tail = capture.shards
    rows = [r for f in capture.between(tail, capture.driver, DECODE) for r in f.rows]

    for prompt in PROMPTS:
        last = len(prompt) + ANSWER_TOKENS - 1
        assert [r.position for r in rows if r.flags == FLAG_LAST].count(last) == 1
    assert sum(r.flags for r in rows) == len(PROMPTS) * FLAG_LAST


def test_hidden_states_of_every_token_cross_both_boundaries(capture: Capture) -> None:
    head, middle, tail = capture.shards
    for boundary, (sender, receiver) in enumerate(pairwise((head, middle, tail)), 1):
        positions: dict[bytes, list[int]] = {}
        for lane in (PREFILL, DECODE):
            for frame in capture.between(sender, receiver, lane):
                assert (frame.header.kind, frame.header.boundary) == (KIND_HIDDEN, boundary)
                for r in frame.rows:
                    taken = range(r.position, r.position + r.num_tokens)
                    positions.setdefault(r.session, []).extend(taken)

        everything = [[*range(length)] for length in capture.lengths]
        assert positions == dict(zip(capture.sessions, everything, strict=True))


def test_a_hidden_state_costs_its_elements_and_nothing_else(capture: Capture) -> None:
    code, element_bytes = {"bf16": (2, 2), "f32": (3, 4)}[capture.dtype]
    hidden = [f for f in capture.frames if f.header.kind == KIND_HIDDEN]
    tokens = sum(row.num_tokens for frame in hidden for row in frame.rows)

    assert {frame.header.dtype for frame in hidden} == {code}
    assert tokens == 2 * sum(capture.lengths)
    for frame in hidden:
        payload_bytes = sum(r.num_tokens for r in frame.rows) * element_bytes * HIDDEN_SIZE
        assert frame.header.body_bytes == 24 * len(frame.rows) + payload_bytes
        assert len(frame.wire.sealed) == frame.header.body_bytes + 16
        assert len(frame.payload) == payload_bytes


def test_no_key_meets_a_nonce_twice(capture: Capture) -> None:
    frames = capture.frames + capture.key_frames
    used = Counter((frame.key, frame.nonce) for frame in frames)

    assert len(used) == len(frames) > 4 * (ANSWER_TOKENS - 1)
    assert len({frame.key for frame in frames}) == len(
        {(f.header.link, f.wire.sender, f.wire.lane) for f in frames}
    )


# --- without the keys ----------------------------------------------------------------


def test_no_plaintext_is_in_the_recorded_bytes(capture: Capture) -> None:
    recorded = windows([data for end in capture.tap.ends for data in end.writes])
    for frame in capture.frames:
        assert not windows([frame.body]) & recorded
    for frame in capture.key_frames:
        # A proposal begins with the swarm and the epoch, which every header shows.
        named = 1 if frame.body[0] == decryptor.KEY_SWITCH else 1 + 16 + 8
        assert not windows([frame.body[named:]]) & recorded

    plain = b"".join(frame.body for frame in capture.frames)
    for ids in (*PROMPTS, *capture.answers):
        # Pairs, since any four bytes may occur in a header or by chance in a ciphertext.
        assert not [p for p in pairwise(ids) if int32_bytes(p) in capture.recorded]
    assert all(int32_bytes(prompt) in plain for prompt in PROMPTS)


def test_the_receipts_of_joining_are_in_no_frame_and_in_no_byte(capture: Capture) -> None:
    said = b"".join(frame.body for frame in (*capture.frames, *capture.key_frames))
    assert len(set(capture.receipts)) == len(capture.receipts) > 1
    for receipt in capture.receipts:
        for form in (receipt.encode(), bytes.fromhex(receipt)):
            assert form not in said
            assert form not in capture.recorded


def windows(parts: Sequence[bytes]) -> set[bytes]:
    """Return every run of 16 bytes of each part, and parts shorter than that whole."""
    return {part[i : i + 16] for part in parts for i in range(max(1, len(part) - 15))}


def test_no_frame_opens_when_one_bit_of_the_secret_differs(capture: Capture) -> None:
    for bit in range(0, 256, 5):
        for link in capture.links:
            for generation, agreement in enumerate(link.agreements):
                wrong = flip(capture.secrets[agreement.offer.epoch], bit)
                assert_shut(link, generation, keys_of(capture, agreement, "initiator", wrong))


def test_no_frame_opens_with_the_secret_of_the_other_epoch(capture: Capture) -> None:
    for link in capture.links:
        for generation, agreement in enumerate(link.agreements):
            other = capture.secrets[2 * capture.epoch + 1 - agreement.offer.epoch]
            assert_shut(link, generation, keys_of(capture, agreement, "initiator", other))


@pytest.mark.parametrize("role", ROLES)
def test_no_frame_opens_when_one_bit_of_an_ephemeral_key_differs(
    capture: Capture, role: Role
) -> None:
    for bit in EPHEMERAL_BITS:
        for link in capture.links:
            for generation, agreement in enumerate(link.agreements):
                secret = capture.secrets[agreement.offer.epoch]
                wrong = keys_of(capture, agreement, role, secret, flipped_bit=bit)
                assert_shut(link, generation, wrong)


def test_keys_of_one_generation_open_no_frame_of_the_other(capture: Capture) -> None:
    for link in capture.links:
        for frame in link.frames:
            assert link.keys[1 - frame.generation].open(frame) is None


def assert_shut(link: Link, generation: int, wrong: LinkKeys) -> None:
    assert wrong.link_id != link.keys[generation].link_id
    confirmed = link.agreements[generation].confirmations
    for got, wanted in zip(wrong.confirmations, confirmed, strict=True):
        assert got != wanted
    frames = [frame for frame in link.frames if frame.generation == generation]
    assert frames
    assert [frame for frame in frames if wrong.open(frame) is not None] == []


def keys_of(
    capture: Capture,
    agreement: Agreement,
    role: Role,
    secret: bytes,
    *,
    flipped_bit: int | None = None,
) -> LinkKeys:
    own = agreement.offer if role == "initiator" else agreement.answer
    private_key = capture.tap.private_keys[own.public_key]
    if flipped_bit is not None:
        private_key = flip(private_key, flipped_bit)
    return LinkKeys(agreement, capture.swarm_id, secret, role, private_key)


def int32_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, "<i4").tobytes()


def ids_of(frames: Sequence[OpenFrame], kind: int) -> dict[bytes, list[int]]:
    """Return the token ids of each session; every frame must be of ``kind``."""
    found: dict[bytes, list[int]] = {}
    for frame in frames:
        assert (frame.header.kind, frame.header.dtype) == (kind, decryptor.DTYPE_INT32)
        ids = iter(np.frombuffer(frame.payload, "<i4").tolist())
        for row in frame.rows:
            found.setdefault(row.session, []).extend(next(ids) for _ in range(row.num_tokens))
        assert not list(ids)
    return found
