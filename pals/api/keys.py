"""API keys: named, known by their hashes, and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pals import config
from pals.errors import InvalidConfig

MIN_API_KEY_CHARS = 16
ENVIRONMENT_NAME = "environment"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key that is accepted, without the key.

    Attributes:
        name: Who has it; the only thing about it that is ever logged.
        digest: Its SHA-256.
        created_at: Unix seconds; 0 when nobody knows.
    """

    name: str
    digest: bytes = field(repr=False)
    created_at: int = 0


class KeyRing(Protocol):
    """Knows which keys are accepted."""

    def name_of(self, key: bytes) -> str | None:
        """Return the name of an accepted key; None if it is none."""
        ...


class FixedKeys:
    """Keys that do not change while a server runs."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def name_of(self, key: bytes) -> str | None:
        """Return the name of an accepted key; None if it is none."""
        return find_name(self._keys, key)


def find_name(keys: Sequence[ApiKey], key: bytes) -> str | None:
    """Return the name of the one of ``keys`` that ``key`` is; None if it is none.

    Digests are compared, every one of them, so that the time depends on no key.
    """
    digest = hashlib.sha256(key).digest()
    names = [known.name for known in keys if hmac.compare_digest(digest, known.digest)]
    return names[0] if names else None


def key_of_environment(text: str) -> ApiKey:
    """Return the key that `PALS_API_KEY` holds.

    Raises:
        InvalidConfig: It is too short to resist guessing.
    """
    if len(text) < MIN_API_KEY_CHARS:
        raise InvalidConfig(
            source=config.API_KEY_VARIABLE,
            problem=f"the key has {len(text)} characters",
            advice=f"use at least {MIN_API_KEY_CHARS} random characters",
        )
    return ApiKey(name=ENVIRONMENT_NAME, digest=hashlib.sha256(text.encode()).digest())
