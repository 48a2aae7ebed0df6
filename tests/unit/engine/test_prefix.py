from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pals.engine.prefix import BLOCK_TOKENS, HASH_BYTES, PrefixScope, hash_blocks
from pals.types import LayerRange, PeerId

SALT = b"s" * 32
SCOPE = PrefixScope(manifest=b"m" * 32, layers=LayerRange(0, 4), dtype="bf16", kv_dtype="bf16")
DRIVER = PeerId("12D3driver")
TOKENS = st.lists(st.integers(0, 5), max_size=4 * BLOCK_TOKENS)


@given(TOKENS, TOKENS)
def test_names_are_equal_as_far_as_the_tokens_are(left: list[int], right: list[int]) -> None:
    common = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )

    names = hash_blocks(SALT, left), hash_blocks(SALT, right)

    equal = [a == b for a, b in zip(*names, strict=False)]
    assert equal == [(n + 1) * BLOCK_TOKENS <= common for n in range(len(equal))]


def test_only_whole_blocks_have_names_and_these_are_short() -> None:
    names = hash_blocks(SALT, range(2 * BLOCK_TOKENS + 1))

    assert [len(name) for name in names] == [HASH_BYTES, HASH_BYTES]
    assert hash_blocks(SALT, range(BLOCK_TOKENS - 1)) == ()


def test_names_under_another_salt_say_nothing() -> None:
    assert not set(hash_blocks(SALT, [1] * 256)) & set(hash_blocks(b"t" * 32, [1] * 256))


def test_keys_are_of_the_model_the_range_the_dtypes_the_page_size_and_the_driver() -> None:
    names = hash_blocks(SALT, range(BLOCK_TOKENS))
    keys = SCOPE.page_keys(DRIVER, names, 64)
    others = [
        replace(SCOPE, manifest=b"n" * 32).page_keys(DRIVER, names, 64),
        replace(SCOPE, layers=LayerRange(0, 5)).page_keys(DRIVER, names, 64),
        replace(SCOPE, dtype="f32").page_keys(DRIVER, names, 64),
        replace(SCOPE, kv_dtype="int8").page_keys(DRIVER, names, 64),
        SCOPE.page_keys(PeerId("12D3other"), names, 64),
        SCOPE.page_keys(DRIVER, names, 32),
    ]

    assert len({keys, *others}) == 1 + len(others)
    assert SCOPE.page_keys(DRIVER, names, 64) == keys


def test_each_block_has_a_key_for_each_of_its_pages() -> None:
    names = hash_blocks(SALT, range(2 * BLOCK_TOKENS))

    assert len(set(SCOPE.page_keys(DRIVER, names, 16))) == 8
    assert len(set(SCOPE.page_keys(DRIVER, names, 64))) == 2


def test_equal_names_at_different_places_have_different_keys() -> None:
    name = hash_blocks(SALT, range(BLOCK_TOKENS))[0]

    first, second = SCOPE.page_keys(DRIVER, (name, name), 64)

    assert first != second
