"""Which fields requests have, and what becomes of each.

An option that is silently dropped gives answers the caller did not ask for, so each field
of OpenAI's schema is implemented, has no effect on the answer, or is refused unless its
value is one that asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from pals.api.openai.schema.chat import ChatRequest
from pals.api.openai.schema.completions import CompletionRequest
from pals.api.openai.schema.embeddings import EmbeddingRequest
from pals.errors import UnknownParameter, UnsupportedParameter

JsonObject = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A field that is not implemented.

    Attributes:
        reason: Why, or what to do instead.
        neutral: The values, besides null, that ask for nothing.
    """

    reason: str
    neutral: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldTable:
    """The fields of one kind of request.

    Attributes:
        struct: Has those that are implemented or have no effect.
        refused: The others.
    """

    struct: type[Struct]
    refused: Mapping[str, Refused] = field(default_factory=dict[str, Refused])

    def check(self, fields: JsonObject) -> None:
        """Refuse a request that asks for what would be ignored.

        Raises:
            UnknownParameter: A field that no version knows.
            UnsupportedParameter: One that is not implemented, with a value that matters.
        """
        for name, value in fields.items():
            if name in self.struct.__struct_fields__:
                continue
            if name not in self.refused:
                raise UnknownParameter(param=name[:200])
            refused = self.refused[name]
            if value is not None and not _is_one_of(value, refused.neutral):
                raise UnsupportedParameter(param=name, problem=refused.reason)


_TEMPLATE = Refused(reason="the template that came with the model is used")

CHAT_FIELDS = FieldTable(
    struct=ChatRequest,
    refused={
        "audio": Refused(reason="answers are text"),
        "chat_template": _TEMPLATE,
        "chat_template_kwargs": _TEMPLATE,
        "modalities": Refused(reason="answers are text", neutral=(["text"],)),
        "moderation": Refused(reason="nothing is moderated here"),
        "prediction": Refused(reason="there are no predicted outputs here"),
        "prompt_cache_options": Refused(reason="prompts are cached as they come"),
        "store": Refused(reason="nothing is stored here", neutral=(False,)),
        "verbosity": Refused(reason="say it in the messages", neutral=("medium",)),
        "web_search_options": Refused(reason="there is no web search here"),
    },
)

COMPLETION_FIELDS = FieldTable(
    struct=CompletionRequest,
    refused={"suffix": Refused(reason="text is not inserted, only continued", neutral=("",))},
)

EMBEDDING_FIELDS = FieldTable(struct=EmbeddingRequest)


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    """Compare with types: JSON's true is no 1."""
    return any(type(value) is type(known) and value == known for known in neutral)
