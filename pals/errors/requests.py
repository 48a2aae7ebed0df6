"""Errors of requests over HTTP, with the codes of OpenAI where it has one."""

from __future__ import annotations

from pals.errors.base import CapacityError, UserError


class InvalidRequest(UserError):
    """A request that is malformed or has a value out of range."""

    code = "invalid_value"
    message = "{problem}"


class InvalidGrammar(InvalidRequest):
    """A schema or grammar that cannot be enforced, or that takes too long to."""

    code = "invalid_grammar"


class UnsupportedParameter(InvalidRequest):
    """A parameter that exists but that this version does not implement."""

    code = "unsupported_parameter"
    message = "`{param}` is not supported: {problem}"


class UnknownParameter(InvalidRequest):
    """A parameter that no version knows."""

    code = "unknown_parameter"
    message = "unrecognized parameter: `{param}`"


class UnknownModel(InvalidRequest):
    """A request for another model than the one that is served."""

    code = "model_not_found"
    message = "the model `{model}` is not served here"
    hint_template = "this endpoint serves `{served}`"
    http_status = 404


class InvalidApiKey(InvalidRequest):
    """A request without the endpoint's API key."""

    code = "invalid_api_key"
    message = "missing or wrong API key"
    hint_template = "send the endpoint's key as `Authorization: Bearer KEY`"
    http_status = 401


class HostRefused(InvalidRequest):
    """A request for a host name that is not this endpoint's (DNS rebinding)."""

    code = "misdirected_request"
    message = "this endpoint does not answer for that host name"
    hint_template = (
        "use the address it printed when it started; whoever runs it can name others: "
        "`[serve] hosts` in a preset, `pals backend --public-name`"
    )
    http_status = 421


class OriginRefused(InvalidRequest):
    """A request that a web page of another site made."""

    code = "origin_refused"
    message = "requests from web pages of other sites are refused"
    hint_template = "whoever runs the endpoint can name the site in `[serve] origins`"
    http_status = 403


class UnsupportedMediaType(InvalidRequest):
    """A body that is not of a type the endpoint reads."""

    code = "unsupported_media_type"
    message = "unsupported {header}"
    hint_template = "send `{expected}`"
    http_status = 415


class BodyTooLarge(InvalidRequest):
    """A request body over the limit."""

    code = "body_too_large"
    message = "the request body is larger than {limit_bytes} bytes"
    http_status = 413


class HeadTooLarge(InvalidRequest):
    """The head of a request over a limit."""

    code = "head_too_large"
    message = "the head of the request has more than {limit_bytes} bytes or {limit_headers} headers"
    http_status = 431


class ReceiveTimeout(InvalidRequest):
    """A request body that did not arrive in time."""

    code = "receive_timeout"
    message = "the request body did not arrive within {deadline_s:g} s"
    http_status = 408


class NoSuchRoute(InvalidRequest):
    """A path that the endpoint does not have."""

    code = "unknown_url"
    message = "unknown request URL: {method} {path}"
    http_status = 404


class MethodNotAllowed(InvalidRequest):
    """A path that exists, with a method it does not take."""

    code = "method_not_allowed"
    message = "{method} is not allowed on {path}"
    http_status = 405


class RateLimitExceeded(CapacityError):
    """A request for which there is no place, neither to run nor to wait."""

    code = "rate_limit_exceeded"
    message = "too many requests: {running} run and {waiting} wait"
    hint_template = "try it again in {retry_after_s} s"


class EndpointLeaving(CapacityError):
    """A request to an endpoint that is about to stop."""

    code = "service_unavailable"
    message = "this endpoint is about to stop"
    hint_template = "try it again once it has started anew"
    http_status = 503
