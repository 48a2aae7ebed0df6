"""One shard of the ring benchmark, in a process of its own.

It takes a `Job` as JSON in its one argument, prints `Ready` when it serves, and answers each
line on standard input with the `Steps` since the last one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from benchmarks import ring_members
from pals import config
from pals.config import Profile
from pals.net.node import Node
from pals.net.serving import Report, ServedShard, load_shard, run_shard, serve_role
from pals.types import EngineLimits, LayerRange, ShardSpec

if TYPE_CHECKING:
    from pals.engine.batch import Step
    from pals.engine.work import Array, RowSampling, StepOutput, StepRunner


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to serve, and as whom.

    Attributes:
        port: Where to listen on loopback.
        announced_port: Where others are to dial.
    """

    profile: str
    model: str
    layers: str
    threads: int
    port: int
    announced_port: int
    limits: EngineLimits


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The shard is announced, and computes on this kind of device."""

    device: str


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each step, in the order in which they ran."""

    prefill_s: list[float]
    decode_s: list[float]


class Recorder:
    """A runner of steps that notes how long each takes."""

    def __init__(self, runner: StepRunner) -> None:
        self.layers = runner.layers
        self.is_tail = runner.is_tail
        self.check_inputs = runner.check_inputs
        self.open_sampling = runner.open_sampling
        self.close_sampling = runner.close_sampling
        self.reset = runner.reset
        self._runner = runner
        self._steps = Steps(prefill_s=[], decode_s=[])

    def take(self) -> Steps:
        """Return the steps since the last call."""
        steps, self._steps = self._steps, Steps(prefill_s=[], decode_s=[])
        return steps

    def run(
        self, step: Step, inputs: Sequence[Array], samplings: Sequence[RowSampling | None]
    ) -> StepOutput:
        started_s = time.perf_counter()
        output = self._runner.run(step, inputs, samplings)
        seconds = time.perf_counter() - started_s
        (self._steps.decode_s if step.chunk is None else self._steps.prefill_s).append(seconds)
        return output


def main(arguments: Sequence[str]) -> None:
    """Serve the job of the command line until standard input ends."""
    job = msgspec.json.decode(arguments[0], type=Job)
    config.limit_compute_threads(job.threads)
    trio.run(_serve, job)


async def _serve(job: Job) -> None:
    options = ring_members.node_options(
        Profile(Path(job.profile)), port=job.port, announced_port=job.announced_port
    )
    recorders: list[Recorder] = []

    def load() -> ServedShard:
        served = load_shard(
            job.model,
            LayerRange.parse(job.layers),
            ShardSpec(dtype="bf16", limits=job.limits),
            report=Report(on_progress=lambda _: None, on_download=lambda *_: None),
        )
        recorders.append(Recorder(served.runner))
        return replace(served, runner=recorders[0])

    async with trio.open_nursery() as nursery:
        serve = partial(run_shard, load=load, on_ready=_say_ready)
        nursery.start_soon(serve_role, options, serve)
        while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            _write(recorders[0].take())
        nursery.cancel_scope.cancel()


def _say_ready(node: Node, shard: ServedShard) -> None:
    # Only a process that computes pays for importing jax, and this one has by now.
    import jax

    _write(Ready(device=jax.default_backend()))


def _write(document: Ready | Steps) -> None:
    print(msgspec.json.encode(document).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
