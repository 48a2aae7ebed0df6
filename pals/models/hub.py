"""Find a model by its name: on this machine, or on the Hugging Face hub.

Of a model on the hub a driver fetches the small text files only, and a shard also the
weights of its layers. The list of all weight files and their hashes is kept beside them,
so that both name the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pals import config
from pals.errors import (
    CorruptModel,
    HubRefused,
    HubUnavailable,
    LayersOutsideModel,
    ModelNotFound,
)
from pals.models.listing import Listing
from pals.models.names import check_model_id, imported_folder
from pals.models.parts import is_needed, layer_of, parts_of
from pals.models.safetensors import INDEX_NAME, SINGLE_NAME, WeightFiles, read_index
from pals.models.snapshot import Snapshot, weight_names
from pals.models.store import WeightStore
from pals.types import LayerRange

if TYPE_CHECKING:
    from pals.models.download import Patience
    from pals.models.fetch import OnProgress


def resolve_model(
    name: str,
    layers: LayerRange | None = None,
    *,
    revision: str | None = None,
    patience: Patience | None = None,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Return the snapshot of a model, with the weights of ``layers`` on this machine.

    Looked for in this order: a folder (``/…`` or ``./…``), an imported model, the hub,
    and the hub's cache when the hub does not answer. The demo model is imported from its
    package when nothing else has it.

    Args:
        name: A path, or ``org/name``.
        layers: The layers whose weights are needed; None for none, as a driver.
        revision: Branch, tag or commit of a model on the hub; ``main`` when left out.
        patience: How long to wait for the hub.
        on_progress: Told about the bytes of the weights.

    Raises:
        ModelNotFound: Nothing of that name is found, with the reason.
        HubUnavailable: The hub does not answer, and this machine has not all of it.
        HubRefused: The hub asks for a token or for consent.
        ModelChanged: A file is another one than the hub listed.
        InvalidHubAnswer: The hub answers something else than was asked for.
        DiskTooSmall: The weights do not fit.
        DownloadStalled: Another process holds a download up.
        LayersOutsideModel: The model has fewer layers.
        CorruptModel: A file of the model is malformed.
        UnsupportedModel: The model cannot be run.
    """
    if name.startswith(("/", "./", "../")):
        return _checked(Snapshot.open(Path(name), _name_of_folder(Path(name))), layers)
    folder = imported_folder(check_model_id(name))
    if folder.is_dir() and revision is None:
        return _checked(Snapshot.open(folder, name), layers)
    try:
        return _from_hub(name, layers, revision, patience, on_progress)
    except (ModelNotFound, HubUnavailable, HubRefused):
        snapshot = _from_demo_package(name) if revision is None else None
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


# --- on this machine -----------------------------------------------------------------


def _name_of_folder(folder: Path) -> str:
    """Return ``org/name`` for an imported folder, the folder's name for any other."""
    return folder.resolve().name.replace("--", "/", 1)


def _checked(snapshot: Snapshot, layers: LayerRange | None) -> Snapshot:
    """Return ``snapshot`` when the weights of ``layers`` are there.

    Raises:
        LayersOutsideModel: The model has fewer layers.
        ModelNotFound: A weight file, or a part of one, is missing.
        CorruptModel: A layer has no weights, or a file is malformed.
    """
    if layers is None:
        return snapshot
    num_layers, tied = _shape(snapshot, layers)
    if WeightStore.of(snapshot.path) is None:
        _check_single_file(snapshot)
    weights = snapshot.weights()
    check_layers(weights.file_of, num_layers, snapshot.path)
    names = [name for name in weights.file_of if is_needed(name, layers, num_layers, tied=tied)]
    if isinstance(weights, WeightFiles):
        _check_files(snapshot, {weights.file_of[name] for name in names})
    else:
        weights.entries(names)
    return snapshot


def check_layers(file_of: Mapping[str, str], num_layers: int, source: Path) -> None:
    """Raise `CorruptModel` when a layer of the model has no tensor at all."""
    missing = sorted(set(range(num_layers)) - set(map(layer_of, file_of)))
    if missing:
        raise CorruptModel(source=source, problem=f"it has no tensor of layer {missing[0]}")


def _shape(snapshot: Snapshot, layers: LayerRange) -> tuple[int, bool]:
    """Return the model's layers and whether its head is tied.

    Raises:
        LayersOutsideModel: The range reaches past the model.
    """
    num_layers, tied = snapshot.config.num_layers, snapshot.config.tie_word_embeddings
    if layers.stop > num_layers:
        raise LayersOutsideModel(layers=layers, num_layers=num_layers)
    return num_layers, tied


def _check_single_file(snapshot: Snapshot) -> None:
    if weight_names(snapshot.path) == [SINGLE_NAME]:
        _check_files(snapshot, {SINGLE_NAME})


def _check_files(snapshot: Snapshot, files: set[str]) -> None:
    for file in sorted(files):
        if not (snapshot.path / file).is_file():
            problem = f"{snapshot.path} lacks `{file}`"
            raise ModelNotFound(model=snapshot.model_id, problem=problem)


def _from_demo_package(name: str) -> Snapshot | None:
    # the gguf package is of no use to a process that finds its model elsewhere
    from pals.models.gguf import DEMO_MODEL_ID, import_gguf, packaged_demo_model

    file = packaged_demo_model() if name == DEMO_MODEL_ID else None
    return None if file is None else Snapshot.open(import_gguf(file, model_id=name), name)


# --- the hub -------------------------------------------------------------------------


def _from_hub(
    name: str,
    layers: LayerRange | None,
    revision: str | None,
    patience: Patience | None,
    on_progress: OnProgress | None,
) -> Snapshot:
    """Fetch what is missing of a model from the hub, into the hub's own cache.

    The config is read before any weights, so that a model that cannot be run costs
    nothing.
    """
    # the hub's client is of no use to a process that finds its model elsewhere
    from pals.models.download import Patience
    from pals.models.fetch import WeightFetcher
    from pals.models.hub_texts import cached_snapshot, fetch_texts

    patience = patience or Patience()
    cached = cached_snapshot(name, revision)
    try:
        folder = fetch_texts(name, revision, patience, has_fallback=cached is not None)
    except (ModelNotFound, HubUnavailable, HubRefused) as error:
        return _from_hub_cache(name, cached, layers, error)
    snapshot = Snapshot.open(folder, name)
    if layers is not None:
        num_layers, tied = _shape(snapshot, layers)
        index = read_index(folder) if (folder / INDEX_NAME).is_file() else None
        if index is not None:
            check_layers(index, num_layers, folder / INDEX_NAME)
        listing = _listing(folder, name)
        fetcher = WeightFetcher(name, folder, listing, patience=patience, on_progress=on_progress)
        fetcher.fetch(parts_of(layers, num_layers, tied=tied), index)
    return _checked(Snapshot.open(folder, name), layers)


def _from_hub_cache(
    name: str, folder: Path | None, layers: LayerRange | None, error: Exception
) -> Snapshot:
    """Return what the hub's cache has, when the hub gives nothing because of ``error``."""
    if folder is None:
        raise error
    try:
        return _checked(Snapshot.open(folder, name), layers)
    except ModelNotFound as missing:
        raise error from missing


def _listing(folder: Path, name: str) -> Listing:
    store = WeightStore.of(folder)
    listing = None if store is None else store.read_listing(folder.name)
    if listing is None:
        raise ModelNotFound(model=name, problem=f"{folder} has no list of its weight files")
    return listing
