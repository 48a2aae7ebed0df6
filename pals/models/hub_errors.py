"""What the failures of the hub's client mean, and what to do about them."""

from __future__ import annotations

import errno

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pals.errors import (
    HubRefused,
    HubUnavailable,
    InvalidHubAnswer,
    ModelNotFound,
    ModelNotWritten,
    PalsError,
)

MAX_REASON_CHARACTERS = 200
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM})


def reason(error: BaseException) -> str:
    """Return the first line of what an error says."""
    if isinstance(error, HfHubHTTPError):
        return f"it answers {error.response.status_code} {error.response.reason_phrase}".rstrip()
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:MAX_REASON_CHARACTERS] if lines else type(error).__name__


def explain(error: Exception, model: str, revision: str | None) -> PalsError:
    """Return what a failure of the hub's client means, and what to do about it."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__, model, revision)
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        problem = "it is not on this machine, and offline mode is on (HF_HUB_OFFLINE)"
        return ModelNotFound(model=model, problem=problem)
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, model, revision)
    if isinstance(error, FileMetadataError):
        return InvalidHubAnswer(model=model, file="config.json", problem=reason(error))
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return not_written(error)
    return HubUnavailable(model=model, problem=reason(error))


def _explain_answer(error: HfHubHTTPError, model: str, revision: str | None) -> PalsError:
    has_token = "authorization" in error.response.request.headers
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return HubRefused(model=model, problem="it is gated", advice=_gate_advice(model, has_token))
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(model=model, problem=f"it has no revision `{revision or 'main'}`")
    if isinstance(error, DisabledRepoError):
        return HubRefused(model=model, problem="it was disabled", advice="choose another model")
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(model=model, problem=_absence(has_token))
    if status in (401, 403):
        return _explain_refusal(model, status, has_token)
    if status == 404:
        return ModelNotFound(model=model, problem="the hub lacks a file that it listed")
    return HubUnavailable(model=model, problem=reason(error))


def _absence(has_token: bool) -> str:
    if has_token:
        return "the hub has none of that name that the account of HF_TOKEN may see"
    return "the hub has none of that name, or it is private: then set HF_TOKEN"


def _gate_advice(model: str, has_token: bool) -> str:
    page = f"{constants.ENDPOINT}/{model}"
    if has_token:
        return f"accept its terms at {page} with the account that HF_TOKEN belongs to"
    return f"accept its terms at {page}, then set HF_TOKEN to a token of that account"


def _explain_refusal(model: str, status: int, has_token: bool) -> HubRefused:
    page = f"{constants.ENDPOINT}/settings/tokens"
    if not has_token:
        problem, advice = "it asks for a token", f"make one at {page} and set HF_TOKEN to it"
    elif status == 401:
        problem = "the token is not valid"
        advice = f"set HF_TOKEN to one of {page}, or unset it"
    else:
        problem = "the token does not allow it"
        advice = f"give the token of HF_TOKEN the right to read this model at {page}"
    return HubRefused(model=model, problem=problem, advice=advice)


def not_written(error: OSError) -> ModelNotWritten:
    """Return the error of a cache that cannot be written."""
    return ModelNotWritten(folder=constants.HF_HUB_CACHE, problem=error.strerror or str(error))
