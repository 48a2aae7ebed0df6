"""The tokens of one answer, read: its pieces, what they scored, and where it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pals.driver.interface import Delta, FinishReason, TokenScore
from pals.driver.scores import TokenScorer
from pals.driver.state import SampledToken
from pals.text.answers.format import AnswerParser
from pals.text.answers.pieces import Content, Piece, Reasoning, ToolCall
from pals.text.detokenize import StreamDetokenizer
from pals.text.stop import StopStrings
from pals.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the answers of one request are read.

    Attributes:
        tokenizer: The model's.
        end_tokens: Ids that end an answer.
        kept_tokens: Special tokens that the parser has to see.
        stop: Strings that end the content before them.
        scored: The request asks for log-probabilities.
        context: Last tokens of a prompt that the text goes on with; a SentencePiece
            decoder drops the space that leads the first token it sees.
    """

    tokenizer: Tokenizer
    end_tokens: frozenset[int]
    kept_tokens: frozenset[int] = frozenset()
    stop: Sequence[str] = ()
    scored: bool = False
    context: Sequence[int] = ()


class AnswerReader:
    """Turns the sampled tokens of one answer into what may be shown of it.

    Stop strings are looked for in the content only: neither the reasoning nor the calls of
    an answer are cut by them.

    Args:
        choice: Which answer it is.
        reading: How it is read.
        parser: Of the model's family.

    Attributes:
        reasoning_tokens: Tokens so far that the model wrote to itself.
        finished: The last delta is out.
    """

    def __init__(self, choice: int, reading: Reading, parser: AnswerParser) -> None:
        self._choice = choice
        self._reading = reading
        self._parser = parser
        self._detokenizer = StreamDetokenizer(reading.tokenizer, reading.context)
        self._stops = StopStrings(reading.stop)
        self._scores = _HeldScores(reading.tokenizer) if reading.scored else None
        self._content_chars = 0
        self._shown_chars = 0
        self._calls = False
        self._reasons = False
        self.reasoning_tokens = 0
        self.finished = False

    def push(self, sampled: SampledToken) -> Delta:
        """Take the next token; a delta with a finish reason is the last one."""
        ends = sampled.token in self._reading.end_tokens
        if ends and sampled.token not in self._reading.kept_tokens:
            return self._finish([], "stop")
        pieces = self._parser.push(self._text_of(sampled.token))
        self._count_reasoning(pieces)
        shown, hit = self._shown(pieces)
        if self._scores is not None:
            self._scores.add(sampled, self._content_chars if pieces else None)
        if hit:
            return self._last(shown, "stop", cut=True)
        ends = ends or self._parser.ended
        if ends or sampled.last:
            return self._finish(shown, "stop" if ends else "length")
        scores = self._scores.release(self._shown_chars) if self._scores else ()
        return Delta(choice=self._choice, pieces=tuple(shown), scores=scores)

    def _text_of(self, token: int) -> str:
        if token not in self._reading.kept_tokens:
            return self._detokenizer.push(token)
        name = self._reading.tokenizer.decode([token], skip_special_tokens=False)
        return self._detokenizer.finish() + name

    def _shown(self, pieces: Iterable[Piece]) -> tuple[list[Piece], bool]:
        """Return what may be shown of pieces, and whether a stop string ends it."""
        shown: list[Piece] = []
        for piece in pieces:
            if not isinstance(piece, Content):
                self._calls = self._calls or isinstance(piece, ToolCall)
                shown += [*self._content(self._stops.finish()), piece]
                continue
            self._content_chars += len(piece.text)
            text, hit = self._stops.push(piece.text)
            shown += self._content(text)
            if hit:
                return shown, True
        return shown, False

    def _content(self, text: str) -> list[Piece]:
        self._shown_chars += len(text)
        return [Content(text)] if text else []

    def _count_reasoning(self, pieces: Sequence[Piece]) -> None:
        if pieces:
            self._reasons = isinstance(pieces[-1], Reasoning)
        if self._reasons or any(isinstance(piece, Reasoning) for piece in pieces):
            self.reasoning_tokens += 1

    def _finish(self, shown: list[Piece], reason: FinishReason) -> Delta:
        """Release what was held back: it is no part of a stop string after all."""
        rest = [*self._parser.push(self._detokenizer.finish()), *self._parser.finish()]
        more, hit = self._shown(rest)
        if hit:
            return self._last(shown + more, "stop", cut=True)
        more += self._content(self._stops.finish())
        return self._last(shown + more, reason, cut=False)

    def _last(self, shown: Sequence[Piece], reason: FinishReason, *, cut: bool) -> Delta:
        self.finished = True
        scores: tuple[TokenScore, ...] = ()
        if self._scores is not None:
            scores = self._scores.finish(self._shown_chars if cut else None)
        if reason == "stop" and self._calls:
            reason = "tool_calls"
        return Delta(
            choice=self._choice, pieces=_joined(shown), scores=scores, finish_reason=reason
        )


def _joined(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Join content that was held back in parts."""
    joined: list[Piece] = []
    for piece in pieces:
        before = joined[-1] if joined else None
        if isinstance(piece, Content) and isinstance(before, Content):
            joined[-1] = Content(before.text + piece.text)
        else:
            joined.append(piece)
    return tuple(joined)


class _HeldScores:
    """Scores of tokens whose text is not out yet, so that none tells of a stop string.

    A place is a number of characters of content.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._scorer = TokenScorer(tokenizer)
        self._unread: list[TokenScore] = []
        self._held: deque[tuple[int, int, TokenScore]] = deque()
        self._end = 0

    def add(self, sampled: SampledToken, end: int | None) -> None:
        """Take a token.

        Args:
            sampled: The token.
            end: Where the content ends with it; None while it is only part of a character
                or of something that the parser has not made out.
        """
        self._unread.append(self._scorer.score(sampled))
        if end is not None:
            self._held.extend((self._end, end, score) for score in self._unread)
            self._unread, self._end = [], end

    def release(self, shown: int) -> tuple[TokenScore, ...]:
        """Return the scores of the tokens that end by ``shown``, where the content is out."""
        out: list[TokenScore] = []
        while self._held and self._held[0][1] <= shown:
            out.append(self._held.popleft()[2])
        return tuple(out)

    def finish(self, cut: int | None) -> tuple[TokenScore, ...]:
        """Return those left; with ``cut`` only of tokens that begin before that place."""
        if cut is not None:
            return tuple(score for start, _, score in self._held if start < cut)
        return (*(score for _, _, score in self._held), *self._unread)
