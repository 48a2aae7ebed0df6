"""Whatever a body holds, it is read or refused, and never an internal error."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from pals.api.openai.chat import chat_params
from pals.api.openai.completions import completion_params
from pals.api.openai.conversation import conversation
from pals.api.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, EMBEDDING_FIELDS, FieldTable
from pals.api.openai.prompts import read_prompts
from pals.api.openai.reading import read_request
from pals.api.openai.schema.chat import ChatRequest
from pals.api.openai.schema.completions import CompletionRequest
from pals.api.openai.schema.embeddings import EmbeddingRequest
from pals.errors import InvalidRequest

VOCAB = 10
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "text", "function", "required", "none", "json_schema", "f", ""]
)
NAMES = st.sampled_from(
    (
        *("role", "content", "type", "text", "function", "name", "arguments", "id"),
        *("tool_call_id", "tool_calls", "json_schema", "schema", "parameters"),
        *("allowed_tools", "mode", "tools"),
    )
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS
    | st.text(max_size=4)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


def bodies(table: FieldTable, **always: object) -> st.SearchStrategy[bytes]:
    names = sorted({*table.struct.__struct_fields__, *table.refused})
    fields = st.dictionaries(st.sampled_from(names), VALUES, max_size=5)
    return fields.map(lambda made: msgspec.json.encode(always | made))


def read(body: bytes, table: FieldTable, kind: type[Struct]) -> Any:
    try:
        return read_request(body, table, kind)
    except InvalidRequest:
        return None


@settings(max_examples=60)
@given(bodies(CHAT_FIELDS, model="m", messages=[{"role": "user", "content": "hi"}]))
def test_any_conversation_is_read_or_refused(body: bytes) -> None:
    request = read(body, CHAT_FIELDS, ChatRequest)
    if request is None:
        return
    try:
        params = chat_params(request, vocab_size=VOCAB)
    except InvalidRequest:
        return
    assert 1 <= params.n <= 16
    assert len(conversation(request.messages)) == len(request.messages)


@settings(max_examples=50)
@given(bodies(COMPLETION_FIELDS, model="m", prompt="hi"))
def test_any_prompt_is_read_or_refused(body: bytes) -> None:
    request = read(body, COMPLETION_FIELDS, CompletionRequest)
    if request is None:
        return
    try:
        completion_params(request, vocab_size=VOCAB)
        prompts = read_prompts(request.prompt, param="prompt", vocab_size=VOCAB, limit=9)
    except InvalidRequest:
        return
    assert prompts


@settings(max_examples=20)
@given(bodies(EMBEDDING_FIELDS, model="m", input="hi"))
def test_any_input_is_read_or_refused(body: bytes) -> None:
    read(body, EMBEDDING_FIELDS, EmbeddingRequest)


@settings(max_examples=50)
@given(st.binary(max_size=40) | st.text('{}[]":,\\ud8009e-', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    read(body, CHAT_FIELDS, ChatRequest)
