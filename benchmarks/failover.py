"""The silence that a client sees when a shard is killed, stopped or asked to leave.

Three shard processes and a spare of each, behind a real endpoint. A streamed answer runs,
the shard of one position is signalled, and the longest time between two pieces of text is
the sample: with nothing wrong it is a few milliseconds. Every answer is compared with one
that nothing disturbed.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Result, Subject
from pals import config
from pals.models.hub import resolve_model
from pals.types import split_layers
from tests.chaos.process_swarm import (
    ProcessSwarm,
    StreamReader,
    make_endless_checkpoint,
    open_process_swarm,
)

NAME = "failover"
PRESET = "loopback-3"
POSITIONS = ("head", "middle", "tail")
SIGNS = {"killed": signal.SIGKILL, "silent": signal.SIGSTOP, "draining": signal.SIGTERM}
PROMPT = "Write a long story about a lighthouse keeper who finds a letter in a bottle."
WAIT_FOR_PEERS_S = 60.0
CONTEXT_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What to measure.

    Attributes:
        model: Name of the model; None makes a tiny random one.
        signs: What happens to a shard.
        rounds: How often it happens to each position.
        max_tokens: Of each answer.
        begun: Pieces of text after which it happens.
    """

    model: str | None
    signs: tuple[str, ...]
    rounds: int
    max_tokens: int
    begun: int


QUICK = Effort(model=None, signs=("killed",), rounds=1, max_tokens=700, begun=100)


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure each sign at each position.

    Args:
        quick: A tiny random model, and one SIGKILL at each position.
        report: Given each line.

    Raises:
        AssertionError: A process did not come up, or an answer did not end.
        APIError: An answer failed.
    """
    full = Effort(
        model=config.load_settings(PRESET).demo.model,
        signs=tuple(SIGNS),
        rounds=5,
        max_tokens=300,
        begun=50,
    )
    effort = QUICK if quick else full
    with tempfile.TemporaryDirectory(prefix="pals-failover-") as name:
        folder = Path(name)
        model = effort.model or str(make_endless_checkpoint(folder / "tiny", num_layers=3))
        num_layers = resolve_model(model).config.num_layers
        layers = [str(part) for part in split_layers(num_layers, len(POSITIONS))]
        options = ("--threads", "1", "--context", str(CONTEXT_TOKENS), "--sessions", "2")
        load = os.getloadavg()[0]
        with open_process_swarm(folder, model, cache=config.cache_dir(), options=options) as swarm:
            for result in _measure(swarm, layers, effort, load):
                report(result)


def _measure(
    swarm: ProcessSwarm, layers: Sequence[str], effort: Effort, load: float
) -> Iterator[Result]:
    members = [swarm.join() for _ in range(2 * len(layers))]
    swarm.start_shards(*zip(members, layers, strict=False))
    swarm.start_shards(*zip(members[len(layers) :], layers, strict=True))
    url = swarm.start_endpoint(swarm.operator, wait_for_peers_s=WAIT_FOR_PEERS_S)
    bench = _Bench(swarm=swarm, url=url, effort=effort)
    unfailed = [bench.ask() for _ in range(effort.rounds + 1)][1:]
    text = unfailed[0].read()
    subject = Subject(
        benchmark=NAME,
        system="pals",
        setting={
            "model": Path(swarm.model).name,
            "dtype": "f32",
            "shards": len(layers),
            "spares": len(layers),
            "threads": 1,
            "max_tokens": effort.max_tokens,
        },
        load=load,
    )
    undisturbed = [reader.longest_silence_s for reader in unfailed]
    yield bench.line(subject, "nothing", "none", undisturbed)
    for sign in effort.signs:
        for position, part in zip(POSITIONS, layers, strict=True):
            samples = [bench.disturb(sign, part, text) for _ in range(effort.rounds)]
            yield bench.line(subject, sign, position, samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """The running swarm and what is asked of it."""

    swarm: ProcessSwarm
    url: str
    effort: Effort

    def ask(self) -> StreamReader:
        """Read one answer to its end."""
        reader = self._begin()
        reader.read()
        return reader

    def disturb(self, sign: str, layers: str, text: str) -> float:
        """Let one thing happen to a shard under an answer, and return the longest silence.

        Raises:
            AssertionError: The answer was over before it happened, or is another one.
        """
        reader = self._begin()
        reader.wait_for_pieces(self.effort.begun)
        victim = self.swarm.active_shard(self.url, layers)
        assert reader.is_running, "the answer was over too soon"
        victim.running.signal(SIGNS[sign])
        answer = reader.read()
        if SIGNS[sign] is signal.SIGSTOP:
            victim.running.signal(signal.SIGCONT)
        elif self.effort is not QUICK:
            self.swarm.start_shards((victim.profile, victim.layers))
        assert answer == text, "the text changed"
        return reader.longest_silence_s

    def line(self, subject: Subject, sign: str, position: str, samples: Sequence[float]) -> Result:
        setting = {**subject.setting, "sign": sign, "position": position}
        measured = Subject(
            benchmark=subject.benchmark, system=subject.system, setting=setting, load=subject.load
        )
        return measured.summarise("recovery_s", "s", samples)

    def _begin(self) -> StreamReader:
        model = Path(self.swarm.model).name if self.effort.model is None else self.swarm.model
        return StreamReader(self.url, model, PROMPT, self.effort.max_tokens)
