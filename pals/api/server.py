"""One HTTP server: what it may listen on, and uvicorn run without its own opinions.

The address is resolved once and exactly that address is checked and bound, so that a
name cannot mean loopback for the check and something else for the bind.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn
from litestar.types import ASGIApp

from pals.api.heads import MAX_HEAD_BYTES
from pals.api.protocol import ConnectionLimits, guarded_protocol
from pals.errors import PortInUse, PublicBindWithoutKey

BACKLOG = 128
KEEP_ALIVE_S = 30
GRACEFUL_SHUTDOWN_S = 3
FORCED_CHECK_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A bound, listening socket.

    Attributes:
        socket: Owned by whoever holds the listener until a server runs on it.
        host: The address literal it is bound to, without brackets.
        port: The port it is bound to, never 0.
    """

    socket: socket.socket
    host: str
    port: int

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}"


def listen(host: str, port: int, *, has_keys: bool) -> Listener:
    """Bind and listen; port 0 takes a free one.

    Raises:
        PublicBindWithoutKey: Other machines could reach it and no API key is asked for.
        PortInUse: The address cannot be resolved or bound.
    """
    try:
        family, address = _resolve(host, port)
    except (OSError, ValueError) as error:
        if not has_keys:
            raise PublicBindWithoutKey(host=host) from error
        raise PortInUse(host=host, port=port, problem=str(error)) from error
    if not has_keys and not _is_loopback(address[0]):
        raise PublicBindWithoutKey(host=host)
    return _bind(family, address)


def listen_anywhere(host: str, port: int) -> Listener:
    """Bind and listen, also where others can reach it; for services whose requests are signed.

    Raises:
        PortInUse: The address cannot be resolved or bound.
    """
    try:
        family, address = _resolve(host, port)
    except (OSError, ValueError) as error:
        raise PortInUse(host=host, port=port, problem=str(error)) from error
    return _bind(family, address)


def check_public_bind(host: str, *, has_keys: bool) -> None:
    """Refuse a bind that other machines can reach, unless it asks for a key.

    Raises:
        PublicBindWithoutKey: ``host``, however it is spelled, is not loopback.
    """
    if has_keys:
        return
    try:
        _, address = _resolve(host, 0)
    except (OSError, ValueError) as error:
        raise PublicBindWithoutKey(host=host) from error
    if not _is_loopback(address[0]):
        raise PublicBindWithoutKey(host=host)


class HttpServer:
    """Run an ASGI application over one listener with uvicorn.

    `run` blocks until `stop` is called from any thread or, on the main thread, until
    SIGINT or SIGTERM; requests in flight get ``drain_s`` to end. A second signal ends them
    at once.

    Args:
        app: What answers.
        listener: Where.
        on_ready: Called with the URL when it listens.
        limits: Of connections.
        drain_s: Longest wait for requests in flight, in seconds.
        on_leave: Called once it takes no more of them.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: Listener,
        *,
        on_ready: Callable[[str], None] | None = None,
        limits: ConnectionLimits | None = None,
        drain_s: float = GRACEFUL_SHUTDOWN_S,
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._listener = listener
        self._server = _Server(
            _uvicorn_config(app, limits or ConnectionLimits(), drain_s),
            on_ready=lambda: on_ready(listener.url) if on_ready else None,
            on_leave=on_leave,
        )

    def run(self) -> None:
        with self._listener.socket as bound:
            self._server.run(sockets=[bound])

    def stop(self) -> None:
        self._server.should_exit = True

    @property
    def is_forced(self) -> bool:
        """Whether a second signal asked it to wait for nothing."""
        return self._server.force_exit


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        *,
        on_ready: Callable[[], None],
        on_leave: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_leave = on_leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests on the first signal, and end those that run on the second."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_log_failure)
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_leave()
        watch = asyncio.create_task(self._cut_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            watch.cancel()

    async def _cut_when_forced(self) -> None:
        # Since Python 3.12 a listener is closed only when its last connection is.
        while not self.force_exit:  # noqa: ASYNC110 # a signal handler sets it
            await asyncio.sleep(FORCED_CHECK_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _log_failure(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Log what nobody handled; asyncio would quote it, and it may quote what people wrote."""
    error = context.get("exception")
    frames = traceback.format_tb(error.__traceback__) if isinstance(error, Exception) else []
    _log.error("internal error: %s\n%s", type(error).__name__, "".join(frames))


def _uvicorn_config(app: ASGIApp, limits: ConnectionLimits, drain_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=guarded_protocol(limits),
        ws="none",
        interface="asgi3",
        log_config=None,
        log_level="error",
        access_log=False,
        # X-Forwarded-For is anybody's claim; nothing here may believe it.
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        # Never reached by connections, of which there are fewer: it bounds what still runs.
        limit_concurrency=limits.total + 1,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(drain_s),
    )


def _bind(family: socket.AddressFamily, address: tuple[str, int]) -> Listener:
    host, port = address
    try:
        bound = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise PortInUse(host=host, port=port, problem=error.strerror) from error
    return Listener(socket=bound, host=host, port=bound.getsockname()[1])


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    name = host.removeprefix("[").removesuffix("]")
    found = socket.getaddrinfo(name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))


def _is_loopback(literal: str) -> bool:
    address = ipaddress.ip_address(literal)
    # Python versions disagree on mapped addresses, and no one needs to bind to one.
    mapped = isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None
    return address.is_loopback and not mapped
