"""`pals warmup`: compile a shard's programs ahead of time, and carry them to other machines."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pals import config
from pals.cli import console
from pals.cli.options import Json
from pals.cli.process import NO_SHARD_OPTIONS, ShardOptions
from pals.engine.memory import format_bytes
from pals.errors import InvalidConfig
from pals.types import LayerRange, ShardSpec

if TYPE_CHECKING:
    from pals.engine.warming import Imported, Warmup


def warmup(
    model: str,
    /,
    *,
    layers: str,
    export: Annotated[
        Path | None, Parameter(help="File to write the programs to, for machines of this kind.")
    ] = None,
    import_: Annotated[
        Path | None,
        Parameter(
            name="--import",
            help="File to take the programs from, in place of compiling them. It holds machine "
            "code: take it from a machine that you trust.",
        ),
    ] = None,
    shard_options: ShardOptions = NO_SHARD_OPTIONS,
    preset: Annotated[str | None, Parameter(help="Preset in configs/, by name or path.")] = None,
    json: Json = False,
) -> None:
    """Compile what a shard runs, ahead of time and without serving it.

    `pals shard` with the same options then starts without compiling anything.

    Args:
        model: Model name or folder.
        layers: Half-open range of layers, such as `0:10`.
        export: File to write the programs to.
        import_: File to take the programs from.
        shard_options: Options of the shard.
        preset: What `pals shard` would be started with.
        json: Print one JSON document on standard output.

    Raises:
        InvalidConfig: Options exclude each other.
    """
    if export is not None and import_ is not None:
        raise InvalidConfig(
            source="--import", problem="nothing is compiled", advice="leave out `--export`"
        )
    if shard_options.memory is not None:
        raise InvalidConfig(
            source="--memory", problem="the layers are named", advice="leave it out"
        )
    config.limit_compute_threads(shard_options.threads)
    layer_range = LayerRange.parse(layers)
    spec = shard_options.spec_within(config.load_settings(preset).shard)
    if import_ is not None:
        _import(import_, model, layer_range, spec, json=json)
    else:
        _compile(model, layer_range, spec, export, json=json)


def _compile(
    model: str, layers: LayerRange, spec: ShardSpec, export: Path | None, *, json: bool
) -> None:
    # jax is imported here, once the command line is known to be right.
    from pals.cli.progress import Lines, count_progress
    from pals.engine.warming import warmup as warm_up
    from pals.net.serving import Report, read_shard

    report = Report(on_progress=console.note, on_download=Lines(model, clock=time.monotonic))
    _, shard = read_shard(model, layers, spec, report=report)
    with count_progress("compiling", len(shard.programs) + 1) as on_done:
        done = warm_up(shard, export_to=export, on_program=lambda _: on_done())
    if json:
        console.json(_document(model, shard.layers, shard.spec, done, export))
    else:
        _print(shard.spec, done, export)


def _import(file: Path, model: str, layers: LayerRange, spec: ShardSpec, *, json: bool) -> None:
    from pals.engine.warming import import_programs
    from pals.models.lookup import load_config
    from pals.net.serving import limits_within

    model_config = load_config(model)
    spec = replace(spec, limits=limits_within(spec.limits, model_config))
    imported = import_programs(file, model_config, layers, spec)
    if json:
        console.json(
            {
                "schema": 1,
                "model": model,
                "layers": str(layers),
                "programs": list(imported.programs),
                "added": imported.added,
                "kv_bytes": imported.kv_bytes,
            }
        )
    else:
        _print_import(imported, spec)


# --- for people ----------------------------------------------------------------------


def _print(spec: ShardSpec, done: Warmup, export: Path | None) -> None:
    rows = [
        (p.name, f"{p.seconds:.2f}", f"{p.run_s * 1000:.1f}", format_bytes(p.workspace_bytes))
        for p in done.programs
    ]
    console.table(("program", "seconds", "first run ms", "workspace"), rows)
    console.out(
        f"{len(done.programs)} programs in {done.seconds:.1f} s: {done.compiled} parts compiled, "
        f"{done.from_cache} from the cache"
    )
    if export is not None:
        console.out(f"written to {export}, for a KV cache of {spec.limits.kv_bytes} bytes")


def _print_import(imported: Imported, spec: ShardSpec) -> None:
    console.out(f"{len(imported.programs)} programs are in the cache, {imported.added} of them new")
    if spec.limits.kv_bytes is None:
        console.note(f"they fit a KV cache of {imported.kv_bytes} bytes: `--kv-memory`")


# --- for programs --------------------------------------------------------------------


def _document(
    model: str, layers: LayerRange, spec: ShardSpec, done: Warmup, export: Path | None
) -> dict[str, object]:
    return {
        "schema": 1,
        "model": model,
        "layers": str(layers),
        "dtype": spec.dtype,
        "devices": spec.devices,
        "kv_bytes": spec.limits.kv_bytes,
        "programs": [
            {
                "name": program.name,
                "seconds": program.seconds,
                "first_run_s": program.run_s,
                "workspace_bytes": program.workspace_bytes,
            }
            for program in done.programs
        ],
        "seconds": done.seconds,
        "compiled": done.compiled,
        "from_cache": done.from_cache,
        "file": None if export is None else str(export),
    }
