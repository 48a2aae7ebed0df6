import json
import os
from pathlib import Path

import pytest

from pals.errors import CorruptModel, InvalidText
from pals.text import decoding, files, tokenizer
from pals.text.child import TextChild
from pals.text.template import ChatTemplate
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
    with pytest.raises(CorruptModel, match="larger than 10 bytes"):
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


def test_a_pattern_that_panics_on_a_text_is_an_error_not_a_crash(folder: Path):
    split_on(folder, "(a+)+$")
    loaded = Tokenizer.load(folder)
    with pytest.raises(CorruptModel, match="PanicException"):
        loaded.encode("a" * 28 + "b", add_special_tokens=False)


CUBIC = "a*a*c|a"


@pytest.mark.timeout(15)
def test_a_pattern_that_takes_hours_is_an_error_after_four_seconds(folder: Path):
    """Each match is quick, so that the library's own limit never ends it."""
    split_on(folder, CUBIC)
    loaded = Tokenizer.load(folder)
    with pytest.raises(CorruptModel, match=r"no result within 4\.0 s"):
        loaded.encode("a" * 3000, add_special_tokens=False)
    assert loaded.encode("ab", add_special_tokens=False) == [97, 98]


def test_patterns_that_take_long_to_compile_are_refused(folder: Path):
    split_on(folder, r"(?i:[\p{L}])" * 20_000)
    with pytest.raises(CorruptModel, match="240000 characters"):
        Tokenizer.load(folder)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="macOS sets no limit on memory")
def test_a_normalizer_that_makes_gigabytes_of_a_letter_ends_its_own_process(folder: Path):
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    edit_json(
        folder / "tokenizer.json",
        normalizer={"type": "Sequence", "normalizers": [replace] * 3},
    )
    loaded = Tokenizer.load(folder)
    with pytest.raises(CorruptModel, match=r"was ended|no result"):
        loaded.encode("aa", add_special_tokens=False)
    assert loaded.encode("b", add_special_tokens=False) == [98]


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 17},
        {"type": "Sequence", "decoders": [{"type": "Unheard"}]},
        {"type": "Sequence"},
        [],
    ],
    ids=["regex", "growth", "many", "unknown", "no list", "no object"],
)
def test_a_decoder_that_nothing_bounds_is_refused(folder: Path, decoder: object):
    """It runs for each token of an answer, in this process."""
    edit_json(folder / "tokenizer.json", decoder=decoder)
    with pytest.raises(CorruptModel):
        Tokenizer.load(folder)


def test_a_token_of_endless_length_is_refused(folder: Path):
    path = folder / "tokenizer.json"
    file = json.loads(path.read_text())
    file["model"]["vocab"]["a" * (decoding.MAX_TOKEN_CHARACTERS + 1)] = 300
    path.write_text(json.dumps(file))
    with pytest.raises(CorruptModel, match="65537 characters"):
        Tokenizer.load(folder)


def test_tokenizer_and_template_share_a_process_that_loads_both_again(folder: Path):
    child = TextChild()
    loaded, chat = Tokenizer.load(folder, child), ChatTemplate.load(folder, child)
    child.close()
    messages = [{"role": "user", "content": "a"}]
    text = chat.render(messages, add_generation_prompt=False)
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == "user\na\n"


# --- BOS -----------------------------------------------------------------------------


def adding_bos(folder: Path, *, eos: bool = False) -> None:
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    end = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    edit_json(
        folder / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [bos, first, *([end] if eos else [])],
            "pair": [bos, first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]},
                "<|im_end|>": {"id": "<|im_end|>", "ids": [258], "tokens": ["<|im_end|>"]},
            },
        },
    )


TEMPLATES = {
    "template writes it": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "template does not": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_prompt_begins_with_one_bos(folder: Path, source: str, eos: bool):
    adding_bos(folder, eos=eos)
    edit_json(folder / "tokenizer_config.json", chat_template=source)
    prompt = ChatTemplate.load(folder).render([{"role": "user", "content": "ab"}])
    assert Tokenizer.load(folder).encode_prompt(prompt) == [256, 97, 98]


@pytest.mark.parametrize("text", ["ab", "<|endoftext|>ab"], ids=["plain", "typed"])
def test_a_plain_prompt_begins_with_one_bos(folder: Path, text: str):
    adding_bos(folder)
    assert Tokenizer.load(folder).encode_prompt(text) == [256, 97, 98]


def test_an_empty_prompt_is_a_bos_alone(folder: Path):
    adding_bos(folder, eos=True)
    assert Tokenizer.load(folder).encode_prompt("") == [256]


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_tokenizer_that_adds_no_bos_leaves_it_to_the_template(folder: Path, source: str):
    edit_json(folder / "tokenizer_config.json", chat_template=source)
    prompt = ChatTemplate.load(folder).render([{"role": "user", "content": "ab"}])
    expected = [256, 97, 98] if "bos_token" in source else [97, 98]
    assert Tokenizer.load(folder).encode_prompt(prompt) == expected
    assert Tokenizer.load(folder).encode_prompt("ab") == [97, 98]


def test_half_a_surrogate_pair_is_no_text(folder: Path):
    with pytest.raises(InvalidText) as caught:
        Tokenizer.load(folder).encode("ab\ud800", add_special_tokens=False)
    assert "character 2" in str(caught.value)


def test_a_text_above_the_cap_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "MAX_TEXT_CHARACTERS", 3)
    with pytest.raises(InvalidText):
        Tokenizer.load(folder).encode("abcd", add_special_tokens=False)
