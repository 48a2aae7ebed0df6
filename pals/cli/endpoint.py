"""The models that a process drives: what `pals serve` and `pals run` share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pals.cli.process import Member, ServedRole, leaving_note, node_options
from pals.driver.bridge import TrioThread
from pals.errors import InvalidConfig
from pals.settings import Settings

if TYPE_CHECKING:
    from pals.driver.local import LocalDriver
    from pals.driver.routes import ServedModel
    from pals.driver.sessions import SessionClient
    from pals.models.snapshot import Snapshot
    from pals.net.node import Node

LEAVE_MARGIN_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """What a process drives.

    Attributes:
        models: Names or folders of the models, the first one first.
        also: What the same node serves besides.
        endpoint: Where the process answers HTTP; empty for nowhere.
    """

    models: Sequence[str]
    also: ServedRole | None = None
    endpoint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Models that are ready to be asked.

    Attributes:
        drivers: By the models' ids, in the order in which they were named.
        shard: What the same node serves besides.
    """

    drivers: Mapping[str, LocalDriver]
    shard: LeavingShard | None


@contextmanager
def open_endpoint(
    member: Member, settings: Settings, drive: Drive, *, on_crash: Callable[[], None]
) -> Generator[Endpoint]:
    """Run a node that drives models, until the block ends.

    Args:
        member: Who drives.
        settings: Of its node.
        drive: What it drives.
        on_crash: Called on another thread when the network ends by an error.

    Raises:
        ModelError: A model is not there.
        InvalidConfig: Two of them are the same.
        RosterUnavailable: There is no verified member list.
        PortInUse: The listening address is taken.
    """
    from pals.driver.sessions import open_clients
    from pals.models.hub import resolve_model

    snapshots = [resolve_model(model) for model in drive.models]
    served = [_served_model(snapshot) for snapshot in snapshots]
    _check_distinct(served)
    shard = None if drive.also is None else LeavingShard(drive.also, settings.node.drain_s)
    options = replace(node_options(member, settings), endpoint=drive.endpoint)
    network = TrioThread(partial(open_clients, options, served, serve=shard), on_crash=on_crash)
    try:
        clients = network.start()
        if shard is not None:
            shard.network = network
        drivers = [
            _build_driver(network, *parts) for parts in zip(clients, served, snapshots, strict=True)
        ]
        yield Endpoint(drivers={driver.model_id: driver for driver in drivers}, shard=shard)
    finally:
        network.stop()
    if network.error is not None:
        raise network.error


class LeavingShard:
    """The shard that a driver's node serves too, which leaves in order when asked."""

    def __init__(self, role: ServedRole, drain_s: float) -> None:
        from pals.net.serving import Drain

        self._role = role
        self._drain_s = drain_s
        self._drain = Drain(on_leave=partial(leaving_note, drain_s))
        self._is_leaving = threading.Event()
        self._has_left = threading.Event()
        self.network: TrioThread[object] | None = None

    async def __call__(self, node: Node) -> None:
        try:
            await self._role(node, drain=self._drain)
        finally:
            self._has_left.set()

    def leave(self) -> None:
        """Begin to leave; called on the main thread."""
        assert self.network is not None
        self._is_leaving.set()
        self.network.post(self._begin)

    def _begin(self) -> None:
        if not self._drain.request():  # it serves nothing yet, so nobody waits for it
            self._has_left.set()

    def wait_until_left(self) -> None:
        """Wait for it when it was asked to leave; called on the main thread."""
        if self._is_leaving.is_set():
            self._has_left.wait(self._drain_s + LEAVE_MARGIN_S)


def _check_distinct(served: Sequence[ServedModel]) -> None:
    named: dict[bytes, str] = {}
    for model in served:
        if model.manifest in named:
            raise InvalidConfig(
                source="the models to serve",
                problem=f"`{model.model_id}` has the files of `{named[model.manifest]}`",
                advice="name each of them once",
            )
        named[model.manifest] = model.model_id


def _served_model(snapshot: Snapshot) -> ServedModel:
    from pals.driver.routes import ServedModel

    return ServedModel(
        model_id=snapshot.model_id,
        manifest=snapshot.manifest,
        num_layers=snapshot.config.num_layers,
        max_position_embeddings=snapshot.config.max_position_embeddings,
        hidden_size=snapshot.config.hidden_size,
    )


def _build_driver(
    network: TrioThread[object],
    client: SessionClient,
    served: ServedModel,
    snapshot: Snapshot,
) -> LocalDriver:
    from pals.driver.local import LocalDriver
    from pals.text.answers.format import AnswerFormat
    from pals.text.child import TextChild
    from pals.text.grammar import GrammarChecker, GrammarMasks
    from pals.text.template import ChatTemplate
    from pals.text.tokenizer import Tokenizer

    child = TextChild()
    tokenizer = Tokenizer.load(snapshot.path, child)
    eos = tokenizer.eos_token_ids.union(snapshot.config.eos_token_ids)
    masks = GrammarMasks(snapshot.path / "tokenizer.json", snapshot.config.vocab_size, eos)
    return LocalDriver(
        network,
        client,
        served,
        tokenizer,
        ChatTemplate.load(snapshot.path, child),
        eos_token_ids=eos,
        vocab_size=snapshot.config.vocab_size,
        answers=AnswerFormat.detect(snapshot.path, tokenizer),
        grammars=GrammarChecker(masks),
    )
