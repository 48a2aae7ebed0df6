"""The likeliest of several answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from pals.driver.interface import Completion, Delta, Timings


class BestOf:
    """Reads all answers of a completion and gives on those of the best mean log-probability.

    Args:
        inner: Makes the answers, with scores.
        n: How many to keep.
        scored: Whether the caller asked for scores too.
    """

    def __init__(self, inner: Completion, *, n: int, scored: bool) -> None:
        self._inner = inner
        self._n = n
        self._scored = scored

    @property
    def prompt_tokens(self) -> int:
        return self._inner.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        return self._inner.completion_tokens

    @property
    def cached_tokens(self) -> int:
        return self._inner.cached_tokens

    @property
    def reasoning_tokens(self) -> int:
        return self._inner.reasoning_tokens

    @property
    def route(self) -> tuple[str, ...]:
        return self._inner.route

    def timings(self) -> Timings:
        return self._inner.timings()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        answers: dict[int, list[Delta]] = {}
        async for delta in self._inner:
            answers.setdefault(delta.choice, []).append(delta)
        best = sorted(answers.values(), key=_mean_logprob, reverse=True)[: self._n]
        for choice, deltas in enumerate(best):
            for delta in deltas:
                scores = delta.scores if self._scored else ()
                yield replace(delta, choice=choice, scores=scores)

    async def aclose(self) -> None:
        await self._inner.aclose()


def _mean_logprob(answer: Sequence[Delta]) -> float:
    logprobs = [score.logprob for delta in answer for score in delta.scores if score.scored]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0
