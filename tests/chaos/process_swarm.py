"""A swarm of real processes whose shards may be killed, stopped and started again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import trio
from openai import APIError, OpenAI

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.config import Profile
from pals.net.enrolment import create_invite, create_swarm, redeem_invite
from tests.checkpoints import (
    EOS_ID,
    VOCAB_SIZE,
    llama_shapes,
    make_llama_checkpoint,
    random_weights,
    write_weights,
)
from tests.integration.backends import running_backend
from tests.integration.processes import Pals, Running

LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0", "--json")
DEADLINE_S = 120.0
PRESET = """
[shard]
dtype = "f32"
max_chunk_tokens = 16
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardProcess:
    """One shard that was ready when this was made."""

    running: Running
    profile: Profile
    layers: str
    peer: str


@dataclass(slots=True, kw_only=True)
class ProcessSwarm:
    """A backend with a swarm, and the processes of its members."""

    folder: Path
    model: str
    operator: Profile
    pals: Pals
    options: Sequence[str]
    stack: ExitStack
    shards: dict[str, ShardProcess] = field(default_factory=dict)
    count: int = 0

    def join(self) -> Profile:
        """Return the profile of a new member."""
        self.count += 1
        profile = Profile(self.folder / f"member-{self.count}")
        invite = trio.run(partial(create_invite, self.operator, now=time.time()))
        trio.run(redeem_invite, profile, invite)
        return profile

    def start_shards(self, *parts: tuple[Profile, str]) -> list[ShardProcess]:
        """Start shards of members, each with its layers, all at the same time."""
        started = [
            (profile, layers, self._start(profile, "shard", self.model, "--layers", layers))
            for profile, layers in parts
        ]
        return [self._await(profile, layers, running) for profile, layers, running in started]

    def _start(self, profile: Profile, *command: str) -> Running:
        common = (*LOOPBACK, "--preset", str(self.folder / "preset.toml"))
        arguments = (*command, *common, "--config-dir", str(profile.path))
        if command[0] == "shard":
            arguments = (*arguments, *self.options)
        return self.stack.enter_context(self.pals.start(*arguments))

    def _await(self, profile: Profile, layers: str, running: Running) -> ShardProcess:
        peer = str(running.wait_for_event("shard-ready")["peer"])
        self.shards[peer] = ShardProcess(running=running, profile=profile, layers=layers, peer=peer)
        return self.shards[peer]

    def start_endpoint(self, profile: Profile, *, wait_for_peers_s: float) -> str:
        """Start an endpoint and return its URL."""
        command = ("serve", self.model, "--port", "0", "--wait-for-peers", str(wait_for_peers_s))
        running = self._start(profile, *command)
        return str(running.wait_for_event("ready")["url"])

    def active_shard(self, url: str, layers: str) -> ShardProcess:
        """Return the shard of some layers in the chain that the endpoint used last."""
        hops = httpx.get(f"{url}/pals/chain", timeout=DEADLINE_S).json()["hops"]
        (peer,) = [hop["peer"] for hop in hops if hop["layers"] == layers]
        return self.shards[peer]


@contextmanager
def open_process_swarm(
    folder: Path, model: str, *, cache: Path, options: Sequence[str] = ()
) -> Iterator[ProcessSwarm]:
    """Run a backend and a swarm on it; every process that was started ends with the block."""
    operator = Profile(folder / "operator")
    service = BackendService(sqlite_url(folder / "backend.db"))
    (folder / "preset.toml").write_text(PRESET)
    pals = Pals({"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PALS_CACHE_DIR": str(cache)})
    try:
        with running_backend(service) as url, ExitStack() as stack:
            create = partial(
                create_swarm, name="chaos", model=model, backend_url=url, now=time.time()
            )
            trio.run(create, operator)
            yield ProcessSwarm(
                folder=folder,
                model=model,
                operator=operator,
                pals=pals,
                options=options,
                stack=stack,
            )
    finally:
        service.close()


def make_endless_checkpoint(folder: Path, *, num_layers: int) -> Path:
    """Write a tiny model whose greedy answers never end by themselves."""
    make_llama_checkpoint(folder, num_layers=num_layers)
    shapes = llama_shapes(
        num_layers=num_layers,
        hidden_size=64,
        intermediate_size=96,
        q_size=64,
        kv_size=32,
        vocab_size=VOCAB_SIZE,
        tied=True,
        attention_bias=False,
        mlp_bias=False,
    )
    weights = random_weights(shapes, seed=0, dtype=np.float32)
    weights["model.embed_tokens.weight"][EOS_ID] = 0  # so is its logit: never the highest
    write_weights(folder, weights)
    return folder


class StreamReader:
    """Reads one streamed answer in a thread, noting when each piece of text came."""

    def __init__(self, url: str, model: str, prompt: str, max_tokens: int) -> None:
        self.pieces: list[str] = []
        self.times_s: list[float] = []
        self.error: APIError | None = None
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(
            target=self._read, args=(url, model, prompt, max_tokens), daemon=True
        )
        self._thread.start()

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def is_running(self) -> bool:
        with self._changed:
            return not self._over

    def wait_for_pieces(self, count: int) -> None:
        """Wait until so many pieces came; fail when the answer ends before."""
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: len(self.pieces) >= count or self._over, DEADLINE_S
            )
        assert arrived
        assert not self._over, f"the answer was over after {len(self.pieces)} pieces: {self.error}"

    def read(self) -> str:
        """Return the whole answer; raise the error that ended it."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the answer does not end"
        if self.error is not None:
            raise self.error
        return self.text

    @property
    def longest_silence_s(self) -> float:
        """The longest time between two pieces."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max(later - earlier for earlier, later in pairs)

    def _read(self, url: str, model: str, prompt: str, max_tokens: int) -> None:
        try:
            with OpenAI(
                base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=DEADLINE_S
            ) as client:
                stream = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=max_tokens,
                    temperature=0,
                    stream=True,
                )
                for chunk in stream:
                    if chunk.choices and chunk.choices[0].delta.content:
                        self._note(chunk.choices[0].delta.content)
        except APIError as error:
            self.error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _note(self, piece: str) -> None:
        with self._changed:
            self.pieces.append(piece)
            self.times_s.append(time.monotonic())
            self._changed.notify_all()
