import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.models.part_writer import PartWriter, kept_bytes, partial_path
from pals.models.safetensors import TensorEntry, read_header
from pals.models.store import hash_tensor

SOURCE = bytes(range(256)) * 4


def tensors_at(spans: Sequence[tuple[int, int]]) -> list[TensorEntry]:
    """Return byte tensors that stand at these places of SOURCE."""
    return [
        TensorEntry(
            name=f"t{number}",
            path=Path("source"),
            dtype="U8",
            shape=(stop - start,),
            offset=start,
            size_bytes=stop - start,
        )
        for number, (start, stop) in enumerate(spans)
    ]


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw places that follow each other, some touching, some empty."""
    ends = sorted(draw(st.lists(st.integers(0, len(SOURCE)), min_size=2, max_size=12)))
    return list(zip(ends[::2], ends[1::2], strict=False))


def feed(writer: PartWriter, step: int, most: int) -> None:
    """Write at most ``most`` bytes of what is missing, in blocks of ``step``."""
    data = b"".join(SOURCE[start:stop] for start, stop in writer.missing_ranges())[:most]
    for start in range(0, len(data), step):
        writer.write(data[start : start + step])


@given(places=spans(), step=st.integers(1, 200), first=st.integers(0, 600))
def test_a_part_is_whole_whatever_the_blocks_and_wherever_it_was_interrupted(
    tmp_path_factory: pytest.TempPathFactory,
    places: list[tuple[int, int]],
    step: int,
    first: int,
):
    path = tmp_path_factory.mktemp("store") / "rest.safetensors"
    tensors = tensors_at(places)
    size = sum(stop - start for start, stop in places)
    with PartWriter(path, tensors) as writer:
        feed(writer, step, first)
    assert not path.exists()
    assert kept_bytes(path, tensors) == min(first, size)

    with PartWriter(path, tensors) as writer:
        assert writer.missing_bytes == size - min(first, size)
        feed(writer, step, size)
        writer.finish()

    assert not partial_path(path).exists()
    data = path.read_bytes()
    for entry in read_header(path).values():
        start, stop = places[int(entry.name[1:])]
        assert data[entry.offset : entry.offset + entry.size_bytes] == SOURCE[start:stop]
        assert hash_tensor(entry)


@given(places=spans())
def test_missing_ranges_are_as_few_as_can_be(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
):
    path = tmp_path_factory.mktemp("store") / "rest.safetensors"
    with PartWriter(path, tensors_at(places)) as writer:
        ranges = writer.missing_ranges()
    assert all(start < stop for start, stop in ranges)
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(ranges))
    covered = {byte for start, stop in ranges for byte in range(start, stop)}
    assert covered == {byte for start, stop in places for byte in range(start, stop)}


def test_a_link_in_place_of_the_partial_file_is_not_followed(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = tmp_path / "rest.safetensors"
    partial_path(path).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        PartWriter(path, tensors_at([(0, 4)]))
    assert victim.read_bytes() == b"precious"
