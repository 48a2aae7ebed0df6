"""The one tree of errors.

Every error stores fields, never a finished sentence: ``str(error)`` renders what
happened with the values and ``error.hint`` says what to do. Tests assert on fields.
``exit_code`` is the status of a command, ``http_status`` that of a response.
"""

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
    """A limit on memory, slots or queues is reached."""

    code = "PALS-CAPACITY"
    exit_code = 5
    http_status = 429
    retryable = True


class ProtocolError(PalsError):
    """Bytes from a peer that the protocol does not allow."""

    code = "PALS-PROTOCOL"
    exit_code = 3
    http_status = 502


# --- users ---------------------------------------------------------------------------


class InvalidLayerRange(UserError):
    """A layer range that is not ``a:b`` with ``0 <= a < b``."""

    code = "PALS-USER-LAYERS"
    message = "not a layer range: `{text}`"
    hint_template = "write a half-open range such as `--layers 0:10`"


class LayersOutsideModel(UserError):
    """A layer range that reaches past the model's last layer."""

    code = "PALS-USER-LAYERS-OUTSIDE"
    message = "layers `{layers}` reach past the model, which has {num_layers} layers"
    hint_template = "choose a range within `0:{num_layers}`"


class InvalidConfig(UserError):
    """A configuration file, preset or environment variable that cannot be used."""

    code = "PALS-USER-CONFIG"
    message = "{source}: {problem}"
    hint_template = "{advice}"


class ProfileMissing(UserError):
    """The profile folder or a file in it does not exist."""

    code = "PALS-USER-PROFILE-MISSING"
    message = "no profile at `{path}`"
    hint_template = "run `pals init`, then `pals swarm create` or `pals login`"


class ProfileExposed(UserError):
    """A secret of the profile that other users of the machine can read."""

    code = "PALS-USER-PROFILE-EXPOSED"
    message = "`{path}` can be read by other users: mode {mode:o}"
    hint_template = (
        "run `chmod {wanted:o} {path}`, and rotate the secret if others use this machine"
    )


class ProfileInUse(UserError):
    """Another process already runs with this profile's identity."""

    code = "PALS-USER-PROFILE-IN-USE"
    message = "the identity in `{path}` is in use by process {pid}"
    hint_template = "stop it; `pals serve --layers a:b` is an endpoint and a shard in one process"


class NoSwarm(UserError):
    """The profile belongs to no swarm."""

    code = "PALS-USER-NO-SWARM"
    message = "the profile at `{path}` belongs to no swarm"
    hint_template = "run `pals swarm create`, or redeem an invite with `pals login`"


class SwarmSecretInvalid(UserError):
    """``PALS_SWARM_SECRET`` is missing or malformed; there is no plaintext mode."""

    code = "PALS-USER-SWARM-SECRET"
    message = "the swarm secret is {problem}"
    hint_template = (
        "start through the `pals` command, which reads it from the profile, "
        "or run `pals login` again"
    )


class SecretOnCommandLine(UserError):
    """A secret was given as a command-line argument, where every user can read it."""

    code = "PALS-USER-SECRET-ARGV"
    message = "secrets are not taken from the command line: {name}"
    hint_template = "pass it in the environment as `{variable}`, or on standard input"


class PublicBindWithoutKey(UserError):
    """A bind that other machines can reach, without an API key."""

    code = "PALS-USER-PUBLIC-BIND"
    message = "refusing to listen on `{host}` without an API key"
    hint_template = "set `PALS_API_KEY`, or bind to `127.0.0.1`"


class PortInUse(UserError):
    """The address is taken by another process."""

    code = "PALS-USER-PORT"
    message = "cannot listen on {host}:{port}: {problem}"
    hint_template = "choose another port with `--port`, or stop what listens there"


class MissingExtra(UserError):
    """An optional package that a command needs is not installed."""

    code = "PALS-USER-EXTRA"
    message = "`{package}` is not installed"
    hint_template = "run `pip install 'pals[{extra}]'`"


# --- membership ----------------------------------------------------------------------


class InvalidInvite(UserError):
    """An invite that is malformed, or that was made for something else."""

    code = "PALS-INVITE-INVALID"
    message = "not a valid invite: {problem}"
    hint_template = "copy the whole `pp_inv_…` string again, or ask the operator for a new one"


class InviteRefused(UserError):
    """The backend does not accept the invite (unknown, spent, revoked or expired)."""

    code = "PALS-INVITE-REFUSED"
    message = "the backend refused the invite: unknown, spent, revoked or expired"
    hint_template = "ask the operator for a new one: `pals invite create`"
    http_status = 403


class InvalidRecord(ProtocolError):
    """A membership record that does not decode, verify or fit the chain."""

    code = "PALS-RECORD-INVALID"
    message = "membership record {kind} refused: {problem}"
    http_status = 400


class BackendUnreachable(PeerError):
    """The membership backend did not answer."""

    code = "PALS-BACKEND-UNREACHABLE"
    message = "the backend at {url} did not answer: {problem}"
    hint_template = "check that `pals backend` runs there and that this machine can reach it"


class BackendRefused(PeerError):
    """The membership backend answered with an error."""

    code = "PALS-BACKEND-REFUSED"
    message = "the backend at {url} answered {status}: {problem}"
    retryable = False


class AlreadyMember(UserError):
    """The profile belongs to a swarm already; its credentials are never overwritten."""

    code = "PALS-USER-ALREADY-MEMBER"
    message = "the profile at `{path}` already belongs to swarm {swarm}"
    hint_template = "use another profile for another swarm with `--config-dir`"


class RosterRefused(ProtocolError):
    """The backend served an older or another member list than one already verified."""

    code = "PALS-ROSTER-REFUSED"
    message = "the backend's member list was refused: {problem}"
    hint_template = (
        "the last verified list stays in force; look at the backend, it may be compromised"
    )


class BackendFull(CapacityError):
    """A limit of the membership backend is reached."""

    code = "PALS-BACKEND-FULL"
    message = "the backend holds {count} {what}, the most it may"
    hint_template = "run another backend, or clean this one"


class TooManyAttempts(CapacityError):
    """An address tries to redeem invites too often."""

    code = "PALS-BACKEND-RATE"
    message = "more than {limit} attempts within a minute"
    hint_template = "wait a minute and try again"


class UnknownSwarm(UserError):
    """A swarm that the backend does not hold."""

    code = "PALS-SWARM-UNKNOWN"
    message = "the backend holds no swarm `{swarm}`"
    hint_template = "check the backend's address, or make a swarm with `pals swarm create`"
    http_status = 404


class StorageFailed(PalsError):
    """The backend's database did not answer in time, or failed."""

    code = "PALS-BACKEND-STORAGE"
    message = "the backend's database failed: {problem}"
    hint_template = "try again; if it persists, check the disk of the machine that runs the backend"
    http_status = 503
    retryable = True


class UnknownPeer(UserError):
    """A peer id that is not on the roster."""

    code = "PALS-PEER-UNKNOWN"
    message = "no live member `{peer}` in this swarm"
    hint_template = "run `pals peers list` to see the members"
    http_status = 404


class NotOperator(UserError):
    """The profile does not hold the swarm's operator key."""

    code = "PALS-USER-NOT-OPERATOR"
    message = "the profile at `{path}` does not hold this swarm's operator key"
    hint_template = "run this on the machine that made the swarm"


class RosterUnavailable(PeerError):
    """No verified roster: serving without one would let everybody in."""

    code = "PALS-ROSTER-NONE"
    message = "no verified member list: {problem}"
    hint_template = (
        "start when the backend at {url} can be reached; nothing is served without a list"
    )


class NotAMember(PeerError):
    """This machine is not, or no longer, on its swarm's member list."""

    code = "PALS-NOT-A-MEMBER"
    message = "this machine, peer {peer}, is not a member of swarm `{swarm}`: it was removed"
    hint_template = (
        "ask the operator for a new invite, and join with a new profile: "
        "`pals login --config-dir FOLDER`"
    )
    http_status = 403
    retryable = False


class SwarmFull(CapacityError):
    """The roster has as many live members as it may."""

    code = "PALS-ROSTER-FULL"
    message = "the swarm has {count} members, the most it may have"
    hint_template = "remove a member with `pals peers kick`"


# --- models --------------------------------------------------------------------------


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


# --- peers ---------------------------------------------------------------------------


class NoChain(PeerError):
    """No set of reachable shards covers every layer.

    ``missing`` lists the ranges that nobody serves, separated by commas.
    """

    code = "PALS-NO-CHAIN"
    message = "no chain covers `{model}`: layers {missing} are served by nobody reachable"

    @property
    def hint(self) -> str:
        """Name the command for the first missing range."""
        first = str(self.fields["missing"]).partition(",")[0]
        return f"start one with `pals shard {self.fields['model']} --layers {first}`"


class PeerUnreachable(PeerError):
    """A member could not be dialled, or went away."""

    code = "PALS-PEER-UNREACHABLE"
    message = "peer {peer} is unreachable: {problem}"
    hint_template = "check that it runs, and its address and firewall"


class ShardLost(PeerError):
    """A shard of a running session went away."""

    code = "PALS-SHARD-LOST"
    message = "lost the peer {peer} that serves layers {layers}: {problem}"
    hint_template = "send the request again when another peer serves these layers"


class StepTimeout(PeerError):
    """No token came within the deadline of a step."""

    code = "PALS-STEP-TIMEOUT"
    message = "no token within {deadline_s} s from the chain {chain}"
    hint_template = "look at `pals peers list` and the logs of these peers"


class WireVersionMismatch(ProtocolError):
    """The two sides speak different versions of the link protocol."""

    code = "PALS-WIRE-VERSION"
    message = "peer {peer} speaks wire version {theirs}, this machine speaks {ours}"
    hint_template = "install the same version of pals on both machines"


class LinkRefused(ProtocolError):
    """The link handshake failed: another swarm, epoch or secret."""

    code = "PALS-LINK-REFUSED"
    message = "link with peer {peer} refused: {problem}"
    hint_template = (
        "check that both machines joined the same swarm; "
        "run `pals login` again if the secret was rotated"
    )


class InvalidFrame(ProtocolError):
    """A frame that is not the expected one or does not open; the link is dropped."""

    code = "PALS-FRAME-INVALID"
    message = "frame from peer {peer} refused: {problem}"


class FrameKeyExhausted(ProtocolError):
    """A frame key was used as often as it may be; the link has to be keyed anew."""

    code = "PALS-FRAME-KEY-EXHAUSTED"
    message = "the frame key of peer {peer} has reached its limit of {limit} frames"
    retryable = True


class InvalidStep(ProtocolError):
    """A step that asks a shard for something outside its model, slots or context."""

    code = "PALS-STEP-INVALID"
    message = "step refused: {problem}"


class SessionRefused(PeerError):
    """A shard does not take the session."""

    code = "PALS-SESSION-REFUSED"
    message = "peer {peer} refused the session: {problem}"
    hint_template = "try again when it is less busy, or start another shard"


class ShardFull(CapacityError):
    """Every session slot of a shard is taken."""

    code = "PALS-SHARD-FULL"
    message = "all {slots} session slots of the shard are taken"
    hint_template = "try again in a moment"


class ShardBusy(CapacityError):
    """A shard of the chain takes no more sessions now."""

    code = "PALS-SHARD-BUSY"
    message = "peer {peer} takes no more sessions now: {problem}"
    hint_template = "try again in a moment, or start another shard"


class QueueFull(CapacityError):
    """A bounded queue is full."""

    code = "PALS-QUEUE-FULL"
    message = "the {queue} queue is full: {limit}"
    hint_template = "try again in a moment"


# --- requests over HTTP --------------------------------------------------------------


class InvalidRequest(UserError):
    """A request that is malformed or has a value out of range."""

    code = "invalid_value"
    message = "{problem}"


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
    hint_template = "use the address it printed when it started"
    http_status = 421


class OriginRefused(InvalidRequest):
    """A request that a web page of another site made."""

    code = "origin_refused"
    message = "requests from web pages of other sites are refused"
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


class ChildFailed(PalsError):
    """A process that `pals demo` started did not come up."""

    code = "PALS-DEMO-CHILD"
    message = "{name} did not start: {problem}\n{log}"
    hint_template = "run `pals doctor` to check this machine"


class InternalStepError(PalsError):
    """A step of a shard failed for a reason that is Pals's own fault."""

    code = "PALS-STEP-FAILED"
    message = "a step of layers {layers} failed"
    hint_template = "look at the log of the shard that serves these layers"
