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
    """An imported model that this machine could not store, as on a full disk."""

    code = "PALS-MODEL-NOT-WRITTEN"
    message = "the model cannot be written to {folder}: {problem}"
    hint_template = "free some space there, or set PALS_CACHE_DIR to a folder that has it"
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
