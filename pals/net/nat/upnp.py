"""Port forwards by UPnP: the router is asked first, and gives the port back at the end.

miniupnpc speaks the protocol; its calls block, so they run in a thread. A router may say
anything: its answers are parsed like a stranger's, and members are asked to dial the
mapped port before it counts (see `pals.net.nat.reachability`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Protocol, cast

import trio

from pals.net.nat.addresses import Endpoint, is_inside

_log = logging.getLogger(__name__)

LEASE_S = 1200
RENEW_S = 400.0
RETRY_S = 600.0
"""Seconds to the next look for a router where none forwards."""
PORT_TRIES = 4
DISCOVERY_MS = 2000
CALL_DEADLINE_S = 20.0
REMOVE_DEADLINE_S = 3.0
DESCRIPTION = "pals"
FIRST_PORT, LAST_PORT = 20_000, 60_000


class NoForward(Exception):
    """The router is not there or does not do it; what is told is logged, never shown."""


class Gateway(Protocol):
    """The router, as this module uses it; calls block."""

    def find(self) -> str:
        """Find the router and return its external IP address; raise `NoForward`."""
        ...

    def forward(self, external_port: int, port: int, lease_s: int) -> None:
        """Forward a TCP port to this machine; raise `NoForward`."""
        ...

    def remove(self, external_port: int) -> None:
        """Take a forward back; raise `NoForward`."""
        ...


class _Client(Protocol):
    """What is used of ``miniupnpc.UPnP``, a C extension without types."""

    discoverdelay: int
    lanaddr: str

    def discover(self) -> int: ...

    def selectigd(self) -> str: ...

    def externalipaddress(self) -> str: ...

    def addportmapping(self, *arguments: object) -> bool: ...

    def deleteportmapping(self, port: int, protocol: str) -> bool: ...


class _Module(Protocol):
    def UPnP(self) -> _Client: ...


class UpnpGateway:
    """The router that answers to UPnP in this network."""

    def __init__(self) -> None:
        import miniupnpc

        self._client = cast("_Module", miniupnpc).UPnP()
        self._client.discoverdelay = DISCOVERY_MS

    def find(self) -> str:
        try:
            self._client.discover()
            self._client.selectigd()
            return self._client.externalipaddress()
        except Exception as error:  # the extension raises the bare class
            raise NoForward(str(error)) from error

    def forward(self, external_port: int, port: int, lease_s: int) -> None:
        try:
            self._client.addportmapping(
                external_port, "TCP", self._client.lanaddr, port, DESCRIPTION, "", lease_s
            )
        except Exception as error:
            raise NoForward(str(error)) from error

    def remove(self, external_port: int) -> None:
        try:
            self._client.deleteportmapping(external_port, "TCP")
        except Exception as error:
            raise NoForward(str(error)) from error


class PortForward:
    """Keeps one port forwarded while it runs.

    Args:
        port: The port at which this machine listens.
        make_gateway: Makes what speaks to the router; called in a thread.
        on_change: Told the mapped endpoint, or None when there is none any more.
        rng: Chooses another external port where the first is taken.
    """

    def __init__(
        self,
        port: int,
        make_gateway: Callable[[], Gateway],
        on_change: Callable[[Endpoint | None], None],
        rng: random.Random,
    ) -> None:
        self._port = port
        self._make_gateway = make_gateway
        self._on_change = on_change
        self._rng = rng
        self._mapped: tuple[Gateway, Endpoint] | None = None

    async def run(self) -> None:
        """Map the port, renew the lease, and remove the forward when cancelled."""
        try:
            while True:
                await self._map()
                await trio.sleep(RETRY_S if self._mapped is None else RENEW_S)
        finally:
            await self._remove()

    async def _map(self) -> None:
        held = None if self._mapped is None else self._mapped[1]
        try:
            with trio.fail_after(CALL_DEADLINE_S):
                self._mapped = await trio.to_thread.run_sync(
                    self._map_blocking, held, abandon_on_cancel=True
                )
        except (NoForward, trio.TooSlowError) as error:
            _log.info("no port forward: %s", error or "the router does not answer")
            self._mapped = None
        mapped = None if self._mapped is None else self._mapped[1]
        if mapped != held:
            self._on_change(mapped)

    def _map_blocking(self, held: Endpoint | None) -> tuple[Gateway, Endpoint]:
        """Find the router and have it forward a port, the same as before if it can."""
        gateway = self._make_gateway()
        found = gateway.find()
        wanted = held.port if held is not None else self._port
        try:
            external = Endpoint.of(found, wanted)
        except ValueError as error:
            raise NoForward(f"the router names no address: {found[:60]!r}") from error
        if is_inside(external.ip):
            raise NoForward(f"the router is itself behind a NAT, at {external.ip}")
        others = [self._rng.randint(FIRST_PORT, LAST_PORT) for _ in range(PORT_TRIES)]
        return gateway, Endpoint(external.ip, self._forward(gateway, (wanted, *others)))

    def _forward(self, gateway: Gateway, ports: tuple[int, ...]) -> int:
        """Return the first of ``ports`` that the router forwards."""
        problem = ""
        for external_port in ports:
            for lease_s in (LEASE_S, 0):  # some routers know only forwards without an end
                try:
                    gateway.forward(external_port, self._port, lease_s)
                except NoForward as error:
                    problem = str(error)
                else:
                    return external_port
        raise NoForward(problem)

    async def _remove(self) -> None:
        if self._mapped is None:
            return
        gateway, mapped = self._mapped
        with trio.move_on_after(REMOVE_DEADLINE_S, shield=True):
            try:
                await trio.to_thread.run_sync(gateway.remove, mapped.port, abandon_on_cancel=True)
            except NoForward as error:
                _log.info(
                    "the forward of port %d stays until its lease ends: %s", mapped.port, error
                )
