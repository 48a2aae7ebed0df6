"""Finds the config of a model without anything else of it."""

from __future__ import annotations

from pathlib import Path

from pals.errors import ModelNotFound
from pals.models.config import ModelConfig
from pals.models.configs import read_config
from pals.models.files import MAX_CONFIG_BYTES, parse_json_object, read_file
from pals.models.names import check_model_id, imported_folder
from pals.models.snapshot import CONFIG_NAME


def load_config(model: str) -> ModelConfig:
    """Read the config.json of a folder, an imported model or a model on the hub.

    Args:
        model: A path (``/…`` or ``./…``), or ``org/name``.

    Raises:
        ModelNotFound: Nothing of that name is found.
        CorruptModel: It is malformed.
        UnsupportedModel: The model cannot be run.
    """
    folder = _local_folder(model)
    if folder is None:
        return _from_hub(model)
    return _read(folder, model)


def _local_folder(model: str) -> Path | None:
    if model.startswith(("/", "./", "../")):
        return Path(model)
    folder = imported_folder(check_model_id(model))
    return folder if folder.is_dir() else None


def _from_hub(model: str) -> ModelConfig:
    from huggingface_hub import (
        hf_hub_download,  # pyright: ignore[reportUnknownVariableType] a bare dict in its type
    )
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    from pals.models.hub import HUB_DEADLINE_S, resolve_model

    try:
        file = hf_hub_download(model, CONFIG_NAME, etag_timeout=HUB_DEADLINE_S)
    except (HTTPError, OSError):
        return resolve_model(model).config  # which knows other places, and what went wrong
    return _read(Path(file).parent, model)


def _read(folder: Path, model: str) -> ModelConfig:
    if not (folder / CONFIG_NAME).is_file():
        raise ModelNotFound(model=model, problem=f"{folder} has no {CONFIG_NAME}")
    source = folder / CONFIG_NAME
    values = parse_json_object(read_file(folder, CONFIG_NAME, most=MAX_CONFIG_BYTES), source)
    return read_config(values, source=str(source))
