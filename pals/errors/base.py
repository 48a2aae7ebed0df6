"""The roots of the tree of errors."""

from __future__ import annotations

from typing import ClassVar


class PalsError(Exception):
    """Base of every error that Pals raises on purpose.

    Subclasses set the class attributes and pass their fields as keyword arguments;
    ``message`` and ``hint`` are templates over these fields.
    """

    code: ClassVar[str] = "PALS-INTERNAL"
    message: ClassVar[str] = "internal error"
    hint_template: ClassVar[str] = ""
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, **fields: object) -> None:
        super().__init__()
        self.fields = fields

    def __str__(self) -> str:
        return self.message.format(**self.fields)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    @property
    def hint(self) -> str:
        """What to do about it, or an empty string."""
        return self.hint_template.format(**self.fields)


class UserError(PalsError):
    """A flag, a file or an environment variable that the user can mend."""

    code = "PALS-USER"
    exit_code = 2
    http_status = 400


class ModelError(PalsError):
    """A model that cannot be found, read or run."""

    code = "PALS-MODEL"
    exit_code = 4
    http_status = 400


class PeerError(PalsError):
    """Another machine is unreachable, refused, or does not fit."""

    code = "PALS-PEER"
    exit_code = 3
    http_status = 503
    retryable = True


class CapacityError(PalsError):
    """A limit on memory, sessions or queues is reached."""

    code = "PALS-CAPACITY"
    exit_code = 5
    http_status = 429
    retryable = True


class ProtocolError(PalsError):
    """Bytes from a peer that the protocol does not allow."""

    code = "PALS-PROTOCOL"
    exit_code = 3
    http_status = 502
