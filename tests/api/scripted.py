"""A driver whose answers have everything that requests ask for."""

from __future__ import annotations

import math

from pals.driver.interface import Delta, GenerateParams, TokenScore, TopScore
from pals.text.answers.pieces import Content, Piece, Reasoning, ToolArguments, ToolCall
from tests.fakes import FakeCompletion, FakeDriver

CALL_ID = "call_" + "a" * 24


class ScriptedDriver(FakeDriver):
    """Thinks, scores its tokens where it has to, and calls the first tool there is."""

    vocab_size = 2**31

    def _answer(self, params: GenerateParams) -> FakeCompletion:
        pieces: list[Piece] = [Reasoning("hm"), Content("Hé"), Content(" 🙂")]
        tools = params.tools.tools if params.tools and params.tools.choice != "none" else ()
        if tools:
            pieces += [ToolCall(0, CALL_ID, tools[0].name)]
            pieces += [ToolArguments(0, '{"a":'), ToolArguments(0, " 1}")]
        scores = () if params.logprobs is None else (_score(params.logprobs),)
        script = [
            Delta(choice=choice, pieces=(piece,), scores=scores)
            for piece in pieces
            for choice in range(params.n)
        ]
        end = "tool_calls" if tools else "length"
        made = FakeCompletion(script, n=params.n, end=end, on_close=self.on_close)
        self.completions.append(made)
        return made


def _score(count: int) -> TokenScore:
    likely = TopScore(token=1, raw=b"\xc3", logprob=-0.5)
    unlikely = TopScore(token=2, raw=b" a", logprob=-math.inf)
    return TokenScore(token=1, raw=b"\xc3", logprob=-0.5, top=(likely, unlikely)[:count])
