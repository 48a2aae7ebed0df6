"""`pals warmup`: which options it takes, and what it prints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pals.cli.app import run
from pals.engine.steps import CompiledProgram
from pals.engine.warming import Imported, OnProgram, Warmup
from pals.errors import ProgramsDamaged
from pals.models.config import ModelConfig
from pals.types import LayerRange, ShardSpec
from tests.unit.models.published import PUBLISHED

PROGRAMS = (
    CompiledProgram(
        name="decode_2x1", program=None, seconds=1.25, run_s=0.004, workspace_bytes=2 << 20
    ),
    CompiledProgram(
        name="chunk_c64", program=None, seconds=0.5, run_s=0.02, workspace_bytes=3 << 20
    ),
)


@dataclass(frozen=True, kw_only=True)
class FakeShard:
    layers: LayerRange
    spec: ShardSpec
    programs: tuple[str, ...] = ("decode_2x1", "chunk_c64")


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Load and compile nothing, and note the files that programs were exported to."""
    exported: list[Path | None] = []

    def read_shard(_: str, layers: LayerRange, spec: ShardSpec, **_report: object):
        return None, FakeShard(layers=layers, spec=spec)

    def warmup(_: FakeShard, *, export_to: Path | None, on_program: OnProgram) -> Warmup:
        exported.append(export_to)
        for program in PROGRAMS:
            on_program(program)
        return Warmup(programs=PROGRAMS, compiled=1, from_cache=1, seconds=1.8)

    monkeypatch.setattr("pals.net.serving.read_shard", read_shard)
    monkeypatch.setattr("pals.engine.warming.warmup", warmup)
    return exported


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ModelConfig, LayerRange, ShardSpec]]:
    """Import every file, and note for what."""
    asked: list[tuple[ModelConfig, LayerRange, ShardSpec]] = []

    def import_programs(file: Path, config: ModelConfig, layers: LayerRange, spec: ShardSpec):
        if file.name == "damaged":
            raise ProgramsDamaged(file=file, problem="it ends after 3 bytes")
        asked.append((config, layers, spec))
        return Imported(programs=("decode_2x1", "chunk_c64"), added=2, kv_bytes=4096)

    monkeypatch.setattr("pals.engine.warming.import_programs", import_programs)
    return asked


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.1-70B"].config))
    return str(tmp_path)


# --- compiling -----------------------------------------------------------------------


def test_the_table_has_each_program_and_its_seconds(
    warmed: list[Path | None], capsys: pytest.CaptureFixture[str]
):
    assert run(["warmup", "org/model", "--layers", "0:2"]) == 0

    assert capsys.readouterr().out.splitlines() == [
        "PROGRAM     SECONDS  FIRST RUN MS  WORKSPACE",
        "decode_2x1  1.25     4.0           2 MiB",
        "chunk_c64   0.50     20.0          3 MiB",
        "2 programs in 1.8 s: 1 parts compiled, 1 from the cache",
    ]
    assert warmed == [None]


def test_the_document_has_what_the_table_has(
    warmed: list[Path | None], capsys: pytest.CaptureFixture[str]
):
    options = ["--dtype", "f32", "--export", "programs.pals", "--json"]
    assert run(["warmup", "org/model", "--layers", "0:2", *options]) == 0

    document = json.loads(capsys.readouterr().out)
    assert (document["layers"], document["dtype"]) == ("0:2", "f32")
    assert [p["name"] for p in document["programs"]] == ["decode_2x1", "chunk_c64"]
    assert (document["compiled"], document["from_cache"]) == (1, 1)
    assert document["file"] == "programs.pals"
    assert warmed == [Path("programs.pals")]


# --- importing -----------------------------------------------------------------------


def test_an_import_needs_the_config_only(
    imported: list[tuple[ModelConfig, LayerRange, ShardSpec]],
    model: str,
    capsys: pytest.CaptureFixture[str],
):
    options = ["--import", "programs.pals", "--dtype", "int8"]
    assert run(["warmup", model, "--layers", "0:2", *options]) == 0

    ((config, layers, spec),) = imported
    assert (config.num_layers, str(layers), spec.dtype) == (80, "0:2", "int8")
    captured = capsys.readouterr()
    assert captured.out == "2 programs are in the cache, 2 of them new\n"
    assert "`--kv-memory`" in captured.err


def test_a_file_that_is_refused_ends_the_command(
    imported: list[tuple[ModelConfig, LayerRange, ShardSpec]],
    model: str,
    capsys: pytest.CaptureFixture[str],
):
    assert run(["warmup", model, "--layers", "0:2", "--import", "damaged"]) == 2

    assert "it ends after 3 bytes" in capsys.readouterr().err
    assert imported == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--layers", "0:2", "--export", "a", "--import", "b"], "leave out `--export`"),
        (["--layers", "0:2", "--memory", "1GiB"], "--memory"),
        (["--layers", "2:0"], "not a layer range"),
        ([], "--layers"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
):
    assert run(["warmup", "org/model", *options]) == 2
    assert problem in capsys.readouterr().err
