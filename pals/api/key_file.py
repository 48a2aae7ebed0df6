"""Files of API keys, which `pals keys` changes and an endpoint follows.

A file has one key a line, and comments that begin with ``#``::

    laptop sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 1795737600

that is its name, the SHA-256 of the key, and Unix seconds of when it was made. A made key
has 256 random bits: a slow hash would add no strength, and cost whoever is asked, not who
guesses.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pals import config
from pals.api.keys import ApiKey, FixedKeys, KeyRing, find_name, key_of_environment
from pals.errors import InvalidConfig, PalsError, ProfileMissing

KEY_PREFIX = "sk-pals-"
KEY_BYTES = 32
MAX_KEYS = 256
CHECK_INTERVAL_S = 1.0
LOCK_DEADLINE_S = 10.0
FILE_NAME = "api.keys"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_LINE = re.compile(rf"({_NAME.pattern}) sha256:([0-9a-f]{{64}}) (\d{{1,12}})")

_log = logging.getLogger(__name__)


class KeyFile:
    """The keys of a file, read again at most a second after it changes.

    A file that is gone, damaged or readable by others has no keys: then only those that
    are ``always`` accepted are.

    Args:
        path: The file.
        always: Keys that are accepted besides, as the environment's.
        clock: Monotonic seconds.

    Raises:
        ProfileExposed: Others can read it.
        InvalidConfig: There is no such file, it is damaged, or has no key.
    """

    def __init__(
        self,
        path: Path,
        *,
        always: Sequence[ApiKey] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._always = tuple(always)
        self._clock = clock
        self._state = _state_of(path)
        self._keys = load_keys(path)
        if not self._keys and not always:
            advice = "make one with `pals keys create NAME`, or remove the file"
            raise InvalidConfig(source=path, problem="it has no key", advice=advice)
        self._next_look = clock() + CHECK_INTERVAL_S

    def name_of(self, key: bytes) -> str | None:
        """Return the name of an accepted key; None if it is none."""
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + CHECK_INTERVAL_S
            self._look()
        return find_name((*self._always, *self._keys), key)

    def _look(self) -> None:
        state = _state_of(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = load_keys(self._path)
        except PalsError as error:
            self._keys = ()
            _log.error("the keys of the file are refused: %s", error)
        else:
            _log.info("keys read again", extra={"fields": {"keys": len(self._keys)}})


def open_keys(environment: str | None, path: Path | None, profile: Path) -> KeyRing | None:
    """Return the keys that an endpoint accepts; None when it is to ask for none.

    Args:
        environment: The key in `PALS_API_KEY`, if there is one.
        path: The file of keys that was named; the profile's, if it has one, when None.
        profile: The profile folder.

    Raises:
        InvalidConfig: A key is too short, or the file that is named is not there, or a file is
            damaged or has no key.
        ProfileExposed: Others can read the file.
    """
    always = () if environment is None else (key_of_environment(environment),)
    file = path or profile / FILE_NAME
    if path is not None or file.exists():
        return KeyFile(file, always=always)
    return FixedKeys(always) if always else None


def load_keys(path: Path, *, missing_ok: bool = False) -> tuple[ApiKey, ...]:
    """Read a file of keys.

    Args:
        path: The file.
        missing_ok: A file that is not there has no keys.

    Raises:
        ProfileExposed: Others can read it.
        InvalidConfig: There is no such file, a line of it is damaged, a name stands twice, or
            it has over `MAX_KEYS`.
    """
    try:
        text = config.read_private(path).decode(errors="replace")
    except ProfileMissing:
        if missing_ok:
            return ()
        advice = "make a key with `pals keys create NAME`"
        problem = "there is no such file"
        raise InvalidConfig(source=path, problem=problem, advice=advice) from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [_parse(path, n, line) for n, line in lines if line and not line.startswith("#")]
    if len(keys) > MAX_KEYS or len({key.name for key in keys}) < len(keys):
        problem = f"it has more than {MAX_KEYS} keys, or one name twice"
        raise InvalidConfig(source=path, problem=problem, advice="remove lines from it")
    return tuple(keys)


def create_key(path: Path, name: str, *, now: int) -> str:
    """Add a new key to a file, which is made if there is none, and return the key.

    Args:
        path: The file; only this user can read what is made.
        name: 1-32 of ``a-z 0-9 . _ -``, the first a letter or digit.
        now: Unix seconds.

    Raises:
        InvalidConfig: The name is malformed or taken, or the file is damaged.
        ProfileExposed: Others can read the file.
    """
    if not _NAME.fullmatch(name):
        raise InvalidConfig(
            source="the name of the key",
            problem="it is not made of 1-32 small letters, digits, `.`, `_` and `-`",
            advice="choose a name such as `laptop`",
        )
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    made = ApiKey(name=name, digest=hashlib.sha256(key.encode()).digest(), created_at=now)
    with _changing(path):
        keys = load_keys(path, missing_ok=True)
        if name in {known.name for known in keys}:
            advice = "revoke that one first, or choose another name"
            raise InvalidConfig(
                source=f"the key `{name}`", problem="there is one already", advice=advice
            )
        _save(path, [*keys, made])
    return key


def revoke_key(path: Path, name: str) -> None:
    """Remove a key from a file.

    Raises:
        ProfileExposed: Others can read it.
        InvalidConfig: There is no such file, it is damaged, or has no such key.
    """
    _load_without(path, name)  # before a lock is made beside a file that is not there
    with _changing(path):
        _save(path, _load_without(path, name))


def _load_without(path: Path, name: str) -> list[ApiKey]:
    keys = load_keys(path)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        # Without what was typed: it may be a key.
        known = ", ".join(key.name for key in keys) or "none"
        advice = f"name one of: {known}"
        raise InvalidConfig(source=path, problem="it has no key of that name", advice=advice)
    return kept


def _save(path: Path, keys: Sequence[ApiKey]) -> None:
    lines = [f"{key.name} sha256:{key.digest.hex()} {key.created_at}\n" for key in keys]
    config.write_private(path, "".join(lines).encode())


def _parse(path: Path, number: int, line: str) -> ApiKey:
    match = _LINE.fullmatch(line)
    if match is None:
        # Without the line: somebody may have written a key there.
        raise InvalidConfig(
            source=path,
            problem=f"line {number} is not `NAME sha256:HEX SECONDS`",
            advice="remove the line, and make keys with `pals keys create NAME`",
        )
    name, digest, created_at = match.groups()
    return ApiKey(name=name, digest=bytes.fromhex(digest), created_at=int(created_at))


@contextmanager
def _changing(path: Path) -> Generator[None]:
    """Hold the right to write the file: of two at once, one would lose a key."""
    config.make_private_folder(path.parent)
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_DEADLINE_S, mode=0o600):
            yield
    except Timeout:
        raise InvalidConfig(
            source=path, problem="another process is changing it", advice="try it again"
        ) from None


def _state_of(path: Path) -> tuple[int, ...] | None:
    """Return what differs once the file is another, or may be read by others."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
