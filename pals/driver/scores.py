"""What the tail says of a token's probability, with the bytes that the token stands for."""

from __future__ import annotations

from pals.driver.interface import TokenScore, TopScore
from pals.driver.state import SampledToken
from pals.text.tokenizer import Tokenizer


class TokenScorer:
    """Names the tokens of scores."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def score(self, sampled: SampledToken) -> TokenScore:
        """Return the score of a token whose request asks for log-probabilities."""
        assert sampled.logprob is not None
        return TokenScore(
            token=sampled.token,
            raw=self._tokenizer.shown_bytes(sampled.token),
            logprob=sampled.logprob,
            hidden=self._tokenizer.is_skipped(sampled.token),
            top=tuple(
                TopScore(token=token, raw=self._tokenizer.shown_bytes(token), logprob=logprob)
                for token, logprob in sampled.top
            ),
        )

    def unscored(self, token: int) -> TokenScore:
        """Return what stands for the first token of a prompt."""
        return TokenScore(
            token=token,
            raw=self._tokenizer.shown_bytes(token),
            logprob=0.0,
            scored=False,
            hidden=self._tokenizer.is_skipped(token),
        )
