"""Every row of the tables of docs/security.md is played by a test of its name."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "security.md"
ROW = re.compile(r"^\| ([MPH]\d+) \|.*\| ([^|]+) \|$", re.MULTILINE)
ROWS = {f"M{n}" for n in range(1, 13)} | {f"P{n}" for n in range(1, 16)}
ROWS |= {f"H{n}" for n in range(1, 11)}


def test_every_row_names_files_with_tests_of_its_name() -> None:
    named = dict(ROW.findall(PAGE.read_text()))
    assert named.keys() == ROWS
    for row, cell in named.items():
        assert f"`test_{row.lower()}_…`" in cell
        for file in re.findall(r"`(test_\w+\.py)`", cell):
            text = (FOLDER / file).read_text()
            assert re.search(rf"def test_{row.lower()}_", text), (row, file)
