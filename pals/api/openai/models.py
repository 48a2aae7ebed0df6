"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from collections.abc import Sequence

from litestar import get
from litestar.handlers import HTTPRouteHandler

from pals.api.openai.endpoint import ApiRequest, Endpoint
from pals.api.openai.schema.models import Model, ModelList
from pals.driver.interface import Driver


def model_routes(endpoint: Endpoint) -> Sequence[HTTPRouteHandler]:
    """Return the handlers that tell which models can be asked."""

    @get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[_model(driver) for driver in endpoint.drivers.values()])

    @get("/v1/models/{model_id:path}")
    async def get_model(request: ApiRequest) -> Model:
        name = str(request.path_params["model_id"]).removeprefix("/")
        return _model(endpoint.driver(name))

    return list_models, get_model


def _model(driver: Driver) -> Model:
    return Model(id=driver.model_id, created=driver.created)
