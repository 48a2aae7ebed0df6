"""The cache of compiled programs: whole entries only, and a key that fits any folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pals.engine import compile_cache
from pals.engine.compile_cache import (
    compiling_in_stage,
    open_stage,
    place_all,
    programs_folder,
    use_compilation_cache,
)


@pytest.fixture(autouse=True)
def shared_cache_afterwards() -> Iterator[None]:
    """Leave the process with the cache that other tests use."""
    yield
    use_compilation_cache(programs_folder())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "xla"
    use_compilation_cache(folder)
    return folder


def compile_sum(size: int) -> None:
    """Compile a program of its own for each size."""

    def add(x: jax.Array) -> jax.Array:
        return x + size

    jax.jit(add).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- stages --------------------------------------------------------------------------


def test_what_was_compiled_in_a_stage_comes_into_the_cache(cache: Path):
    with compiling_in_stage(cache) as stage:
        compile_sum(3)
        (compiled,) = stage.entries_compiled()
        assert not any(name.endswith("-cache") for name in names(cache))

    assert names(cache) == {compiled.name}
    assert stat.S_IMODE((cache / compiled.name).stat().st_mode) == 0o600


def test_a_stage_knows_what_it_used_and_what_of_that_was_new(cache: Path):
    for size in (3, 4):
        compile_sum(size)
    before = names(cache)

    with compiling_in_stage(cache) as stage:
        compile_sum(4)
        compile_sum(5)
        used, compiled = stage.entries_used(), stage.entries_compiled()

    assert len(used) == 2
    assert {entry.name for entry in compiled} == names(cache) - before
    assert len(compiled) == 1


def test_what_this_process_has_in_memory_is_used_again(cache: Path):
    add = jax.jit(lambda x: x + 6)
    abstract = jax.ShapeDtypeStruct((6,), jnp.float32)
    add.lower(abstract).compile()

    with compiling_in_stage(cache) as stage:
        add.lower(abstract).compile()
        assert len(stage.entries_used()) == 1
        assert stage.entries_compiled() == []


def test_a_broken_off_stage_keeps_what_is_whole_and_leaves_nothing_else(cache: Path):
    def break_off() -> None:
        with compiling_in_stage(cache) as stage:
            compile_sum(3)
            (stage.folder / f"jit_half-{0:064x}-cache").write_bytes(b"half of an ent")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()

    (kept,) = names(cache)
    assert kept.startswith("jit_add-")


def test_afterwards_the_process_compiles_into_the_cache_again(cache: Path):
    with compiling_in_stage(cache):
        pass

    compile_sum(7)

    (entry,) = names(cache)
    assert entry.startswith("jit_add-")


def test_an_open_stage_stays_in_use(cache: Path):
    with compiling_in_stage(cache) as stage:
        use_compilation_cache(cache)  # as the loading of a shard does
        compile_sum(3)
        assert len(stage.entries_compiled()) == 1


def test_the_stage_of_a_process_that_was_killed_is_removed_and_what_is_whole_kept(cache: Path):
    abandoned = cache / ".stage-abandoned"
    abandoned.mkdir()
    whole, half, read = (abandoned / f"jit_{name}-{0:064x}" for name in ("whole", "half", "read"))
    for entry, note in ((whole, b"12345678"), (half, None), (read, bytes(8))):
        entry.with_name(f"{entry.name}-cache").write_bytes(b"entry")
        if note is not None:
            entry.with_name(f"{entry.name}-atime").write_bytes(note)

    with open_stage(cache) as running, open_stage(cache):
        assert running.is_dir()
        assert names(cache) - {path.name for path in cache.glob(".*")} == {f"{whole.name}-cache"}
        assert not abandoned.exists()


# --- keys ----------------------------------------------------------------------------


def test_an_entry_is_found_in_another_folder(cache: Path, tmp_path: Path):
    compile_sum(3)
    (entry,) = names(cache)

    use_compilation_cache(tmp_path / "elsewhere")
    compile_sum(3)

    assert names(tmp_path / "elsewhere") == {entry}


# --- placing -------------------------------------------------------------------------


@pytest.fixture
def staged(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "stage"
    folder.mkdir()
    paths = [folder / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def test_entries_that_are_there_stay_as_they_are(staged: list[Path], tmp_path: Path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "b").write_bytes(b"before")

    assert place_all(staged, tmp_path / "cache") == 2
    assert (tmp_path / "cache" / "b").read_bytes() == b"before"


def test_a_failure_takes_back_what_was_placed_before_it(
    staged: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "b").write_bytes(b"before")
    link = os.link

    def fail_at_the_last(source: Path, target: Path) -> None:
        if target.name == "c":
            raise OSError("no space left")
        link(source, target)

    monkeypatch.setattr(compile_cache.os, "link", fail_at_the_last)

    with pytest.raises(OSError, match="no space"):
        place_all(staged, tmp_path / "cache")

    assert names(tmp_path / "cache") == {"b"}
