from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidRecord
from pals.swarm.news import (
    MAX_NEWS_BYTES,
    MAX_REMOVAL_BYTES,
    MAX_REMOVALS,
    News,
    decode_news,
    encode_news,
)


def test_the_longest_news_fit_their_limit() -> None:
    news = News(
        seq=1999,
        head=bytes(32),
        epoch=(1 << 31) - 1,
        freshness=bytes(256),
        removals=(bytes(MAX_REMOVAL_BYTES),) * MAX_REMOVALS,
    )
    data = encode_news(news)
    assert len(data) <= MAX_NEWS_BYTES
    assert decode_news(data) == news


@given(
    st.builds(
        News,
        seq=st.integers(0, 1999),
        head=st.binary(min_size=32, max_size=32),
        epoch=st.integers(0, 1000),
        freshness=st.binary(max_size=256),
        removals=st.lists(st.binary(max_size=512), max_size=16).map(tuple),
    )
)
def test_news_come_back_as_they_went(news: News) -> None:
    assert decode_news(encode_news(news)) == news


@given(st.binary(max_size=300))
def test_other_bytes_are_refused(data: bytes) -> None:
    try:
        news = decode_news(data)
    except InvalidRecord:
        return
    assert encode_news(news) == data


@pytest.mark.parametrize(
    "values",
    [
        {"seq": 2000},
        {"seq": -1},
        {"head": bytes(31)},
        {"epoch": -1},
        {"freshness": bytes(257)},
        {"removals": (bytes(513),)},
        {"removals": (b"",) * 17},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, object]) -> None:
    fields = {"seq": 1, "head": bytes(32), "epoch": 0} | values
    with pytest.raises(InvalidRecord):
        decode_news(encode_news(News(**fields)))  # type: ignore[arg-type]
