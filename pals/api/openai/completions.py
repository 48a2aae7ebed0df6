"""``POST /v1/completions``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from litestar import post
from litestar.handlers import HTTPRouteHandler

from pals.api.openai.completion_form import CompletionForm
from pals.api.openai.endpoint import ApiRequest, Endpoint
from pals.api.openai.fields import COMPLETION_FIELDS
from pals.api.openai.prompts import read_prompts
from pals.api.openai.reading import read_request
from pals.api.openai.respond import ApiResponse, respond
from pals.api.openai.sampling import generate_params
from pals.api.openai.schema.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from pals.driver.interface import Completion, Driver, GenerateParams, Prompt
from pals.driver.merged import start_all
from pals.errors import InvalidRequest

MAX_PROMPTS = 128
MAX_TOTAL_CHOICES = 128


def completion_route(endpoint: Endpoint) -> HTTPRouteHandler:
    """Return the handler of prompts."""

    @post("/v1/completions", status_code=200)
    async def create_completion(request: ApiRequest) -> ApiResponse:
        asked = read_request(await request.body(), COMPLETION_FIELDS, CompletionRequest)
        driver = endpoint.driver(asked.model)
        vocab_size = driver.vocab_size
        prompt = "" if asked.prompt is None else asked.prompt
        prompts = read_prompts(prompt, param="prompt", vocab_size=vocab_size, limit=MAX_PROMPTS)
        params = completion_params(asked, vocab_size=vocab_size)
        _check_total(len(prompts), params)
        form = CompletionForm(asked, choices=len(prompts) * params.n)
        start, stream = _start(driver, prompts, params), bool(asked.stream)
        return await respond(request.receive, start, form, endpoint.metrics, stream=stream)

    return create_completion


async def _start(driver: Driver, prompts: list[Prompt], params: GenerateParams) -> Completion:
    if len(prompts) == 1:
        return await driver.complete(prompts[0], params)
    return await start_all([partial(driver.complete, p, params) for p in prompts], n=params.n)


def completion_params(request: CompletionRequest, *, vocab_size: int) -> GenerateParams:
    """Return how the driver makes the answers to each prompt.

    Raises:
        InvalidRequest: Fields that do not go together.
    """
    params = generate_params(request, vocab_size=vocab_size)
    best_of = request.best_of or None
    if best_of is not None and best_of < params.n:
        raise InvalidRequest(problem="`best_of` is less than `n`", param="best_of")
    if best_of is not None and best_of > params.n and request.stream:
        raise InvalidRequest(problem="`best_of` cannot be streamed", param="best_of")
    limit = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return replace(
        params,
        max_tokens=limit,
        logprobs=request.logprobs,
        best_of=best_of,
        echo=bool(request.echo),
    )


def _check_total(prompts: int, params: GenerateParams) -> None:
    total = prompts * max(params.n, params.best_of or 0)
    if total > MAX_TOTAL_CHOICES:
        problem = f"{total} answers are asked for, at most {MAX_TOTAL_CHOICES} are made"
        raise InvalidRequest(problem=problem, param="best_of" if params.best_of else "n")
