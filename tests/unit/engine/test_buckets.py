from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.engine.buckets import MAX_PROGRAMS, BatchLimits, Buckets, Program, plan_programs
from pals.errors import InvalidConfig

LIMITS = st.builds(
    BatchLimits,
    max_rows=st.integers(1, 256),
    max_context_tokens=st.integers(1, 1 << 20),
    max_chunk_tokens=st.sampled_from([16, 32, 64, 128, 256, 512]),
    verify_tokens=st.integers(1, 32),
    page_tokens=st.sampled_from([16, 32, 64]),
)


def test_default_limits_need_few_programs() -> None:
    assert len(plan_programs(BatchLimits())) == 16


@settings(max_examples=300)
@given(LIMITS)
def test_any_limits_need_few_programs(limits: BatchLimits) -> None:
    programs = plan_programs(limits)

    assert len(set(programs)) == len(programs) <= MAX_PROGRAMS


@settings(max_examples=300)
@given(LIMITS, st.data())
def test_every_row_and_chunk_that_the_limits_allow_can_run(
    limits: BatchLimits, data: st.DataObject
) -> None:
    buckets = Buckets(limits)
    pages = data.draw(st.integers(1, limits.max_pages))
    chunk = data.draw(st.integers(1, limits.max_chunk_tokens))

    assert buckets.choose(1, 1, 0, pages) is not None
    assert buckets.choose(1, limits.verify_tokens, 0, pages) is not None
    assert buckets.choose(0, 1, chunk, pages) is not None


@settings(max_examples=300)
@given(LIMITS, st.data())
def test_chosen_program_holds_the_batch_and_pads_it_least(
    limits: BatchLimits, data: st.DataObject
) -> None:
    buckets = Buckets(limits)
    rows = data.draw(st.integers(0, limits.max_rows))
    row_tokens = data.draw(st.sampled_from([1, limits.verify_tokens])) if rows else 1
    chunk = data.draw(st.integers(0, limits.max_chunk_tokens))
    pages = data.draw(st.integers(1, limits.max_pages))

    def holds(program: Program) -> bool:
        return (
            program.rows >= rows
            and program.row_tokens >= row_tokens
            and program.chunk_tokens >= chunk
            and program.pages >= pages
            and (program.rows > 0) == (rows > 0)
            and (program.chunk_tokens > 0) == (chunk > 0)
        )

    chosen = buckets.choose(rows, row_tokens, chunk, pages)
    holding = [program for program in buckets.programs if holds(program)]

    assert (chosen is None) == (not holding)
    assert chosen is None or (
        holds(chosen) and chosen.tokens == min(program.tokens for program in holding)
    )


def test_short_batches_of_decode_rows_are_padded_to_at_most_twice_beyond_eight() -> None:
    buckets = Buckets(BatchLimits())
    for rows in range(9, 65):
        program = buckets.choose(rows, 1, 0, 1)
        assert program is not None
        assert program.rows < 2 * rows


def test_programs_have_names_that_say_what_they_hold() -> None:
    assert str(Program(8, 1, 0, 64)) == "decode_8x1_p64"
    assert str(Program(8, 4, 0, 64)) == "verify_8x4_p64"
    assert str(Program(0, 1, 512, 64)) == "chunk_c512_p64"
    assert str(Program(8, 1, 16, 64)) == "mixed_8x1c16_p64"


@pytest.mark.parametrize(
    "limits",
    [
        BatchLimits(max_rows=0),
        BatchLimits(max_rows=257),
        BatchLimits(max_context_tokens=0),
        BatchLimits(max_chunk_tokens=48),
        BatchLimits(max_chunk_tokens=1024),
        BatchLimits(verify_tokens=0),
        BatchLimits(page_tokens=8),
    ],
)
def test_impossible_limits_are_refused(limits: BatchLimits) -> None:
    with pytest.raises(InvalidConfig):
        Buckets(limits)
