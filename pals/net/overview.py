"""The shards of a swarm model by model, what is wrong with them, and what to do. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec

from pals.errors import NoChain
from pals.net.announce import Announcement, ShardState
from pals.net.route import Chain, agreeing, find_chain
from pals.types import PeerId, short_id

MANIFEST_CHARS = 16

_Text = Annotated[str, msgspec.Meta(max_length=1000)]


class ShardLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One shard, by its last announcement.

    Attributes:
        peer: The member that serves.
        layers: ``a:b``.
        dtype: Of its weights.
        free_tokens: Of cache that sessions to come find room for.
        max_context_tokens: One session may reach.
        step_ms: One decode step over its layers, in milliseconds.
        state: Whether it takes sessions.
        path: The way to it from here; empty where there is no connection.
    """

    peer: _Text
    layers: _Text
    dtype: _Text
    free_tokens: int
    max_context_tokens: int
    step_ms: float
    state: ShardState
    path: _Text = ""


class Problem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is wrong, and what to do about it."""

    text: _Text
    hint: _Text


class ModelLines(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shards of one model.

    Attributes:
        model: Its name, as the first of them announces it.
        manifest: The first hexadecimal digits of its manifest, which tells it from others.
        num_layers: Of the whole model.
        chain: The best chain now, head first; empty for none.
        shards: By their layers.
        problems: What is wrong.
    """

    model: _Text
    manifest: _Text
    num_layers: int
    chain: tuple[_Text, ...]
    shards: tuple[ShardLine, ...]
    problems: tuple[Problem, ...]


class SwarmReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the members of a swarm serve, as one of them knows it.

    Attributes:
        swarm_id: In hex.
        peer: Who looked.
        models: In the order of their names.
    """

    swarm_id: _Text
    peer: _Text
    models: tuple[ModelLines, ...]


def describe_models(
    announcements: Iterable[Announcement], paths: Mapping[PeerId, str]
) -> tuple[ModelLines, ...]:
    """Return what is served, model by model.

    Args:
        announcements: Verified ones, of any models.
        paths: How members are connected with this one.
    """
    models: defaultdict[tuple[str, bytes, int], list[Announcement]] = defaultdict(list)
    names: dict[bytes, str] = {}
    for a in sorted(announcements, key=lambda a: (a.model_id, a.layers, a.peer)):
        models[names.setdefault(a.manifest, a.model_id), a.manifest, a.num_layers].append(a)
    return tuple(
        _describe_model(name, manifest, num_layers, shards, paths)
        for (name, manifest, num_layers), shards in sorted(models.items(), key=lambda m: m[0])
    )


def _describe_model(
    name: str,
    manifest: bytes,
    num_layers: int,
    shards: Sequence[Announcement],
    paths: Mapping[PeerId, str],
) -> ModelLines:
    serving = [a for a in shards if a.state == "serving"]
    chain, problems = None, _disagreements(name, serving)
    try:
        chain = find_chain(serving, manifest=manifest, num_layers=num_layers, model=name)
    except NoChain as error:
        problems.append(_gap(name, serving, num_layers, error))
    else:
        problems += _full_shards(name, chain)
    return ModelLines(
        model=name,
        manifest=manifest.hex()[:MANIFEST_CHARS],
        num_layers=num_layers,
        chain=() if chain is None else tuple(hop.peer for hop in chain.hops),
        shards=tuple(_line(a, paths.get(a.peer, "")) for a in shards),
        problems=tuple(problems),
    )


def _line(a: Announcement, path: str) -> ShardLine:
    return ShardLine(
        peer=a.peer,
        layers=str(a.layers),
        dtype=a.dtype,
        free_tokens=a.free_tokens,
        max_context_tokens=a.max_context_tokens,
        step_ms=a.step_ms,
        state=a.state,
        path=path,
    )


def _gap(name: str, serving: Sequence[Announcement], num_layers: int, error: NoChain) -> Problem:
    covered = {layer for a in serving for layer in range(a.layers.start, a.layers.stop)}
    if len(covered) < num_layers:
        return Problem(text=str(error), hint=error.hint)
    return Problem(
        text=f"no chain covers `{name}`: every layer is served, but the ranges do not meet",
        hint="a chain is made of whole ranges of one kind of activations, each beginning where "
        f"another ends: {error.hint}",
    )


def _disagreements(name: str, serving: Sequence[Announcement]) -> list[Problem]:
    kept = {a.peer for a in agreeing(serving)}
    return [
        Problem(
            text=f"peer {short_id(a.peer)} holds other bytes of `{name}` than most: it is left out",
            hint=f"run `pals models verify {name}` on that machine",
        )
        for a in serving
        if a.peer not in kept
    ]


def _full_shards(name: str, chain: Chain) -> list[Problem]:
    """Return the hops of the best chain that no new session finds room at."""
    return [
        Problem(
            text=f"layers {hop.layers} of `{name}` have no free cache: new sessions wait",
            hint=f"start another shard of them: `pals shard {name} --layers {hop.layers}`",
        )
        for hop in chain.hops
        if hop.free_tokens < 1
    ]
