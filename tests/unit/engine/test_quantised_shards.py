"""Shards in int8 and int4 say the same whole and split, alone and beside others."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pals.config import CACHE_DIR_VARIABLE
from pals.engine.shard import Shard
from pals.models.quantized import FEW_ROWS
from pals.models.snapshot import Snapshot
from pals.types import Dtype, EngineLimits, LayerRange, Quantization
from tests.checkpoints import make_llama_checkpoint, make_qwen3_moe_checkpoint
from tests.unit.engine.chains import decode, generate, hidden_states, load_chain, prefill

LIMITS = EngineLimits(max_sessions=3, max_rows=4, max_context_tokens=128, max_chunk_tokens=64)
EXACT = Quantization(group_size=32, activations=False)
ROUNDED = Quantization(group_size=32, activations=True)
PROMPT = [256, *b"The quick brown fox jumps over the lazy dog, twice."]
PROMPTS = [PROMPT, [256, *b"A shorter one."], [256, *b"And then another one, not as short."]]
CHUNK = 64
COUNT = 8


@dataclass(frozen=True)
class Case:
    """A model in one kind of numbers; splits of it are compared with the whole."""

    make: Callable[..., Path]
    dtype: Dtype
    quantization: Quantization = ROUNDED
    num_layers: int = 3


CASES = {
    "llama-int8": Case(make_llama_checkpoint, "int8"),
    "llama-int8-exact": Case(make_llama_checkpoint, "int8", EXACT, num_layers=2),
    "llama-int4": Case(make_llama_checkpoint, "int4", num_layers=2),
    "qwen3_moe-int8": Case(make_qwen3_moe_checkpoint, "int8", num_layers=2),
    "qwen3_moe-int4": Case(make_qwen3_moe_checkpoint, "int4", num_layers=2),
}


QUICK = {"llama-int8", "qwen3_moe-int4"}
"""The other cases compile for minutes."""


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in QUICK else [pytest.mark.slow]


@pytest.fixture(
    scope="module", params=[pytest.param(name, id=name, marks=marks(name)) for name in CASES]
)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def snapshot(case, tmp_path_factory, shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
        folder = case.make(tmp_path_factory.mktemp("model"), num_layers=case.num_layers)
        yield Snapshot.open(folder, "test/model")


@pytest.fixture(scope="module")
def whole(snapshot, case, shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
        yield load_chain(snapshot, [0], case.dtype, LIMITS, case.quantization)


@pytest.fixture(scope="module")
def answers(whole):
    return [generate(whole, prompt, count=COUNT, chunk=CHUNK) for prompt in PROMPTS]


def test_answers_are_not_trivial(answers):
    assert len(set(answers[0])) > 3
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize(
    ("case", "cuts"),
    [
        pytest.param(name, [0, *some], id=f"{name}-{[0, *some]}", marks=marks(name))
        for name, case in CASES.items()
        for count in range(1, case.num_layers)
        for some in itertools.combinations(range(1, case.num_layers), count)
    ],
    indirect=["case"],
)
def test_any_split_gives_the_same_tokens(snapshot, case, answers, cuts):
    chain = load_chain(snapshot, cuts, case.dtype, LIMITS, case.quantization)

    assert generate(chain, PROMPT, count=COUNT, chunk=CHUNK) == answers[0]
    assert {shard.dtype for shard in chain} == {case.dtype}


def test_sessions_in_a_batch_get_the_tokens_they_get_alone(whole, answers):
    tokens = [[prefill(whole, slot, prompt, chunk=CHUNK)] for slot, prompt in enumerate(PROMPTS)]
    for step in range(COUNT - 1):
        positions = [len(prompt) + step for prompt in PROMPTS]
        new = decode(whole, range(len(PROMPTS)), positions, [row[-1] for row in tokens])
        for row, token in zip(tokens, new, strict=True):
            row.append(token)

    assert tokens == answers


def states_of(snapshot, dtype, quantization, *, chunk):
    """Return the hidden states of the prompt after two layers."""
    shard = Shard.load(
        snapshot, LayerRange(0, 2), dtype=dtype, limits=LIMITS, quantization=quantization
    )
    states = hidden_states(shard, PROMPT, chunk=chunk)
    assert states.dtype == jnp.bfloat16
    return states.astype(np.float32)


def difference(left, right):
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def test_rounded_activations_can_be_turned_off(tmp_path):
    snapshot = Snapshot.open(make_llama_checkpoint(tmp_path, num_layers=3), "test/model")
    many, few = CHUNK, FEW_ROWS
    reference = states_of(snapshot, "int8", EXACT, chunk=few)

    exact = difference(states_of(snapshot, "int8", EXACT, chunk=many), reference)
    rounded = difference(states_of(snapshot, "int8", ROUNDED, chunk=many), reference)

    # bf16 alone rounds by some thousandths
    assert exact < rounded / 1.5
    assert rounded < 0.1
