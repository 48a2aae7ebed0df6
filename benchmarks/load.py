"""Loading: bytes fetched, seconds, memory on the way, and three machines with a third each.

On a random checkpoint of some gigabytes. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import msgspec
import trio

from benchmarks.large_model import FULL, QUICK, Size, write_model
from benchmarks.load_child import Loaded, read_memory
from benchmarks.results import Result, Subject
from pals import config
from pals.cli.demo import Answer, Endpoint, Request, ask, open_swarm
from pals.cli.interrupt import run_until_signal
from pals.cli.process import HUGE_PAGES, MALLOC_VARIABLE
from pals.models.parts import is_needed
from pals.models.safetensors import SINGLE_NAME, read_header
from pals.types import LayerRange, split_layers
from tests.integration.models.hub_server import HubServer, Repo

NAME = "load"
DTYPES = ("bf16", "f32", "int8", "int4")
QUANTIZED = ("int8", "int4")
HUB_NAME = "random/llama"
ROUNDS = 3
SHARDS = 3
REQUEST = Request(prompt="Load me.", max_tokens=12)
DEADLINE_S = 600.0


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure loads of each dtype, and the memory of three shards that answer together.

    Args:
        quick: A smaller model, once.
        report: Given each line.

    Raises:
        CalledProcessError: A load failed.
        ChildFailed: A process of the swarm did not come up.
        KeyboardInterrupt: A signal came.
    """
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="pals-load-") as name:
        folder = Path(name) / "model"
        model_bytes = write_model(folder, size)
        subject = Subject(
            benchmark=NAME,
            system="pals",
            setting={"model": f"random llama of {model_bytes / 1e9:.2f} GB", "device": "cpu"},
            load=os.getloadavg()[0],
        )
        for result in measure_download(folder, size, subject):
            report(result)
        for result in measure_loads(folder, size, subject, rounds=1 if quick else ROUNDS):
            report(result)
        for result in measure_shards(folder, size, model_bytes, subject):
            report(result)


# --- one download --------------------------------------------------------------------


def measure_download(folder: Path, size: Size, subject: Subject) -> list[Result]:
    """Return what a shard of the middle third fetches of a hub, beside what it needs."""
    parts = split_layers(size.num_layers, SHARDS)
    layers = parts[len(parts) // 2]
    tensors = read_header(folder / SINGLE_NAME).values()
    needed = sum(
        tensor.size_bytes
        for tensor in tensors
        if is_needed(tensor.name, layers, size.num_layers, tied=False)
    )
    fetched, seconds = pull(folder, layers)
    of = replace(subject, setting={**subject.setting, "layers": str(layers)})
    compared = replace(of, setting={**of.setting, "to": "the bytes of its layers"})
    return [
        of.summarise("download_s", "s", [seconds]),
        of.summarise("downloaded_bytes", "bytes", [fetched]),
        compared.summarise("downloaded_ratio", "ratio", [fetched / needed]),
    ]


def pull(folder: Path, layers: LayerRange) -> tuple[int, float]:
    """Let `pals models pull` fetch layers from a hub on loopback; return bytes and seconds.

    Raises:
        CalledProcessError: It failed.
    """
    with HubServer() as hub, tempfile.TemporaryDirectory(prefix="pals-hub-") as cache:
        hub.repos[HUB_NAME] = Repo({"main": folder})
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": cache, "HF_HUB_OFFLINE": "0"}
        command = ("models", "pull", HUB_NAME, "--layers", str(layers))
        started_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pals", *command],
            env=config.child_environment(variables),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=DEADLINE_S,
        )
        seconds = time.perf_counter() - started_s
        return sum(stop - start for start, stop in hub.ranges(folder / SINGLE_NAME)), seconds


# --- one load ------------------------------------------------------------------------


def measure_loads(folder: Path, size: Size, subject: Subject, *, rounds: int) -> list[Result]:
    """Return seconds and memory of loading the first half of the layers in each dtype."""
    layers = LayerRange(0, size.num_layers // 2)
    results: list[Result] = []
    for dtype in DTYPES:
        sources = ("checkpoint", "prepared layers") if dtype in QUANTIZED else ("checkpoint",)
        starts = [load_in_turn(folder, layers, dtype, len(sources)) for _ in range(rounds)]
        for source, loads in zip(sources, zip(*starts, strict=True), strict=True):
            setting = {"dtype": dtype, "layers": str(layers), "from": source}
            of = replace(subject, setting={**subject.setting, **setting})
            ratios = [peak_ratio(load, size) for load in loads]
            results += [
                of.summarise("load_s", "s", [load.load_s for load in loads]),
                of.summarise("peak_memory_bytes", "bytes", [load.peak_bytes for load in loads]),
                of.summarise("peak_memory_ratio", "ratio", ratios),
            ]
    return results


def load_in_turn(folder: Path, layers: LayerRange, dtype: str, times: int) -> list[Loaded]:
    """Load first with an empty cache of prepared layers, then with what that left there."""
    with tempfile.TemporaryDirectory(prefix="pals-cache-") as cache:
        return [load_in_child(folder, layers, dtype, Path(cache)) for _ in range(times)]


def peak_ratio(load: Loaded, size: Size) -> float:
    """Return the memory that a load added, by what it may: its result and one tensor."""
    return (load.peak_bytes - load.base_bytes) / (load.device_bytes + size.largest_tensor_bytes)


def load_in_child(folder: Path, layers: LayerRange, dtype: str, cache: Path) -> Loaded:
    """Load layers in a new process.

    Raises:
        CalledProcessError: It failed.
    """
    variables = {MALLOC_VARIABLE: HUGE_PAGES, config.CACHE_DIR_VARIABLE: str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load_child", str(folder), str(layers), dtype],
        env=config.child_environment(variables),
        check=True,
        stdout=subprocess.PIPE,
        timeout=DEADLINE_S,
    )
    return msgspec.json.decode(done.stdout, type=Loaded)


# --- three shards --------------------------------------------------------------------


def measure_shards(folder: Path, size: Size, model_bytes: int, subject: Subject) -> list[Result]:
    """Return the memory of three shards by the model's size, and whether they answer right."""
    alone, _ = answer_with(folder, size, 1)
    together, peaks = answer_with(folder, size, SHARDS)
    shards = replace(subject, setting={**subject.setting, "dtype": "bf16", "shards": SHARDS})
    shares = [peak / model_bytes for peak in peaks]
    return [
        shards.summarise("peak_memory_bytes", "bytes", peaks),
        replace(shards, setting={**shards.setting, "to": "the model's size"}).summarise(
            "resident_memory_ratio", "ratio", [max(shares), median(shares), min(shares)]
        ),
        replace(shards, setting={**shards.setting, "to": "1 shard"}).summarise(
            "same_text", "bool", [float(alone.text == together.text)]
        ),
    ]


def answer_with(folder: Path, size: Size, count: int) -> tuple[Answer, list[int]]:
    """Answer over ``count`` real shards; return the answer and each shard's most memory."""
    outcome: list[tuple[Answer, list[int]]] = []

    async def run() -> None:
        layers = split_layers(size.num_layers, count)
        async with open_swarm(str(folder), layers, 1, on_progress=_ignore) as swarm:
            answer = await trio.to_thread.run_sync(partial(_ask, swarm), abandon_on_cancel=True)
            outcome.append((answer, shard_peaks(folder, layers)))

    if trio.run(run_until_signal, run):
        raise KeyboardInterrupt
    return outcome[0]


def _ask(swarm: Endpoint) -> Answer:
    return ask(swarm, REQUEST, on_text=_ignore)


def shard_peaks(folder: Path, layers: Sequence[LayerRange]) -> list[int]:
    """Return the most memory of each process that holds a shard of a model, in bytes."""
    peaks: list[int] = []
    for part in layers:
        wanted = f"\0shard\0{folder}\0--layers\0{part}\0".encode()
        found = [entry for entry in Path("/proc").glob("[0-9]*") if wanted in _command_line(entry)]
        peaks.append(max(read_memory("VmHWM", entry.name) for entry in found))
    return peaks


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def _ignore(_: str) -> None:
    """Show neither progress nor text: standard output is for results."""
