from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

import pytest

from pals.api import keys
from pals.api.keys import ApiKey, FixedKeys, find_name, key_of_environment
from pals.errors import InvalidConfig

KNOWN = [
    ApiKey(name=name, digest=hashlib.sha256(f"key of {name}".encode()).digest())
    for name in ("a", "b", "c")
]


def test_a_key_is_known_by_its_name() -> None:
    ring = FixedKeys(KNOWN)

    assert [ring.name_of(f"key of {name}".encode()) for name in "abcd"] == ["a", "b", "c", None]


@pytest.mark.parametrize("wrong", [b"", b"key of ", b"KEY OF A", b"key of a ", b"\xff" * 100])
def test_other_bytes_are_no_key(wrong: bytes) -> None:
    assert find_name(KNOWN, wrong) is None
    assert find_name([], wrong) is None


def test_every_digest_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare: Callable[[bytes, bytes], bool] = hmac.compare_digest

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return compare(left, right)

    monkeypatch.setattr(keys.hmac, "compare_digest", counting)
    for key in (b"key of a", b"key of c", b"wrong"):
        compared.clear()
        find_name(KNOWN, key)
        assert compared == [known.digest for known in KNOWN]


def test_a_short_key_is_refused_and_not_repeated() -> None:
    assert key_of_environment("a key of enough length").name == "environment"
    with pytest.raises(InvalidConfig) as caught:
        key_of_environment("short")

    assert "short" not in str(caught.value)


def test_no_digest_stands_in_a_repr() -> None:
    assert KNOWN[0].digest.hex() not in repr(KNOWN)
    assert repr(KNOWN[0].digest) not in repr(KNOWN)
