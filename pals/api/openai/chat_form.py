"""Answers of conversations, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import UNSET

from pals.api.openai.logprobs import chat_logprobs
from pals.api.openai.schema.answers import (
    AnswerDelta,
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    Choice,
    ChunkChoice,
    FunctionDelta,
    MadeToolCall,
    Tier,
    ToolCallDelta,
)
from pals.api.openai.schema.chat import ChatRequest
from pals.api.openai.schema.messages import FunctionCall
from pals.api.openai.schema.shared import Usage
from pals.driver.interface import Delta, TokenScore
from pals.text.answers.pieces import Content, Piece, Reasoning, ToolArguments, ToolCall

ROLE = AnswerDelta(role="assistant", content="")


class ChatForm:
    """Writes the answers to one request.

    Args:
        request: The request.
        n: How many answers there will be.
    """

    def __init__(self, request: ChatRequest, *, n: int) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = request.model
        self._n = n
        self._scored = bool(request.logprobs)
        self._calls_functions = bool(request.functions)
        self._include_usage = request.includes_usage
        self._tier: Tier = UNSET if request.service_tier is None else "default"
        self._begun: set[int] = set()

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> ChatCompletion:
        """Return all answers."""
        drafts = [_Draft() for _ in range(self._n)]
        for delta in deltas:
            drafts[delta.choice].add(delta)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(index, draft) for index, draft in enumerate(drafts)],
            usage=usage,
            service_tier=self._tier,
        )

    def _choice(self, index: int, draft: _Draft) -> Choice:
        return Choice(
            index=index,
            message=draft.message(calls_functions=self._calls_functions),
            finish_reason=self._reason(draft.finish_reason),
            logprobs=chat_logprobs(draft.scores) if self._scored else None,
        )

    def _reason(self, reason: str) -> str:
        is_function = self._calls_functions and reason == "tool_calls"
        return "function_call" if is_function else reason

    def chunks(self, delta: Delta) -> list[ChatChunk]:
        """Return the chunks of a delta; the role comes with the first of each answer."""
        scores = chat_logprobs(delta.scores) if delta.scores else None
        parts = [p for piece in delta.pieces if (p := self._part(piece)) is not None]
        if scores is not None and not parts:
            parts = [AnswerDelta()]
        chunks = [
            self._chunk(delta.choice, part, scores=None if i else scores)
            for i, part in enumerate(parts)
        ]
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            chunks.insert(0, self._chunk(delta.choice, ROLE))
        if delta.finish_reason is not None:
            reason = self._reason(delta.finish_reason)
            chunks.append(self._chunk(delta.choice, AnswerDelta(), reason=reason))
        return chunks

    def usage_chunk(self, usage: Usage) -> ChatChunk | None:
        """Return the last chunk, where the request asks for it."""
        if not self._include_usage:
            return None
        return msgspec.structs.replace(self._head(), usage=usage)

    def _chunk(
        self,
        choice: int,
        delta: AnswerDelta,
        *,
        reason: str | None = None,
        scores: ChatLogprobs | None = None,
    ) -> ChatChunk:
        part = ChunkChoice(delta=delta, index=choice, finish_reason=reason, logprobs=scores)
        return msgspec.structs.replace(self._head(), choices=[part])

    def _head(self) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[],
            service_tier=self._tier,
            usage=None if self._include_usage else UNSET,
        )

    def _part(self, piece: Piece) -> AnswerDelta | None:
        match piece:
            case Content(text=text):
                return AnswerDelta(content=text)
            case Reasoning(text=text):
                return AnswerDelta(reasoning_content=text)
            case ToolCall():
                return self._call(piece)
            case ToolArguments(index=index, text=text):
                return self._function(index, FunctionDelta(arguments=text))

    def _call(self, call: ToolCall) -> AnswerDelta | None:
        function = FunctionDelta(name=call.name, arguments="")
        if self._calls_functions:
            return self._function(call.index, function)
        part = ToolCallDelta(index=call.index, id=call.id, type="function", function=function)
        return AnswerDelta(tool_calls=[part])

    def _function(self, index: int, function: FunctionDelta) -> AnswerDelta | None:
        if not self._calls_functions:
            return AnswerDelta(tool_calls=[ToolCallDelta(index=index, function=function)])
        # The old form has room for one call.
        return AnswerDelta(function_call=function) if index == 0 else None


@dataclass(slots=True)
class _DraftCall:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list[str])

    @property
    def function(self) -> FunctionCall:
        return FunctionCall(name=self.name, arguments="".join(self.arguments))


@dataclass(slots=True)
class _Draft:
    """One answer as far as it is there."""

    content: list[str] = field(default_factory=list[str])
    reasoning: list[str] = field(default_factory=list[str])
    calls: dict[int, _DraftCall] = field(default_factory=dict[int, _DraftCall])
    scores: list[TokenScore] = field(default_factory=list[TokenScore])
    finish_reason: Literal["stop", "length", "tool_calls"] = "stop"

    def add(self, delta: Delta) -> None:
        for piece in delta.pieces:
            self._add_piece(piece)
        self.scores += delta.scores
        self.finish_reason = delta.finish_reason or self.finish_reason

    def _add_piece(self, piece: Piece) -> None:
        match piece:
            case Content(text=text):
                self.content.append(text)
            case Reasoning(text=text):
                self.reasoning.append(text)
            case ToolCall(index=index, id=id, name=name):
                self.calls[index] = _DraftCall(id, name)
            case ToolArguments(index=index, text=text):
                self.calls[index].arguments.append(text)

    def message(self, *, calls_functions: bool) -> AnswerMessage:
        calls = [self.calls[index] for index in sorted(self.calls)]
        content = "".join(self.content)
        made = [MadeToolCall(id=call.id, function=call.function) for call in calls]
        return AnswerMessage(
            content=None if calls and not content else content,
            reasoning_content="".join(self.reasoning) or UNSET,
            tool_calls=made if made and not calls_functions else UNSET,
            function_call=calls[0].function if calls and calls_functions else UNSET,
        )
