"""How programs are compiled."""

from __future__ import annotations

from jax.stages import Compiled

CompilerOptions = dict[str, str | bool]

CPU_OPTIONS: CompilerOptions = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""By default XLA on CPU runs what depends on no input first: the widened int4 weights of all
layers would be held at one time. This order is as fast (decode) or faster (int4 prefill)."""

CODE_UNOPTIMISED: CompilerOptions = {"xla_backend_optimization_level": "0"}


def compiler_options(platform: str) -> CompilerOptions | None:
    """Return what XLA is told when it compiles for a platform (as jax names it)."""
    return CPU_OPTIONS if platform == "cpu" else None


def workspace_bytes(compiled: Compiled) -> int:
    """Return the temporary device bytes of a program."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes if memory is not None else 0
