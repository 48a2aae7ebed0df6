"""What the head of a request must say, checked before anything else is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pals.api.gate.settings import GateSettings
from pals.errors import (
    BodyTooLarge,
    HostRefused,
    InvalidApiKey,
    InvalidRequest,
    OriginRefused,
    UnsupportedMediaType,
)

if TYPE_CHECKING:
    from litestar.types import HTTPScope

BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})

_SAME_SITE_SCHEMES = ("http://", "https://")


def check_host(scope: HTTPScope, settings: GateSettings) -> None:
    """Raise `HostRefused` unless there is one `Host` header and it is the listener's own."""
    values = header(scope, b"host")
    if len(values) != 1 or not settings.has_host(values[0].lower(), _arrived_at(scope)):
        raise HostRefused


def check_origin(scope: HTTPScope, settings: GateSettings) -> str | None:
    """Return the other site whose page sent the request and may; None if no such one did.

    Raises:
        OriginRefused: A page sent it that this listener did not serve and nobody allowed.
    """
    allowed: str | None = None
    for value in header(scope, b"origin"):
        origin = value.lower()
        if origin in settings.origins:
            allowed = value
        elif not _is_same_site(origin, scope, settings):
            raise OriginRefused
    return allowed


def check_api_key(scope: HTTPScope, settings: GateSettings) -> str | None:
    """Return the name of the bearer key; None where none is asked for.

    Raises:
        InvalidApiKey: It is none of the listener's, or there are none or several.
    """
    if settings.keys is None:
        return None
    values = header(scope, b"authorization")
    scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    name = settings.keys.name_of(key.strip().encode("latin-1"))
    if scheme.lower() != "bearer" or name is None:
        raise InvalidApiKey
    return name


def check_content(scope: HTTPScope, settings: GateSettings) -> str:
    """Return the body's media type.

    A simple content type would let any web page post without a preflight.

    Raises:
        UnsupportedMediaType: It is none of the listener's, or the body is compressed.
        BodyTooLarge: The body says that it is.
    """
    if any(value.lower() != "identity" for value in header(scope, b"content-encoding")):
        raise UnsupportedMediaType(header="Content-Encoding", expected="an uncompressed body")
    values = header(scope, b"content-type")
    media_type = values[0].partition(";")[0].strip().lower() if len(values) == 1 else ""
    if media_type not in settings.content_types:
        expected = ", ".join(sorted(settings.content_types))
        raise UnsupportedMediaType(header="Content-Type", expected=f"Content-Type: {expected}")
    if _declared_bytes(scope) > settings.max_body_bytes:
        raise BodyTooLarge(limit_bytes=settings.max_body_bytes)
    return media_type


def check_no_content(scope: HTTPScope) -> None:
    """Raise `InvalidRequest` when a request has a body that has no use for one."""
    if _declared_bytes(scope) > 0 or header(scope, b"transfer-encoding"):
        raise InvalidRequest(problem=f"{scope['method']} takes no body")


def header(scope: HTTPScope, name: bytes) -> list[str]:
    """Return the values of a header, which is named in lower case."""
    return [value.decode("latin-1").strip() for field, value in scope["headers"] if field == name]


def _is_same_site(origin: str, scope: HTTPScope, settings: GateSettings) -> bool:
    scheme = next((s for s in _SAME_SITE_SCHEMES if origin.startswith(s)), None)
    if scheme is None:
        return False
    return settings.has_host(origin.removeprefix(scheme), _arrived_at(scope))


def _arrived_at(scope: HTTPScope) -> str:
    server = scope["server"]
    return server[0] if server else ""


def _declared_bytes(scope: HTTPScope) -> int:
    return max((int(v) for v in header(scope, b"content-length") if v.isdecimal()), default=0)
