from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pals.errors import CorruptModel, InvalidGrammar
from pals.text import grammar as grammar_module
from pals.text.grammar import GrammarChecker, GrammarMasks, GuidedAnswer, Mask
from pals.text.tokenizer import Tokenizer
from pals.types import MAX_GRAMMAR_BYTES, Grammar
from tests.checkpoints import EOS_ID, START_ID, VOCAB_SIZE, write_tokenizer
from tests.unit.text.tokenizers_for_tests import save_byte_level, save_sentencepiece
from tests.waiting import wait_until

PADDED_SIZE = 300
OBJECT = Grammar(kind="json_object")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"enum": ["x", "é", 7]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SLOW_TO_COMPILE = Grammar(
    kind="json_schema",
    source=json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
)


def schema(**keywords: object) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(keywords))


def lark(source: str) -> Grammar:
    return Grammar(kind="lark", source=source)


def bits(mask: Mask | None) -> set[int]:
    assert mask is not None
    assert mask.dtype == np.uint32
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarMasks]:
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder)
    masks = GrammarMasks(folder / "tokenizer.json", PADDED_SIZE, (EOS_ID,))
    yield masks
    masks.close()


def allowed(masks: GrammarMasks, grammar: Grammar, text: bytes, stops: Sequence[int] = ()):
    """Return what may follow the bytes of an answer."""
    answer = masks.begin(grammar, stops, list(text))
    found = bits(masks.next_mask(answer))
    masks.end(answer)
    return found


def test_only_what_goes_on_with_the_grammar_is_allowed(masks: GrammarMasks):
    assert allowed(masks, OBJECT, b"") == set(b"{")
    assert allowed(masks, schema(enum=["ab", "ac"]), b'"a') == set(b"bc")
    assert allowed(masks, lark('start: "yes" | "yak"'), b"y") == set(b"ea")


def test_an_answer_ends_only_where_its_grammar_accepts(masks: GrammarMasks):
    number = schema(type="integer", minimum=1, maximum=12)

    assert EOS_ID not in allowed(masks, number, b"")
    assert allowed(masks, number, b"1") == {*b"012", EOS_ID}
    assert allowed(masks, number, b"12") == {EOS_ID}


def test_the_stop_ids_of_a_request_take_the_place_of_the_model_s(masks: GrammarMasks):
    number = schema(type="integer", minimum=1, maximum=12)

    assert allowed(masks, number, b"12", stops=[START_ID, 7]) == {START_ID, 7}
    assert allowed(masks, number, b"1", stops=[ord("2")]) == {*b"01", ord("2")}
    assert allowed(masks, number, b"", stops=[ord("1")]) == set(b"23456789")


def test_an_answer_that_nothing_stops_goes_on_ending(masks: GrammarMasks):
    answer = masks.begin(schema(const=1))
    seen = []
    for token in (ord("1"), EOS_ID, EOS_ID):
        answer.tokens.append(token)
        seen.append(bits(masks.next_mask(answer)))

    assert seen == [{EOS_ID}] * 3


def test_a_grammar_may_name_special_tokens_and_those_that_end_answers(masks: GrammarMasks):
    called = lark(f'start: "a" <[{START_ID}]> "b" <|im_end|>')

    assert allowed(masks, called, b"a") == {START_ID}
    assert allowed(masks, called, b"a") == {START_ID}
    answer = masks.begin(called, [EOS_ID], [ord("a"), START_ID, ord("b")])
    assert bits(masks.next_mask(answer)) == {EOS_ID}


def test_a_grammar_may_hold_a_schema_between_texts(masks: GrammarMasks):
    tool = lark('start: "<call>" %json {"type": "object"} "</call>"')

    assert allowed(masks, tool, b"<call>") == set(b"{")
    assert allowed(masks, tool, b"<call>{}") == set(b"<")


def test_whitespace_between_the_tokens_of_json_comes_to_an_end(masks: GrammarMasks):
    assert set(b" \n") < allowed(masks, OBJECT, b"{" + b" " * 39)
    assert allowed(masks, OBJECT, b"{" + b" " * 40) == set(b'"}')


def test_forced_tokens_are_the_only_ones_and_then_anything_goes(masks: GrammarMasks):
    answer = masks.begin(Grammar(kind="tokens", source="[70, 0, 299]"))
    first = bits(masks.next_mask(answer))
    rest = []
    for token in (70, 0):
        answer.tokens.append(token)
        rest.append(bits(masks.next_mask(answer)))
    answer.tokens.append(299)

    assert (first, *rest) == ({70}, {0}, {299})
    anything = masks.next_mask(answer)
    assert anything is not None
    assert (anything == 0xFFFFFFFF).all(), "the mask of the last token would stay"
    answer.tokens.append(5)
    assert masks.next_mask(answer) is None


# --- vocabularies --------------------------------------------------------------------


@pytest.mark.parametrize("size", [VOCAB_SIZE, PADDED_SIZE, 1024])
def test_ids_that_the_tokenizer_does_not_know_are_never_allowed(tmp_path: Path, size: int):
    write_tokenizer(tmp_path)
    masks = GrammarMasks(tmp_path / "tokenizer.json", size)
    anything = lark("start: /(.|\\n)*/")

    mask = masks.next_mask(masks.begin(anything, [EOS_ID]))

    assert mask is not None
    assert mask.shape == (-(-size // 32),)
    assert max(bits(mask)) == EOS_ID
    masks.close()


def test_ids_that_the_model_cannot_produce_are_never_allowed(tmp_path: Path):
    write_tokenizer(tmp_path)
    masks = GrammarMasks(tmp_path / "tokenizer.json", 100, (EOS_ID,))

    assert max(bits(masks.next_mask(masks.begin(schema(type="string"), [EOS_ID], [34])))) < 100
    with pytest.raises(InvalidGrammar, match="no token"):
        masks.next_mask(masks.begin(lark('start: "~"')))
    masks.close()


@pytest.mark.parametrize("kind", ["bytes", "sequence", "unstripped"])
def test_texts_of_every_kind_of_tokenizer_are_of_the_schema(tmp_path: Path, kind: str):
    folder = save_byte_level(tmp_path) if kind == "bytes" else save_sentencepiece(tmp_path, kind)
    tokenizer = Tokenizer.load(folder)
    stop = max(tokenizer.eos_token_ids)
    masks = GrammarMasks(folder / "tokenizer.json", 512)
    wanted = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
    draw = random.Random(7)

    found = []
    for _ in range(6):
        answer = masks.begin(wanted, [stop])
        while answer.tokens[-1:] != [stop]:
            answer.tokens.append(draw.choice(sorted(bits(masks.next_mask(answer)))))
        masks.end(answer)
        found.append(json.loads(tokenizer.decode(answer.tokens)))
    masks.close()

    assert all(one.keys() == {"a", "b"} and one["b"] in ("x", "é", 7) for one in found)
    assert all(len(one["a"]) <= 3 for one in found)
    assert len({one["a"] for one in found}) > 1


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        (schema(type="array", uniqueItems=True), "uniqueItems"),
        (schema(type="string", format="nonsense"), "nonsense"),
        (schema(type="string", pattern="(?=a)"), "look-ahead"),
        (schema(**{"$ref": "https://example.com/a.json"}), "example.com"),
        (schema(**{"not": {}, "x-guidance": {"lenient": True}}), "not"),
        (Grammar(kind="json_schema", source="{"), "EOF"),
        (lark("start: nowhere"), "nowhere"),
        (lark("start: <[5000]>"), "5000"),
        (schema(**{"$ref": "#"}), "NoExtension"),
        (Grammar(kind="json_schema", source='{"anyOf":[' * 3000 + "{}" + "]}" * 3000), "recursion"),
        (Grammar(kind="tokens", source="[1, 300]"), "300"),
        (Grammar(kind="tokens", source='["a"]'), "no list of ids"),
        (lark("start: " + "a" * MAX_GRAMMAR_BYTES), str(MAX_GRAMMAR_BYTES)),
        (lark('start: "\ud800"'), "surrogate"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    masks: GrammarMasks, grammar: Grammar, named: str
):
    with pytest.raises(InvalidGrammar, match=named):
        GrammarChecker(masks).check(grammar)


def test_tokens_that_are_not_of_the_grammar_are_refused(masks: GrammarMasks):
    with pytest.raises(InvalidGrammar, match="cannot be enforced"):
        masks.next_mask(masks.begin(OBJECT, (), list(b"[]")))


def test_a_model_without_a_usable_tokenizer_says_so(tmp_path: Path):
    with pytest.raises(CorruptModel, match="no such file"):
        GrammarMasks(tmp_path / "tokenizer.json", 10).next_mask(_any_answer())
    (tmp_path / "tokenizer.json").write_text('"/etc/passwd"')
    with pytest.raises(CorruptModel, match="no object"):
        GrammarMasks(tmp_path / "tokenizer.json", 10).next_mask(_any_answer())
    with pytest.raises(InvalidGrammar, match="tokenizer"):
        GrammarChecker(GrammarMasks(tmp_path / "tokenizer.json", 10)).check(OBJECT)
    save_sentencepiece(tmp_path, "metaspace")
    with pytest.raises(CorruptModel, match="decoder"):
        GrammarMasks(tmp_path / "tokenizer.json", 10).next_mask(_any_answer())


def _any_answer() -> GuidedAnswer:
    return GuidedAnswer(key=0, grammar=OBJECT, stop_token_ids=[], tokens=[])


def test_a_grammar_that_was_checked_is_not_compiled_again(masks: GrammarMasks):
    checker = GrammarChecker(masks)
    assert not checker.knows(OBJECT)
    checker.check(OBJECT)
    process = masks._child._process
    masks._child._process = None  # whoever asks would start another

    checker.check(OBJECT)

    assert checker.knows(OBJECT)
    assert masks._child._process is None
    masks._child._process = process


def test_what_was_not_asked_for_the_longest_time_is_checked_anew(
    masks: GrammarMasks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grammar_module, "MAX_CHECKED", 2)
    checker = GrammarChecker(masks)
    first, second, third = (lark(f'start: "{letter}"') for letter in "abc")
    checker.check(first)
    checker.check(second)
    assert checker.knows(first)

    checker.check(third)

    assert [checker.knows(each) for each in (first, second, third)] == [True, False, True]


# --- the process ---------------------------------------------------------------------


def child_pid(masks: GrammarMasks) -> int:
    process = masks._child._process
    assert process is not None
    call = process.stop.peek()
    assert call is not None
    return call[2][0].pid


def test_answers_go_on_in_a_new_process_where_they_were(masks: GrammarMasks):
    answers = [masks.begin(OBJECT, (), list(b'{"a')), masks.begin(schema(enum=["ab", "ac"]))]
    for answer in answers:
        masks.next_mask(answer)
    former = child_pid(masks)
    os.kill(former, 9)
    for answer in answers:
        answer.tokens += b'"'

    assert bits(masks.next_mask(answers[0])) == {*b" \t\n\r:"}
    assert bits(masks.next_mask(answers[1])) == set(b"a")
    assert child_pid(masks) != former


def test_a_grammar_that_takes_too_long_ends_alone(
    masks: GrammarMasks, monkeypatch: pytest.MonkeyPatch
):
    honest = masks.begin(OBJECT)
    masks.next_mask(honest)
    monkeypatch.setattr(grammar_module, "BEGIN_DEADLINE_S", 0.02)
    with pytest.raises(InvalidGrammar, match="no result within"):
        masks.next_mask(masks.begin(SLOW_TO_COMPILE))
    monkeypatch.undo()
    honest.tokens += b"{"

    assert set(b'"}') < bits(masks.next_mask(honest))


def test_an_answer_whose_tokens_take_long_again_and_again_is_given_up(
    masks: GrammarMasks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grammar_module, "TOKEN_S", 0.0)
    answer = masks.begin(OBJECT)
    masks.next_mask(answer)
    answer.spent_s = grammar_module.BEGIN_DEADLINE_S
    answer.tokens += b"{"

    with pytest.raises(InvalidGrammar, match="1 tokens took"):
        masks.next_mask(answer)


def test_closing_waits_for_no_grammar(masks: GrammarMasks):
    masks.next_mask(masks.begin(OBJECT))
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(masks.next_mask, masks.begin(SLOW_TO_COMPILE))
        wait_until(masks._child._lock.locked)
        masks.close()
        with pytest.raises(InvalidGrammar, match="was ended"):
            asked.result()

    assert bits(masks.next_mask(masks.begin(OBJECT))) == set(b"{")


def test_what_the_process_holds_of_answers_that_are_over_is_given_back(masks: GrammarMasks):
    answer = masks.begin(OBJECT)
    masks.next_mask(answer)
    masks.end(answer)
    masks.next_mask(masks.begin(OBJECT))  # takes the news along

    answer.tokens += b"{"
    text = masks._ask(answer, answer.tokens)

    assert text == ""
