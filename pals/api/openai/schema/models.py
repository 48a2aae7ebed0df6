"""The models that can be asked (`Model`, `ListModelsResponse`)."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Model(Struct, frozen=True, kw_only=True):
    """A model that can be asked."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "pals"


class ModelList(Struct, frozen=True, kw_only=True):
    """All of them."""

    data: list[Model]
    object: Literal["list"] = "list"
