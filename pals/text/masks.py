"""Which tokens an answer may go on with under its grammar; runs inside `sandbox`.

A grammar comes from whoever sends a request, and some take hours and gigabytes. The sandbox
loads this file by its path: it imports nothing of Pals. Grammars are those of llguidance
(https://github.com/guidance-ai/llguidance), whose own limits bound one step of a parser; the
sandbox bounds everything else.

Bits of tokens are one integer here, the bit of token ``i`` worth ``2**i``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_LEXER_STATES = 50_000
WHITESPACE = "[ \\t\\n\\r]{0,40}"
"""Between the tokens of JSON: without an end to it a model may write nothing else. A schema
may say something else under ``x-guidance``."""

_UNLESS_SAID: JsonCompileOptions = {"whitespace_pattern": WHITESPACE}
_ALWAYS: JsonCompileOptions = {"lenient": False}
_ANY_OBJECT = '{"type": "object"}'


class Beginning(TypedDict):
    """An answer's grammar.

    Attributes:
        kind: Of `pals.types.Grammar`.
        source: Of it.
        stops: Ids that end the answer.
    """

    kind: str
    source: str
    stops: list[int]


class MaskRequest(TypedDict):
    """What an answer has come to.

    Attributes:
        key: Of the answer.
        begin: Its grammar; None where this process has been told before.
        tokens: That were sampled since, or from the beginning.
        ended: Keys of answers that are over.
    """

    key: int
    begin: Beginning | None
    tokens: list[int]
    ended: list[int]


class GrammarError(Exception):
    """A grammar that does not compile, is too complex, or leads nowhere."""


class Masks:
    """The answers that grammars guide in this process.

    Args:
        content: A line of JSON with the keys ``vocab_size`` and ``eos``, then tokenizer.json.
    """

    def __init__(self, content: str) -> None:
        head, _, tokenizer = content.partition("\n")
        settings = json.loads(head)
        vocab_size, eos = settings["vocab_size"], settings["eos"]
        tokenizer = tokenizer.strip()
        if not tokenizer.startswith("{"):  # the library would take it for a file's name
            raise GrammarError("tokenizer.json holds no object")
        self._tokenizer = LLTokenizer(tokenizer, eos_token=eos or None)
        self._words = -(-vocab_size // 32)
        self._model = (1 << min(vocab_size, self._tokenizer.vocab_size)) - 1
        self._eos = _bits(self._tokenizer.eos_tokens)
        self._limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        self._answers: dict[int, _Answer] = {}

    def answer(self, content: bytes) -> str:
        """Return the next tokens of an answer in base64: 32-bit little-endian words.

        The text is empty when this process was not told the answer's grammar.

        Args:
            content: A `MaskRequest` in JSON.

        Raises:
            GrammarError: There are none, or what was sampled is not of the grammar.
        """
        request: MaskRequest = json.loads(content)
        for key in request["ended"]:
            self._answers.pop(key, None)
        key, begin = request["key"], request["begin"]
        if begin is not None:
            self._answers[key] = self._begin(begin)
        elif key not in self._answers:
            return ""
        bits = self._answers[key].advance(request["tokens"]) & self._model
        if not bits:
            raise GrammarError("no token of this model's goes on with the answer")
        return base64.b64encode(bits.to_bytes(4 * self._words, "little")).decode()

    def _begin(self, begin: Beginning) -> _Answer:
        grammar = _compile(begin["kind"], begin["source"])
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        _check(matcher)
        return _Answer(matcher, stops=_bits(begin["stops"]), eos=self._eos)


class _Answer:
    """One answer as far as its grammar has come."""

    def __init__(self, matcher: LLMatcher, *, stops: int, eos: int) -> None:
        self._matcher = matcher
        self._stops = stops or eos
        self._ends = stops | eos

    def advance(self, tokens: Iterable[int]) -> int:
        """Take what was sampled; return the tokens that may come next."""
        for token in tokens:
            self._take(token)
        if self._is_done():
            return self._stops
        bits = int.from_bytes(self._matcher.compute_bitmask(), "little")
        _check(self._matcher)
        inner = bits & ~self._ends
        if self._matcher.is_accepting():
            inner |= self._stops
        # A grammar may name a token that ends answers, where it wants nothing else.
        return inner or bits

    def _take(self, token: int) -> None:
        is_end = self._ends >> token & 1
        if is_end and (self._is_done() or self._matcher.is_accepting()):
            return  # nothing stops there, and so the answer goes on ending
        if not self._matcher.consume_token(token):
            _check(self._matcher)
            raise GrammarError(f"token {token} is not of the grammar")

    def _is_done(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _compile(kind: str, source: str) -> str:
    if kind == "lark":
        return LLMatcher.grammar_from_lark(source)
    schema = _ANY_OBJECT if kind == "json_object" else source
    try:
        return LLMatcher.grammar_from_json_schema(schema, _UNLESS_SAID, _ALWAYS)
    except ValueError as error:
        raise GrammarError(str(error)) from None


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(matcher.get_error().removesuffix("<non-verbose/>").strip())


def _bits(tokens: Iterable[int]) -> int:
    bits = 0
    for token in tokens:
        bits |= 1 << token
    return bits
