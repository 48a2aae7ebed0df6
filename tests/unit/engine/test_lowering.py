from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from pals.engine import compile_cache, lowering
from pals.engine.compile_cache import compiling_in_stage, use_compilation_cache
from pals.engine.lowering import Lowerings
from pals.models.paged import Tables

TABLES = Tables(jnp.arange(2), jnp.arange(2), jnp.zeros((2, 3), jnp.int32))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return the folder that programs are kept in meanwhile."""
    before = compile_cache._folder_in_use()
    use_compilation_cache(tmp_path / "programs")
    yield tmp_path / "programs"
    if before is not None:
        use_compilation_cache(before)
    else:
        jax.config.update("jax_compilation_cache_dir", None)


class Traced:
    """A function that counts how often it is traced."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: jax.Array, tables: Tables) -> tuple[jax.Array, Tables]:
        self.count += 1
        return x * 2 + 1, tables._replace(starts=tables.starts + 1)

    def run(self, x: jax.Array, *depends_on: object, name: str = "layer 0") -> Any:
        # another function each time: jax keeps in memory what it traced of the same one
        function = lambda x, tables: self(x, tables)  # noqa: E731
        lowered = Lowerings(*depends_on).lower(function, (x, TABLES), name=name, donated=(0,))
        return lowered.compile()(x + 0, TABLES)


def entries(folder: Path) -> list[Path]:
    return sorted((folder / lowering.FOLDER).iterdir())


def test_what_was_traced_once_is_not_traced_again_and_gives_the_same(folder: Path) -> None:
    traced = Traced()
    x = jnp.arange(4.0)

    first, first_tables = traced.run(x)
    again, tables = traced.run(x)

    assert traced.count == 1
    assert len(entries(folder)) == 1
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(again, x * 2 + 1)
    assert isinstance(tables, Tables)
    np.testing.assert_array_equal(tables.starts, first_tables.starts)


def test_its_results_are_known_by_name_and_what_is_given_away_is_used(folder: Path) -> None:
    x = jax.ShapeDtypeStruct((4,), jnp.float32)

    for _ in range(2):
        lowered = Lowerings().lower(Traced(), (x, TABLES), name="layer 0", donated=(0,))
        output, tables = lowered.out_info
        assert (output.shape, type(tables)) == ((4,), Tables)
        assert "tf.aliasing_output" in lowered.as_text()
        assert "@jit_layer" in lowered.as_text()


def test_other_shapes_names_settings_and_code_are_other_entries(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = Traced()
    traced.run(jnp.arange(4.0))

    traced.run(jnp.arange(5.0))
    traced.run(jnp.arange(4))
    traced.run(jnp.arange(4.0), "bf16")
    traced.run(jnp.arange(4.0), name="layer 1")
    monkeypatch.setattr(lowering, "code_digest", lambda: "other code")
    traced.run(jnp.arange(4.0))

    assert traced.count == len(entries(folder)) == 6


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_damaged_entry_is_made_anew(folder: Path, damage: bytes | None) -> None:
    traced = Traced()
    traced.run(jnp.arange(4.0))
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] if damage is None else damage)

    output, _ = traced.run(jnp.arange(4.0))

    assert traced.count == 2
    np.testing.assert_array_equal(output, jnp.arange(4.0) * 2 + 1)
    assert entries(folder) == [entry]
    traced.run(jnp.arange(4.0))
    assert traced.count == 2


def test_an_entry_that_cannot_be_written_costs_nothing_but_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> tuple[int, str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lowering.tempfile, "mkstemp", full)
    traced = Traced()

    traced.run(jnp.arange(4.0))

    assert entries(folder) == []


def test_a_stage_traces_into_the_cache_that_it_is_of(folder: Path) -> None:
    traced = Traced()
    with compiling_in_stage(folder):
        traced.run(jnp.arange(4.0))

    traced.run(jnp.arange(4.0))

    assert traced.count == 1


def test_nothing_is_written_where_no_programs_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "folder_in_use", lambda: None)
    traced = Traced()
    traced.run(jnp.arange(4.0))
    traced.run(jnp.arange(4.0))

    assert traced.count == 2
    assert not (folder / lowering.FOLDER).exists()


def test_what_calls_back_into_this_process_is_traced_each_time(folder: Path) -> None:
    seen: list[float] = []

    def watched(x: jax.Array) -> jax.Array:
        io_callback(lambda value: seen.append(float(value)), None, x)
        return x + 1

    for _ in range(2):
        lowered = Lowerings(are_kept=False).lower(watched, (jnp.float32(1),), name="layer 0")
        lowered.compile()(jnp.float32(1)).block_until_ready()
    jax.effects_barrier()

    assert seen == [1, 1]
    assert not (folder / lowering.FOLDER).exists()


def test_options_of_jax_make_other_entries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Traced()
    traced.run(jnp.arange(4.0))
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    traced.run(jnp.arange(4.0))

    assert traced.count == 2


def test_every_file_that_steps_are_traced_from_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("engine", "models/families"):
        (tmp_path / part).mkdir(parents=True)
    monkeypatch.setattr(lowering, "_CODE", tmp_path)
    digests: set[str] = set()
    for path, text in (("engine/a.py", "1"), ("models/families/b.py", "1"), ("engine/a.py", "2")):
        (tmp_path / path).write_text(text)
        digests.add(lowering.code_digest.__wrapped__())

    assert len(digests) == 3
