import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.text.stop import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """Push every piece as a driver does: it ends at a hit, else it takes what is held."""
    watcher = StopStrings(stops)
    emitted = ""
    for piece in pieces:
        text, hit = watcher.push(piece)
        emitted += text
        if hit:
            return emitted, True
    return emitted + watcher.finish(), False


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """Say the rule directly: the first prefix that ends in a stop, less that stop."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def test_a_stop_that_is_cut_by_a_token_border_is_found():
    assert run(["END"], ["so it E", "N", "D and more"]) == ("so it ", True)


def test_text_that_only_begins_like_a_stop_is_given_back_once_it_is_certain():
    watcher = StopStrings(["END"])
    assert watcher.push("the E") == ("the ", False)
    assert watcher.push("N") == ("", False)
    assert watcher.push("T") == ("ENT", False)


def test_what_is_held_at_the_end_is_not_lost():
    watcher = StopStrings(["\n\n"])
    assert watcher.push("a\n") == ("a", False)
    assert watcher.finish() == "\n"
    assert watcher.finish() == ""


def test_the_stop_that_completes_first_wins():
    assert run(["abcd", "bc"], ["abcd"]) == ("a", True)


def test_of_stops_that_complete_together_the_longest_is_cut_out():
    assert run(["c", "abc"], ["xabc"]) == ("x", True)


def test_nothing_is_emitted_after_a_hit():
    watcher = StopStrings(["."])
    assert watcher.push("a.b") == ("a", True)
    assert watcher.push("c") == ("", True)
    assert watcher.finish() == ""


def test_without_stops_every_piece_passes_at_once():
    assert StopStrings([]).push("abc") == ("abc", False)


def test_an_empty_stop_string_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError):
        StopStrings([""])


small_text = st.text(alphabet="ab\n", max_size=5)


@given(
    stops=st.lists(small_text.filter(bool), max_size=4),
    pieces=st.lists(small_text, max_size=8),
)
def test_the_result_depends_on_the_text_and_not_on_its_pieces(stops: list[str], pieces: list[str]):
    assert run(stops, pieces) == expected(stops, "".join(pieces))


@given(
    stops=st.lists(small_text.filter(bool), min_size=1, max_size=4),
    pieces=st.lists(small_text, max_size=8),
)
def test_a_stop_that_may_still_complete_is_held_whole(stops: list[str], pieces: list[str]):
    watcher = StopStrings(stops)
    seen = emitted = ""
    for piece in pieces:
        text, hit = watcher.push(piece)
        seen, emitted = seen + piece, emitted + text
        if hit:
            break
        held = len(seen) - len(emitted)
        begun = [n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
        assert held == max(begun, default=0)
