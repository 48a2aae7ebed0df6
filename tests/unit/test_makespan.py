from __future__ import annotations

import pytest

from benchmarks.makespan import ideal_makespan_s


def test_one_shard_computes_its_chunks_one_after_another() -> None:
    assert ideal_makespan_s([[1.0, 2.0]], [0, 0], bytes_per_s=0.0) == 3.0


def test_shards_work_on_different_chunks_at_the_same_time() -> None:
    assert ideal_makespan_s([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [0, 0, 0], bytes_per_s=0.0) == 4.0


def test_the_slowest_shard_decides() -> None:
    assert ideal_makespan_s([[1.0, 1.0], [5.0, 5.0], [1.0, 1.0]], [0, 0], bytes_per_s=0.0) == 12.0


def test_a_link_carries_one_chunk_while_the_next_computes() -> None:
    took_s = ideal_makespan_s([[1.0, 1.0], [1.0, 1.0]], [50, 50], bytes_per_s=100.0)
    assert took_s == pytest.approx(3.5)


def test_a_slow_link_decides() -> None:
    took_s = ideal_makespan_s([[1.0, 1.0], [1.0, 1.0]], [300, 300], bytes_per_s=100.0)
    assert took_s == pytest.approx(8.0)


def test_shards_with_different_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ideal_makespan_s([[1.0, 1.0], [1.0]], [0, 0], bytes_per_s=0.0)
