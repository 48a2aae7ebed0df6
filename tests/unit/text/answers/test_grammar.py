"""The grammars, against the library that holds answers to them."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pals.errors import InvalidGrammar
from pals.text.answers.families import FAMILIES, HARMONY, HERMES, PLAIN, Family
from pals.text.answers.format import AnswerFormat
from pals.text.answers.reasoning import THINK, Thinking
from pals.text.answers.tools import ToolUse
from pals.types import MAX_GRAMMAR_BYTES, Grammar
from tests import checkpoints
from tests.unit.text.answers.reading import NOW, TOOLS, WEATHER

EVERY_FAMILY = pytest.mark.parametrize("family", [*FAMILIES, PLAIN], ids=lambda f: f.name)
REQUIRED = replace(TOOLS, choice="required")
STRICT = replace(TOOLS, tools=(replace(WEATHER, strict=True), NOW))
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}

Judge = Callable[[Grammar | None, str], str]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, and every family's marks as tokens: special ones as far as models have them so."""
    inner = Tokenizer(models.BPE(vocab=checkpoints.byte_vocabulary(), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    marks = sorted({mark for family in FAMILIES for mark in family.marks})
    special = [mark for mark in marks if mark.startswith(("<|", "["))]
    inner.add_special_tokens([AddedToken(token, special=True) for token in ["<|end|>", *special]])
    plain = [*(mark for mark in marks if mark not in special), THINK.open, THINK.close]
    inner.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return inner


@pytest.fixture(scope="module")
def judge(tokenizer: Tokenizer) -> Judge:
    """Say whether a grammar takes a text: ``whole``, ``part`` of it, or ``not``."""
    vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<|end|>"))

    def judge(grammar: Grammar | None, text: str) -> str:
        assert grammar is not None
        assert grammar.kind == "lark"
        assert LLMatcher.validate_grammar(grammar.source, vocabulary) == ""
        matcher = LLMatcher(vocabulary, grammar.source, log_level=0)
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            if matcher.is_stopped() or not matcher.consume_token(token):
                return "not"
        return "whole" if matcher.is_accepting() else "part"

    return judge


def answers(tokenizer: Tokenizer, family: Family, thinking: Thinking | None = None) -> AnswerFormat:
    marks = [*family.marks, *((thinking.open, thinking.close) if thinking else ())]
    ids = {mark: tokenizer.token_to_id(mark) for mark in marks}
    return AnswerFormat(
        family=family, thinking=thinking, tokens={m: i for m, i in ids.items() if i is not None}
    )


def written(family: Family, *calls: tuple[str, dict[str, object]]) -> str:
    """Return calls as the family writes them."""
    syntax, texts = family.syntax, []
    for name, arguments in calls:
        text = json.dumps(arguments)
        if syntax.tags is not None:
            tags = syntax.tags
            text = "".join(f"{tags.key}{k}{tags.value}{v}{tags.end}" for k, v in arguments.items())
        texts.append(syntax.name + name + syntax.arguments + text + syntax.end)
    return syntax.before + (syntax.between or "").join(texts) + syntax.after


PARIS = ("get_weather", {"city": "Paris", "days": 3})


@EVERY_FAMILY
def test_an_answer_that_has_to_call_calls(tokenizer: Tokenizer, judge: Judge, family: Family):
    grammar = answers(tokenizer, family).grammar(REQUIRED)
    assert judge(grammar, written(family, PARIS)) == "whole"
    assert judge(grammar, written(family, ("now", {}))) == "whole"
    assert judge(grammar, "Hello") == "not"
    assert judge(grammar, "") == "part"


@EVERY_FAMILY
def test_arguments_follow_their_schema(tokenizer: Tokenizer, judge: Judge, family: Family):
    grammar = answers(tokenizer, family).grammar(REQUIRED)
    assert judge(grammar, written(family, ("get_weather", {"town": "Paris"}))) == "not"
    assert judge(grammar, written(family, ("get_weather", {"city": "P", "days": "x"}))) == "not"
    assert judge(grammar, written(family, ("get_weather", {}))) == "not"
    assert judge(grammar, written(family, ("unknown", {}))) == "not"


@EVERY_FAMILY
def test_several_calls_only_if_the_request_and_the_family_allow_it(
    tokenizer: Tokenizer, judge: Judge, family: Family
):
    both = written(family, PARIS, ("now", {}))
    several = "not" if family.syntax.between is None else "whole"
    model = answers(tokenizer, family)
    assert judge(model.grammar(REQUIRED), both) == several
    assert judge(model.grammar(replace(REQUIRED, parallel=False)), both) == "not"
    assert (
        judge(model.grammar(replace(REQUIRED, parallel=False)), written(family, PARIS)) == "whole"
    )


@EVERY_FAMILY
def test_a_named_tool_is_the_only_one(tokenizer: Tokenizer, judge: Judge, family: Family):
    grammar = answers(tokenizer, family).grammar(replace(TOOLS, choice="now", named=True))
    assert judge(grammar, written(family, ("now", {}))) == "whole"
    assert judge(grammar, written(family, PARIS)) == "not"


@EVERY_FAMILY
def test_a_strict_tool_binds_a_call_and_nothing_else(
    tokenizer: Tokenizer, judge: Judge, family: Family
):
    grammar = answers(tokenizer, family).grammar(STRICT)
    text = FINAL + "Hello" if family is HARMONY else "Hello"
    assert judge(grammar, text) == "whole"
    assert judge(grammar, written(family, PARIS)) == "whole"
    assert judge(grammar, written(family, ("get_weather", {"town": "Paris"}))) == "not"


@EVERY_FAMILY
def test_reasoning_comes_first_as_far_as_it_is_left_to_do(
    tokenizer: Tokenizer, judge: Judge, family: Family
):
    if family is HARMONY:
        grammar = answers(tokenizer, family).grammar(REQUIRED)
        assert judge(grammar, ANALYSIS + written(family, PARIS)) == "whole"
        return
    model, call = answers(tokenizer, family, THINK), written(family, PARIS)
    free, begun = model.grammar(REQUIRED), model.grammar(REQUIRED, prompt_tail="<think>\n")
    over = model.grammar(REQUIRED, prompt_tail="</think>\n\n")
    assert judge(free, f"<think>\nHm.\n</think>\n\n{call}") == judge(free, call) == "whole"
    assert judge(begun, f"Hm.\n</think>\n\n{call}") == "whole"
    assert judge(over, call) == "whole"
    assert judge(over, f"<think>Hm.</think>{call}") == "not"


@pytest.mark.parametrize(
    ("family", "thinking", "before"),
    [
        (HERMES, THINK, ("", "<think>\nHm.\n</think>\n\n")),
        (
            HARMONY,
            None,
            (FINAL, f"{ANALYSIS}{FINAL}", "<|channel|>final <|constrain|>json<|message|>"),
        ),
    ],
)
def test_json_is_asked_of_the_content_and_not_of_the_reasoning(
    tokenizer: Tokenizer, judge: Judge, family: Family, thinking: Thinking, before: tuple[str, ...]
):
    model = answers(tokenizer, family, thinking)
    schema = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
    for head in before:
        grammar = model.grammar(None, answer=schema)
        assert judge(grammar, head + '{ "a": \n1}') == "whole"
        assert judge(grammar, head + '{"b": 1}') == "not"
        anything = model.grammar(None, answer=Grammar(kind="json_object"))
        assert judge(anything, head + '{"b": 1}') == "whole"
        assert judge(anything, head + "[1]") == "not"


@pytest.mark.parametrize(
    ("thinking", "kind", "tail"),
    [(None, "json_object", ""), (THINK, "json_object", "</think>"), (THINK, "lark", "")],
)
def test_another_grammar_stays_as_it_is(thinking: Thinking, kind: str, tail: str):
    grammar = Grammar(kind=kind, source="start: /a/")  # type: ignore[arg-type]
    model = AnswerFormat(family=HERMES, thinking=thinking)
    assert model.grammar(None, prompt_tail=tail, answer=grammar) is grammar


@EVERY_FAMILY
def test_an_answer_in_json_may_be_a_call_instead(
    tokenizer: Tokenizer, judge: Judge, family: Family
):
    model, head = answers(tokenizer, family), FINAL if family is HARMONY else ""
    schema = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
    free, must = model.grammar(TOOLS, answer=schema), model.grammar(REQUIRED, answer=schema)
    never = model.grammar(replace(TOOLS, choice="none"), answer=schema)
    assert judge(free, head + '{"a": 1}') == judge(free, written(family, PARIS)) == "whole"
    assert judge(free, head + "Hello") == judge(free, head + '{"b": 1}') == "not"
    assert judge(must, head + '{"a": 1}') == "not"
    assert judge(must, written(family, PARIS)) == "whole"
    assert never == schema or judge(never, head + '{"a": 1}') == "whole"


@pytest.mark.parametrize(
    "parameters",
    [{"properties": []}, {"properties": {"a": 1}}, {"properties": {"a": {}}, "required": 1}],
)
def test_an_odd_schema_of_a_tool_makes_a_grammar_or_one_that_does_not_compile(
    parameters: dict[str, object],
):
    use = ToolUse(tools=(replace(NOW, parameters=parameters),), choice="required")
    for family in FAMILIES:
        assert AnswerFormat(family=family).grammar(use) is not None


@EVERY_FAMILY
def test_schemas_that_make_too_long_a_grammar_are_refused_while_it_is_written(family: Family):
    properties = {f"p{number}": {"type": "integer"} for number in range(500)}
    definitions = {"large": {"enum": ["x" * 60_000]}}
    schema = {"type": "object", "properties": properties, "$defs": definitions}
    tools = tuple(replace(NOW, name=f"now{number}", parameters=schema) for number in range(9))
    with pytest.raises(InvalidGrammar, match=str(MAX_GRAMMAR_BYTES)):
        AnswerFormat(family=family).grammar(ToolUse(tools=tools, choice="required"))


def test_texts_and_choices_between_tags_are_held_to_their_schema(
    tokenizer: Tokenizer, judge: Judge
):
    unit = {"type": "string", "enum": ["km", ""]}
    schema = {"type": "object", "properties": {"unit": unit, "note": {"type": "string"}}}
    use = ToolUse(tools=(replace(NOW, parameters=schema),), choice="required")
    for family in (f for f in FAMILIES if f.syntax.tags is not None):
        grammar = answers(tokenizer, family).grammar(use)
        assert (
            judge(grammar, written(family, ("now", {"unit": "km", "note": "a <b>\n\nc"})))
            == "whole"
        )
        assert judge(grammar, written(family, ("now", {"note": ""}))) == "whole"
        assert judge(grammar, written(family, ("now", {"unit": "cm"}))) == "not"


def test_what_no_grammar_can_say_is_left_out_of_a_schema_that_need_not_bind(
    tokenizer: Tokenizer, judge: Judge
):
    odd = {**SCHEMA, "not": {"required": ["b"]}}
    use = ToolUse(tools=(replace(NOW, parameters=odd),), choice="required")
    grammar = answers(tokenizer, HERMES).grammar(use)
    assert judge(grammar, written(HERMES, ("now", {"a": 1}))) == "whole"
    assert judge(grammar, written(HERMES, ("now", {"a": "x"}))) == "not"
    assert grammar is not None
    assert "lenient" in grammar.source
    strict = replace(use, tools=(replace(use.tools[0], strict=True),))
    assert "lenient" not in (answers(tokenizer, HERMES).grammar(strict) or grammar).source
