"""P1, by reading: nothing in the tree turns bytes into code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("pals", "benchmarks", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "torch": {"load"},
    "np": {"load"},
    "numpy": {"load"},
    "yaml": {"load", "unsafe_load", "full_load"},
    "jsonpickle": {"decode"},
    "pd": {"read_pickle"},
}


def dangerous(tree: ast.AST) -> list[str]:
    """Return what in a module could run what it reads."""
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [a.name for a in names if a.name.partition(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                found.append(module)
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                found.append(f"{name}()")
            case ast.Call(func=ast.Attribute(value=ast.Name(id=base), attr=attr)):
                if attr in ATTRIBUTES.get(base, ()):
                    found.append(f"{base}.{attr}()")
            case ast.keyword(arg="allow_pickle" | "trust_remote_code", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append("allow_pickle or trust_remote_code")
            case _:
                pass
    return found


def test_p1_nothing_in_the_tree_unpickles_or_evaluates() -> None:
    assert len(SOURCES) > 150
    found = {str(path): dangerous(ast.parse(path.read_text())) for path in SOURCES}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill.source",
        "torch.load(x)",
        "np.load(x)",
        "np.lib.format.read_array(f, allow_pickle=True)",
        "yaml.load(x)",
        "eval(x)",
        "exec(x)",
    ],
)
def test_p1_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert dangerous(ast.parse(source))
