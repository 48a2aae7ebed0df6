from hypothesis import given
from hypothesis import strategies as st

from pals.engine.cache import cache_positions
from pals.engine.steps import batch_buckets, chunk_buckets, context_buckets, smallest_bucket
from pals.types import EngineLimits

LIMITS = st.builds(
    EngineLimits,
    max_sessions=st.integers(1, 256),
    max_context_tokens=st.integers(1, 1 << 17),
    max_chunk_tokens=st.sampled_from([1 << bits for bits in range(4, 13)]),
)


def test_default_limits_need_sixteen_programs():
    limits = EngineLimits()

    assert chunk_buckets(limits) == [16, 32, 64, 128, 256]
    assert batch_buckets(limits) == [1, 2, 4]
    assert context_buckets(limits) == [256, 2176]


@given(limits=LIMITS, data=st.data())
def test_every_allowed_step_has_a_bucket_within_the_cache(limits, data):
    most = min(limits.max_chunk_tokens, limits.max_context_tokens)
    tokens = data.draw(st.integers(1, most))
    position = data.draw(st.integers(0, limits.max_context_tokens - tokens))

    size = smallest_bucket(chunk_buckets(limits), tokens)
    context = smallest_bucket(context_buckets(limits), position + size)

    assert tokens <= size
    assert position + size <= context <= cache_positions(limits)


@given(limits=LIMITS, data=st.data())
def test_every_batch_has_a_bucket_less_than_twice_as_large(limits, data):
    rows = data.draw(st.integers(1, limits.max_sessions))

    assert rows <= smallest_bucket(batch_buckets(limits), rows) < 2 * rows


@given(limits=LIMITS)
def test_margin_lies_past_the_context(limits):
    assert cache_positions(limits) - 1 >= limits.max_context_tokens
