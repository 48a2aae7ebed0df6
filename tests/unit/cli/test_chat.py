"""The conversation of `pals run`, turn by turn, with a driver and a user that play a script."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pals.cli.chat.conversation import BadCommand, Command, Conversation, parse_line
from pals.cli.chat.terminal import MAX_HISTORY, History, Terminal
from pals.cli.chat.turns import Answer, Chat, stream_answer
from pals.driver.interface import Delta, GenerateParams
from pals.errors import InvalidConfig, NoChain, ProfileExposed, ShardLost
from pals.text.answers.pieces import Content, Piece, Reasoning
from tests.fakes import FakeDriver

LOST = ShardLost(peer="p", layers="0:2", problem="gone")


class User:
    """Types lines; an exception among them is what the terminal raises then."""

    def __init__(self, lines: Iterable[str | BaseException]) -> None:
        self._lines = iter(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


def terminal(*lines: str | BaseException, path: Path | None = None) -> Terminal:
    return Terminal(History(path), User(lines))


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


def talk(runner: asyncio.Runner, driver: FakeDriver, *lines: str | BaseException) -> Conversation:
    conversation = Conversation()
    Chat(driver, conversation, terminal(*lines), runner).run()
    return conversation


def asked(driver: FakeDriver) -> list[list[tuple[str, str | None]]]:
    return [[(m.role, m.content) for m in messages] for messages, _ in driver.calls]


# --- lines ---------------------------------------------------------------------------


def test_a_line_is_a_command_only_when_it_begins_with_a_slash() -> None:
    assert parse_line("/set temperature 0") == Command("/set", "temperature 0")
    assert parse_line(" /etc/passwd is a file\n") == "/etc/passwd is a file"


@pytest.mark.parametrize(
    ("line", "advice"), [("/hlep", "did you mean `/help`?"), ("/xyzzy", "`/help` shows them")]
)
def test_an_unknown_command_says_what_was_meant(line: str, advice: str) -> None:
    with pytest.raises(BadCommand, match=r"no command `/\w+`: ") as caught:
        parse_line(line)

    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""', "one", "", 'two"""'], "one\n\ntwo"),
        (['"""one', "two", '"""'], "one\ntwo"),
        (['"""one"""'], "one"),
    ],
)
def test_a_turn_may_have_several_lines(lines: list[str], text: str) -> None:
    assert terminal(*lines).read() == text


def test_the_end_of_input_inside_several_lines_is_the_end() -> None:
    with pytest.raises(EOFError):
        terminal('"""', "one").read()


# --- settings ------------------------------------------------------------------------


def test_settings_are_set_shown_and_taken_back() -> None:
    conversation = Conversation()
    for line in ("temperature 0.5", "top_p 0.9", "seed 7", "max_tokens 12"):
        conversation.set(line)

    assert conversation.params == GenerateParams(temperature=0.5, top_p=0.9, seed=7, max_tokens=12)
    conversation.set("temperature none")
    assert conversation.settings()["temperature"] == GenerateParams().temperature


@pytest.mark.parametrize(
    "line",
    ["temperature 3", "temperature", "top_p 0", "seed x", "max_tokens 0", "top_p nan", "tmp 1", ""],
)
def test_a_setting_that_cannot_be_changes_nothing(line: str) -> None:
    conversation = Conversation()
    with pytest.raises(BadCommand):
        conversation.set(line)

    assert conversation.params == GenerateParams()


# --- turns ---------------------------------------------------------------------------


def test_each_turn_is_sent_with_those_before_it(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = FakeDriver()

    conversation = talk(runner, driver, "/system be kind", "one", "", "two")

    system, one = ("system", "be kind"), ("user", "one")
    hello, two = ("assistant", "Hello!"), ("user", "two")
    assert asked(driver) == [[system, one], [system, one, hello, two]]
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 2
    assert capsys.readouterr().out == "Hello!\n\n" * 2
    assert all(completion.closed.is_set() for completion in driver.completions)


def test_what_the_model_writes_to_itself_is_an_aside_and_no_part_of_the_turn(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = Delta(pieces=(Reasoning("hm\x1b["), Content("yes")))

    conversation = talk(runner, FakeDriver([thought]), "one")

    captured = capsys.readouterr()
    assert captured.out == "yes\n\n"
    assert "hm\ufffd[\n\n" in captured.err
    assert conversation.turns[-1].content == "yes"


def test_thoughts_that_lead_to_no_answer_end_their_line(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    thoughts = [Delta(pieces=(Reasoning("hm"),)), Delta(pieces=(Reasoning(", well"), Content("")))]

    talk(runner, FakeDriver(thoughts), "one")
    whole = capsys.readouterr()
    talk(runner, FakeDriver(thoughts, end=LOST), "one")
    broken = capsys.readouterr()

    assert (whole.out, broken.out) == ("", "")
    assert whole.err.startswith("hm, well\n")
    assert broken.err.startswith("hm, well\nerror: ")


def test_clear_forgets_the_turns_and_keeps_the_rest(runner: asyncio.Runner) -> None:
    driver = FakeDriver()

    talk(runner, driver, "/system be kind", "/set seed 3", "one", "/clear", "two")

    assert asked(driver)[1] == [("system", "be kind"), ("user", "two")]
    assert driver.calls[1][1].seed == 3


def test_exit_leaves_and_nothing_after_it_is_asked(runner: asyncio.Runner) -> None:
    driver = FakeDriver()

    talk(runner, driver, "/exit", "one")

    assert driver.calls == []


def test_a_failed_turn_is_told_and_was_not_said(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = FakeDriver()
    driver.refusal = NoChain(model="m", missing="0:2")

    conversation = talk(runner, driver, "one")

    assert conversation.turns == []
    assert "hint: start one with `pals shard m --layers 0:2`" in capsys.readouterr().err


def test_an_answer_that_breaks_off_is_kept_as_far_as_it_came(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(runner, FakeDriver(["Hel", "lo"], end=LOST), "one")

    assert [turn.content for turn in conversation.turns] == ["one", "Hello"]
    assert "error: " in capsys.readouterr().err


def test_a_bad_command_ends_nothing(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = FakeDriver()

    talk(runner, driver, "/hlep", "/set tmp 1", "/save", "/help", "/info", "/set", "one", "/info")

    err = capsys.readouterr().err
    assert "did you mean `/help`?" in err
    assert "no setting `tmp`" in err
    assert "`/save FILE`" in err
    assert "peer-a[0:2] -> peer-b[2:4]" in err
    assert len(driver.calls) == 1


def test_ctrl_c_at_an_empty_prompt_leaves_only_the_second_time_in_a_row(
    runner: asyncio.Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, interrupt = FakeDriver(), KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt):
        talk(runner, driver, interrupt, "one", interrupt, interrupt, "two")

    assert [messages[-1] for messages in asked(driver)] == [("user", "one")]
    assert capsys.readouterr().err.count("press Ctrl-C again") == 2


def test_a_cancelled_answer_is_closed_and_keeps_what_came() -> None:
    driver, answer = FakeDriver(["Hel", "lo"], end=None), Answer()

    async def cancel_after(pieces: int) -> None:
        seen = asyncio.Event()

        def show(_: Piece) -> None:
            if len(answer.pieces) == pieces:
                seen.set()

        streaming = asyncio.ensure_future(
            stream_answer(driver, Conversation(), "one", answer, show=show)
        )
        await seen.wait()
        streaming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await streaming

    asyncio.run(cancel_after(2))

    assert answer.text == "Hello"
    assert driver.completions[0].closed.is_set()


# --- what is kept --------------------------------------------------------------------


def test_a_conversation_is_saved_whole_private_and_over_nothing(
    runner: asyncio.Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.json"

    talk(runner, FakeDriver(), "/system be kind", "one", f"/save {path}", f"/save {path}")

    saved = json.loads(path.read_text())
    assert (saved["schema"], saved["model"]) == (1, "test/tiny")
    assert [turn["content"] for turn in saved["messages"]] == ["be kind", "one", "Hello!"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "cannot be written: File exists" in capsys.readouterr().err


def test_history_is_private_kept_for_another_time_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "history.json"
    history = History(path)
    for number in range(MAX_HISTORY + 1):
        history.add(f"turn {number}\nof two lines")
    history.add(f"turn {MAX_HISTORY}\nof two lines")

    entries = History(path).load()

    assert len(entries) == MAX_HISTORY
    assert entries[0] == "turn 1\nof two lines"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_history_gives_way_to_long_turns(tmp_path: Path) -> None:
    history = History(tmp_path / "history.json")
    for letter in "abc":
        history.add(letter * 500_000)

    assert [entry[0] for entry in History(tmp_path / "history.json").load()] == ["b", "c"]


def test_without_a_path_nothing_is_kept(tmp_path: Path) -> None:
    history = History(None)
    history.add("one")

    assert history.load() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", '[{"a":1}]', "[" + '"a",' * MAX_HISTORY + '"a"]'])
def test_damaged_history_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "history.json"
    path.touch(mode=0o600)
    path.write_text(text)

    with pytest.raises(InvalidConfig, match=r"history\.json"):
        History(path).load()


def test_history_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    path.write_text("[]")
    path.chmod(0o644)

    with pytest.raises(ProfileExposed):
        History(path).load()
