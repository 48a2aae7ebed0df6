"""How often a token depends on what else ran: in a batch, or played again from its text.

In float32 it never does. In bf16 and int8 sums of other orders round to other numbers, and
where two tokens are about equally likely another one may come first. Answers are generated
greedily, one session at a time; then each is read again, in two ways, and every token that
would have been another is counted: `batched`, with other sessions in each step, and
`replayed`, as the prompt of a new session, which is what a move to another chain does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from benchmarks.local_engine import LocalEngine, Tokens
from benchmarks.quantize import TEXT
from benchmarks.results import Result, Subject
from pals.engine.shard import Shard
from pals.engine.work import Array
from pals.models.gguf import DEMO_MODEL_ID
from pals.models.hub import resolve_model
from pals.models.snapshot import Snapshot
from pals.text.tokenizer import Tokenizer
from pals.types import Dtype, EngineLimits, LayerRange, SessionId

NAME = "near_ties"
DTYPES: tuple[Dtype, ...] = ("f32", "bf16", "int8")
PROMPT_TOKENS = 64
LIMITS = EngineLimits(
    max_sessions=64, max_rows=32, max_context_tokens=512, max_chunk_tokens=512, verify_tokens=1
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is read.

    Attributes:
        answers: Sessions, all in one batch when they are batched.
        answer_tokens: Of each.
        replay_every: So many tokens apart an answer is played again.
    """

    answers: int
    answer_tokens: int
    replay_every: int


FULL_EFFORT = Effort(answers=16, answer_tokens=96, replay_every=4)
QUICK_EFFORT = Effort(answers=8, answer_tokens=24, replay_every=8)


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Count diverging tokens of each dtype.

    Args:
        quick: Few and short answers, without float32.
        report: Given each line.

    Raises:
        ModelError: The demo model cannot be loaded.
    """
    effort = QUICK_EFFORT if quick else FULL_EFFORT
    snapshot = resolve_model(DEMO_MODEL_ID)
    text = Tokenizer.load(snapshot.path).encode(TEXT.read_text(), add_special_tokens=False)
    prompts = cut_prompts(text, effort.answers)
    for dtype in DTYPES[quick:]:
        for result in measure(snapshot, dtype, prompts, effort):
            report(result)


def cut_prompts(text: Sequence[int], count: int) -> list[Array]:
    """Return ``count`` prompts from all over a text."""
    firsts = np.linspace(0, len(text) - PROMPT_TOKENS, count, dtype=int)
    return [np.array(text[first : first + PROMPT_TOKENS], np.int32) for first in firsts]


def measure(
    snapshot: Snapshot, dtype: Dtype, prompts: Sequence[Array], effort: Effort
) -> Iterator[Result]:
    """Yield the rates of one dtype, in tokens of a thousand."""
    load = os.getloadavg()[0]
    layers = LayerRange(0, snapshot.config.num_layers)
    shard = Shard.load(snapshot, layers, dtype=dtype, limits=LIMITS)
    shard.warmup()
    reader = Reader(shard)
    answers = [reader.generate(prompt, effort.answer_tokens) for prompt in prompts]
    read = {
        "batched": reader.read_batched(prompts, answers),
        "replayed": [
            reader.read_replayed(prompt, answer, effort.replay_every)
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
    }
    for way, differs in read.items():
        subject = Subject(
            benchmark=NAME,
            system="pals",
            setting={
                "model": snapshot.model_id,
                "dtype": dtype,
                "device": jax.devices()[0].device_kind,
                "way": way,
                "tokens": sum(map(len, differs)),
            },
            load=load,
        )
        total = np.concatenate(differs)
        rate = 1000 * float(total.mean())
        yield subject.summarise("diverging_per_1000_tokens", "tokens", [rate])


class Reader:
    """Generates answers and reads them again on one shard that is the whole model."""

    def __init__(self, shard: Shard) -> None:
        self._engine = LocalEngine(shard)

    def generate(self, prompt: Array, count: int) -> Array:
        """Return a greedy answer, ``int32[count]``, with nothing else in any step."""
        session = self._open(prompt, count)
        tokens = [self._run(session, Tokens(0, prompt))]
        for position in range(len(prompt), len(prompt) + count - 1):
            tokens.append(self._run(session, Tokens(position, tokens[-1])))
        self._engine.close(session)
        return np.concatenate(tokens)

    def read_batched(self, prompts: Sequence[Array], answers: Sequence[Array]) -> list[Array]:
        """Return of each answer's tokens whether it would have been another among the others."""
        sessions = [self._open(p, len(a)) for p, a in zip(prompts, answers, strict=True)]
        for session, prompt in zip(sessions, prompts, strict=True):
            self._run(session, Tokens(0, prompt))
        found: list[list[bool]] = [[] for _ in answers]
        for number in range(len(answers[0]) - 1):
            rows = {
                session: Tokens(PROMPT_TOKENS + number, answer[number : number + 1])
                for session, answer in zip(sessions, answers, strict=True)
            }
            sampled = self._engine.run(rows)
            for differs, session, answer in zip(found, sessions, answers, strict=True):
                differs.append(int(sampled[session][0]) != int(answer[number + 1]))
        for session in sessions:
            self._engine.close(session)
        return [np.array(differs) for differs in found]

    def read_replayed(self, prompt: Array, answer: Array, every: int) -> Array:
        """Return whether the next token is another when an answer so far is a prompt."""
        differs: list[bool] = []
        for count in range(every, len(answer), every):
            history = np.concatenate([prompt, answer[:count]])
            session = self._open(history, 1)
            differs.append(int(self._run(session, Tokens(0, history))[0]) != int(answer[count]))
            self._engine.close(session)
        return np.array(differs)

    def _open(self, prompt: Array, count: int) -> SessionId:
        return self._engine.open(prompt_tokens=len(prompt), max_tokens=len(prompt) + count)

    def _run(self, session: SessionId, tokens: Tokens) -> Array:
        return self._engine.run({session: tokens})[session]
