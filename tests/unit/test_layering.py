"""Rules on the source tree that the import contracts cannot state themselves."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "pals").rglob("*.py"))
VARIABLE = re.compile(r"""["']PALS_[A-Z_]+["']""")


def contracts() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    return parser


def test_every_module_of_net_has_its_layer() -> None:
    layers = contracts()["importlinter:contract:layers"]["layers"]
    layered = set(layers.replace("(", " ").replace(")", " ").split())
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in SOURCES
        if p.is_relative_to(ROOT / "pals" / "net") and p.stem != "__init__"
    }

    assert modules <= layered


def test_the_variables_of_pals_are_named_in_config_alone() -> None:
    readers = [p for p in SOURCES if VARIABLE.search(p.read_text())]

    assert readers == [ROOT / "pals" / "config.py"]


def test_files_stay_under_600_lines() -> None:
    assert [p.name for p in SOURCES if len(p.read_text().splitlines()) >= 600] == []
