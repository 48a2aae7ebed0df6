"""One shard on this machine: compiled steps over a KV cache, numpy in and out.

What programs of your own may import from here is described in docs/python.md. It is loaded
when it is first asked for: `import pals.engine` loads no jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pals.engine.local import LocalChain
    from pals.engine.shard import Shard
    from pals.engine.steps import CompiledProgram
    from pals.engine.warming import Warmup, import_programs, warmup

__all__ = ["CompiledProgram", "LocalChain", "Shard", "Warmup", "import_programs", "warmup"]

_MODULES = {
    "CompiledProgram": "pals.engine.steps",
    "LocalChain": "pals.engine.local",
    "Shard": "pals.engine.shard",
    "Warmup": "pals.engine.warming",
    "import_programs": "pals.engine.warming",
    "warmup": "pals.engine.warming",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module `pals.engine` has no attribute `{name}`")
    value: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
