"""Files of compiled programs: what is written is read, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pals.engine.program_file import (
    MAGIC,
    MAX_FILE_BYTES,
    Manifest,
    open_program_file,
    write_program_file,
)
from pals.errors import ProgramsDamaged, ProgramsNotWritten

MADE_FOR = {"jaxlib": "0.10.2", "layers": "0:2"}
PROGRAMS = ("decode_2x1_p2", "chunk_c64_p2")
HEAD_BYTES = 52


def entry(folder: Path, number: int, content: bytes) -> Path:
    path = folder / f"jit_step-{number:064x}-cache"
    path.write_bytes(content)
    return path


@pytest.fixture
def entries(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "cache"
    folder.mkdir()
    return [entry(folder, 1, b"first" * 300_000), entry(folder, 0, b"second")]


@pytest.fixture
def written(tmp_path: Path, entries: list[Path]) -> Path:
    path = tmp_path / "programs.pals"
    write_program_file(path, MADE_FOR, PROGRAMS, entries)
    return path


def extract(path: Path, folder: Path) -> tuple[Manifest, list[Path]]:
    folder.mkdir(exist_ok=True)
    with open_program_file(path) as programs:
        return programs.manifest, programs.extract(folder)


def refused(path: Path, folder: Path) -> str:
    with pytest.raises(ProgramsDamaged) as caught:
        extract(path, folder)
    assert caught.value.fields["file"] == path
    return str(caught.value.fields["problem"])


def with_manifest(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a file with another list of programs, whose digest is right."""
    data = path.read_bytes()
    _, length, _ = struct.unpack(">16sI32s", data[:HEAD_BYTES])
    manifest = json.loads(data[HEAD_BYTES : HEAD_BYTES + length])
    change(manifest)
    encoded = json.dumps(manifest).encode()
    head = struct.pack(">16sI32s", MAGIC, len(encoded), hashlib.sha256(encoded).digest())
    path.write_bytes(head + encoded + data[HEAD_BYTES + length :])


# --- whole files ---------------------------------------------------------------------


def test_what_was_written_is_read_back(written: Path, entries: list[Path], tmp_path: Path):
    manifest, paths = extract(written, tmp_path / "out")

    assert (manifest.made_for, manifest.programs) == (MADE_FOR, PROGRAMS)
    assert {p.name: p.read_bytes() for p in paths} == {p.name: p.read_bytes() for p in entries}


def test_the_same_programs_make_the_same_file(written: Path, entries: list[Path], tmp_path: Path):
    write_program_file(tmp_path / "again", MADE_FOR, PROGRAMS, entries[::-1])

    assert (tmp_path / "again").read_bytes() == written.read_bytes()


def test_file_and_entries_are_for_this_user_alone(written: Path, tmp_path: Path):
    _, paths = extract(written, tmp_path / "out")

    assert {stat.S_IMODE(p.stat().st_mode) for p in [written, *paths]} == {0o600}


def test_a_failed_write_leaves_the_file_that_was_there(
    written: Path, entries: list[Path], tmp_path: Path
):
    before, around = written.read_bytes(), sorted(tmp_path.iterdir())

    with pytest.raises(ProgramsNotWritten) as caught:
        write_program_file(written, MADE_FOR, PROGRAMS, [*entries, tmp_path / "gone"])

    assert caught.value.fields["path"] == written
    assert (written.read_bytes(), sorted(tmp_path.iterdir())) == (before, around)


# --- damaged ones --------------------------------------------------------------------


def test_a_file_that_ends_early_is_refused_wherever_it_ends(written: Path, tmp_path: Path):
    data = written.read_bytes()
    lengths = [*range(0, 600, 7), len(data) - 1]

    for length in lengths:
        written.write_bytes(data[:length])
        assert refused(written, tmp_path / "out")


def test_a_changed_byte_is_found_wherever_it_is(written: Path, tmp_path: Path):
    data = written.read_bytes()
    places = [*range(0, 600, 7), len(data) // 2, len(data) - 1]

    for number, place in enumerate(places):
        changed = bytearray(data)
        changed[place] ^= 0x40
        written.write_bytes(changed)
        assert refused(written, tmp_path / f"out-{number}")


def test_bytes_behind_the_last_entry_are_refused(written: Path, tmp_path: Path):
    with written.open("ab") as file:
        file.write(b"x")

    assert "bytes of programs are there" in refused(written, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "../" + "0" * 64 + "-cache",
        "/tmp/jit_step-" + "0" * 64 + "-cache",
        "jit_step-" + "0" * 64,
        "jit_step-" + "0" * 64 + "-cache\n",
        "jit/../step-" + "0" * 64 + "-cache",
        ".-" + "0" * 64 + "-cache",
        "",
    ],
)
def test_an_entry_with_a_name_that_is_none_of_the_caches_is_refused(
    written: Path, tmp_path: Path, name: str
):
    def rename(manifest: dict) -> None:
        manifest["entries"][0]["name"] = name

    with_manifest(written, rename)

    assert refused(written, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_entry_that_stands_twice_is_refused(written: Path, tmp_path: Path):
    with_manifest(written, lambda m: m["entries"].append(m["entries"][-1]))

    assert "not in order" in refused(written, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(entries=[]),
        lambda m: m.update(entries=m["entries"] * 200),
        lambda m: m["entries"][0].update(size_bytes=-1),
        lambda m: m["entries"][0].update(size_bytes=1 << 40),
        lambda m: m["entries"][0].update(sha256="0" * 63),
        lambda m: m["entries"][0].update(mode=0o777),
        lambda m: m.update(programs=["p" * 1000]),
        lambda m: m.update(made_for={"jaxlib": 1}),
        lambda m: m.pop("made_for"),
    ],
)
def test_a_list_that_is_none_is_refused(
    written: Path, tmp_path: Path, change: Callable[[dict], None]
):
    with_manifest(written, change)

    assert refused(written, tmp_path / "out")


def test_a_list_that_claims_gigabytes_is_not_read(written: Path, tmp_path: Path):
    data = bytearray(written.read_bytes())
    data[16:20] = b"\xff" * 4
    written.write_bytes(data)

    assert "list of programs is damaged" in refused(written, tmp_path / "out")


def test_a_file_that_is_too_large_is_not_read(written: Path, tmp_path: Path):
    with written.open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse

    assert str(MAX_FILE_BYTES) in refused(written, tmp_path / "out")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str):
    path = tmp_path if kind == "folder" else tmp_path / "missing"

    assert refused(path, tmp_path / "out") == "there is no such file"
