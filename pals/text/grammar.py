"""Which tokens an answer may go on with, so that the whole of it is of a grammar.

Grammars are compiled and followed in a child process (`masks` in `sandbox`), which is
killed when one exceeds its limits. What it knew of the others is told to the next one.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from pals.errors import CorruptModel, InvalidGrammar
from pals.text.child import TextChild
from pals.text.files import load_text
from pals.text.sandbox import LOAD_VOCABULARY, MASK
from pals.types import MAX_GRAMMAR_BYTES, MAX_TOKENIZER_BYTES, Grammar

if TYPE_CHECKING:
    from pals.models.snapshot import Snapshot
    from pals.text.masks import Beginning, MaskRequest

_log = logging.getLogger(__name__)

TOKENIZER_NAME = "tokenizer.json"
LOAD_DEADLINE_S = 20.0
BEGIN_DEADLINE_S = 5.0
"""To compile a grammar, and to follow it through the answer so far."""
STEP_DEADLINE_S = 2.0
TOKEN_S = 0.1
"""What a token may take on average, so that one answer does not keep those of others waiting."""
MAX_CHECKED = 256

Mask = npt.NDArray[np.uint32]
"""``uint32[W]``, W = V/32 rounded up: a bit for each token that may come next, the lowest first."""

_ids_decoder = msgspec.json.Decoder(list[int])


@dataclass(slots=True, kw_only=True, eq=False)
class GuidedAnswer:
    """An answer that a grammar guides; made by `GrammarMasks.begin`.

    Attributes:
        key: Its name in the child process.
        grammar: What it may consist of.
        stop_token_ids: Ids that end it, allowed only where the grammar accepts.
        tokens: As many as it has.
        forced: Of a grammar of kind ``tokens``: the ids that it begins with.
        told: How many of its tokens the child process has seen; None before it knows it.
        spent_s: Seconds that it took so far.
    """

    key: int
    grammar: Grammar
    stop_token_ids: list[int]
    tokens: list[int]
    forced: list[int] | None = None
    told: int | None = None
    spent_s: float = 0.0


class GrammarMasks:
    """The grammars of one model's answers; used by one thread at a time.

    Args:
        path: The model's tokenizer.json.
        vocab_size: Of the model's logits, V. Tokens that the tokenizer does not know are
            never allowed.
        eos_token_ids: The model's own, which end an answer whose request names none.
        child: The process to compile in; by default one of its own, which starts when the
            first grammar comes.
    """

    def __init__(
        self,
        path: Path,
        vocab_size: int,
        eos_token_ids: Collection[int] = (),
        *,
        child: TextChild | None = None,
    ) -> None:
        self._path = path
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._eos = self._known(eos_token_ids)
        self._child = child or TextChild()
        self._is_loaded = False
        self._keys = itertools.count()
        self._ended: deque[int] = deque()

    @classmethod
    def of(cls, snapshot: Snapshot) -> GrammarMasks:
        """Return what knows the grammars of a model; nothing is read or started yet."""
        config = snapshot.config
        return cls(snapshot.path / TOKENIZER_NAME, config.vocab_size, config.eos_token_ids)

    def begin(
        self, grammar: Grammar, stop_token_ids: Iterable[int] = (), tokens: Sequence[int] = ()
    ) -> GuidedAnswer:
        """Return an answer to guide; takes no time, and may be called on any thread.

        Args:
            grammar: What it may consist of.
            stop_token_ids: Ids that end it.
            tokens: Of it, where it goes on.

        Raises:
            InvalidGrammar: The source is too long or no text, or no list of ids.
        """
        check_source(grammar)
        forced = self._read_ids(grammar.source) if grammar.kind == "tokens" else None
        return GuidedAnswer(
            key=next(self._keys),
            grammar=grammar,
            stop_token_ids=self._known(stop_token_ids),
            tokens=list(tokens),
            forced=forced,
        )

    def next_mask(self, answer: GuidedAnswer) -> Mask | None:
        """Return what may come after the tokens of an answer; None for what the last one allows.

        It waits for the child process, a few seconds at most.

        Raises:
            InvalidGrammar: The grammar does not compile, exceeds its limits, or leads to no
                token of the vocabulary; or the tokens are not of it.
            CorruptModel: The tokenizer is none that grammars work with.
        """
        if answer.forced is not None:
            return self._next_forced(answer.forced, len(answer.tokens))
        text = self._ask(answer, answer.tokens[answer.told :]) if answer.told is not None else ""
        if not text:  # it is new, or the process is
            answer.told = None
            text = self._ask(answer, answer.tokens)
        answer.told = len(answer.tokens)
        if answer.spent_s > BEGIN_DEADLINE_S + TOKEN_S * len(answer.tokens):
            raise _refused(f"{answer.told} tokens took it {answer.spent_s:.1f} s")
        return self._read_mask(text)

    def end(self, answer: GuidedAnswer) -> None:
        """Let the child process forget an answer, when it is asked next; on any thread."""
        if answer.forced is None:
            self._ended.append(answer.key)

    def close(self) -> None:
        """End the child process now; on any thread."""
        self._child.close()

    def _ask(self, answer: GuidedAnswer, tokens: list[int]) -> str:
        self._load()
        begin = _beginning_of(answer) if answer.told is None else None
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        request: MaskRequest
        request = {"key": answer.key, "begin": begin, "tokens": tokens, "ended": ended}
        deadline_s = STEP_DEADLINE_S if begin is None else BEGIN_DEADLINE_S
        started_s = time.monotonic()
        asked = self._child.ask(
            MASK, msgspec.json.encode(request), deadline_s, _refused, again=True
        )
        assert asked["text"] is not None
        if begin is None and asked["text"]:  # what a new process takes is nobody's fault
            answer.spent_s += time.monotonic() - started_s
        return asked["text"]

    def _load(self) -> None:
        if self._is_loaded:
            return
        text = load_text(self._path, maximum=MAX_TOKENIZER_BYTES)
        if text is None:
            raise CorruptModel(source=self._path, problem="there is no such file")
        head = msgspec.json.encode({"vocab_size": self._vocab_size, "eos": self._eos})
        self._child.load(
            LOAD_VOCABULARY,
            head + b"\n" + text.encode(),
            LOAD_DEADLINE_S,
            lambda problem: CorruptModel(source=self._path, problem=problem),
        )
        self._is_loaded = True

    def _read_mask(self, text: str) -> Mask:
        try:
            words = np.frombuffer(base64.b64decode(text, validate=True), "<u4")
        except (binascii.Error, ValueError):
            raise _refused("its process answers nonsense") from None
        if words.shape != (self._words,) or not words.any():
            raise _refused(f"its process allows {words.size} words of tokens")
        return words.astype(np.uint32)

    def _next_forced(self, forced: list[int], place: int) -> Mask | None:
        if place > len(forced):
            return None
        if place == len(forced):  # the last mask stays: this one ends what is forced
            return np.full(self._words, 0xFFFFFFFF, np.uint32)
        mask = np.zeros(self._words, np.uint32)
        word, bit = divmod(forced[place], 32)
        mask[word] = 1 << bit
        return mask

    def _read_ids(self, source: str) -> list[int]:
        try:
            ids = _ids_decoder.decode(source)
        except msgspec.MsgspecError as error:
            raise InvalidGrammar(problem=f"the tokens are no list of ids: {error}") from None
        if len(self._known(ids)) < len(ids):
            raise InvalidGrammar(problem=f"a token is no id below {self._vocab_size}")
        return ids

    def _known(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if 0 <= i < self._vocab_size]


@dataclass(slots=True)
class GrammarChecker:
    """Says before a request is taken whether its grammar can be enforced.

    It remembers those that can: programs send one schema again and again.

    Attributes:
        masks: Of a child process that nothing else waits for.
    """

    masks: GrammarMasks
    _known: OrderedDict[Grammar, None] = field(default_factory=OrderedDict[Grammar, None])

    def knows(self, grammar: Grammar) -> bool:
        """Return whether a grammar was found good before; takes no time. On any thread."""
        try:
            self._known.move_to_end(grammar)
        except KeyError:
            return False
        return True

    def check(self, grammar: Grammar) -> None:
        """Compile a grammar; waits for that, a few seconds at most. On one thread at a time.

        Raises:
            InvalidGrammar: It does not compile: a keyword of the schema that is not supported
                is named. Or it exceeds its limits, or the model's tokenizer is none that
                grammars work with.
        """
        if self.knows(grammar):
            return
        answer = self.masks.begin(grammar)
        try:
            self.masks.next_mask(answer)
        except CorruptModel as error:
            _log.warning("grammars: %s", error)
            raise _refused("the model's tokenizer is none that grammars work with") from error
        finally:
            self.masks.end(answer)
        self._known[grammar] = None
        if len(self._known) > MAX_CHECKED:
            self._known.popitem(last=False)

    def close(self) -> None:
        """End the child process now."""
        self.masks.close()


def _beginning_of(answer: GuidedAnswer) -> Beginning:
    grammar = answer.grammar
    return {"kind": grammar.kind, "source": grammar.source, "stops": answer.stop_token_ids}


def check_source(grammar: Grammar) -> None:
    """Raise unless the source of a grammar is text, and no longer than shards take.

    Raises:
        InvalidGrammar: It is not.
    """
    try:
        size = len(grammar.source.encode())
    except UnicodeEncodeError:
        raise InvalidGrammar(problem="the grammar holds half a surrogate pair") from None
    if size > MAX_GRAMMAR_BYTES:
        problem = f"the grammar has {size} bytes, at most {MAX_GRAMMAR_BYTES} are taken"
        raise InvalidGrammar(problem=problem)


def _refused(problem: str) -> InvalidGrammar:
    return InvalidGrammar(problem=f"the grammar cannot be enforced: {problem}")
