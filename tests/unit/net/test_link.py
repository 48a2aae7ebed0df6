"""A live link whose keys change, and every attack on the change."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.errors import FrameKeyExhausted, InvalidFrame, LinkRefused
from pals.net.handshake import KeyShare, derive_keys, pack_proposal
from pals.net.lanes import LaneSender
from pals.net.link import REKEY_DEADLINE_S, REKEY_FRAMES, REKEY_INTERVAL_S
from pals.net.wire import (
    KEY_SHAPE,
    NO_ROWS,
    Codec,
    Kind,
    Lane,
    Outgoing,
)
from pals.swarm.keys import FRAME_LIMIT, key_confirmation
from tests.unit.net.handshakes import EPOCH, B, make_secrets
from tests.unit.net.link_pairs import (
    NAMES,
    End,
    Name,
    Pair,
    frame_of,
    frames_in,
    kinds,
    make_pair,
    mid_change,
    receive,
    shares_from,
)

HOUR = REKEY_INTERVAL_S
DATA_LANES = (Lane.DECODE, Lane.PREFILL)


def link_id(end: End) -> bytes:
    return end.link._keys.address.link


def link_ids(pair: Pair) -> set[bytes]:
    return {link_id(end) for end in pair.ends.values()}


# --- when keys change ----------------------------------------------------------------


def test_keys_change_hourly() -> None:
    pair = make_pair()
    first = link_ids(pair)
    pair.tick(HOUR - 0.1)
    pair.deliver_all()
    assert link_ids(pair) == first
    pair.tick(HOUR)
    pair.deliver_all()
    assert [end.rekeyed for end in pair.ends.values()] == [[EPOCH], [EPOCH]]
    [second] = link_ids(pair)
    assert second not in first
    pair.tick(2 * HOUR - 0.1)
    assert not pair.dialler.wires[Lane.CONTROL]


@pytest.mark.parametrize("name", NAMES)
def test_either_end_changes_them(name: Name) -> None:
    pair = make_pair()
    pair.tick(HOUR, name)
    pair.deliver_all()
    assert [end.rekeyed for end in pair.ends.values()] == [[EPOCH], [EPOCH]]
    assert len(link_ids(pair)) == 1


def test_frames_go_on_while_keys_change_and_each_lane_changes_at_one_frame() -> None:
    pair = make_pair()
    old = link_id(pair.dialler)
    for lane in Lane:
        pair.send("dialler", lane)
    pair.tick(HOUR, "dialler")
    for lane in Lane:
        pair.send("dialler", lane)  # still under the old keys: nobody has answered
        pair.deliver("dialler", lane)
    for name in NAMES:
        pair.send(name, Lane.DECODE)
    pair.deliver("dialled", Lane.CONTROL)  # the answer
    pair.send("dialler", Lane.DECODE)
    wire = bytes(pair.dialler.wires[Lane.DECODE])
    pair.deliver_all()
    assert pair.all_is_taken()
    assert kinds(wire) == [Kind.HIDDEN, Kind.KEY, Kind.HIDDEN]
    links = [frame[33:49] for frame in frames_in(wire)]
    assert links[:2] == [old, old]
    assert links[2] == link_id(pair.dialler)
    counters = [int.from_bytes(frame[49:57], "big") for frame in frames_in(wire)]
    assert counters == [2, 3, 0]


@pytest.mark.parametrize("lane", list(Lane))
def test_idle_lane_changes_too(lane: Lane) -> None:
    pair = make_pair()
    pair.tick(HOUR)
    pair.deliver_all()
    pair.send("dialler", lane)
    assert bytes(pair.dialler.wires[lane])[33:49] == link_id(pair.dialled)
    pair.deliver_all()
    assert pair.all_is_taken()


def test_of_two_offers_at_once_one_holds() -> None:
    pair = make_pair()
    pair.tick(HOUR)
    assert [kinds(end.wires[Lane.CONTROL]) for end in pair.ends.values()] == [[Kind.KEY]] * 2
    pair.deliver_all()
    assert [end.rekeyed for end in pair.ends.values()] == [[EPOCH], [EPOCH]]
    assert len(link_ids(pair)) == 1
    for name in NAMES:
        pair.send(name)
    pair.deliver_all()
    assert pair.all_is_taken()


def half_settled() -> Pair:
    """Return a link on which only the dialler is through with a change."""
    pair = mid_change()
    pair.deliver("dialler", Lane.CONTROL)
    for lane in Lane:
        pair.deliver("dialled", lane)
    assert [end.rekeyed for end in pair.ends.values()] == [[EPOCH], []]
    return pair


def test_offer_waits_for_the_change_before_it() -> None:
    pair = half_settled()
    pair.tick(2 * HOUR, "dialler")
    pair.deliver("dialler", Lane.CONTROL)
    assert not pair.dialled.wires[Lane.CONTROL]
    pair.deliver("dialler", Lane.DECODE)
    pair.deliver("dialler", Lane.PREFILL)
    assert kinds(pair.dialled.wires[Lane.CONTROL]) == [Kind.KEY]
    pair.deliver_all()
    assert [end.rekeyed for end in pair.ends.values()] == [[EPOCH, EPOCH], [EPOCH, EPOCH]]
    pair.send("dialler")
    pair.deliver_all()
    assert pair.all_is_taken()


def test_what_the_link_says_comes_before_the_frame_that_is_sealed_after_it() -> None:
    link = make_pair().dialler.link
    link.tick(HOUR)
    data = link.seal(Lane.CONTROL, frame_of(Lane.CONTROL, 0), HOUR)
    assert kinds(data) == [Kind.KEY, Kind.CONTROL]
    assert link.waiting_lanes == ()


# --- the limit of a key --------------------------------------------------------------


def set_counter(end: End, lane: Lane, counter: int, *, sending: bool) -> None:
    lanes = end.link._senders if sending else end.link._receivers
    lanes[lane]._key._counter = counter


def use_up(pair: Pair, name: Name, lane: Lane, counter: int) -> None:
    """Let both ends believe that ``counter`` frames went one way on a lane."""
    set_counter(pair.ends[name], lane, counter, sending=True)
    set_counter(pair.other(name), lane, counter, sending=False)


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize("name", NAMES)
def test_keys_change_before_a_lane_has_used_one_up(name: Name, lane: Lane) -> None:
    pair = make_pair()
    use_up(pair, name, lane, REKEY_FRAMES - 2)
    pair.send(name, lane)
    assert not pair.ends[name].link._offer
    pair.send(name, lane)
    pair.deliver_all()
    assert [end.rekeyed for end in pair.ends.values()] == [[EPOCH], [EPOCH]]
    pair.send(name, lane)
    pair.deliver_all()
    assert pair.all_is_taken()
    assert pair.ends[name].link._senders[lane].counter == 1


def test_receiver_asks_for_new_keys_when_the_sender_does_not() -> None:
    pair = make_pair()
    set_counter(pair.dialled, Lane.DECODE, REKEY_FRAMES, sending=False)
    pair.tick(1.0)
    assert pair.dialled.link._offer is not None


def test_last_frame_of_a_key_is_sent_and_none_after_it() -> None:
    pair = make_pair()
    use_up(pair, "dialler", Lane.DECODE, FRAME_LIMIT - 1)
    pair.send("dialler")
    pair.deliver("dialler", Lane.DECODE)
    assert pair.dialled.taken[Lane.DECODE] == [0]
    for _ in range(2):
        with pytest.raises(FrameKeyExhausted):
            pair.send("dialler")
    with pytest.raises(FrameKeyExhausted):  # the whole link has ended
        pair.send("dialler", Lane.CONTROL)


# --- epochs --------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("dialler",), ("dialled",), NAMES])
def test_link_enters_an_epoch_once_both_know_it(names: tuple[Name, ...]) -> None:
    pair = make_pair()
    pair.learn(EPOCH + 1, *names)
    pair.send("dialler")
    pair.deliver_all()
    pair.tick(REKEY_DEADLINE_S - 1)
    pair.deliver_all()
    for name in set(NAMES) - set(names):
        assert pair.ends[name].link.epoch == EPOCH
        pair.learn(EPOCH + 1, name)
    pair.send("dialled")
    pair.deliver_all()
    assert [end.rekeyed for end in pair.ends.values()] == [[EPOCH + 1]] * 2
    assert {end.link.epoch for end in pair.ends.values()} == {EPOCH + 1}
    assert pair.all_is_taken()
    pair.tick(pair.now + 2 * REKEY_DEADLINE_S)  # and nothing is due any more


def test_header_names_the_epoch_of_its_key() -> None:
    pair = make_pair()
    pair.learn(EPOCH + 1)
    pair.send("dialler")
    pair.deliver_all()
    pair.send("dialler")
    assert frames_in(pair.dialler.wires[Lane.DECODE])[0][25:33] == (EPOCH + 1).to_bytes(8, "big")


@pytest.mark.parametrize("name", NAMES)
def test_epoch_learnt_during_a_change_follows_it(name: Name) -> None:
    pair = make_pair()
    pair.tick(HOUR, name)
    pair.learn(EPOCH + 1)
    pair.deliver_all()
    assert {end.link.epoch for end in pair.ends.values()} == {EPOCH + 1}
    assert len(link_ids(pair)) == 1


def test_epoch_learnt_by_both_during_a_change_follows_it_at_once() -> None:
    pair = mid_change()
    pair.learn(EPOCH + 1)
    pair.deliver_all()
    assert {end.link.epoch for end in pair.ends.values()} == {EPOCH + 1}
    assert len(link_ids(pair)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_end_that_knows_two_epochs_more_waits_for_the_other(name: Name) -> None:
    pair = make_pair()
    other = next(n for n in NAMES if n != name)
    pair.learn(EPOCH + 1, name)
    pair.deliver_all()
    pair.learn(EPOCH + 2, name)
    pair.deliver_all()
    pair.learn(EPOCH + 1, other)
    pair.deliver_all()
    pair.learn(EPOCH + 2, other)
    pair.deliver_all()
    assert {end.link.epoch for end in pair.ends.values()} == {EPOCH + 2}


@pytest.mark.parametrize("name", NAMES)
def test_handshake_that_an_epoch_overtook_is_put_right(name: Name) -> None:
    pair = make_pair(newest={name: EPOCH + 1})
    assert kinds(pair.ends[name].wires[Lane.CONTROL]) == [Kind.KEY]
    pair.deliver_all()
    pair.learn(EPOCH + 1, *(n for n in NAMES if n != name))
    pair.deliver_all()
    assert {end.link.epoch for end in pair.ends.values()} == {EPOCH + 1}


def test_link_that_stays_behind_its_epoch_is_cut() -> None:
    pair = make_pair()
    pair.learn(EPOCH + 1, "dialler")
    pair.deliver_all()
    pair.tick(REKEY_DEADLINE_S - 0.1)
    pair.send("dialler")  # running sessions may finish until then
    pair.deliver_all()
    assert pair.all_is_taken()
    for name in NAMES:
        with pytest.raises(LinkRefused, match="did not change keys within 120 s"):
            pair.tick(REKEY_DEADLINE_S, name)
        with pytest.raises(LinkRefused):
            pair.send(name)
        with pytest.raises(LinkRefused):
            receive(pair.ends[name].link, Lane.DECODE, b"")


def test_end_that_waits_for_an_epoch_makes_no_offer_of_its_own() -> None:
    pair = make_pair()
    pair.learn(EPOCH + 1, "dialler")
    pair.deliver_all()
    set_counter(pair.dialled, Lane.DECODE, REKEY_FRAMES, sending=False)
    pair.tick(1.0)
    assert not pair.dialled.wires[Lane.CONTROL]


def test_late_change_does_not_put_off_the_end_of_an_epoch() -> None:
    pair = mid_change()
    pair.learn(EPOCH + 1, "dialler")
    due = pair.now + REKEY_DEADLINE_S
    pair.tick(due - 1, "dialler")
    pair.deliver_all()  # the change comes through, and the offer of the new epoch follows
    assert pair.dialler.rekeyed == [EPOCH]
    with pytest.raises(LinkRefused, match="did not change keys"):
        pair.tick(due, "dialler")


def test_offer_that_waits_behind_a_change_has_its_own_time() -> None:
    pair = half_settled()
    pair.learn(EPOCH + 1, "dialler")
    pair.deliver_all()  # the offer of an epoch that the dialled end never learns
    assert pair.dialled.rekeyed == [EPOCH]
    with pytest.raises(LinkRefused, match="did not change keys"):
        pair.tick(pair.now + REKEY_DEADLINE_S, "dialled")


@pytest.mark.parametrize("silent_lane", [*DATA_LANES, Lane.CONTROL])
def test_change_that_one_lane_never_makes_is_cut(silent_lane: Lane) -> None:
    pair = make_pair()
    pair.tick(HOUR, "dialler")
    pair.deliver("dialler", Lane.CONTROL)
    pair.deliver("dialled", Lane.CONTROL)
    for lane in set(Lane) - {silent_lane}:
        pair.deliver("dialler", lane)
    with pytest.raises(LinkRefused, match="did not change keys"):
        pair.tick(HOUR + REKEY_DEADLINE_S, "dialled")


@pytest.mark.parametrize("epoch", [EPOCH, EPOCH - 1, 0])
def test_epoch_that_is_not_later_is_refused_by_its_own_side(epoch: int) -> None:
    pair = make_pair()
    with pytest.raises(ValueError, match="does not follow"):
        pair.learn(epoch, "dialler")


# --- any order of events -------------------------------------------------------------

ACTIONS = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(NAMES), st.sampled_from(Lane)),
    st.tuples(
        st.just("deliver"),
        st.sampled_from(NAMES),
        st.sampled_from(Lane),
        st.one_of(st.none(), st.integers(1, 300)),
    ),
    st.tuples(st.just("wait"), st.sampled_from(NAMES), st.sampled_from([1.0, 40.0])),
    st.tuples(st.just("hour"), st.sampled_from(NAMES)),
    st.tuples(st.just("learn"), st.sampled_from(NAMES)),
)


def act(pair: Pair, name: str, *details: object) -> None:
    """Do one thing; ends that wait for too long may be cut, and that ends the test's run."""
    if name == "wait":
        end, seconds = details
        pair.tick(pair.now + seconds, end)
    elif name == "hour":
        [end] = details
        link = pair.ends[end].link
        link._keyed_at = pair.now - HOUR
        pair.tick(pair.now, end)
    elif name == "learn":
        [end] = details
        pair.learn(pair.ends[end].secrets.epoch + 1, end)
    else:
        getattr(pair, name)(*details)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_no_frame_is_lost_or_reordered_whatever_happens_when(
    actions: list[tuple[object, ...]],
) -> None:
    pair = make_pair()
    for action in actions:
        try:
            act(pair, *action)
        except LinkRefused:  # a change was left to wait for too long
            return
    pair.deliver_all()
    newest = max(end.secrets.epoch for end in pair.ends.values())
    for name in NAMES:
        if pair.ends[name].secrets.epoch < newest:
            pair.learn(newest, name)
    pair.deliver_all()
    assert pair.all_is_taken()
    assert {end.link.epoch for end in pair.ends.values()} == {newest}
    assert len(link_ids(pair)) == 1
    for name in NAMES:
        pair.send(name)
    pair.deliver_all()
    assert pair.all_is_taken()


# --- attacks on the change (security: replay, reorder, reflection, splice) -----------


def assert_refused(end: End, lane: Lane, data: bytes) -> None:
    with pytest.raises(InvalidFrame):
        receive(end.link, lane, data)
    for other in Lane:  # the link is dead on every lane
        with pytest.raises(InvalidFrame):
            receive(end.link, other, b"")
        with pytest.raises(InvalidFrame):
            end.link.seal(other, frame_of(other, 0), 0.0)


def test_frame_of_the_new_keys_before_the_switch_is_refused() -> None:
    pair = mid_change()
    _, new = frames_in(pair.dialler.wires[Lane.DECODE])
    assert_refused(pair.dialled, Lane.DECODE, new)


def test_frame_of_the_old_keys_after_the_switch_is_refused() -> None:
    pair = mid_change()
    stale = make_pair()  # the same keys, and a sender that never heard of the change
    for _ in range(3):
        stale.send("dialler")
    old = frames_in(stale.dialler.wires[Lane.DECODE])
    [switch, _] = frames_in(pair.dialler.wires[Lane.DECODE])
    receive(pair.dialled.link, Lane.DECODE, switch)
    assert_refused(pair.dialled, Lane.DECODE, old[2])


def test_switch_that_was_dropped_is_noticed() -> None:
    pair = mid_change()
    pair.send("dialler")
    frames = frames_in(pair.dialler.wires[Lane.DECODE])
    assert_refused(pair.dialled, Lane.DECODE, frames[1] + frames[2])


def test_frame_that_was_dropped_before_the_switch_is_noticed() -> None:
    pair = make_pair()
    pair.tick(HOUR, "dialler")
    pair.send("dialler")
    pair.deliver("dialler", Lane.CONTROL)
    pair.deliver("dialled", Lane.CONTROL)
    frame, switch = frames_in(pair.dialler.wires[Lane.DECODE])
    del frame
    assert_refused(pair.dialled, Lane.DECODE, switch)


def test_switch_replayed_is_refused() -> None:
    pair = mid_change()
    [switch, _] = frames_in(pair.dialler.wires[Lane.DECODE])
    receive(pair.dialled.link, Lane.DECODE, switch)
    assert_refused(pair.dialled, Lane.DECODE, switch)


@pytest.mark.parametrize("lane", [Lane.CONTROL, Lane.PREFILL])
def test_switch_of_another_lane_is_refused(lane: Lane) -> None:
    pair = mid_change()
    [switch, _] = frames_in(pair.dialler.wires[Lane.DECODE])
    assert_refused(pair.dialled, lane, switch)


def test_switch_reflected_to_its_sender_is_refused() -> None:
    pair = mid_change()
    [switch, _] = frames_in(pair.dialler.wires[Lane.DECODE])
    assert_refused(pair.dialler, Lane.DECODE, switch)


def test_offer_replayed_is_refused() -> None:
    pair = make_pair()
    pair.tick(HOUR, "dialler")
    offer = bytes(pair.dialler.wires[Lane.CONTROL])
    pair.deliver_all()
    assert_refused(pair.dialled, Lane.CONTROL, offer)


def test_answer_of_an_earlier_change_is_refused() -> None:
    pair = make_pair()
    pair.tick(HOUR, "dialler")
    pair.deliver("dialler", Lane.CONTROL)
    answer = bytes(pair.dialled.wires[Lane.CONTROL])
    pair.deliver_all()
    pair.tick(2 * HOUR, "dialler")
    assert_refused(pair.dialler, Lane.CONTROL, answer)


def test_every_flipped_bit_of_every_key_message_is_refused() -> None:
    messages = 0
    for lane, deliveries in ((Lane.CONTROL, 0), (Lane.CONTROL, 1), (Lane.DECODE, 2)):
        probe = make_pair()
        probe.tick(HOUR, "dialler")
        sender: Name = "dialled" if deliveries == 1 else "dialler"
        length = len(advance(probe, deliveries).ends[sender].wires[lane])
        for bit in range(0, 8 * length, 7):
            pair = make_pair()
            pair.tick(HOUR, "dialler")
            wire = advance(pair, deliveries).ends[sender].wires[lane]
            wire[bit // 8] ^= 1 << bit % 8
            wire += bytes(300)  # a longer claim waits for bytes, which then do not open
            with pytest.raises(InvalidFrame):
                pair.deliver(sender, lane)
            messages += 1
    assert messages > 400


def advance(pair: Pair, deliveries: int) -> Pair:
    """Let the offer arrive, then the answer."""
    for name in ("dialler", "dialled")[:deliveries]:
        pair.deliver(name, Lane.CONTROL)
    return pair


# --- a member that breaks the rules --------------------------------------------------


def proposal_of(
    *, epoch: int = EPOCH, swarm: bytes | None = None, codec: Codec = Codec.RAW, seed: str = "evil"
) -> bytes:
    secrets = make_secrets(epoch=epoch, codec=codec)
    proposal = pack_proposal(secrets, shares_from(seed)())
    return proposal if swarm is None else swarm[:16] + proposal[16:]


DEGENERATE = proposal_of()[:40] + bytes(32) + proposal_of()[72:]
CONFIRMATION = bytes(32)
BROKEN: dict[str, tuple[Lane, bytes]] = {
    "no content": (Lane.CONTROL, b"\x01"),
    "no such message": (Lane.CONTROL, b"\x04" + CONFIRMATION),
    "message zero": (Lane.CONTROL, b"\x00"),
    "offer too short": (Lane.CONTROL, b"\x01" + proposal_of()[:-1]),
    "offer too long": (Lane.CONTROL, b"\x01" + proposal_of() + b"\0"),
    "offer on a data lane": (Lane.DECODE, b"\x01" + proposal_of()),
    "offer of an earlier epoch": (Lane.CONTROL, b"\x01" + proposal_of(epoch=EPOCH - 1)),
    "offer of another swarm": (Lane.CONTROL, b"\x01" + proposal_of(swarm=b"o" * 16)),
    "offer of another codec": (Lane.CONTROL, b"\x01" + proposal_of(codec=Codec.INT8)),
    "offer of a degenerate key": (Lane.CONTROL, b"\x01" + DEGENERATE),
    "answer to nothing": (Lane.CONTROL, b"\x02" + proposal_of() + CONFIRMATION),
    "answer on a data lane": (Lane.PREFILL, b"\x02" + proposal_of() + CONFIRMATION),
    "switch to nothing": (Lane.CONTROL, b"\x03" + CONFIRMATION),
    "switch to nothing on a data lane": (Lane.DECODE, b"\x03" + CONFIRMATION),
}


def key_frame(pair: Pair, lane: Lane, body: bytes) -> bytes:
    """Return a frame that the dialler, who has the keys, seals by hand."""
    outgoing = Outgoing(KEY_SHAPE, NO_ROWS, (body,))
    return bytes(pair.dialler.link._senders[lane].seal(outgoing))


@pytest.mark.parametrize("what", BROKEN)
def test_key_message_against_the_rules_ends_the_link(what: str) -> None:
    pair = make_pair(codec=Codec.INT8) if what == "offer of another codec" else make_pair()
    lane, body = BROKEN[what]
    if what == "offer of another codec":
        body = b"\x01" + proposal_of(codec=Codec.RAW)
    with pytest.raises((InvalidFrame, LinkRefused)):
        receive(pair.dialled.link, lane, key_frame(pair, lane, body))
    with pytest.raises((InvalidFrame, LinkRefused)):
        pair.send("dialled")


def test_second_offer_before_the_first_is_through_ends_the_link() -> None:
    pair = make_pair()
    for number, refused in enumerate((False, True)):
        offer = b"\x01" + proposal_of(epoch=EPOCH + 9, seed=f"{number}")
        data = key_frame(pair, Lane.CONTROL, offer)
        if refused:
            with pytest.raises(InvalidFrame, match="out of turn"):
                receive(pair.dialled.link, Lane.CONTROL, data)
        else:
            receive(pair.dialled.link, Lane.CONTROL, data)


def test_offer_of_an_epoch_that_never_comes_is_not_held_for_ever() -> None:
    pair = make_pair()
    offer = b"\x01" + proposal_of(epoch=2**64 - 1)
    receive(pair.dialled.link, Lane.CONTROL, key_frame(pair, Lane.CONTROL, offer))
    pair.dialled.link.tick(REKEY_DEADLINE_S - 0.1)
    with pytest.raises(LinkRefused):
        pair.dialled.link.tick(REKEY_DEADLINE_S)


def test_second_switch_of_a_lane_ends_the_link() -> None:
    """Otherwise its counter would start again, and with it the nonces."""
    pair = mid_change()
    switch, _ = frames_in(pair.dialler.wires[Lane.DECODE])
    receive(pair.dialled.link, Lane.DECODE, switch)
    confirmation = key_confirmation(pair.dialler.link._change.keys.prk, "initiator")
    fresh = LaneSender(pair.dialler.link._change.keys, Lane.DECODE)
    again = fresh.seal(Outgoing(KEY_SHAPE, NO_ROWS, (b"\x03" + confirmation,)))
    with pytest.raises(InvalidFrame, match="a change to no new keys"):
        receive(pair.dialled.link, Lane.DECODE, bytes(again))


def test_answer_that_names_another_epoch_than_its_offer_ends_the_link() -> None:
    pair = make_pair()
    pair.tick(HOUR, "dialled")
    offer = pair.dialled.link._offer
    assert offer is not None
    share = shares_from("evil")()
    own = pack_proposal(make_secrets(), share)
    keys = derive_keys("responder", make_secrets(), B, share, own, offer.proposal)
    renamed = own[:16] + (EPOCH + 1).to_bytes(8, "big") + own[24:]
    answer = b"\x02" + renamed + key_confirmation(keys.prk, "responder")
    with pytest.raises(InvalidFrame, match="an answer to no offer"):
        receive(pair.dialled.link, Lane.CONTROL, key_frame(pair, Lane.CONTROL, answer))


def test_wrong_confirmation_of_new_keys_ends_the_link() -> None:
    pair = make_pair()
    pair.tick(HOUR, "dialler")
    pair.deliver("dialler", Lane.CONTROL)
    switch = key_frame(pair, Lane.DECODE, b"\x03" + CONFIRMATION)
    with pytest.raises(InvalidFrame, match="the new keys differ"):
        receive(pair.dialled.link, Lane.DECODE, switch)


def test_ends_with_other_secrets_of_an_epoch_do_not_get_there() -> None:
    pair = make_pair()
    pair.learn(EPOCH + 1, "dialled")
    wrong = make_secrets(epoch=EPOCH + 1, secret=b"x" * 32)
    pair.dialler.link.rekey(wrong, 0.0)
    with pytest.raises(InvalidFrame, match="the swarm secrets differ"):
        pair.deliver_all()


# --- old keys ------------------------------------------------------


def reachable(root: object) -> list[object]:
    """Return everything that an object leads to, but modules and classes."""
    found: dict[int, object] = {}
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in found or isinstance(item, type) or type(item).__name__ == "module":
            continue
        found[id(item)] = item
        if not callable(item):
            waiting.extend(gc.get_referents(item))
    return list(found.values())


@pytest.mark.parametrize("name", NAMES)
def test_old_keys_are_dropped(name: Name) -> None:
    pair = make_pair()
    link = pair.ends[name].link
    old = [link._keys.prk, *(id(lane._key) for lane in link._senders.values())]
    kept = [lane._key for lane in link._senders.values()]  # so that no id comes again
    assert link._keys.prk in reachable(link)
    pair.tick(HOUR)
    pair.deliver_all()
    left = reachable(link)
    assert old[0] not in [item for item in left if isinstance(item, bytes)]
    assert not {id(item) for item in left} & set(old[1:])
    assert not [item for item in left if isinstance(item, KeyShare)]
    del kept


# --- sizes ---------------------------------------------------------------------------


def test_bytes_that_no_frame_can_start_with_are_not_kept() -> None:
    link = make_pair().dialled.link
    with pytest.raises(InvalidFrame):
        receive(link, Lane.DECODE, b"GET / HTTP/1.1\r\n" * 8)


@given(st.sampled_from(Lane), st.binary(min_size=1, max_size=300), st.integers(0, 200))
def test_arbitrary_bytes_raise_nothing_but_invalid_frame(
    lane: Lane, noise: bytes, genuine: int
) -> None:
    pair = mid_change()
    data = bytes(pair.dialler.wires[lane])[:genuine] + noise
    try:
        receive(pair.dialled.link, lane, data)
    except InvalidFrame:
        with pytest.raises(InvalidFrame):
            receive(pair.dialled.link, lane, b"")
