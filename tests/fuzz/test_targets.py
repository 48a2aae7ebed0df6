"""The fuzz targets on a few hundred inputs each; `make fuzz` runs each a million times."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.fuzz.__main__ import load
from tests.fuzz.targets import TARGETS

EACH = pytest.mark.parametrize("name", TARGETS)


@EACH
@settings(max_examples=25, deadline=None)
@given(random_seed=st.integers(0, 2**32))
def test_changed_inputs_are_refused_or_mean_what_they_say(name: str, random_seed: int) -> None:
    target, mutate = load(name)
    random, data = Random(random_seed), None
    for _ in range(10):
        data = mutate(data or random.choice(target.seeds()), random)
        target.run(data)


@EACH
@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_or_mean_what_they_say(name: str, data: bytes) -> None:
    TARGETS[name].run(data)


@EACH
def test_every_seed_is_let_in(name: str) -> None:
    assert [TARGETS[name].run(seed) for seed in TARGETS[name].seeds()].count(False) == 0


def test_a_fault_of_a_decoder_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(data: bytes) -> object:
        raise IndexError(data[9999:9999] or "planted")

    monkeypatch.setattr(targets, "decode_record", faulty)
    with pytest.raises(IndexError):
        TARGETS["record"].run(b"")
