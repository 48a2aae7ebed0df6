"""How programs are compiled, and where they are kept."""
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled

from pals.config import PRIVATE_FOLDER

CompilerOptions = dict[str, str | bool]

CPU_OPTIONS: CompilerOptions = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""By default XLA on CPU runs what depends on no input first: the widened int4 weights of all
layers would be held at one time. This order is as fast (decode) or faster (int4 prefill)."""

CODE_UNOPTIMISED: CompilerOptions = {"xla_backend_optimization_level": "0"}


def compiler_options(platform: str) -> CompilerOptions | None:
    """Return what XLA is told when it compiles for a platform (as jax names it)."""
    return CPU_OPTIONS if platform == "cpu" else None


def use_compilation_cache(folder: Path) -> None:
    """Keep every compiled program in ``folder``, however small or quick to compile."""
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    # jax declares its options at run time, which pyright cannot see.
    current = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if current == os.fspath(folder):
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # jax looks at the folder once, at the first compilation of the process.
    compilation_cache.reset_cache()


def workspace_bytes(compiled: Compiled) -> int:
    """Return the temporary device bytes of a program."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes if memory is not None else 0
