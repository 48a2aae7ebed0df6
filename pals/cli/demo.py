"""`pals demo`: the whole product on this machine, with a real model.

A backend, a swarm, a shard process for each range of layers, an endpoint, and a request
through OpenAI's own client; everything lives in a temporary folder and ends with it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import msgspec
import trio
from cyclopts import Parameter, validators

from pals import config
from pals.cli import console
from pals.cli.children import Child, Children, open_children
from pals.cli.interrupt import run_until_signal
from pals.cli.options import Json
from pals.config import Profile
from pals.errors import InvalidConfig, MissingExtra
from pals.settings import DemoSettings
from pals.types import LayerRange, short_id, split_layers

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk

PRESET = "loopback-3"
START_DEADLINE_S = 60.0
COMPILE_DEADLINE_S = 300.0
REQUEST_DEADLINE_S = 120.0
REQUEST_RETRIES = 8
CLIENT_KEY = "not-needed-on-loopback"

_AtLeastOne = Parameter(validator=validators.Number(gte=1))


class HopLine(msgspec.Struct, frozen=True, kw_only=True):
    """One shard of the answer's chain: medians in milliseconds, see `GET /pals/chain`."""

    peer: str
    layers: str
    steps: int
    step_ms: float
    queue_ms: float
    handover_ms: float
    codec_ms: float
    wire_ms: float

    @property
    def hop_ms(self) -> float:
        """What the hop costs beside the step itself."""
        return self.queue_ms + self.handover_ms + self.codec_ms + self.wire_ms


class _Chain(msgspec.Struct, frozen=True):
    hops: list[HopLine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A streamed answer and how fast it came, as the client saw it."""

    text: str
    completion_tokens: int
    time_to_first_token_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question, answered greedily."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The demo's swarm, ready for requests."""

    url: str
    model: str


async def demo(
    *,
    prompt: str | None = None,
    shards: Annotated[int | None, _AtLeastOne] = None,
    threads: Annotated[int | None, _AtLeastOne] = None,
    keep: bool = False,
    json: Json = False,
) -> None:
    """Run the whole product on this machine with a small model.

    Args:
        prompt: What to ask.
        shards: Shard processes to split the model over.
        threads: Compute threads of each shard; cores / shards when left out.
        keep: Leave the swarm running until Ctrl-C.
        json: Print one JSON document on standard output.
    """
    settings = config.load_settings(PRESET).demo
    if find_spec("openai") is None:
        raise MissingExtra(package="openai", extra="demo")
    layers = _plan_layers(settings, shards)
    threads = threads or max(1, (os.cpu_count() or 1) // len(layers))
    request = Request(prompt=prompt or settings.prompt, max_tokens=settings.max_tokens)

    async def run() -> None:
        async with open_swarm(settings.model, layers, threads, on_progress=console.note) as swarm:
            await _ask_and_report(swarm, request, json=json)
            if keep:
                _explain_endpoint(swarm)
                await trio.sleep_forever()

    if await run_until_signal(run) is not None:
        raise KeyboardInterrupt  # by whatever signal, it did not finish


def _plan_layers(settings: DemoSettings, shards: int | None) -> list[LayerRange]:
    """Return the preset's ranges, or as many equal ones as are asked for.

    Raises:
        ModelNotFound: The model is neither on this machine nor to be had.
        InvalidConfig: The model has fewer layers than shards.
    """
    from pals.models.hub import resolve_model

    num_layers = resolve_model(settings.model).config.num_layers
    if shards is None:
        return [LayerRange.parse(text) for text in settings.layers]
    if shards > num_layers:
        raise InvalidConfig(
            source="--shards",
            problem=f"{shards} shards for {num_layers} layers",
            advice=f"choose at most {num_layers}",
        )
    return split_layers(num_layers, shards)


# --- the swarm -----------------------------------------------------------------------


@asynccontextmanager
async def open_swarm(
    model: str,
    layers: Sequence[LayerRange],
    threads: int,
    *,
    shard_options: Sequence[str] = (),
    on_progress: Callable[[str], None],
) -> AsyncGenerator[Endpoint]:
    """Run a whole swarm of processes until the block ends.

    Args:
        model: The model that it serves.
        layers: The range of each shard.
        threads: Compute threads of each shard.
        shard_options: More options of each shard's command line.
        on_progress: Told what happens, in a line.

    Raises:
        ChildFailed: A process did not come up.
    """
    with tempfile.TemporaryDirectory(prefix="pals-demo-") as folder:
        async with open_children() as children:
            profiles = await _enrol(children, Path(folder), model, len(layers), on_progress)
            options = partial(_shard_options, model, threads, shard_options)
            starts = [
                partial(_start_shard, children, profile, options(part), part, on_progress)
                for profile, part in zip(profiles[1:], layers, strict=True)
            ]
            endpoint = await _start_all(children, profiles[0], model, starts)
            on_progress(f"endpoint: {endpoint.url}/v1")
            yield endpoint


async def _enrol(
    children: Children, folder: Path, model: str, count: int, on_progress: Callable[[str], None]
) -> list[Profile]:
    """Start a backend and return the operator's profile and one for each invited peer."""
    from pals.net.enrolment import create_invite, create_swarm, redeem_invite

    data = folder / "backend.sqlite"
    backend = await children.start(
        "the backend", "backend", "--port", "0", "--data", str(data), config_dir=folder / "backend"
    )
    ready = await backend.wait_for_event("ready", deadline_s=START_DEADLINE_S)
    url = str(ready["url"])
    on_progress(f"membership backend: {url}")
    operator = Profile(folder / "operator")
    entry = await create_swarm(operator, name="demo", model=model, backend_url=url, now=time.time())
    peers = [Profile(folder / f"peer-{i + 1}") for i in range(count)]
    for peer in peers:
        await redeem_invite(peer, await create_invite(operator, now=time.time()))
    on_progress(f"swarm {short_id(bytes.fromhex(entry.swarm_id))}: {count} invited peers joined")
    return [operator, *peers]


async def _start_all(
    children: Children,
    operator: Profile,
    model: str,
    starts: Sequence[Callable[[], Awaitable[None]]],
) -> Endpoint:
    """Start all shards and the endpoint at the same time."""
    async with trio.open_nursery() as nursery:
        for start in starts:
            nursery.start_soon(start)
        server = await children.start(
            "the endpoint", "serve", model, "--preset", PRESET, config_dir=operator.path
        )
        ready = await server.wait_for_event("ready", deadline_s=START_DEADLINE_S)
    return Endpoint(url=str(ready["url"]), model=str(ready["model"]))


def _shard_options(
    model: str, threads: int, more: Sequence[str], layers: LayerRange
) -> tuple[str, ...]:
    own = ("--layers", str(layers), "--threads", str(threads), "--preset", PRESET)
    return (model, *own, *more)


async def _start_shard(
    children: Children,
    profile: Profile,
    options: Sequence[str],
    layers: LayerRange,
    on_progress: Callable[[str], None],
) -> None:
    child: Child = await children.start(
        f"the shard of layers {layers}", "shard", *options, config_dir=profile.path
    )
    ready = await child.wait_for_event("shard-ready", deadline_s=COMPILE_DEADLINE_S)
    on_progress(f"shard of layers {layers}: peer {short_id(str(ready['peer']))}")


# --- the request ---------------------------------------------------------------------


async def _ask_and_report(swarm: Endpoint, request: Request, *, json: bool) -> None:
    def show(text: str) -> None:
        if not json:
            console.out(text, end="")

    answer = await trio.to_thread.run_sync(
        partial(ask, swarm, request, on_text=show), abandon_on_cancel=True
    )
    hops = await fetch_hops(swarm)
    if json:
        console.json(_document(swarm, answer, hops))
    else:
        console.out("\n")
        _print_table(answer, hops)


def ask(swarm: Endpoint, request: Request, *, on_text: Callable[[str], None]) -> Answer:
    """Stream one chat completion through OpenAI's own client.

    Args:
        swarm: Where to ask.
        request: What to ask.
        on_text: Called with each piece of the answer, in the calling thread.
    """
    from openai import OpenAI

    with OpenAI(
        base_url=f"{swarm.url}/v1",
        api_key=CLIENT_KEY,
        timeout=REQUEST_DEADLINE_S,
        max_retries=REQUEST_RETRIES,
    ) as client:
        started_s = time.perf_counter()
        stream = client.chat.completions.create(
            model=swarm.model,
            messages=[{"role": "user", "content": request.prompt}],
            max_tokens=request.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        return _read_stream(stream, started_s, on_text)


def _read_stream(
    stream: Iterable[ChatCompletionChunk], started_s: float, on_text: Callable[[str], None]
) -> Answer:
    pieces: list[str] = []
    first_s = last_s = started_s
    tokens = 0
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            last_s = time.perf_counter()
            first_s = first_s if pieces else last_s
            pieces.append(text)
            on_text(text)
    return Answer(
        text="".join(pieces),
        completion_tokens=tokens,
        time_to_first_token_s=first_s - started_s,
        tokens_per_s=max(0, tokens - 1) / max(last_s - first_s, 1e-9),
    )


async def fetch_hops(swarm: Endpoint) -> list[HopLine]:
    """Return the timings of the chain that answered last."""
    async with httpx.AsyncClient(trust_env=False, timeout=START_DEADLINE_S) as client:
        response = await client.get(f"{swarm.url}/pals/chain")
        response.raise_for_status()
        return msgspec.json.decode(response.content, type=_Chain).hops


def _document(swarm: Endpoint, answer: Answer, hops: Sequence[HopLine]) -> dict[str, object]:
    return {
        "schema": 1,
        "model": swarm.model,
        "text": answer.text,
        "completion_tokens": answer.completion_tokens,
        "tokens_per_s": answer.tokens_per_s,
        "time_to_first_token_s": answer.time_to_first_token_s,
        "shards": [msgspec.to_builtins(hop) | {"hop_ms": hop.hop_ms} for hop in hops],
    }


def _print_table(answer: Answer, hops: Sequence[HopLine]) -> None:
    rows = [(short_id(h.peer), h.layers, f"{h.step_ms:.2f}", f"{h.hop_ms:.2f}") for h in hops]
    console.table(("peer", "layers", "step ms", "hop ms"), rows)
    console.out("")
    console.out(f"time to first token  {answer.time_to_first_token_s:.2f} s")
    console.out(f"tokens/s             {answer.tokens_per_s:.1f}")


def _explain_endpoint(swarm: Endpoint) -> None:
    body = msgspec.json.encode(
        {"model": swarm.model, "messages": [{"role": "user", "content": "Hello!"}]}
    ).decode()
    console.out(f"\nendpoint {swarm.url}/v1")
    console.out(
        f"curl {swarm.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
    )
    console.note("running until Ctrl-C")
