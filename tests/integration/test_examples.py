"""The programs in examples/ run, and use what docs/python.md says may be used."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from pals.config import CACHE_DIR_VARIABLE
from tests.demo_model import import_demo_model
from tests.integration.pages import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "python.md").read_text()

_NAME = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)


@pytest.fixture(scope="module")
def cache(shared_cache: Path) -> Path:
    import_demo_model(shared_cache)
    return shared_cache


def output_of(example: str, cache: Path, *arguments: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *arguments],
        cwd=cwd,
        env=os.environ | {CACHE_DIR_VARIABLE: str(cache), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- what they do --------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_generate_answers_the_question(cache: Path, tmp_path: Path):
    lines = output_of("generate.py", cache, cwd=tmp_path)

    assert "Paris" in lines[0]


@pytest.mark.timeout(120)
def test_warmup_compiles_once_and_writes_what_is_here_already(cache: Path, tmp_path: Path):
    *programs, first, second, imported = output_of("warmup.py", cache, "out.pals", cwd=tmp_path)

    compiled, read = map(int, re.findall(r"\d+", first)[:2])
    assert second.startswith(f"0 parts compiled, {compiled + read} from the cache")
    assert imported == f"out.pals: {len(programs)} programs, 0 of their parts new here"
    assert (tmp_path / "out.pals").stat().st_mode & 0o777 == 0o600


def test_route_chooses_the_fastest_chain_and_then_the_next(cache: Path, tmp_path: Path):
    lines = output_of("route.py", cache, cwd=tmp_path)

    machines = [line.split()[0] for line in lines if " ms" in line and "takes" not in line]
    assert machines == ["tower", "laptop", "desk", "attic", "laptop"]
    assert [line.strip() for line in lines if "takes" in line] == [
        "a token takes 27.0 ms, so 37 tokens/s",
        "a token takes 33.0 ms, so 30 tokens/s",
    ]
    assert lines[-1].endswith("layers 10:20 are served by nobody reachable")


# --- what they use -------------------------------------------------------------------


def documented() -> set[str]:
    """Return the full names on the page: those of a section belong to its module."""
    sections = re.split(r"(?m)^## ", PAGE)
    found: set[str] = set()
    for section in sections:
        title = re.match(r"`([\w.]+)`\n", section)
        for name in _NAME.findall(section):
            found.add(name if name.startswith("pals.") or title is None else f"{title[1]}.{name}")
    return found


def imported_by(example: Path) -> set[str]:
    nodes = ast.walk(ast.parse(example.read_text()))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {f"{n.module}.{alias.name}" for n in froms for alias in n.names}


@pytest.mark.parametrize("name", sorted(documented()))
def test_what_the_page_names_is_there(name: str):
    module, _, attribute = name.rpartition(".")

    assert hasattr(import_module(module), attribute)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_imports_what_the_page_names(example: Path):
    used = {name for name in imported_by(example) if name.startswith("pals.")}

    assert used
    assert used <= documented() | {"pals.errors.NoChain"}
