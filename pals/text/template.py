"""The model's chat template, rendered in a child process.

A template is a program that came with the weights. Jinja's sandbox keeps it from
reaching Python, but not from looping for hours or asking for gigabytes, so that it runs
in a process with limits (`sandbox`), which is killed when it exceeds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec

from pals.errors import CorruptModel, InvalidText, TemplateError
from pals.text.child import TextChild
from pals.text.files import load_settings, load_special_tokens, load_text
from pals.text.sandbox import LOAD_TEMPLATE, RENDER

MAX_TEMPLATE_BYTES = 1 << 20
RENDER_DEADLINE_S = 4.0


class ChatTemplate:
    """A chat template, ready to render; safe to use from any thread."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], child: TextChild | None = None
    ) -> None:
        """Compile ``source`` in ``child``, by default in a process of its own.

        Raises:
            TemplateError: The template does not compile.
        """
        self._special_tokens = dict(special_tokens)
        self._child = child or TextChild()
        try:
            encoded = source.encode()
        except UnicodeEncodeError:
            raise TemplateError(problem="it holds half a surrogate pair") from None
        self._child.load(LOAD_TEMPLATE, encoded, RENDER_DEADLINE_S, _failed)

    @classmethod
    def load(cls, folder: Path, child: TextChild | None = None) -> ChatTemplate:
        """Read chat_template.jinja, or else ``chat_template`` of tokenizer_config.json.

        Raises:
            CorruptModel: A file is too large or does not parse.
            TemplateError: There is no template, or it does not compile.
        """
        source = load_template(folder)
        if source is None:
            raise TemplateError(problem=f"there is none in {folder}")
        return cls(source, load_special_tokens(folder), child)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        reasoning_effort: str | None = None,
    ) -> str:
        """Return the prompt text of a conversation, as transformers renders it.

        Args:
            messages: Objects with ``role`` and ``content``, in order.
            add_generation_prompt: End with the opening of the assistant's turn.
            tools: OpenAI tool objects for templates that know them.
            reasoning_effort: ``none``, ``low`` or the like, for templates that know it or
                whether to think at all; None for what the template does by itself.

        Raises:
            TemplateError: The template refuses the messages, fails, or exceeds its time,
                memory or output.
            InvalidText: The messages hold half a surrogate pair.
        """
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **_effort(reasoning_effort),
        }
        try:
            request = msgspec.json.encode(variables)
        except UnicodeEncodeError:
            raise InvalidText(problem="a message holds half a surrogate pair") from None
        answer = self._child.ask(RENDER, request, RENDER_DEADLINE_S, _failed)
        assert answer["text"] is not None
        return answer["text"]

    def close(self) -> None:
        """End the child process now; a later render starts another."""
        self._child.close()


def load_template(folder: Path) -> str | None:
    """Return chat_template.jinja, or else ``chat_template`` of tokenizer_config.json.

    Raises:
        CorruptModel: A file is too large or does not parse.
    """
    source = load_text(folder / "chat_template.jinja", maximum=MAX_TEMPLATE_BYTES)
    return _configured_template(folder / "tokenizer_config.json") if source is None else source


def _effort(reasoning_effort: str | None) -> dict[str, object]:
    """Return the variables by which templates of the families know of an effort."""
    if reasoning_effort is None:
        return {}
    thinks = reasoning_effort != "none"
    return {"reasoning_effort": reasoning_effort, "enable_thinking": thinks, "thinking": thinks}


def _failed(problem: str) -> TemplateError:
    return TemplateError(problem=problem)


def _configured_template(path: Path) -> str | None:
    """Return ``chat_template``: a string, or of several named ones the default.

    Raises:
        CorruptModel: It is something else.
    """
    value = load_settings(path).get("chat_template")
    if isinstance(value, list):
        named = cast("list[object]", value)
        entries = [cast("dict[str, object]", entry) for entry in named if isinstance(entry, dict)]
        value = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise CorruptModel(source=path, problem="`chat_template` is not a string")
    return value
