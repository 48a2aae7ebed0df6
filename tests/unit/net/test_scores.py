from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidFrame
from pals.net.scores import Score, pack_scores, unpack_scores
from pals.net.wire import SCORED_WIDTH, TOP_LOGPROBS
from pals.types import PeerId

PEER = PeerId("tail")
IDS = st.integers(0, 2**31 - 1)
LOGPROBS = st.floats(-1e4, 0.0, width=32)
SCORES = st.builds(
    Score,
    IDS,
    LOGPROBS,
    st.lists(st.tuples(IDS, LOGPROBS), max_size=TOP_LOGPROBS).map(tuple),
)


def pack(scores: list[Score], width: int = TOP_LOGPROBS) -> bytes:
    top_ids = np.full((len(scores), width), -1, np.int32)
    top_logprobs = np.zeros((len(scores), width), np.float32)
    for place, score in enumerate(scores):
        for rank, (token, logprob) in enumerate(score.top):
            top_ids[place, rank], top_logprobs[place, rank] = token, logprob
    ids = np.array([score.token for score in scores], np.int32)
    logprobs = np.array([score.logprob for score in scores], np.float32)
    return pack_scores(ids, logprobs, top_ids, top_logprobs).tobytes()


@given(st.lists(SCORES, min_size=1, max_size=5))
def test_scores_survive_the_wire(scores: list[Score]) -> None:
    payload = pack(scores)
    assert len(payload) == 4 * SCORED_WIDTH * len(scores)
    assert unpack_scores(PEER, payload) == scores


def test_fewer_alternatives_than_there_is_room_for_are_all_that_is_read() -> None:
    score = Score(7, -0.5, ((7, -0.5), (8, -1.5)))
    assert unpack_scores(PEER, pack([score], width=2)) == [score]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("is_top", [False, True])
def test_a_log_probability_that_is_no_number_is_refused(wrong: float, is_top: bool) -> None:
    score = Score(7, -1.0 if is_top else wrong, ((8, wrong if is_top else -2.0),))
    with pytest.raises(InvalidFrame) as caught:
        unpack_scores(PEER, pack([score]))
    assert caught.value.fields["peer"] == PEER
