"""`pals run`: talk to a model of the swarm in the terminal."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from pals.cli import console
from pals.cli.app import EXIT_TERMINATED
from pals.cli.interrupt import exiting_on_termination
from pals.cli.options import Json
from pals.cli.process import (
    NO_SERVER_OPTIONS,
    NO_SHARD_OPTIONS,
    Member,
    ServedRole,
    ServerOptions,
    ShardOptions,
    configure_logging,
    load_member,
)
from pals.errors import InvalidConfig
from pals.settings import Settings

if TYPE_CHECKING:
    from pals.cli.chat.conversation import Conversation
    from pals.driver.interface import Driver

HISTORY_NAME = "chat_history.json"
MAX_PROMPT_CHARS = 1 << 20


def run(
    model: str | None = None,
    prompt: str | None = None,
    /,
    *,
    system: str = "",
    temperature: Annotated[float, Parameter(validator=validators.Number(gte=0, lte=2))] = 1.0,
    top_p: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=1))] = 1.0,
    seed: int | None = None,
    max_tokens: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    history: bool = True,
    layers: str | None = None,
    shard_options: ShardOptions = NO_SHARD_OPTIONS,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> None:
    """Talk to a model of the swarm in the terminal.

    With a prompt, or with text on standard input, it answers once and ends; other users of
    the machine can read a prompt that is given as an argument. Otherwise it is a conversation:
    `/help` shows its commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Args:
        model: Model name or folder; the swarm's model when left out.
        prompt: What to ask; text on standard input comes after it.
        system: How the model is to behave.
        temperature: 0 takes the likeliest token each time.
        top_p: Probability mass to choose from.
        seed: Start of the random stream.
        max_tokens: Most tokens of an answer; what the context has left when left out.
        history: Keep what is typed for another time, in a private file of the profile.
        layers: Also serve this range of layers, such as `0:10`; `auto` chooses.
        shard_options: Options of the shard, with `--layers`.
        options: Options of the member.
        json: Print the answer as one JSON document on standard output; needs a prompt.
    """
    configure_logging(verbose=options.verbose)
    from pals.cli.chat.conversation import Conversation
    from pals.driver.interface import GenerateParams

    shard_options.check_also(layers)
    settings = options.load_settings()
    member = load_member(options.profile, options.swarm)
    text = _question(prompt, must=json)
    model = model or member.entry.model
    also = shard_options.make_also(model, layers, settings.shard, json=False)
    params = GenerateParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    conversation = Conversation(params=params, system=system)
    with exiting_on_termination(EXIT_TERMINATED), _opened(member, settings, model, also) as driver:
        if text is not None:
            _answer_once(driver, conversation, text, json=json)
        else:
            _talk(driver, conversation, member.profile.path / HISTORY_NAME if history else None)


@contextmanager
def _opened(
    member: Member, settings: Settings, model: str, also: ServedRole | None
) -> Generator[Driver]:
    """Drive the model until the block ends; a shard beside it then leaves in order."""
    from pals.cli.endpoint import Drive, open_endpoint

    drive = Drive(models=(model,), also=also)
    with (
        member.profile.lock(),
        open_endpoint(member, settings, drive, on_crash=lambda: None) as endpoint,
    ):
        (driver,) = endpoint.drivers.values()
        try:
            yield driver
        finally:
            if endpoint.shard is not None:
                endpoint.shard.leave()
                endpoint.shard.wait_until_left()


def _question(prompt: str | None, *, must: bool) -> str | None:
    """Return what is asked once: the prompt, and what is piped in; None to talk instead.

    Args:
        prompt: Of the command line.
        must: There has to be something, as for `--json`.

    Raises:
        InvalidConfig: It is too long, or empty.
    """
    piped = _read_piped() if _is_piped() else ""
    text = "\n\n".join(part for part in (prompt or "", piped.strip("\n")) if part)
    if text or (prompt is None and sys.stdin.isatty() and not must):
        return text or None
    raise InvalidConfig(
        source="the prompt", problem="it is empty", advice="write one, or pipe it in"
    )


def _is_piped() -> bool:
    """Return whether standard input is a pipe or a file, which somebody means to be read."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_piped() -> str:
    text = sys.stdin.read(MAX_PROMPT_CHARS + 1)
    if len(text) > MAX_PROMPT_CHARS:
        raise InvalidConfig(
            source="standard input",
            problem=f"it has more than {MAX_PROMPT_CHARS} characters",
            advice="send a shorter text",
        )
    return text


def _answer_once(driver: Driver, conversation: Conversation, text: str, *, json: bool) -> None:
    from pals.cli.chat.turns import Answer, Shown, show_nothing, stream_answer

    answer, shown = Answer(), Shown()
    show = show_nothing if json else shown.add
    try:
        asyncio.run(stream_answer(driver, conversation, text, answer, show=show))
    finally:
        shown.end()
    if json:
        console.json(answer.document(driver.model_id))
    else:
        console.out("")


def _talk(driver: Driver, conversation: Conversation, kept: Path | None) -> None:
    from pals.cli.chat.terminal import History, Terminal
    from pals.cli.chat.turns import Chat

    console.note(f"{driver.model_id}: `/help` shows the commands, Ctrl-D leaves")
    with asyncio.Runner() as runner:
        Chat(driver, conversation, Terminal(History(kept)), runner).run()
