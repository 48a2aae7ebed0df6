"""Find a model by its name: on this machine, or on the Hugging Face hub.

Of a model on the hub a shard fetches the files that hold its layers, and a driver none
of the weights. The list of all weight files and their hashes is kept beside them, so
that both name the same model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pals import config
from pals.errors import CorruptModel, LayersOutsideModel, ModelNotFound
from pals.models.files import MAX_INDEX_BYTES, parse_json_object, read_file
from pals.models.names import check_model_id, imported_folder
from pals.models.safetensors import INDEX_NAME, SINGLE_NAME
from pals.models.snapshot import CONFIG_NAME, MANIFEST_NAME, Snapshot
from pals.types import LayerRange

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

HUB_DEADLINE_S = 10.0
DOWNLOAD_WORKERS = 4
TEXT_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX_NAME,
)

_WEIGHT_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_EMBEDDING = re.compile(r"(?:^|\.)embed_tokens\.")


def resolve_model(name: str, layers: LayerRange | None = None) -> Snapshot:
    """Return the snapshot of a model, with the weights of ``layers`` on this machine.

    Looked for in this order: a folder (``/…`` or ``./…``), an imported model, the hub,
    and the hub's cache when the hub does not answer. The demo model is imported from its
    package when nothing else has it.

    Args:
        name: A path, or ``org/name``.
        layers: The layers whose weights are needed; None for none, as a driver.

    Raises:
        ModelNotFound: Nothing of that name is found, with the reason.
        LayersOutsideModel: The model has fewer layers.
        CorruptModel: A file of the model is malformed.
        UnsupportedModel: The model cannot be run.
    """
    if name.startswith(("/", "./", "../")):
        return _checked(Snapshot.open(Path(name), _name_of_folder(Path(name))), layers)
    folder = imported_folder(check_model_id(name))
    if folder.is_dir():
        return _checked(Snapshot.open(folder, name), layers)
    try:
        return _from_hub(name, layers)
    except ModelNotFound:
        snapshot = _from_demo_package(name)
        if snapshot is None:
            raise
        return _checked(snapshot, layers)


def imported_models() -> list[Snapshot]:
    """Return the imported models in the cache, by name.

    Raises:
        CorruptModel: A file of one of them is malformed.
        UnsupportedModel: One of them cannot be run by this version.
    """
    folders = sorted((config.cache_dir() / "models").glob("[!.]*--*/"))
    return [Snapshot.open(folder, _name_of_folder(folder)) for folder in folders]


def files_for_layers(
    index: Mapping[str, object], layers: LayerRange, num_layers: int, tied: bool
) -> list[str]:
    """Return the weight files that hold a range of layers, sorted.

    The first range takes the embedding too; the last takes everything that belongs to no
    layer, and the embedding where it is ``tied`` to the LM head.

    Args:
        index: A parsed model.safetensors.index.json.
        layers: The range.
        num_layers: Layers of the whole model.
        tied: The LM head is the embedding matrix.

    Raises:
        LayersOutsideModel: The range reaches past the model.
        CorruptModel: The index names no file for a layer, or a file outside the folder.
    """
    if layers.stop > num_layers:
        raise LayersOutsideModel(layers=layers, num_layers=num_layers)
    files: set[str] = set()
    found: set[int] = set()
    for tensor, file in _weight_map(index).items():
        if (layer := _LAYER.search(tensor)) is not None:
            wanted = layers.start <= int(layer[1]) < layers.stop
            found.add(int(layer[1]))
        elif _EMBEDDING.search(tensor) is not None:
            wanted = layers.start == 0 or (tied and layers.stop == num_layers)
        else:
            wanted = layers.stop == num_layers
        if wanted:
            files.add(file)
    missing = sorted(set(range(layers.start, layers.stop)) - found)
    if missing:
        raise CorruptModel(source=INDEX_NAME, problem=f"it has no tensor of layer {missing[0]}")
    return sorted(files)


def _weight_map(index: Mapping[str, object]) -> dict[str, str]:
    value = index.get("weight_map")
    if not isinstance(value, dict):
        raise CorruptModel(source=INDEX_NAME, problem="it has no `weight_map`")
    checked: dict[str, str] = {}
    for tensor, file in cast("dict[str, object]", value).items():
        if not isinstance(file, str) or not _WEIGHT_FILE.fullmatch(file):
            problem = f"`{tensor[:80]}` lies in {str(file)[:80]!r}, which is no weight file"
            raise CorruptModel(source=INDEX_NAME, problem=problem)
        checked[tensor] = file
    return checked


# --- on this machine -----------------------------------------------------------------


def _name_of_folder(folder: Path) -> str:
    """Return ``org/name`` for an imported folder, the folder's name for any other."""
    return folder.resolve().name.replace("--", "/", 1)


def _checked(snapshot: Snapshot, layers: LayerRange | None) -> Snapshot:
    """Return ``snapshot`` when the files of ``layers`` are there.

    Raises:
        ModelNotFound: A weight file is missing.
    """
    for file in _weight_files(snapshot, layers):
        if not (snapshot.path / file).is_file():
            problem = f"{snapshot.path} lacks `{file}`, which holds layers {layers}"
            raise ModelNotFound(model=snapshot.model_id, problem=problem)
    return snapshot


def _weight_files(snapshot: Snapshot, layers: LayerRange | None) -> list[str]:
    """Return the weight files that ``layers`` need, there or not."""
    if layers is None:
        return []
    num_layers, tied = snapshot.config.num_layers, snapshot.config.tie_word_embeddings
    if layers.stop > num_layers:
        raise LayersOutsideModel(layers=layers, num_layers=num_layers)
    index = _load_index(snapshot.path)
    return [SINGLE_NAME] if index is None else files_for_layers(index, layers, num_layers, tied)


def _load_index(folder: Path) -> dict[str, object] | None:
    if not (folder / INDEX_NAME).is_file():
        return None
    data = read_file(folder, INDEX_NAME, most=MAX_INDEX_BYTES)
    return parse_json_object(data, folder / INDEX_NAME)


def _from_demo_package(name: str) -> Snapshot | None:
    # the gguf package is of no use to a process that finds its model elsewhere
    from pals.models.gguf import DEMO_MODEL_ID, import_gguf, packaged_demo_model

    file = packaged_demo_model() if name == DEMO_MODEL_ID else None
    return None if file is None else Snapshot.open(import_gguf(file, model_id=name), name)


# --- the hub -------------------------------------------------------------------------


def _from_hub(name: str, layers: LayerRange | None) -> Snapshot:
    """Fetch what is missing of a model from the hub, into the hub's own cache.

    The config is read before any weights, so that a model that cannot be run costs
    nothing.
    """
    from huggingface_hub import (
        HfApi,
        snapshot_download,  # pyright: ignore[reportUnknownVariableType] a bare dict in its type
    )

    def fetch(files: Sequence[str]) -> Path:
        folder = snapshot_download(
            name,
            revision=info.sha,
            allow_patterns=list(files),
            etag_timeout=HUB_DEADLINE_S,
            max_workers=DOWNLOAD_WORKERS,
        )
        return Path(folder)

    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=HUB_DEADLINE_S)
        folder = fetch(TEXT_FILES)
        _write_manifest(folder, name, info)
        weights = _weight_files(Snapshot.open(folder, name), layers)
        if weights:
            fetch(weights)
    except _hub_errors() as error:
        return _from_hub_cache(name, layers, error)
    return _checked(Snapshot.open(folder, name), layers)


def _hub_errors() -> tuple[type[Exception], ...]:
    # the client library below the hub's changes with its version, the name there does not
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return (HTTPError, OSError)


def _from_hub_cache(name: str, layers: LayerRange | None, error: Exception) -> Snapshot:
    """Return what the hub's cache has, when the hub gives nothing because of ``error``."""
    from huggingface_hub import try_to_load_from_cache

    config_file = try_to_load_from_cache(name, CONFIG_NAME)
    if not isinstance(config_file, str):
        reason = (str(error).splitlines() or [""])[0][:200]
        problem = f"it is not on this machine, and the hub gives none: {reason}"
        raise ModelNotFound(model=name, problem=problem) from error
    return _checked(Snapshot.open(Path(config_file).parent, name), layers)


def _write_manifest(folder: Path, name: str, info: ModelInfo) -> None:
    """Keep size and SHA-256 of every weight file, as the hub states them for LFS files.

    Raises:
        ModelNotFound: The hub states none of a weight file.
    """
    index = _load_index(folder)
    stated = {file.rfilename: file.lfs for file in info.siblings or ()}
    files: dict[str, dict[str, str | int]] = {}
    for file in sorted(set(_weight_map(index).values())) if index else [SINGLE_NAME]:
        lfs = stated.get(file)
        if lfs is None:
            raise ModelNotFound(model=name, problem=f"the hub states no hash of `{file}`")
        files[file] = {"size": lfs.size, "sha256": lfs.sha256}
    content = json.dumps({"files": files}, indent=2, sort_keys=True).encode()
    config.write_private(folder / MANIFEST_NAME, content)
