"""Errors of chains, links and the shards behind them."""

from __future__ import annotations

from pals.errors.base import CapacityError, PalsError, PeerError, ProtocolError


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


class NoPath(PeerUnreachable):
    """A member that runs can be neither dialled, nor punched through to, nor relayed to.

    ``dialled``, ``punched`` and ``relayed`` say why each of them failed.
    """

    code = "PALS-NO-PATH"
    message = (
        "peer {peer} runs, but there is no way to it: dialling: {dialled}; "
        "hole punching: {punched}; relay: {relayed}"
    )
    hint_template = (
        "forward a port and name it with `--announce`, or start both machines with "
        "`--use-relay` and a member that both reach with `--allow-relay`"
    )


class RelayRefused(PeerError):
    """A member does not relay, or no more than it does already."""

    code = "PALS-RELAY-REFUSED"
    message = "peer {relay} does not relay to {peer}: {problem}"
    hint_template = (
        "a member relays when it was started with `--allow-relay`, to and from those "
        "with `--use-relay`"
    )


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
    """A link was not keyed, or not in time: another swarm, epoch or secret."""

    code = "PALS-LINK-REFUSED"
    message = "link with peer {peer} refused: {problem}"
    hint_template = (
        "check that both machines joined the same swarm; "
        "run `pals login` again if the secret was rotated"
    )


class OtherEpoch(LinkRefused):
    """The two ends of a link hold secrets of different epochs; one will learn the newer."""

    code = "PALS-LINK-EPOCH"
    message = "link with peer {peer} refused: {problem}"
    hint_template = "try again in a few seconds: a rotated secret comes from any member online"


class InvalidFrame(ProtocolError):
    """A frame or row that is not the expected one, or a frame that does not open.

    A frame costs its sender the link; a row that does not fit its session ends the session.
    """

    code = "PALS-FRAME-INVALID"
    message = "frame from peer {peer} refused: {problem}"


class InvalidActivation(ProtocolError):
    """Hidden states that no working shard sends: NaN, infinite, huge or all zero.

    The session moves to a chain without the two shards between which it happened, since
    neither can show the driver who is at fault.
    """

    code = "PALS-ACTIVATION-INVALID"
    message = "hidden states from peer {peer} refused: {problem}"
    hint_template = "restart the shard of that peer; if it goes on, remove it from the swarm"


class FrameKeyExhausted(ProtocolError):
    """A frame key was used as often as it may be; the link has to be keyed anew."""

    code = "PALS-FRAME-KEY-EXHAUSTED"
    message = "the frame key of peer {peer} has reached its limit of {limit} frames"
    retryable = True


class InvalidStep(ProtocolError):
    """A step that asks a shard for something outside its model, sessions or context."""

    code = "PALS-STEP-INVALID"
    message = "step refused: {problem}"


class SessionRefused(PeerError):
    """A shard does not take the session."""

    code = "PALS-SESSION-REFUSED"
    message = "peer {peer} refused the session: {problem}"
    hint_template = "try again when it is less busy, or start another shard"


class ShardFull(CapacityError):
    """As many sessions run or wait at a shard as may."""

    code = "PALS-SHARD-FULL"
    message = "the shard runs {slots} sessions, and as many wait as may"
    hint_template = "try again in a moment"


class ShardBusy(CapacityError):
    """A shard of the chain takes no more sessions now."""

    code = "PALS-SHARD-BUSY"
    message = "peer {peer} takes no more sessions now: {problem}"
    hint_template = "try again in a moment, or start another shard"


class ShardDraining(PeerError):
    """A shard that is about to stop, and takes no new sessions."""

    code = "PALS-SHARD-DRAINING"
    message = "peer {peer} is leaving and takes no new sessions"
    hint_template = "send the request again when another peer serves its layers"


class QueueFull(CapacityError):
    """A bounded queue is full."""

    code = "PALS-QUEUE-FULL"
    message = "the {queue} queue is full: {limit}"
    hint_template = "try again in a moment"


class PagesExhausted(CapacityError):
    """The KV cache of a shard has fewer free pages than are needed at once."""

    code = "PALS-KV-FULL"
    message = "{pages} pages of the KV cache are needed, {available} are free"
    hint_template = "try again in a moment"


class SessionTooLong(CapacityError):
    """A session that a shard could not hold even if it were alone."""

    code = "PALS-KV-TOO-LONG"
    message = "{tokens} tokens, the shard holds {limit} in all"
    hint_template = "ask for fewer tokens, or give the shard more memory with `--kv-memory`"
    retryable = False


class AdmissionTimeout(CapacityError):
    """A session that found no room on a shard for as long as it may wait."""

    code = "PALS-ADMISSION-TIMEOUT"
    message = "no room for {tokens} tokens came free within {waited_s:g} s"
    hint_template = "try again in a moment, or start another shard"


class PenaltySlotsTaken(CapacityError):
    """A session with penalties, a bias or a grammar on a shard that holds as many as it can."""

    code = "PALS-PENALTIES-FULL"
    message = "the last shard holds {slots} sessions with penalties, a bias or a grammar, its most"
    hint_template = "try again in a moment, or without penalties, logit_bias and a schema"


class PeerSessionsFull(CapacityError):
    """A peer that has as many sessions on a shard as one peer may."""

    code = "PALS-PEER-SESSIONS"
    message = "one peer may have {limit} sessions on a shard"
    hint_template = "send fewer requests at one time"


class SessionPreempted(CapacityError):
    """A shard that gave a session's room to others, again and again without a token between."""

    code = "PALS-PREEMPTED"
    message = "peer {peer} has no room for the session beside those of others"
    hint_template = "try again in a moment, or start another shard"


class DeadlineExceeded(PeerError):
    """A session that was not done by the time that its driver had set."""

    code = "PALS-DEADLINE"
    message = "the session's deadline passed after {tokens} tokens"
    hint_template = "allow more time, or ask for fewer tokens"
    http_status = 504
    retryable = False


class GrammarTimeout(PalsError):
    """A session whose grammar kept the last shard waiting for too long."""

    code = "PALS-GRAMMAR-LATE"
    message = "what the grammar allows next was not known within {deadline_s:g} s"
    hint_template = "try again in a moment, or with a simpler schema"
    http_status = 504


class InternalStepError(PalsError):
    """A step of a shard failed for a reason that is Pals's own fault."""

    code = "PALS-STEP-FAILED"
    message = "a step of layers {layers} failed"
    hint_template = "look at the log of the shard that serves these layers"
