"""Errors of models and of the text they are given."""

from __future__ import annotations

from pals.errors.base import CapacityError, ModelError, UserError


class ModelNotFound(ModelError):
    """No local model of that name, and the hub does not give it."""

    code = "PALS-MODEL-NOT-FOUND"
    message = "no model `{model}`: {problem}"
    hint_template = (
        "check the name, the network, or import a file with `pals models import FILE.gguf`"
    )
    http_status = 404


class UnsupportedModel(ModelError):
    """A model family, key or value that this version does not implement."""

    code = "PALS-MODEL-UNSUPPORTED"
    message = "{source}: {problem}"
    hint_template = "see docs/models.md for the families and options that run"


class CorruptModel(ModelError):
    """A model file that lies about itself."""

    code = "PALS-MODEL-CORRUPT"
    message = "{source}: {problem}"
    hint_template = "delete the file and download or import it again"


class ModelNotWritten(ModelError):
    """A model that this machine could not store, as on a full disk."""

    code = "PALS-MODEL-NOT-WRITTEN"
    message = "the model cannot be written to {folder}: {problem}"
    hint_template = (
        "free some space there, or set PALS_CACHE_DIR (imports) or HF_HUB_CACHE (downloads)"
    )
    http_status = 500


class HubUnavailable(ModelError):
    """The hub cannot be reached, is too busy, or breaks off again and again."""

    code = "PALS-HUB-UNAVAILABLE"
    message = "the hub does not give `{model}` now: {problem}"
    hint_template = (
        "run it again, and the download goes on where it ended, or import a file with "
        "`pals models import FILE.gguf`"
    )
    http_status = 503
    retryable = True


class HubRefused(ModelError):
    """The hub asks for a token, or for the consent of the model's owner."""

    code = "PALS-HUB-REFUSED"
    message = "the hub does not give `{model}` to this account: {problem}"
    hint_template = "{advice}"
    http_status = 403


class InvalidHubAnswer(ModelError):
    """The hub, or whoever answers in its place, sends other bytes than were asked for."""

    code = "PALS-HUB-ANSWER"
    message = "`{file}` of `{model}`: {problem}"
    hint_template = (
        "check HF_ENDPOINT and the proxies in between; they must pass range requests through"
    )
    http_status = 502


class ModelChanged(ModelError):
    """A file is not, on the hub, the one that the hub listed."""

    code = "PALS-HUB-CHANGED"
    message = "`{file}` of `{model}` changed on the hub: {problem}"
    hint_template = "run it again; `--revision COMMIT` stays with one version"
    http_status = 409


class DiskTooSmall(ModelError):
    """The free space of the hub's cache does not hold what has to be downloaded."""

    code = "PALS-MODEL-DISK"
    message = "{folder} needs {needed:.2f} GB more for `{model}` and has {free:.2f} GB free"
    hint_template = "free some space there, or set HF_HUB_CACHE to a folder that has it"
    http_status = 507


class DownloadStalled(ModelError):
    """Another process holds the lock of a download and brings nothing."""

    code = "PALS-MODEL-STALLED"
    message = "another process downloads {file} and has brought nothing for {waited_s:.0f} s"
    hint_template = "end that process, then run it again"
    http_status = 503
    retryable = True


class ModelNotRemoved(ModelError):
    """A file of a model that cannot be deleted."""

    code = "PALS-MODEL-NOT-REMOVED"
    message = "the model in {folder} is not wholly removed: {problem}"
    hint_template = "check who owns the folder, then run it again"
    http_status = 500


class ModelTooLarge(CapacityError):
    """A machine on which not even one layer of a model fits."""

    code = "PALS-MODEL-TOO-LARGE"
    message = "no layer of `{model}` fits in {memory}: a shard of one takes {needed}"
    hint_template = "free memory, or serve fewer or shorter sessions: `--sessions`, `--context`"
    retryable = False


class TemplateError(ModelError):
    """The chat template refuses the messages or cannot be rendered."""

    code = "PALS-MODEL-TEMPLATE"
    message = "the chat template cannot render these messages: {problem}"
    hint_template = "check the roles and their order"


class InvalidText(UserError):
    """A text that cannot be turned into tokens."""

    code = "PALS-USER-TEXT"
    message = "the text cannot be tokenized: {problem}"
    hint_template = "send valid Unicode, in smaller parts"


class ContextTooLong(UserError):
    """Prompt and answer do not fit the context of the chain."""

    code = "context_length_exceeded"
    message = (
        "this model's maximum context length is {limit} tokens; the request asks for "
        "{total} ({prompt} in the messages, {completion} in the completion)"
    )
    hint_template = "shorten the messages or lower `max_tokens`"
