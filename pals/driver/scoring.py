"""How likely a prompt is to the model, token by token."""

from __future__ import annotations

import msgspec

from pals.driver.choices import ChoiceSessions
from pals.driver.interface import TokenScore
from pals.driver.scores import TokenScorer
from pals.driver.state import SessionRequest
from pals.errors import InvalidFrame, InvalidRequest
from pals.types import MAX_GRAMMAR_BYTES, Grammar, Sampling


def scoring_request(prompt: tuple[int, ...], logprobs: int) -> SessionRequest:
    """Return the session whose prompt is a prompt's first token and whose answer the others.

    Raises:
        InvalidRequest: The prompt is too long for that.
    """
    source = msgspec.json.encode(prompt[1:]).decode()
    if len(source) > MAX_GRAMMAR_BYTES:
        problem = f"a prompt of {len(prompt)} tokens is too long to be scored"
        raise InvalidRequest(problem=problem, param="echo")
    return SessionRequest(
        prompt=prompt[:1],
        max_new_tokens=len(prompt) - 1,
        stop_token_ids=(),
        sampling=Sampling(logprobs=logprobs),
        grammar=Grammar(kind="tokens", source=source),
    )


async def read_scores(
    sessions: ChoiceSessions, prompt: tuple[int, ...], scorer: TokenScorer
) -> list[TokenScore]:
    """Return the scores of a prompt after its first token, from an open scoring session.

    Raises:
        InvalidFrame: The tail sampled something else than what it was told to.
        PalsError: The session failed.
    """
    scores: list[TokenScore] = []
    for token in prompt[1:]:
        _, sampled = await sessions.next()
        if sampled.token != token:
            peer = sessions.first.chain.tail.peer
            raise InvalidFrame(peer=peer, problem="a token that was not prescribed")
        scores.append(scorer.score(sampled))
    return scores
