"""``POST /v1/chat/completions``."""

from __future__ import annotations

from dataclasses import replace

from litestar import post
from litestar.handlers import HTTPRouteHandler

from pals.api.openai.chat_form import ChatForm
from pals.api.openai.conversation import conversation
from pals.api.openai.endpoint import ApiRequest, Endpoint
from pals.api.openai.fields import CHAT_FIELDS
from pals.api.openai.reading import read_request
from pals.api.openai.respond import ApiResponse, respond
from pals.api.openai.response_format import answer_grammar
from pals.api.openai.sampling import generate_params
from pals.api.openai.schema.chat import ChatRequest
from pals.api.openai.tool_choice import tool_use
from pals.driver.interface import GenerateParams
from pals.errors import InvalidRequest


def chat_route(endpoint: Endpoint) -> HTTPRouteHandler:
    """Return the handler of conversations."""

    @post("/v1/chat/completions", status_code=200)
    async def create_chat_completion(request: ApiRequest) -> ApiResponse:
        chat = read_request(await request.body(), CHAT_FIELDS, ChatRequest)
        driver = endpoint.driver(chat.model)
        params = chat_params(chat, vocab_size=driver.vocab_size)
        form, stream = ChatForm(chat, n=params.n), bool(chat.stream)
        start = driver.chat(conversation(chat.messages), params)
        return await respond(request.receive, start, form, endpoint.metrics, stream=stream)

    return create_chat_completion


def chat_params(request: ChatRequest, *, vocab_size: int) -> GenerateParams:
    """Return how the driver makes the answers of a conversation.

    Raises:
        InvalidRequest: Fields that do not go together.
        UnsupportedParameter: Obfuscation is asked for.
    """
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        problem = "`max_tokens` and `max_completion_tokens` differ: send one of them"
        raise InvalidRequest(problem=problem, param="max_tokens")
    return replace(
        generate_params(request, vocab_size=vocab_size),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=_logprobs(request),
        grammar=answer_grammar(request),
        tools=tool_use(request),
        reasoning_effort=request.reasoning_effort,
    )


def _logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        problem = "`top_logprobs` is allowed only with `logprobs` set to true"
        raise InvalidRequest(problem=problem, param="top_logprobs")
    return None
