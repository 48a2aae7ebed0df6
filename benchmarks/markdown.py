"""Keeps the tables of docs/performance.md."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Result, Setting

_TABLE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def update_tables(file: Path, results: Sequence[Result]) -> None:
    """Replace the tables between ``<!-- results: NAME -->`` and ``<!-- end of results -->``.

    A benchmark that was not run keeps its table.
    """

    def replace(found: re.Match[str]) -> str:
        own = [result for result in results if result.benchmark == found[2]]
        return f"{found[1]}\n{render_table(own)}\n{found[3]}" if own else found[0]

    file.write_text(_TABLE.sub(replace, file.read_text()))


def render_table(results: Sequence[Result]) -> str:
    """Return a column for each system, a row for each metric, and what all of them share.

    A cell is the median and, in brackets, the smallest and the largest sample.
    """
    shared = _shared_setting(results)
    rows: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for result in results:
        cell = f"{result.value:.3g} ({result.min:.3g} to {result.max:.3g})"
        rows[_row_name(result)][_column_name(result, shared)] = cell
    for result in results:
        rows["load"][_column_name(result, shared)] = f"{result.load:.2f}"
    columns = list(rows["load"])
    lines = [_row("", columns), _row("---", ["---"] * len(columns))]
    lines += [_row(name, [row.get(c, "") for c in columns]) for name, row in rows.items()]
    setting = ", ".join(f"{key} {value}" for key, value in shared.items())
    return "\n".join([*lines, "", f"In all columns: {setting}.", ""])


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


def _shared_setting(results: Sequence[Result]) -> Setting:
    return {
        key: value
        for key, value in results[0].setting.items()
        if all(result.setting.get(key) == value for result in results)
    }


def _row_name(result: Result) -> str:
    to = result.setting.get("to")
    return result.metric if to is None else f"{result.metric} to {to}"


def _column_name(result: Result, shared: Setting) -> str:
    own = {k: v for k, v in result.setting.items() if k not in shared and k != "to"}
    return ", ".join([result.system, *[f"{key} {value}" for key, value in own.items()]])
