"""A model folder on this machine: its config, and the manifest that names its bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pals.errors import CorruptModel, ModelNotFound
from pals.models.config import ModelConfig
from pals.models.configs import read_config
from pals.models.files import (
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    contained_path,
    json_object,
    parse_json_object,
    read_file,
)
from pals.models.hashes import SHA256, hash_file
from pals.models.safetensors import INDEX_NAME, SINGLE_NAME, read_index
from pals.types import MAX_TOKENIZER_BYTES

MANIFEST_NAME = "manifest.json"
CONFIG_NAME = "config.json"
TEXT_NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One version of a model, in a folder of the Hugging Face layout.

    Attributes:
        path: The folder.
        model_id: The name under which peers announce it.
        config: What config.json says.
        manifest: SHA-256 over the hashes of the config, the tokenizer's files and the
            weight files, 32 bytes. Peers whose manifests differ never share a chain.
    """

    path: Path
    model_id: str
    config: ModelConfig
    manifest: bytes

    @classmethod
    def open(cls, path: Path, model_id: str) -> Snapshot:
        """Read a model folder; imports no jax.

        The weight files need not all be there when ``manifest.json`` lists them: so a
        driver, which has none, and each shard come to the same manifest.

        Raises:
            ModelNotFound: There is no config.json, or nothing says what the weights are.
            CorruptModel: A file is malformed.
            UnsupportedModel: The model cannot be run.
        """
        if not (path / CONFIG_NAME).is_file():
            raise ModelNotFound(model=model_id, problem=f"{path} has no {CONFIG_NAME}")
        data = read_file(path, CONFIG_NAME, most=MAX_CONFIG_BYTES)
        source = path / CONFIG_NAME
        config = read_config(parse_json_object(data, source), source=str(source))
        return cls(
            path=path, model_id=model_id, config=config, manifest=manifest_of(path, model_id)
        )


def manifest_of(folder: Path, model_id: str) -> bytes:
    """Return the SHA-256 of the canonical list of the model's files.

    Raises:
        ModelNotFound: Weight files are missing and ``manifest.json`` does not list them.
        CorruptModel: A file is malformed or differs from ``manifest.json``.
    """
    texts = {
        name: hashlib.sha256(read_file(folder, name, most=MAX_TOKENIZER_BYTES)).hexdigest()
        for name in TEXT_NAMES
        if (folder / name).is_file()
    }
    if (folder / MANIFEST_NAME).is_file():
        weights = read_manifest(folder)
    else:
        weights = hash_weights(folder, model_id)
    listed = [{"name": name, "sha256": sha256} for name, sha256 in sorted(texts.items())]
    listed += [
        {"name": name, "size": size, "sha256": sha256}
        for name, (size, sha256) in sorted(weights.items())
    ]
    canonical = json.dumps(listed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()


def weight_names(folder: Path) -> list[str]:
    """Return the names of the model's weight files: those of the index, or the single one.

    Raises:
        CorruptModel: The index is malformed.
    """
    has_index = (folder / INDEX_NAME).is_file()
    return sorted(set(read_index(folder).values())) if has_index else [SINGLE_NAME]


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each weight file that ``manifest.json`` lists.

    Raises:
        CorruptModel: It is malformed, does not list exactly the model's weight files, or
            a file that is there has another size or hash.
    """
    path = folder / MANIFEST_NAME
    values = parse_json_object(read_file(folder, MANIFEST_NAME, most=MAX_INDEX_BYTES), path)
    files = json_object(values.get("files"), path)
    differing = sorted(files.keys() ^ set(weight_names(folder)))
    if differing:
        problem = f"`{differing[0][:200]}` is in the list or in the model's index, but not in both"
        raise CorruptModel(source=path, problem=problem)
    weights = {name: _parse_entry(name, value, path) for name, value in files.items()}
    for name, (size, sha256) in weights.items():
        local = contained_path(folder, name)
        if local.is_file():
            _check_file(local, size, sha256)
    return weights


def _parse_entry(name: str, value: object, path: Path) -> tuple[int, str]:
    entry = json_object(value, path)
    size, sha256 = entry.get("size"), entry.get("sha256")
    if type(size) is not int or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise CorruptModel(source=path, problem=f"`{name}` has no size or no sha256")
    return size, sha256


def _check_file(path: Path, size: int, sha256: str) -> None:
    if path.stat().st_size != size:
        raise CorruptModel(source=path, problem=f"it does not have the {size} bytes it should")
    if hash_file(path) != sha256:
        problem = f"its content is not what {MANIFEST_NAME} says; fetch or import the model again"
        raise CorruptModel(source=path, problem=problem)


def hash_weights(folder: Path, model_id: str) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each weight file, hashing what was not hashed before.

    Raises:
        ModelNotFound: A weight file is missing.
        CorruptModel: The index is malformed, or a file cannot be read.
    """
    weights: dict[str, tuple[int, str]] = {}
    for name in weight_names(folder):
        path = contained_path(folder, name)
        if not path.is_file():
            problem = f"neither {name} nor {MANIFEST_NAME} is in {folder}"
            raise ModelNotFound(model=model_id, problem=problem)
        weights[name] = (path.stat().st_size, hash_file(path))
    return weights
