import json
from pathlib import Path

import pytest

from pals.errors import CorruptModel, InvalidText
from pals.text import files, tokenizer
from pals.text.tokenizer import Tokenizer
from tests import checkpoints
from tests.unit.text.tokenizers_for_tests import save_byte_level, save_sentencepiece


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.write_tokenizer(tmp_path)
    return tmp_path


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_special_tokens_are_read_and_skipped_in_text(folder: Path):
    loaded = Tokenizer.load(folder)
    assert (loaded.bos_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert loaded.special_ids == {256, 257, 258}
    assert loaded.vocab_size == checkpoints.VOCAB_SIZE
    ids = loaded.encode("hi<|im_end|>", add_special_tokens=False)
    assert ids == [104, 105, checkpoints.EOS_ID]
    assert loaded.decode(ids) == "hi"
    assert loaded.decode(ids, skip_special_tokens=False) == "hi<|im_end|>"


def test_the_tokenizers_own_bos_is_added_on_request_only(folder: Path):
    edit_json(
        folder / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}
            },
        },
    )
    loaded = Tokenizer.load(folder)
    assert loaded.encode("a", add_special_tokens=True) == [256, 97]
    assert loaded.encode("a", add_special_tokens=False) == [97]


def test_end_tokens_come_from_every_file_that_names_some(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.load(folder).eos_token_ids == {256, 7, 9, checkpoints.EOS_ID}


@pytest.mark.parametrize("ids", [-1, 259, "2", True, [3, None], [[3]], list(range(64)), 1 << 70])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_that_are_too_many_or_no_ids_of_the_model_are_refused(
    folder: Path, name: str, ids: object
):
    (folder / "config.json").write_text('{"vocab_size": 259}')
    (folder / "generation_config.json").write_text("{}")
    edit_json(folder / name, eos_token_id=ids)
    with pytest.raises(CorruptModel, match=r"end an answer|eos_token_id"):
        Tokenizer.load(folder)


def test_an_end_token_that_the_model_cannot_produce_is_left_out(folder: Path):
    (folder / "config.json").write_text('{"vocab_size": 256, "eos_token_id": [7]}')
    assert Tokenizer.load(folder).eos_token_ids == {7}


def test_a_special_token_may_be_an_object_and_the_newer_file_wins(folder: Path):
    (folder / "special_tokens_map.json").write_text('{"eos_token": "x", "pad_token": "p"}')
    edit_json(folder / "tokenizer_config.json", eos_token={"content": "<|im_start|>"})
    loaded = Tokenizer.load(folder)
    assert loaded.special_tokens["eos_token"] == "<|im_start|>"
    assert loaded.special_tokens["pad_token"] == "p"


def test_padding_and_truncation_of_the_file_are_not_applied(folder: Path):
    edit_json(
        folder / "tokenizer.json",
        truncation={
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    )
    assert Tokenizer.load(folder).encode("abcd", add_special_tokens=False) == [97, 98, 99, 100]


def test_unknown_ids_decode_to_nothing(folder: Path):
    loaded = Tokenizer.load(folder)
    assert loaded.decode([97, -1, 10**6, 2**70, 98]) == "ab"


def test_bytes_of_tokens_join_to_the_bytes_of_the_text(tmp_path: Path):
    loaded = Tokenizer.load(save_byte_level(tmp_path))
    text = "€ a😀<tool ü>\n"
    ids = loaded.encode(text, add_special_tokens=False)
    assert b"".join(loaded.token_bytes(i) for i in ids) == text.encode()


def test_byte_tokens_of_sentencepiece_are_known_by_their_form(tmp_path: Path):
    loaded = Tokenizer.load(save_sentencepiece(tmp_path, "sequence"))
    assert [loaded.is_byte_token(i) for i in (0, 2, 3, 258, 259)] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_a_folder_without_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(CorruptModel) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.fields["source"] == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "\xff"])
def test_a_damaged_tokenizer_is_refused(folder: Path, text: str):
    (folder / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptModel):
        Tokenizer.load(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"eos_token": 3}', "[" * 100_000])
def test_damaged_settings_are_refused(folder: Path, content: str):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CorruptModel):
        Tokenizer.load(folder)


def test_a_file_above_its_cap_is_refused_unparsed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_SETTINGS_BYTES", 10)
    with pytest.raises(CorruptModel, match="more than 10 bytes"):
        Tokenizer.load(folder)


def split_on(folder: Path, pattern: str) -> None:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    edit_json(folder / "tokenizer.json", pre_tokenizer=split)


def test_a_pattern_that_does_not_compile_is_refused(folder: Path):
    split_on(folder, "[")
    with pytest.raises(CorruptModel):
        Tokenizer.load(folder)


def test_a_pattern_that_panics_on_a_text_is_an_error_not_a_crash(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    split_on(folder, "(a+)+$")
    loaded = Tokenizer.load(folder)
    with pytest.raises(CorruptModel, match="panicked"):
        loaded.encode("a" * 28 + "b", add_special_tokens=False)
    assert "panicked" in capfd.readouterr().err


def test_half_a_surrogate_pair_is_no_text(folder: Path):
    with pytest.raises(InvalidText) as caught:
        Tokenizer.load(folder).encode("ab\ud800", add_special_tokens=False)
    assert "character 2" in str(caught.value)


def test_a_text_above_the_cap_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "MAX_TEXT_CHARACTERS", 3)
    with pytest.raises(InvalidText):
        Tokenizer.load(folder).encode("abcd", add_special_tokens=False)
