"""What `pals shard` and `pals serve` share: they are servers that hold the swarm secret."""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, Protocol

import msgspec
from cyclopts import Parameter, validators

from pals import config
from pals.cli import console
from pals.cli.logs import TextFormatter
from pals.cli.options import ConfigDir, SwarmName, Tokens, parse_layers, read_size
from pals.config import Profile, SwarmEntry, SwarmSecret
from pals.engine.memory import Memory
from pals.errors import InvalidConfig
from pals.net.nat.addresses import read_announced
from pals.settings import Settings, ShardSettings
from pals.swarm.identity import Identity, load_or_create_identity
from pals.types import (
    AttentionChoice,
    Dtype,
    GroupSize,
    LayerRange,
    PrefillCodec,
    Quantization,
    ShardSpec,
)

if TYPE_CHECKING:
    from pals.net.node import Node, NodeOptions
    from pals.net.serving import Drain, ServedShard

MALLOC_VARIABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A profile that is ready to serve: its swarm, its secret, its identity."""

    profile: Profile
    entry: SwarmEntry
    secret: SwarmSecret
    identity: Identity


def load_member(
    profile: Profile,
    swarm: str | None = None,
    *,
    keep: Mapping[str, str] = MappingProxyType({}),
) -> Member:
    """Return the profile's member, with the secret from `PALS_SWARM_SECRET`.

    When the variable is not set, this process is replaced by one in which the profile's
    secret is, so that the server gets it from the environment and never from argv; the
    same step sets what must stand before a process starts.

    Args:
        profile: The profile to serve with.
        swarm: Name or id of the swarm; the profile's only one when None.
        keep: Secrets already taken from the environment that the new process needs too.

    Raises:
        SwarmSecretInvalid: The secret is missing or malformed; there is no plaintext mode.
        NoSwarm: The profile belongs to no swarm.
        ProfileMissing: There is no profile.
        ProfileExposed: Others can read a secret of the profile.
    """
    entry = profile.load_swarm(swarm)
    text = config.take_environment(config.SWARM_SECRET_VARIABLE)
    if text is None:
        secret = SwarmSecret.parse(entry.swarm_secret)
        secrets = {config.SWARM_SECRET_VARIABLE: secret.to_text(), **keep}
        replace_process(secrets, sys.argv[1:])
    return Member(
        profile=profile,
        entry=entry,
        secret=SwarmSecret.parse(text),
        identity=load_or_create_identity(profile),
    )


def replace_process(secrets: Mapping[str, str], arguments: Sequence[str]) -> NoReturn:
    """Become `pals` with ``arguments`` again, under the same process id."""
    environment = config.child_environment(secrets)
    if platform.libc_ver()[0] == "glibc":
        # XLA's large temporaries are page-faulted anew in each call without huge pages.
        environment.setdefault(MALLOC_VARIABLE, HUGE_PAGES)
    sys.stdout.flush()
    command = [sys.executable, "-m", "pals", *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606 (this same program, no shell)


def node_options(member: Member, settings: Settings) -> NodeOptions:
    """Return what the member's node is made of."""
    from pals.net.hosted import is_hosted_here, listen_as_host
    from pals.net.node import NodeOptions

    node = settings.node
    if is_hosted_here(member.entry.backend_url, member.identity):
        node = listen_as_host(node)
    return NodeOptions(
        profile=member.profile,
        entry=member.entry,
        secret=member.secret,
        identity=member.identity,
        settings=node,
    )


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Options of every command that runs a member of the swarm."""

    listen: Annotated[
        str | None, Parameter(help="Multiaddr for members, such as `/ip4/0.0.0.0/tcp/4001`.")
    ] = None
    redeem_listen: Annotated[
        str | None,
        Parameter(
            help="Multiaddr at which machines join, where this profile keeps the backend; "
            "`/ip4/0.0.0.0/tcp/8471` when left out."
        ),
    ] = None
    peer: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            show_default=False,
            help="Address of a member to start from; may be repeated.",
        ),
    ] = ()
    prefill_codec: Annotated[
        PrefillCodec | None,
        Parameter(
            help="`int8` halves what a prompt sends between machines that both ask for it, at "
            "some loss; `raw` when left out."
        ),
    ] = None
    announce: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            show_default=False,
            help="Multiaddr at which a port forward leads here, such as "
            "`/ip4/203.0.113.7/tcp/4001`; may be repeated.",
        ),
    ] = ()
    upnp: Annotated[
        bool | None, Parameter(help="Whether to ask the router to forward the listening port.")
    ] = None
    allow_relay: Annotated[
        bool | None,
        Parameter(
            help="Whether to carry connections of members that cannot reach each other; "
            "only their sizes can be seen here."
        ),
    ] = None
    use_relay: Annotated[
        bool | None,
        Parameter(help="Whether to go through such a member where nothing else works."),
    ] = None
    mdns: Annotated[
        bool,
        Parameter(negative="", help="Tell the local network where this member is, and look there."),
    ] = False
    preset: Annotated[str | None, Parameter(help="Preset in configs/, by name or path.")] = None
    verbose: Annotated[bool, Parameter(negative="", help="Log what happens to stderr.")] = False
    swarm: SwarmName = None
    config_dir: ConfigDir = None

    @property
    def profile(self) -> Profile:
        return Profile(config.config_dir(self.config_dir))

    def load_settings(self) -> Settings:
        """Return the preset with these options over it.

        Raises:
            InvalidConfig: The preset is none, or an announced address.
        """
        settings = config.load_settings(self.preset)
        node = msgspec.structs.replace(
            settings.node,
            listen=self.listen or settings.node.listen,
            redeem_listen=self.redeem_listen or settings.node.redeem_listen,
            peers=self.peer or settings.node.peers,
            mdns=self.mdns or settings.node.mdns,
            prefill_codec=self.prefill_codec or settings.node.prefill_codec,
            announce=tuple(map(read_announced, self.announce or settings.node.announce)),
            upnp=_either(self.upnp, settings.node.upnp),
            allow_relay=_either(self.allow_relay, settings.node.allow_relay),
            use_relay=_either(self.use_relay, settings.node.use_relay),
        )
        return msgspec.structs.replace(settings, node=node)


def _either(option: bool | None, setting: bool) -> bool:
    return setting if option is None else option


_AtLeastOne = validators.Number(gte=1)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOptions:
    """Options of every command that serves layers."""

    dtype: Annotated[
        Dtype | None,
        Parameter(help="`bf16`, `int8` or `int4` for less memory, or `f32` for comparisons."),
    ] = None
    act_quant: Annotated[
        Literal["on", "off"] | None,
        Parameter(help="Whether `int8` may round the activations of long prompts, on CPU."),
    ] = None
    group_size: Annotated[
        GroupSize | None, Parameter(help="Columns that share a scale in `int4`.")
    ] = None
    attention: Annotated[
        AttentionChoice | None,
        Parameter(
            help="`pallas` for the kernel of this machine's GPU or TPU, `xla` for none; `auto` "
            "takes the kernel where it fits the model and works here."
        ),
    ] = None
    context: Tokens = None
    sessions: Annotated[
        int | None, Parameter(validator=_AtLeastOne, help="Most sessions at one time.")
    ] = None
    rows: Annotated[
        int | None, Parameter(validator=_AtLeastOne, help="Sessions that decode in one step.")
    ] = None
    kv_memory: Annotated[
        int | None,
        Parameter(
            converter=read_size,
            help="Memory of each device for the KV cache, such as `2GiB`; what the memory "
            "plan leaves when left out.",
        ),
    ] = None
    prefill_share: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gt=0, lt=1),
            help="Part of the time that a long prompt, or each short one, may take while "
            "other sessions decode.",
        ),
    ] = None
    threads: Annotated[
        int | None,
        Parameter(validator=_AtLeastOne, help="Compute threads; every core when left out."),
    ] = None
    devices: Annotated[
        int | None,
        Parameter(
            validator=_AtLeastOne,
            help="Devices of this machine that divide each layer among them; 1 when left out.",
        ),
    ] = None
    memory: Annotated[
        int | None,
        Parameter(
            converter=read_size,
            help="Memory to fill on each device when no layers are named, such as `24GiB`; this "
            "machine's when left out.",
        ),
    ] = None

    def spec_within(self, settings: ShardSettings) -> ShardSpec:
        """Return what these options ask for, and of the settings what they leave out."""
        limits = settings.limits(
            sessions=self.sessions,
            rows=self.rows,
            context=self.context,
            kv_bytes=self.kv_memory,
            prefill_share=self.prefill_share,
        )
        activations = settings.quantize_activations
        quantization = Quantization(
            group_size=self.group_size or settings.int4_group_size,
            activations=activations if self.act_quant is None else self.act_quant == "on",
        )
        return ShardSpec(
            dtype=self.dtype or settings.dtype,
            limits=limits,
            quantization=quantization,
            devices=self.devices or settings.devices,
            attention=self.attention or settings.attention,
        )

    def make_role(
        self, model: str, layers: LayerRange | None, settings: ShardSettings, *, json: bool
    ) -> ServedRole:
        """Return what serves a shard on a node; jax is imported when it loads.

        Args:
            model: Model name or folder.
            layers: The layers; None chooses some that fit.
            settings: For what these options leave out.
            json: Print one JSON document a line.

        Raises:
            InvalidConfig: Both layers and memory are named.
        """
        from pals.cli.progress import Lines
        from pals.net.fitting import FittingShard, run_fitting_shard
        from pals.net.serving import Report, load_shard, run_shard

        config.limit_compute_threads(self.threads)
        spec = self.spec_within(settings)
        # lines and no bar: a server's other messages come between them
        report = Report(on_progress=console.note, on_download=Lines(model, clock=time.monotonic))
        on_ready = partial(announce_shard, json)
        if layers is None:
            shard = FittingShard(
                model=model,
                spec=spec,
                memory=None if self.memory is None else Memory(size_bytes=self.memory),
                report=report,
            )
            return partial(run_fitting_shard, shard=shard, on_ready=on_ready)
        self.check_memory(layers)
        load = partial(load_shard, model, layers, spec, report=report)
        return partial(run_shard, load=load, on_ready=on_ready)

    def make_also(
        self, model: str, layers: str | None, settings: ShardSettings, *, json: bool
    ) -> ServedRole | None:
        """Return what serves a shard besides, for a command that may; None without ``layers``.

        Args:
            model: Model name or folder.
            layers: As `check_also` found them right.
            settings: For what these options leave out.
            json: Print one JSON document a line.
        """
        if layers is None:
            return None
        return self.make_role(model, parse_layers(layers), settings, json=json)

    def check_also(self, layers: str | None) -> None:
        """Refuse what no shard can be made of, before anything starts.

        Raises:
            InvalidLayerRange: The layers are neither a range nor `auto`.
            InvalidConfig: Both layers and memory are named, or an option of a shard and no layers.
        """
        self.check_memory(parse_layers(layers))
        named = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if layers is None and named:
            raise InvalidConfig(
                source=f"--{named[0].replace('_', '-')}",
                problem="it is about a shard, and without `--layers` there is none here",
                advice="add `--layers auto`, or leave it out",
            )

    def check_memory(self, layers: LayerRange | None) -> None:
        """Refuse memory to fill where the layers are named.

        Raises:
            InvalidConfig: Both are.
        """
        if layers is not None and self.memory is not None:
            raise InvalidConfig(
                source="--memory",
                problem=f"the layers {layers} take what they take",
                advice="leave out `--layers`, or `--memory`",
            )


class ServedRole(Protocol):
    """Serves a shard on a node until cancelled or, when asked to, until it has left."""

    def __call__(self, node: Node, *, drain: Drain | None = None) -> Awaitable[None]: ...


NO_SERVER_OPTIONS = ServerOptions()
NO_SHARD_OPTIONS = ShardOptions()


def announce_shard(json: bool, node: Node, served: ServedShard) -> None:
    """Print that a shard is served, and where."""
    addresses = node.host.addresses()
    if json:
        console.json(
            {
                "schema": 1,
                "event": "shard-ready",
                "peer": node.peer_id,
                "layers": str(served.layers),
                "addresses": addresses,
            }
        )
        return
    console.out(f"serving layers {served.layers} of {served.model_id} as peer {node.peer_id}")
    for address in addresses:
        console.out(f"address {address}")


def waiting_note(what: str, most_s: float) -> None:
    """Say what a server that was asked to stop still waits for, and how to end that."""
    console.note(f"waiting for {what}, at most {most_s:g} s; press Ctrl-C again to leave at once")


def leaving_note(drain_s: float, sessions: int) -> None:
    """Say that a shard which leaves waits for sessions, if it has any."""
    if sessions:
        what = "1 session" if sessions == 1 else f"{sessions} sessions"
        waiting_note(f"{what} to move to other shards", drain_s)


def configure_logging(*, verbose: bool) -> None:
    """Log to stderr: warnings, or with ``verbose`` what happens; ids and times only."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter())
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    logging.getLogger("pals").setLevel(logging.INFO if verbose else logging.WARNING)
    # It logs whatever strangers send it as errors; the host reports what matters.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
