from __future__ import annotations

import pytest

from pals.models import processor
from pals.models.processor import bf16_products, read_flags

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


@pytest.mark.parametrize(
    ("text", "products"),
    [
        (TWO_CORES, "tiles"),
        ("flags: avx2 avx512_bf16", "vectors"),
        ("flags: avx2 avx512f", "none"),
        ("Features : fp asimd bf16\n", "unknown"),
    ],
)
def test_products_of_bf16_are_those_that_linux_names(
    tmp_path, monkeypatch, text: str, products: str
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(processor, "CPU_INFO", path)

    assert bf16_products.__wrapped__() == products


def test_nothing_is_known_where_nothing_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "absent")

    assert bf16_products.__wrapped__() == "unknown"
