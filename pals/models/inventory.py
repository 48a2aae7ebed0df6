"""The models on this machine, and what of them is here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pals import config
from pals.errors import ModelError, ModelNotFound
from pals.models.files import MAX_CONFIG_BYTES, parse_json_object, read_file
from pals.models.listing import ListedFile, Listing
from pals.models.names import check_model_id, imported_folder
from pals.models.parts import layer_of
from pals.models.safetensors import Weights
from pals.models.snapshot import CONFIG_NAME, read_listing, read_model_config, weight_names
from pals.models.store import WeightStore, has_file, open_weights
from pals.types import LayerRange


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """One version of a model of which something is on this machine.

    Attributes:
        model_id: ``org/name``.
        source: "import" or "hub".
        folder: Its folder of config, tokenizer and weights.
        revision: The commit on the hub; empty for an import.
        family: The model type that config.json names.
        num_layers: Layers of the whole model.
        layers: The ranges of layers whose weights are all here.
        size_bytes: What it takes on the disk.
        files: Its weight files.
        licence: As the model's card states it; empty where it does not.
    """

    model_id: str
    source: str
    folder: Path
    revision: str
    family: str
    num_layers: int
    layers: tuple[LayerRange, ...]
    size_bytes: int
    files: tuple[ListedFile, ...]
    licence: str


def local_models() -> list[LocalModel]:
    """Return the imported models and those in the hub's cache that this version can run."""
    found: list[LocalModel] = []
    for folder in [*_import_folders(), *_hub_folders()]:
        with contextlib.suppress(ModelError):
            found.append(describe_model(folder))
    return sorted(found, key=lambda model: (model.model_id, model.source, model.revision))


def describe_model(folder: Path) -> LocalModel:
    """Describe a model's folder; hashes no weights.

    Raises:
        ModelNotFound: There is no model.
        CorruptModel: A file is malformed.
        UnsupportedModel: This version cannot run it.
    """
    model_id = model_id_of(folder)
    num_layers = read_model_config(folder, model_id).num_layers
    config_json = read_file(folder, CONFIG_NAME, most=MAX_CONFIG_BYTES)
    family = parse_json_object(config_json, folder / CONFIG_NAME).get("model_type")
    listing = read_listing(folder) or _listing_of_files(folder)
    in_cache = WeightStore.of(folder) is not None
    return LocalModel(
        model_id=model_id,
        source="hub" if in_cache else "import",
        folder=folder,
        revision=folder.name if in_cache else "",
        family=str(family),
        num_layers=num_layers,
        layers=tuple(_layers_here(folder, num_layers)),
        size_bytes=folder_bytes(folder.parents[1] if in_cache else folder),
        files=tuple(listing.files.values()),
        licence=listing.licence,
    )


def model_id_of(folder: Path) -> str:
    """Return ``org/name`` of an import's or a snapshot's folder."""
    named = folder if WeightStore.of(folder) is None else folder.parents[1]
    return named.name.removeprefix("models--").replace("--", "/", 1)


def _listing_of_files(folder: Path) -> Listing:
    """List weight files whose hashes nobody kept."""
    files = {
        name: ListedFile(name=name, size_bytes=(folder / name).stat().st_size, sha256="")
        for name in weight_names(folder)
        if has_file(folder, name)
    }
    return Listing(files=files)


def _import_folders() -> list[Path]:
    return sorted((config.cache_dir() / "models").glob("[!.]*--*/"))


def _hub_folders() -> list[Path]:
    return sorted(hub_cache().glob("models--*--*/snapshots/*/"))


def hub_cache() -> Path:
    """Return the folder of the hub's cache."""
    # the hub's client is of no use to a command that only names a model
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def folder_bytes(folder: Path) -> int:
    """Return what a folder takes on the disk; links count nothing."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)


def find_local(name: str) -> list[Path]:
    """Return the folders of a model: its import, and its revisions in the hub's cache.

    Raises:
        ModelNotFound: There is none, or the name is not ``org/name``.
    """
    check_model_id(name)
    folders = [folder for folder in _hub_folders() if model_id_of(folder) == name]
    if imported_folder(name).is_dir():
        folders.insert(0, imported_folder(name))
    if not folders:
        raise ModelNotFound(model=name, problem="nothing of it is on this machine")
    return folders


# --- what is here --------------------------------------------------------------------


def _layers_here(folder: Path, num_layers: int) -> Iterator[LayerRange]:
    """Yield the longest ranges of layers of which every tensor is on this machine."""
    try:
        weights = open_weights(folder)
    except ModelError:
        return
    here = _complete_layers(weights, num_layers)
    start = None
    for layer in range(num_layers + 1):
        if layer in here and start is None:
            start = layer
        elif layer not in here and start is not None:
            yield LayerRange(start, layer)
            start = None


def _complete_layers(weights: Weights, num_layers: int) -> set[int]:
    names: dict[int, list[str]] = {}
    for name in weights.file_of:
        layer = layer_of(name)
        if layer is not None and layer < num_layers:
            names.setdefault(layer, []).append(name)
    return {layer for layer, tensors in names.items() if _are_here(weights, tensors)}


def _are_here(weights: Weights, names: list[str]) -> bool:
    try:
        weights.entries(names)
    except ModelError:
        return False
    return True
