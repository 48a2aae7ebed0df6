"""What the endpoint tells about the chain it uses, for `pals demo` and other tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from litestar import get
from litestar.handlers import HTTPRouteHandler

from pals.driver.interface import Driver, HopReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainReport:
    """The shards of the last used chain, head first, with their timings."""

    schema: int
    model: str
    hops: Sequence[HopReport]


def chain_route(driver: Driver) -> HTTPRouteHandler:
    """Return the handler of ``GET /pals/chain``."""

    @get("/pals/chain")
    async def read_chain() -> ChainReport:
        return ChainReport(schema=1, model=driver.model_id, hops=await driver.report())

    return read_chain
