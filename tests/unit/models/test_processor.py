from __future__ import annotations

import pytest

from pals.models import processor
from pals.models.processor import has_bf16_tiles, read_flags

TWO_CORES = """\
processor\t: 0
model name\t: flags of nothing
flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile

processor\t: 1
flags\t\t: fpu
"""


def test_flags_are_those_of_the_first_core() -> None:
    assert read_flags(TWO_CORES) == {"fpu", "avx512_bf16", "amx_bf16", "amx_tile"}


@pytest.mark.parametrize("text", ["", "processor: 0\n", "Features : fp asimd bf16\n"])
def test_other_processors_have_no_flags(text: str) -> None:
    assert read_flags(text) == frozenset()


@pytest.mark.parametrize(("text", "has_tiles"), [(TWO_CORES, True), ("flags: fpu", False)])
def test_tiles_are_there_where_linux_says_so(tmp_path, monkeypatch, text: str, has_tiles) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(processor, "CPU_INFO", path)

    assert has_bf16_tiles.__wrapped__() is has_tiles


def test_no_tiles_where_nothing_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "absent")

    assert not has_bf16_tiles.__wrapped__()
