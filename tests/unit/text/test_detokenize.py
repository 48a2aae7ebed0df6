from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.text.detokenize import MAX_PENDING_TOKENS, StreamDetokenizer
from pals.text.tokenizer import Tokenizer
from tests.unit.text.tokenizers_for_tests import save_byte_level, save_sentencepiece

KINDS = ("byte-level", "sequence", "unstripped", "metaspace")
TEXTS = st.text(alphabet="ab é€😀👩🏽‍🚀日本語\n", max_size=20)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": Tokenizer.load(save_byte_level(folder / "byte-level")),
        "sequence": Tokenizer.load(save_sentencepiece(folder / "sequence", "sequence")),
        "unstripped": Tokenizer.load(save_sentencepiece(folder / "unstripped", "unstripped")),
        "metaspace": Tokenizer.load(save_sentencepiece(folder / "metaspace", "metaspace")),
    }


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = StreamDetokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_join_to_the_decoding_of_all_ids(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
):
    """Any ids: half characters, special, unknown and negative ones included."""
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(-1, tokenizer.vocab_size + 1), max_size=30))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_no_piece_shows_half_a_character(tokenizers: dict[str, Tokenizer], kind: str, text: str):
    tokenizer = tokenizers[kind]
    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", ["sequence", "unstripped"])
@given(data=st.data())
def test_runs_of_bytes_between_words_and_special_tokens_join_to_their_decoding(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
):
    """Bytes of whole, cut and ill-formed characters; long runs, but not past the bound."""
    tokenizer = tokenizers[kind]
    byte = st.sampled_from([0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0xFF])
    runs = st.lists(byte.map(lambda b: 3 + b), max_size=12)
    emoji = st.sampled_from("é€😀👩🏽‍🚀").map(lambda c: [3 + b for b in c.encode()])
    other = st.integers(0, tokenizer.vocab_size - 1).map(lambda i: [i])
    parts = data.draw(st.lists(runs | emoji | other, max_size=5))
    ids = [i for part in parts for i in part]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_four_byte_tokens_comes_out_whole_with_its_last_token(
    tokenizers: dict[str, Tokenizer],
):
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    assert stream(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


def test_a_stream_that_ends_inside_a_character_says_so(tokenizers: dict[str, Tokenizer]):
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    assert stream(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_the_space_before_a_sentencepiece_word_is_kept(tokenizers: dict[str, Tokenizer]):
    tokenizer = tokenizers["sequence"]
    ids = tokenizer.encode("a a", add_special_tokens=False)
    assert stream(tokenizer, ids) == ["a", " a", ""]


def test_every_space_before_a_word_is_kept_where_none_is_added(
    tokenizers: dict[str, Tokenizer],
):
    tokenizer = tokenizers["unstripped"]
    for text in ("a", " a", "  a", "    a", " a a", "\n\n a", "<a> a"):
        pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
        assert "".join(pieces) == text


def test_a_special_token_does_not_swallow_the_space_that_follows(
    tokenizers: dict[str, Tokenizer],
):
    tokenizer = tokenizers["sequence"]
    word = tokenizer.encode("a", add_special_tokens=False)
    assert stream(tokenizer, [*word, 2, *word]) == ["a", "", " a", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_endless_nonsense_is_let_out_within_a_bound(tokenizers: dict[str, Tokenizer], kind: str):
    """Continuation bytes alone are never text; they must not pile up either."""
    tokenizer = tokenizers[kind]
    byte = 0x80 if kind == "byte-level" else 3 + 0x80
    pieces = stream(tokenizer, [byte] * (4 * MAX_PENDING_TOKENS))
    assert any(pieces[: MAX_PENDING_TOKENS + 1])
    assert len("".join(pieces)) == 4 * MAX_PENDING_TOKENS or kind == "metaspace"


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_costs_the_decoding_of_few_tokens(
    tokenizers: dict[str, Tokenizer], kind: str, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("a b é😀 a" * 200, add_special_tokens=False)
    decoded = 0
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: Sequence[int], **options: bool) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    stream(tokenizer, ids)
    assert decoded <= 8 * len(ids)
