"""Errors of invites, records, the member list and the backend that keeps them."""

from __future__ import annotations

from pals.errors.base import CapacityError, PalsError, PeerError, ProtocolError, UserError


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
    hint_template = (
        "check that `pals backend`, or the operator's server, runs there and that this machine "
        "can reach it"
    )


class BackendRefused(PeerError):
    """The membership backend answered with an error."""

    code = "PALS-BACKEND-REFUSED"
    message = "the backend at {url} answered {status}: {problem}"
    retryable = False


class AlreadyMember(UserError):
    """The profile belongs to the swarm already; its credentials are never overwritten."""

    code = "PALS-USER-ALREADY-MEMBER"
    message = "the profile at `{path}` already belongs to swarm {swarm}"
    hint_template = (
        "nothing was changed; a machine that was removed from it enters anew after "
        "`pals swarm leave`, with a new invite"
    )


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
    hint_template = "{advice}"
    http_status = 404


class AmbiguousPeer(UserError):
    """A piece of a peer id that several members' ids begin or end with."""

    code = "PALS-PEER-AMBIGUOUS"
    message = "`{peer}` may be one of several members: {known}"
    hint_template = "write more of the id"


class UnknownInvite(UserError):
    """An invite that was not made for this swarm."""

    code = "PALS-INVITE-UNKNOWN"
    message = "no invite `{invite}` of this swarm"
    hint_template = "{advice}"
    http_status = 404


class InviteNotOpen(UserError):
    """An invite that lets nobody in any more."""

    code = "PALS-INVITE-NOT-OPEN"
    message = "the invite `{invite}` is {status}: it lets nobody in"
    hint_template = "make another one with `pals invite create`"


class InviteNotKept(UserError):
    """An open invite whose text this profile does not hold, nor does any server."""

    code = "PALS-INVITE-NOT-KEPT"
    message = "the text of the invite `{invite}` is not in this profile"
    hint_template = (
        "run this on the machine that made it, or make another one with `pals invite create`"
    )


class NotOperator(UserError):
    """The profile holds no key that may sign this for the swarm."""

    code = "PALS-USER-NOT-OPERATOR"
    message = "the profile at `{path}` does not hold this swarm's {key}"
    hint_template = "run this on {machine}"


class OperatorLeaves(UserError):
    """The operator would leave a swarm that nobody could administer any more."""

    code = "PALS-USER-OPERATOR-LEAVES"
    message = "this profile holds the operator key of `{swarm}`, and the swarm has no admin"
    hint_template = (
        "name one with `pals swarm appoint PEER`, keep the key with `pals swarm export-key FILE`, "
        "or leave with `--force`"
    )


class RosterUnavailable(PeerError):
    """No verified roster: serving without one would let everybody in."""

    code = "PALS-ROSTER-NONE"
    message = "no verified member list: {problem}"
    hint_template = (
        "check this machine's clock, and that the backend at {url} answers; nothing is served "
        "without a list"
    )


class NotAMember(PeerError):
    """This machine is not, or no longer, on its swarm's member list."""

    code = "PALS-NOT-A-MEMBER"
    message = "this machine, peer {peer}, is not a member of swarm `{swarm}`: it was removed"
    hint_template = "run `pals swarm leave`, and ask the operator for a new invite for `pals login`"
    http_status = 403
    retryable = False


class SwarmFull(CapacityError):
    """The roster has as many live members as it may."""

    code = "PALS-ROSTER-FULL"
    message = "the swarm has {count} members, the most it may have"
    hint_template = "remove a member with `pals peers kick`"
