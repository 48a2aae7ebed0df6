"""The layers around every application that the project serves over HTTP."""

from __future__ import annotations

from collections.abc import Callable

from litestar import Litestar

from pals.api.admission import Admission, Admitting
from pals.api.gate import Gate, GateSettings
from pals.api.observed import Observed, Seen


def guard(
    app: Litestar,
    gate: GateSettings,
    *,
    admission: Admission | None = None,
    observe: Callable[[Seen], None] = lambda _: None,
) -> Litestar:
    """Put an application behind its gate, and return it.

    Litestar's own middleware runs after routing; a refused request must not get that far.

    Args:
        app: The application.
        gate: What its listener lets through.
        admission: The places for POST requests; None for no bound but that of connections.
        observe: Told of each request at its end.
    """
    inner = app.asgi_handler
    if admission is not None:
        inner = Admitting(inner, admission)
    app.asgi_handler = Observed(Gate(inner, gate), observe=observe)
    return app
