"""The turns of `pals run`: a question in, an answer out as it comes, Ctrl-C between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pals import config
from pals.cli import console
from pals.cli.chat.conversation import COMMANDS, BadCommand, Command, Conversation, parse_line
from pals.cli.chat.terminal import Terminal
from pals.driver.interface import Completion, Driver
from pals.errors import PalsError
from pals.text.answers.pieces import Content, Piece, Reasoning

QUIET_S = 1.0
"""Seconds before anybody is told that the first token is awaited."""


@dataclass(slots=True)
class Answer:
    """An answer as far as it came.

    Attributes:
        pieces: Its text.
        thoughts: What the model wrote to itself first.
        completion: Where it comes from; None before a chain took it.
        finish_reason: Why it ended; empty while it has not.
        first_s: Seconds until the first token.
        seconds: That it took in all.
    """

    pieces: list[str] = field(default_factory=list[str])
    thoughts: list[str] = field(default_factory=list[str])
    completion: Completion | None = None
    finish_reason: str = ""
    first_s: float = 0.0
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def document(self, model: str) -> dict[str, object]:
        """Return what programs are told of it."""
        made = self.completion
        return {
            "schema": 1,
            "model": model,
            "text": self.text,
            "reasoning": "".join(self.thoughts),
            "finish_reason": self.finish_reason,
            "prompt_tokens": 0 if made is None else made.prompt_tokens,
            "completion_tokens": 0 if made is None else made.completion_tokens,
            "route": [] if made is None else list(made.route),
            "time_to_first_token_s": round(self.first_s, 3),
            "seconds": round(self.seconds, 3),
        }


async def stream_answer(
    driver: Driver,
    conversation: Conversation,
    text: str,
    answer: Answer,
    *,
    show: Callable[[Piece], None],
) -> None:
    """Ask the driver, show what comes, and keep it in ``answer``, also when cancelled.

    Raises:
        PalsError: As `pals.driver.interface.Driver.chat`, or the session failed on the way.
    """
    started_s = time.perf_counter()
    loop = asyncio.get_running_loop()
    notice = loop.call_later(QUIET_S, console.note, "waiting for the first token")
    try:
        answer.completion = await driver.chat(conversation.messages(text), conversation.params)
        async for delta in answer.completion:
            notice.cancel()
            answer.first_s = answer.first_s or time.perf_counter() - started_s
            answer.finish_reason = delta.finish_reason or ""
            for piece in delta.pieces:
                if isinstance(piece, Content):
                    answer.pieces.append(piece.text)
                elif isinstance(piece, Reasoning):
                    answer.thoughts.append(piece.text)
                show(piece)
    finally:
        notice.cancel()
        answer.seconds = time.perf_counter() - started_s
        if answer.completion is not None:
            await answer.completion.aclose()


class Chat:
    """A conversation at the terminal, turn by turn.

    Args:
        driver: Who answers.
        conversation: What was said so far.
        terminal: The user.
        runner: Runs the answers, on the main thread, which takes Ctrl-C.
    """

    def __init__(
        self,
        driver: Driver,
        conversation: Conversation,
        terminal: Terminal,
        runner: asyncio.Runner,
    ) -> None:
        self._driver = driver
        self._conversation = conversation
        self._terminal = terminal
        self._runner = runner
        self._last: Answer | None = None
        self._is_warned = False

    def run(self) -> None:
        """Talk until the user leaves.

        Raises:
            KeyboardInterrupt: The user left by Ctrl-C, twice at an empty prompt.
        """
        while True:
            try:
                text = self._terminal.read()
            except EOFError:
                console.note("")
                return
            except KeyboardInterrupt:
                self._interrupt()
                continue
            self._is_warned = False
            if text.strip() and not self._take(text):
                return

    def _interrupt(self) -> None:
        """End the line; the second time in a row at an empty one, the program."""
        console.note("")
        if self._terminal.has_text:
            self._is_warned = False
            return
        if self._is_warned:
            raise KeyboardInterrupt
        self._is_warned = True
        console.note("press Ctrl-C again, or Ctrl-D, to leave")

    def _take(self, text: str) -> bool:
        """Follow one line; return whether to go on."""
        try:
            taken = parse_line(text)
            if isinstance(taken, Command):
                return self._follow(taken)
        except BadCommand as error:
            console.note(str(error))
            return True
        self._answer(taken)
        return True

    def _answer(self, text: str) -> None:
        answer, shown = Answer(), Shown()
        self._last = answer
        streaming = stream_answer(self._driver, self._conversation, text, answer, show=shown.add)
        try:
            self._runner.run(streaming)
        except KeyboardInterrupt:
            answer.finish_reason = "stopped"
        except PalsError as error:
            shown.end()
            console.error(error)
        finally:
            shown.end()
            if answer.text:
                console.out("\n")
        if answer.finish_reason == "stopped":
            console.note("stopped")
        self._conversation.add(text, answer.text)

    def _follow(self, command: Command) -> bool:
        match command.name:
            case "/exit":
                return False
            case "/help":
                _print_help()
            case "/clear":
                self._conversation.turns.clear()
            case "/system":
                self._conversation.system = command.argument
            case "/set":
                self._set(command.argument)
            case "/save":
                self._save(command.argument)
            case _:
                self._print_info()
        return True

    def _set(self, argument: str) -> None:
        if argument:
            self._conversation.set(argument)
            return
        for name, value in self._conversation.settings().items():
            console.note(f"{name:<12} {'none' if value is None else value}")

    def _save(self, argument: str) -> None:
        if not argument:
            raise BadCommand("name a new file: `/save FILE`")
        path = Path(argument).expanduser()
        document = self._conversation.document(self._driver.model_id)
        try:
            config.create_private(path, msgspec.json.format(msgspec.json.encode(document)) + b"\n")
        except OSError as error:
            problem = error.strerror or str(error)
            raise BadCommand(f"`{path}` cannot be written: {problem}") from None
        console.note(f"saved to `{path}`")

    def _print_info(self) -> None:
        console.note(f"model        {self._driver.model_id}")
        console.note(f"turns        {len(self._conversation.turns) // 2}")
        made = None if self._last is None else self._last.completion
        if self._last is None or made is None:
            return
        console.note(f"tokens       {made.prompt_tokens} in, {made.completion_tokens} out")
        console.note(f"first token  {self._last.first_s:.2f} s of {self._last.seconds:.2f} s")
        console.note(f"route        {' -> '.join(made.route)}")


def _print_help() -> None:
    for command, summary in COMMANDS.items():
        console.note(f"{command:<18} {summary}")
    console.note("")
    console.note('a line that ends in \\ goes on in the next; `"""` begins and ends several lines')
    console.note("Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice, leaves")


class Shown:
    """An answer on the terminal: text as data, what the model writes to itself as an aside."""

    def __init__(self) -> None:
        self._in_thoughts = False

    def add(self, piece: Piece) -> None:
        """Show what came, a blank line after the thoughts."""
        if isinstance(piece, Content) and piece.text:
            self.end("\n\n")
            console.out(piece.text, end="")
        elif isinstance(piece, Reasoning) and piece.text:
            console.aside(piece.text)
            self._in_thoughts = True

    def end(self, gap: str = "\n") -> None:
        """End the line of the thoughts, where the answer has got no further."""
        if self._in_thoughts:
            console.aside(gap)
        self._in_thoughts = False


def show_nothing(_: Piece) -> None:
    """Show nothing: the answer is printed whole."""
