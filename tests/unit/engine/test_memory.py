from __future__ import annotations

from pathlib import Path

import pytest

from pals.engine.memory import Memory, find_memory, format_bytes, free_host_bytes

GIB = 1 << 30


def make_root(folder: Path, **group: str) -> Path:
    """Return a root with 8 GiB available, and the files of a control group."""
    (folder / "proc").mkdir()
    (folder / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8388608 kB\n")
    (folder / "sys/fs/cgroup").mkdir(parents=True)
    for name, content in group.items():
        (folder / f"sys/fs/cgroup/memory.{name}").write_text(content)
    return folder


def test_free_memory_is_what_the_system_says(tmp_path: Path):
    assert free_host_bytes(make_root(tmp_path)) == 8 * GIB


@pytest.mark.parametrize(("limit", "free"), [("max", 8), (str(6 * GIB), 5), (str(99 * GIB), 8)])
def test_a_container_has_no_more_than_its_limit_leaves(tmp_path: Path, limit: str, free: int):
    stat = f"anon 1\ninactive_file {GIB}\n"
    root = make_root(tmp_path, max=f"{limit}\n", current=f"{2 * GIB}\n", stat=stat)

    assert free_host_bytes(root) == free * GIB


def test_all_memory_counts_where_the_system_does_not_say(tmp_path: Path):
    assert free_host_bytes(tmp_path) > 0


def test_the_memory_of_a_machine_without_accelerator_is_the_hosts():
    found = find_memory()

    assert found.size_bytes > 0
    assert str(found).endswith(" of free memory")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (24 * GIB, "24 GiB"),
        (12345678901, "11.5 GiB"),
        (811_706_777_600, "756 GiB"),
        (5000 << 40, "5e+03 TiB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str):
    assert format_bytes(size) == text
    assert str(Memory(size_bytes=size)) == text
