"""Keeps the tables of docs/performance.md."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.results import Result, Setting

_TABLE = re.compile(
    r"(<!-- results: (\S+)( by system)? -->\n).*?(<!-- end of results -->)", re.DOTALL
)


def update_tables(file: Path, results: Sequence[Result]) -> None:
    """Replace the tables between ``<!-- results: NAME -->`` and ``<!-- end of results -->``.

    ``NAME by system`` has a column for each system only, and settings in its rows. A
    benchmark that was not run keeps its table.
    """

    def replace(found: re.Match[str]) -> str:
        own = [result for result in results if result.benchmark == found[2]]
        render = render_systems if found[3] else render_table
        return f"{found[1]}\n{render(own)}\n{found[4]}" if own else found[0]

    file.write_text(_TABLE.sub(replace, file.read_text()))


def render_table(results: Sequence[Result]) -> str:
    """Return a column for each system, a row for each metric, and what all of them share.

    A cell is the median and, in brackets, the smallest and the largest sample.
    """
    shared = _shared_setting(results)
    rows: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for result in results:
        rows[_row_name(result)][_column_name(result, shared)] = _cell(result)
    for result in results:
        rows["load"][_column_name(result, shared)] = f"{result.load:.2f}"
    return _render(rows, list(rows["load"]), shared)


def render_systems(results: Sequence[Result]) -> str:
    """Return a column for each system, and a row for each metric in each setting."""
    shared = _shared_setting(results)
    rows: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for result in results:
        name = ", ".join([*_own_setting(result, shared), _row_name(result)])
        rows[name][result.system] = _cell(result)
    loads = sorted(result.load for result in results)
    shared["load"] = f"{loads[0]:.2f} to {loads[-1]:.2f}"
    return _render(rows, list(dict.fromkeys(result.system for result in results)), shared)


def _render(rows: Mapping[str, Mapping[str, str]], columns: list[str], shared: Setting) -> str:
    lines = [_row("", columns), _row("---", ["---"] * len(columns))]
    lines += [_row(name, [row.get(c, "") for c in columns]) for name, row in rows.items()]
    setting = ", ".join(f"{key} {value}" for key, value in shared.items())
    return "\n".join([*lines, "", f"In all columns: {setting}.", ""])


def _cell(result: Result) -> str:
    return f"{result.value:.3g} ({result.min:.3g} to {result.max:.3g})"


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
    return ", ".join([result.system, *_own_setting(result, shared)])


def _own_setting(result: Result, shared: Setting) -> list[str]:
    own = {k: v for k, v in result.setting.items() if k not in shared and k != "to"}
    return [f"{key} {value}" for key, value in own.items()]
