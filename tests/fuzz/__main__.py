"""Fuzz one target: ``python -m tests.fuzz record --runs 1000000``.

It is guided by what the code covers (atheris, libFuzzer) where atheris has a package, and
otherwise changes the seeds at random. A fault ends it with a traceback and the input.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

MAX_INPUT_BYTES = 5000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", help="by name; see --list")
    parser.add_argument("--list", action="store_true", help="print the names of the targets")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="end after so long")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.list:
        print(*load_all(), sep="\n")  # noqa: T201
        return
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        run_unguided(options)
    else:
        run_guided(atheris, options)


def run_guided(atheris: Any, options: argparse.Namespace) -> None:
    with atheris.instrument_imports(include=["pals"]):
        target, mutate = load(options.target)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.4:
            return atheris.Mutate(data, max_size)
        return mutate(data, random)[:max_size]

    def take(data: bytes) -> None:
        target.run(data)

    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds()):
            Path(folder, f"seed-{number}").write_bytes(seed)
        arguments = [sys.argv[0], folder, f"-runs={options.runs}", f"-seed={options.seed}"]
        arguments += [f"-max_len={MAX_INPUT_BYTES}", "-timeout=10", "-rss_limit_mb=2048"]
        arguments += [f"-max_total_time={options.seconds}", "-print_final_stats=1", "-verbosity=0"]
        atheris.Setup(arguments, take, custom_mutator=mutator)
        atheris.Fuzz()


def run_unguided(options: argparse.Namespace) -> None:
    target, mutate = load(options.target)
    random, seeds = Random(options.seed), target.seeds()
    until = time.monotonic() + (options.seconds or float("inf"))
    done = 0
    while done < options.runs and time.monotonic() < until:
        data = random.choice(seeds)
        for _ in range(random.choice((1, 1, 2, 3))):
            data = mutate(data, random)
        try:
            target.run(data[:MAX_INPUT_BYTES])
        except BaseException:
            print(f"input: {data.hex()}", file=sys.stderr)  # noqa: T201
            raise
        done += 1
    print(f"Done {done} runs, not guided: atheris has no package here")  # noqa: T201


def load_all() -> dict[str, Any]:
    from tests.fuzz.targets import TARGETS

    return TARGETS


def load(name: str) -> tuple[Any, Callable[[bytes, Random], bytes]]:
    """Return a target and what changes its inputs; pals is imported here."""
    from tests.fuzz.mutation import mutate_bytes, mutate_invite, mutate_msgpack

    target = load_all()[name]

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < 0.2:
            return mutate_bytes(data, random)
        if target.skip is not None:
            return data[: target.skip] + mutate_msgpack(data[target.skip :], random)
        return mutate_invite(data, random) if name == "invite" else mutate_bytes(data, random)

    return target, mutate


if __name__ == "__main__":
    main()
