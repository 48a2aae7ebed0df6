"""Compile a shard's programs ahead of time, and put them into a file for other machines.

    python examples/warmup.py [FILE]

The model is the demo's, which needs no network: `make install` brings it.
"""

import sys
from pathlib import Path

from pals.engine import CompiledProgram, Shard, Warmup, import_programs, warmup
from pals.models.gguf import DEMO_MODEL_ID, import_gguf, packaged_demo_model
from pals.models.hub import resolve_model
from pals.types import EngineLimits, LayerRange

LAYERS = LayerRange(0, 3)
LIMITS = EngineLimits(
    max_rows=4,
    max_context_tokens=512,
    max_chunk_tokens=32,
    verify_tokens=1,
    kv_bytes=8 << 20,
)


def load() -> Shard:
    """Return the first layers of the demo's model."""
    file = packaged_demo_model()
    if file is None:
        sys.exit("the demo's model is not installed: run `make install`")
    folder = import_gguf(file, model_id=DEMO_MODEL_ID)
    return Shard.load(
        resolve_model(str(folder.absolute()), LAYERS), LAYERS, dtype="bf16", limits=LIMITS
    )


def show(program: CompiledProgram) -> None:
    """Print what one program took."""
    print(f"{program.name:24} {program.seconds:6.2f} s, a run {program.run_s * 1000:6.1f} ms")


def tell(done: Warmup) -> None:
    """Print what a warm-up did."""
    print(f"{done.compiled} parts compiled, {done.from_cache} from the cache, {done.seconds:.1f} s")


def main(file: Path) -> None:
    """Warm up twice: the second time everything comes from the cache."""
    shard = load()
    tell(warmup(shard, export_to=file, on_program=show))
    tell(warmup(shard))
    imported = import_programs(file, shard.config, shard.layers, shard.spec)
    print(f"{file}: {len(imported.programs)} programs, {imported.added} of their parts new here")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "programs.pals"))
