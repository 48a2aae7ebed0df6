from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.engine.bank import (
    COUNTED_AT_ONCE,
    MAX_COUNT,
    Bank,
    abstract_bank,
    bank_bytes,
    build_bank,
    count_tokens,
    pack_bits,
    reset_slot,
    set_allowed,
    unpack_bits,
    warm_bank,
)
from pals.engine.bank_slots import BankSlots
from pals.errors import InvalidStep, PenaltySlotsTaken
from pals.types import Sampling
from tests.unit.engine.chains import counting_compilations

VOCAB, SLOTS = 50, 4
WORDS = 2


def read(bank: Bank) -> list[object]:
    return [np.asarray(array).tolist() for array in bank]


def test_slots_are_handed_out_once_and_never_row_zero() -> None:
    slots = BankSlots(4)

    assert [slots.take() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(PenaltySlotsTaken, match="3 sessions"):
        slots.take()


def test_a_slot_given_back_is_free_again_once() -> None:
    slots = BankSlots(4)
    taken = [slots.take(), slots.take()]

    for slot in (taken[0], taken[0], 0, 3):
        slots.give_back(slot)

    assert slots.free == 2
    assert [slots.take(), slots.take()] == [1, 3]


def test_cleared_slots_are_all_free() -> None:
    slots = BankSlots(3)
    slots.take()

    slots.clear()
    slots.give_back(1)

    assert (slots.free, slots.take(), slots.take()) == (2, 1, 2)


def test_the_bytes_are_those_of_the_arrays() -> None:
    bank = build_bank(VOCAB, SLOTS)

    assert bank_bytes(VOCAB, SLOTS) == sum(array.nbytes for array in bank)
    assert bank_bytes(151_936) < 23e6
    for array, shape in zip(bank, abstract_bank(VOCAB, SLOTS), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


def test_a_slot_holds_what_a_replayed_session_had() -> None:
    sampling = Sampling(logit_bias=((3, -5.0), (0, 2.5)))

    bank = reset_slot(
        build_bank(VOCAB, SLOTS), 2, sampling, prompt=[0, 49, 0], answer=np.array([7, 7, 1])
    )

    counts = np.zeros((SLOTS, VOCAB), int)
    counts[2, 7], counts[2, 1] = 2, 1
    assert np.asarray(bank.counts).tolist() == counts.tolist()
    seen = np.asarray(unpack_bits(bank.prompt, VOCAB))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[], [], [0, 49], []]
    assert np.asarray(bank.bias_tokens)[2, :3].tolist() == [3, 0, 0]
    assert np.asarray(bank.biases)[2, :3].tolist() == [-5.0, 2.5, 0]


def test_the_next_session_of_a_slot_finds_nothing_of_the_last() -> None:
    used = reset_slot(
        build_bank(VOCAB, SLOTS), 1, Sampling(logit_bias=((3, 1.0),)), prompt=[4], answer=[5]
    )
    used = set_allowed(used, 1, pack_bits(np.arange(VOCAB) == 9))

    assert read(reset_slot(used, 1, Sampling())) == read(build_bank(VOCAB, SLOTS))


@pytest.mark.parametrize(
    "change",
    [
        lambda bank: reset_slot(bank, SLOTS, Sampling()),
        lambda bank: reset_slot(bank, -1, Sampling()),
        lambda bank: reset_slot(bank, 1, Sampling(), prompt=[VOCAB]),
        lambda bank: reset_slot(bank, 1, Sampling(), answer=[3, -1]),
        lambda bank: reset_slot(bank, 1, Sampling(logit_bias=((VOCAB, 1.0),))),
        lambda bank: set_allowed(bank, 1, np.zeros(WORDS, np.uint32)),
        lambda bank: set_allowed(bank, 1, np.ones(WORDS - 1, np.uint32)),
        lambda bank: set_allowed(bank, 1, np.ones(WORDS, np.int32)),
        lambda bank: count_tokens(bank, [SLOTS], [1]),
        lambda bank: count_tokens(bank, [1], [VOCAB]),
        lambda bank: count_tokens(bank, [1, 1], [3]),
    ],
)
def test_a_refused_change_leaves_the_bank_as_it_was(
    change: Callable[[Bank], Bank],
) -> None:
    bank = reset_slot(build_bank(VOCAB, SLOTS), 1, Sampling(), answer=[3])
    before = read(bank)

    with pytest.raises(InvalidStep):
        change(bank)

    assert read(bank) == before


@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, VOCAB - 1)), max_size=150))
def test_accepted_drafts_are_counted_one_by_one_but_in_slot_zero(
    pairs: list[tuple[int, int]],
) -> None:
    expected = np.zeros((SLOTS, VOCAB), int)
    for slot, token in pairs:
        expected[slot, token] += slot > 0

    bank = count_tokens(
        build_bank(VOCAB, SLOTS), [slot for slot, _ in pairs], [token for _, token in pairs]
    )

    assert np.asarray(bank.counts).tolist() == expected.tolist()


def test_counts_never_overflow() -> None:
    many = MAX_COUNT + 70_000
    bank = reset_slot(build_bank(VOCAB, SLOTS), 1, Sampling(), answer=np.full(many, 7))
    bank = reset_slot(bank, 2, Sampling(), answer=np.full(MAX_COUNT - 1, 7))

    for _ in range(3):
        bank = count_tokens(bank, [1, 2] * COUNTED_AT_ONCE, [7] * 2 * COUNTED_AT_ONCE)

    counts = np.asarray(bank.counts)[:, 7].tolist()
    assert counts[1] == MAX_COUNT
    assert MAX_COUNT <= counts[2] < MAX_COUNT + COUNTED_AT_ONCE


def test_a_change_is_made_where_the_bank_lies() -> None:
    bank = build_bank(VOCAB, SLOTS)
    places = [array.unsafe_buffer_pointer() for array in bank]

    bank = warm_bank(bank)

    assert [array.unsafe_buffer_pointer() for array in bank] == places


def test_warming_has_no_effect_and_leaves_nothing_to_compile() -> None:
    bank = warm_bank(build_bank(VOCAB, SLOTS))
    assert read(bank) == read(build_bank(VOCAB, SLOTS))

    with counting_compilations() as compiled:
        bank = reset_slot(bank, 3, Sampling(), prompt=list(range(40)), answer=[1])
        bank = set_allowed(bank, 2, pack_bits(np.arange(VOCAB) > 3))
        count_tokens(bank, [1] * 200, [2] * 200)

    assert not compiled


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_packed_bits_come_back(bits: list[bool]) -> None:
    packed = pack_bits(np.array(bits))

    assert (packed.dtype, len(packed)) == (np.uint32, -(-len(bits) // 32))
    # in numpy: each length would be compiled anew
    unpacked = np.unpackbits(packed.astype("<u4").view(np.uint8), bitorder="little")
    assert unpacked[: len(bits)].astype(bool).tolist() == bits
