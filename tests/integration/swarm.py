"""A real swarm in one process: backend over HTTP, members over libp2p, a tiny model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from litestar.types import ASGIApp, Receive, Scope, Send

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.config import Profile, SwarmSecret
from pals.driver.routes import ServedModel
from pals.driver.sessions import SessionClient, open_sessions
from pals.driver.state import ClientSession, SampledToken, SessionEvent, SessionRequest
from pals.models.snapshot import Snapshot
from pals.net.enrolment import create_invite, create_swarm, redeem_invite
from pals.net.node import Node, NodeOptions
from pals.net.serving import Report, ServedShard, load_shard, run_shard, serve_role
from pals.settings import NodeSettings
from pals.swarm.identity import load_or_create_identity
from pals.types import Dtype, EngineLimits, LayerRange, Sampling, ShardSpec
from tests.checkpoints import make_llama_checkpoint
from tests.integration.backends import running_backend

LIMITS = EngineLimits(
    max_sessions=2, max_rows=2, max_context_tokens=96, max_chunk_tokens=16, verify_tokens=1
)
DEADLINE_S = 40.0


def refuse_hints(app: ASGIApp) -> ASGIApp:
    """Make a backend that knows no addresses, so that only the DHT can tell any."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/hints"):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await app(scope, receive, send)

    return wrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class TestSwarm:
    """An operator and invited peers of one backend, and a checkpoint to serve."""

    __test__ = False

    operator: Profile
    peers: Sequence[Profile]
    checkpoint: Path
    limits: EngineLimits = LIMITS

    def options(
        self,
        profile: Profile,
        *,
        peers: Sequence[str] = (),
        poll_interval_s: float = 30.0,
        wait_for_peers_s: float = 0.0,
        make_ephemeral: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate,
    ) -> NodeOptions:
        entry = profile.load_swarm()
        return NodeOptions(
            profile=profile,
            entry=entry,
            secret=SwarmSecret.parse(entry.swarm_secret),
            identity=load_or_create_identity(profile),
            settings=NodeSettings(
                listen="/ip4/127.0.0.1/tcp/0",
                peers=tuple(peers),
                poll_interval_s=poll_interval_s,
                wait_for_peers_s=wait_for_peers_s,
            ),
            make_ephemeral=make_ephemeral,
        )


@asynccontextmanager
async def make_swarm(
    folder: Path, *, count: int = 3, hints: bool = True, num_layers: int = 6
) -> AsyncIterator[TestSwarm]:
    """Start a backend, make a swarm on it and let ``count`` peers join."""
    service = BackendService(sqlite_url(folder / "backend.db"))
    keep: Callable[[ASGIApp], ASGIApp] = lambda app: app  # noqa: E731
    checkpoint = make_llama_checkpoint(folder / "checkpoint", num_layers=num_layers)
    try:
        with running_backend(service, wrap=keep if hints else refuse_hints) as url:
            operator = Profile(folder / "operator")
            await create_swarm(
                operator, name="test", model=str(checkpoint), backend_url=url, now=1e9
            )
            peers = [Profile(folder / f"peer-{i}") for i in range(count)]
            for peer in peers:
                await redeem_invite(peer, await create_invite(operator, now=1e9))
            yield TestSwarm(operator=operator, peers=peers, checkpoint=checkpoint)
    finally:
        service.close()


@dataclass(slots=True)
class RunningShard:
    """A shard that serves until its scope is cancelled."""

    node: Node
    shard: ServedShard
    scope: trio.CancelScope
    finished: trio.Event


def loader(swarm: TestSwarm, layers: str, dtype: Dtype = "f32") -> Callable[[], ServedShard]:
    """Return what loads a shard of the swarm's checkpoint."""
    return partial(
        load_shard,
        str(swarm.checkpoint),
        LayerRange.parse(layers),
        ShardSpec(dtype=dtype, limits=swarm.limits),
        report=Report(on_progress=lambda _: None, on_download=lambda *_: None),
    )


async def start_shard(
    nursery: trio.Nursery,
    swarm: TestSwarm,
    options: NodeOptions,
    layers: str,
    *,
    dtype: Dtype = "f32",
) -> RunningShard:
    """Load and serve a shard; returns once it is announced."""
    load = loader(swarm, layers, dtype)
    ready, finished, scope = trio.Event(), trio.Event(), trio.CancelScope()
    served: list[tuple[Node, ServedShard]] = []

    def on_ready(node: Node, shard: ServedShard) -> None:
        served.append((node, shard))
        ready.set()

    async def run() -> None:
        with scope:
            await serve_role(options, partial(run_shard, load=load, on_ready=on_ready))
        finished.set()

    nursery.start_soon(run)
    with trio.fail_after(DEADLINE_S):
        await ready.wait()
    return RunningShard(*served[0], scope, finished)


async def start_chain(
    nursery: trio.Nursery, swarm: TestSwarm, *layers: str, dtype: Dtype = "f32", **options: object
) -> list[RunningShard]:
    """Serve one shard on each of the swarm's peers."""
    return [
        await start_shard(nursery, swarm, swarm.options(peer, **options), part, dtype=dtype)
        for peer, part in zip(swarm.peers, layers, strict=False)
    ]


def served_model(swarm: TestSwarm) -> ServedModel:
    snapshot = Snapshot.open(swarm.checkpoint, str(swarm.checkpoint))
    return ServedModel(
        model_id=snapshot.model_id,
        manifest=snapshot.manifest,
        num_layers=snapshot.config.num_layers,
        max_position_embeddings=snapshot.config.max_position_embeddings,
        hidden_size=snapshot.config.hidden_size,
    )


@dataclass(slots=True)
class Answer:
    """Collects the events of one session; iterate over its tokens with `next_token`."""

    client: SessionClient
    events: trio.MemoryReceiveChannel[SessionEvent]
    session: ClientSession
    tokens: list[int] = field(default_factory=list)

    async def next_token(self) -> SampledToken:
        with trio.fail_after(DEADLINE_S):
            event = await self.events.receive()
        if not isinstance(event, SampledToken):
            raise event
        self.tokens.append(event.token)
        return event

    async def all_tokens(self) -> list[int]:
        """Read to the end and close the session."""
        while not (await self.next_token()).last:
            pass
        self.client.close(self.session)
        return self.tokens


def request(prompt: Sequence[int], count: int = 12, **sampling: Any) -> SessionRequest:
    return SessionRequest(
        prompt=tuple(prompt),
        max_new_tokens=count,
        stop_token_ids=(),
        sampling=Sampling(**sampling),
    )


async def ask(client: SessionClient, wanted: SessionRequest) -> Answer:
    """Open a session and collect what comes."""
    send, receive = trio.open_memory_channel[SessionEvent](1000)
    with trio.fail_after(DEADLINE_S):
        session = await client.open(wanted, send.send_nowait)
    return Answer(client, receive, session)


@asynccontextmanager
async def open_client(
    swarm: TestSwarm,
    profile: Profile | None = None,
    *,
    layers: str | None = None,
    **options: object,
) -> AsyncIterator[SessionClient]:
    """Run a driver of the swarm's model on a profile, the operator's by default.

    With ``layers`` its node serves them too, and is ready when they are announced.
    """
    made = swarm.options(profile or swarm.operator, **options)
    ready = trio.Event()
    serve = None
    if layers is not None:
        serve = partial(run_shard, load=loader(swarm, layers), on_ready=lambda *_: ready.set())
    async with open_sessions(made, served_model(swarm), serve=serve) as client:
        if serve is not None:
            with trio.fail_after(DEADLINE_S):
                await ready.wait()
        yield client
