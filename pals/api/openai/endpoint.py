"""What the routes of one endpoint share: its models and what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from litestar import Request
from litestar.datastructures import State

from pals.api.metrics import EndpointMetrics
from pals.driver.interface import Driver
from pals.errors import UnknownModel

ApiRequest = Request[None, None, State]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The models that can be asked, by their ids."""

    drivers: Mapping[str, Driver]
    metrics: EndpointMetrics = field(default_factory=EndpointMetrics)

    def driver(self, model: str) -> Driver:
        """Return the driver of a model.

        Raises:
            UnknownModel: It is not served here.
        """
        driver = self.drivers.get(model)
        if driver is None:
            raise UnknownModel(model=model[:200], served="`, `".join(self.drivers), param="model")
        return driver
