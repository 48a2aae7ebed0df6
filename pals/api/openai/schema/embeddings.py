"""Embeddings (`CreateEmbeddingRequest`, `CreateEmbeddingResponse`)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from pals.api.openai.schema.shared import Label

MAX_INPUTS = 2048


class EmbeddingRequest(Struct, frozen=True, kw_only=True):
    """What to embed; its ``input`` is read by `pals.api.openai.prompts`."""

    model: str
    input: object
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    user: Label | None = None


class EmbeddingData(Struct, frozen=True, kw_only=True):
    """One vector: numbers, or the base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct, frozen=True, kw_only=True):
    """Tokens of the inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, frozen=True, kw_only=True):
    """The vectors of all inputs, in order."""

    data: list[EmbeddingData]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"
