"""A trio thread beside an asyncio loop: libp2p lives on the one, uvicorn on the other.

Calls cross by `trio.lowlevel.TrioToken.run_sync_soon` and
`asyncio.AbstractEventLoop.call_soon_threadsafe`; neither loop ever waits for the other.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Generic, TypeVar, cast

import trio

from pals.errors import PeerUnreachable

_log = logging.getLogger(__name__)

T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")

STOP_DEADLINE_S = 4.0


def post_to(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Run a function soon on an asyncio loop; dropped when that is closed."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        _log.debug("the asyncio loop has ended")


class TrioThread(Generic[T_co]):
    """Runs one async context manager on a trio loop in a thread of its own.

    Args:
        open_resource: Makes the context manager; its value is what `start` returns.
        on_crash: Called on the thread when trio ends by an error after the start.
    """

    def __init__(
        self,
        open_resource: Callable[[], AbstractAsyncContextManager[T_co]],
        *,
        on_crash: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_resource = open_resource
        self._on_crash = on_crash
        self._ready: Future[T_co] = Future()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=self._run, name="pals-trio", daemon=True)
        self.error: BaseException | None = None

    def start(self) -> T_co:
        """Start the thread and return the resource once it is open.

        Raises:
            BaseException: Whatever opening the resource raised.
            PeerUnreachable: It was stopped before that.
        """
        self._thread.start()
        return self._ready.result()

    def stop(self) -> None:
        """Close the resource, open or half open, and end the thread in `STOP_DEADLINE_S`."""
        self.post(self._scope.cancel)
        self._thread.join(STOP_DEADLINE_S)
        if self._thread.is_alive():
            _log.warning("the network did not stop within %s s", STOP_DEADLINE_S)

    def post(self, function: Callable[[], object]) -> None:
        """Call a function soon on the trio thread; dropped when that has ended."""
        try:
            if self._token is not None:
                self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            _log.debug("the network has stopped")

    async def call(
        self,
        function: Callable[[], Awaitable[R]],
        *,
        on_lost: Callable[[R], object] = lambda _: None,
    ) -> R:
        """Run an async function on the trio thread and wait for it on the asyncio loop.

        Cancelling the wait cancels the function.

        Args:
            function: Called on the trio thread.
            on_lost: Called there with a result that came too late for a cancelled wait,
                so that what it holds can be given back.

        Raises:
            PeerUnreachable: The trio thread has ended.
        """
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[R] = loop.create_future()
        scope = trio.CancelScope()

        def settle(result: R | None, error: BaseException | None) -> None:
            if error is not None:
                if not outcome.done():
                    outcome.set_exception(error)
            elif outcome.done():
                lose(cast("R", result))
            else:
                outcome.set_result(cast("R", result))

        def lose(result: R) -> None:
            self.post(partial(on_lost, result))

        def refuse() -> None:
            post_to(loop, partial(settle, None, _stopped()))

        async def run() -> None:
            try:
                with scope:
                    try:
                        result = await function()
                    except Exception as error:  # every error belongs to the asyncio caller
                        post_to(loop, partial(settle, None, _single(error)))
                    else:
                        post_to(loop, partial(settle, result, None))
            finally:
                refuse()  # nothing else tells a caller that the network stopped meanwhile

        self._spawn(run, refuse)
        try:
            return await outcome
        except asyncio.CancelledError:
            self.post(scope.cancel)
            if outcome.done() and not outcome.cancelled() and outcome.exception() is None:
                lose(outcome.result())
            raise

    def _spawn(self, run: Callable[[], Awaitable[None]], refuse: Callable[[], None]) -> None:
        def start_soon() -> None:
            assert self._nursery is not None
            try:
                self._nursery.start_soon(run)
            except RuntimeError:  # the nursery is closed while the resource closes
                refuse()

        if self._token is None:
            raise _stopped()
        try:
            self._token.run_sync_soon(start_soon)
        except trio.RunFinishedError:
            raise _stopped() from None

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self.error = error
            if self._ready.done():
                _log.exception("the network failed")
                self._on_crash()
            else:
                self._ready.set_exception(_single(error))
        else:
            if not self._ready.done():
                self._ready.set_exception(_stopped())

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with self._open_resource() as resource, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._ready.set_result(resource)
                await trio.sleep_forever()


def _stopped() -> PeerUnreachable:
    return PeerUnreachable(peer="self", problem="the network has stopped")


def _single(error: BaseException) -> BaseException:
    """Return the one error inside nested groups, which trio's nurseries make."""
    group = error
    while isinstance(group, BaseExceptionGroup):
        inner = cast("BaseExceptionGroup[BaseException]", group).exceptions
        group = inner[0] if len(inner) == 1 else None
        error = group or error
    return error
