"""The list of a model's weight files, which names the model also where they are not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pals.errors import CorruptModel
from pals.models.files import json_object
from pals.models.hashes import SHA256

MAX_LICENCE_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFile:
    """A weight file: its name, size and SHA-256 in hex."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All weight files of one version of a model.

    Attributes:
        files: By name.
        licence: What the model's card states, or an empty string.
    """

    files: Mapping[str, ListedFile]
    licence: str = ""

    @classmethod
    def parse(cls, values: Mapping[str, object], source: Path) -> Listing:
        """Read the JSON form.

        Raises:
            CorruptModel: It is malformed.
        """
        files = json_object(values.get("files"), source)
        licence = values.get("licence")
        return cls(
            files={name: _parse_file(name, value, source) for name, value in files.items()},
            licence=licence[:MAX_LICENCE_CHARACTERS] if isinstance(licence, str) else "",
        )

    def to_json(self) -> bytes:
        """Return the JSON form, equal for equal listings."""
        files = {
            file.name: {"size": file.size_bytes, "sha256": file.sha256}
            for file in self.files.values()
        }
        document = {"files": files, "licence": self.licence}
        return json.dumps(document, indent=2, sort_keys=True).encode()


def _parse_file(name: str, value: object, source: Path) -> ListedFile:
    entry = json_object(value, source)
    size, sha256 = entry.get("size"), entry.get("sha256")
    if type(size) is not int or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise CorruptModel(source=source, problem=f"`{name[:200]}` has no size or no sha256")
    return ListedFile(name=name, size_bytes=size, sha256=sha256)
