"""A completion on its way to a client: closed once and counted once, however it ends."""

from __future__ import annotations

from types import TracebackType

import anyio

from pals.api.metrics import EndpointMetrics
from pals.api.openai.schema.shared import CompletionTokens, PromptTokens, Usage
from pals.driver.interface import Completion

CLOSE_DEADLINE_S = 5.0


class Running:
    """One completion; at the end of the block, and by `aclose`, its sessions are freed.

    Args:
        completion: Has just begun.
        metrics: Where it is counted.
    """

    def __init__(self, completion: Completion, metrics: EndpointMetrics) -> None:
        self.completion = completion
        self._metrics = metrics
        self._counted = False
        metrics.begin()

    async def aclose(self) -> None:
        """Free the sessions, also when the request is cancelled; may be called twice."""
        if not self._counted:
            self._counted = True
            self._metrics.end(self.completion)
        with anyio.move_on_after(CLOSE_DEADLINE_S, shield=True):
            await self.completion.aclose()

    async def __aenter__(self) -> Completion:
        return self.completion

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def usage_of(completion: Completion) -> Usage:
    """Return the tokens a completion has taken so far."""
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=PromptTokens(cached_tokens=completion.cached_tokens),
        completion_tokens_details=CompletionTokens(reasoning_tokens=completion.reasoning_tokens),
    )


def answer_headers(completion: Completion) -> dict[str, str]:
    """Return the headers that tell which way an answer came, and where its time went.

    Source: `Server-Timing`, W3C; durations in milliseconds. That of a shard is its part of
    one token.
    """
    timings = completion.timings()
    parts = [f"queue;dur={timings.open_ms:.1f}"]
    spent_ms = timings.open_ms
    if timings.first_token_ms is not None:
        parts.append(f"first-token;dur={timings.first_token_ms:.1f}")
        spent_ms += timings.first_token_ms
    for index, (shard, milliseconds) in enumerate(timings.shards):
        parts.append(f'shard-{index};desc="{shard}";dur={milliseconds:.2f}')
    return {
        "server-timing": ", ".join(parts),
        "x-pals-route": ", ".join(completion.route),
        "openai-processing-ms": str(round(spent_ms)),
    }
