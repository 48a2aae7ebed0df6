"""A conversation at the terminal, its settings and its commands. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from pals.driver.interface import GenerateParams, Message

COMMANDS: Mapping[str, str] = {
    "/help": "show the commands",
    "/system [TEXT]": "tell the model how to behave from now on; without TEXT, no longer",
    "/set [NAME VALUE]": "set temperature, top_p, seed or max_tokens; `none` takes it back",
    "/clear": "forget what was said; the system text and the settings stay",
    "/save FILE": "write the conversation to a new file, as JSON",
    "/info": "show the model, and how the last answer came",
    "/exit": "leave, as Ctrl-D does",
}
"""Each command with its arguments, and what it does."""

NAMES = tuple(command.split()[0] for command in COMMANDS)


class BadCommand(Exception):
    """A command that cannot be followed; the text says why, and what to write instead."""


@dataclass(frozen=True, slots=True)
class Command:
    """A line that is no turn of the conversation."""

    name: str
    argument: str


def parse_line(text: str) -> Command | str:
    """Return the command in a line, or the line itself, which a space before ``/`` makes text.

    Raises:
        BadCommand: There is no such command.
    """
    if not text.startswith("/"):
        return text.strip()
    name, _, argument = text.partition(" ")
    if name not in NAMES:
        nearest = get_close_matches(name, NAMES, n=1)
        advice = f"did you mean `{nearest[0]}`?" if nearest else "`/help` shows them"
        raise BadCommand(f"no command `{name}`: {advice}")
    return Command(name, argument.strip())


@dataclass(slots=True)
class Conversation:
    """What was said, and how the next answer is made.

    Attributes:
        params: How answers are made.
        system: How the model is to behave; empty for nothing.
        turns: Of the user and the assistant, in turn.
    """

    params: GenerateParams = field(default_factory=GenerateParams)
    system: str = ""
    turns: list[Message] = field(default_factory=list[Message])

    def messages(self, text: str) -> list[Message]:
        """Return what the model is sent when the user says ``text``."""
        system = [Message(role="system", content=self.system)] if self.system else []
        return [*system, *self.turns, Message(role="user", content=text)]

    def add(self, text: str, answer: str) -> None:
        """Keep a turn and its answer; without any answer it was not said."""
        if answer:
            said = Message(role="user", content=text)
            self.turns += [said, Message(role="assistant", content=answer)]

    def set(self, argument: str) -> None:
        """Follow `/set NAME VALUE`.

        Raises:
            BadCommand: There is no such setting, or it cannot have that value.
        """
        name, _, value = argument.partition(" ")
        reader = _READERS.get(name)
        if reader is None:
            raise BadCommand(f"no setting `{name}`: choose one of {', '.join(_READERS)}")
        if value.strip() == "none":
            self.params = replace(self.params, **{name: getattr(GenerateParams(), name)})
            return
        try:
            self.params = replace(self.params, **{name: reader(value.strip())})
        except ValueError as error:
            raise BadCommand(f"`{name}` cannot be `{value.strip()}`: {error}") from None

    def settings(self) -> dict[str, object]:
        """Return the settings as they stand."""
        return {name: getattr(self.params, name) for name in _READERS}

    def document(self, model: str) -> dict[str, object]:
        """Return the conversation as it is saved."""
        turns = [{"role": m.role, "content": m.content} for m in self.turns]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"schema": 1, "model": model, "messages": system + turns}


def read_temperature(text: str) -> float:
    """Read a temperature; raise `ValueError` when it is none."""
    return _within(float(text), 0.0, 2.0)


def read_top_p(text: str) -> float:
    """Read a probability mass above 0; raise `ValueError` when it is none."""
    value = _within(float(text), 0.0, 1.0)
    if value == 0.0:
        raise ValueError("it has to be above 0")
    return value


def _read_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("it has to be at least 1")
    return value


def _within(value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise ValueError(f"it has to be within {least:g} and {most:g}")
    return value


_READERS: Mapping[str, Callable[[str], float | int]] = {
    "temperature": read_temperature,
    "top_p": read_top_p,
    "seed": int,
    "max_tokens": _read_count,
}
