"""Steps of the engine as the product compiles them; most programs of tests are not optimised."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from pals.engine.compilation import CPU_OPTIONS, CompilerOptions

_OPTIONS: CompilerOptions = {"xla_backend_optimization_level": "3"}
if version("jaxlib").startswith("0.10."):  # see tests/conftest.py
    _OPTIONS["xla_cpu_use_fusion_emitters"] = True


def compile_as_shipped(patch: pytest.MonkeyPatch) -> None:
    """Have XLA optimise the steps that shards compile from now on."""
    for option, value in _OPTIONS.items():
        patch.setitem(CPU_OPTIONS, option, value)
