import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from pals.text.answers import families
from pals.text.answers.format import AnswerFormat, PlainParser
from pals.text.answers.pieces import Content
from pals.text.answers.reasoning import MISTRAL_THINK, THINK
from pals.text.detokenize import StreamDetokenizer
from pals.text.tokenizer import Tokenizer
from tests import checkpoints
from tests.unit.text.answers.reading import NOW, TOOLS, WEATHER, joined, read
from tests.unit.text.answers.templates import DEEPSEEK, GEMMA, HARMONY, MISTRAL, QWEN
from tests.unit.text.tokenizers_for_tests import save

TURN = {"role": "user", "content": "Hi"}


def make_model(folder: Path, template: str | None, special: list[str], plain: list[str]) -> Path:
    """Write a byte-level tokenizer with these added tokens, and a template."""
    inner = Inner(models.BPE(vocab=checkpoints.byte_vocabulary(), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    inner.add_tokens([AddedToken(token, normalized=False) for token in plain])
    save(folder, inner, eos_token=special[0])
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 300}))
    return folder


def detect(folder: Path) -> AnswerFormat:
    return AnswerFormat.detect(folder, Tokenizer.load(folder))


def test_the_format_is_that_of_the_template_and_knows_its_tokens(tmp_path: Path):
    marks = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    answers = detect(make_model(tmp_path, QWEN, ["<|im_end|>"], marks))
    assert answers.family is families.HERMES
    assert answers.thinking == THINK
    assert answers.template_reads_tools
    assert set(answers.tokens) == set(marks)
    assert answers.kept_tokens == frozenset()


def test_special_tokens_that_are_marks_are_kept_and_no_others(tmp_path: Path):
    special = ["</s>", "[TOOL_CALLS]", "[ARGS]", "[INST]", "[THINK]", "[/THINK]"]
    template = MISTRAL + "{# [THINK] #}"
    answers = detect(make_model(tmp_path, template, special, []))
    assert answers.family is families.MISTRAL
    assert answers.thinking == MISTRAL_THINK
    assert set(answers.special) == set(special) - {"</s>", "[INST]"}
    assert answers.kept_tokens == frozenset(answers.special.values())


def test_harmony_has_channels_and_no_other_reasoning(tmp_path: Path):
    template = HARMONY + "{# <think> #}"
    answers = detect(make_model(tmp_path, template, ["<|return|>", "<|channel|>"], []))
    assert (answers.family, answers.thinking) == (families.HARMONY, None)


def test_without_a_template_the_architecture_decides(tmp_path: Path):
    answers = detect(make_model(tmp_path, None, ["<|end|>"], []))
    assert answers.family is families.HERMES
    assert not answers.template_reads_tools


def test_a_model_s_tokens_are_read_as_its_answer(tmp_path: Path):
    """The whole way: ids, of which the marks are special tokens, to pieces."""
    special = ["</s>", "[TOOL_CALLS]", "[ARGS]"]
    tokenizer = Tokenizer.load(make_model(tmp_path, MISTRAL, special, []))
    answers = AnswerFormat.detect(tmp_path, tokenizer)
    text = 'é[TOOL_CALLS]now[ARGS]{"a": "é"}'
    parser, detokenizer = answers.parser(TOOLS, prompt_tail=""), StreamDetokenizer(tokenizer)

    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token in answers.kept_tokens:
            name = tokenizer.decode([token], skip_special_tokens=False)
            pieces += parser.push(detokenizer.finish() + name)
        else:
            pieces += parser.push(detokenizer.push(token))

    assert joined([*pieces, *parser.finish()]) == [
        ("content", "é"),
        ("call", "0", "now"),
        ("arguments 0", '{"a": "é"}'),
    ]


HERMES = AnswerFormat(family=families.HERMES, template_reads_tools=True)
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


@pytest.mark.parametrize("use", [None, replace(TOOLS, choice="none"), replace(TOOLS, tools=())])
def test_where_no_tool_may_be_called_a_call_is_content(use: object):
    assert joined(read(HERMES, [CALL], use=use)) == [("content", CALL)]  # type: ignore[arg-type]


def test_a_tool_that_is_named_is_the_only_one_to_call():
    use = replace(TOOLS, choice="get_weather", named=True)
    assert joined(read(HERMES, [CALL], use=use))[0][0] == "content"
    assert joined(read(HERMES, [CALL], use=replace(use, choice="now")))[0] == ("call", "0", "now")


def test_a_tool_may_be_called_none():
    none = replace(NOW, name="none")
    use = replace(TOOLS, tools=(none,), choice="none", named=True)
    assert joined(read(HERMES, [CALL.replace("now", "none")], use=use))[0][0] == "call"


def test_every_call_has_an_id_of_its_own():
    pieces = read(HERMES, [CALL + CALL])
    ids = [piece.id for piece in pieces if hasattr(piece, "id")]
    assert len(set(ids)) == 2


def test_tools_are_given_to_templates_that_read_them_and_described_to_others():
    silent = AnswerFormat()
    assert HERMES.template_tools(TOOLS) is not None
    assert HERMES.template_messages([TURN], TOOLS) == [TURN]
    assert silent.template_tools(TOOLS) is None
    assert "get_weather" in str(silent.template_messages([TURN], TOOLS)[0])


def test_tools_that_may_not_be_called_are_not_told_of():
    use = replace(TOOLS, choice="none")
    assert HERMES.template_tools(use) is None
    assert AnswerFormat().template_messages([TURN], use) == [TURN]
    assert HERMES.template_tools(None) is None


def test_of_tools_of_which_one_is_named_all_are_told(tmp_path: Path):
    use = replace(TOOLS, choice="now", named=True)
    assert len(HERMES.template_tools(use) or []) == 2


@pytest.mark.parametrize(
    ("template", "reads"),
    [(QWEN, True), (DEEPSEEK, False), (GEMMA, False), (GEMMA + "{{ tools }}", False)],
)
def test_only_a_template_of_a_known_family_is_trusted_to_tell_of_tools(
    tmp_path: Path, template: str, reads: bool
):
    assert detect(make_model(tmp_path, template, ["<end>"], [])).template_reads_tools == reads


def test_plain_text_is_content_as_it_comes():
    parser = PlainParser()
    assert parser.push("<think> ") == [Content("<think> ")]
    assert parser.push("") == parser.finish() == []
    assert not parser.ended


def test_free_answers_need_no_grammar():
    assert HERMES.grammar(TOOLS) is None
    assert HERMES.grammar(replace(TOOLS, choice="none")) is None
    strict = replace(TOOLS, tools=(replace(WEATHER, strict=True),))
    assert HERMES.grammar(strict) is not None
    assert HERMES.grammar(replace(strict, choice="none")) is None
