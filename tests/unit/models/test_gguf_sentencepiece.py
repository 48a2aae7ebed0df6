"""tokenizer.json made from a SentencePiece vocabulary, against SentencePiece's own rules."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf_reader import read_header
from pals.models.gguf_tokenizer import tokenizer_files
from pals.text.child import TextChild
from pals.text.tokenizer import Tokenizer
from tests.unit.models.gguf_files import add_value, finish

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
BYTES = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the other dogs jumped over the foxes.",
    "banana bandana ananas, aaaa aaaaa aaaaaa  bbb   ccc    ddd",
    "日本語のテキストと日本の言語。 Ελληνικά γράμματα και λέξεις.",
    'for (int i = 0; i < 10; i++) {\n    printf("%d\\n", i);\n}\n\n\n',
    "1234567890 3.14159 2.71828 -- ---- ======== ...... !!!! ????",
]


class Vocab:
    """Tokens with types and scores, in SentencePiece's order."""

    def __init__(self, pieces: Iterable[str], user_defined: Iterable[str] = ()) -> None:
        own = [*user_defined]
        entries = [*SPECIAL, *BYTES, *((piece, NORMAL) for piece in pieces if piece not in own)]
        entries += [(token, USER_DEFINED) for token in own]
        entries += [("[PAD1]", UNUSED)]
        self.tokens = [token for token, _ in entries]
        self.types = [kind for _, kind in entries]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self.scores = [
            float(len(SPECIAL) + len(BYTES) - index) if kind == NORMAL else -1000.0
            for index, kind in enumerate(self.types)
        ]


def reference_ids(vocab: Vocab, text: str, *, add_space: bool) -> list[int]:
    """Encode as llama.cpp does: special tokens are cut out, the rest is joined greedily."""
    ids: list[int] = []
    for part in split_special(vocab, text):
        if part in vocab.ids and vocab.types[vocab.ids[part]] in (UNKNOWN, CONTROL, USER_DEFINED):
            ids.append(vocab.ids[part])
        elif part:
            ids += join_greedily(vocab, (" " + part if add_space else part).replace(" ", "▁"))
    return ids


def split_special(vocab: Vocab, text: str) -> list[str]:
    """Cut text at the special token that begins first, the longest of those."""
    special = [t for t, k in zip(vocab.tokens, vocab.types, strict=True) if k in (2, 3, 4)]
    found = [(text.index(t), -len(t), t) for t in special if t in text]
    if not found:
        return [text]
    at, _, token = min(found)
    return [text[:at], token, *split_special(vocab, text[at + len(token) :])]


def join_greedily(vocab: Vocab, text: str) -> list[int]:
    """Join the neighbours whose union scores highest, the leftmost first, until none is a token."""
    pieces = list(text)
    while True:
        unions = [
            (-vocab.scores[vocab.ids[left + right]], at)
            for at, (left, right) in enumerate(pairwise(pieces))
            if left + right in vocab.ids and vocab.types[vocab.ids[left + right]] == NORMAL
        ]
        if not unions:
            break
        _, at = min(unions)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids: list[int] = []
    for piece in pieces:
        known = vocab.ids.get(piece)
        bytes_of = [vocab.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        ids += bytes_of if known is None else [known]
    return ids


def write_vocab(path: Path, vocab: Vocab, **changes: object) -> Path:
    """Write a GGUF file that holds a vocabulary and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, object] = {
        "model": "llama",
        "pre": "default",
        "tokens": vocab.tokens,
        "scores": vocab.scores,
        "token_type": vocab.types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    for key, value in (values | changes).items():
        add_value(writer, f"tokenizer.ggml.{key}", value)
    finish(writer)
    return path


def load(
    folder: Path, vocab: Vocab, *, child: TextChild | None = None, **changes: object
) -> Tokenizer:
    header = read_header(write_vocab(folder / "m.gguf", vocab, **changes))
    for name, content in tokenizer_files(header).items():
        (folder / name).write_bytes(content)
    return Tokenizer.load(folder, child)


def trained_pieces() -> list[str]:
    """Train a BPE vocabulary, and number it as SentencePiece does: merges, then characters."""
    trained = LibraryTokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trained.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=600, show_progress=False)
    )
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    merged = [token for token, _ in by_id if len(token) > 1]
    return merged + [token for token, _ in by_id if len(token) == 1]


@pytest.fixture(scope="module")
def trained() -> Vocab:
    pieces = trained_pieces()
    assert len(pieces) > 250
    return Vocab(pieces, user_defined=["  ", "   ", "\n\n", "<tool>"])


TEXTS = [
    *CORPUS,
    "",
    " ",
    "a",
    " a",
    "  a  b   c    d ",
    "\t\ttabs\r\nand lines\n\n\nmore",
    "unseen: žluťoučký kůň, 🚀👩🏽\u200d🚀, \u0000\u0001, ﷽, e\u0301, ▁literal▁",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "banananananas",
    "<s>begin</s> end<s><s> twice",
    "<tool>  call<tool>\n\n",
    "<0x0A> is text here",
    "日本語日本語日本日本日本語",
    "[PAD1]",
]


@pytest.mark.parametrize("add_space", [True, False])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_those_of_sentencepiece(tmp_path: Path, trained: Vocab, text: str, add_space: bool):
    tokenizer = load(tmp_path, trained, add_space_prefix=add_space)
    expected = reference_ids(trained, text, add_space=add_space)
    assert tokenizer.encode(text, add_special_tokens=False) == expected


@pytest.fixture(scope="module")
def both(trained: Vocab, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Tokenizer]:
    return {
        flag: load(tmp_path_factory.mktemp("spm"), trained, add_space_prefix=flag)
        for flag in (True, False)
    }


words = st.sampled_from([*"abn dogs\n", "the", "ana", " ", "  ", "日本", "é", "🚀", "<s>", "▁"])


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(words | st.characters(exclude_categories=["Cs"]), max_size=25))
def test_ids_of_any_text_are_those_of_sentencepiece(
    trained: Vocab, both: dict[bool, Tokenizer], parts: list[str]
):
    text = "".join(parts)
    for add_space, tokenizer in both.items():
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference_ids(trained, text, add_space=add_space)


@pytest.fixture(scope="module")
def child() -> TextChild:
    return TextChild()


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.text("ab▁", min_size=2, max_size=6), unique=True, max_size=25),
    texts=st.lists(st.text("ab ", max_size=16), min_size=1, max_size=8),
)
def test_merges_follow_any_vocabulary_whose_parts_score_higher(
    child: TextChild,
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[str],
    texts: list[str],
):
    """Overlaps such as ab + a + ba, where two unions are one token, go to the left one."""
    vocab = Vocab([*sorted(pieces, key=len), "a", "b", "▁"])
    tokenizer = load(tmp_path_factory.mktemp("any"), vocab, child=child)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference_ids(vocab, text, add_space=True)


@pytest.mark.parametrize("add_space", [True, False])
def test_text_without_special_tokens_comes_back_from_its_ids(
    trained: Vocab, both: dict[bool, Tokenizer], add_space: bool
):
    plain = [t for t in TEXTS if split_special(trained, t) == [t] and "▁" not in t]
    assert len(plain) > 8
    for text in plain:
        ids = both[add_space].encode(text, add_special_tokens=False)
        assert both[add_space].decode(ids) == text


def test_equal_scores_fall_back_on_the_order_of_the_tokens(tmp_path: Path, trained: Vocab):
    """Converters without scores write -1000 for all."""
    tokenizer = load(tmp_path, trained, scores=[-1000.0] * len(trained.tokens))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference_ids(trained, text, add_space=True)


def test_bytes_that_are_missing_make_the_unknown_token(tmp_path: Path):
    vocab = Vocab(["a", "▁"])
    vocab.types[3 + 0x41] = UNUSED
    tokenizer = load(tmp_path, vocab)
    unknown = tokenizer.encode("aé", add_special_tokens=False)[-1]
    assert unknown == vocab.ids["<unk>"]


# --- special tokens ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["<s>", "a"]),
        ({"add_bos_token": True}, ["<s>", "a"]),
        ({"add_bos_token": False}, ["a"]),
        ({"add_eos_token": True}, ["<s>", "a", "</s>"]),
        ({"add_bos_token": False, "add_eos_token": True}, ["a", "</s>"]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    tmp_path: Path, flags: dict[str, object], expected: list[str]
):
    vocab = Vocab(["a", "▁"])
    tokenizer = load(tmp_path, vocab, add_space_prefix=False, **flags)
    ids = tokenizer.encode("a", add_special_tokens=True)
    assert [vocab.tokens[i] for i in ids] == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [vocab.ids["a"]]


def test_special_ids_that_are_not_given_are_those_of_llama(tmp_path: Path):
    vocab = Vocab(["a", "▁"])
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id"))
    tokenizer = load(tmp_path, vocab, **none)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.special_tokens["unk_token"] == "<unk>"


def test_every_token_that_ends_an_answer_is_listed(tmp_path: Path):
    """By key (eos, eot, eom), and by text where a file of old has no key."""
    vocab = Vocab(["a", "▁"])
    for token in ("<end_of_turn>", "<|eom_id|>", "<eot>"):
        vocab.tokens.append(token)
        vocab.types.append(CONTROL)
        vocab.scores.append(-1000.0)
    load(tmp_path, vocab, eot_token_id=len(vocab.tokens) - 1)
    listed = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert [vocab.tokens[i] for i in listed] == ["</s>", "<eot>", "<end_of_turn>", "<|eom_id|>"]


def test_a_word_of_text_that_looks_like_an_end_ends_nothing(tmp_path: Path):
    vocab = Vocab(["a", "▁", "<end_of_turn>"])
    load(tmp_path, vocab)
    settings_file = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings_file["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"scores": None}, CorruptModel),
        ({"scores": [0.0]}, CorruptModel),
        ({"scores": [float("nan")] * (3 + 256 + 3)}, CorruptModel),
        ({"scores": ["a"] * (3 + 256 + 3)}, CorruptModel),
        ({"token_type": [1]}, CorruptModel),
        ({"add_bos_token": "yes"}, CorruptModel),
        ({"bos_token_id": 10**6}, CorruptModel),
        ({"remove_extra_whitespaces": True}, UnsupportedModel),
        ({"model": "bert"}, UnsupportedModel),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    tmp_path: Path, changes: dict[str, object], error: type[Exception]
):
    with pytest.raises(error):
        load(tmp_path, Vocab(["a", "▁"]), **changes)


@pytest.mark.timeout(5)
def test_a_vocabulary_of_endless_words_is_refused_at_once(tmp_path: Path):
    words = ["a" * (1 << 22), "b" * 100]
    with pytest.raises(CorruptModel, match="characters"):
        load(tmp_path, Vocab(words))


@pytest.mark.timeout(20)
def test_a_vocabulary_as_large_as_any_is_read_in_seconds(tmp_path: Path):
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, (60_000, 12)).astype(np.uint8)
    pieces = dict.fromkeys(bytes(row).decode() for row in letters)
    tokenizer = load(tmp_path, Vocab([*pieces, *(chr(c) for c in range(97, 123))]))
    assert tokenizer.vocab_size > 60_000
