"""Model names and the folders that imported models live in."""

from __future__ import annotations

import re
from pathlib import Path

from pals import config
from pals.errors import ModelNotFound

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_MODEL_ID = re.compile(rf"{_PART}/{_PART}")


def check_model_id(model_id: str) -> str:
    """Return ``model_id`` when it is the hub's ``org/name``.

    ``--`` and ``..`` are refused, as the hub does: the first joins the two parts in a
    folder's name, the second would leave the folder.

    Raises:
        ModelNotFound: It is something else.
    """
    if not _MODEL_ID.fullmatch(model_id) or "--" in model_id or ".." in model_id:
        raise ModelNotFound(model=model_id, problem="the name is not of the form `org/name`")
    return model_id


def imported_folder(model_id: str) -> Path:
    """Return where the import of ``model_id`` lives, whether or not it exists.

    Raises:
        ModelNotFound: ``model_id`` is not ``org/name``.
    """
    return config.cache_dir() / "models" / check_model_id(model_id).replace("/", "--")
