"""``POST /v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64

import msgspec
import numpy as np
from litestar import Response, post
from litestar.handlers import HTTPRouteHandler
from numpy.typing import NDArray

from pals.api.gate import JSON_TYPE
from pals.api.openai.endpoint import ApiRequest, Endpoint
from pals.api.openai.fields import EMBEDDING_FIELDS
from pals.api.openai.prompts import read_prompts
from pals.api.openai.reading import read_request
from pals.api.openai.schema.embeddings import (
    MAX_INPUTS,
    EmbeddingData,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
)
from pals.api.openai.stream import unless_disconnected
from pals.driver.interface import Embedding
from pals.errors import InvalidRequest


def embedding_route(endpoint: Endpoint) -> HTTPRouteHandler:
    """Return the handler of embeddings."""

    @post("/v1/embeddings", status_code=200)
    async def create_embedding(request: ApiRequest) -> Response[bytes]:
        asked = read_request(await request.body(), EMBEDDING_FIELDS, EmbeddingRequest)
        driver = endpoint.driver(asked.model)
        _check_dimensions(asked.dimensions, driver.embedding_size)
        inputs = read_prompts(
            asked.input, param="input", vocab_size=driver.vocab_size, limit=MAX_INPUTS
        )
        if "" in inputs:
            raise InvalidRequest(problem="`input` is empty", param="input")
        found = await unless_disconnected(request.receive, driver.embed(inputs))
        # Thousands of vectors take longer to write than others should wait.
        answer = await asyncio.to_thread(_written, asked, found)
        return Response(answer, media_type=JSON_TYPE)

    return create_embedding


def _check_dimensions(asked: int | None, size: int) -> None:
    if asked is not None and asked > size:
        problem = f"`dimensions` is {asked}, and the model has {size}"
        raise InvalidRequest(problem=problem, param="dimensions")


def _written(request: EmbeddingRequest, found: list[Embedding]) -> bytes:
    return msgspec.json.encode(embedding_list(request, found))


def embedding_list(request: EmbeddingRequest, found: list[Embedding]) -> EmbeddingList:
    """Return embeddings in the encoding and the size that a request asks for."""
    tokens = sum(each.tokens for each in found)
    return EmbeddingList(
        data=[
            EmbeddingData(index=index, embedding=_encoded(request, each.vector))
            for index, each in enumerate(found)
        ],
        model=request.model,
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _encoded(request: EmbeddingRequest, vector: NDArray[np.float32]) -> list[float] | str:
    vector = _normalised(vector, request.dimensions)
    if request.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()


def _normalised(vector: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Return the first of a vector's dimensions, or all, at length 1, as OpenAI does."""
    kept = vector[:dimensions]
    length = float(np.linalg.norm(kept))
    return kept if length == 0 else (kept / np.float32(length))
