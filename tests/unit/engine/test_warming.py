"""Warm-up ahead of time, and programs that go from one machine's cache to another's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pals.config import CACHE_DIR_VARIABLE
from pals.engine import import_programs, warmup
from pals.engine.compile_cache import programs_folder, use_compilation_cache
from pals.engine.program_file import open_program_file
from pals.engine.steps import CompiledProgram
from pals.engine.warming import OnProgram
from pals.errors import ProgramsDamaged, ProgramsDoNotFit, ProgramsNotWritten
from pals.models.config import ModelConfig
from pals.types import EngineLimits, LayerRange, ShardSpec
from tests.unit.models.tiny_configs import tiny_config

LLAMA = tiny_config("llama")
LAYERS = LayerRange(0, 2)
SPEC = ShardSpec(dtype="f32", limits=EngineLimits(kv_bytes=1 << 20))


@dataclass(kw_only=True)
class FakeShard:
    """A shard whose programs add numbers.

    Attributes:
        fails_at: The program before which the user presses Ctrl-C.
    """

    config: ModelConfig = LLAMA
    layers: LayerRange = LAYERS
    spec: ShardSpec = SPEC
    sizes: list[int] = field(default_factory=lambda: [2, 8])
    fails_at: int | None = None

    def warmup(self, on_program: OnProgram) -> list[CompiledProgram]:
        programs = []
        for size in self.sizes:
            if size == self.fails_at:
                raise KeyboardInterrupt
            jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
            program = CompiledProgram(
                name=f"decode_{size}", program=None, seconds=0.5, run_s=0.1, workspace_bytes=0
            )
            on_program(program)
            programs.append(program)
        return programs


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin with an empty cache of programs, and end with that of the other tests."""
    with monkeypatch.context() as patched:
        patched.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "here"))
        yield
    use_compilation_cache(programs_folder())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "programs.pals"


def cached() -> set[str]:
    return {path.name for path in programs_folder().glob("*")}


def on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "there"))


def refused(file: Path, spec: ShardSpec = SPEC, layers: LayerRange = LAYERS) -> str:
    with pytest.raises(ProgramsDoNotFit) as caught:
        import_programs(file, LLAMA, layers, spec)
    return str(caught.value.fields["differences"])


# --- warm-up -------------------------------------------------------------------------


def test_the_second_warmup_compiles_nothing():
    told: list[CompiledProgram] = []

    first, second = warmup(FakeShard()), warmup(FakeShard(), on_program=told.append)

    assert (first.compiled, first.from_cache) == (2, 0)
    assert (second.compiled, second.from_cache) == (0, 2)
    assert tuple(told) == second.programs


def test_a_warmup_that_is_broken_off_goes_on_where_it_ended():
    with pytest.raises(KeyboardInterrupt):
        warmup(FakeShard(fails_at=8))
    assert len(cached()) == 1

    again = warmup(FakeShard())

    assert (again.compiled, again.from_cache) == (1, 1)


# --- export --------------------------------------------------------------------------


def test_an_export_holds_the_programs_of_the_shard_and_no_others(file: Path):
    warmup(FakeShard(sizes=[3, 4, 5]))

    warmup(FakeShard(), export_to=file)

    with open_program_file(file) as programs:
        assert programs.manifest.programs == ("decode_2", "decode_8")
        assert len(programs.manifest.entries) == 2


def test_an_export_is_the_same_whether_or_not_it_came_from_the_cache(file: Path, tmp_path: Path):
    warmup(FakeShard(), export_to=file)
    warmup(FakeShard(), export_to=tmp_path / "again")

    assert file.read_bytes() == (tmp_path / "again").read_bytes()


def test_an_export_that_cannot_be_written_says_where(tmp_path: Path):
    with pytest.raises(ProgramsNotWritten) as caught:
        warmup(FakeShard(), export_to=tmp_path / "no" / "folder")

    assert caught.value.fields["path"] == tmp_path / "no" / "folder"


# --- import --------------------------------------------------------------------------


def test_what_was_imported_is_not_compiled(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    warmup(FakeShard(), export_to=file)
    on_another_machine(tmp_path, monkeypatch)

    imported = import_programs(file, LLAMA, LAYERS, SPEC)

    assert (imported.programs, imported.added) == (("decode_2", "decode_8"), 2)
    assert warmup(FakeShard()).compiled == 0


def test_what_is_there_already_is_not_added(file: Path):
    warmup(FakeShard(), export_to=file)

    assert import_programs(file, LLAMA, LAYERS, SPEC).added == 0


def test_an_open_size_of_the_cache_takes_that_of_the_file(file: Path):
    warmup(FakeShard(), export_to=file)

    imported = import_programs(file, LLAMA, LAYERS, replace(SPEC, limits=EngineLimits()))

    assert imported.kv_bytes == 1 << 20


def test_programs_of_another_shard_are_refused_with_what_differs(file: Path):
    warmup(FakeShard(), export_to=file)

    assert refused(file, replace(SPEC, dtype="bf16"), LayerRange(1, 2)) == (
        "layers: `0:2` there, `1:2` here; dtype: `f32` there, `bf16` here"
    )


def test_programs_for_another_number_of_devices_are_refused(file: Path):
    warmup(FakeShard(), export_to=file)

    assert refused(file, replace(SPEC, devices=2)) == ("devices of the shard: `1` there, `2` here")


def test_programs_of_another_machine_are_refused_with_what_differs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    warmup(FakeShard(), export_to=file)
    on_another_machine(tmp_path, monkeypatch)
    monkeypatch.setattr("pals.engine.kinds.version", lambda _: "9.9.9")

    assert refused(file).endswith("there, `9.9.9` here")
    assert cached() == set()


def test_a_damaged_file_leaves_nothing_in_the_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    warmup(FakeShard(), export_to=file)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    on_another_machine(tmp_path, monkeypatch)

    with pytest.raises(ProgramsDamaged):
        import_programs(file, LLAMA, LAYERS, SPEC)

    assert cached() == set()
