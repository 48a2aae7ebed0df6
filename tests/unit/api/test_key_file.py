from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from pals.api.key_file import (
    KEY_PREFIX,
    KeyFile,
    create_key,
    load_keys,
    open_keys,
    revoke_key,
)
from pals.api.keys import find_name, key_of_environment
from pals.errors import InvalidConfig, ProfileExposed

ENVIRONMENT = "a key of the environment"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile" / "api.keys"


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_made_key_is_known_by_its_name_and_kept_as_a_hash(path: Path) -> None:
    key = create_key(path, "laptop", now=1_700_000_000)

    (kept,) = load_keys(path)
    assert key.startswith(KEY_PREFIX)
    assert len(key) == len(KEY_PREFIX) + 43
    assert (kept.name, kept.created_at) == ("laptop", 1_700_000_000)
    assert find_name([kept], key.encode()) == "laptop"
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept.digest.hex() not in repr(kept)


def test_keys_differ_and_each_has_its_own_name(path: Path) -> None:
    made = {name: create_key(path, name, now=0) for name in ("a", "b", "c")}

    ring = KeyFile(path)
    assert {name: ring.name_of(key.encode()) for name, key in made.items()} == {
        "a": "a",
        "b": "b",
        "c": "c",
    }
    assert len(set(made.values())) == 3


@pytest.mark.parametrize("wrong", [b"", b"sk-pals-", "kéy".encode(), b"\xff" * 100])
def test_any_other_bytes_are_no_key(path: Path, wrong: bytes) -> None:
    key = create_key(path, "laptop", now=0).encode()

    for text in (wrong, key[:-1], key + b"x", key.upper()):
        assert KeyFile(path).name_of(text) is None


@pytest.mark.parametrize(
    "name", ["", "Laptop", "my laptop", "-x", "a" * 33, "a\nb", "ü", KEY_PREFIX + "x" * 43]
)
def test_a_name_that_is_none_is_refused_and_not_repeated(path: Path, name: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        create_key(path, name, now=0)

    assert not name or name not in f"{caught.value} {caught.value.hint}"
    assert not path.exists()


def test_a_taken_name_is_refused(path: Path) -> None:
    key = create_key(path, "laptop", now=0)

    with pytest.raises(InvalidConfig):
        create_key(path, "laptop", now=0)

    assert KeyFile(path).name_of(key.encode()) == "laptop"


def test_a_revoked_key_is_none_and_the_others_stay(path: Path) -> None:
    gone, kept = create_key(path, "a", now=0), create_key(path, "b", now=0)

    revoke_key(path, "a")

    ring = KeyFile(path)
    assert (ring.name_of(gone.encode()), ring.name_of(kept.encode())) == (None, "b")
    with pytest.raises(InvalidConfig) as caught:
        revoke_key(path, gone)
    assert gone not in f"{caught.value} {caught.value.hint}"


def test_a_file_that_others_can_read_is_refused(path: Path) -> None:
    create_key(path, "laptop", now=0)
    path.chmod(0o640)

    for use in (load_keys, KeyFile, lambda p: create_key(p, "b", now=0)):
        with pytest.raises(ProfileExposed):
            use(path)


@pytest.mark.parametrize(
    "text",
    ["sk-pals-canary", "a sha256:00 0", "a md5:" + "0" * 64 + " 0", "A sha256:" + "0" * 64 + " 0"],
)
def test_a_damaged_line_is_named_by_its_number_alone(path: Path, text: str) -> None:
    create_key(path, "laptop", now=0)
    path.write_text(f"# comment\n\n{text}\n")

    with pytest.raises(InvalidConfig) as caught:
        load_keys(path)

    assert "line 3" in str(caught.value)
    assert text not in str(caught.value)


def test_one_name_twice_and_too_many_keys_are_refused(path: Path) -> None:
    create_key(path, "laptop", now=0)
    line = path.read_text()
    for lines in ([line, line], [line.replace("laptop", f"k{n}") for n in range(257)]):
        path.write_text("".join(lines))
        with pytest.raises(InvalidConfig):
            load_keys(path)


def test_a_running_endpoint_reads_a_change_within_a_second(path: Path) -> None:
    clock = Clock()
    first = create_key(path, "first", now=0)
    ring = KeyFile(path, clock=clock)
    second = create_key(path, "second", now=0)
    revoke_key(path, "first")

    assert ring.name_of(first.encode()) == "first"
    clock.now_s = 1.0
    assert ring.name_of(first.encode()) is None
    assert ring.name_of(second.encode()) == "second"


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("nonsense"),
        lambda path: path.write_text(""),
        lambda path: path.chmod(0o644),
    ],
    ids=["gone", "damaged", "emptied", "exposed"],
)
def test_a_file_that_cannot_be_used_any_more_lets_nobody_in(
    path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    key = create_key(path, "laptop", now=0)
    text = path.read_bytes()
    ring = KeyFile(path, always=[key_of_environment(ENVIRONMENT)], clock=clock)

    with caplog.at_level(logging.INFO):
        harm(path)
        clock.now_s = 1.0
        assert ring.name_of(key.encode()) is None
        assert ring.name_of(ENVIRONMENT.encode()) == "environment"
    assert len(caplog.records) == 1

    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(text)
    clock.now_s = 2.0
    assert ring.name_of(key.encode()) == "laptop"


def test_a_server_does_not_start_with_a_file_without_keys(path: Path) -> None:
    create_key(path, "laptop", now=0)
    revoke_key(path, "laptop")

    with pytest.raises(InvalidConfig):
        open_keys(None, path, path.parent)
    with pytest.raises(InvalidConfig, match="there is no such file"):
        open_keys(None, path.with_name("absent"), path.parent)


def test_keys_of_the_profile_are_asked_for_without_being_named(path: Path) -> None:
    assert open_keys(None, None, path.parent) is None
    key = create_key(path, "laptop", now=0)

    ring = open_keys(ENVIRONMENT, None, path.parent)

    assert ring is not None
    assert ring.name_of(key.encode()) == "laptop"
    assert ring.name_of(ENVIRONMENT.encode()) == "environment"
