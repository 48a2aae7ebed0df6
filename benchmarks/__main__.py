"""`python -m benchmarks`: run benchmarks and print their lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import msgspec

from benchmarks.markdown import update_tables
from benchmarks.results import Result

BENCHMARKS = {
    "demo": "benchmarks.demo",
    "failover": "benchmarks.failover",
    "load": "benchmarks.load",
    "ring": "benchmarks.ring",
    "quantize": "benchmarks.quantize",
    "codec": "benchmarks.codec",
    "shapes": "benchmarks.shapes",
    "transport": "benchmarks.transport",
    "engine": "benchmarks.engine",
    "moe": "benchmarks.moe",
    "near_ties": "benchmarks.near_ties",
    "batching": "benchmarks.batching",
    "resident": "benchmarks.resident",
    "rivals": "benchmarks.rivals",
    "api": "benchmarks.api",
    "soak": "benchmarks.soak",
}
"""Name -> the module whose `run` measures it."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish within a minute")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also replace the tables in this file"
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of: {', '.join(BENCHMARKS)}")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, this process's when left out."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(BENCHMARKS)):
        parser.error(f"no benchmark `{unknown[0]}`: choose any of {', '.join(BENCHMARKS)}")
    return options


def main() -> None:
    """Run the benchmarks of this process's command line."""
    options = parse_arguments()
    results: list[Result] = []

    def report(result: Result) -> None:
        results.append(result)
        print(msgspec.json.encode(result).decode(), flush=True)

    for name in options.names or BENCHMARKS:
        import_module(BENCHMARKS[name]).run(quick=options.quick, report=report)
    if options.markdown is not None:
        update_tables(options.markdown, results)


if __name__ == "__main__":
    main()
