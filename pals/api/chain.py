"""What the endpoint tells about the chain it uses, for `pals demo` and other tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from litestar import Request, get
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler

from pals.driver.interface import Driver, HopReport
from pals.errors import UnknownModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainReport:
    """The shards of the last used chain, head first, with their timings."""

    schema: int
    model: str
    hops: Sequence[HopReport]


def chain_route(drivers: Mapping[str, Driver]) -> HTTPRouteHandler:
    """Return the handler of ``GET /pals/chain``; ``?model=`` names one of several."""

    @get("/pals/chain")
    async def read_chain(request: Request[None, None, State]) -> ChainReport:
        model = request.query_params.get("model")
        driver = next(iter(drivers.values())) if model is None else drivers.get(model)
        if driver is None:
            raise UnknownModel(model=str(model)[:200], served="`, `".join(drivers), param="model")
        return ChainReport(schema=1, model=driver.model_id, hops=await driver.report())

    return read_chain
