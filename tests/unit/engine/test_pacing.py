from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.engine.buckets import Program
from pals.engine.pacing import ChunkOption, PrefillPace, StepCosts

DECODE = Program(8, 1, 0, 64)


def test_cost_is_the_measured_one_and_follows_slowly() -> None:
    costs = StepCosts({DECODE: 0.1})
    costs.note(DECODE, 0.5)
    assert costs.seconds(DECODE) == pytest.approx(0.15)


def test_unmeasured_programs_cost_more_the_more_tokens_they_have() -> None:
    costs = StepCosts()
    assert costs.seconds(Program(8, 1, 64, 64)) > costs.seconds(DECODE) > 0
    costs.note(DECODE, 3.0)
    assert costs.seconds(DECODE) == 3.0


def test_first_chunk_begins_at_once_and_the_next_is_saved_for() -> None:
    pace = PrefillPace(0.25)
    options = [ChunkOption(16, 0.1)]
    pace.fill(0.0)
    assert pace.choose(options, 0.1, 0.1, in_gap=True) == options[0]
    pace.note_step(0.1, 0.0)

    pace.fill(0.5)
    assert pace.choose(options, 0.1, 0.1, in_gap=True) is None
    assert pace.pays_at(0.1) == pytest.approx(0.9)

    pace.fill(0.9)
    assert pace.choose(options, 0.1, 0.1, in_gap=True) == options[0]


def test_time_between_rows_counts_twice_where_nobody_waits_for_chunks_in_it() -> None:
    pace = PrefillPace(0.25)
    options = [ChunkOption(16, 0.1)]
    pace.fill(0.0)
    assert pace.choose(options, 0.1, 0.1, in_gap=True) == options[0]
    pace.note_step(0.1, 0.0)

    pace.fill(0.3, is_unnoticed=True)
    assert pace.choose(options, 0.1, 0.1, in_gap=True) is None
    assert pace.pays_at(0.1) == pytest.approx(0.5)
    pace.fill(0.5, is_unnoticed=True)
    assert pace.choose(options, 0.1, 0.1, in_gap=True) == options[0]


def test_steps_of_those_who_decode_pay_for_prompts_and_other_steps_do_not() -> None:
    pace = PrefillPace(0.25)
    options = [ChunkOption(16, 0.1)]
    pace.fill(0.0)
    assert pace.choose(options, 0.1, 0.1, in_gap=True) == options[0]

    pace.note_step(0.9, 0.3)
    pace.fill(0.9)
    assert pace.choose(options, 0.1, 0.1, in_gap=True) == options[0]
    assert pace.choose(options, 0.1, 0.1, in_gap=True) is None


def test_chunk_is_as_long_as_its_share_of_a_step() -> None:
    pace = PrefillPace(0.25)
    options = [ChunkOption(n, 0.001 * n) for n in (16, 32, 64, 512)]
    pace.fill(0.0)
    chosen = pace.choose(options, 0.016, 0.1, in_gap=True)
    assert chosen is not None
    assert chosen.tokens == 32


def test_every_short_prompt_that_waits_has_a_share_of_its_own() -> None:
    pace = PrefillPace(0.25)
    options = [ChunkOption(16, 0.1)]
    pace.fill(0.0, 3)
    assert pace.choose(options, 0.1, 0.1, in_gap=False) == options[0]

    pace.note_step(0.1, 0.1)  # three prompts have three thirds of what decoding takes
    pace.fill(0.1, 3)
    assert pace.choose(options, 0.1, 0.1, in_gap=False) == options[0]
    assert pace.choose(options, 0.1, 0.1, in_gap=False) is None
    assert pace.pays_at(0.1) == pytest.approx(0.1 + 0.1 / 0.375)

    pace.fill(0.1, 100)  # a second brings no more than a second
    assert pace.pays_at(0.1) == pytest.approx(0.2)


def test_chunk_waits_for_a_gap_between_rows_until_the_purse_is_full() -> None:
    pace = PrefillPace(0.25)
    beside = [ChunkOption(16, 0.05), ChunkOption(64, 0.2)]
    pace.fill(0.0)
    assert pace.choose(beside, 0.1, 0.1, in_gap=False) == beside[0]

    pace.note_step(0.12, 0.12)
    pace.fill(0.12)
    assert pace.choose(beside, 0.1, 0.1, in_gap=False) is None
    pace.note_step(0.06, 0.06)
    pace.fill(0.18)
    assert pace.choose(beside, 0.1, 0.1, in_gap=False) == beside[0]


def test_refunded_chunk_can_be_taken_again() -> None:
    pace = PrefillPace(0.25)
    option = ChunkOption(16, 0.1)
    pace.fill(0.0)
    assert pace.choose([option], 0.1, 0.1, in_gap=False) == option
    pace.refund(0.1)
    assert pace.choose([option], 0.1, 0.1, in_gap=False) == option


def test_after_a_rest_the_first_chunk_begins_at_once_again() -> None:
    pace = PrefillPace(0.25)
    option = ChunkOption(16, 0.1)
    pace.fill(0.0)
    pace.choose([option], 0.1, 0.1, in_gap=False)
    pace.rest()
    assert pace.choose([option], 0.1, 0.1, in_gap=False) == option


@given(
    st.floats(0.05, 0.9),
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5),
    st.floats(0.01, 1.0),
    st.floats(0.001, 1.0),
)
def test_prompts_get_their_share_of_the_time_in_the_long_run(
    share: float, costs: list[float], step_s: float, usual_s: float
) -> None:
    """Steps follow one another; each takes the best chunk that is paid for."""
    pace = PrefillPace(share)
    options = [ChunkOption(n + 1, cost) for n, cost in enumerate(sorted(costs))]
    now = spent = 0.0
    for _ in range(300):
        pace.fill(now)
        chosen = pace.choose(options, usual_s, step_s, in_gap=False)
        cost_s = chosen.cost_s if chosen is not None else 0.0
        spent += cost_s
        now += step_s + cost_s
        pace.note_step(step_s + cost_s, step_s)

    slack = max(step_s, usual_s, *costs)
    assert spent <= share * now + 2 * slack
    # No less than what the steps allow: a whole number of chunks of the sizes that there are.
    smallest = min(costs)
    assert spent >= min(share * now, 300 * smallest) * 0.4 - 2 * slack
