"""Warm-up ahead of time: a shard's programs into the cache, and from machine to machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pals.engine.compile_cache import compiling_in_stage, open_stage, place_all, programs_folder
from pals.engine.kinds import differences, machine_kind, shard_kind
from pals.engine.program_file import open_program_file, write_program_file
from pals.engine.steps import CompiledProgram
from pals.errors import ProgramsDoNotFit, ProgramsNotWritten
from pals.models.config import ModelConfig
from pals.types import LayerRange, ShardSpec

OnProgram = Callable[[CompiledProgram], None]
"""Called when a program is compiled and has run."""


class Warmable(Protocol):
    """What is warmed up: a `pals.engine.Shard`."""

    config: ModelConfig
    layers: LayerRange

    @property
    def spec(self) -> ShardSpec: ...

    def warmup(self, on_program: OnProgram) -> list[CompiledProgram]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmup:
    """What a warm-up did.

    Attributes:
        programs: All of the shard's, in the order in which they were compiled.
        from_cache: How many of their parts came from the cache on disk: on CPU a program has
            one for each kind of layer, and programs may share one.
        compiled: How many were compiled, and are in the cache now.
        seconds: All of it.
    """

    programs: tuple[CompiledProgram, ...]
    from_cache: int
    compiled: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import did.

    Attributes:
        programs: Names of the programs in the file.
        added: How many of their parts the cache did not have.
        kv_bytes: For what cache of keys and values they were compiled.
    """

    programs: tuple[str, ...]
    added: int
    kv_bytes: int


def warmup(
    shard: Warmable, *, export_to: Path | None = None, on_program: OnProgram = lambda _: None
) -> Warmup:
    """Compile and run every program of a shard, and keep them on disk.

    Broken off, it leaves whole programs in the cache and no others.

    Args:
        shard: What to warm up; it can be served afterwards.
        export_to: A file for all of its programs and nothing else, for other machines of
            the same kind.
        on_program: Told of each program.

    Raises:
        ProgramsNotWritten: The disk is full, say.
    """
    started = time.perf_counter()
    try:
        with compiling_in_stage(programs_folder()) as stage:
            programs = shard.warmup(on_program)
            used, compiled = stage.entries_used(), stage.entries_compiled()
            if export_to is not None:
                made_for = machine_kind() | shard_kind(shard.config, shard.layers, shard.spec)
                names = [program.name for program in programs]
                write_program_file(export_to, made_for, names, used)
    except OSError as error:
        raise _not_written(error) from error
    return Warmup(
        programs=tuple(programs),
        from_cache=len(used) - len(compiled),
        compiled=len(compiled),
        seconds=time.perf_counter() - started,
    )


def import_programs(
    file: Path, config: ModelConfig, layers: LayerRange, spec: ShardSpec
) -> Imported:
    """Put the programs of a file into the cache, all of them or none.

    They are machine code that will run here: import only what you trust.

    Args:
        file: What `warmup` exported.
        config: Of the model that is to be served.
        layers: The layers.
        spec: How they will be held. Where it leaves the size of the KV cache open, any fits.

    Raises:
        ProgramsDamaged: The file is none of programs, or not whole.
        ProgramsDoNotFit: They are for another kind of machine, or another shard.
        ProgramsNotWritten: The disk is full, say.
    """
    cache = programs_folder()
    ours = machine_kind() | shard_kind(config, layers, spec)
    with open_program_file(file) as programs:
        made_for = programs.manifest.made_for
        if spec.limits.kv_bytes is None:
            ours["kv_bytes"] = made_for.get("kv_bytes", "")
        if differing := differences(made_for, ours):
            raise ProgramsDoNotFit(file=file, differences="; ".join(differing))
        try:
            with open_stage(cache) as folder:
                added = place_all(programs.extract(folder), cache)
        except OSError as error:
            raise _not_written(error) from error
        return Imported(
            programs=programs.manifest.programs, added=added, kv_bytes=int(made_for["kv_bytes"])
        )


def _not_written(error: OSError) -> ProgramsNotWritten:
    problem = error.strerror or str(error)
    return ProgramsNotWritten(path=error.filename or programs_folder(), problem=problem)
