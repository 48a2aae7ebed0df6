"""Finds the config of a model without anything else of it."""

from __future__ import annotations

from pathlib import Path

from pals.models.config import ModelConfig
from pals.models.names import check_model_id, imported_folder
from pals.models.snapshot import CONFIG_NAME, read_model_config


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
    return read_model_config(folder, model)


def _local_folder(model: str) -> Path | None:
    if model.startswith(("/", "./", "../")):
        return Path(model)
    folder = imported_folder(check_model_id(model))
    return folder if folder.is_dir() else None


def _from_hub(model: str) -> ModelConfig:
    from pals.models.download import HUB_ERRORS
    from pals.models.hub import resolve_model
    from pals.models.hub_texts import DEFAULT_REVISION, fetch_file

    try:
        file = fetch_file(model, CONFIG_NAME, DEFAULT_REVISION)
    except HUB_ERRORS:
        return resolve_model(model).config  # which knows other places, and what went wrong
    return read_model_config(file.parent, model)
