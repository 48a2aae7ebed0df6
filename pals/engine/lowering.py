# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Steps as they were traced, kept on disk beside their machine code.

To trace a step and to lower it to StableHLO takes several times as long as to read its machine
code, and holds Python's lock. An entry is what `jax.export` makes of a function, under a hash
of everything that the function depends on; an entry that is damaged is made anew.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

from pals.config import PRIVATE_FOLDER
from pals.engine.bank import Bank
from pals.engine.compile_cache import folder_in_use
from pals.engine.kinds import machine_kind
from pals.engine.work import Sampled
from pals.models.paged import Tables

FOLDER = "traced"
MAX_ENTRY_BYTES = 64 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size
_CODE = Path(__file__).parents[1]
_PARTS = ("engine", "models")

for _kind in (Bank, Sampled, Tables):
    export.register_namedtuple_serialization(_kind, serialized_name=_kind.__name__)


class Lowerings:
    """Lowers functions, or takes what an earlier process made of them.

    Args:
        depends_on: What their programs follow from beside their code and arguments; its
            ``repr`` tells two that differ apart.
        are_kept: None of them calls back into this process, which no file can.
    """

    def __init__(self, *depends_on: object, are_kept: bool = True) -> None:
        self._are_kept = are_kept
        options = [item for item in os.environ.items() if item[0].startswith("JAX_")]
        kinds = sorted([*machine_kind().items(), *options])
        self._depends_on = repr((code_digest(), version("flax"), kinds, depends_on))

    def lower(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        name: str,
        donated: tuple[int, ...] = (),
    ) -> jax.stages.Lowered:
        """Lower a function of such arguments.

        Args:
            function: Traced unless its program is on disk.
            arguments: Arrays, or the shapes of some.
            name: Says which of the functions it is, and what of it is static.
            donated: Places of the arguments that are given away.
        """
        folder = folder_in_use() if self._are_kept else None
        if folder is None:
            return jax.jit(function, donate_argnums=donated).lower(*arguments)
        path = folder / FOLDER / self._key(name, arguments)
        exported = _read(path)
        if exported is None:
            exported = export.export(jax.jit(function))(*arguments)
            _write(path, exported.serialize())
        return jax.jit(_named(exported.call, name), donate_argnums=donated).lower(*arguments)

    def _key(self, name: str, arguments: tuple[Any, ...]) -> str:
        leaves, tree = jax.tree.flatten(arguments)
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        parts = (self._depends_on, name, str(tree), repr(shapes))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def code_digest() -> str:
    """Return a hash of the code that steps are traced from."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.relative_to(_CODE)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    for part in _PARTS:
        yield from sorted((_CODE / part).rglob("*.py"))


def _named(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a function by whose name profiles and the files of machine code say what it is."""

    def run(*arguments: Any) -> Any:  # noqa: ANN401 (what goes in and out is the callee's)
        return call(*arguments)

    run.__name__ = name.partition(" ")[0]
    return run


def _read(path: Path) -> export.Exported | None:
    """Return an entry, or None where there is none, or none that is whole."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_ENTRY_BYTES)
    except OSError:
        return None
    digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(program).digest() != digest:
        return None
    return export.deserialize(bytearray(program))


def _write(path: Path, program: bytes | bytearray) -> None:
    """Keep an entry, whole or not at all; a full disk costs the next start its time."""
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(program).digest())
                file.write(program)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
