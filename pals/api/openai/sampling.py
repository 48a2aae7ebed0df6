"""How answers are made: the fields that conversations and prompts have in common."""

from __future__ import annotations

from pals.api.openai.schema.shared import GenerationRequest
from pals.driver.interface import GenerateParams
from pals.errors import InvalidRequest, UnsupportedParameter

LEAST_TOP_P = 1e-6
"""In place of 0, which leaves the likeliest token alone too."""


def generate_params(request: GenerationRequest, *, vocab_size: int) -> GenerateParams:
    """Return how the driver makes the answers; what is left out has OpenAI's default.

    Args:
        request: What was asked.
        vocab_size: Token ids are below it.

    Raises:
        InvalidRequest: Fields that do not go together, or no token ids.
        UnsupportedParameter: Obfuscation is asked for.
    """
    _check_stream(request)
    stop = request.stop or ()
    return GenerateParams(
        temperature=_given(request.temperature, 1.0),
        top_p=max(LEAST_TOP_P, _given(request.top_p, 1.0)),
        top_k=request.top_k or 0,
        min_p=_given(request.min_p, 0.0),
        repetition_penalty=_given(request.repetition_penalty, 1.0),
        presence_penalty=_given(request.presence_penalty, 0.0),
        frequency_penalty=_given(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request, vocab_size),
        seed=request.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        n=request.n or 1,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_stream(request: GenerationRequest) -> None:
    options = request.stream_options
    if options is None:
        return
    if not request.stream:
        problem = "`stream_options` is allowed only with `stream` set to true"
        raise InvalidRequest(problem=problem, param="stream_options")
    if options.include_obfuscation:
        param = "stream_options.include_obfuscation"
        raise UnsupportedParameter(param=param, problem="events have the size of their text")


def _logit_bias(request: GenerationRequest, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = request.logit_bias or {}
    return tuple((_token(name, vocab_size), bias) for name, bias in biases.items())


def _token(name: str, vocab_size: int) -> int:
    if name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) < vocab_size:
        return int(name)
    problem = f"`{name[:40]}` is no token id below {vocab_size}"
    raise InvalidRequest(problem=problem, param="logit_bias")
