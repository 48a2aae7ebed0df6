"""Changes to valid inputs that a decoder of msgpack or of invites lets far in."""

from __future__ import annotations

import base64
import hashlib
from random import Random
from typing import Any

import msgspec

INTEGERS = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
TEXTS = ("", "a", "\0", "\x1b[2J", "\u202e", "\ud7ff", "é" * 200, "none", "admin", "genesis", "/")
VALUES: tuple[Any, ...] = (None, True, 1.5, float("nan"), float("inf"), [], {}, b"", "", 0)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Return ``data`` with a few bytes changed, added, repeated or left out."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(changed) + 1)
        match random.randrange(5):
            case 0 if changed:
                changed[at - 1] ^= 1 << random.randrange(8)
            case 1 if changed:
                changed[at - 1] = random.choice((0, 1, 0x7F, 0x80, 0xC0, 0xFF))
            case 2:
                changed[at:at] = random.randbytes(random.choice((1, 2, 8)))
            case 3:
                del changed[at : at + random.choice((1, 2, 16, 100))]
            case _:
                changed[at:at] = changed[at : at + random.choice((1, 16, 64))]
    return bytes(changed)


def mutate_msgpack(data: bytes, random: Random) -> bytes:
    """Return the msgpack value of ``data`` with one of its parts replaced."""
    try:
        tree = msgspec.msgpack.decode(data)
        return msgspec.msgpack.encode(_mutate(tree, random))
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError, TypeError):
        return mutate_bytes(data, random)


def _mutate(value: Any, random: Random) -> Any:
    if random.random() < 0.05:
        return random.choice(VALUES)
    match value:
        case list() if value:
            return _mutate_list(value, random)
        case dict() if value:
            key = random.choice(list(value))
            return {**value, key: _mutate(value[key], random)}
        case bytes():
            return mutate_bytes(value, random)
        case str():
            return random.choice((random.choice(TEXTS), value + random.choice(TEXTS), value[:-1]))
        case bool():
            return not value
        case int():
            return random.choice((*INTEGERS, value + 1, value - 1, -value))
        case float():
            return random.choice((0.0, -1.0, 1e308, float("nan"), float("inf"), value * 2))
        case _:
            return random.choice(VALUES)


def _mutate_list(value: list[Any], random: Random) -> list[Any]:
    at = random.randrange(len(value))
    match random.randrange(8):
        case 0:
            return value[:at] + value[at + 1 :]
        case 1:
            return [*value[: at + 1], *value[at:]]
        case 2:
            return [*value[:at], random.choice(VALUES), *value[at:]]
        case _:
            return [*value[:at], _mutate(value[at], random), *value[at + 1 :]]


def mutate_invite(data: bytes, random: Random) -> bytes:
    """Return an invite whose halves are changed and whose checksum fits them."""
    try:
        redeem, held = (
            base64.urlsafe_b64decode(half + b"=" * (-len(half) % 4))
            for half in data.strip().removeprefix(b"pp_inv_").split(b".")
        )
    except ValueError:
        return mutate_bytes(data, random)
    part = random.randrange(3)
    if part == 0:
        redeem = redeem[:65] + mutate_bytes(redeem[65:], random)
    elif part == 1:
        redeem = mutate_bytes(redeem, random)
    else:
        held = mutate_bytes(held[:40], random)
    checksum = hashlib.sha256(b"pals/1 invite checksum\0" + redeem + held[:40]).digest()[:8]
    halves = (
        base64.urlsafe_b64encode(half).rstrip(b"=") for half in (redeem, held[:40] + checksum)
    )
    return b"pp_inv_" + b".".join(halves)
