"""A model folder on this machine: its config, and the manifest that names its bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pals.errors import CorruptModel, ModelNotFound, UnsupportedModel
from pals.models.config import ModelConfig
from pals.models.configs import read_config
from pals.models.files import (
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    contained_path,
    parse_json_object,
    read_file,
)
from pals.models.hashes import hash_file
from pals.models.listing import ListedFile, Listing
from pals.models.safetensors import INDEX_NAME, SINGLE_NAME, Weights, read_header, read_index
from pals.models.store import WeightStore, open_weights
from pals.types import MAX_TOKENIZER_BYTES

MANIFEST_NAME = "manifest.json"
CONFIG_NAME = "config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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

        The weight files need not all be there when a list of them is kept: so a
        driver, which has none, and each shard come to the same manifest.

        Raises:
            ModelNotFound: There is no config.json, or nothing says what the weights are.
            CorruptModel: A file is malformed.
            UnsupportedModel: The model cannot be run.
        """
        config = read_model_config(path, model_id)
        return cls(
            path=path, model_id=model_id, config=config, manifest=manifest_of(path, model_id)
        )

    def weights(self) -> Weights:
        """Open the weights: those of the folder, or the downloaded parts of a hub model.

        Raises:
            CorruptModel: There are none, or the index or a header is malformed.
            ModelNotFound: None of them was downloaded.
        """
        return open_weights(self.path)


def read_model_config(folder: Path, model_id: str) -> ModelConfig:
    """Return what config.json of a model's folder says.

    Raises:
        ModelNotFound: There is no config.json.
        CorruptModel: It is malformed.
        UnsupportedModel: The model cannot be run.
    """
    if not os.path.lexists(folder / CONFIG_NAME):
        raise ModelNotFound(model=model_id, problem=f"{folder} has no {CONFIG_NAME}")
    data = read_file(folder, CONFIG_NAME, most=MAX_CONFIG_BYTES)
    source = folder / CONFIG_NAME
    return read_config(parse_json_object(data, source), source=str(source))


def manifest_of(folder: Path, model_id: str) -> bytes:
    """Return the SHA-256 of the canonical list of the model's files.

    Raises:
        ModelNotFound: Weight files are missing, and no list of them is kept.
        CorruptModel: A file is malformed or differs from that list.
    """
    texts = {
        name: hashlib.sha256(read_file(folder, name, most=MAX_TOKENIZER_BYTES)).hexdigest()
        for name in TEXT_NAMES
        if os.path.lexists(folder / name)
    }
    weights = {
        file.name: (file.size_bytes, file.sha256) for file in _weight_files(folder, model_id)
    }
    listed = [{"name": name, "sha256": sha256} for name, sha256 in sorted(texts.items())]
    listed += [
        {"name": name, "size": size, "sha256": sha256}
        for name, (size, sha256) in sorted(weights.items())
    ]
    canonical = json.dumps(listed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()


def read_listing(folder: Path) -> Listing | None:
    """Return the list of weight files that is kept for a folder, None where none is.

    Raises:
        CorruptModel: It is malformed.
    """
    store = WeightStore.of(folder)
    if store is not None:
        return store.read_listing(folder.name)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    data = read_file(folder, MANIFEST_NAME, most=MAX_INDEX_BYTES)
    return Listing.parse(parse_json_object(data, path), path)


def weight_names(folder: Path) -> list[str]:
    """Return the names of the model's weight files: those of the index, or the single one.

    Raises:
        CorruptModel: The index is malformed.
    """
    has_index = (folder / INDEX_NAME).is_file()
    return sorted(set(read_index(folder).values())) if has_index else [SINGLE_NAME]


def _weight_files(folder: Path, model_id: str) -> list[ListedFile]:
    """Return the model's weight files, from the kept list or from the files themselves.

    Raises:
        ModelNotFound: A weight file is missing, and no list is kept.
        CorruptModel: The list is malformed or not that of the index, or a file that is
            here has another size or hash.
    """
    listing = read_listing(folder)
    if listing is None:
        return hash_weights(folder, model_id)
    differing = sorted(listing.files.keys() ^ set(weight_names(folder)))
    if differing:
        problem = f"`{differing[0][:200]}` is in the list or in the model's index, but not in both"
        raise CorruptModel(source=folder, problem=problem)
    for file in listing.files.values():
        path = contained_path(folder, file.name)
        if path.is_file():
            _check_file(path, file.size_bytes, file.sha256)
    return list(listing.files.values())


def _check_file(path: Path, size: int, sha256: str) -> None:
    if path.stat().st_size != size:
        raise CorruptModel(source=path, problem=f"it does not have the {size} bytes it should")
    if hash_file(path) != sha256:
        problem = "its content has not the hash it should; fetch or import the model again"
        raise CorruptModel(source=path, problem=problem)


def refuse_pickles(source: Path | str, names: Collection[str]) -> None:
    """Raise `UnsupportedModel` when a model has its weights as pickles only, which are programs.

    Beside safetensors they stay unread.
    """
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        problem = f"`{pickles[0][:200]}` is a pickle and never opened: only safetensors are read"
        raise UnsupportedModel(source=source, problem=problem)


def hash_weights(folder: Path, model_id: str) -> list[ListedFile]:
    """Return the model's weight files, hashing what was not hashed before.

    Raises:
        ModelNotFound: A weight file is missing.
        UnsupportedModel: The weights are there as pickles only.
        CorruptModel: The index is malformed, or a file cannot be read or has no sound header.
    """
    files: list[ListedFile] = []
    for name in weight_names(folder):
        path = contained_path(folder, name)
        if not path.exists():
            refuse_pickles(folder, [file.name for file in folder.iterdir()])
            problem = f"{name} is not in {folder}, and no list of its weight files is kept"
            raise ModelNotFound(model=model_id, problem=problem)
        read_header(path)  # a file that lies about its size is not hashed for hours
        size_bytes = path.stat().st_size
        files.append(ListedFile(name=name, size_bytes=size_bytes, sha256=hash_file(path)))
    return files
