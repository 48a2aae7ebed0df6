import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.text.answers.json_scan import (
    MAX_DEPTH,
    MAX_SCALAR_CHARACTERS,
    JsonScanner,
    parse_json,
    write_json,
)

TEXTS = st.text('a"\\é\n', max_size=6)
LEAVES = st.sampled_from([None, True, 0, -7, 0.5, -1e30]) | TEXTS
KEYS = st.text('ab"', max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
CONTAINERS = st.lists(VALUES, max_size=3) | st.dictionaries(KEYS, VALUES, max_size=3)


def is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), str | list | dict)
    except ValueError:
        return False


def scan(text: str) -> tuple[JsonScanner, int, str]:
    scanner = JsonScanner()
    size, written = scanner.push(text)
    return scanner, size, written


@settings(max_examples=50)
@given(CONTAINERS, st.sampled_from([None, 1]), st.booleans())
def test_a_value_is_followed_to_its_end_and_not_beyond(
    value: object, indent: int | None, ascii_only: bool
):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    scanner, size, written = scan(text + ', "more": 1}')
    assert scanner.done
    assert not scanner.failed
    assert (size, written) == (len(text), text)


@settings(max_examples=50)
@given(st.data())
def test_it_takes_what_a_json_library_takes(data: st.DataObject):
    text = json.dumps(data.draw(CONTAINERS))
    at = data.draw(st.integers(0, len(text)))
    gone = data.draw(st.integers(0, 2))
    text = (
        text[:at]
        + data.draw(st.text('{}[]",:\\u0123abtrue-+.eE \n', max_size=3))
        + text[at + gone :]
    )
    text = text.strip()

    scanner, size, _ = scan(text)

    assert (scanner.done and not scanner.failed and size == len(text)) == is_json(text)


@settings(max_examples=50)
@given(CONTAINERS, st.integers(1, 5))
def test_pieces_make_no_difference(value: object, step: int):
    text = json.dumps(value)
    scanner = JsonScanner()
    written = "".join(scanner.push(text[at : at + step])[1] for at in range(0, len(text), step))
    assert written == text
    assert scanner.done


def test_control_characters_in_strings_are_escaped():
    scanner, _, written = scan('{"a\n": "\t"}')
    assert scanner.done
    assert json.loads(written) == {"a\n": "\t"}


@pytest.mark.parametrize(
    "text", ["{a", "{,", "[1,]", "[1 2", '{"a" 1', '{"a":,', '["\\x', '["\\u12g', "[01]", "[}", "]"]
)
def test_what_is_no_json_fails_where_it_goes_wrong(text: str):
    scanner, size, written = scan(text)
    assert scanner.failed
    assert not scanner.done
    assert text.startswith(written)
    assert size < len(text)


def test_it_remembers_only_so_much():
    deep, _, _ = scan("[" * (MAX_DEPTH + 1))
    long, _, _ = scan("[" + "1" * (MAX_SCALAR_CHARACTERS + 1))
    assert deep.failed
    assert long.failed
    assert scan("[" * MAX_DEPTH + "]" * MAX_DEPTH)[0].done


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "{", "[" * 100_000, "", "'a'"])
def test_what_is_no_json_has_no_value(text: str):
    with pytest.raises(ValueError):
        parse_json(text)


def test_text_is_written_as_it_is_unless_it_could_not_be_sent():
    assert write_json({"é": "\n"}) == '{"é": "\\n"}'
    assert write_json(["é\ud800"]) == '["\\u00e9\\ud800"]'
