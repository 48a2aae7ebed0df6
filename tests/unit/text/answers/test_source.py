import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.text.answers.pieces import Content, Piece, Reasoning, ToolArguments, ToolCall
from pals.text.answers.source import (
    MAX_GAP_CHARACTERS,
    Reader,
    ReaderParser,
    Source,
    skip_space,
    take_mark,
    until,
)

MARKS = ("<a>", "<bb>")


def source_of(text: str, *, ended: bool = False, strays: tuple[str, ...] = ()) -> Source:
    source = Source(strays)
    source.text, source.ended = text, ended
    return source


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x<a>y", (1, "<a>")),
        ("x<bb><a>", (1, "<bb>")),
        ("x<b", (1, None)),
        ("x<c", (3, None)),
        ("<", (0, None)),
        ("", (0, None)),
    ],
)
def test_text_is_certain_up_to_what_may_become_a_mark(text: str, found: tuple[int, str | None]):
    assert source_of(text).look(MARKS) == found


def test_at_the_end_nothing_becomes_a_mark():
    assert source_of("x<b", ended=True).look(MARKS) == (3, None)


def run(reader: Reader[object]) -> list[Piece | None]:
    """Return what a reader yields until it wants more text, and None if it does."""
    out: list[Piece | None] = []
    for piece in reader:
        out.append(piece)
        if piece is None:
            break
    return out


def test_white_space_before_a_mark_is_left_out_and_any_other_comes():
    source = source_of("a b \n<a>c")
    assert run(until(source, MARKS, Content)) == [Content("a b")]
    assert source.text == "c"


def test_white_space_at_the_end_is_not_lost():
    pieces = run(until(source_of("a \n", ended=True), MARKS, Content))
    assert pieces == [Content("a \n")]


def test_white_space_is_held_back_only_so_long():
    source = source_of("a" + "\n" * (MAX_GAP_CHARACTERS + 3))
    assert run(until(source, MARKS, Content)) == [Content("a\n\n\n"), None]


def test_without_marks_all_comes_at_once():
    assert run(until(source_of("a <b \n"), (), Content)) == [Content("a <b \n"), None]


def test_a_stray_special_token_is_dropped():
    source = source_of("a<s> b<a>", strays=("<s>",))
    assert run(until(source, MARKS, Reasoning)) == [Reasoning("a"), Reasoning(" b")]


@pytest.mark.parametrize(
    ("text", "ended", "taken", "left"),
    [
        ("  <a>x", False, True, "x"),
        ("  <b>x", False, False, "  <b>x"),
        ("  <", True, False, "  <"),
        (
            " " * (MAX_GAP_CHARACTERS + 1) + "<a>",
            False,
            False,
            " " * (MAX_GAP_CHARACTERS + 1) + "<a>",
        ),
    ],
)
def test_a_mark_is_taken_only_if_it_is_next(text: str, ended: bool, taken: bool, left: str):
    source = source_of(text, ended=ended)
    results: list[bool] = []

    def reader() -> Reader[None]:
        results.append((yield from take_mark(source, "<a>")))

    run(reader())
    assert (results, source.text) == ([taken], left)


def test_a_mark_that_is_only_begun_is_waited_for():
    assert run(take_mark(source_of(" <"), "<a>")) == [None]


def test_white_space_is_skipped_up_to_the_next_character():
    source = source_of(" \n x ")
    assert run(skip_space(source)) == []
    assert source.text == "x "
    assert run(skip_space(source_of("  "))) == [None]


def test_pieces_of_one_push_that_belong_together_are_joined():
    source = Source()

    def reader() -> Reader[None]:
        yield Content("a")
        yield Content("b")
        yield ToolCall(0, "id", "f")
        yield ToolArguments(0, "{")
        yield ToolArguments(0, "}")
        yield Reasoning("c")
        yield Reasoning("d")

    parser = ReaderParser(source, reader())
    assert parser.push("") == [
        Content("ab"),
        ToolCall(0, "id", "f"),
        ToolArguments(0, "{}"),
        Reasoning("cd"),
    ]
    assert parser.ended
    assert parser.push("more") == parser.finish() == []


@given(st.lists(st.text(alphabet="<ab> \n", max_size=6), max_size=8))
def test_what_comes_before_marks_depends_on_the_text_alone(parts: list[str]):
    def read(pushed: list[str]) -> str:
        source = Source()

        def reader() -> Reader[None]:
            while (yield from until(source, MARKS, Content)) is not None:
                yield Content("|")

        parser = ReaderParser(source, reader())
        pieces = [piece for part in pushed for piece in parser.push(part)] + parser.finish()
        return "".join(piece.text for piece in pieces if isinstance(piece, Content))

    assert read(parts) == read(["".join(parts)])
